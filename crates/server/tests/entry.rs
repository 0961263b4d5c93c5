//! Who comes in, what they may use, what is logged about them, and that no key and no prompt ever shows.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::{
    fmt::Write as _,
    io::{Read, Write},
    sync::{Arc, Mutex},
    thread::scope,
};

use common::{Answer, Server, wait_until};
use oxseek_server::{
    KeyHash, KeyLimits, KeyRecord, Keyring, LogFormat, Logger, Origins, Role, ServerOptions,
};
use serde_json::{Value, json};
use tungstenite::{Message, client::IntoClientRequest};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";
const ALICE: &str = "oxk_canary_alice_5f1d2c";
const ADMIN: &str = "oxk_canary_admin_77ab01";
/// Those that read a prompt besides chat.
const DOORS: [&str; 6] =
    [TEXT, "/v1/responses", "/v1/messages", "/v1/messages/count_tokens", "/tokenize", "/detokenize"];
/// In a prompt; no answer, log or metric may hold it.
const SECRET: &str = "zanzibar-4711";

fn record(name: &str, key: &str, role: Role, limits: KeyLimits) -> KeyRecord {
    KeyRecord { name: name.into(), hash: KeyHash::of(key), role, limits }
}

fn options(limits: KeyLimits) -> ServerOptions {
    let records = vec![
        record("alice", ALICE, Role::User, limits),
        record("ops", ADMIN, Role::Admin, KeyLimits::default()),
    ];
    ServerOptions { keyring: Keyring::new(records, &Keyring::default()), ..ServerOptions::default() }
}

fn bearer(key: &str) -> String {
    format!("authorization: Bearer {key}\r\n")
}

fn text(tokens: usize) -> Vec<u8> {
    let body = json!({"prompt": [5, 6, 7], "max_tokens": tokens, "ignore_eos": true, "temperature": 0});
    body.to_string().into_bytes()
}

fn code(answer: &Answer) -> String {
    answer.json()["error"]["code"].as_str().unwrap_or_default().to_string()
}

#[test]
fn every_path_but_pages_and_health_needs_a_key() {
    let server = Server::with(options(KeyLimits::default()));
    server.load(2, 2);
    for path in ["/", "/health", "/health/live", "/health/ready"] {
        assert_eq!(server.get(path).status, 200, "{path}");
    }
    let long = bearer(&"k".repeat(600));
    for headers in ["", "authorization: Bearer \r\n", "x-api-key: oxk_wrong\r\n", &bearer("oxk_wrong"), &long]
    {
        for path in ["/metrics", "/v1/models", "/v1/models/oxseek-demo", "/v1/nothing", "/admin", "/debug"] {
            let answer = server.get_with(path, headers);
            assert_eq!(
                (answer.status, code(&answer).as_str()),
                (401, "invalid_api_key"),
                "{path} {answer:?}"
            );
            assert_eq!(answer.header("www-authenticate"), Some("bearer"));
            assert!(!answer.body.contains("oxk_wrong"));
        }
        // The body is not even read: this one never comes.
        let head = format!("POST {CHAT} HTTP/1.1\r\nhost: x\r\n{headers}content-length: 1000\r\n\r\n");
        let mut stream = server.connect();
        stream.write_all(head.as_bytes()).unwrap();
        let mut begin = [0; 12];
        stream.read_exact(&mut begin).unwrap();
        assert_eq!(&begin, b"HTTP/1.1 401");
    }
    for headers in [bearer(ALICE), format!("x-api-key: {ALICE}\r\n")] {
        assert_eq!(server.get_with("/v1/models", &headers).status, 200);
        assert_eq!(server.post_with(TEXT, &headers, &text(2)).status, 200);
        assert_eq!(server.get_with("/v1/nothing", &headers).status, 404);
        // There is an admin's key: metrics are not for others, and it is not for the model.
        assert_eq!(server.get_with("/metrics", &headers).status, 403);
    }
    assert_eq!(server.get_with("/metrics", &bearer(ADMIN)).status, 200);
    assert_eq!(server.post_with(TEXT, &bearer(ADMIN), &text(2)).status, 403);
    // A new set of keys counts at once.
    server.state.set_keys(vec![record("bob", "oxk_bob", Role::User, KeyLimits::default())]);
    assert_eq!(server.get_with("/v1/models", &bearer(ALICE)).status, 401);
    assert_eq!(server.get_with("/metrics", &bearer("oxk_bob")).status, 200);
}

#[test]
fn a_key_meets_its_limits_and_is_told_when_to_come_back() {
    let limits = KeyLimits {
        requests_per_minute: Some(4),
        tokens_per_minute: Some(1000),
        concurrent: Some(1),
        ..KeyLimits::default()
    };
    let server = Server::with(options(limits));
    let engine = server.load(2, 2);
    let key = bearer(ALICE);
    let answer = server.post_with(TEXT, &key, &text(7));
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(answer.header("x-ratelimit-limit-requests"), Some("4"));
    assert_eq!(answer.header("x-ratelimit-limit-tokens"), Some("1000"));
    assert!(answer.header("x-ratelimit-reset-tokens").is_some());
    // One that is larger than any minute can never pass: no time is named.
    let body = json!({"prompt": [5, 6, 7], "max_tokens": 500, "n": 2, "ignore_eos": true});
    let body_larger = json!({"prompt": vec![5; 400], "max_tokens": 100, "n": 2, "stream": true}).to_string();
    let small = KeyLimits { tokens_per_minute: Some(599), ..KeyLimits::default() };
    server.state.set_keys(vec![record("alice", ALICE, Role::User, small)]);
    let answer = server.post_with(TEXT, &key, body_larger.as_bytes());
    assert_eq!((answer.status, code(&answer).as_str()), (429, "rate_limit_exceeded"), "{answer:?}");
    assert!(answer.header("retry-after").is_none() && answer.body.contains("lower max_tokens"), "{answer:?}");
    // One at a time.
    server.state.set_keys(vec![record(
        "alice",
        ALICE,
        Role::User,
        KeyLimits { concurrent: Some(1), ..KeyLimits::default() },
    )]);
    let body = body.to_string();
    let head = format!(
        "POST {TEXT} HTTP/1.1\r\nhost: x\r\n{key}content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    // On a busy machine the first may end before the second comes; then both begin anew.
    let refused = (0..100).find_map(|_| {
        let submitted = engine.stats().submitted;
        let mut running = server.connect();
        running.write_all(head.as_bytes()).unwrap();
        wait_until("the first request", || engine.stats().submitted > submitted);
        let answer = server.post_with(TEXT, &key, &text(1));
        drop(running);
        wait_until("its end", || engine.stats().requests_open == 0);
        (answer.status != 200).then_some(answer)
    });
    let answer = refused.expect("a second request at the same time");
    assert_eq!((answer.status, answer.header("retry-after")), (429, Some("1")), "{answer:?}");
    assert_eq!(server.post_with(TEXT, &key, &text(1)).status, 200);
    // So many a minute.
    let few = KeyLimits { requests_per_minute: Some(1), ..KeyLimits::default() };
    server.state.set_keys(vec![record("carol", ALICE, Role::User, few)]);
    assert_eq!(server.post_with(TEXT, &key, &text(1)).status, 200);
    let answer = server.post_with(TEXT, &key, &text(1));
    assert_eq!(
        (answer.status, answer.header("x-ratelimit-remaining-requests")),
        (429, Some("0")),
        "{answer:?}"
    );
    let wait: u64 = answer.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=60).contains(&wait), "{answer:?}");
}

#[test]
fn a_quota_is_exact_to_the_token_under_32_streams() {
    const QUOTA: u64 = 3000;
    let server = Server::with(options(KeyLimits { tokens_per_day: Some(QUOTA), ..KeyLimits::default() }));
    let engine = server.load(8, 64);
    let key = bearer(ALICE);
    let used = || server.metric("oxseek_key_tokens_total{key=\"alice\"}", &bearer(ADMIN)) as u64;
    let paid = Mutex::new(0);
    let quit = Mutex::new(0);
    scope(|s| {
        for client in 0..32 {
            let (server, key, paid, quit) = (&server, &key, &paid, &quit);
            s.spawn(move || {
                for round in 0.. {
                    let length = 2 + (client * 7 + round * 5) % 23;
                    let body = json!({
                        "prompt": vec![5; 1 + client % 5], "max_tokens": length, "seed": client,
                        "stream": true, "stream_options": {"include_usage": true},
                    })
                    .to_string();
                    if round % 4 == 3 {
                        // One that leaves in the middle pays for what was computed.
                        let head = format!(
                            "POST {TEXT} HTTP/1.1\r\nhost: x\r\n{key}content-type: application/json\r\n\
                             content-length: {}\r\n\r\n{body}",
                            body.len()
                        );
                        let mut stream = server.connect();
                        stream.write_all(head.as_bytes()).unwrap();
                        let _ = stream.read(&mut [0; 300]);
                        *quit.lock().unwrap() += 1;
                        continue;
                    }
                    let answer = server.post_with(TEXT, key, body.as_bytes());
                    if answer.status == 429 {
                        assert_eq!(code(&answer), "insufficient_quota", "{answer:?}");
                        return;
                    }
                    assert_eq!(answer.status, 200, "{answer:?}");
                    let frames: Vec<&str> = answer.body.split("\n\n").collect();
                    let last = frames[frames.len() - 3].strip_prefix("data: ").unwrap();
                    let usage: Value = serde_json::from_str(last).unwrap();
                    *paid.lock().unwrap() += usage["usage"]["total_tokens"].as_u64().unwrap();
                }
            });
        }
    });
    wait_until("the last request", || engine.stats().requests_open == 0);
    let paid = *paid.lock().unwrap();
    assert!(paid <= used() && used() <= QUOTA, "{paid} paid, {} used", used());
    // Nobody pays for more than the engine counted; it counts prompts of those, too, that left before their turn.
    let computed = engine.stats().prompt_tokens + engine.stats().generated_tokens;
    assert!(used() <= computed, "{} used of {computed}", used());
    if *quit.lock().unwrap() == 0 {
        assert_eq!(paid, used());
    }
    // What is left can be used to the last token, and no further.
    let left = QUOTA - used();
    let answer = server.get_with("/v1/models", &key);
    assert_eq!(answer.header("x-ratelimit-remaining-tokens"), Some(left.to_string().as_str()));
    if left > 3 {
        let answer = server.post_with(TEXT, &key, &text(left as usize - 3));
        assert_eq!(answer.status, 200, "{left} left: {answer:?}");
        assert_eq!(answer.json()["usage"]["total_tokens"], left);
        assert_eq!(used(), QUOTA);
    }
    let answer = server.post_with(TEXT, &key, &text(1));
    assert_eq!((answer.status, code(&answer).as_str()), (429, "insufficient_quota"));
    assert!(answer.header("retry-after").is_some());
}

/// A log that the test can read.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Lines {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

#[test]
fn no_key_and_no_prompt_ever_shows() {
    for format in [LogFormat::Plain, LogFormat::Json] {
        let lines = Lines::default();
        let logger = Logger::to(format, lines.clone());
        let server = Server::with(ServerOptions { logger, ..options(KeyLimits::default()) });
        let engine = server.load(2, 2);
        let mut seen = String::new();
        let say = |extra: Value| {
            let mut body = json!({"messages": [{"role": "user", "content": SECRET}], "max_tokens": 2});
            body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            body.to_string().into_bytes()
        };
        let key = bearer(ALICE);
        for (headers, body) in [
            (key.clone(), say(json!({}))),
            (key.clone(), say(json!({"stream": true, "user": SECRET}))),
            (key.clone(), say(json!({"temperature": SECRET}))),
            (key.clone(), say(json!({"messages": SECRET}))),
            (key.clone(), say(json!({"messages": [{"role": SECRET, "content": ""}]}))),
            (key.clone(), say(json!({"stop": [SECRET], "n": 77}))),
            (key.clone(), say(json!({"metadata": {SECRET: SECRET}, "speed": SECRET}))),
            (key.clone(), format!("{{\"messages\": [{{\"{SECRET}").into_bytes()),
            (bearer(&format!("{ALICE}x")), say(json!({}))),
            (format!("x-api-key: {ADMIN}\r\n"), say(json!({}))),
            (format!("{key}x-request-id: mine-1\r\nreferer: http://x/?key={ALICE}\r\n"), say(json!({}))),
        ] {
            let answer = server.post_with(CHAT, &headers, &body);
            write!(seen, "{answer:?}").unwrap();
        }
        for path in [format!("/v1/{SECRET}?key={ALICE}"), format!("/{ALICE}")] {
            let answer = server.get_with(&path, &key);
            write!(seen, "{answer:?}").unwrap();
        }
        // Each door has its own way to say what is wrong.
        let wrong = json!({"input": {SECRET: 1}, "messages": SECRET, "prompt": {SECRET: 1}, "model": 7});
        for path in DOORS {
            let answer = server.post_with(path, &key, wrong.to_string().as_bytes());
            assert!((400..500).contains(&answer.status), "{path}: {answer:?}");
            write!(seen, "{answer:?}").unwrap();
        }
        seen += &server.get_with("/metrics", &bearer(ADMIN)).body;
        wait_until("the end", || engine.stats().requests_open == 0);
        wait_until("the log", || {
            lines.text().lines().count() >= 14 + DOORS.len() + engine.stats().finished as usize
        });
        let log = lines.text();
        for (what, text) in [("answers", &seen), ("log", &log)] {
            for secret in [ALICE, ADMIN, SECRET] {
                assert!(!text.contains(secret), "{what} hold {secret}: {text}");
            }
        }
        assert!(log.contains("mine-1") && log.contains("alice") && log.contains(CHAT), "{log}");
        assert!(seen.contains("x-request-id: mine-1"));
        if format == LogFormat::Json {
            log.lines().for_each(|l| assert!(serde_json::from_str::<Value>(l).is_ok(), "{l}"));
        }
    }
}

/// Everything that the server says on a socket at `path`, from its handshake to its close, to somebody who sends
/// `messages`. The key comes as a browser sends it, in the query, and in a header.
fn heard(server: &Server, path: &str, key: &str, messages: &[String]) -> String {
    let url = format!("ws://{}{path}?key={key}", server.address);
    let mut request = url.into_client_request().unwrap();
    let offered = format!("realtime, openai-insecure-api-key.{key}");
    request.headers_mut().insert("sec-websocket-protocol", offered.parse().unwrap());
    request.headers_mut().insert("cookie", format!("key={key}").parse().unwrap());
    let mut heard = String::new();
    let mut socket = match tungstenite::client(request, server.connect()) {
        Ok((socket, handshake)) => {
            write!(heard, "{handshake:?}").unwrap();
            socket
        }
        Err(refused) => return format!("{refused:?}"),
    };
    for message in messages {
        socket.send(Message::text(message.as_str())).unwrap();
        let last = ["done", "error", "response.completed", "response.incomplete"];
        loop {
            let text = match socket.read().unwrap_or_else(|e| panic!("{e} after {message}: {heard}")) {
                Message::Text(text) => text,
                Message::Close(why) => panic!("closed after {message}: {why:?}"),
                _ => continue,
            };
            heard += &text;
            let kind = serde_json::from_str::<Value>(&text).unwrap()["type"].clone();
            if last.iter().any(|l| kind == *l) {
                break;
            }
        }
    }
    // Bytes are not spoken here.
    socket.send(Message::binary(key.as_bytes().to_vec())).unwrap();
    socket.close(None).unwrap();
    while let Ok(message) = socket.read() {
        write!(heard, "{message:?}").unwrap();
    }
    heard
}

#[test]
fn no_key_and_no_prompt_shows_on_a_socket() {
    let lines = Lines::default();
    let logger = Logger::to(LogFormat::Json, lines.clone());
    let server = Server::with(ServerOptions { logger, ..options(KeyLimits::default()) });
    let engine = server.load(2, 2);
    let chat = |body: Value| json!({"type": "chat", "id": "a", "body": body}).to_string();
    let user = json!([{"role": "user", "content": SECRET}]);
    let plain = [
        chat(json!({"messages": user, "max_tokens": 2})),
        chat(json!({"messages": user, "temperature": SECRET})),
        chat(json!({"messages": SECRET, "speed": ALICE})),
        json!({"type": SECRET, "id": ALICE, "key": ALICE}).to_string(),
        format!("{{\"type\": \"{ALICE}"),
    ];
    let create = |body: Value| {
        let mut all = json!({"type": "response.create", "store": false, "max_output_tokens": 16});
        all.as_object_mut().unwrap().extend(body.as_object().unwrap().clone());
        all.to_string()
    };
    let responses = [
        create(json!({"input": SECRET})),
        create(json!({"input": SECRET, "temperature": SECRET})),
        create(json!({"input": {SECRET: ALICE}})),
        create(json!({"input": SECRET, "previous_response_id": "resp_none"})),
        json!({"type": ALICE, "input": SECRET}).to_string(),
        format!("{{\"type\": \"{ALICE}"),
    ];
    let mut seen = String::new();
    for (path, messages) in [("/ws", &plain[..]), ("/v1/responses", &responses[..])] {
        let said = heard(&server, path, ALICE, messages);
        assert!(said.contains("101") && said.contains("bytes of binary"), "{said}");
        seen += &said;
        let said = heard(&server, path, &format!("{ALICE}x"), messages);
        assert!(said.contains("401"), "{said}");
        seen += &said;
        seen += &heard(&server, path, ADMIN, &[]);
    }
    assert_eq!(engine.stats().finished, 2);
    seen += &server.get_with("/metrics", &bearer(ADMIN)).body;
    wait_until("the log", || lines.text().matches("\"/ws\"").count() >= 2);
    let log = lines.text();
    for (what, text) in [("answers", &seen), ("log", &log)] {
        for secret in [ALICE, ADMIN, SECRET] {
            assert!(!text.contains(secret), "{what} hold {secret}: {text}");
        }
    }
}

#[test]
fn pages_of_others_come_in_only_where_they_may() {
    let origins = Origins { allowed: vec!["https://chat.example".into()], hosts: Vec::new() };
    let server = Server::with(ServerOptions { origins, ..ServerOptions::default() });
    server.load(1, 1);
    let friend = "origin: https://chat.example\r\n";
    let answer = server.post_with(TEXT, friend, &text(1));
    assert_eq!(
        (answer.status, answer.header("access-control-allow-origin")),
        (200, Some("https://chat.example"))
    );
    assert!(answer.header("access-control-expose-headers").unwrap().contains("x-request-id"));
    let ask = |origin: &str| {
        let head = format!(
            "OPTIONS {CHAT} HTTP/1.1\r\nhost: x\r\nconnection: close\r\norigin: {origin}\r\n\
             access-control-request-method: POST\r\naccess-control-request-headers: authorization\r\n\r\n"
        );
        server.raw(head.as_bytes())
    };
    let answer = ask("https://chat.example");
    assert_eq!((answer.status, answer.header("access-control-allow-headers")), (204, Some("authorization")));
    for origin in ["https://evil.example", "null", "https://chat.example.evil"] {
        let answer = ask(origin);
        assert_eq!((answer.status, answer.header("access-control-allow-origin")), (403, None), "{answer:?}");
        let answer = server.post_with(TEXT, &format!("origin: {origin}\r\n"), &text(1));
        assert_eq!((answer.status, code(&answer).as_str()), (403, "foreign_origin"));
    }
    // A name that was pointed at this machine.
    let rebound = "GET /v1/models HTTP/1.1\r\nhost: evil.example:8080\r\nconnection: close\r\n\r\n";
    assert_eq!(server.raw(rebound.as_bytes()).status, 403);
    assert_eq!(server.get("/v1/models").status, 200);
}

#[test]
fn metrics_have_the_names_that_scrapers_of_vllm_know() {
    let server = Server::loading();
    let engine = server.load(2, 2);
    for _ in 0..3 {
        assert_eq!(server.post(TEXT, &text(5)).status, 200);
    }
    wait_until("the end", || engine.stats().requests_open == 0);
    let page = server.get("/metrics").body;
    for (name, kind) in [
        ("vllm:num_requests_running", "gauge"),
        ("vllm:num_requests_waiting", "gauge"),
        ("vllm:kv_cache_usage_perc", "gauge"),
        ("vllm:cache_config_info", "gauge"),
        ("vllm:prompt_tokens_total", "counter"),
        ("vllm:generation_tokens_total", "counter"),
        ("vllm:prefix_cache_queries_total", "counter"),
        ("vllm:prefix_cache_hits_total", "counter"),
        ("vllm:request_success_total", "counter"),
        ("vllm:time_to_first_token_seconds", "histogram"),
        ("vllm:inter_token_latency_seconds", "histogram"),
        ("vllm:time_per_output_token_seconds", "histogram"),
        ("vllm:e2e_request_latency_seconds", "histogram"),
        ("vllm:request_queue_time_seconds", "histogram"),
        ("vllm:request_prefill_time_seconds", "histogram"),
        ("vllm:request_decode_time_seconds", "histogram"),
    ] {
        assert!(page.contains(&format!("# TYPE {name} {kind}\n")), "{name}: {page}");
    }
    let model = "model_name=\"oxseek-demo\"";
    for row in [
        format!("vllm:request_success_total{{{model},finished_reason=\"length\"}} 3"),
        format!("vllm:generation_tokens_total{{{model}}} 15"),
        format!("vllm:time_to_first_token_seconds_count{{{model}}} 3"),
        format!("vllm:inter_token_latency_seconds_count{{{model}}} 12"),
        format!("vllm:time_per_output_token_seconds_count{{{model}}} 3"),
        format!("vllm:request_generation_tokens_sum{{{model}}} 15"),
        "http_requests_total{method=\"POST\",handler=\"/v1/completions\",status=\"200\"} 3".into(),
    ] {
        assert!(page.contains(&(row.clone() + "\n")), "{row}: {page}");
    }
    // Every row has a type, no row is there twice.
    let rows: Vec<&str> = page.lines().filter(|l| !l.starts_with('#')).collect();
    let names: std::collections::HashSet<&str> = rows.iter().map(|r| r.rsplit_once(' ').unwrap().0).collect();
    assert_eq!(names.len(), rows.len());
}
