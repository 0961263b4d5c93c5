//! An answer as it streams to the terminal: thinking dimmed, the rest plain.

use std::io::{self, IsTerminal, Write};

use oxseek_text::{Part, ReasoningSplit};

const DIM: &str = "\x1b[2m";
const PLAIN: &str = "\x1b[0m";

/// Writes an answer's pieces.
pub struct AnswerWriter<W> {
    out: W,
    colour: bool,
    split: ReasoningSplit,
    last: Option<Part>,
}

impl AnswerWriter<io::Stdout> {
    /// To standard output; colours only on a terminal. `thinking`: the answer begins inside the model's thinking.
    pub fn stdout(thinking: bool) -> Self {
        let out = io::stdout();
        let colour = out.is_terminal();
        Self::new(out, colour, thinking)
    }
}

impl<W: Write> AnswerWriter<W> {
    fn new(out: W, colour: bool, thinking: bool) -> Self {
        Self { out, colour, split: ReasoningSplit::new(thinking), last: None }
    }

    /// Shows a piece of the answer.
    pub fn write(&mut self, text: &str) -> io::Result<()> {
        for (part, text) in self.split.push(text) {
            self.show(part, &text)?;
        }
        self.out.flush()
    }

    /// Ends the answer with a new line.
    pub fn finish(&mut self) -> io::Result<()> {
        if let Some((part, text)) = self.split.finish() {
            self.show(part, &text)?;
        }
        writeln!(self.out)?;
        self.out.flush()
    }

    fn show(&mut self, part: Part, text: &str) -> io::Result<()> {
        if self.last == Some(Part::Reasoning) && part == Part::Content {
            write!(self.out, "\n\n")?;
        }
        self.last = Some(part);
        if part == Part::Reasoning && self.colour {
            write!(self.out, "{DIM}{text}{PLAIN}")
        } else {
            write!(self.out, "{text}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thinking_is_dimmed_on_a_terminal_and_apart_from_the_answer() {
        for (colour, expected) in [(true, "\x1b[2mplan\x1b[0m\n\nanswer\n"), (false, "plan\n\nanswer\n")] {
            let mut out = Vec::new();
            let mut writer = AnswerWriter::new(&mut out, colour, true);
            for piece in ["plan", "</thi", "nk>ans", "wer"] {
                writer.write(piece).expect("a vector takes everything");
            }
            writer.finish().expect("a vector takes everything");
            assert_eq!(String::from_utf8(out).as_deref(), Ok(expected));
        }
    }
}
