//! Spans of requests, as a collector gets them.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpListener,
    sync::{Arc, Mutex},
};

use common::{Server, wait_until};
use oxseek_server::{KeyHash, KeyLimits, KeyRecord, Keyring, Role, ServerOptions, Tracer};
use serde_json::{Value, json};
use tungstenite::client::IntoClientRequest;

const CHAT: &str = "/v1/chat/completions";
const KEY: &str = "oxk_canary_trace_3b7a";
const SECRET: &str = "zanzibar-4711";

/// Takes whatever is posted to it and keeps it.
struct Collector {
    endpoint: String,
    messages: Arc<Mutex<Vec<(String, String)>>>,
}

impl Collector {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}/base", listener.local_addr().unwrap());
        let messages = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&messages);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = BufReader::new(stream.unwrap());
                let mut head = String::new();
                while !head.ends_with("\r\n\r\n") {
                    assert!(stream.read_line(&mut head).unwrap() > 0, "a whole head: {head}");
                }
                let head = head.to_ascii_lowercase();
                let length = head.lines().find_map(|l| l.strip_prefix("content-length: ")).unwrap();
                let mut body = vec![0; length.parse().unwrap()];
                stream.read_exact(&mut body).unwrap();
                kept.lock().unwrap().push((head, String::from_utf8(body).unwrap()));
                stream.get_mut().write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").unwrap();
            }
        });
        Self { endpoint, messages }
    }

    fn spans(&self) -> Vec<Value> {
        let messages = self.messages.lock().unwrap();
        let spans = |(_, body): &(String, String)| {
            let mut message: Value = serde_json::from_str(body).unwrap();
            message["resourceSpans"][0]["scopeSpans"][0]["spans"].take().as_array().unwrap().clone()
        };
        messages.iter().flat_map(spans).collect()
    }

    /// The span of the request with this id.
    fn span(&self, request_id: &str) -> Value {
        let has_id = |s: &Value| attribute(s, "gen_ai.request.id")["stringValue"] == request_id;
        let spans = self.spans();
        let mut found = spans.into_iter().filter(has_id);
        let span = found.next().unwrap_or_else(|| panic!("{request_id}"));
        assert_eq!(found.next(), None, "one span per request");
        span
    }
}

fn attribute(span: &Value, key: &str) -> Value {
    let all = span["attributes"].as_array().unwrap();
    all.iter().find(|a| a["key"] == key).map(|a| a["value"].clone()).unwrap_or_default()
}

fn traced(endpoint: &str) -> Server {
    let limits = KeyLimits::default();
    let record = KeyRecord { name: "alice".into(), hash: KeyHash::of(KEY), role: Role::User, limits };
    let keyring = Keyring::new(vec![record], &Keyring::default());
    let tracer = Tracer::to(endpoint).unwrap();
    let server = Server::with(ServerOptions { keyring, tracer, ..ServerOptions::default() });
    server.load(2, 4);
    server
}

fn post(server: &Server, path: &str, id: &str, parent: &str, body: &Value) -> u16 {
    let parent = if parent.is_empty() { String::new() } else { format!("traceparent: {parent}\r\n") };
    let headers = format!("authorization: Bearer {KEY}\r\nx-request-id: {id}\r\n{parent}");
    server.post_with(path, &headers, body.to_string().as_bytes()).status
}

#[test]
fn a_collector_gets_one_span_per_request_and_no_secret() {
    let collector = Collector::start();
    let server = traced(&collector.endpoint);
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let sampled = format!("00-{trace}-b7ad6b7169203331-01");
    let chat =
        json!({"messages": [{"role": "user", "content": SECRET}], "max_tokens": 3, "ignore_eos": true});
    assert_eq!(post(&server, CHAT, "chat", &sampled, &chat), 200);
    let mut stream = chat.clone();
    stream["stream"] = true.into();
    assert_eq!(post(&server, CHAT, "stream", "nonsense", &stream), 200);
    let two = json!({"prompt": [[5, 6], [7, 8, 9]], "n": 2, "max_tokens": 2, "ignore_eos": true});
    assert_eq!(post(&server, "/v1/completions", "two", "", &two), 200);
    let three = json!({"input": [[5], [6, 7], [8, 9, 10]]});
    assert_eq!(post(&server, "/v1/embeddings", "three", "", &three), 200);
    let message =
        json!({"model": "oxseek-demo", "max_tokens": 2, "messages": [{"role": "user", "content": SECRET}]});
    assert_eq!(post(&server, "/v1/messages", "message", &sampled, &message), 200);
    let path = format!("ws://{}/ws", server.address);
    let mut request = path.into_client_request().unwrap();
    let offered = format!("realtime, openai-insecure-api-key.{KEY}");
    request.headers_mut().insert("sec-websocket-protocol", offered.parse().unwrap());
    let (mut socket, _) = tungstenite::client(request, server.connect()).unwrap();
    let message = json!({"type": "chat", "id": "a", "body": chat});
    socket.send(tungstenite::Message::text(message.to_string())).unwrap();
    while !socket.read().unwrap().to_string().contains("done") {}
    // Its sampler left this one out, and this one never came to the engine.
    assert_eq!(post(&server, CHAT, "unsampled", &sampled.replace("-01", "-00"), &chat), 200);
    assert_eq!(post(&server, CHAT, "wrong", "", &json!({"messages": []})), 400);
    wait_until("all spans", || collector.spans().len() >= 6);
    assert_eq!(server.metric("oxseek_spans_dropped_total", &format!("authorization: Bearer {KEY}\r\n")), 0.0);
    server.stop().unwrap();
    assert_eq!(collector.spans().len(), 6);

    let span = collector.span("chat");
    assert_eq!((&span["traceId"], &span["parentSpanId"]), (&json!(trace), &json!("b7ad6b7169203331")));
    assert_eq!((&span["name"], &span["kind"]), (&json!("chat oxseek-demo"), &json!(2)));
    for (key, value) in [
        ("gen_ai.operation.name", json!({"stringValue": "chat"})),
        ("gen_ai.provider.name", json!({"stringValue": "oxseek"})),
        ("gen_ai.request.model", json!({"stringValue": "oxseek-demo"})),
        ("gen_ai.usage.output_tokens", json!({"intValue": "3"})),
        ("gen_ai.response.finish_reasons", json!({"arrayValue": {"values": [{"stringValue": "length"}]}})),
        ("error.type", Value::Null),
    ] {
        assert_eq!(attribute(&span, key), value, "{key}");
    }
    let seconds = |key: &str| attribute(&span, key)["doubleValue"].as_f64().unwrap();
    let first = seconds("gen_ai.latency.time_to_first_token");
    assert!(0.0 < first && first <= seconds("gen_ai.latency.e2e"));
    let nanos = |name: &str| span[name].as_str().unwrap().parse::<u128>().unwrap();
    assert!(nanos("startTimeUnixNano") < nanos("endTimeUnixNano"));

    let span = collector.span("stream");
    assert!(span.get("parentSpanId").is_none() && span["traceId"] != trace, "{span}");
    let span = collector.span("two");
    assert_eq!(span["name"], "text_completion oxseek-demo");
    assert_eq!(attribute(&span, "gen_ai.usage.input_tokens")["intValue"], "5");
    assert_eq!(attribute(&span, "gen_ai.usage.output_tokens")["intValue"], "8");
    assert_eq!(
        attribute(&span, "gen_ai.response.finish_reasons")["arrayValue"]["values"].as_array().unwrap().len(),
        4
    );
    let span = collector.span("three");
    assert_eq!(span["name"], "embeddings oxseek-demo");
    assert_eq!(attribute(&span, "gen_ai.usage.input_tokens")["intValue"], "6");
    assert!(attribute(&span, "gen_ai.latency.time_to_first_token").is_null());
    assert_eq!(collector.span("message")["parentSpanId"], "b7ad6b7169203331");

    for (head, body) in collector.messages.lock().unwrap().iter() {
        assert!(head.starts_with("post /base/v1/traces http/1.1\r\n"), "{head}");
        assert!(head.contains("content-type: application/json"), "{head}");
        assert!([KEY, SECRET, "alice"].iter().all(|secret| !body.contains(secret)), "{body}");
        let message: Value = serde_json::from_str(body).unwrap();
        let resource = &message["resourceSpans"][0]["resource"]["attributes"];
        assert_eq!(resource[0], json!({"key": "service.name", "value": {"stringValue": "oxseek"}}));
    }
}

#[test]
fn a_collector_that_is_down_costs_a_count() {
    // A port that nobody listens on any more.
    let endpoint = format!("http://{}", TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap());
    let server = traced(&endpoint);
    let chat = json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2});
    for i in 0..3 {
        assert_eq!(post(&server, CHAT, &format!("r{i}"), "", &chat), 200);
    }
    let key = format!("authorization: Bearer {KEY}\r\n");
    wait_until("all spans to be dropped", || server.metric("oxseek_spans_dropped_total", &key) == 3.0);
    assert_eq!(server.metric("oxseek_spans_sent_total", &key), 0.0);
}
