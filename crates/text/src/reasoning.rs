//! Thinking and answer, told apart while the text streams.

/// What a piece of text belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The model's thinking.
    Reasoning,
    /// The answer itself.
    Content,
}

/// Splits text at the think tags, which are in neither part. Only a leading `<think>` opens thinking: an answer may
/// speak about the tag.
#[derive(Debug, Clone)]
pub struct ReasoningSplit {
    state: State,
    held: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Start,
    Reasoning,
    Content,
}

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";

impl ReasoningSplit {
    /// `thinking`: the prompt ended with an open think tag.
    pub fn new(thinking: bool) -> Self {
        Self { state: if thinking { State::Reasoning } else { State::Start }, held: String::new() }
    }

    /// Adds a piece of text; answers what is certain, in order, without empty pieces.
    pub fn push(&mut self, piece: &str) -> Vec<(Part, String)> {
        self.held.push_str(piece);
        let mut parts = Vec::new();
        if self.state == State::Start {
            let text = self.held.trim_start();
            if let Some(rest) = text.strip_prefix(OPEN) {
                self.held = rest.to_string();
                self.state = State::Reasoning;
            } else if !OPEN.starts_with(text) {
                self.state = State::Content;
            }
        }
        if self.state == State::Reasoning {
            if let Some(at) = self.held.find(CLOSE) {
                let rest = self.held.split_off(at + CLOSE.len());
                self.held.truncate(at);
                parts.push((Part::Reasoning, std::mem::replace(&mut self.held, rest)));
                self.state = State::Content;
            } else {
                let partial = (1..CLOSE.len()).rev().find(|&n| self.held.ends_with(&CLOSE[..n])).unwrap_or(0);
                let rest = self.held.split_off(self.held.len() - partial);
                parts.push((Part::Reasoning, std::mem::replace(&mut self.held, rest)));
            }
        }
        if self.state == State::Content {
            parts.push((Part::Content, std::mem::take(&mut self.held)));
        }
        parts.retain(|(_, text)| !text.is_empty());
        parts
    }

    /// What was held back when no more text comes.
    pub fn finish(&mut self) -> Option<(Part, String)> {
        let part = if self.state == State::Reasoning { Part::Reasoning } else { Part::Content };
        let rest = std::mem::take(&mut self.held);
        (!rest.is_empty()).then_some((part, rest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(thinking: bool, text: &str, piece: usize) -> (String, String) {
        let mut split = ReasoningSplit::new(thinking);
        let chars: Vec<char> = text.chars().collect();
        let mut parts = Vec::new();
        for c in chars.chunks(piece) {
            parts.extend(split.push(&c.iter().collect::<String>()));
        }
        parts.extend(split.finish());
        let of = |part| parts.iter().filter(|p| p.0 == part).map(|p| p.1.as_str()).collect();
        (of(Part::Reasoning), of(Part::Content))
    }

    #[test]
    fn text_is_split_the_same_however_it_comes() {
        let cases = [
            (true, "a plan</think>an answer", "a plan", "an answer"),
            (true, "cut whi", "cut whi", ""),
            (true, "a < b </thin", "a < b </thin", ""),
            (false, "an answer", "", "an answer"),
            (false, " <think>plan</think>\nanswer", "plan", "\nanswer"),
            (false, "write <think> and </think>", "", "write <think> and </think>"),
            (false, "  <thin", "", "  <thin"),
            (false, "  é", "", "  é"),
        ];
        for (thinking, text, reasoning, content) in cases {
            for piece in 1..=text.len() {
                assert_eq!(
                    split(thinking, text, piece),
                    (reasoning.into(), content.into()),
                    "{text:?} by {piece}"
                );
            }
        }
    }
}
