//! Tools, thinking and forms of answers, through the demo model.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::Server;
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

fn weather() -> Value {
    let parameters =
        json!({"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]});
    let description = "Get the weather in a city";
    let function = json!({"name": "get_weather", "description": description, "parameters": parameters});
    json!({"type": "function", "function": function})
}

fn question(text: &str) -> Value {
    json!([{"role": "user", "content": text}])
}

fn ask(server: &Server, path: &str, body: &Value) -> Value {
    let answer = server.post(path, body.to_string().as_bytes());
    assert_eq!(answer.status, 200, "{body}: {}", answer.body);
    answer.json()
}

/// The parts of a streamed choice put together as clients do.
fn stream(server: &Server, body: &Value) -> (Value, String) {
    let mut body = body.clone();
    body["stream"] = true.into();
    let answer = server.post(CHAT, body.to_string().as_bytes());
    assert_eq!(answer.status, 200, "{}", answer.body);
    let mut message = json!({"role": "assistant", "content": "", "refusal": null});
    let (mut calls, mut reason): (Vec<Value>, String) = (Vec::new(), String::new());
    for line in answer.body.lines().filter_map(|l| l.strip_prefix("data: ")).filter(|l| *l != "[DONE]") {
        let chunk: Value = serde_json::from_str(line).unwrap();
        let choice = &chunk["choices"][0];
        if let Some(text) = choice["finish_reason"].as_str() {
            reason = text.into();
        }
        let delta = &choice["delta"];
        for key in ["content", "reasoning", "reasoning_content"] {
            if let Some(text) = delta[key].as_str() {
                message[key] = (message[key].as_str().unwrap_or_default().to_string() + text).into();
            }
        }
        for part in delta["tool_calls"].as_array().into_iter().flatten() {
            let index = part["index"].as_u64().unwrap() as usize;
            if index == calls.len() {
                // Id and name come first and once.
                assert!(part["id"].is_string() && part["function"]["name"].is_string(), "{part}");
                calls.push(part.clone());
                calls[index].as_object_mut().unwrap().remove("index");
                continue;
            }
            assert!(part.get("id").is_none(), "{part}");
            let so_far = calls[index]["function"]["arguments"].as_str().unwrap().to_string();
            calls[index]["function"]["arguments"] =
                (so_far + part["function"]["arguments"].as_str().unwrap()).into();
        }
    }
    if !calls.is_empty() {
        message["tool_calls"] = calls.into();
        if message["content"] == "" {
            message["content"] = Value::Null;
        }
    }
    (message, reason)
}

/// Without the ids of calls, which are new each time.
fn without_ids(message: &Value) -> Value {
    let mut message = message.clone();
    for call in message["tool_calls"].as_array_mut().into_iter().flatten() {
        assert!(call["id"].as_str().unwrap().starts_with("call_"));
        call["id"] = Value::Null;
    }
    message
}

#[test]
fn a_tool_is_called_and_its_result_read() {
    let (server, _engine) = Server::ready(2, 4);
    let body = json!({"messages": question("What is the weather in Paris?"), "tools": [weather()],
        "temperature": 0, "max_tokens": 60});
    let answer = ask(&server, CHAT, &body);
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls", "{answer}");
    let message = &choice["message"];
    assert_eq!(message["content"], Value::Null);
    let function = &message["tool_calls"][0]["function"];
    assert_eq!(function, &json!({"name": "get_weather", "arguments": "{\"city\": \"Paris\"}"}));
    let (streamed, reason) = stream(&server, &body);
    assert_eq!((without_ids(&streamed), reason.as_str()), (without_ids(message), "tool_calls"));
    // The whole conversation goes back as it came.
    let mut messages = question("What is the weather in Paris?");
    let id = message["tool_calls"][0]["id"].clone();
    let list = messages.as_array_mut().unwrap();
    list.push(message.clone());
    list.push(json!({"role": "tool", "tool_call_id": id, "content": "sunny"}));
    let answer = ask(
        &server,
        CHAT,
        &json!({"messages": messages, "tools": [weather()], "temperature": 0, "max_tokens": 40}),
    );
    assert!(answer["choices"][0]["message"]["content"].as_str().is_some_and(|t| !t.is_empty()), "{answer}");
}

#[test]
fn tool_choice_is_kept() {
    let (server, _engine) = Server::ready(2, 4);
    let odd = json!({"type": "function", "function": {"name": "paint", "strict": true, "parameters": {
        "type": "object", "additionalProperties": false, "required": ["color", "size"],
        "properties": {"color": {"enum": ["red", "blue"]}, "size": {"type": "integer", "minimum": 1, "maximum": 9}}}}});
    let body = |choice: Value, text: &str| {
        json!({"messages": question(text), "tools": [weather(), odd], "tool_choice": choice, "max_tokens": 80,
            "temperature": 1, "seed": 5})
    };
    for choice in [json!("required"), json!({"type": "function", "function": {"name": "paint"}})] {
        let named = choice.is_object();
        let body = body(choice, "Tell me a story.");
        let message = &ask(&server, CHAT, &body)["choices"][0]["message"];
        let calls = message["tool_calls"].as_array().unwrap_or_else(|| panic!("no call: {message}"));
        for call in calls {
            let arguments: Value =
                serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
            if call["function"]["name"] == "paint" {
                assert!(["red", "blue"].contains(&arguments["color"].as_str().unwrap()), "{arguments}");
                assert!((1..=9).contains(&arguments["size"].as_i64().unwrap()), "{arguments}");
            } else {
                assert!(!named && arguments["city"].is_string(), "{call}");
            }
        }
        assert!(!named || calls.len() == 1);
        assert_eq!(without_ids(&stream(&server, &body).0), without_ids(message));
    }
    let answer = ask(&server, CHAT, &body(json!("none"), "What is the weather in Paris?"));
    assert_eq!(answer["choices"][0]["message"].get("tool_calls"), None, "{answer}");
}

#[test]
fn answers_have_the_form_that_was_asked_for() {
    let (server, _engine) = Server::ready(2, 4);
    let schema = json!({"type": "object", "additionalProperties": false, "required": ["animal", "legs"],
        "properties": {"animal": {"enum": ["cat", "dog"]}, "legs": {"type": "integer", "minimum": 0, "maximum": 9}}});
    let format =
        json!({"type": "json_schema", "json_schema": {"name": "animal", "strict": true, "schema": schema}});
    for thinking in [false, true] {
        let body = json!({"messages": question("Tell me a story about a cat."), "response_format": format,
            "chat_template_kwargs": {"thinking": thinking}, "max_tokens": 200, "temperature": 0});
        let message = &ask(&server, CHAT, &body)["choices"][0]["message"];
        let value: Value = serde_json::from_str(message["content"].as_str().unwrap()).unwrap();
        assert!(value["legs"].is_u64() && value["animal"].is_string(), "{value}");
        assert_eq!(message["reasoning"].is_string(), thinking, "{message}");
        assert_eq!(message["reasoning"], message["reasoning_content"]);
        assert_eq!(&stream(&server, &body).0, message);
    }
    let body =
        json!({"prompt": "Once", "structured_outputs": {"regex": "[0-9]{3}-[a-f]{2}"}, "max_tokens": 20});
    let text = ask(&server, TEXT, &body)["choices"][0]["text"].as_str().unwrap().to_string();
    assert!(text.len() == 6 && text.as_bytes()[3] == b'-', "{text}");
    let body = json!({"messages": question("Yes?"), "grammar": "root ::= \"yes\" | \"no\"\n"});
    let answer = ask(&server, CHAT, &body);
    assert!(
        ["yes", "no"].contains(&answer["choices"][0]["message"]["content"].as_str().unwrap()),
        "{answer}"
    );
}

#[test]
fn thinking_has_a_budget_and_an_answer_a_beginning() {
    let (server, _engine) = Server::ready(2, 4);
    let body = json!({"messages": question("Tell me a story."), "thinking": {"type": "enabled", "budget_tokens": 3},
        "temperature": 0, "max_tokens": 40});
    let answer = ask(&server, CHAT, &body);
    // The closing tag is counted.
    let thought = answer["usage"]["completion_tokens_details"]["reasoning_tokens"].as_u64().unwrap();
    assert!((1..=4).contains(&thought), "{answer}");
    assert!(answer["choices"][0]["message"]["content"].as_str().is_some_and(|t| !t.is_empty()), "{answer}");
    let messages = json!([{"role": "user", "content": "Say a word."},
        {"role": "assistant", "content": "Once upon a", "prefix": true}]);
    let continued = ask(&server, CHAT, &json!({"messages": messages, "temperature": 0, "max_tokens": 3}));
    let prompt = "<｜User｜>Say a word.<｜Assistant｜></think>Once upon a";
    let same = ask(&server, TEXT, &json!({"prompt": prompt, "temperature": 0, "max_tokens": 3}));
    assert_eq!(continued["choices"][0]["message"]["content"], same["choices"][0]["text"]);
    assert_eq!(continued["usage"]["prompt_tokens"], same["usage"]["prompt_tokens"]);
}

#[test]
fn holes_are_filled_and_capabilities_told() {
    let (server, _engine) = Server::ready(2, 4);
    let filled = ask(
        &server,
        TEXT,
        &json!({"prompt": "The cat", "suffix": "the mat.", "temperature": 0, "max_tokens": 4}),
    );
    let spelled = "<｜fim▁begin｜>The cat<｜fim▁hole｜>the mat.<｜fim▁end｜>";
    let same = ask(&server, TEXT, &json!({"prompt": spelled, "temperature": 0, "max_tokens": 4}));
    assert_eq!(
        (&filled["choices"], &filled["usage"]["prompt_tokens"]),
        (&same["choices"], &same["usage"]["prompt_tokens"])
    );
    let told = server.get("/v1/capabilities").json();
    assert_eq!(
        (&told["tools"], &told["tool_format"], &told["suffix"]),
        (&json!(true), &json!("deepseek-v3.1"), &json!(true))
    );
}
