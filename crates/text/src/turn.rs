//! A model's turn, token by token: reasoning, content and tool calls, told apart while they stream.
//!
//! One machine for every door and for streams and whole answers alike: a whole answer is the sum of the parts.
//! Marks that are single tokens count as tokens only, so text that spells one is text. What is no well-formed call is
//! handed back as content, with its marks, as vLLM does: no text is lost.

mod arguments;
mod format;
mod header;
mod lexer;

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
};

use arguments::{Arguments, Written};
use format::Mark;
pub use format::{CallStyle, TurnFormat};
use header::{Header, Progress};
use lexer::{Lexer, Symbol};

/// A piece of a turn. Calls are counted from 0 and end before the next begins; content may stand between them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TurnPart {
    /// More of the thinking.
    Reasoning(String),
    /// More of the answer.
    Content(String),
    /// A tool is called.
    CallBegin {
        /// Which call of the turn.
        index: usize,
        /// Its id: the model's own where its format has one.
        id: String,
        /// The tool.
        name: String,
    },
    /// More of a call's arguments, which are JSON when they are whole.
    Arguments {
        /// Which call of the turn.
        index: usize,
        /// The next piece.
        text: String,
    },
    /// A call has ended.
    CallEnd {
        /// Which call of the turn.
        index: usize,
        /// The model ended it; else the turn was cut inside of it.
        whole: bool,
    },
}

/// What a turn begins with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TurnStart {
    /// The prompt ends inside of the model's thinking.
    pub thinking: bool,
    /// Tools were declared: without any, what looks like a call is content.
    pub calls: bool,
    /// The ids of calls follow from it: another number for every turn.
    pub ids: u64,
}

/// A turn that is being written.
#[derive(Debug)]
pub struct Turn {
    format: Arc<TurnFormat>,
    start: TurnStart,
    lexer: Lexer,
    state: State,
    calls: usize,
    reasoning_tokens: usize,
    symbols: Vec<Symbol>,
}

#[derive(Debug)]
enum State {
    /// Nothing yet but white space.
    Start(String),
    Reasoning,
    Content,
    /// Between calls; `loose` after text that is no call.
    Calls {
        loose: bool,
    },
    Header(Header),
    Arguments(Arguments),
    /// Inside of what is no well-formed call.
    Broken,
}

impl Turn {
    /// A turn without a token yet.
    pub fn new(format: Arc<TurnFormat>, start: TurnStart) -> Self {
        let state = if start.thinking { State::Reasoning } else { State::Start(String::new()) };
        Self {
            format,
            start,
            lexer: Lexer::default(),
            state,
            calls: 0,
            reasoning_tokens: 0,
            symbols: Vec::new(),
        }
    }

    /// Adds a token with the text that it completes; appends what is certain to `parts`.
    pub fn push(&mut self, id: u32, text: &str, parts: &mut Vec<TurnPart>) {
        let thought = matches!(self.state, State::Reasoning);
        let format = Arc::clone(&self.format);
        self.lexer.token(&format, id, text, &mut self.symbols);
        self.take_symbols(parts);
        self.reasoning_tokens += usize::from(thought || matches!(self.state, State::Reasoning));
    }

    /// Adds text that belongs to no token: what an unfinished character left at the end.
    pub fn push_text(&mut self, text: &str, parts: &mut Vec<TurnPart>) {
        let format = Arc::clone(&self.format);
        self.lexer.text(&format, text, &mut self.symbols);
        self.take_symbols(parts);
    }

    /// The turn has ended: what was held back comes out.
    pub fn finish(&mut self, parts: &mut Vec<TurnPart>) {
        self.lexer.finish(&mut self.symbols);
        self.take_symbols(parts);
        match std::mem::replace(&mut self.state, State::Content) {
            State::Start(blank) => content(parts, &blank),
            State::Header(header) => content(parts, &header.raw),
            State::Arguments(arguments) => self.end_call(arguments, false, parts),
            _ => {}
        }
    }

    /// Calls that have begun.
    pub fn calls(&self) -> usize {
        self.calls
    }

    /// Tokens of the thinking, its tags included.
    pub fn reasoning_tokens(&self) -> usize {
        self.reasoning_tokens
    }

    fn take_symbols(&mut self, parts: &mut Vec<TurnPart>) {
        for symbol in std::mem::take(&mut self.symbols) {
            match symbol {
                Symbol::Text(text) => self.text(&text, parts),
                Symbol::Mark(mark, spelled) if self.knows(mark) => self.mark(mark, &spelled, parts),
                Symbol::Mark(_, spelled) => self.text(&spelled, parts),
            }
        }
    }

    fn knows(&self, mark: Mark) -> bool {
        self.start.calls || matches!(mark, Mark::ThinkOpen | Mark::ThinkClose)
    }

    fn style(&self) -> CallStyle {
        self.format.calls().unwrap_or(CallStyle::Plain)
    }

    fn text(&mut self, text: &str, parts: &mut Vec<TurnPart>) {
        let style = self.style();
        match &mut self.state {
            State::Start(blank) => {
                blank.push_str(text);
                if !blank.trim_start().is_empty() {
                    content(parts, blank);
                    self.state = State::Content;
                }
            }
            State::Reasoning => reasoning(parts, text),
            State::Content | State::Broken => content(parts, text),
            State::Calls { loose } => {
                let text = if *loose { text } else { text.trim_start() };
                *loose |= !text.is_empty();
                content(parts, text);
            }
            State::Header(header) => {
                let progress = header.text(style, text);
                self.progress(progress, parts);
            }
            State::Arguments(arguments) => {
                let written = arguments.text(text);
                self.written(written, parts);
            }
        }
    }

    fn mark(&mut self, mark: Mark, spelled: &str, parts: &mut Vec<TurnPart>) {
        match (&mut self.state, mark) {
            (State::Start(_), Mark::ThinkOpen) => self.state = State::Reasoning,
            (State::Start(blank), _) => {
                content(parts, blank);
                self.state = State::Content;
                self.mark(mark, spelled, parts);
            }
            // Models forget to close their thinking before they call.
            (State::Reasoning | State::Content | State::Calls { .. }, Mark::CallsBegin) => {
                self.state = State::Calls { loose: false };
            }
            (State::Content | State::Calls { .. } | State::Broken, Mark::CallBegin) => {
                self.state = State::Header(Header::new(spelled.into()));
            }
            (State::Reasoning, Mark::ThinkClose) | (State::Calls { .. } | State::Broken, Mark::CallsEnd) => {
                self.state = State::Content
            }
            (State::Broken, Mark::CallEnd) => {
                content(parts, spelled);
                self.state = State::Calls { loose: false };
            }
            (State::Reasoning, _) => reasoning(parts, spelled),
            (State::Content | State::Broken, _) => content(parts, spelled),
            (State::Calls { loose }, _) => {
                *loose = true;
                content(parts, spelled);
            }
            (State::Header(_), _) => self.header_mark(mark, spelled, parts),
            (State::Arguments(_), _) => self.arguments_mark(mark, spelled, parts),
        }
    }

    fn header_mark(&mut self, mark: Mark, spelled: &str, parts: &mut Vec<TurnPart>) {
        let style = self.style();
        let State::Header(header) = &mut self.state else { return };
        if mark == Mark::Separator {
            let progress = header.separator(style, spelled);
            return self.progress(progress, parts);
        }
        content(parts, &header.raw);
        self.state = State::Broken;
        self.mark(mark, spelled, parts);
    }

    fn progress(&mut self, progress: Progress, parts: &mut Vec<TurnPart>) {
        match progress {
            Progress::More => {}
            Progress::Broken => {
                if let State::Header(header) = std::mem::replace(&mut self.state, State::Broken) {
                    content(parts, &header.raw);
                }
            }
            Progress::Begins { name, id, rest } => {
                let index = self.calls;
                self.calls += 1;
                let id = id.unwrap_or_else(|| self.call_id(index));
                parts.push(TurnPart::CallBegin { index, id, name });
                self.state = State::Arguments(Arguments::new(self.style()));
                if !rest.is_empty() {
                    self.text(&rest, parts);
                }
            }
        }
    }

    fn arguments_mark(&mut self, mark: Mark, spelled: &str, parts: &mut Vec<TurnPart>) {
        if !matches!(mark, Mark::CallEnd | Mark::CallBegin | Mark::CallsEnd) {
            let State::Arguments(arguments) = &mut self.state else { return };
            let written = arguments.mark(mark, spelled);
            return self.written(written, parts);
        }
        let calls = State::Calls { loose: false };
        if let State::Arguments(arguments) = std::mem::replace(&mut self.state, calls) {
            self.end_call(arguments, true, parts);
        }
        if mark != Mark::CallEnd {
            self.mark(mark, spelled, parts);
        }
    }

    fn end_call(&mut self, arguments: Arguments, whole: bool, parts: &mut Vec<TurnPart>) {
        let written = arguments.end(whole);
        self.written(written, parts);
        parts.push(TurnPart::CallEnd { index: self.calls - 1, whole });
    }

    fn written(&self, written: Written, parts: &mut Vec<TurnPart>) {
        content(parts, &written.content);
        if written.json.is_empty() {
            return;
        }
        if let Some(TurnPart::Arguments { text, .. }) = parts.last_mut() {
            text.push_str(&written.json);
        } else {
            parts.push(TurnPart::Arguments { index: self.calls - 1, text: written.json });
        }
    }

    /// 24 hexadecimal digits, as long as OpenAI's.
    fn call_id(&self, index: usize) -> String {
        let digits = |part: u8| {
            let mut hasher = DefaultHasher::new();
            (self.start.ids, index, part).hash(&mut hasher);
            hasher.finish()
        };
        format!("call_{:016x}{:08x}", digits(0), digits(1) as u32)
    }
}

fn reasoning(parts: &mut Vec<TurnPart>, text: &str) {
    if text.is_empty() {
        return;
    }
    match parts.last_mut() {
        Some(TurnPart::Reasoning(last)) => last.push_str(text),
        _ => parts.push(TurnPart::Reasoning(text.into())),
    }
}

fn content(parts: &mut Vec<TurnPart>, text: &str) {
    if text.is_empty() {
        return;
    }
    match parts.last_mut() {
        Some(TurnPart::Content(last)) => last.push_str(text),
        _ => parts.push(TurnPart::Content(text.into())),
    }
}
