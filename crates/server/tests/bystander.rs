//! Grammars that mean harm are compiled beside the answers, not before them (reliability.md, R10). To see the gaps:
//! `cargo test --release -p oxseek-server --test bystander -- --nocapture`.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::{
    io::{Read, Write},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    thread::scope,
    time::{Duration, Instant},
};

use common::{CONTEXT_TOKENS, Server, post_bytes};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const STREAMS: usize = 6;
/// What the worst gap may be besides twice that of a quiet server: threads share the cores of a test machine.
const SLACK: Duration = Duration::from_millis(50);

/// Schemas, patterns and grammars that take long to compile, or never end.
fn hostile() -> Vec<Value> {
    let schema = |s: Value| json!({"type": "json_schema", "json_schema": {"name": "x", "schema": s}});
    let fields: serde_json::Map<String, Value> =
        (0..500).map(|i| (format!("f{i}"), json!({"type": "string", "minLength": i % 50}))).collect();
    let rules: Vec<String> = (0..1500).map(|i| format!("r{i}: \"a\" r{}\n", i + 1)).collect();
    let words: Vec<String> = (0..3000).map(|i| i.to_string()).collect();
    vec![
        schema(json!({"type": "object", "properties": fields})),
        schema(json!({"enum": (0..9000).map(|i| i.to_string()).collect::<Vec<_>>()})),
        schema(json!({"allOf": vec![json!({"type": "string", "pattern": "a.*b"}); 60]})),
        schema(json!({"type": "string", "pattern": "^(.*a.{20}.*b.{20}.*)+$"})),
        schema(json!({"$ref": "#"})),
        json!({"type": "regex", "regex": "((((a{1,100}){1,100}){1,100}){1,100}){1,100}"}),
        json!({"type": "regex", "regex": words.join("|")}),
        json!({"type": "regex", "regex": "[\\p{L}\\p{N}]{1,2000}[^\\p{L}]{1,2000}"}),
        json!({"type": "regex", "regex": format!("{}a{}", "(".repeat(60_000), ")".repeat(60_000))}),
        json!({"type": "grammar", "grammar": format!("start: r0\n{}r1500: \"z\"", rules.concat())}),
    ]
}

fn body(extra: &Value) -> Vec<u8> {
    let mut body = json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body.to_string().into_bytes()
}

/// The longest time between two reads of one long answer, and how many reads there were.
fn worst_gap(server: &Server) -> (Duration, usize) {
    let body = body(&json!({"stream": true, "ignore_eos": true, "max_tokens": CONTEXT_TOKENS - 50}));
    let mut stream = server.connect();
    stream.write_all(&post_bytes(CHAT, &body)).unwrap();
    let mut buffer = [0; 4096];
    let (mut last, mut worst, mut reads) = (None::<Instant>, Duration::ZERO, 0);
    while stream.read(&mut buffer).unwrap() > 0 {
        worst = worst.max(last.map_or(Duration::ZERO, |l| l.elapsed()));
        last = Some(Instant::now());
        reads += 1;
    }
    (worst, reads)
}

fn worst_of(server: &Server) -> Duration {
    let gaps = (0..STREAMS).map(|_| {
        let (worst, reads) = worst_gap(server);
        assert!(reads > CONTEXT_TOKENS / 4, "{reads} reads are no stream");
        worst
    });
    gaps.max().unwrap()
}

#[test]
fn hostile_grammars_do_not_hold_up_an_answer() {
    let (server, engine) = Server::ready(2, 8);
    let hostile: Vec<Vec<u8>> = hostile().into_iter().map(|f| body(&json!({"response_format": f}))).collect();
    let (over, compiled) = (AtomicBool::new(false), AtomicUsize::new(0));
    // What is made once is made before.
    server.post(CHAT, &hostile[0]);
    worst_gap(&server);
    let quiet = worst_of(&server);
    let crowded = scope(|s| {
        s.spawn(|| {
            for (at, body) in hostile.iter().enumerate().cycle() {
                if over.load(Relaxed) {
                    return;
                }
                let began = Instant::now();
                let answer = server.post(CHAT, body);
                assert!((200..500).contains(&answer.status), "{at}: {answer:?}");
                compiled.fetch_add(1, Relaxed);
                println!("{at}: {} after {:?}", answer.status, began.elapsed());
            }
        });
        let worst = worst_of(&server);
        over.store(true, Relaxed);
        worst
    });
    let compiled = compiled.load(Relaxed);
    println!("worst gap: {quiet:?} quiet, {crowded:?} while {compiled} hostile grammars came");
    assert!(compiled >= hostile.len(), "{compiled}");
    assert!(crowded <= 2 * quiet + SLACK, "{crowded:?}, {quiet:?} without them");
    assert_eq!(engine.stats().steps_failed, 0);
}
