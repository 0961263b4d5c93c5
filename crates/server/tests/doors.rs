//! Doors beside OpenAI's two: tokens, and answers over a WebSocket.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::net::TcpStream;

use common::{CONTEXT_TOKENS, Server, wait_until};
use serde_json::{Value, json};
use tungstenite::{Message, WebSocket, client::IntoClientRequest};

/// A client on a socket of the server.
struct Socket(WebSocket<TcpStream>);

impl Socket {
    fn open(server: &Server, path: &str) -> Self {
        let url = format!("ws://{}{path}", server.address);
        Self(tungstenite::client(url.as_str(), server.connect()).unwrap().0)
    }

    fn send(&mut self, message: &Value) {
        self.0.send(Message::text(message.to_string())).unwrap();
    }

    /// The next JSON message; None when the server has closed.
    fn next(&mut self) -> Option<Value> {
        loop {
            match self.0.read() {
                Ok(Message::Text(text)) => return Some(serde_json::from_str(&text).unwrap()),
                Ok(Message::Close(_)) | Err(_) => return None,
                Ok(_) => {}
            }
        }
    }

    /// Messages of one answer up to its last one.
    fn answer(&mut self, id: &str) -> Vec<Value> {
        let mut all = Vec::new();
        loop {
            let message = self.next().unwrap_or_else(|| panic!("closed after {all:?}"));
            if message["id"] != id {
                continue;
            }
            let is_last = message["type"] != "chunk";
            all.push(message);
            if is_last {
                return all;
            }
        }
    }
}

fn story(about: &str, tokens: usize) -> Value {
    json!({
        "messages": [{"role": "user", "content": format!("Tell me a story about {about}.")}],
        "temperature": 0, "max_tokens": tokens, "ignore_eos": true,
    })
}

fn text_of(messages: &[Value]) -> String {
    messages.iter().filter_map(|m| m["data"]["choices"][0]["delta"]["content"].as_str()).collect()
}

fn post(server: &Server, path: &str, body: &Value) -> (u16, Value) {
    let answer = server.post(path, body.to_string().as_bytes());
    (answer.status, answer.json())
}

#[test]
fn text_becomes_tokens_and_tokens_become_text() {
    let (server, _engine) = Server::ready(1, 1);
    let text = "Once upon a time, é 🦊.";
    let (status, got) = post(&server, "/tokenize", &json!({"prompt": text, "return_token_strs": true}));
    assert_eq!(status, 200, "{got}");
    let tokens = got["tokens"].as_array().unwrap();
    assert_eq!(
        (got["count"].as_u64(), got["max_model_len"].as_u64()),
        (Some(tokens.len() as u64), Some(CONTEXT_TOKENS as u64))
    );
    assert_eq!(got["token_strs"].as_array().unwrap().len(), tokens.len());
    // The first token begins a text, and only there.
    let (_, bare) = post(&server, "/tokenize", &json!({"prompt": text, "add_special_tokens": false}));
    assert_eq!(bare["tokens"].as_array().unwrap(), &tokens[1..]);
    assert_eq!(post(&server, "/tokenize", &json!({"content": text})).1["tokens"], bare["tokens"]);
    assert_eq!(post(&server, "/detokenize", &json!({"tokens": bare["tokens"]})).1["prompt"], text);
    // Pieces: whole texts are texts, parts of a character are bytes, and together they are the text.
    let (_, pieces) = post(&server, "/tokenize", &json!({"content": text, "with_pieces": true}));
    let bytes: Vec<u8> = pieces["tokens"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|t| match &t["piece"] {
            Value::String(s) => s.clone().into_bytes(),
            list => list.as_array().unwrap().iter().map(|b| b.as_u64().unwrap() as u8).collect(),
        })
        .collect();
    assert_eq!(String::from_utf8(bytes).unwrap(), text);
    // A control token is one token, or the text that spells it.
    let control = json!({"content": got["token_strs"][0], "parse_special": true});
    assert_eq!(post(&server, "/tokenize", &control).1["count"], 1);
    let control = json!({"content": got["token_strs"][0], "parse_special": false});
    assert!(post(&server, "/tokenize", &control).1["count"].as_u64().unwrap() > 1);
}

#[test]
fn wrong_token_requests_name_the_field() {
    let (server, _engine) = Server::ready(1, 1);
    for (path, body, field) in [
        ("/tokenize", json!({}), "prompt"),
        ("/tokenize", json!({"prompt": 7}), "prompt"),
        ("/tokenize", json!({"prompt": "a", "content": "b"}), "content"),
        ("/tokenize", json!({"prompt": "a", "add_special": 1}), "add_special"),
        ("/tokenize", json!({"prompt": "a", "wish": true}), "wish"),
        ("/detokenize", json!({}), "tokens"),
        ("/detokenize", json!({"tokens": [-1]}), "tokens"),
        ("/detokenize", json!({"tokens": [1 << 30]}), "tokens"),
        ("/detokenize", json!({"tokens": "a"}), "tokens"),
    ] {
        let (status, got) = post(&server, path, &body);
        assert_eq!((status, got["error"]["param"].as_str()), (400, Some(field)), "{body}: {got}");
    }
}

#[test]
fn answers_over_a_socket_are_those_of_http() {
    let (server, engine) = Server::ready(4, 4);
    let heroes = ["a cat", "two frogs", "the sea"];
    let mut socket = Socket::open(&server, "/ws");
    for hero in heroes {
        socket.send(&json!({"type": "chat", "id": hero, "body": story(hero, 40)}));
    }
    let mut messages: Vec<Value> = Vec::new();
    while messages.iter().filter(|m| m["type"] == "done").count() < heroes.len() {
        messages.push(socket.next().unwrap());
    }
    for hero in heroes {
        let of: Vec<Value> = messages.iter().filter(|m| m["id"] == hero).cloned().collect();
        assert_eq!(of.last().unwrap()["type"], "done", "{of:?}");
        let (_, whole) = post(&server, "/v1/chat/completions", &story(hero, 40));
        assert_eq!(text_of(&of), whole["choices"][0]["message"]["content"].as_str().unwrap());
    }
    let body = json!({"prompt": "Once", "max_tokens": 3, "temperature": 0});
    socket.send(&json!({"type": "completion", "id": "text", "body": body}));
    let texts: String =
        socket.answer("text").iter().filter_map(|m| m["data"]["choices"][0]["text"].as_str()).collect();
    assert_eq!(texts, post(&server, "/v1/completions", &body).1["choices"][0]["text"].as_str().unwrap());
    wait_until("free blocks", || engine.stats().blocks_used == 0);
}

#[test]
fn an_error_belongs_to_its_answer_and_the_socket_stays() {
    let (server, _engine) = Server::ready(2, 2);
    let mut socket = Socket::open(&server, "/ws");
    let mut bad = story("a cat", 3);
    bad["temperature"] = json!("hot");
    socket.send(&json!({"type": "chat", "id": "a", "body": bad}));
    let last = socket.answer("a").pop().unwrap();
    assert_eq!(
        (&last["type"], &last["status"], &last["error"]["param"]),
        (&json!("error"), &json!(400), &json!("temperature"))
    );
    socket.send(&json!({"type": "cancel", "id": "a"}));
    let lost = socket.next().unwrap();
    assert!(
        lost["id"].is_null() && lost["error"]["message"].as_str().unwrap().contains("no answer"),
        "{lost}"
    );
    socket.0.send(Message::binary(vec![1u8])).unwrap();
    assert!(socket.next().unwrap()["error"]["message"].as_str().unwrap().contains("binary"));
    socket.send(&json!({"type": "chat", "id": "a", "body": story("a cat", 3)}));
    assert_eq!(socket.answer("a").pop().unwrap()["type"], "done");
}

#[test]
fn an_answer_that_is_cancelled_ends_and_the_others_go_on() {
    let (server, engine) = Server::ready(2, 2);
    let mut socket = Socket::open(&server, "/ws");
    socket.send(&json!({"type": "chat", "id": "long", "body": story("a cat", 450)}));
    socket.send(&json!({"type": "chat", "id": "other", "body": story("a dog", 60)}));
    while socket.next().unwrap()["id"] != "long" {}
    socket.send(&json!({"type": "cancel", "id": "long"}));
    let mut ends = Vec::new();
    while ends.len() < 2 {
        let m = socket.next().unwrap();
        if m["type"] != "chunk" {
            ends.push((m["id"].as_str().unwrap().to_string(), m["type"].as_str().unwrap().to_string()));
        }
    }
    ends.sort();
    assert_eq!(
        ends,
        [("long".into(), "cancelled".into()), ("other".into(), "done".into())] as [(String, String); 2]
    );
    wait_until("free blocks", || engine.stats().blocks_used == 0);
    let stats = engine.stats();
    assert_eq!((stats.cancelled, stats.finished), (1, 1), "{stats:?}");
    assert!(stats.generated_tokens < 450, "{stats:?}");
    // A client that leaves cancels what runs.
    socket.send(&json!({"type": "chat", "id": "long", "body": story("a cat", 450)}));
    socket.answer_begins();
    drop(socket);
    wait_until("the end of the second", || engine.stats().cancelled == 2);
    wait_until("free blocks", || engine.stats().blocks_used == 0);
}

impl Socket {
    /// Waits for the first chunk.
    fn answer_begins(&mut self) {
        assert_eq!(self.next().unwrap()["type"], "chunk");
    }
}

#[test]
fn credit_bounds_how_far_an_answer_runs_ahead() {
    let (server, engine) = Server::ready(2, 2);
    let mut socket = Socket::open(&server, "/ws");
    socket.send(&json!({"type": "chat", "id": "slow", "body": story("a cat", 20), "credit": 3}));
    for _ in 0..3 {
        assert_eq!(socket.next().unwrap()["type"], "chunk");
    }
    // Another answer comes as a whole while the first one waits, so nothing of the first is under way.
    socket.send(&json!({"type": "chat", "id": "quick", "body": story("a dog", 20)}));
    let mut of_slow = 0;
    loop {
        let m = socket.next().unwrap();
        of_slow += u32::from(m["id"] == "slow");
        if m["type"] == "done" {
            break;
        }
    }
    assert_eq!(of_slow, 0);
    socket.send(&json!({"type": "credit", "id": "slow", "chunks": 1000}));
    assert_eq!(socket.answer("slow").pop().unwrap()["type"], "done");
    wait_until("free blocks", || engine.stats().blocks_used == 0);
}

#[test]
fn pages_of_other_sites_and_plain_requests_are_refused() {
    let (server, _engine) = Server::ready(1, 1);
    let plain = server.get("/ws");
    assert_eq!(plain.status, 426, "{plain:?}");
    let open = |origin: &str| {
        let mut request = format!("ws://{}/ws", server.address).into_client_request().unwrap();
        request.headers_mut().insert("origin", origin.parse().unwrap());
        tungstenite::client(request, server.connect())
    };
    assert!(open(&format!("http://{}", server.address)).is_ok());
    for foreign in ["http://evil.example", "null"] {
        let Err(e) = open(foreign) else { panic!("{foreign} was let in") };
        assert!(format!("{e:?}").contains("403"), "{e:?}");
    }
}

#[test]
fn a_server_that_stops_ends_its_sockets_after_their_answers() {
    let (mut server, engine) = Server::ready(2, 2);
    let mut idle = Socket::open(&server, "/ws");
    let mut busy = Socket::open(&server, "/ws");
    busy.send(&json!({"type": "chat", "id": "a", "body": story("a cat", 100)}));
    busy.answer_begins();
    server.begin_stop();
    assert!(idle.next().is_none());
    assert_eq!(busy.answer("a").pop().unwrap()["type"], "done");
    assert!(busy.next().is_none());
    wait_until("the end of the request", || engine.stats().finished == 1);
}
