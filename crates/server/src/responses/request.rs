//! From a body of `/v1/responses` to one of `/v1/chat/completions`.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::items;
use crate::{error::ApiError, openai::fields::Fields};

/// Fields that mean the same on both routes; the chat route checks them.
const PASSED: [&str; 14] = [
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "user",
];

/// Those of them that a prompt depends on.
const PASSED_TO_PROMPT: [&str; 3] = ["model", "parallel_tool_calls", "chat_template_kwargs"];

/// Names of the chat route's fields, and of what they came from here.
pub(crate) const NAMES: [(&str, &str); 6] = [
    ("messages", "input"),
    ("max_completion_tokens", "max_output_tokens"),
    ("response_format.json_schema", "text.format"),
    ("response_format", "text.format"),
    ("reasoning_effort", "reasoning.effort"),
    ("stream_options", "stream"),
];

/// Longest list of `metadata`, OpenAI's bound.
const METADATA_MAX: usize = 16;

/// What is asked for.
#[derive(Debug)]
pub(crate) struct Asked {
    /// Without messages: those follow from the items before.
    pub(crate) chat: Map<String, Value>,
    /// The new items.
    pub(crate) input: Vec<Arc<Value>>,
    pub(crate) previous: Option<String>,
    pub(crate) instructions: Option<String>,
    pub(crate) stream: bool,
    pub(crate) store: bool,
    pub(crate) background: bool,
    /// Fields of the response that only repeat the request.
    pub(crate) echo: Map<String, Value>,
}

impl Asked {
    /// Takes a request apart.
    pub(crate) fn read(mut fields: Fields) -> Result<Self, ApiError> {
        let mut asked = Self::take_prompt(&mut fields)?;
        let (chat, echo) = (&mut asked.chat, &mut asked.echo);
        pass(&mut fields, &PASSED, chat);
        chat.insert("stream".into(), true.into());
        chat.insert("stream_options".into(), json!({"include_usage": true}));
        let most = fields.take("max_output_tokens");
        echo.insert("max_output_tokens".into(), most.clone().unwrap_or_default());
        chat.extend(most.map(|n| ("max_completion_tokens".to_string(), n)));
        logprobs(&mut fields, chat, echo)?;
        fields.only("max_tool_calls", &[])?;
        echo.insert("metadata".into(), metadata(&mut fields)?);
        asked.background = fields.boolean("background")?.unwrap_or(false);
        asked.store = fields.boolean("store")?.unwrap_or(true);
        asked.stream = fields.boolean("stream")?.unwrap_or(false);
        if let Some(options) = fields.take("stream_options") {
            let mut options = Fields::nested(options, "stream_options")?;
            options.only("include_obfuscation", &[json!(false)])?;
            options.finish()?;
        }
        if asked.background && (asked.stream || !asked.store) {
            return Err(ApiError::unsupported("background", "needs store: true and no stream"));
        }
        fields.finish()?;
        asked.repeat();
        Ok(asked)
    }

    /// Takes a request apart that only asks how long its prompt is.
    pub(crate) fn read_prompt(mut fields: Fields) -> Result<Self, ApiError> {
        let asked = Self::take_prompt(&mut fields)?;
        fields.finish()?;
        Ok(asked)
    }

    /// What the prompt is made of.
    fn take_prompt(fields: &mut Fields) -> Result<Self, ApiError> {
        let (mut chat, mut echo) = (Map::new(), Map::new());
        pass(fields, &PASSED_TO_PROMPT, &mut chat);
        text(fields, &mut chat, &mut echo)?;
        reasoning(fields, &mut chat, &mut echo)?;
        tools(fields, &mut chat, &mut echo)?;
        fields.only("truncation", &[json!("disabled")])?;
        let previous = fields.string("previous_response_id")?;
        let instructions = fields.string("instructions")?;
        let input = items::read(fields.take("input"))?;
        if input.is_empty() && previous.is_none() && instructions.is_none() {
            return Err(ApiError::invalid("input", "is missing"));
        }
        let (stream, store, background) = (false, false, false);
        Ok(Self { chat, input, previous, instructions, stream, store, background, echo })
    }

    /// Fills in the fields of the response that repeat the request.
    fn repeat(&mut self) {
        let chat = &self.chat;
        let or = |name: &str, neutral: Value| chat.get(name).cloned().unwrap_or(neutral);
        let rows = [
            ("temperature", or("temperature", json!(1.0))),
            ("top_p", or("top_p", json!(1.0))),
            ("parallel_tool_calls", or("parallel_tool_calls", json!(true))),
            ("previous_response_id", json!(self.previous)),
            ("instructions", json!(self.instructions)),
            ("store", json!(self.store)),
            ("background", json!(self.background)),
        ];
        self.echo.extend(rows.map(|(name, value)| (name.to_string(), value)));
        for name in ["user", "prompt_cache_key", "safety_identifier"] {
            self.echo.extend(chat.get(name).map(|v| (name.to_string(), v.clone())));
        }
    }

    /// The body for the chat route; `history` is what came before the new items.
    pub(crate) fn chat_body(&self, history: &[Arc<Value>]) -> Value {
        let all: Vec<&Value> = history.iter().chain(&self.input).map(AsRef::as_ref).collect();
        let mut chat = self.chat.clone();
        chat.insert("messages".into(), items::messages(self.instructions.as_deref(), &all).into());
        chat.into()
    }
}

/// Passes fields on as they are.
fn pass(fields: &mut Fields, names: &[&str], chat: &mut Map<String, Value>) {
    for &name in names {
        chat.extend(fields.take(name).map(|value| (name.to_string(), value)));
    }
}

/// `text`: the format of the answer.
fn text(
    fields: &mut Fields,
    chat: &mut Map<String, Value>,
    echo: &mut Map<String, Value>,
) -> Result<(), ApiError> {
    let mut format = json!({"type": "text"});
    if let Some(text) = fields.take("text") {
        let mut text = Fields::nested(text, "text")?;
        text.only("verbosity", &[json!("medium")])?;
        if let Some(asked) = text.take("format") {
            format = asked;
            chat.insert("response_format".into(), response_format(format.clone())?);
        }
        text.finish()?;
    }
    echo.insert("text".into(), json!({"format": format, "verbosity": "medium"}));
    Ok(())
}

/// Here the schema lies beside the type, there in an object of its own.
fn response_format(format: Value) -> Result<Value, ApiError> {
    let mut fields = Fields::nested(format, "text.format")?;
    let kind = fields.string("type")?.ok_or_else(|| ApiError::invalid("text.format.type", "is missing"))?;
    if kind != "json_schema" {
        fields.finish()?;
        return Ok(json!({"type": kind}));
    }
    let mut schema = Map::new();
    for name in ["name", "schema", "strict", "description"] {
        schema.extend(fields.take(name).map(|v| (name.to_string(), v)));
    }
    fields.finish()?;
    Ok(json!({"type": kind, "json_schema": schema}))
}

/// `reasoning`: how much of it. There are no summaries: the thinking itself is in the answer.
fn reasoning(
    fields: &mut Fields,
    chat: &mut Map<String, Value>,
    echo: &mut Map<String, Value>,
) -> Result<(), ApiError> {
    let mut effort = None;
    if let Some(reasoning) = fields.take("reasoning") {
        let mut reasoning = Fields::nested(reasoning, "reasoning")?;
        effort = reasoning.string("effort")?;
        reasoning.only("summary", &[json!("auto")])?;
        reasoning.only("generate_summary", &[json!("auto")])?;
        reasoning.finish()?;
    }
    echo.insert("reasoning".into(), json!({"effort": effort, "summary": null}));
    chat.extend(effort.map(|e| ("reasoning_effort".to_string(), e.into())));
    Ok(())
}

/// `tools` and `tool_choice`: functions lie flat here, and in an object of their own there.
fn tools(
    fields: &mut Fields,
    chat: &mut Map<String, Value>,
    echo: &mut Map<String, Value>,
) -> Result<(), ApiError> {
    let list = fields.list("tools")?.unwrap_or_default();
    let choice = fields.take("tool_choice");
    echo.insert("tools".into(), list.clone().into());
    echo.insert("tool_choice".into(), choice.clone().unwrap_or("auto".into()));
    let tools = list.into_iter().enumerate().map(|(i, t)| tool(t, &format!("tools[{i}]")));
    let tools = tools.collect::<Result<Vec<_>, _>>()?;
    if !tools.is_empty() {
        chat.insert("tools".into(), tools.into());
    }
    let choice = match choice {
        Some(object @ Value::Object(_)) => {
            let mut choice = Fields::nested(object, "tool_choice")?;
            choice.only("type", &[json!("function")])?;
            let name = choice.string("name")?;
            choice.finish()?;
            Some(json!({"type": "function", "function": {"name": name}}))
        }
        other => other,
    };
    chat.extend(choice.map(|c| ("tool_choice".to_string(), c)));
    Ok(())
}

fn tool(value: Value, path: &str) -> Result<Value, ApiError> {
    let mut fields = Fields::nested(value, path)?;
    match fields.string("type")?.as_deref() {
        Some("function") => {}
        Some(_) => {
            return Err(ApiError::unsupported(fields.name("type"), "only function tools are supported"));
        }
        None => return Err(ApiError::invalid(fields.name("type"), "is missing")),
    }
    let mut function = Map::new();
    for name in ["name", "description", "parameters", "strict"] {
        function.extend(fields.take(name).map(|v| (name.to_string(), v)));
    }
    fields.finish()?;
    Ok(json!({"type": "function", "function": function}))
}

/// `top_logprobs`, and `include` which asks for them without alternatives.
fn logprobs(
    fields: &mut Fields,
    chat: &mut Map<String, Value>,
    echo: &mut Map<String, Value>,
) -> Result<(), ApiError> {
    let include = fields.list("include")?.unwrap_or_default();
    for (i, what) in include.iter().enumerate() {
        if what != "message.output_text.logprobs" {
            let why = "only message.output_text.logprobs can be included";
            return Err(ApiError::unsupported(format!("include[{i}]"), why));
        }
    }
    let top = fields.count("top_logprobs")?;
    if !include.is_empty() || top.is_some_and(|n| n > 0) {
        chat.insert("logprobs".into(), true.into());
        chat.insert("top_logprobs".into(), top.unwrap_or(0).into());
    }
    echo.insert("top_logprobs".into(), top.unwrap_or(0).into());
    Ok(())
}

/// `metadata`: texts that are given back.
fn metadata(fields: &mut Fields) -> Result<Value, ApiError> {
    let map = fields.object("metadata")?.unwrap_or_default();
    if map.len() > METADATA_MAX
        || map.iter().any(|(k, v)| k.len() > 64 || v.as_str().is_none_or(|s| s.len() > 512))
    {
        let why = format!("must be at most {METADATA_MAX} texts of 512 bytes, under names of 64");
        return Err(ApiError::invalid("metadata", why));
    }
    Ok(map.into())
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
            "model": "m", "instructions": "Be brief.", "input": "Hi", "max_output_tokens": 9, "temperature": 0,
            "reasoning": {"effort": "low", "summary": "auto"}, "metadata": {"a": "b"}, "stream": true,
            "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": true}},
            "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": false}],
            "tool_choice": {"type": "function", "name": "f"}, "top_logprobs": 2,
        }))
        .unwrap_or_else(|e| panic!("{e:?}"));
        let want = json!({
            "model": "m", "temperature": 0, "max_completion_tokens": 9, "reasoning_effort": "low",
            "stream": true, "stream_options": {"include_usage": true}, "logprobs": true, "top_logprobs": 2,
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
            "response_format": {"type": "json_schema",
                "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": true}},
            "tools": [{"type": "function",
                "function": {"name": "f", "parameters": {"type": "object"}, "strict": false}}],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
        });
        assert_eq!(asked.chat_body(&[]), want);
        assert!(asked.stream && asked.store && !asked.background);
        assert_eq!(asked.echo["metadata"], json!({"a": "b"}));
        assert_eq!(asked.echo["tools"][0]["name"], "f");
    }

    #[test]
    fn what_is_not_offered_is_named() {
        for (body, want) in [
            (json!({}), "input"),
            (json!({"input": 7}), "input"),
            (json!({"input": "a", "wish": 1}), "wish"),
            (json!({"input": "a", "conversation": "c"}), "conversation"),
            (json!({"input": "a", "truncation": "auto"}), "truncation"),
            (json!({"input": "a", "background": true, "stream": true}), "background"),
            (json!({"input": "a", "background": true, "store": false}), "background"),
            (json!({"input": "a", "include": ["file_search_call.results"]}), "include[0]"),
            (json!({"input": "a", "tools": [{"type": "web_search"}]}), "tools[0].type"),
            (
                json!({"input": "a", "tools": [{"type": "function", "name": "f", "async": true}]}),
                "tools[0].async",
            ),
            (json!({"input": "a", "text": {"verbosity": "low"}}), "text.verbosity"),
            (json!({"input": "a", "text": {"format": {"type": "text", "x": 1}}}), "text.format.x"),
            (json!({"input": "a", "reasoning": {"summary": "detailed"}}), "reasoning.summary"),
            (json!({"input": "a", "metadata": {"a": 1}}), "metadata"),
            (json!({"input": "a", "max_tool_calls": 1}), "max_tool_calls"),
            (json!({"input": "a", "prompt": {"id": "p"}}), "prompt"),
        ] {
            let Err(e) = read(&body) else { panic!("{body} was accepted") };
            assert_eq!(e.to_json()["error"]["param"], want, "{body}");
        }
    }
}
