//! From a body of Anthropic's `/v1/messages` to one of `/v1/chat/completions`.

use serde_json::{Map, Value, json};

use crate::{
    error::ApiError,
    openai::fields::{Fields, wrong},
};

/// Names of the chat route's fields, and of what they came from here.
pub(crate) const NAMES: [(&str, &str); 4] = [
    ("max_completion_tokens", "max_tokens"),
    ("stop", "stop_sequences"),
    ("reasoning_effort", "output_config.effort"),
    ("response_format", "output_config.format"),
];

/// What is asked for.
#[derive(Debug)]
pub(crate) struct Asked {
    pub(crate) chat: Value,
    pub(crate) stream: bool,
}

impl Asked {
    /// Takes a request for an answer apart.
    pub(crate) fn read(mut fields: Fields) -> Result<Self, ApiError> {
        let mut chat = conversation(&mut fields)?;
        let most = fields.take("max_tokens").ok_or_else(|| ApiError::invalid("max_tokens", "is missing"))?;
        chat.insert("max_completion_tokens".into(), most);
        for name in ["temperature", "top_p", "top_k"] {
            chat.extend(fields.take(name).map(|v| (name.to_string(), v)));
        }
        if let Some(stops) = fields.list("stop_sequences")? {
            chat.insert("stop".into(), stops.into());
        }
        if let Some(metadata) = fields.take("metadata") {
            let mut metadata = Fields::nested(metadata, "metadata")?;
            metadata.string("user_id")?;
            metadata.finish()?;
        }
        fields.only("service_tier", &[json!("auto"), json!("standard_only")])?;
        let stream = fields.boolean("stream")?.unwrap_or(false);
        fields.finish()?;
        chat.insert("stream".into(), true.into());
        chat.insert("stream_options".into(), json!({"include_usage": true}));
        Ok(Self { chat: chat.into(), stream })
    }
}

/// What `count_tokens` takes, too: everything that becomes part of the prompt.
pub(crate) fn conversation(fields: &mut Fields) -> Result<Map<String, Value>, ApiError> {
    let mut chat = Map::new();
    let model = fields.take("model").ok_or_else(|| ApiError::invalid("model", "is missing"))?;
    chat.insert("model".into(), model);
    let mut messages = Vec::new();
    if let Some(system) = fields.take("system") {
        messages.push(json!({"role": "system", "content": text(system, "system")?}));
    }
    let list = fields.list("messages")?.ok_or_else(|| ApiError::invalid("messages", "is missing"))?;
    let count = list.len();
    for (i, value) in list.into_iter().enumerate() {
        message(value, &format!("messages[{i}]"), i + 1 == count, &mut messages)?;
    }
    if count == 0 {
        return Err(ApiError::invalid("messages", "must hold at least one message"));
    }
    chat.insert("messages".into(), messages.into());
    tools(fields, &mut chat)?;
    thinking(fields, &mut chat)?;
    output_config(fields, &mut chat)?;
    cache_control(fields)?;
    Ok(chat)
}

/// A text: a string, or a list of text blocks.
fn text(value: Value, path: &str) -> Result<String, ApiError> {
    match value {
        Value::String(text) => Ok(text),
        Value::Array(list) => {
            let block = |(i, value): (usize, Value)| {
                let mut fields = Fields::nested(value, &format!("{path}[{i}]"))?;
                match required(&mut fields, "type")?.as_str() {
                    "text" => text_block(fields),
                    _ => {
                        Err(ApiError::unsupported(fields.name("type"), "only text blocks are supported here"))
                    }
                }
            };
            list.into_iter().enumerate().map(block).collect()
        }
        other => Err(wrong(path, "a string or a list of blocks", &other)),
    }
}

fn text_block(mut fields: Fields) -> Result<String, ApiError> {
    let text = required(&mut fields, "text")?;
    cache_control(&mut fields)?;
    fields.only("citations", &[json!([])])?;
    fields.finish()?;
    Ok(text)
}

/// Prompts are cached by themselves; where to cache is taken as advice.
fn cache_control(fields: &mut Fields) -> Result<(), ApiError> {
    let Some(control) = fields.take("cache_control") else { return Ok(()) };
    let mut control = Fields::nested(control, &fields.name("cache_control"))?;
    control.only("type", &[json!("ephemeral")])?;
    control.string("ttl")?;
    control.finish()
}

fn required(fields: &mut Fields, name: &str) -> Result<String, ApiError> {
    fields.string(name)?.ok_or_else(|| ApiError::invalid(fields.name(name), "is missing"))
}

/// One message, which may become several: results of tools are messages of their own in a chat.
fn message(value: Value, path: &str, is_last: bool, out: &mut Vec<Value>) -> Result<(), ApiError> {
    let mut fields = Fields::nested(value, path)?;
    let role = required(&mut fields, "role")?;
    let place = fields.name("content");
    let content = fields.take("content").ok_or_else(|| ApiError::invalid(&place, "is missing"))?;
    fields.finish()?;
    let blocks = match content {
        Value::String(text) => vec![json!({"type": "text", "text": text})],
        Value::Array(list) => list,
        other => return Err(wrong(&place, "a string or a list of blocks", &other)),
    };
    let blocks = blocks.into_iter().enumerate().map(|(i, b)| Fields::nested(b, &format!("{place}[{i}]")));
    match role.as_str() {
        "user" => user(blocks, out),
        "assistant" => assistant(blocks, is_last, out),
        _ => Err(ApiError::invalid(format!("{path}.role"), "must be user or assistant")),
    }
}

fn user(
    blocks: impl Iterator<Item = Result<Fields, ApiError>>,
    out: &mut Vec<Value>,
) -> Result<(), ApiError> {
    let mut words: Option<String> = None;
    for block in blocks {
        let mut block = block?;
        match required(&mut block, "type")?.as_str() {
            "text" => *words.get_or_insert_default() += &text_block(block)?,
            "tool_result" => {
                // In Anthropic's order results come first; text before them would be torn from its place.
                if words.is_some() {
                    let why = "results of tools must come before text";
                    return Err(ApiError::invalid(block.name("type"), why));
                }
                out.push(tool_result(block)?);
            }
            _ => {
                return Err(ApiError::unsupported(
                    block.name("type"),
                    "only text and tool_result blocks are supported",
                ));
            }
        }
    }
    out.extend(words.map(|text| json!({"role": "user", "content": text})));
    Ok(())
}

fn tool_result(mut block: Fields) -> Result<Value, ApiError> {
    let id = required(&mut block, "tool_use_id")?;
    let place = block.name("content");
    let mut content = block.take("content").map_or(Ok(String::new()), |c| text(c, &place))?;
    if block.boolean("is_error")?.unwrap_or(false) {
        // A chat has no field for it, and the model must know.
        content = format!("Error: {content}");
    }
    cache_control(&mut block)?;
    block.finish()?;
    Ok(json!({"role": "tool", "tool_call_id": id, "content": content}))
}

fn assistant(
    blocks: impl Iterator<Item = Result<Fields, ApiError>>,
    is_last: bool,
    out: &mut Vec<Value>,
) -> Result<(), ApiError> {
    let (mut thought, mut words, mut calls) = (String::new(), String::new(), Vec::new());
    for block in blocks {
        let mut block = block?;
        match required(&mut block, "type")?.as_str() {
            "text" => words += &text_block(block)?,
            "thinking" => {
                thought += &required(&mut block, "thinking")?;
                // Only Anthropic's own servers sign.
                block.string("signature")?;
                block.finish()?;
            }
            "tool_use" => calls.push(tool_use(block)?),
            _ => {
                let why = "only text, thinking and tool_use blocks are supported";
                return Err(ApiError::unsupported(block.name("type"), why));
            }
        }
    }
    let mut message = json!({"role": "assistant", "content": words});
    if !thought.is_empty() {
        message["reasoning_content"] = thought.into();
    }
    if calls.is_empty() && is_last {
        // The beginning of the answer.
        message["prefix"] = true.into();
    }
    if !calls.is_empty() {
        message["tool_calls"] = calls.into();
    }
    out.push(message);
    Ok(())
}

fn tool_use(mut block: Fields) -> Result<Value, ApiError> {
    let (id, name) = (required(&mut block, "id")?, required(&mut block, "name")?);
    let input = block.object("input")?.unwrap_or_default();
    if let Some(caller) = block.take("caller") {
        let mut caller = Fields::nested(caller, &block.name("caller"))?;
        caller.only("type", &[json!("direct")])?;
        caller.finish()?;
    }
    cache_control(&mut block)?;
    block.finish()?;
    let arguments = Value::Object(input).to_string();
    Ok(json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}))
}

/// `tools` and `tool_choice`.
fn tools(fields: &mut Fields, chat: &mut Map<String, Value>) -> Result<(), ApiError> {
    let list = fields.list("tools")?.unwrap_or_default();
    let tools = list.into_iter().enumerate().map(|(i, t)| tool(t, &format!("tools[{i}]")));
    let tools = tools.collect::<Result<Vec<_>, _>>()?;
    if !tools.is_empty() {
        chat.insert("tools".into(), tools.into());
    }
    let Some(choice) = fields.take("tool_choice") else { return Ok(()) };
    let mut choice = Fields::nested(choice, "tool_choice")?;
    let choice_of_chat = match required(&mut choice, "type")?.as_str() {
        "auto" => json!("auto"),
        "none" => json!("none"),
        "any" => json!("required"),
        "tool" => json!({"type": "function", "function": {"name": required(&mut choice, "name")?}}),
        _ => return Err(ApiError::invalid("tool_choice.type", "must be auto, any, tool or none")),
    };
    chat.insert("tool_choice".into(), choice_of_chat);
    if let Some(one) = choice.boolean("disable_parallel_tool_use")? {
        chat.insert("parallel_tool_calls".into(), (!one).into());
    }
    choice.finish()
}

fn tool(value: Value, path: &str) -> Result<Value, ApiError> {
    let mut fields = Fields::nested(value, path)?;
    if fields.string("type")?.is_some_and(|kind| kind != "custom") {
        return Err(ApiError::unsupported(fields.name("type"), "only custom tools are supported"));
    }
    let mut function = Map::new();
    for (from, to) in [
        ("name", "name"),
        ("description", "description"),
        ("input_schema", "parameters"),
        ("strict", "strict"),
    ] {
        function.extend(fields.take(from).map(|v| (to.to_string(), v)));
    }
    cache_control(&mut fields)?;
    fields.finish()?;
    Ok(json!({"type": "function", "function": function}))
}

fn thinking(fields: &mut Fields, chat: &mut Map<String, Value>) -> Result<(), ApiError> {
    let Some(thinking) = fields.take("thinking") else { return Ok(()) };
    let mut thinking = Fields::nested(thinking, "thinking")?;
    let kind = required(&mut thinking, "type")?;
    if !matches!(kind.as_str(), "enabled" | "disabled" | "adaptive") {
        return Err(ApiError::invalid("thinking.type", "must be enabled, disabled or adaptive"));
    }
    thinking.only("display", &[json!("summarized")])?;
    let mut object = json!({"type": kind});
    if let Some(budget) = thinking.take("budget_tokens") {
        object["budget_tokens"] = budget;
    }
    thinking.finish()?;
    chat.insert("thinking".into(), object);
    Ok(())
}

/// `output_config`: a schema for the answer, and how much effort.
fn output_config(fields: &mut Fields, chat: &mut Map<String, Value>) -> Result<(), ApiError> {
    let Some(config) = fields.take("output_config") else { return Ok(()) };
    let mut config = Fields::nested(config, "output_config")?;
    chat.extend(config.take("effort").map(|e| ("reasoning_effort".to_string(), e)));
    if let Some(format) = config.take("format") {
        let mut format = Fields::nested(format, "output_config.format")?;
        format.only("type", &[json!("json_schema")])?;
        let schema = format.object("schema")?;
        let schema = schema.ok_or_else(|| ApiError::invalid("output_config.format.schema", "is missing"))?;
        format.finish()?;
        let schema = json!({"name": "answer", "schema": schema, "strict": true});
        chat.insert("response_format".into(), json!({"type": "json_schema", "json_schema": schema}));
    }
    config.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: &Value) -> Result<Asked, ApiError> {
        Asked::read(Fields::from_body(body.to_string().as_bytes()).unwrap_or_else(|e| panic!("{e:?}")))
    }

    #[test]
    fn a_request_becomes_one_of_the_chat_route() {
        let asked = read(&json!({
            "model": "m", "max_tokens": 9, "stream": true, "temperature": 0.5, "stop_sequences": ["END"],
            "system": [
                {"type": "text", "text": "Be ", "cache_control": {"type": "ephemeral"}},
                {"type": "text", "text": "brief."}],
            "messages": [
                {"role": "user", "content": "Weather?"},
                {"role": "assistant", "content": [
                    {"type": "thinking", "thinking": "Ask.", "signature": ""}, {"type": "text", "text": "I look."},
                    {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"city": "Ulm"}}]},
                {"role": "user", "content": [
                    {"type": "tool_result", "tool_use_id": "toolu_1", "is_error": true,
                        "content": [{"type": "text", "text": "sun"}]},
                    {"type": "text", "text": "And?"}]},
                {"role": "assistant", "content": "It is"},
            ],
            "tools": [{"name": "f", "description": "d", "input_schema": {"type": "object"}}],
            "tool_choice": {"type": "any", "disable_parallel_tool_use": true},
            "thinking": {"type": "enabled", "budget_tokens": 5}, "metadata": {"user_id": "u"},
            "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": {"type": "object"}}},
        }))
        .unwrap_or_else(|e| panic!("{e:?}"));
        assert!(asked.stream);
        let want = json!({
            "model": "m", "max_completion_tokens": 9, "stream": true, "stream_options": {"include_usage": true},
            "temperature": 0.5, "stop": ["END"],
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Weather?"},
                {"role": "assistant", "content": "I look.", "reasoning_content": "Ask.", "tool_calls": [
                    {"id": "toolu_1", "type": "function",
                        "function": {"name": "f", "arguments": "{\"city\":\"Ulm\"}"}}]},
                {"role": "tool", "tool_call_id": "toolu_1", "content": "Error: sun"},
                {"role": "user", "content": "And?"},
                {"role": "assistant", "content": "It is", "prefix": true},
            ],
            "tools": [{"type": "function",
                "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}],
            "tool_choice": "required", "parallel_tool_calls": false,
            "thinking": {"type": "enabled", "budget_tokens": 5},
            "reasoning_effort": "low",
            "response_format": {"type": "json_schema",
                "json_schema": {"name": "answer", "schema": {"type": "object"}, "strict": true}},
        });
        assert_eq!(asked.chat, want);
    }

    #[test]
    fn what_is_not_offered_is_named() {
        let hi = json!([{"role": "user", "content": "Hi"}]);
        let block =
            |b: Value| json!({"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": [b]}]});
        let with = |name: &str, value: Value| {
            let mut body = json!({"model": "m", "max_tokens": 1, "messages": hi});
            body[name] = value;
            body
        };
        for (body, want) in [
            (json!({"max_tokens": 1, "messages": hi}), "model"),
            (json!({"model": "m", "messages": hi}), "max_tokens"),
            (json!({"model": "m", "max_tokens": 1}), "messages"),
            (json!({"model": "m", "max_tokens": 1, "messages": []}), "messages"),
            (
                json!({"model": "m", "max_tokens": 1, "messages": [{"role": "system", "content": "a"}]}),
                "messages[0].role",
            ),
            (block(json!({"type": "image", "source": {}})), "messages[0].content[0].type"),
            (block(json!({"type": "text", "text": "a", "more": 1})), "messages[0].content[0].more"),
            (block(json!({"type": "text", "text": 7})), "messages[0].content[0].text"),
            (block(json!({"type": "tool_result"})), "messages[0].content[0].tool_use_id"),
            (with("container", json!("c")), "container"),
            (with("mcp_servers", json!([])), "mcp_servers"),
            (with("system", json!(7)), "system"),
            (with("thinking", json!({"type": "maybe"})), "thinking.type"),
            (with("tool_choice", json!({"type": "tool"})), "tool_choice.name"),
            (with("tools", json!([{"type": "bash_20250124", "name": "bash"}])), "tools[0].type"),
            (
                with("output_config", json!({"format": {"type": "json_schema"}})),
                "output_config.format.schema",
            ),
            (with("service_tier", json!("priority")), "service_tier"),
        ] {
            let Err(e) = read(&body) else { panic!("{body} was accepted") };
            assert_eq!(e.to_json()["error"]["param"], want, "{body}");
        }
    }
}
