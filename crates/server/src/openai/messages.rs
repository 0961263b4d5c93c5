//! The conversation of a chat request, in the plain form that templates read.

use serde_json::{Value, json};

use super::fields::{Fields, wrong};
use crate::{error::ApiError, limits::MESSAGES_MAX};

/// Most calls of one earlier message.
const CALLS_MAX: usize = 256;

/// How a template wants the arguments of earlier calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ArgumentsForm {
    /// As the text that the model wrote.
    Text,
    /// As the object that it stands for: the template makes JSON of it.
    Object,
}

impl ArgumentsForm {
    /// Templates that make JSON of whatever they get would quote a text.
    pub(crate) fn of(template: &str) -> Self {
        let makes_json = template.match_indices("arguments").any(|(at, word)| {
            let rest = template[at + word.len()..].trim_start_matches(['\'', '"', ']', ')', ' ']);
            rest.strip_prefix('|').is_some_and(|filter| filter.trim_start().starts_with("tojson"))
        });
        if makes_json && !template.contains("is string") { Self::Object } else { Self::Text }
    }
}

/// What a chat request continues.
#[derive(Debug, Default)]
pub(crate) struct Messages {
    /// `role`, `content` (one string, or null beside calls), `tool_calls`, `tool_call_id`, `name`, `reasoning_content`.
    pub(crate) list: Vec<Value>,
    /// The last message is the beginning of the answer.
    pub(crate) prefix: bool,
}

/// `messages`.
pub(crate) fn messages(fields: &mut Fields, arguments: ArgumentsForm) -> Result<Messages, ApiError> {
    let list = fields.list("messages")?.ok_or_else(|| ApiError::invalid("messages", "is missing"))?;
    if list.is_empty() {
        return Err(ApiError::invalid("messages", "must hold at least one message"));
    }
    if list.len() > MESSAGES_MAX {
        let message = format!("has {} messages, at most {MESSAGES_MAX}", list.len());
        return Err(ApiError::invalid("messages", message));
    }
    let mut messages = Messages::default();
    for (i, value) in list.into_iter().enumerate() {
        if messages.prefix {
            let place = format!("messages[{}].prefix", i - 1);
            return Err(ApiError::invalid(place, "only the last message can be continued"));
        }
        let (message, prefix) = message(value, &format!("messages[{i}]"), arguments)?;
        messages.list.push(message);
        messages.prefix = prefix;
    }
    Ok(messages)
}

fn message(value: Value, path: &str, arguments: ArgumentsForm) -> Result<(Value, bool), ApiError> {
    let mut fields = Fields::nested(value, path)?;
    let role = fields.string("role")?.ok_or_else(|| ApiError::invalid(fields.name("role"), "is missing"))?;
    let role = match role.as_str() {
        // OpenAI's newer name of the same thing.
        "system" | "developer" => "system",
        "user" => "user",
        "assistant" => "assistant",
        "tool" => "tool",
        "function" => {
            let message = "is OpenAI's old form of tool results; send a message of the role tool";
            return Err(ApiError::unsupported(fields.name("role"), message));
        }
        _ => {
            let roles = "must be system, developer, user, assistant or tool";
            return Err(ApiError::invalid(fields.name("role"), roles));
        }
    };
    let mut message = json!({"role": role});
    let mut prefix = false;
    if role == "assistant" {
        prefix = assistant(&mut fields, arguments, &mut message)?;
    }
    if role == "tool" {
        let id = fields.string("tool_call_id")?;
        message["tool_call_id"] =
            id.ok_or_else(|| ApiError::invalid(fields.name("tool_call_id"), "is missing"))?.into();
    }
    let has_calls = message.get("tool_calls").is_some();
    message["content"] = match content(&mut fields)? {
        // Templates ask whether the content of a message with calls is none.
        Some(text) if text.is_empty() && has_calls => Value::Null,
        Some(text) => text.into(),
        None if has_calls => Value::Null,
        None => return Err(ApiError::invalid(fields.name("content"), "is missing")),
    };
    if let Some(name) = fields.string("name")? {
        message["name"] = name.into();
    }
    // What comes back when an answer of ours is sent again as it was.
    fields.only("refusal", &[])?;
    fields.only("audio", &[])?;
    fields.only("function_call", &[])?;
    fields.list("annotations")?;
    fields.finish()?;
    Ok((message, prefix))
}

/// What only an assistant's message has; answers whether it is to be continued.
fn assistant(fields: &mut Fields, arguments: ArgumentsForm, message: &mut Value) -> Result<bool, ApiError> {
    let thinking = (fields.string("reasoning_content")?, fields.string("reasoning")?);
    if let Some(thinking) = thinking.0.or(thinking.1) {
        message["reasoning_content"] = thinking.clone().into();
        message["reasoning"] = thinking.into();
    }
    let calls = fields.list("tool_calls")?.unwrap_or_default();
    if calls.len() > CALLS_MAX {
        let why = format!("has {} calls, at most {CALLS_MAX}", calls.len());
        return Err(ApiError::invalid(fields.name("tool_calls"), why));
    }
    if !calls.is_empty() {
        let name = fields.name("tool_calls");
        let calls = calls.into_iter().enumerate();
        message["tool_calls"] =
            calls.map(|(i, c)| call(c, &format!("{name}[{i}]"), arguments)).collect::<Result<_, _>>()?;
    }
    Ok(fields.boolean("prefix")?.unwrap_or(false))
}

/// A call of an earlier answer.
fn call(value: Value, path: &str, form: ArgumentsForm) -> Result<Value, ApiError> {
    let mut fields = Fields::nested(value, path)?;
    fields.only("type", &[json!("function")])?;
    // Sent back by clients that keep a stream's deltas.
    fields.count("index")?;
    let id = fields.string("id")?.ok_or_else(|| ApiError::invalid(fields.name("id"), "is missing"))?;
    let name = fields.name("function");
    let function = fields.take("function").ok_or_else(|| ApiError::invalid(&name, "is missing"))?;
    fields.finish()?;
    let mut fields = Fields::nested(function, &name)?;
    let name = fields.string("name")?.ok_or_else(|| ApiError::invalid(fields.name("name"), "is missing"))?;
    let arguments = match (fields.take("arguments"), form) {
        (None, ArgumentsForm::Text) => json!("{}"),
        (None, ArgumentsForm::Object) => json!({}),
        (Some(Value::String(text)), ArgumentsForm::Object) => {
            serde_json::from_str::<Value>(&text).ok().filter(Value::is_object).unwrap_or(text.into())
        }
        (Some(Value::Object(map)), ArgumentsForm::Text) => Value::Object(map).to_string().into(),
        (Some(value @ (Value::String(_) | Value::Object(_))), _) => value,
        (Some(other), _) => return Err(wrong(&fields.name("arguments"), "JSON in a string", &other)),
    };
    fields.finish()?;
    Ok(json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}))
}

/// A message's text: a string, or a list of text parts.
fn content(fields: &mut Fields) -> Result<Option<String>, ApiError> {
    let name = fields.name("content");
    match fields.take("content") {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(Value::Array(parts)) => {
            let parts = parts.into_iter().enumerate();
            parts.map(|(i, p)| text_part(p, &format!("{name}[{i}]"))).collect::<Result<_, _>>().map(Some)
        }
        Some(other) => Err(wrong(&name, "a string or a list of parts", &other)),
    }
}

fn text_part(value: Value, path: &str) -> Result<String, ApiError> {
    let mut fields = Fields::nested(value, path)?;
    match fields.string("type")?.as_deref() {
        Some("text") => {}
        Some(kind @ ("image_url" | "input_audio" | "file" | "refusal" | "video_url")) => {
            return Err(ApiError::unsupported(path, format!("{kind} parts are not supported, only text")));
        }
        _ => return Err(ApiError::invalid(format!("{path}.type"), "must be \"text\"")),
    }
    let text = fields.string("text")?.ok_or_else(|| ApiError::invalid(fields.name("text"), "is missing"))?;
    fields.finish()?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_that_makes_json_gets_objects() {
        let object = "{{ call['function']['arguments'] | tojson }}";
        let either = "{{ c.arguments if c.arguments is string else c.arguments | tojson }}";
        let text = "{{ tool['function']['arguments'] + '\\n```' }}{{ tools | tojson }}";
        for (template, form) in [
            (object, ArgumentsForm::Object),
            ("{{ c.function.arguments|tojson }}", ArgumentsForm::Object),
            (either, ArgumentsForm::Text),
            (text, ArgumentsForm::Text),
        ] {
            assert_eq!(ArgumentsForm::of(template), form, "{template}");
        }
    }
}
