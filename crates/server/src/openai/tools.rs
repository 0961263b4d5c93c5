//! Tools that a request declares, and whether the model must call one.

use serde_json::{Value, json};

use super::fields::{Fields, wrong};
use crate::error::ApiError;

/// Most tools of a request, OpenAI's bound.
pub(crate) const TOOLS_MAX: usize = 128;
/// Longest name of a tool, OpenAI's bound.
const NAME_BYTES_MAX: usize = 64;

/// A function that the model may call.
#[derive(Debug, Clone)]
pub(crate) struct Tool {
    pub(crate) name: String,
    /// Its arguments are held to its schema.
    pub(crate) strict: bool,
    /// JSON Schema of its arguments; an object's.
    pub(crate) parameters: Value,
}

/// `tool_choice`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) enum Choice {
    /// The model decides.
    #[default]
    Auto,
    /// No calls.
    None,
    /// At least one call.
    Required,
    /// One call, of the tool with this index.
    Named(usize),
}

/// Everything that a request says about tools.
#[derive(Debug, Clone)]
pub(crate) struct Tools {
    pub(crate) list: Vec<Tool>,
    /// As templates read them.
    pub(crate) declared: Vec<Value>,
    pub(crate) choice: Choice,
    /// More than one call in a turn.
    pub(crate) parallel: bool,
}

impl Tools {
    /// `tools`, `tool_choice` and `parallel_tool_calls`.
    pub(crate) fn take(fields: &mut Fields) -> Result<Self, ApiError> {
        let (mut list, mut declared): (Vec<Tool>, Vec<Value>) = (Vec::new(), Vec::new());
        let values = fields.list("tools")?.unwrap_or_default();
        if values.len() > TOOLS_MAX {
            return Err(ApiError::invalid(
                "tools",
                format!("has {} tools, at most {TOOLS_MAX}", values.len()),
            ));
        }
        for (i, value) in values.into_iter().enumerate() {
            let (tool, declaration) = tool(value, &format!("tools[{i}]"))?;
            if list.iter().any(|t| t.name == tool.name) {
                return Err(ApiError::invalid(format!("tools[{i}].function.name"), "is there twice"));
            }
            list.push(tool);
            declared.push(declaration);
        }
        let choice = choice(fields.take("tool_choice"), &list)?;
        let parallel = fields.boolean("parallel_tool_calls")?.unwrap_or(true);
        Ok(Self { list, declared, choice, parallel })
    }

    /// Whether the turn may hold calls.
    pub(crate) fn callable(&self) -> bool {
        !self.list.is_empty() && self.choice != Choice::None
    }
}

fn tool(value: Value, path: &str) -> Result<(Tool, Value), ApiError> {
    let mut fields = Fields::nested(value, path)?;
    match fields.string("type")?.as_deref() {
        Some("function") => {}
        Some(_) => {
            return Err(ApiError::unsupported(fields.name("type"), "only function tools are supported"));
        }
        None => return Err(ApiError::invalid(fields.name("type"), "is missing")),
    }
    let name = fields.name("function");
    let function = fields.take("function").ok_or_else(|| ApiError::invalid(&name, "is missing"))?;
    fields.finish()?;
    let mut fields = Fields::nested(function, &name)?;
    let name = fields.string("name")?.ok_or_else(|| ApiError::invalid(fields.name("name"), "is missing"))?;
    let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.chars().all(known) {
        let why = format!("must be 1 to {NAME_BYTES_MAX} of the characters a-z A-Z 0-9 _ - .");
        return Err(ApiError::invalid(fields.name("name"), why));
    }
    let description = fields.string("description")?.unwrap_or_default();
    let strict = fields.boolean("strict")?.unwrap_or(false);
    let parameters = match fields.take("parameters") {
        None => json!({"type": "object", "properties": {}}),
        Some(schema @ Value::Object(_)) => schema,
        Some(other) => return Err(wrong(&fields.name("parameters"), "a JSON schema", &other)),
    };
    fields.finish()?;
    let function = json!({"name": name, "description": description, "parameters": parameters});
    Ok((Tool { name, strict, parameters }, json!({"type": "function", "function": function})))
}

fn choice(value: Option<Value>, tools: &[Tool]) -> Result<Choice, ApiError> {
    let choice = match value {
        None => return Ok(Choice::Auto),
        Some(Value::String(word)) => match word.as_str() {
            "auto" => return Ok(Choice::Auto),
            "none" => return Ok(Choice::None),
            "required" | "any" => Choice::Required,
            _ => {
                let why =
                    "must be none, auto, required or {\"type\": \"function\", \"function\": {\"name\": ...}}";
                return Err(ApiError::invalid("tool_choice", why));
            }
        },
        Some(object) => {
            let mut fields = Fields::nested(object, "tool_choice")?;
            fields.only("type", &[json!("function")])?;
            let function = fields.take("function").unwrap_or(Value::Null);
            fields.finish()?;
            let mut fields = Fields::nested(function, "tool_choice.function")?;
            let name = fields.string("name")?;
            fields.finish()?;
            let at = tools.iter().position(|t| Some(&t.name) == name.as_ref());
            let none = || ApiError::invalid("tool_choice.function.name", "is none of the request's tools");
            Choice::Named(at.ok_or_else(none)?)
        }
    };
    if tools.is_empty() {
        return Err(ApiError::invalid("tool_choice", "asks for a call, but there are no tools"));
    }
    Ok(choice)
}
