//! The form that a request asks its answer to have.

use oxseek_constrain::{AnswerRule, Error};
use serde_json::{Value, json};

use super::fields::{Fields, wrong};
use crate::{error::ApiError, json};

/// A rule, and the field that it came from.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Format {
    pub(crate) rule: AnswerRule,
    pub(crate) param: &'static str,
}

/// Fields that hold one rule each: vLLM's older names, and llama-server's.
const SINGLE: [(&str, Kind); 6] = [
    ("guided_json", Kind::Json),
    ("guided_regex", Kind::Regex),
    ("guided_choice", Kind::Choice),
    ("guided_grammar", Kind::Grammar),
    ("json_schema", Kind::Json),
    ("grammar", Kind::Grammar),
];

#[derive(Debug, Clone, Copy)]
enum Kind {
    Json,
    Regex,
    Choice,
    Grammar,
}

impl Format {
    /// `response_format` (OpenAI), `structured_outputs` and `guided_*` (vLLM), `grammar` and `json_schema`
    /// (llama-server). At most one of them.
    pub(crate) fn take(fields: &mut Fields) -> Result<Option<Self>, ApiError> {
        let mut found: Option<Self> = response_format(fields)?;
        let structured = structured_outputs(fields)?;
        let single = SINGLE.iter().map(|&(name, kind)| {
            let value = fields.take(name);
            value.map(|v| Ok(Self { rule: kind.rule(name, v)?, param: name })).transpose()
        });
        for format in
            single.chain([Ok(structured)]).collect::<Result<Vec<_>, ApiError>>()?.into_iter().flatten()
        {
            if let Some(first) = &found {
                return Err(ApiError::invalid(format.param, format!("contradicts {}", first.param)));
            }
            found = Some(format);
        }
        Ok(found)
    }
}

impl Kind {
    fn rule(self, name: &str, value: Value) -> Result<AnswerRule, ApiError> {
        match (self, value) {
            (Self::Json, Value::String(text)) => {
                let schema = json::parse(text.as_bytes());
                schema
                    .map(AnswerRule::JsonSchema)
                    .map_err(|e| ApiError::invalid(name, format!("is no JSON: {e}")))
            }
            (Self::Json, schema @ (Value::Object(_) | Value::Bool(_))) => Ok(AnswerRule::JsonSchema(schema)),
            (Self::Regex, Value::String(text)) => Ok(AnswerRule::Regex(text)),
            (Self::Grammar, Value::String(text)) => Ok(AnswerRule::Grammar(text)),
            (Self::Choice, Value::Array(list)) => {
                let text = |v: Value| match v {
                    Value::String(s) => Ok(s),
                    other => Err(wrong(name, "a list of strings", &other)),
                };
                list.into_iter().map(text).collect::<Result<_, _>>().map(AnswerRule::Choice)
            }
            (Self::Json, other) => Err(wrong(name, "a JSON schema", &other)),
            (Self::Choice, other) => Err(wrong(name, "a list of strings", &other)),
            (Self::Regex | Self::Grammar, other) => Err(wrong(name, "a string", &other)),
        }
    }
}

fn response_format(fields: &mut Fields) -> Result<Option<Format>, ApiError> {
    let param = "response_format";
    let Some(value) = fields.take(param) else { return Ok(None) };
    let mut format = Fields::nested(value, param)?;
    let rule = match format.string("type")?.as_deref() {
        Some("text") => None,
        Some("json_object") => Some(match format.take("schema") {
            // llama-server's.
            Some(schema) => Kind::Json.rule("response_format.schema", schema)?,
            None => AnswerRule::JsonObject,
        }),
        Some("json_schema") => {
            let name = "response_format.json_schema";
            let inner = format.take("json_schema").ok_or_else(|| ApiError::invalid(name, "is missing"))?;
            let mut inner = Fields::nested(inner, name)?;
            inner.string("name")?;
            inner.string("description")?;
            // Every schema is kept strictly.
            inner.boolean("strict")?;
            let schema =
                inner.take("schema").ok_or_else(|| ApiError::invalid(inner.name("schema"), "is missing"))?;
            inner.finish()?;
            Some(Kind::Json.rule("response_format.json_schema.schema", schema)?)
        }
        Some(_) => {
            let why = "can be text, json_object or json_schema";
            return Err(ApiError::unsupported("response_format.type", why));
        }
        None => return Err(ApiError::invalid("response_format.type", "is missing")),
    };
    format.finish()?;
    Ok(rule.map(|rule| Format { rule, param }))
}

fn structured_outputs(fields: &mut Fields) -> Result<Option<Format>, ApiError> {
    let param = "structured_outputs";
    let Some(value) = fields.take(param) else { return Ok(None) };
    let mut inner = Fields::nested(value, param)?;
    let mut rules = Vec::new();
    for (name, kind) in
        [("json", Kind::Json), ("regex", Kind::Regex), ("choice", Kind::Choice), ("grammar", Kind::Grammar)]
    {
        if let Some(value) = inner.take(name) {
            rules.push(kind.rule(&inner.name(name), value)?);
        }
    }
    if inner.boolean("json_object")?.unwrap_or(false) {
        rules.push(AnswerRule::JsonObject);
    }
    inner.only("disable_fallback", &[json!(false), json!(true)])?;
    inner.finish()?;
    if rules.len() > 1 {
        return Err(ApiError::invalid(param, "must name one form, not more"));
    }
    Ok(rules.pop().map(|rule| Format { rule, param }))
}

/// A grammar that cannot be used.
pub(crate) fn refused(param: &str, e: &Error) -> ApiError {
    match e {
        Error::Tokenizer(_) => ApiError::unsupported(param, e.to_string()),
        Error::Limit(_) | Error::Grammar(_) => ApiError::invalid(param, e.to_string()),
    }
}
