//! Text in messages stays text.
//!
//! A chat template pastes message contents between control tokens. So that a content which spells a control token is
//! not read as one, its added-token texts are broken by a guard character before rendering, and the guard is taken
//! out again after the rendered text was split at the real control tokens.

use serde_json::Value;

use crate::Tokenizer;

/// A noncharacter: never assigned, not in any vocabulary's text.
const GUARD: char = '\u{FDD0}';
/// After a guard: the guard was put there by us.
const BREAK: char = '\u{FDD1}';
/// After a guard: the guard was in the text itself.
const LITERAL: char = '\u{FDD2}';

/// Think tags in an assistant's earlier answer: templates look for them to leave the thinking out.
const ASSISTANT_KEEPS: [&str; 2] = ["<think>", "</think>"];

/// Copies of `messages` whose contents hold no control tokens.
pub fn guard_messages(messages: &[Value], tokenizer: &Tokenizer) -> Vec<Value> {
    messages
        .iter()
        .map(|m| {
            let mut message = m.clone();
            let keep: &[&str] = if m["role"] == "assistant" { &ASSISTANT_KEEPS } else { &[] };
            for (key, value) in message.as_object_mut().into_iter().flatten() {
                if key != "role" {
                    guard_all(value, tokenizer, keep);
                }
            }
            message
        })
        .collect()
}

/// Guards every text in a value, names of fields too.
pub fn guard_value(value: &mut Value, tokenizer: &Tokenizer) {
    guard_all(value, tokenizer, &[]);
}

fn guard_all(value: &mut Value, tokenizer: &Tokenizer, keep: &[&str]) {
    match value {
        Value::String(s) => *s = guard(s, tokenizer, keep),
        Value::Array(list) => list.iter_mut().for_each(|v| guard_all(v, tokenizer, keep)),
        Value::Object(map) => {
            let fields = std::mem::take(map).into_iter();
            map.extend(fields.map(|(name, mut v)| {
                guard_all(&mut v, tokenizer, keep);
                (guard(&name, tokenizer, &[]), v)
            }));
        }
        _ => {}
    }
}

fn guard(text: &str, tokenizer: &Tokenizer, keep: &[&str]) -> String {
    let escaped = text.replace(GUARD, &format!("{GUARD}{LITERAL}"));
    let Some(matcher) = tokenizer.matcher() else { return escaped };
    let mut out = String::with_capacity(escaped.len());
    let mut end = 0;
    for m in matcher.find_iter(&escaped) {
        let token = &escaped[m.range()];
        out.push_str(&escaped[end..m.start()]);
        end = m.end();
        if keep.contains(&token) {
            out.push_str(token);
            continue;
        }
        let first = token.chars().next().map_or(0, char::len_utf8);
        out.push_str(&token[..first]);
        out.extend([GUARD, BREAK]);
        out.push_str(&token[first..]);
    }
    out.push_str(&escaped[end..]);
    out
}

/// Text without the guards that [`guard_messages`] put in.
pub(crate) fn unguard(text: &str) -> String {
    text.replace(&format!("{GUARD}{BREAK}"), "").replace(&format!("{GUARD}{LITERAL}"), &GUARD.to_string())
}
