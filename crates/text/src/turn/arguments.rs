//! A call's arguments while they are written, always as JSON.

use std::fmt::Write;

use super::format::{CallStyle, Mark};

/// What the text between the marks of a call is.
#[derive(Debug)]
pub(super) enum Arguments {
    /// JSON as it is.
    Json,
    /// JSON whose fence may have begun to close.
    Fenced { held: String },
    /// DSML elements that are turned into the fields of an object.
    Fields { count: usize, field: Field },
}

#[derive(Debug)]
pub(super) enum Field {
    /// Between fields; text that is not white space is no argument.
    None { loose: bool },
    /// The name and the type: `NAME" string="true`.
    Head { raw: String, text: String },
    /// A string's text, or JSON.
    Value { string: bool, blank: bool },
}

/// What came of a piece: JSON of the arguments, and text that belongs to none of them.
#[derive(Debug, Default)]
pub(super) struct Written {
    pub(super) json: String,
    pub(super) content: String,
}

const FENCE_END: &str = "\n```";
const FIELD_HEAD_BYTES_MAX: usize = 512;

impl Arguments {
    pub(super) fn new(style: CallStyle) -> Self {
        match style {
            CallStyle::Plain | CallStyle::Kimi => Self::Json,
            CallStyle::Fenced => Self::Fenced { held: String::new() },
            CallStyle::Dsml => Self::Fields { count: 0, field: Field::None { loose: false } },
        }
    }

    pub(super) fn text(&mut self, text: &str) -> Written {
        let mut written = Written::default();
        match self {
            Self::Json => written.json = text.into(),
            Self::Fenced { held } => {
                held.push_str(text);
                let ends = (1..=FENCE_END.len()).rev().find(|&n| held.ends_with(&FENCE_END[..n]));
                let rest = held.split_off(held.len() - ends.unwrap_or(0));
                written.json = std::mem::replace(held, rest);
            }
            Self::Fields { count, field } => field_text(count, field, text, &mut written),
        }
        written
    }

    /// A mark inside of the arguments; those that end the call do not come here.
    pub(super) fn mark(&mut self, mark: Mark, spelled: &str) -> Written {
        let mut written = Written::default();
        let Self::Fields { field, .. } = self else { return self.text(spelled) };
        match (mark, &mut *field) {
            (Mark::ParameterBegin, Field::None { .. }) => {
                *field = Field::Head { raw: spelled.into(), text: String::new() };
            }
            (Mark::ParameterEnd, Field::Value { .. }) => close(field, &mut written),
            (_, Field::Value { .. }) => return self.text(spelled),
            (_, Field::None { .. }) => written.content = spelled.into(),
            (_, Field::Head { raw, .. }) => {
                written.content = std::mem::take(raw) + spelled;
                *field = Field::None { loose: false };
            }
        }
        written
    }

    /// The call ends here. `whole` when the model ended it itself.
    pub(super) fn end(self, whole: bool) -> Written {
        let mut written = Written::default();
        match self {
            Self::Json => {}
            Self::Fenced { held } if whole && held == FENCE_END => {}
            Self::Fenced { held } => written.json = held,
            Self::Fields { count, mut field } => {
                if let Field::Head { raw, .. } = &mut field {
                    written.content = std::mem::take(raw);
                }
                if whole {
                    close(&mut field, &mut written);
                    written.json += if count == 0 { "{}" } else { "}" };
                }
            }
        }
        written
    }
}

fn field_text(count: &mut usize, field: &mut Field, text: &str, written: &mut Written) {
    match field {
        Field::None { loose } => {
            let text = if *loose { text } else { text.trim_start() };
            *loose |= !text.is_empty();
            written.content += text;
        }
        Field::Head { raw, text: head } => {
            raw.push_str(text);
            head.push_str(text);
            if let Some((before, value)) = head.split_once("\">") {
                let value = value.to_string();
                let Some((name, string)) = before.split_once("\" string=\"").filter(|(_, s)| is_bool(s))
                else {
                    written.content += &std::mem::take(raw);
                    *field = Field::None { loose: true };
                    return;
                };
                let string = string == "true";
                written.json += if *count == 0 { "{" } else { ", " };
                let quote = if string { "\"" } else { "" };
                let _ = write!(written.json, "\"{}\": {quote}", escaped(name));
                *count += 1;
                *field = Field::Value { string, blank: true };
                field_text(count, field, &value, written);
            } else if head.len() > FIELD_HEAD_BYTES_MAX {
                written.content += &std::mem::take(raw);
                *field = Field::None { loose: true };
            }
        }
        Field::Value { string: true, .. } => written.json += &escaped(text),
        Field::Value { string: false, blank } => {
            *blank &= text.trim().is_empty();
            written.json += text;
        }
    }
}

fn is_bool(text: &str) -> bool {
    matches!(text, "true" | "false")
}

fn close(field: &mut Field, written: &mut Written) {
    match field {
        Field::Value { string: true, .. } => written.json.push('"'),
        Field::Value { string: false, blank: true } => written.json += "null",
        _ => {}
    }
    *field = Field::None { loose: false };
}

/// A text as it stands between the quotes of a JSON string.
fn escaped(text: &str) -> String {
    let quoted = serde_json::Value::from(text).to_string();
    quoted[1..quoted.len() - 1].to_string()
}
