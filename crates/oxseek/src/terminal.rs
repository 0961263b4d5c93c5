//! An answer as it streams to the terminal: thinking dimmed, the rest plain.

use std::io::{self, IsTerminal, Write};

const DIM: &str = "\x1b[2m";
const PLAIN: &str = "\x1b[0m";

/// Writes an answer's pieces to standard output.
pub struct AnswerWriter {
    colour: bool,
    thinking: bool,
    /// Text that may still become a think tag.
    held: String,
}

impl AnswerWriter {
    /// `thinking`: whether the answer begins inside the model's thinking.
    pub fn new(thinking: bool) -> Self {
        Self { colour: io::stdout().is_terminal(), thinking, held: String::new() }
    }

    /// Shows a piece of the answer.
    pub fn write(&mut self, text: &str) -> io::Result<()> {
        self.held.push_str(text);
        let mut out = io::stdout().lock();
        loop {
            let tag = if self.thinking { "</think>" } else { "<think>" };
            let Some(at) = self.held.find(tag) else {
                let ready = self.held.len() - partial_tag(&self.held, tag);
                let rest = self.held.split_off(ready);
                self.show(&mut out, &std::mem::replace(&mut self.held, rest))?;
                return out.flush();
            };
            let rest = self.held.split_off(at + tag.len());
            self.held.truncate(at);
            self.show(&mut out, &std::mem::replace(&mut self.held, rest))?;
            if self.thinking {
                writeln!(out, "\n")?;
            }
            self.thinking = !self.thinking;
        }
    }

    /// Ends the answer with a new line.
    pub fn finish(&mut self) -> io::Result<()> {
        let mut out = io::stdout().lock();
        self.show(&mut out, &std::mem::take(&mut self.held))?;
        writeln!(out)?;
        out.flush()
    }

    fn show(&self, out: &mut impl Write, text: &str) -> io::Result<()> {
        match (text.is_empty(), self.thinking && self.colour) {
            (true, _) => Ok(()),
            (false, true) => write!(out, "{DIM}{text}{PLAIN}"),
            (false, false) => write!(out, "{text}"),
        }
    }
}

/// Bytes at the end of `text` that are the beginning of `tag`.
fn partial_tag(text: &str, tag: &str) -> usize {
    (1..tag.len()).rev().find(|&n| text.ends_with(&tag[..n])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_is_held_back_until_it_is_whole() {
        assert_eq!(partial_tag("so </th", "</think>"), 4);
        assert_eq!(partial_tag("so <", "</think>"), 1);
        assert_eq!(partial_tag("so", "</think>"), 0);
        assert_eq!(partial_tag("", "<think>"), 0);
    }
}
