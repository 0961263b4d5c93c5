//! From tokens to text and marks. Text that may still become a mark is held back.

use super::format::{Mark, TurnFormat};

/// A piece of a turn.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Symbol {
    Text(String),
    /// With the text that spells it.
    Mark(Mark, String),
}

#[derive(Debug, Default)]
pub(super) struct Lexer {
    held: String,
}

impl Lexer {
    /// A token with the text that it completes: a mark's own text, or none where special tokens are not shown.
    pub(super) fn token(&mut self, format: &TurnFormat, id: u32, text: &str, out: &mut Vec<Symbol>) {
        let Some((mark, spelled)) = format.token(id) else { return self.text(format, text, out) };
        // What stands before it is what was left of an unfinished character. A stop string may have cut the mark.
        let hidden = text.chars().all(|c| c == char::REPLACEMENT_CHARACTER);
        let Some(before) = text.strip_suffix(spelled).or(hidden.then_some(text)) else {
            return self.text(format, text, out);
        };
        self.text(format, before, out);
        self.finish(out);
        out.push(Symbol::Mark(mark, spelled.into()));
    }

    /// Text that belongs to no token any more.
    pub(super) fn text(&mut self, format: &TurnFormat, text: &str, out: &mut Vec<Symbol>) {
        self.held.push_str(text);
        while let Some((at, mark, spelled)) = first_mark(format, &self.held) {
            let rest = self.held.split_off(at + spelled.len());
            self.held.truncate(at);
            self.finish(out);
            out.push(Symbol::Mark(mark, spelled));
            self.held = rest;
        }
        let rest = self.held.split_off(self.held.len() - unfinished(format, &self.held));
        self.finish(out);
        self.held = rest;
    }

    /// No more comes: what was held is text.
    pub(super) fn finish(&mut self, out: &mut Vec<Symbol>) {
        if !self.held.is_empty() {
            out.push(Symbol::Text(std::mem::take(&mut self.held)));
        }
    }
}

/// The mark that begins first.
fn first_mark(format: &TurnFormat, text: &str) -> Option<(usize, Mark, String)> {
    let found = format.texts().iter().filter_map(|(mark, s)| Some((text.find(s.as_str())?, *mark, s)));
    found.min_by_key(|(at, ..)| *at).map(|(at, mark, s)| (at, mark, s.clone()))
}

/// Bytes at the end of `text` that may be the beginning of a mark.
fn unfinished(format: &TurnFormat, text: &str) -> usize {
    let longest = |(_, mark): &(Mark, String)| {
        let most = (mark.len() - 1).min(text.len());
        (1..=most).rev().find(|&n| mark.is_char_boundary(n) && text.ends_with(&mark[..n])).unwrap_or(0)
    };
    format.texts().iter().map(longest).max().unwrap_or(0)
}
