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
fn no_door_takes_a_key_twice() {
    let (server, _engine) = Server::ready(1, 1);
    let body = r#"{"model": "oxseek-demo", "metadata": {"a": 1, "a": 1}}"#;
    for path in [
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/responses/input_tokens",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/tokenize",
        "/detokenize",
    ] {
        let answer = server.post(path, body.as_bytes());
        assert_eq!(answer.status, 400, "{path}: {answer:?}");
        assert!(answer.body.contains("metadata.a: is there twice"), "{path}: {answer:?}");
    }
    for path in ["/ws", "/v1/responses"] {
        let mut socket = Socket::open(&server, path);
        socket.0.send(Message::text(body)).unwrap();
        let error = socket.next().unwrap();
        assert_eq!(
            (&error["type"], &error["error"]["param"]),
            (&json!("error"), &json!("metadata.a")),
            "{path}"
        );
    }
}

#[test]
fn answers_over_a_socket_are_those_of_http() {
    let (server, engine) = Server::ready(4, 4);
    let heroes = ["a cat", "two frogs", "the sea"];
    let mut socket = Socket::open(&server, "/ws");
    for hero in heroes {
        socket.send(&json!({"type": "chat", "id": hero, "body": story(hero, 15)}));
    }
    let mut messages: Vec<Value> = Vec::new();
    while messages.iter().filter(|m| m["type"] == "done").count() < heroes.len() {
        messages.push(socket.next().unwrap());
    }
    for hero in heroes {
        let of: Vec<Value> = messages.iter().filter(|m| m["id"] == hero).cloned().collect();
        assert_eq!(of.last().unwrap()["type"], "done", "{of:?}");
        let (_, whole) = post(&server, "/v1/chat/completions", &story(hero, 15));
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
        tungstenite::client(request, server.connect()).map_err(|e| format!("{e:?}"))
    };
    assert!(open(&format!("http://{}", server.address)).is_ok());
    for foreign in ["http://evil.example", "null"] {
        let Err(e) = open(foreign) else { panic!("{foreign} was let in") };
        assert!(e.contains("403"), "{e}");
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

// ---- /v1/responses and /v1/messages ---------------------------------------------------------------------------------

fn request(server: &Server, method: &str, path: &str) -> (u16, Value) {
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n",
        server.address
    );
    let answer = server.raw(head.as_bytes());
    (answer.status, answer.json())
}

/// The events of a stream whose frames have names, which must be the types of what they hold.
fn named_events(server: &Server, path: &str, body: &Value) -> Vec<Value> {
    let answer = server.post(path, body.to_string().as_bytes());
    assert_eq!(answer.status, 200, "{answer:?}");
    assert!(answer.head.contains("content-type: text/event-stream"), "{answer:?}");
    let mut frames: Vec<&str> = answer.body.split("\n\n").collect();
    assert_eq!(frames.pop(), Some(""), "a frame ends with an empty line");
    let event = |frame: &str| {
        let (name, data) = frame.split_once('\n').unwrap();
        let event: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(event["type"], name.strip_prefix("event: ").unwrap());
        event
    };
    frames.into_iter().map(event).collect()
}

fn weather_tool() -> Value {
    json!({"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]})
}

/// What a response says, without what differs from one to the next.
fn said(response: &Value) -> Vec<Value> {
    let part = |item: &Value| match item["type"].as_str().unwrap() {
        "function_call" => json!([item["name"], item["arguments"]]),
        _ => json!([item["type"], item["content"][0]["text"]]),
    };
    response["output"].as_array().unwrap().iter().map(part).collect()
}

#[test]
fn a_response_is_the_chat_routes_answer() {
    let (server, engine) = Server::ready(2, 2);
    let mut body = json!({
        "input": "Tell me a story about a cat.", "temperature": 0, "max_output_tokens": 60,
        "reasoning": {"effort": "low"}, "metadata": {"a": "b"},
    });
    let (status, response) = post(&server, "/v1/responses", &body);
    assert_eq!(status, 200, "{response}");
    let mut chat = story("a cat", 60);
    chat["reasoning_effort"] = json!("low");
    chat["ignore_eos"] = json!(false);
    let (_, whole) = post(&server, "/v1/chat/completions", &chat);
    let message = &whole["choices"][0]["message"];
    let mut want = Vec::new();
    for (kind, name) in [("reasoning", "reasoning_content"), ("message", "content")] {
        if message[name].as_str().is_some_and(|t| !t.is_empty()) {
            want.push(json!([kind, message[name]]));
        }
    }
    assert_eq!(said(&response), want);
    assert_eq!(response["usage"]["input_tokens"], whole["usage"]["prompt_tokens"]);
    assert_eq!(response["usage"]["output_tokens"], whole["usage"]["completion_tokens"]);
    assert_eq!(response["metadata"], json!({"a": "b"}));
    // A stream tells the same, and its last event the whole response.
    body["stream"] = json!(true);
    let events = named_events(&server, "/v1/responses", &body);
    let last = &events.last().unwrap()["response"];
    assert_eq!(said(last), want);
    assert_eq!(last["status"], response["status"]);
    let deltas: String = events
        .iter()
        .filter(|e| e["type"] == "response.output_text.delta")
        .map(|e| e["delta"].as_str().unwrap())
        .collect();
    assert_eq!(deltas, message["content"].as_str().unwrap_or_default());
    // It can be asked for again, and deleted.
    let path = format!("/v1/responses/{}", last["id"].as_str().unwrap());
    assert_eq!(request(&server, "GET", &path), (200, last.clone()));
    let (_, items) = request(&server, "GET", &format!("{path}/input_items?order=asc&limit=5"));
    assert_eq!(items["data"][0]["content"][0]["text"], "Tell me a story about a cat.");
    assert_eq!(request(&server, "DELETE", &path).0, 200);
    assert_eq!(request(&server, "GET", &path).0, 404);
    wait_until("free blocks", || engine.stats().blocks_used == 0);
}

#[test]
fn a_response_continues_the_one_before() {
    let (server, _engine) = Server::ready(2, 2);
    let ask = |body: Value| {
        let (status, response) = post(&server, "/v1/responses", &body);
        assert_eq!(status, 200, "{response}");
        response
    };
    let first = ask(json!({"input": "Hello!", "temperature": 0, "max_output_tokens": 30}));
    let text = first["output"][0]["content"][0]["text"].as_str().unwrap();
    let second = json!({"input": "And then?", "temperature": 0, "max_output_tokens": 20});
    let mut continued = second.clone();
    continued["previous_response_id"] = first["id"].clone();
    let continued = ask(continued);
    let mut whole = second.clone();
    whole["input"] = json!([
        {"role": "user", "content": "Hello!"}, {"role": "assistant", "content": text},
        {"role": "user", "content": "And then?"},
    ]);
    assert_eq!(said(&continued), said(&ask(whole)));
    let counted = json!({"input": "And then?", "previous_response_id": first["id"]});
    assert_eq!(
        post(&server, "/v1/responses/input_tokens", &counted).1["input_tokens"],
        continued["usage"]["input_tokens"]
    );
    let lost = json!({"input": "a", "previous_response_id": "resp_0"});
    let (status, e) = post(&server, "/v1/responses", &lost);
    assert_eq!((status, &e["error"]["code"]), (400, &json!("previous_response_not_found")));
}

#[test]
fn a_response_in_the_background_can_be_cancelled() {
    let (server, engine) = Server::ready(2, 2);
    let body = json!({"input": "Tell me a story.", "temperature": 0, "background": true, "logit_bias": {}});
    let (_, begun) = post(&server, "/v1/responses", &body);
    let path = format!("/v1/responses/{}", begun["id"].as_str().unwrap());
    assert_eq!(begun["status"], "in_progress");
    assert_eq!(request(&server, "POST", &format!("{path}/cancel")).1["status"], "cancelled");
    wait_until("the end", || request(&server, "GET", &path).1["status"] != "in_progress");
    wait_until("free blocks", || engine.stats().blocks_used == 0);
    let (_, done) = post(&server, "/v1/responses", &body);
    let path = format!("/v1/responses/{}", done["id"].as_str().unwrap());
    wait_until("the answer", || request(&server, "GET", &path).1["status"] == "completed");
}

#[test]
fn a_socket_of_responses_remembers_its_last_one() {
    let (server, engine) = Server::ready(2, 2);
    let mut socket = Socket::open(&server, "/v1/responses");
    let mut create = json!({"type": "response.create", "input": "Hello!", "temperature": 0, "store": false,
        "max_output_tokens": 30});
    let mut turn = |body: &Value| {
        socket.send(body);
        let mut events = Vec::new();
        loop {
            let event = socket.next().unwrap();
            let kind = event["type"].as_str().unwrap().to_string();
            events.push(event);
            if matches!(kind.as_str(), "response.completed" | "response.incomplete" | "error") {
                return events;
            }
        }
    };
    let first = turn(&create);
    assert_eq!(first[0]["type"], "response.created");
    let id = first.last().unwrap()["response"]["id"].clone();
    create["previous_response_id"] = id.clone();
    create["input"] = json!("And then?");
    let second = turn(&create);
    let response = &second.last().unwrap()["response"];
    assert!(
        response["usage"]["input_tokens"].as_u64()
            > first.last().unwrap()["response"]["usage"]["input_tokens"].as_u64()
    );
    // The first one is forgotten, and nobody else ever knew it.
    let lost = turn(&create);
    assert_eq!(
        (&lost[0]["status"], &lost[0]["error"]["code"]),
        (&json!(400), &json!("previous_response_not_found"))
    );
    assert_eq!(request(&server, "GET", &format!("/v1/responses/{}", id.as_str().unwrap())).0, 404);
    // One at a time; a cancel makes room.
    create["previous_response_id"] = Value::Null;
    create["max_output_tokens"] = json!(400);
    socket.send(&create);
    socket.send(&create);
    socket.send(&json!({"type": "response.cancel"}));
    let busy = loop {
        let event = socket.next().unwrap();
        if event["type"] == "error" {
            break event;
        }
    };
    assert!(busy["error"]["message"].as_str().unwrap().contains("one at a time"), "{busy}");
    wait_until("free blocks", || engine.stats().blocks_used == 0);
}

#[test]
fn a_message_is_the_chat_routes_answer() {
    let (server, engine) = Server::ready(2, 2);
    let mut body = json!({
        "model": "oxseek-demo", "max_tokens": 60, "temperature": 0, "thinking": {"type": "enabled"},
        "messages": [{"role": "user", "content": "Tell me a story about a cat."}],
    });
    let (status, message) = post(&server, "/v1/messages", &body);
    assert_eq!(status, 200, "{message}");
    let mut chat = story("a cat", 60);
    chat["thinking"] = json!(true);
    chat["ignore_eos"] = json!(false);
    let (_, whole) = post(&server, "/v1/chat/completions", &chat);
    let blocks = message["content"].as_array().unwrap();
    assert_eq!(blocks[0]["thinking"], whole["choices"][0]["message"]["reasoning_content"]);
    let text: String = blocks.iter().filter_map(|b| b["text"].as_str()).collect();
    assert_eq!(text, whole["choices"][0]["message"]["content"].as_str().unwrap_or_default());
    let usage = &message["usage"];
    let input = usage["input_tokens"].as_u64().unwrap() + usage["cache_read_input_tokens"].as_u64().unwrap();
    assert_eq!(json!(input), whole["usage"]["prompt_tokens"]);
    body["stream"] = json!(true);
    let events = named_events(&server, "/v1/messages", &body);
    let delta = |name: &str| -> String { events.iter().filter_map(|e| e["delta"][name].as_str()).collect() };
    assert_eq!(
        (delta("thinking"), delta("text")),
        (blocks[0]["thinking"].as_str().unwrap().to_string(), text)
    );
    assert_eq!(events.last().unwrap()["type"], "message_stop");
    let count = json!({"model": "oxseek-demo", "messages": body["messages"], "thinking": body["thinking"]});
    assert_eq!(post(&server, "/v1/messages/count_tokens", &count).1["input_tokens"], json!(input));
    let (status, e) =
        post(&server, "/v1/messages", &json!({"model": "oxseek-demo", "messages": body["messages"]}));
    assert_eq!(
        (status, &e["type"], &e["error"]["type"]),
        (400, &json!("error"), &json!("invalid_request_error"))
    );
    wait_until("free blocks", || engine.stats().blocks_used == 0);
}

#[test]
fn tools_are_called_through_every_door() {
    let (server, _engine) = Server::ready(2, 2);
    let question = "What is the weather in Paris?";
    let described = json!({"name": "get_weather", "description": "Get the weather of a city."});
    let with = |name: &str, base: &Value| {
        let mut tool = base.clone();
        tool[name] = weather_tool();
        tool
    };
    let chat = json!({"temperature": 0, "max_tokens": 60, "messages": [{"role": "user", "content": question}],
        "tools": [{"type": "function", "function": with("parameters", &described)}]});
    let (_, whole) = post(&server, "/v1/chat/completions", &chat);
    let call = &whole["choices"][0]["message"]["tool_calls"][0]["function"];
    assert_eq!(call["name"], "get_weather", "{whole}");
    let mut tool = with("parameters", &described);
    tool["type"] = json!("function");
    let (_, response) = post(
        &server,
        "/v1/responses",
        &json!({"temperature": 0, "max_output_tokens": 60, "input": question, "tools": [tool]}),
    );
    assert_eq!(said(&response), [json!([call["name"], call["arguments"]])], "{response}");
    let (_, message) = post(
        &server,
        "/v1/messages",
        &json!({"model": "oxseek-demo", "max_tokens": 60,
        "temperature": 0, "messages": [{"role": "user", "content": question}],
        "tools": [with("input_schema", &described)]}),
    );
    let used = &message["content"][0];
    assert_eq!(
        (&used["type"], &used["name"], &message["stop_reason"]),
        (&json!("tool_use"), &json!("get_weather"), &json!("tool_use")),
        "{message}"
    );
    assert_eq!(used["input"], serde_json::from_str::<Value>(call["arguments"].as_str().unwrap()).unwrap());
    // And the result goes back.
    let again = json!({"model": "oxseek-demo", "max_tokens": 60, "temperature": 0,
        "tools": [with("input_schema", &described)],
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": message["content"]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": used["id"], "content": "sunny"}]}]});
    let (status, answer) = post(&server, "/v1/messages", &again);
    assert_eq!((status, &answer["content"][0]["type"]), (200, &json!("text")), "{answer}");
}

// ---- /openapi.json --------------------------------------------------------------------------------------------------

#[test]
fn the_document_and_the_parsers_agree() {
    let (server, _engine) = Server::ready(2, 2);
    let document = server.get("/openapi.json").json();
    let send = |path: &str, body: &Value| {
        let answer = server.post(path, body.to_string().as_bytes());
        let error = if answer.status == 200 { Value::Null } else { answer.json()["error"].clone() };
        (answer.status, error)
    };
    let mut fields = 0;
    for (path, methods) in document["paths"].as_object().unwrap() {
        let reference = &methods["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"];
        let Some(name) = reference.as_str().and_then(|r| r.rsplit('/').next()) else { continue };
        let schema = &document["components"]["schemas"][name];
        let example = &schema["examples"][0];
        assert_eq!(send(path, example).0, 200, "{path}: {:?}", send(path, example).1);
        // What is not in the document is refused by name.
        let mut with = example.clone();
        with["no_such_field"] = json!(1);
        let (status, error) = send(path, &with);
        assert_eq!(status, 400, "{path}: {error}");
        assert!(error["message"].as_str().unwrap().contains("no_such_field"), "{path}: {error}");
        // What is in it is known; a value of another type is refused by the field's name, and so is one past a bound.
        for (field, of) in schema["properties"].as_object().unwrap() {
            fields += 1;
            let mut wrong = vec![json!({"no": ["such", "thing"]})];
            for (bound, step) in [("minimum", -1.0), ("maximum", 1.0)] {
                wrong.extend(of[bound].as_f64().map(|b| json!(b + step)));
            }
            if matches!(of["type"][0].as_str(), Some("object") | None) {
                wrong = vec![json!([7.5])];
            }
            for value in wrong {
                let mut with = example.clone();
                with[field] = value.clone();
                let (status, error) = send(path, &with);
                let message = error["message"].as_str().unwrap_or_default();
                assert_eq!(status, 400, "{path} {field} {value}: {message}");
                assert!(!message.contains("is not a field"), "{path} {field}: {message}");
            }
        }
    }
    assert!(fields > 100, "{fields}");
    let page = server.get("/docs");
    assert!(page.status == 200 && page.head.contains("content-security-policy"), "{page:?}");
}
