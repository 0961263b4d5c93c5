//! Hostile requests by the hundred, and every bound of a request at its value and one past it (reliability.md, R5 and
//! R8).
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    net::TcpStream,
    sync::Mutex,
    thread::scope,
};

use common::{Answer, CONTEXT_TOKENS, Server};
use oxseek_engine::EngineHandle;
use oxseek_server::limits;
use serde_json::json;

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

/// Fields of both routes, each with what else must be there so that the value is looked at.
const PARAMETERS: [(&str, &str); 31] = [
    ("temperature", ""),
    ("top_p", ""),
    ("top_k", ""),
    ("min_p", ""),
    ("typical_p", ""),
    ("repetition_penalty", ""),
    ("repeat_last_n", ""),
    ("presence_penalty", ""),
    ("frequency_penalty", ""),
    ("logit_bias", ""),
    ("seed", ""),
    ("n", ""),
    ("stop", ""),
    ("stop_token_ids", ""),
    ("ignore_eos", ""),
    ("skip_special_tokens", ""),
    ("max_tokens", ""),
    ("max_completion_tokens", ""),
    ("logprobs", ""),
    ("top_logprobs", r#""logprobs": true, "#),
    ("stream", ""),
    ("stream_options", r#""stream": true, "#),
    ("model", ""),
    ("messages", ""),
    ("tools", ""),
    ("tool_choice", ""),
    ("response_format", ""),
    ("chat_template_kwargs", ""),
    ("metadata", ""),
    ("user", ""),
    ("no_such_field", ""),
];

/// What is put there; large ones are made in the test.
const VALUES: [&str; 19] = [
    "null",
    "true",
    "-1",
    "0",
    "1.5",
    "9223372036854775807",
    "-9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "1e308",
    "1e999",
    "NaN",
    "\"NaN\"",
    "\"\\u0000\"",
    "\"\\ud800\"",
    "[]",
    "{}",
    "[null, [[[[[[[[]]]]]]]], {}]",
    "{\"4294967296\": 1, \"\": {\"a\": [1]}}",
];

/// A client that keeps its connection; one request after the other.
struct Client(TcpStream);

impl Client {
    fn post(&mut self, path: &str, body: &str) -> (u16, String) {
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        self.0.write_all(head.as_bytes()).unwrap();
        self.0.write_all(body.as_bytes()).unwrap();
        let mut seen = Vec::new();
        let mut buffer = [0; 16384];
        while !is_whole(&seen) {
            let n = self.0.read(&mut buffer).unwrap();
            assert!(n > 0, "{body:.200}: closed after {}", String::from_utf8_lossy(&seen));
            seen.extend(&buffer[..n]);
        }
        let text = String::from_utf8(seen).unwrap();
        let status = text.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
        (status, text.split_once("\r\n\r\n").unwrap().1.to_string())
    }
}

fn is_whole(bytes: &[u8]) -> bool {
    let text = String::from_utf8_lossy(bytes);
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return false };
    let head = head.to_ascii_lowercase();
    match head.lines().find_map(|l| l.strip_prefix("content-length: ")) {
        Some(n) => body.len() >= n.parse().unwrap(),
        None => body.ends_with("\r\n0\r\n\r\n") || body == "0\r\n\r\n",
    }
}

fn hostile_bodies() -> Vec<(&'static str, String)> {
    let megabyte = format!("\"{}\"", "x".repeat(1 << 20));
    let deep = format!("{}1{}", "[".repeat(200), "]".repeat(200));
    let mut bodies = Vec::new();
    for (name, with) in PARAMETERS {
        let values = VALUES.iter().copied().chain([deep.as_str()]);
        // Once for each field would only be slow.
        let values = values.chain((name.len() % 5 == 0).then_some(megabyte.as_str()));
        for value in values {
            let messages = r#""messages": [{"role": "user", "content": "Hi"}], "#;
            let messages = if name == "messages" { "" } else { messages };
            let tokens = if name.starts_with("max_") { "" } else { r#""max_tokens": 1, "# };
            let with = if value == "null" { "" } else { with };
            bodies.push((name, format!("{{{messages}{tokens}{with}\"{name}\": {value}}}")));
        }
    }
    bodies
}

/// Whether an error names the field; a body that is no JSON, or too deep, names none.
fn is_answer(name: &str, body: &str, status: u16, answer: &str) -> bool {
    if status == 200 {
        return true;
    }
    let Ok(answer) = serde_json::from_str::<serde_json::Value>(answer) else { return false };
    let error = &answer["error"];
    let message = error["message"].as_str().unwrap_or_default();
    let parsed = serde_json::from_str::<serde_json::Value>(body).is_ok() && !body.contains(&"[".repeat(65));
    // Two names of one field: the error may be about what they both say.
    let name = if name == "max_completion_tokens" { "max_" } else { name };
    let named = error["param"].as_str().is_some_and(|p| p.contains(name) || message.contains(name));
    (400..500).contains(&status) && message.len() > 3 && error["type"].is_string() && (named || !parsed)
}

#[test]
fn hundreds_of_hostile_requests_get_an_answer_each() {
    let (server, engine) = Server::ready(4, 64);
    let bodies = hostile_bodies();
    assert!(bodies.len() > 600, "{}", bodies.len());
    let statuses = send_all(&server, &bodies);
    assert!(statuses[&400] > 400 && statuses[&200] > 30, "{statuses:?}");
    // What is made once is made: the same requests again take no more memory.
    let once = memory_kib();
    for _ in 0..2 {
        send_all(&server, &bodies);
    }
    println!("{once} KiB after the first time, {} after the third", memory_kib());
    common::wait_until("memory to be what it was after the first time", || {
        memory_kib() <= once + GROWTH_KIB_MAX
    });
    assert_eq!(server.metric("oxseek_panics_total", ""), 0.0);
    check_still_answers(&server, &engine);
}

/// What memory may grow by when the same requests come again: the allocator's own.
const GROWTH_KIB_MAX: u64 = 8 << 10;

/// Memory of this process in KiB, server and engine included, as Linux counts it.
fn memory_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let found = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap_or("0 kB");
    found.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Sends all bodies over eight connections, each of which must get a right answer; how often each status came.
fn send_all(server: &Server, bodies: &[(&str, String)]) -> BTreeMap<u16, usize> {
    let wrong = Mutex::new(Vec::new());
    let statuses = Mutex::new(BTreeMap::<u16, usize>::new());
    scope(|s| {
        for part in bodies.chunks(bodies.len().div_ceil(8)) {
            let (wrong, statuses) = (&wrong, &statuses);
            s.spawn(move || {
                let mut client = Client(server.connect());
                for (name, body) in part {
                    let (status, answer) = client.post(CHAT, body);
                    *statuses.lock().unwrap().entry(status).or_default() += 1;
                    if !is_answer(name, body, status, &answer) {
                        wrong.lock().unwrap().push(format!("{body:.200}: {status} {answer:.300}"));
                    }
                }
            });
        }
    });
    let wrong = wrong.into_inner().unwrap();
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
    statuses.into_inner().unwrap()
}

fn check_still_answers(server: &Server, engine: &EngineHandle) {
    let answer = server.post(TEXT, br#"{"prompt": [5, 6], "max_tokens": 3, "ignore_eos": true}"#);
    assert_eq!(answer.json()["usage"]["completion_tokens"], 3, "{answer:?}");
    common::wait_until("the books to balance", || {
        let s = engine.stats();
        s.blocks_used == 0 && s.requests_open == 0 && s.submitted == s.finished + s.cancelled + s.failed
    });
    assert_eq!(engine.stats().failed, 0);
}

/// What a body with `count` of something is answered, where `most` are allowed.
struct Bound {
    name: &'static str,
    most: usize,
    body: Box<dyn Fn(usize) -> String>,
}

fn bound(name: &'static str, most: usize, body: impl Fn(usize) -> String + 'static) -> Bound {
    Bound { name, most, body: Box::new(body) }
}

fn list<T: serde::Serialize + Clone>(item: T, count: usize) -> String {
    serde_json::to_string(&vec![item; count]).unwrap()
}

#[test]
fn every_bound_holds_at_its_value_and_one_past_it() {
    let (server, engine) = Server::ready(2, 70);
    let engine_limits = engine.limits().clone();
    let text = |rest: String| format!(r#"{{"prompt": [5], "max_tokens": 1, {rest}}}"#);
    let biases = |n: usize| (0..n).map(|i| format!("\"{i}\": 1")).collect::<Vec<_>>().join(", ");
    for b in [
        bound("prompt", limits::PROMPTS_MAX, |n| {
            format!(r#"{{"prompt": {}, "max_tokens": 1}}"#, list([5], n))
        }),
        bound("prompt", engine_limits.context_tokens_max - 1, |n| {
            format!(r#"{{"prompt": {}, "max_tokens": 1}}"#, list(5, n))
        }),
        bound("n", engine_limits.n_max, move |n| text(format!("\"n\": {n}"))),
        bound("stop", engine_limits.stop_strings_max, move |n| text(format!("\"stop\": {}", list("zz", n)))),
        bound("stop", engine_limits.stop_bytes_max, move |n| {
            text(format!("\"stop\": \"{}\"", "z".repeat(n)))
        }),
        bound("stop_token_ids", engine_limits.stop_tokens_max, move |n| {
            text(format!("\"stop_token_ids\": {}", list(9, n)))
        }),
        bound("logprobs", engine_limits.logprobs_max, move |n| text(format!("\"logprobs\": {n}"))),
        bound("logit_bias", engine_limits.logit_bias_max, move |n| {
            text(format!("\"logit_bias\": {{{}}}", biases(n)))
        }),
    ] {
        let answer = server.post(TEXT, (b.body)(b.most).as_bytes());
        assert_eq!(answer.status, 200, "{} {} of them: {answer:?}", b.name, b.most);
        let answer = server.post(TEXT, (b.body)(b.most + 1).as_bytes());
        assert_eq!(answer.status, 400, "{} {} of them: {answer:?}", b.name, b.most + 1);
        assert_eq!(answer.json()["error"]["param"], b.name);
    }
    messages(&server);
    depth(&server);
    heads(&server);
    bodies(&server);
    check_still_answers(&server, &engine);
}

/// So many messages are read, though they are longer than the context; one more is not.
fn messages(server: &Server) {
    let of = |n| {
        let body = format!(r#"{{"messages": {}}}"#, list(json!({"role": "user", "content": ""}), n));
        let answer = server.post(CHAT, body.as_bytes());
        assert_eq!(answer.status, 400, "{answer:?}");
        answer.json()["error"]["code"].as_str().unwrap().to_string()
    };
    const { assert!(limits::MESSAGES_MAX > CONTEXT_TOKENS) };
    assert_eq!(of(limits::MESSAGES_MAX), "context_length_exceeded");
    assert_eq!(of(limits::MESSAGES_MAX + 1), "invalid_value");
}

fn depth(server: &Server) {
    // The body itself and the field's object are two.
    let of = |n: usize| {
        let deep = format!("{}{}", "[".repeat(n - 2), "]".repeat(n - 2));
        server.post(
            TEXT,
            format!(r#"{{"prompt": [5], "max_tokens": 1, "metadata": {{"a": {deep}}}}}"#).as_bytes(),
        )
    };
    assert_eq!(of(limits::JSON_DEPTH_MAX).status, 200);
    let answer = of(limits::JSON_DEPTH_MAX + 1);
    assert!(answer.status == 400 && answer.body.contains("inside of each other"), "{answer:?}");
}

fn heads(server: &Server) {
    let get = |path: &str, headers: &str| -> Answer {
        server.raw(format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}\r\n").as_bytes())
    };
    let path = |n: usize| format!("/{}", "p".repeat(n - 1));
    assert_eq!(get(&path(limits::PATH_BYTES_MAX), "").status, 404);
    assert_eq!(get(&path(limits::PATH_BYTES_MAX + 1), "").status, 414);
    let headers = |n: usize| (0..n - 2).map(|i| format!("x{i}: y\r\n")).collect::<Vec<_>>().concat();
    assert_eq!(get("/health", &headers(limits::HEADERS_MAX)).status, 200);
    assert_eq!(get("/health", &headers(limits::HEADERS_MAX + 1)).status, 431);
    // The bound of the head's bytes is on what is read at once: a little below passes, twice as much does not.
    let wide = |n: usize| format!("x: {}\r\n", "y".repeat(n));
    assert_eq!(get("/health", &wide(limits::HEADER_BYTES_MAX - 1024)).status, 200);
    let status = get("/health", &wide(2 * limits::HEADER_BYTES_MAX)).status;
    assert!(matches!(status, 0 | 431), "{status}");
    let id = |n: usize| {
        let id = "i".repeat(n);
        get("/health", &format!("x-request-id: {id}\r\n")).header("x-request-id") == Some(id.as_str())
    };
    assert!(id(limits::REQUEST_ID_BYTES_MAX) && !id(limits::REQUEST_ID_BYTES_MAX + 1));
}

fn bodies(server: &Server) {
    let of = |n: usize| {
        let body = r#"{"prompt": [5], "max_tokens": 1}"#;
        server.post(TEXT, format!("{body}{}", " ".repeat(n - body.len())).as_bytes()).status
    };
    assert_eq!(of(limits::BODY_BYTES_MAX), 200);
    // The server may close while the client still sends; then there is no answer to read.
    assert!(matches!(of(limits::BODY_BYTES_MAX + 1), 0 | 413));
}
