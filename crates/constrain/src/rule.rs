//! What an answer may be.

use llguidance::api::GrammarWithLexer;
use serde_json::{Value, json};

use crate::{
    Error,
    gbnf::{is_gbnf, to_lark},
    limits::{GRAMMAR_BYTES_MAX, REGEX_BYTES_MAX, check_schema, check_text},
};

/// A rule for an answer's text.
#[derive(Debug, Clone, PartialEq)]
pub enum AnswerRule {
    /// Any JSON object.
    JsonObject,
    /// JSON that is valid for a schema.
    JsonSchema(Value),
    /// Text that a regular expression matches whole.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A grammar: llguidance's form of Lark, which begins with the rule `start`, or llama.cpp's GBNF (`root`).
    Grammar(String),
}

impl AnswerRule {
    pub(crate) fn grammar(&self, name: &str, bytes_left: &mut usize) -> Result<GrammarWithLexer, Error> {
        let grammar = match self {
            Self::JsonObject => json_grammar(&json!({"type": "object"}), bytes_left)?,
            Self::JsonSchema(schema) => json_grammar(schema, bytes_left)?,
            Self::Regex(expression) => {
                check_text(expression, REGEX_BYTES_MAX)?;
                GrammarWithLexer::from_regex(expression)
            }
            Self::Choice(texts) => {
                if texts.is_empty() || texts.iter().any(String::is_empty) {
                    return Err(Error::Grammar("a choice needs texts that are not empty".into()));
                }
                let quoted: Vec<String> = texts.iter().map(|t| Value::from(t.as_str()).to_string()).collect();
                let lark = format!("start: {}", quoted.join(" | "));
                check_text(&lark, REGEX_BYTES_MAX)?;
                GrammarWithLexer::from_lark(lark)
            }
            Self::Grammar(text) => {
                check_text(text, GRAMMAR_BYTES_MAX)?;
                let lark = if is_gbnf(text) { to_lark(text)? } else { text.clone() };
                // Tokens by their numbers and control tokens are the model's own affair.
                if lark.contains("<[") || lark.contains("<|") || lark.contains("<｜") {
                    return Err(Error::Grammar("tokens cannot be named in it".into()));
                }
                GrammarWithLexer::from_lark(lark)
            }
        };
        Ok(GrammarWithLexer { name: Some(name.into()), ..grammar })
    }
}

/// JSON with a bounded stretch of white space between its parts: a model could write it for ever.
pub(crate) fn json_grammar(schema: &Value, bytes_left: &mut usize) -> Result<GrammarWithLexer, Error> {
    check_schema(schema, bytes_left)?;
    let mut schema = match schema {
        Value::Bool(true) => json!({}),
        Value::Object(_) => schema.clone(),
        _ => return Err(Error::Grammar("a schema is an object".into())),
    };
    schema["x-guidance"] = json!({"whitespace_pattern": r"[\x20\x0A\x09]{1,40}"});
    Ok(GrammarWithLexer::from_json_schema(schema))
}
