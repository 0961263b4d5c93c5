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
            Self::JsonObject => json_grammar(&json!({"type": "object"}), INDENTED, bytes_left)?,
            Self::JsonSchema(schema) => json_grammar(schema, INDENTED, bytes_left)?,
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

/// White space between the parts of an answer's JSON: a space, or a new line with its indent. A model could write more
/// of it for ever.
const INDENTED: &str = r"\x20|\x0A\x20{0,16}";
/// Arguments stand in one line.
pub(crate) const ONE_LINE: &str = r"\x20";

/// JSON with little white space between its parts.
pub(crate) fn json_grammar(
    schema: &Value,
    white_space: &str,
    bytes_left: &mut usize,
) -> Result<GrammarWithLexer, Error> {
    check_schema(schema, bytes_left)?;
    let mut schema = match schema {
        Value::Bool(true) => json!({}),
        Value::Object(_) => schema.clone(),
        _ => return Err(Error::Grammar("a schema is an object".into())),
    };
    schema["x-guidance"] = json!({"whitespace_pattern": white_space});
    Ok(GrammarWithLexer::from_json_schema(schema))
}
