//! Log-probabilities of prompts on the wire, against the logits of transformers.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::path::Path;

use common::Server;
use oxseek_selftest::golden::Golden;
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";
const VOCABULARY: usize = 4096;

fn golden() -> Golden {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../goldens/oxseek-demo.safetensors.gz");
    Golden::open(&path).unwrap()
}

fn ask(server: &Server, path: &str, body: &Value) -> Value {
    let answer = server.post(path, body.to_string().as_bytes());
    assert_eq!(answer.status, 200, "{body}: {answer:?}");
    answer.json()
}

/// Log-probabilities of a row of logits.
fn log_softmax(row: &[f32]) -> Vec<f64> {
    let top = row.iter().fold(f32::NEG_INFINITY, |m, &l| m.max(l));
    let sum: f64 = row.iter().map(|&l| f64::from(l - top).exp()).sum();
    row.iter().map(|&l| f64::from(l - top) - sum.ln()).collect()
}

fn near(value: &Value, want: f64) -> bool {
    (value.as_f64().unwrap() - want).abs() < 1e-3
}

#[test]
fn prompts_are_scored_as_transformers_does() {
    let (server, _engine) = Server::ready(2, 4);
    let golden = golden();
    for prompt in ["story", "chat"] {
        let ids = golden.ids(&format!("{prompt}.ids")).unwrap();
        let logits = golden.floats(&format!("{prompt}.logits")).unwrap();
        for count in [0, 1, 20] {
            let body = json!({"prompt": ids, "max_tokens": 1, "n": 2, "prompt_logprobs": count});
            let answer = ask(&server, TEXT, &body);
            assert_eq!(answer["choices"][0]["prompt_logprobs"], answer["choices"][1]["prompt_logprobs"]);
            let scores = answer["choices"][0]["prompt_logprobs"].as_array().unwrap();
            assert_eq!((scores.len(), &scores[0]), (ids.len(), &Value::Null));
            for (at, score) in scores.iter().enumerate().skip(1) {
                let want = log_softmax(&logits[(at - 1) * VOCABULARY..at * VOCABULARY]);
                let score = score.as_object().unwrap();
                let own = &score[&ids[at].to_string()];
                assert!(near(&own["logprob"], want[ids[at] as usize]), "{prompt} {at}: {own}");
                assert!((count.max(1)..=count + 1).contains(&score.len()), "{prompt} {at}: {}", score.len());
                for (id, entry) in score {
                    let logprob = want[id.parse::<usize>().unwrap()];
                    assert!(near(&entry["logprob"], logprob), "{prompt} {at} {id}: {entry}");
                    // Two that are as good as equal may change places.
                    let rank = entry["rank"].as_u64().unwrap() as usize;
                    let above = |margin: f64| want.iter().filter(|&&l| l > logprob + margin).count();
                    assert!(
                        (above(1e-3)..=above(-1e-3)).contains(&(rank - 1)),
                        "{prompt} {at} {id}: {entry}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_chat_scores_the_prompt_that_it_makes() {
    let (server, _engine) = Server::ready(2, 4);
    let messages = json!([{"role": "user", "content": "Which animal says meow?"}]);
    let ids = ask(&server, "/tokenize", &json!({"messages": messages}))["tokens"].take();
    let chat = json!({"messages": messages, "max_tokens": 1, "prompt_logprobs": 2});
    let chat = ask(&server, CHAT, &chat);
    let text = ask(&server, TEXT, &json!({"prompt": ids, "max_tokens": 1, "prompt_logprobs": 2}));
    assert_eq!(chat["prompt_logprobs"], text["choices"][0]["prompt_logprobs"]);
    assert_eq!(chat["prompt_logprobs"].as_array().unwrap().len(), ids.as_array().unwrap().len());
    let plain = ask(&server, CHAT, &json!({"messages": messages, "max_tokens": 1}));
    assert!(plain.get("prompt_logprobs").is_none());
}

#[test]
fn an_echoed_prompt_has_log_probabilities() {
    let (server, _engine) = Server::ready(2, 4);
    // The token that begins a text is put before the first prompt and is a part of the second.
    let bos = ask(&server, "/tokenize", &json!({"prompt": "", "return_token_strs": true}));
    let bos = bos["token_strs"][0].as_str().unwrap().to_string();
    let prompts = [String::from("Once upon a time"), format!("{bos}The cat")];
    let body = json!({
        "prompt": prompts, "max_tokens": 3, "temperature": 0, "echo": true, "logprobs": 2, "prompt_logprobs": 5,
    });
    let answer = ask(&server, TEXT, &body);
    for (choice, prompt) in answer["choices"].as_array().unwrap().iter().zip(&prompts) {
        let text = choice["text"].as_str().unwrap();
        assert!(text.starts_with(prompt), "{text:?}");
        let list = |name: &str| choice["logprobs"][name].as_array().unwrap();
        let (tokens, logprobs) = (list("tokens"), list("token_logprobs"));
        let (tops, offsets) = (list("top_logprobs"), list("text_offset"));
        let scores = choice["prompt_logprobs"].as_array().unwrap();
        assert_eq!(tokens.len(), scores.len() + 3);
        assert!([logprobs.len(), tops.len(), offsets.len()] == [tokens.len(); 3], "{choice}");
        assert!(logprobs[0].is_null() && tops[0].is_null() && tokens[0] == *bos, "{choice}");
        let texts: String = tokens.iter().map(|t| t.as_str().unwrap()).collect();
        assert_eq!(texts.strip_prefix(&bos), text.strip_prefix(&bos).or(Some(text)));
        for (at, score) in scores.iter().enumerate().skip(1) {
            let entry = score.as_object().unwrap().values().find(|e| e["decoded_token"] == tokens[at]);
            assert_eq!(entry.unwrap()["logprob"], logprobs[at]);
            assert!(tops[at].as_object().unwrap().len() <= 3);
        }
        let shown = usize::from(!prompt.starts_with(&bos));
        for (token, offset) in tokens.iter().zip(offsets).skip(shown) {
            let from: String = text.chars().skip(offset.as_u64().unwrap() as usize).collect();
            assert!(from.starts_with(token.as_str().unwrap()), "{token} at {offset} of {text:?}");
        }
    }
    // A stream tells the same, piece by piece.
    let mut body = body;
    body["stream"] = true.into();
    body["prompt"] = json!(prompts[0]);
    body.as_object_mut().unwrap().remove("prompt_logprobs");
    let stream = server.post(TEXT, body.to_string().as_bytes());
    let chunks: Vec<Value> = stream
        .body
        .split("\n\n")
        .filter_map(|part| serde_json::from_str(part.strip_prefix("data: ")?).ok())
        .collect();
    for name in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        let pieces = chunks.iter().filter_map(|c| c["choices"][0]["logprobs"][name].as_array()).flatten();
        let whole = answer["choices"][0]["logprobs"][name].as_array().unwrap();
        assert!(pieces.eq(whole), "{name}: {chunks:?}");
    }
    // Without log-probabilities only the text comes back.
    let plain =
        ask(&server, TEXT, &json!({"prompt": prompts[0], "max_tokens": 3, "temperature": 0, "echo": true}));
    assert_eq!(plain["choices"][0]["text"], answer["choices"][0]["text"]);
    assert!(plain["choices"][0]["logprobs"].is_null());
}
