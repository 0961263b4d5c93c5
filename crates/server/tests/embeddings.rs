//! Embeddings on the wire: equal to the scalar reference, whoever else is computed, and nobody waits for them.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::{io::Write, path::Path, thread::scope};

use common::{CONTEXT_TOKENS, Server, post_bytes, wait_until};
use oxseek_model::{Batch, DeepSeek, LanguageModel, LoadOptions, LogitRows};
use oxseek_server::{KeyHash, KeyLimits, KeyRecord, Keyring, Role, ServerOptions};
use oxseek_tensor::{CacheFormat, reference::ReferenceBackend};
use oxseek_weights::Checkpoint;
use serde_json::{Value, json};

const PATH: &str = "/v1/embeddings";
const WIDTH: usize = 384;

fn ask(server: &Server, body: &Value) -> Value {
    let answer = server.post(PATH, body.to_string().as_bytes());
    assert_eq!(answer.status, 200, "{body}: {answer:?}");
    answer.json()
}

fn vector(entry: &Value) -> Vec<f32> {
    entry["embedding"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect()
}

/// What the scalar reference makes of a prompt.
fn reference(model: &mut DeepSeek, ids: &[u32]) -> Vec<f32> {
    let mut batch = Batch::default();
    let blocks: Vec<u32> = (0..2).collect();
    batch.push(ids, 0, ids.len(), &blocks, LogitRows::Last);
    let limits = model.limits();
    model.forward(&batch, &mut vec![0.0; limits.vocab]).unwrap();
    let mut hidden = vec![0.0; limits.hidden];
    model.read_hidden(1, &mut hidden).unwrap();
    let length = hidden.iter().map(|x| x * x).sum::<f32>().sqrt();
    hidden.iter().map(|x| x / length).collect()
}

fn reference_model() -> DeepSeek {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/oxseek-demo");
    let options = LoadOptions {
        context_tokens_max: 128,
        cache_blocks: 2,
        step_rows_max: 128,
        logit_rows_max: 1,
        cache_format: CacheFormat::F32,
    };
    let checkpoint = Checkpoint::open(&folder).unwrap();
    DeepSeek::load(&checkpoint, Box::new(ReferenceBackend::new()), options, &mut |_, _| {}).unwrap()
}

#[test]
fn an_embedding_is_the_last_hidden_state_of_the_reference() {
    let (server, _engine) = Server::ready(2, 4);
    let text = "The cat sat on the mat.";
    let answer =
        ask(&server, &json!({"input": text, "model": "oxseek-demo", "user": "u", "dimensions": WIDTH}));
    assert_eq!((&answer["object"], &answer["model"]), (&json!("list"), &json!("oxseek-demo")));
    let tokens = server.post("/tokenize", json!({"prompt": text}).to_string().as_bytes()).json();
    let count = tokens["count"].clone();
    assert_eq!(answer["usage"], json!({"prompt_tokens": count, "total_tokens": count}));
    let entry = &answer["data"][0];
    assert_eq!((&entry["object"], &entry["index"]), (&json!("embedding"), &json!(0)));
    let got = vector(entry);
    assert_eq!(got.len(), WIDTH);
    let ids: Vec<u32> = serde_json::from_value(tokens["tokens"].clone()).unwrap();
    let want = reference(&mut reference_model(), &ids);
    let worst = got.iter().zip(&want).map(|(g, w)| (g - w).abs()).fold(0.0, f32::max);
    assert!(worst < 1e-4, "{worst}");
    assert!((got.iter().map(|x| x * x).sum::<f32>() - 1.0).abs() < 1e-5);
    // Every form of the input leads to the same bits.
    let tokens = &tokens["tokens"];
    for input in [json!([text]), json!(tokens), json!([tokens])] {
        assert_eq!(ask(&server, &json!({"input": input}))["data"], answer["data"], "{input}");
    }
    let packed = ask(&server, &json!({"input": text, "encoding_format": "base64"}));
    let packed = packed["data"][0]["embedding"].as_str().unwrap();
    let bytes: Vec<u8> = got.iter().flat_map(|x| x.to_le_bytes()).collect();
    assert_eq!(packed, base64::Engine::encode(&base64::engine::general_purpose::STANDARD, bytes));
    let told = server.get("/v1/capabilities").json();
    assert_eq!(told["embeddings"]["dimensions"], WIDTH);
}

#[test]
fn thirty_two_inputs_at_once_are_each_as_alone() {
    let (server, engine) = Server::ready(2, 2);
    let inputs: Vec<String> = (0..32).map(|i| format!("{} number {i}", "word ".repeat(i * 5 % 97))).collect();
    let chat = json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 40, "temperature": 0,
        "ignore_eos": true});
    let chat = || {
        server.post("/v1/chat/completions", chat.to_string().as_bytes()).json()["choices"][0]["message"]
            .take()
    };
    let alone = chat();
    // More inputs than places, and an answer that goes on beside them.
    let (together, beside) = scope(|s| {
        let beside = s.spawn(chat);
        (ask(&server, &json!({"input": inputs})), beside.join().unwrap())
    });
    assert_eq!(beside, alone);
    let data = together["data"].as_array().unwrap();
    assert_eq!(data.len(), 32);
    let mut tokens = 0;
    for (i, (entry, input)) in data.iter().zip(&inputs).enumerate() {
        let one = ask(&server, &json!({"input": input}));
        assert_eq!(
            (&entry["index"], &entry["embedding"]),
            (&json!(i), &one["data"][0]["embedding"]),
            "{input}"
        );
        tokens += one["usage"]["prompt_tokens"].as_u64().unwrap();
    }
    assert_eq!(together["usage"]["prompt_tokens"], tokens);
    // A client that leaves takes its inputs with it.
    let (finished, cancelled) = (engine.stats().finished, engine.stats().cancelled);
    let body = json!({"input": vec!["word ".repeat(400); 200].iter().enumerate().map(|(i, w)| format!("{i} {w}"))
        .collect::<Vec<_>>()});
    let mut stream = server.connect();
    stream.write_all(&post_bytes(PATH, body.to_string().as_bytes())).unwrap();
    wait_until("some inputs", || engine.stats().finished > finished);
    drop(stream);
    wait_until("the others to be forgotten", || {
        let stats = engine.stats();
        stats.cancelled > cancelled && (stats.requests_open, stats.blocks_used) == (0, 0)
    });
    assert!(engine.stats().finished < finished + 200);
}

#[test]
fn a_request_with_many_inputs_is_one_of_its_key() {
    let record =
        |limits| KeyRecord { name: "alice".into(), hash: KeyHash::of("oxk_alice"), role: Role::User, limits };
    let limits = KeyLimits { requests_per_minute: Some(1), concurrent: Some(1), ..KeyLimits::default() };
    let keyring = Keyring::new(vec![record(limits)], &Keyring::default());
    let server = Server::with(ServerOptions { keyring, ..ServerOptions::default() });
    server.load(2, 2);
    let key = "authorization: Bearer oxk_alice\r\n";
    let post = |inputs: usize| {
        let inputs: Vec<Vec<u32>> = (0..inputs as u32).map(|i| vec![5, 6, 7 + i]).collect();
        server.post_with(PATH, key, json!({"input": inputs}).to_string().as_bytes())
    };
    let answer = post(10);
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(answer.json()["usage"]["total_tokens"], 30);
    assert_eq!(server.metric("oxseek_key_tokens_total", key) as u64, 30);
    assert_eq!(post(1).status, 429, "a second request in a minute");
    // All of a request's tokens have room, or none is computed.
    server.state.set_keys(vec![record(KeyLimits { tokens_per_day: Some(40), ..KeyLimits::default() })]);
    assert_eq!(post(4).status, 429, "12 tokens more than the 10 that are left");
    assert_eq!(server.metric("oxseek_key_tokens_total", key) as u64, 30);
    assert_eq!(post(3).status, 200);
    assert_eq!(server.metric("oxseek_key_tokens_total", key) as u64, 39);
}

#[test]
fn wrong_inputs_are_named() {
    let (server, _engine) = Server::ready(2, 4);
    let many = vec!["x"; 2049];
    let long = vec![5; CONTEXT_TOKENS + 1];
    for (body, param) in [
        (json!({}), "input"),
        (json!({"input": null}), "input"),
        (json!({"input": ""}), "input"),
        (json!({"input": []}), "input"),
        (json!({"input": [[]]}), "input"),
        (json!({"input": ["a", ""]}), "input"),
        (json!({"input": 7}), "input"),
        (json!({"input": {"text": "a"}}), "input"),
        (json!({"input": ["a", 7]}), "input"),
        (json!({"input": [1, "a"]}), "input"),
        (json!({"input": [-1]}), "input"),
        (json!({"input": [4096]}), "input"),
        (json!({"input": many}), "input"),
        (json!({"input": long}), "input"),
        (json!({"input": "word ".repeat(2 * CONTEXT_TOKENS)}), "input"),
        (json!({"input": "a", "dimensions": 256}), "dimensions"),
        (json!({"input": "a", "dimensions": "all"}), "dimensions"),
        (json!({"input": "a", "encoding_format": "hex"}), "encoding_format"),
        (json!({"input": "a", "encoding_format": 1}), "encoding_format"),
        (json!({"input": "a", "user": 1}), "user"),
        (json!({"input": "a", "stream": true}), "stream"),
        (json!({"input": "a", "temperature": 1}), "temperature"),
    ] {
        let answer = server.post(PATH, body.to_string().as_bytes());
        let error = answer.json()["error"].take();
        assert_eq!((answer.status, error["param"].as_str()), (400, Some(param)), "{error}");
    }
    // As many tokens as the context has are not too many: no answer follows.
    ask(&server, &json!({"input": vec![5; CONTEXT_TOKENS]}));
    let other = server.post(PATH, json!({"input": "a", "model": "gpt-9"}).to_string().as_bytes());
    assert_eq!(other.status, 404);
}
