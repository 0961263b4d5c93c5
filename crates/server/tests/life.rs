//! The life of a server and of its requests: loading, streams side by side, clients that leave, a full queue, the end.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::Duration,
};

use common::{Server, post_bytes, wait_until};
use oxseek_server::ServerOptions;
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";

fn story(about: &str, tokens: usize, stream: bool) -> Vec<u8> {
    let body = json!({
        "messages": [{"role": "user", "content": format!("Tell me a story about {about}.")}],
        "temperature": 0, "max_tokens": tokens, "ignore_eos": true, "stream": stream,
    });
    post_bytes(CHAT, body.to_string().as_bytes())
}

/// The JSON of each event of a stream, which must be framed as OpenAI frames it and end with `[DONE]`.
fn events(body: &str) -> Vec<Value> {
    let mut frames: Vec<&str> = body.split("\n\n").collect();
    assert_eq!(frames.pop(), Some(""), "a frame ends with an empty line: {body}");
    assert_eq!(frames.pop(), Some("data: [DONE]"), "{body}");
    frames.iter().map(|f| serde_json::from_str(f.strip_prefix("data: ").unwrap()).unwrap()).collect()
}

fn text_of(events: &[Value]) -> String {
    events.iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str()).collect()
}

/// Reads until the answer's first text has come.
fn read_first_text(stream: &mut TcpStream) {
    let mut seen = Vec::new();
    let mut buffer = [0; 4096];
    while !String::from_utf8_lossy(&seen).contains("\"content\":\"O") {
        let n = stream.read(&mut buffer).unwrap();
        assert!(n > 0, "{}", String::from_utf8_lossy(&seen));
        seen.extend(&buffer[..n]);
    }
}

#[test]
fn a_server_that_loads_says_so_and_is_ready_later() {
    let server = Server::loading();
    assert_eq!(server.get("/").status, 200);
    for path in ["/health", "/v1/models", "/metrics"] {
        let answer = server.get(path);
        assert_eq!(answer.status, 503, "{answer:?}");
        assert!(answer.head.contains("retry-after: "), "{answer:?}");
        assert!(answer.json()["error"]["message"].as_str().unwrap().contains("loading"));
    }
    assert_eq!(server.raw(&story("a cat", 1, false)).status, 503);
    let engine = server.load(2, 2);
    assert_eq!(server.get("/health").status, 200);
    assert_eq!(server.get("/v1/models").json()["data"][0]["id"], "oxseek-demo");
    assert_eq!(server.raw(&story("a cat", 1, false)).status, 200);
    engine.shutdown();
    assert_eq!(server.get("/health").status, 503);
    assert_eq!(server.raw(&story("a cat", 1, false)).status, 503);
}

#[test]
fn a_stream_is_framed_as_openai_frames_it() {
    let (server, _engine) = Server::ready(2, 2);
    let body = json!({
        "messages": [{"role": "user", "content": "Tell me a story."}], "temperature": 0, "max_tokens": 20,
        "stream": true, "stream_options": {"include_usage": true}, "n": 2,
    });
    let answer = server.post(CHAT, body.to_string().as_bytes());
    assert!(answer.head.contains("content-type: text/event-stream"), "{answer:?}");
    let events = events(&answer.body);
    for index in 0..2 {
        let of: Vec<&Value> =
            events.iter().filter(|e| e["choices"][0]["index"] == index).map(|e| &e["choices"][0]).collect();
        assert_eq!(of[0]["delta"], json!({"role": "assistant", "content": "", "refusal": null}));
        let reasons: Vec<&Value> = of.iter().map(|c| &c["finish_reason"]).filter(|r| !r.is_null()).collect();
        assert_eq!(reasons, ["length"]);
        assert_eq!(of.last().unwrap()["finish_reason"], "length");
    }
    let (usage, others) = events.split_last().unwrap();
    assert_eq!((&usage["choices"], &usage["usage"]["completion_tokens"]), (&json!([]), &json!(40)));
    for e in others {
        assert!(e["usage"].is_null() && e["object"] == "chat.completion.chunk", "{e}");
        assert_eq!(e["id"], usage["id"]);
    }
}

#[test]
fn a_long_prompt_tells_how_far_it_is_where_asked() {
    let (server, _engine) = Server::ready(2, 2);
    let ask = |progress: bool| {
        let body = json!({
            "messages": [{"role": "user", "content": "cat ".repeat(300)}], "max_tokens": 1, "stream": true,
            "stream_options": {"include_usage": true}, "return_progress": progress,
        });
        events(&server.post(CHAT, body.to_string().as_bytes()).body)
    };
    let events = ask(true);
    let read: Vec<&Value> = events.iter().map(|e| &e["prompt_progress"]).filter(|p| !p.is_null()).collect();
    let total = events.last().unwrap()["usage"]["prompt_tokens"].as_u64().unwrap();
    let done: Vec<u64> = read.iter().map(|p| p["processed"].as_u64().unwrap()).collect();
    assert!(done.len() > 2 && done.is_sorted() && done.iter().all(|d| *d < total), "{done:?} of {total}");
    assert!(read.iter().all(|p| p["total"] == total && p["cache"] == 0), "{read:?}");
    assert!(ask(false).iter().all(|e| e["prompt_progress"].is_null()));
    let whole = json!({"messages": [{"role": "user", "content": "Hi"}], "return_progress": true});
    assert_eq!(server.post(CHAT, whole.to_string().as_bytes()).status, 400);
}

#[test]
fn streams_side_by_side_are_what_each_is_alone() {
    let (server, engine) = Server::ready(8, 0);
    let about =
        ["a cat", "a dog", "two frogs", "the sea", "a king", "an old tree", "snow", "a boy and a bear"];
    let alone: Vec<String> = about
        .iter()
        .map(|a| {
            let whole = server.raw(&story(a, 60, false)).json();
            let streamed = text_of(&events(&server.raw(&story(a, 60, true)).body));
            assert_eq!(whole["choices"][0]["message"]["content"], streamed);
            streamed
        })
        .collect();
    let steps = engine.stats().steps;
    let together: Vec<String> = std::thread::scope(|scope| {
        let server = &server;
        let all: Vec<_> =
            about.iter().map(|a| scope.spawn(move || server.raw(&story(a, 60, true)).body)).collect();
        all.into_iter().map(|t| text_of(&events(&t.join().unwrap()))).collect()
    });
    assert_eq!(together, alone);
    // Eight requests of 60 tokens one after the other would take 480 steps.
    assert!(engine.stats().steps - steps < 300, "they did not share steps: {}", engine.stats().steps - steps);
}

#[test]
fn a_client_that_leaves_frees_its_blocks() {
    let (server, engine) = Server::ready(2, 2);
    let mut stream = server.connect();
    stream.write_all(&story("a cat", 400, true)).unwrap();
    read_first_text(&mut stream);
    drop(stream);
    wait_until("the end of the client that left", || engine.stats().requests_open == 0);
    let stats = engine.stats();
    assert_eq!((stats.cancelled, stats.finished, stats.blocks_used), (1, 0, 0), "{stats:?}");
    assert!(stats.generated_tokens < 400, "{stats:?}");
    // During the prompt, too, and without a stream.
    let mut stream = server.connect();
    let long = json!({"prompt": "cat ".repeat(300), "max_tokens": 100, "ignore_eos": true}).to_string();
    stream.write_all(&post_bytes("/v1/completions", long.as_bytes())).unwrap();
    wait_until("the second request", || engine.stats().submitted == 2);
    drop(stream);
    wait_until("the second request's end", || engine.stats().requests_open == 0);
    assert_eq!((engine.stats().blocks_used, engine.stats().cancelled), (0, 2));
}

#[test]
fn a_full_queue_says_so() {
    let (server, engine) = Server::ready(1, 1);
    let mut running = server.connect();
    running.write_all(&story("a cat", 480, true)).unwrap();
    read_first_text(&mut running);
    let mut waiting = server.connect();
    waiting.write_all(&story("a dog", 2, false)).unwrap();
    wait_until("the second request", || engine.stats().submitted == 2);
    let answer = server.raw(&story("a fox", 2, false));
    assert_eq!(answer.status, 429, "{answer:?}");
    assert!(answer.head.contains("retry-after: "), "{answer:?}");
    assert_eq!(answer.json()["error"]["code"], "queue_full");
    drop(running);
    let mut text = String::new();
    waiting.read_to_string(&mut text).unwrap();
    assert!(text.starts_with("HTTP/1.1 200"), "{text}");
}

#[test]
fn a_server_that_stops_lets_answers_end() {
    let (mut server, engine) = Server::ready(1, 8);
    let mut stream = server.connect();
    stream.write_all(&story("a cat", 400, true)).unwrap();
    read_first_text(&mut stream);
    // Those that wait for a place are answered, too: together they take longer than the looks below.
    let mut waiting: Vec<TcpStream> = (0..8).map(|_| server.connect()).collect();
    for stream in &mut waiting {
        stream.write_all(&story("a dog", 400, true)).unwrap();
    }
    wait_until("the other requests", || engine.stats().submitted == 9);
    server.begin_stop();
    // Until the last answer has ended, the door says why it is closed.
    wait_until("the closed door", || server.get("/health/ready").status != 200);
    for path in ["/health", "/health/ready", "/v1/models"] {
        let answer = server.get(path);
        assert_eq!(answer.status, 503, "{answer:?}");
        assert!(answer.head.contains("retry-after: ") && answer.body.contains("stopping"), "{answer:?}");
    }
    assert_eq!(server.get("/health/live").status, 200);
    assert_eq!(server.raw(&story("a dog", 1, false)).status, 503);
    for mut stream in [stream].into_iter().chain(waiting) {
        let mut rest = String::new();
        stream.read_to_string(&mut rest).unwrap();
        assert!(rest.contains("data: [DONE]"), "{rest}");
    }
    wait_until("the end of the requests", || engine.stats().finished == 9);
    wait_until("the end of the server", || TcpStream::connect(server.address).is_err());
    server.ended().unwrap();
}

#[test]
fn an_answer_that_takes_too_long_does_not_hold_the_server() {
    let mut server = Server::with(ServerOptions { drain_max: Duration::ZERO, ..ServerOptions::default() });
    server.load(1, 1);
    let mut stream = server.connect();
    stream.write_all(&story("a cat", 400, true)).unwrap();
    read_first_text(&mut stream);
    server.begin_stop();
    server.ended().unwrap();
    assert!(TcpStream::connect(server.address).is_err());
}

#[test]
fn heads_that_never_end_are_cut() {
    let server = Server::with(ServerOptions {
        head_max: Duration::from_millis(100),
        connections_max: 3,
        ..ServerOptions::default()
    });
    server.load(1, 1);
    // As many as there are places: nobody else comes in until they are cut.
    let mut half: Vec<TcpStream> = (0..3).map(|_| server.connect()).collect();
    for stream in &mut half {
        stream.write_all(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx: ").unwrap();
    }
    assert_eq!(server.get("/health").status, 200);
    for mut stream in half {
        let mut answer = String::new();
        // Whether the end comes with a reset is the kernel's business.
        let _ = stream.read_to_string(&mut answer);
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 408"), "{answer}");
    }
}

#[test]
fn readers_that_never_read_are_cut() {
    let server = Server::with(ServerOptions {
        write_max: Duration::from_millis(100),
        connections_max: 2,
        ..ServerOptions::default()
    });
    server.load(1, 1);
    // Pages that nobody reads fill every buffer on the way; then writing stands still.
    let mut stream = server.connect();
    let _ = stream.write_all(&b"GET /web/app.js HTTP/1.1\r\nhost: x\r\n\r\n".repeat(5000));
    // Before the first answer this connection may not have been counted yet.
    stream.peek(&mut [0]).unwrap();
    wait_until("the cut", || server.metric("oxseek_connections ", "") == 1.0);
    let mut pages = Vec::new();
    let _ = stream.read_to_end(&mut pages);
    let answers = String::from_utf8_lossy(&pages).matches("HTTP/1.1 200").count();
    assert!((1..5000).contains(&answers), "{answers}");
}
