//! Items of a conversation: what `/v1/responses` has in place of messages.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::{
    error::ApiError,
    limits::MESSAGES_MAX,
    openai::fields::{Fields, wrong},
};

/// `input`: a text, or a list of items. The items come back in one plain form each.
pub(crate) fn read(input: Option<Value>) -> Result<Vec<Arc<Value>>, ApiError> {
    match input {
        None => Ok(Vec::new()),
        Some(Value::String(text)) => Ok(vec![Arc::new(message("user", &text))]),
        Some(Value::Array(list)) if list.len() > MESSAGES_MAX => {
            Err(ApiError::invalid("input", format!("has {} items, at most {MESSAGES_MAX}", list.len())))
        }
        Some(Value::Array(list)) => {
            list.into_iter().enumerate().map(|(i, v)| item(v, &format!("input[{i}]")).map(Arc::new)).collect()
        }
        Some(other) => Err(wrong("input", "a string or a list of items", &other)),
    }
}

fn message(role: &str, text: &str) -> Value {
    let kind = if role == "assistant" { "output_text" } else { "input_text" };
    json!({"type": "message", "role": role, "content": [{"type": kind, "text": text}]})
}

fn item(value: Value, path: &str) -> Result<Value, ApiError> {
    let mut fields = Fields::nested(value, path)?;
    // Items of answers come back with what they had there.
    let id = fields.string("id")?;
    fields.only("status", &[json!("completed"), json!("incomplete"), json!("in_progress")])?;
    let kind = fields.string("type")?;
    let mut item = match kind.as_deref() {
        None | Some("message") => message_item(&mut fields)?,
        Some("function_call") => json!({
            "type": "function_call",
            "call_id": required(&mut fields, "call_id")?,
            "name": required(&mut fields, "name")?,
            "arguments": required(&mut fields, "arguments")?,
        }),
        Some("function_call_output") => json!({
            "type": "function_call_output",
            "call_id": required(&mut fields, "call_id")?,
            "output": text(&mut fields, "output")?,
        }),
        Some("reasoning") => reasoning_item(&mut fields)?,
        Some(other) => {
            let short: String = other.chars().take(100).collect();
            let why = format!("{short:?} items are not supported");
            return Err(ApiError::unsupported(fields.name("type"), why));
        }
    };
    if let Some(id) = id {
        item["id"] = id.into();
    }
    fields.finish()?;
    Ok(item)
}

fn message_item(fields: &mut Fields) -> Result<Value, ApiError> {
    let role = required(fields, "role")?;
    if !matches!(role.as_str(), "system" | "developer" | "user" | "assistant") {
        return Err(ApiError::invalid(fields.name("role"), "must be system, developer, user or assistant"));
    }
    fields.only("phase", &[json!("commentary"), json!("final_answer")])?;
    Ok(message(&role, &text(fields, "content")?))
}

fn reasoning_item(fields: &mut Fields) -> Result<Value, ApiError> {
    fields.only("encrypted_content", &[])?;
    let summary = fields.list("summary")?.unwrap_or_default();
    let name = fields.name("content");
    let thoughts = match fields.take("content") {
        None => Vec::new(),
        Some(Value::Array(parts)) => parts,
        Some(other) => return Err(wrong(&name, "a list of parts", &other)),
    };
    let text = parts(thoughts, &name, &["reasoning_text"])?;
    let content = json!([{"type": "reasoning_text", "text": text}]);
    Ok(json!({"type": "reasoning", "summary": summary, "content": content}))
}

fn required(fields: &mut Fields, name: &str) -> Result<String, ApiError> {
    fields.string(name)?.ok_or_else(|| ApiError::invalid(fields.name(name), "is missing"))
}

/// A text: a string or a list of text parts.
fn text(fields: &mut Fields, name: &str) -> Result<String, ApiError> {
    let path = fields.name(name);
    match fields.take(name) {
        Some(Value::String(text)) => Ok(text),
        Some(Value::Array(list)) => parts(list, &path, &["input_text", "output_text"]),
        None => Err(ApiError::invalid(path, "is missing")),
        Some(other) => Err(wrong(&path, "a string or a list of parts", &other)),
    }
}

fn parts(list: Vec<Value>, path: &str, kinds: &[&str]) -> Result<String, ApiError> {
    let part = |(i, value): (usize, Value)| {
        let mut fields = Fields::nested(value, &format!("{path}[{i}]"))?;
        let kind = required(&mut fields, "type")?;
        if !kinds.contains(&kind.as_str()) {
            let why = format!("only {} parts are supported", kinds.join(" and "));
            return Err(ApiError::unsupported(fields.name("type"), why));
        }
        let text = required(&mut fields, "text")?;
        fields.list("annotations")?;
        fields.list("logprobs")?;
        fields.finish()?;
        Ok(text)
    };
    list.into_iter().enumerate().map(part).collect()
}

/// Chat messages that say what the items say. The items of one answer become one message.
pub(crate) fn messages(instructions: Option<&str>, items: &[&Value]) -> Vec<Value> {
    let mut messages: Vec<Value> = Vec::new();
    messages.extend(instructions.map(|text| json!({"role": "system", "content": text})));
    // An assistant's message that may still get more of its answer.
    let mut open = false;
    for item in items {
        let text = |of: &Value| -> String {
            of.as_array().into_iter().flatten().filter_map(|p| p["text"].as_str()).collect()
        };
        match item["type"].as_str() {
            Some("reasoning") => {
                let answer = assistant(&mut messages, &mut open, |m| {
                    m["content"].is_null() && m["tool_calls"].is_null()
                });
                let thought = answer["reasoning_content"].as_str().unwrap_or_default().to_string();
                answer["reasoning_content"] = (thought + &text(&item["content"])).into();
            }
            Some("function_call") => {
                let answer = assistant(&mut messages, &mut open, |_| true);
                let call = json!({"id": item["call_id"], "type": "function",
                    "function": {"name": item["name"], "arguments": item["arguments"]}});
                match &mut answer["tool_calls"] {
                    Value::Array(calls) => calls.push(call),
                    none => *none = json!([call]),
                }
            }
            Some("function_call_output") => {
                open = false;
                messages.push(
                    json!({"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]}),
                );
            }
            _ if item["role"] == "assistant" => {
                let answer = assistant(&mut messages, &mut open, |m| {
                    m["content"].is_null() && m["tool_calls"].is_null()
                });
                answer["content"] = text(&item["content"]).into();
            }
            _ => {
                open = false;
                messages.push(json!({"role": item["role"], "content": text(&item["content"])}));
            }
        }
    }
    // Thinking without an answer, which a cut left behind, is a message without content.
    for m in &mut messages {
        if m["role"] == "assistant" && m["content"].is_null() && m["tool_calls"].is_null() {
            m["content"] = "".into();
        }
    }
    messages
}

/// The open message if it `fits`, else a new one.
fn assistant<'a>(
    messages: &'a mut Vec<Value>,
    open: &mut bool,
    fits: impl FnOnce(&Value) -> bool,
) -> &'a mut Value {
    if !(*open && messages.last().is_some_and(fits)) {
        messages.push(json!({"role": "assistant", "content": null}));
    }
    *open = true;
    let last = messages.len() - 1;
    &mut messages[last]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages_of(input: Value) -> Vec<Value> {
        let items = read(Some(input)).unwrap_or_else(|e| panic!("{e:?}"));
        messages(None, &items.iter().map(AsRef::as_ref).collect::<Vec<_>>())
    }

    #[test]
    fn the_items_of_one_answer_become_one_message() {
        let got = messages_of(json!([
            {"role": "user", "content": "Weather?"},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Ask."}]},
            {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
                "content": [{"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}]},
            {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "f", "arguments": "{}",
                "status": "completed"},
            {"type": "function_call", "call_id": "call_2", "name": "g", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "call_1", "output": "sun"},
            {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "rain"}]},
            {"type": "reasoning", "id": "rs_2", "summary": [],
                "content": [{"type": "reasoning_text", "text": "Both."}]},
            {"role": "assistant", "content": "Sun and rain."},
            {"role": "assistant", "content": "Really."},
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Stop."}]},
        ]));
        let call = |id: &str, name: &str| {
            let function = json!({"name": name, "arguments": "{}"});
            json!({"id": id, "type": "function", "function": function})
        };
        assert_eq!(
            got,
            [
                json!({"role": "user", "content": "Weather?"}),
                json!({"role": "assistant", "content": "I look.", "reasoning_content": "Ask.",
                "tool_calls": [call("call_1", "f"), call("call_2", "g")]}),
                json!({"role": "tool", "tool_call_id": "call_1", "content": "sun"}),
                json!({"role": "tool", "tool_call_id": "call_2", "content": "rain"}),
                json!({"role": "assistant", "content": "Sun and rain.", "reasoning_content": "Both."}),
                json!({"role": "assistant", "content": "Really."}),
                json!({"role": "developer", "content": "Stop."}),
            ]
        );
    }

    #[test]
    fn thinking_that_was_cut_stays_a_message() {
        let got = messages_of(json!([
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm"}]},
            {"role": "user", "content": "Well?"},
        ]));
        assert_eq!(got[0], json!({"role": "assistant", "content": "", "reasoning_content": "Hm"}));
    }

    #[test]
    fn wrong_items_name_their_place() {
        for (input, want) in [
            (json!([7]), "input[0]"),
            (json!([{"role": "user"}]), "input[0].content"),
            (json!([{"role": "wizard", "content": "a"}]), "input[0].role"),
            (
                json!([{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]),
                "input[0].content[0].type",
            ),
            (json!([{"type": "item_reference", "id": "x"}]), "input[0].type"),
            (json!([{"type": "function_call", "name": "f", "arguments": "{}"}]), "input[0].call_id"),
            (json!([{"type": "function_call_output", "call_id": "c"}]), "input[0].output"),
            (json!([{"type": "reasoning", "encrypted_content": "x"}]), "input[0].encrypted_content"),
            (json!([{"role": "user", "content": "a", "more": 1}]), "input[0].more"),
        ] {
            let Err(e) = read(Some(input.clone())) else { panic!("{input} was accepted") };
            assert_eq!(e.to_json()["error"]["param"], want, "{input}");
        }
    }
}
