//! What a schema says beyond what parsers take: bounds that the engine checks, and other forms of a field.

use oxseek_engine::EngineLimits;
use serde_json::{Value, json};

/// Numbers between bounds, wherever a field has that name.
const BOUNDS: [(&str, f64, f64); 10] = [
    ("temperature", 0.0, 2.0),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("typical_p", 0.0, 1.0),
    ("repetition_penalty", 0.01, 10.0),
    ("repeat_penalty", 0.01, 10.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
    ("top_logprobs", 0.0, 20.0),
    ("prompt_logprobs", 0.0, 20.0),
];

/// Fields that have to be there.
const REQUIRED: [(&str, &[&str]); 2] = [("messages", &["messages"]), ("tokens", &["tokens"])];

/// Adds bounds and what is required.
pub(super) fn add(schema: &mut Value, limits: &EngineLimits) {
    let Some(properties) = schema.get_mut("properties").and_then(Value::as_object_mut) else { return };
    for (name, low, high) in BOUNDS {
        if let Some(field) = properties.get_mut(name) {
            field["minimum"] = json!(low);
            field["maximum"] = json!(high);
        }
    }
    if let Some(n) = properties.get_mut("n") {
        n["minimum"] = 1.into();
        n["maximum"] = limits.n_max.into();
    }
    for name in ["max_tokens", "max_completion_tokens", "max_output_tokens"] {
        if let Some(most) = properties.get_mut(name) {
            most["type"] = json!(["integer", "null"]);
            most["minimum"] = 1.into();
        }
    }
    if let Some(encoding) = properties.get_mut("encoding_format") {
        encoding["enum"] = json!(["float", "base64", null]);
    }
    for (name, required) in REQUIRED {
        // `/tokenize` takes a text in place of messages.
        if properties.contains_key(name) && !properties.contains_key("prompt") {
            schema["required"] = json!(required);
            break;
        }
    }
    open_unions(schema);
}

/// A content or an input that the examples show as a list may be a text as well.
fn open_unions(schema: &mut Value) {
    let Some(properties) = schema.get_mut("properties").and_then(Value::as_object_mut) else { return };
    for (name, field) in properties {
        open_unions(field);
        if let Some(items) = field.get_mut("items") {
            open_unions(items);
        }
        let also = match name.as_str() {
            "content" | "input" | "system" | "output" | "tool_choice" => "string",
            "thinking" => "boolean",
            _ => continue,
        };
        if field.get("type").is_none() && (field.get("items").is_some() || field.get("properties").is_some())
        {
            let shown = field.take();
            *field = json!({"anyOf": [shown, {"type": [also, "null"]}]});
        }
    }
}
