//! The content guard: what people write in a message can never become a control token.
//!
//! A chat template mixes its own control tokens with the text of messages, so that the rendered prompt no
//! longer tells them apart. Before rendering, every place where content spells an added token is broken with
//! a guard; after rendering, [`Tokenizer::encode_rendered`] finds the tokens that are left, which are the
//! template's, takes the guards out of the text between them and encodes that as plain text.
//!
//! A guard is two noncharacters, U+FDD0 U+FDD1. A U+FDD0 in the content itself is doubled, so that any text
//! comes back as it was.

use std::borrow::Cow;
use std::collections::HashSet;

use aho_corasick::AhoCorasick;
use serde_json::{Map, Value};

use crate::tokenizer::Tokenizer;

/// The noncharacter that begins every guard: no text that follows Unicode's rules contains it.
pub(crate) const GUARD: char = '\u{FDD0}';
const BREAK: char = '\u{FDD1}';

/// An assistant's own history may mark its reasoning: templates look for these and cut at them.
const REASONING: [&str; 2] = ["<think>", "</think>"];

/// Guards every string of `messages` (content, parts, names, tool calls), whatever the role. In messages of
/// the assistant `<think>` and `</think>` stay control tokens.
pub fn guard_messages(messages: &[Value], tokenizer: &Tokenizer) -> Vec<Value> {
    let all = Guard::new(tokenizer, &[]);
    let assistant = Guard::new(tokenizer, &REASONING);
    messages
        .iter()
        .map(|message| {
            let is_assistant = message.get("role").and_then(Value::as_str) == Some("assistant");
            if is_assistant { assistant.value(message) } else { all.value(message) }
        })
        .collect()
}

/// Guards every string of a value that goes into a template next to the messages: tools, or a client's own
/// template variables.
pub fn guard_value(value: &Value, tokenizer: &Tokenizer) -> Value {
    Guard::new(tokenizer, &[]).value(value)
}

/// The text without its guards.
pub(crate) fn unguard(text: &str) -> Cow<'_, str> {
    if !text.contains(GUARD) {
        return Cow::Borrowed(text);
    }
    let mut plain = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(char) = chars.next() {
        if char != GUARD {
            plain.push(char);
        } else if chars.next_if_eq(&GUARD).is_some() {
            plain.push(GUARD);
        } else {
            chars.next_if_eq(&BREAK);
        }
    }
    Cow::Owned(plain)
}

/// Makes the texts of added tokens inert.
struct Guard {
    finder: Option<AhoCorasick>,
    /// What a token begins with, and what it ends with: content that ends or begins so could become a token
    /// together with what the template writes beside it.
    prefixes: HashSet<String>,
    suffixes: HashSet<String>,
    content_bytes_max: usize,
}

impl Guard {
    fn new(tokenizer: &Tokenizer, except: &[&str]) -> Self {
        let contents: Vec<&str> = tokenizer
            .added()
            .contents
            .iter()
            .map(String::as_str)
            .filter(|content| !except.contains(content))
            .collect();
        let cuts = |content: &&'_ str| -> Vec<usize> { content.char_indices().skip(1).map(|(at, _)| at).collect() };
        Self {
            finder: AhoCorasick::new(&contents).ok(),
            prefixes: contents.iter().flat_map(|c| cuts(c).into_iter().map(|at| c[..at].to_string())).collect(),
            suffixes: contents.iter().flat_map(|c| cuts(c).into_iter().map(|at| c[at..].to_string())).collect(),
            content_bytes_max: contents.iter().map(|content| content.len()).max().unwrap_or(0),
        }
    }

    fn value(&self, value: &Value) -> Value {
        match value {
            Value::String(text) => Value::String(self.text(text)),
            Value::Array(items) => Value::Array(items.iter().map(|item| self.value(item)).collect()),
            Value::Object(map) => {
                let entries = map.iter().map(|(key, value)| (self.text(key), self.value(value)));
                Value::Object(entries.collect::<Map<_, _>>())
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => value.clone(),
        }
    }

    fn text(&self, text: &str) -> String {
        let _ = text;
        String::new()
    }
}
