//! How a model writes its turns: think tags and tool calls, known by its chat template and its tokens.

use std::collections::HashMap;

use crate::Tokenizer;

/// What stands between the parts of a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mark {
    ThinkOpen,
    ThinkClose,
    /// Around all calls.
    CallsBegin,
    CallsEnd,
    CallBegin,
    CallEnd,
    /// Between a call's name and its arguments.
    Separator,
    /// Around one argument, in DSML.
    ParameterBegin,
    ParameterEnd,
}

/// How tool calls are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallStyle {
    /// DeepSeek-V3, R1: `<call begin>function<sep>NAME`, then the arguments in a fence of the kind `json`.
    Fenced,
    /// DeepSeek-V3.1: `<call begin>NAME<sep>ARGUMENTS<call end>`.
    Plain,
    /// DeepSeek-V3.2: elements with a name, one per argument.
    Dsml,
    /// Kimi-K2: `<call begin>functions.NAME:INDEX<argument begin>ARGUMENTS<call end>`; the header is the call's id.
    Kimi,
}

pub(crate) const DEEPSEEK_MARKS: [(Mark, &str); 5] = [
    (Mark::CallsBegin, "<｜tool▁calls▁begin｜>"),
    (Mark::CallsEnd, "<｜tool▁calls▁end｜>"),
    (Mark::CallBegin, "<｜tool▁call▁begin｜>"),
    (Mark::CallEnd, "<｜tool▁call▁end｜>"),
    (Mark::Separator, "<｜tool▁sep｜>"),
];
pub(crate) const KIMI_MARKS: [(Mark, &str); 5] = [
    (Mark::CallsBegin, "<|tool_calls_section_begin|>"),
    (Mark::CallsEnd, "<|tool_calls_section_end|>"),
    (Mark::CallBegin, "<|tool_call_begin|>"),
    (Mark::CallEnd, "<|tool_call_end|>"),
    (Mark::Separator, "<|tool_call_argument_begin|>"),
];
/// These are text. The empty line before a section belongs to it.
pub(crate) const DSML_MARKS: [(Mark, &str); 7] = [
    (Mark::CallsBegin, "\n\n<｜DSML｜function_calls>"),
    (Mark::CallsBegin, "<｜DSML｜function_calls>"),
    (Mark::CallsEnd, "</｜DSML｜function_calls>"),
    (Mark::CallBegin, "<｜DSML｜invoke name=\""),
    (Mark::CallEnd, "</｜DSML｜invoke>"),
    (Mark::ParameterBegin, "<｜DSML｜parameter name=\""),
    (Mark::ParameterEnd, "</｜DSML｜parameter>"),
];
const THINK_MARKS: [(Mark, &str); 2] = [(Mark::ThinkOpen, "<think>"), (Mark::ThinkClose, "</think>")];

/// A model's way to write a turn.
#[derive(Debug, Clone)]
pub struct TurnFormat {
    calls: Option<CallStyle>,
    think_close: Option<u32>,
    think_open: Option<u32>,
    calls_begin: Option<u32>,
    /// Marks that are one token each: text that spells them is text.
    tokens: HashMap<u32, (Mark, String)>,
    /// Marks that are written in text.
    texts: Vec<(Mark, String)>,
}

impl TurnFormat {
    /// The format that the template's source and the tokenizer speak of. `template` is None for a model without one.
    pub fn detect(template: Option<&str>, tokenizer: &Tokenizer) -> Self {
        let calls = template.and_then(|t| call_style(t, tokenizer));
        let mut format = Self {
            calls,
            think_open: tokenizer.token_id("<think>"),
            think_close: tokenizer.token_id("</think>"),
            calls_begin: None,
            tokens: HashMap::new(),
            texts: Vec::new(),
        };
        let marks: &[(Mark, &str)] = match calls {
            None => &[],
            Some(CallStyle::Fenced | CallStyle::Plain) => &DEEPSEEK_MARKS,
            Some(CallStyle::Kimi) => &KIMI_MARKS,
            Some(CallStyle::Dsml) => &DSML_MARKS,
        };
        for &(mark, text) in THINK_MARKS.iter().chain(marks) {
            match tokenizer.token_id(text) {
                Some(id) => {
                    format.tokens.insert(id, (mark, text.into()));
                    if mark == Mark::CallsBegin {
                        format.calls_begin = Some(id);
                    }
                }
                None => format.texts.push((mark, text.into())),
            }
        }
        if calls == Some(CallStyle::Dsml) {
            format.calls_begin = tokenizer.token_id("｜DSML｜");
        }
        format
    }

    /// How tool calls are written; None when the model has no way that is known here.
    pub fn calls(&self) -> Option<CallStyle> {
        self.calls
    }

    /// The token that opens thinking, where it is one token.
    pub fn think_open_id(&self) -> Option<u32> {
        self.think_open
    }

    /// The token that closes thinking, where it is one token.
    pub fn think_close_id(&self) -> Option<u32> {
        self.think_close
    }

    /// A token without which no call can be written: who may not call tools may not write it.
    pub fn calls_begin_id(&self) -> Option<u32> {
        self.calls_begin
    }

    pub(crate) fn token(&self, id: u32) -> Option<(Mark, &str)> {
        self.tokens.get(&id).map(|(mark, text)| (*mark, text.as_str()))
    }

    pub(crate) fn texts(&self) -> &[(Mark, String)] {
        &self.texts
    }
}

fn call_style(template: &str, tokenizer: &Tokenizer) -> Option<CallStyle> {
    let has_all = |marks: &[(Mark, &str)]| marks.iter().all(|(_, text)| tokenizer.token_id(text).is_some());
    if template.contains("｜DSML｜") {
        Some(CallStyle::Dsml)
    } else if template.contains("<｜tool▁call▁begin｜>") && has_all(&DEEPSEEK_MARKS) {
        Some(if template.contains("```json") { CallStyle::Fenced } else { CallStyle::Plain })
    } else if template.contains("<|tool_call_begin|>") && has_all(&KIMI_MARKS) {
        Some(CallStyle::Kimi)
    } else {
        None
    }
}
