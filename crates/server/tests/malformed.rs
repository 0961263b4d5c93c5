//! Requests that are wrong: each gets a 4xx with OpenAI's error body that names what is wrong, and the next good
//! request answers.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{Answer, Server, post_bytes};
use oxseek_engine::EngineHandle;

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

/// Fields added to a good chat request, and the field that the error must name.
const CHAT_FIELDS: [(&str, &str); 102] = [
    // Templates are the model's.
    (r#""chat_template": "{{ 1 }}""#, "chat_template"),
    (r#""temperature": "hot""#, "temperature"),
    (r#""temperature": -0.1"#, "temperature"),
    (r#""temperature": 1e39"#, "temperature"),
    (r#""temperature": [1]"#, "temperature"),
    (r#""top_p": -1"#, "top_p"),
    (r#""top_p": 1.5"#, "top_p"),
    (r#""top_p": {}"#, "top_p"),
    (r#""top_k": -1"#, "top_k"),
    (r#""top_k": 1.5"#, "top_k"),
    (r#""min_p": 2"#, "min_p"),
    (r#""min_p": "a""#, "min_p"),
    (r#""typical_p": -3"#, "typical_p"),
    (r#""repetition_penalty": 0"#, "repetition_penalty"),
    (r#""repetition_penalty": -1"#, "repetition_penalty"),
    (r#""repetition_penalty": 1.1, "repeat_penalty": 1.2"#, "repetition_penalty"),
    (r#""repeat_last_n": -1"#, "repeat_last_n"),
    (r#""presence_penalty": 2.5"#, "presence_penalty"),
    (r#""presence_penalty": "no""#, "presence_penalty"),
    (r#""frequency_penalty": -2.5"#, "frequency_penalty"),
    (r#""logit_bias": [1]"#, "logit_bias"),
    (r#""logit_bias": {"cat": 1}"#, "logit_bias"),
    (r#""logit_bias": {"1": "much"}"#, "logit_bias"),
    (r#""logit_bias": {"1": 101}"#, "logit_bias"),
    (r#""logit_bias": {"4096": 1}"#, "logit_bias"),
    (r#""logit_bias": {"-1": 1}"#, "logit_bias"),
    (r#""seed": 1.5"#, "seed"),
    (r#""seed": "x""#, "seed"),
    (r#""n": 0"#, "n"),
    (r#""n": 1000"#, "n"),
    (r#""n": -1"#, "n"),
    (r#""n": 1e99"#, "n"),
    (r#""stop": 7"#, "stop"),
    (r#""stop": [1]"#, "stop"),
    (r#""stop": [""]"#, "stop"),
    (r#""stop": {"a": 1}"#, "stop"),
    (r#""stop_token_ids": [99999]"#, "stop_token_ids"),
    (r#""stop_token_ids": "x""#, "stop_token_ids"),
    (r#""ignore_eos": 1"#, "ignore_eos"),
    (r#""skip_special_tokens": "yes""#, "skip_special_tokens"),
    (r#""max_tokens": 0"#, "max_tokens"),
    (r#""max_tokens": -5"#, "max_tokens"),
    (r#""max_tokens": "ten""#, "max_tokens"),
    (r#""max_completion_tokens": 1.5"#, "max_completion_tokens"),
    (r#""max_tokens": 5, "max_completion_tokens": 6"#, "max_completion_tokens"),
    (r#""logprobs": 1"#, "logprobs"),
    (r#""logprobs": true, "top_logprobs": 21"#, "top_logprobs"),
    (r#""top_logprobs": 2"#, "top_logprobs"),
    (r#""top_logprobs": -2, "logprobs": true"#, "top_logprobs"),
    (r#""stream": "yes""#, "stream"),
    (r#""stream_options": {"include_usage": true}"#, "stream_options"),
    (r#""stream": true, "stream_options": []"#, "stream_options"),
    (r#""stream": true, "stream_options": {"include_usage": 1}"#, "stream_options.include_usage"),
    (r#""stream": true, "stream_options": {"speed": 1}"#, "stream_options.speed"),
    (r#""chat_template_kwargs": []"#, "chat_template_kwargs"),
    (r#""tools": 7"#, "tools"),
    (r#""tools": ["f"]"#, "tools[0]"),
    (r#""tools": [{}]"#, "tools[0].type"),
    (r#""tools": [{"type": "web_search"}]"#, "tools[0].type"),
    (r#""tools": [{"type": "function"}]"#, "tools[0].function"),
    (r#""tools": [{"type": "function", "function": {}}]"#, "tools[0].function.name"),
    (r#""tools": [{"type": "function", "function": {"name": "a b"}}]"#, "tools[0].function.name"),
    (
        r#""tools": [{"type": "function", "function": {"name": "f", "parameters": 1}}]"#,
        "tools[0].function.parameters",
    ),
    (r#""tools": [{"type": "function", "function": {"name": "f", "mood": 1}}]"#, "tools[0].function.mood"),
    (
        r#""tools": [{"type": "function", "function": {"name": "f", "strict": true,
            "parameters": {"type": "flower"}}}]"#,
        "tools",
    ),
    (r#""tool_choice": "required""#, "tool_choice"),
    (r#""tool_choice": "always""#, "tool_choice"),
    (r#""tool_choice": {"type": "function", "function": {"name": "g"}}"#, "tool_choice.function.name"),
    (r#""parallel_tool_calls": 1"#, "parallel_tool_calls"),
    (r#""response_format": {"type": "xml"}"#, "response_format.type"),
    (r#""response_format": {}"#, "response_format.type"),
    (r#""response_format": "json""#, "response_format"),
    (r#""response_format": {"type": "json_schema"}"#, "response_format.json_schema"),
    (
        r#""response_format": {"type": "json_schema", "json_schema": {"name": "x"}}"#,
        "response_format.json_schema.schema",
    ),
    (
        r##""response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/no"}}}"##,
        "response_format",
    ),
    (r#""guided_regex": "(""#, "guided_regex"),
    (r#""guided_regex": 7"#, "guided_regex"),
    (r#""guided_choice": []"#, "guided_choice"),
    (r#""grammar": "start: other""#, "grammar"),
    (r#""json_schema": "{""#, "json_schema"),
    (r#""guided_regex": "a", "json_schema": {}"#, "json_schema"),
    (r#""structured_outputs": {"regex": "a", "json": {}}"#, "structured_outputs"),
    (r#""structured_outputs": {"speed": 1}"#, "structured_outputs.speed"),
    (r#""reasoning_effort": "some""#, "reasoning_effort"),
    (r#""thinking": {"type": "some"}"#, "thinking.type"),
    (r#""thinking": true, "reasoning_effort": "none""#, "reasoning_effort"),
    (r#""thinking_token_budget": -1"#, "thinking_token_budget"),
    (r#""continue_final_message": true"#, "continue_final_message"),
    (r#""min_tokens": 9, "max_tokens": 3"#, "min_tokens"),
    (r#""modalities": ["audio"]"#, "modalities"),
    (r#""metadata": "x""#, "metadata"),
    (r#""store": true"#, "store"),
    (r#""speed": "fast""#, "speed"),
    (r#""prompt_logprobs": true"#, "prompt_logprobs"),
    (r#""prompt_logprobs": -1"#, "prompt_logprobs"),
    (r#""prompt_logprobs": 1.5"#, "prompt_logprobs"),
    (r#""prompt_logprobs": 21"#, "prompt_logprobs"),
    (r#""prompt_logprobs": 0, "stream": true"#, "prompt_logprobs"),
    (r#""seed": 1, "seed": 1"#, "seed"),
    (r#""seed": 1, "\u0073eed": 2"#, "seed"),
    (r#""metadata": {"a": [0, {"b": 1, "b": 2}]}"#, "metadata.a[1].b"),
    (r#""json_schema": "{\"type\": 1, \"type\": 2}""#, "json_schema"),
];

/// Whole chat bodies.
const CHAT_BODIES: [(&str, &str); 42] = [
    ("", ""),
    ("{", ""),
    ("[]", ""),
    ("7", ""),
    ("null", ""),
    ("\"text\"", ""),
    ("{\"messages\": [}", ""),
    ("{} {}", ""),
    ("{'messages': []}", ""),
    ("{\"messages\": [], \"messages\": []}", "messages"),
    ("{\"messages\": [{\"role\": \"user\", \"role\": \"system\"}]}", "messages[0].role"),
    ("{\"model\": \"m\", \"model\": ", "model"),
    ("{\"temperature\": NaN}", ""),
    ("{}", "messages"),
    (r#"{"messages": null}"#, "messages"),
    (r#"{"messages": []}"#, "messages"),
    (r#"{"messages": "hello"}"#, "messages"),
    (r#"{"messages": {"role": "user"}}"#, "messages"),
    (r#"{"messages": [1]}"#, "messages[0]"),
    (r#"{"messages": [null]}"#, "messages[0]"),
    (r#"{"messages": ["hi"]}"#, "messages[0]"),
    (r#"{"messages": [{}]}"#, "messages[0].role"),
    (r#"{"messages": [{"role": "user"}]}"#, "messages[0].content"),
    (r#"{"messages": [{"content": "x"}]}"#, "messages[0].role"),
    (r#"{"messages": [{"role": "king", "content": "x"}]}"#, "messages[0].role"),
    (r#"{"messages": [{"role": 1, "content": "x"}]}"#, "messages[0].role"),
    (r#"{"messages": [{"role": "user", "content": 5}]}"#, "messages[0].content"),
    (r#"{"messages": [{"role": "user", "content": {"text": "x"}}]}"#, "messages[0].content"),
    (r#"{"messages": [{"role": "user", "content": [5]}]}"#, "messages[0].content[0]"),
    (r#"{"messages": [{"role": "user", "content": [{}]}]}"#, "messages[0].content[0].type"),
    (r#"{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}"#, "messages[0].content[0]"),
    (r#"{"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}"#, "messages[0].content[0]"),
    (r#"{"messages": [{"role": "user", "content": [{"type": "text"}]}]}"#, "messages[0].content[0].text"),
    (
        r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}"#,
        "messages[0].content[0].text",
    ),
    (r#"{"messages": [{"role": "user", "content": "x"}, {"role": "user"}]}"#, "messages[1].content"),
    (r#"{"messages": [{"role": "user", "content": "x", "mood": "good"}]}"#, "messages[0].mood"),
    (r#"{"messages": [{"role": "user", "content": "x", "name": 1}]}"#, "messages[0].name"),
    (r#"{"messages": [{"role": "assistant", "content": "x", "tool_calls": 1}]}"#, "messages[0].tool_calls"),
    (r#"{"messages": [{"role": "tool", "content": "x"}]}"#, "messages[0].tool_call_id"),
    (
        r#"{"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]}"#,
        "messages[0].tool_calls[0].function",
    ),
    (
        r#"{"messages": [{"role": "assistant", "prefix": true, "content": "x"}, {"role": "user", "content": "x"}]}"#,
        "messages[0].prefix",
    ),
    (r#"{"model": 4, "messages": [{"role": "user", "content": "x"}]}"#, "model"),
];

/// Whole bodies of text completions.
const TEXT_BODIES: [(&str, &str); 23] = [
    ("{}", "prompt"),
    (r#"{"prompt": null}"#, "prompt"),
    (r#"{"prompt": 5}"#, "prompt"),
    (r#"{"prompt": []}"#, "prompt"),
    (r#"{"prompt": [[]]}"#, "prompt"),
    (r#"{"prompt": [4096]}"#, "prompt"),
    (r#"{"prompt": [-1]}"#, "prompt"),
    (r#"{"prompt": [1.5]}"#, "prompt"),
    (r#"{"prompt": [1, "x"]}"#, "prompt"),
    (r#"{"prompt": ["x", 1]}"#, "prompt"),
    (r#"{"prompt": [{"a": 1}]}"#, "prompt"),
    (r#"{"prompt": {"a": 1}}"#, "prompt"),
    (r#"{"prompt": "x", "logprobs": true}"#, "logprobs"),
    (r#"{"prompt": "x", "logprobs": 21}"#, "logprobs"),
    (r#"{"prompt": "x", "logprobs": 1, "echo": true, "suffix": "y"}"#, "logprobs"),
    (r#"{"prompt": "x", "prompt_logprobs": 1, "stream": true}"#, "prompt_logprobs"),
    (r#"{"prompt": "x", "prompt_logprobs": 21}"#, "prompt_logprobs"),
    (r#"{"prompt": "x", "echo": 1}"#, "echo"),
    (r#"{"prompt": "x", "best_of": 3}"#, "best_of"),
    (r#"{"prompt": "x", "suffix": 7}"#, "suffix"),
    (r#"{"prompt": "x", "messages": []}"#, "messages"),
    (r#"{"prompt": "x", "max_tokens": 0}"#, "max_tokens"),
    (r#"{"prompt": "x", "prompt": "y"}"#, "prompt"),
];

/// Whether this is the error of a refused request, with every part that OpenAI's clients read.
fn is_error(answer: &Answer, status: u16, param: &str) -> bool {
    let Ok(body) = serde_json::from_str::<serde_json::Value>(&answer.body) else { return false };
    let error = &body["error"];
    let message = error["message"].as_str().unwrap_or_default();
    answer.status == status
        && answer.head.contains("content-type: application/json")
        && message.len() > 3
        && error["type"].is_string()
        && error.get("code").is_some()
        && error.get("param").is_some_and(|p| p.as_str().unwrap_or_default() == param)
        && message.contains(param)
}

fn check_error(answer: &Answer, status: u16, param: &str, what: &str) {
    assert!(is_error(answer, status, param), "{what}: expected {status} {param:?}, got {answer:?}");
}

/// All of a table's cases, so that one run shows every wrong one.
fn check_bodies(server: &Server, path: &str, cases: impl IntoIterator<Item = (String, &'static str)>) {
    let mut wrong = Vec::new();
    for (body, param) in cases {
        let answer = server.post(path, body.as_bytes());
        if !is_error(&answer, 400, param) {
            wrong.push(format!("{body}: expected {param:?}, got {} {}", answer.status, answer.body));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn check_still_answers(server: &Server, engine: &EngineHandle) {
    let good = r#"{"messages": [{"role": "user", "content": "Hi!"}], "temperature": 0, "max_tokens": 3}"#;
    let answer = server.post(CHAT, good.as_bytes());
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(answer.json()["usage"]["completion_tokens"], 3);
    common::wait_until("the books to balance", || {
        let stats = engine.stats();
        (stats.blocks_used, stats.requests_open) == (0, 0)
    });
}

#[test]
fn wrong_fields_are_named() {
    let (server, engine) = Server::ready(2, 4);
    let fields = CHAT_FIELDS.map(|(fields, param)| {
        (format!(r#"{{"messages": [{{"role": "user", "content": "Hi"}}], {fields}}}"#), param)
    });
    check_bodies(&server, CHAT, fields);
    check_still_answers(&server, &engine);
    check_bodies(&server, CHAT, CHAT_BODIES.map(|(body, param)| (body.to_string(), param)));
    check_still_answers(&server, &engine);
    check_bodies(&server, TEXT, TEXT_BODIES.map(|(body, param)| (body.to_string(), param)));
    check_still_answers(&server, &engine);
}

#[test]
fn wrong_sizes_are_refused() {
    let (server, engine) = Server::ready(2, 4);
    let long = format!(r#"{{"messages": [{{"role": "user", "content": "{}"}}]}}"#, "cat ".repeat(2000));
    let answer = server.post(CHAT, long.as_bytes());
    check_error(&answer, 400, "messages", "a prompt longer than the context");
    assert_eq!(answer.json()["error"]["code"], "context_length_exceeded");
    let ids = format!(r#"{{"prompt": [{}1]}}"#, "1,".repeat(common::CONTEXT_TOKENS));
    check_error(&server.post(TEXT, ids.as_bytes()), 400, "prompt", "too many token ids");
    let prompts = format!(r#"{{"prompt": [{}"x"]}}"#, r#""x","#.repeat(64));
    check_error(&server.post(TEXT, prompts.as_bytes()), 400, "prompt", "65 prompts");
    let stops = format!(r#"{{"prompt": "x", "stop": [{}"x"]}}"#, r#""x","#.repeat(200));
    check_error(&server.post(TEXT, stops.as_bytes()), 400, "stop", "201 stop strings");
    let stop = format!(r#"{{"prompt": "x", "stop": "{}"}}"#, "y".repeat(100_000));
    check_error(&server.post(TEXT, stop.as_bytes()), 400, "stop", "a long stop string");
    let biases: Vec<String> = (0..4000).map(|i| format!(r#""{i}": 1"#)).collect();
    let biases = format!(r#"{{"prompt": "x", "logit_bias": {{{}}}}}"#, biases.join(","));
    check_error(&server.post(TEXT, biases.as_bytes()), 400, "logit_bias", "4000 biases");
    let many = r#"{"role": "user", "content": ""},"#.repeat(4096);
    let many = format!(r#"{{"messages": [{many}{{"role": "user", "content": ""}}]}}"#);
    check_error(&server.post(CHAT, many.as_bytes()), 400, "messages", "4097 messages");
    let deep = format!(r#"{{"metadata": {}1{}}}"#, r#"{"a":"#.repeat(5000), "}".repeat(5000));
    check_error(&server.post(CHAT, deep.as_bytes()), 400, "", "5000 levels of JSON");
    let huge = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
                        content-length: 17000000\r\nconnection: close\r\n\r\n{{"
    );
    check_error(&server.raw(huge.as_bytes()), 413, "", "an announced body over the limit");
    let answer = server.raw(&post_bytes(CHAT, &vec![b' '; (16 << 20) + 1]));
    // The server may close while the client still sends; then there is no answer to read.
    assert!(answer.status == 413 || answer.status == 0, "{answer:?}");
    check_still_answers(&server, &engine);
}

#[test]
fn wrong_requests_are_refused() {
    let (server, engine) = Server::ready(2, 4);
    let not_utf8 =
        [br#"{"messages": [{"role": "user", "content": ""#.as_slice(), &[0xff, 0xfe], b"\"}]}"].concat();
    check_error(&server.post(CHAT, &not_utf8), 400, "", "a body that is not UTF-8");
    let unknown = r#"{"model": "gpt-9", "messages": [{"role": "user", "content": "x"}]}"#;
    let answer = server.post(CHAT, unknown.as_bytes());
    check_error(&answer, 404, "model", "an unknown model");
    assert_eq!(answer.json()["error"]["code"], "model_not_found");
    check_error(&server.get("/v1/models/gpt-9"), 404, "model", "an unknown model's page");
    for path in ["/v1", "/v1/chat", "/v1/images", "/v2/models", "/../etc/passwd", "/%00", "/v1/models/a/b"] {
        check_error(&server.get(path), 404, "", path);
    }
    for (method, path) in
        [("GET", CHAT), ("PUT", CHAT), ("DELETE", TEXT), ("POST", "/v1/models"), ("POST", "/health")]
    {
        let request =
            format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 0\r\n\r\n");
        check_error(&server.raw(request.as_bytes()), 405, "", &request);
    }
    for kind in ["", "content-type: text/plain\r\n", "content-type: application/x-www-form-urlencoded\r\n"] {
        let request = format!(
            "POST {CHAT} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{kind}content-length: 2\r\n\r\n{{}}"
        );
        check_error(&server.raw(request.as_bytes()), 415, "", &request);
    }
    for (encoding, status) in [("gzip", 415), ("br, gzip", 415), ("", 415), ("identity", 400)] {
        let request = format!(
            "POST {CHAT} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n\
             content-encoding: {encoding}\r\ncontent-length: 2\r\n\r\n{{}}"
        );
        check_error(
            &server.raw(request.as_bytes()),
            status,
            if status == 400 { "messages" } else { "" },
            &request,
        );
    }
    // What is no HTTP at all has no JSON to answer, but an end.
    for bytes in [
        b"\r\n\r\n\r\n".as_slice(),
        b"hello\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ] {
        let mut stream = server.connect();
        std::io::Write::write_all(&mut stream, bytes).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        let _ = std::io::Read::read_to_end(&mut stream, &mut answer);
        let text = String::from_utf8_lossy(&answer);
        assert!(text.is_empty() || text.starts_with("HTTP/1.1 4"), "{bytes:?}: {text}");
    }
    let mut head = b"GET /health HTTP/1.1\r\n".to_vec();
    head.extend(b"x: ".iter().chain(&vec![b'y'; 1 << 20]));
    head.extend(b"\r\n\r\n");
    let status = server.raw(&head).status;
    assert!(matches!(status, 0 | 400..500), "a head over the limit: {status}");
    check_still_answers(&server, &engine);
}
