//! An example of everything that a body may hold: parsers are watched while they read these.

/// Path and body; a path may have several. Each must be accepted as it is.
pub(super) const EXAMPLES: [(&str, &str); 11] = [
    (
        "/v1/chat/completions",
        r#"{
            "messages": [
                {"role": "system", "content": "You are brief."},
                {"role": "user", "content": [{"type": "text", "text": "Weather in Ulm?"}]},
                {"role": "assistant", "content": null, "tool_calls": [
                    {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
                ]},
                {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
                {"role": "user", "content": "Thanks. Say hello."}
            ],
            "tools": [{"type": "function", "function": {"name": "weather", "description": "Weather of a city",
                "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}],
            "max_tokens": 8, "stream": true, "stream_options": {"include_usage": true},
            "response_format": {"type": "text"}
        }"#,
    ),
    (
        "/v1/chat/completions",
        r#"{"messages": [{"role": "user", "content": "Hi"}], "thinking": {"type": "auto"}}"#,
    ),
    ("/v1/completions", r#"{"prompt": "Once upon", "max_tokens": 8, "stream": true, "stream_options": {}}"#),
    ("/v1/embeddings", r#"{"input": ["The cat sat.", "Le chat dort."], "encoding_format": "float"}"#),
    (
        "/v1/responses",
        r#"{
            "instructions": "You are brief.",
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "Weather in Ulm?"}]},
                {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Ask."}]},
                {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "call_1", "output": "sunny"},
                {"role": "user", "content": "Thanks. Say hello."}
            ],
            "tools": [{"type": "function", "name": "weather", "parameters": {"type": "object"}}],
            "tool_choice": "auto", "max_output_tokens": 16, "stream": true, "stream_options": {},
            "text": {"format": {"type": "text"}}, "reasoning": {"summary": "auto"}
        }"#,
    ),
    (
        "/v1/responses/input_tokens",
        r#"{"input": [{"role": "user", "content": "Hi"}], "text": {"format": {"type": "text"}}, "reasoning": {}}"#,
    ),
    (
        "/v1/messages",
        r#"{
            "model": "oxseek-demo", "max_tokens": 16, "system": "You are brief.",
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Weather in Ulm?"}]},
                {"role": "assistant", "content": [
                    {"type": "thinking", "thinking": "Ask.", "signature": ""},
                    {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Ulm"}}
                ]},
                {"role": "user", "content": [
                    {"type": "tool_result", "tool_use_id": "toolu_1", "content": "sunny"},
                    {"type": "text", "text": "Thanks. Say hello."}
                ]}
            ],
            "tools": [{"name": "weather", "input_schema": {"type": "object"}}], "tool_choice": {"type": "auto"},
            "stop_sequences": ["END"], "stream": true, "metadata": {"user_id": "u"}, "thinking": {"type": "adaptive"},
            "output_config": {}, "cache_control": {"type": "ephemeral"}
        }"#,
    ),
    (
        "/v1/messages/count_tokens",
        r#"{"model": "oxseek-demo", "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
            "thinking": {"type": "adaptive"}, "output_config": {}}"#,
    ),
    ("/tokenize", r#"{"messages": [{"role": "user", "content": "Hi"}]}"#),
    ("/tokenize", r#"{"prompt": "Once upon a time"}"#),
    ("/detokenize", r#"{"tokens": [10, 20, 30]}"#),
];
