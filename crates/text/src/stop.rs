//! Stop strings in a stream of text.

/// What one piece of text gave.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StopOutcome {
    /// Text that no stop string can take back any more.
    pub text: String,
    /// Index of the stop string that ended the text.
    pub stopped: Option<usize>,
}

/// Looks for stop strings in text that comes in pieces, and holds back what might become one.
///
/// The stop string that is complete first ends the text; of several that are complete at the same
/// character, the longest does. This does not depend on how the text is cut. An empty stop string never
/// matches.
#[derive(Debug)]
pub struct StopStrings {
    patterns: Vec<Pattern>,
    /// The end of the text that is the start of a stop string.
    held: String,
    stopped: Option<usize>,
}

impl StopStrings {
    /// Looks for `stops`, which are reported by their index.
    pub fn new(stops: Vec<String>) -> Self {
        let patterns = stops.into_iter().map(Pattern::new).collect();
        Self { patterns, held: String::new(), stopped: None }
    }

    /// Takes the next piece; returns the text that may be shown. After a stop it returns no more text.
    pub fn push(&mut self, text: &str) -> StopOutcome {
        if self.stopped.is_some() {
            return StopOutcome { text: String::new(), stopped: self.stopped };
        }
        let seen = self.held.len();
        self.held.push_str(text);
        for (offset, byte) in text.bytes().enumerate() {
            if let Some(index) = self.advance(byte) {
                let end = seen + offset + 1;
                self.held.truncate(end - self.patterns[index].bytes.len());
                self.stopped = Some(index);
                return StopOutcome { text: std::mem::take(&mut self.held), stopped: self.stopped };
            }
        }
        let kept = self.patterns.iter().map(|pattern| pattern.matched).max().unwrap_or(0);
        let shown = self.held.len() - kept;
        let held = self.held.split_off(shown);
        StopOutcome { text: std::mem::replace(&mut self.held, held), stopped: None }
    }

    /// Ends the text: what was held back is text after all.
    pub fn finish(&mut self) -> String {
        self.patterns.iter_mut().for_each(|pattern| pattern.matched = 0);
        std::mem::take(&mut self.held)
    }

    /// The longest stop string that `byte` completes.
    fn advance(&mut self, byte: u8) -> Option<usize> {
        let mut longest: Option<usize> = None;
        for index in 0..self.patterns.len() {
            let complete = self.patterns[index].advance(byte);
            let longer =
                longest.is_none_or(|best| self.patterns[index].bytes.len() > self.patterns[best].bytes.len());
            if complete && longer {
                longest = Some(index);
            }
        }
        longest
    }
}

/// One stop string with its failure function (Knuth, Morris and Pratt 1977), so that no byte is read twice.
#[derive(Debug)]
struct Pattern {
    bytes: Vec<u8>,
    /// `failure[n]`: length of the longest proper suffix of the first n + 1 bytes that is also a prefix.
    failure: Vec<usize>,
    /// How many bytes of the pattern the text ends with.
    matched: usize,
}

impl Pattern {
    fn new(stop: String) -> Self {
        let bytes = stop.into_bytes();
        let mut failure = vec![0; bytes.len()];
        let mut length = 0;
        for index in 1..bytes.len() {
            while length > 0 && bytes[index] != bytes[length] {
                length = failure[length - 1];
            }
            length += usize::from(bytes[index] == bytes[length]);
            failure[index] = length;
        }
        Self { bytes, failure, matched: 0 }
    }

    /// Reads one byte; whether the pattern is complete.
    fn advance(&mut self, byte: u8) -> bool {
        if self.bytes.is_empty() {
            return false;
        }
        while self.matched > 0 && self.bytes[self.matched] != byte {
            self.matched = self.failure[self.matched - 1];
        }
        self.matched += usize::from(self.bytes[self.matched] == byte);
        self.matched == self.bytes.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, Option<usize>) {
        let mut stop = StopStrings::new(stops.iter().map(ToString::to_string).collect());
        let mut text = String::new();
        for piece in pieces {
            let outcome = stop.push(piece);
            text.push_str(&outcome.text);
            if outcome.stopped.is_some() {
                return (text, outcome.stopped);
            }
        }
        text.push_str(&stop.finish());
        (text, None)
    }

    #[test]
    fn a_stop_across_pieces_is_cut_off() {
        assert_eq!(run(&["STOP"], &["go S", "T", "OP now"]), ("go ".into(), Some(0)));
    }

    #[test]
    fn a_false_start_is_shown_again() {
        assert_eq!(run(&["aab"], &["a", "a", "a", "c"]), ("aaac".into(), None));
        assert_eq!(run(&["aab"], &["a", "a", "a", "b"]), ("a".into(), Some(0)));
    }

    #[test]
    fn a_half_stop_at_the_end_is_text() {
        assert_eq!(run(&["\n\n"], &["one", "\n"]), ("one\n".into(), None));
    }

    #[test]
    fn the_first_complete_stop_wins_and_then_the_longest() {
        assert_eq!(run(&["bcd", "abcde"], &["xabcde"]), ("xa".into(), Some(0)));
        assert_eq!(run(&["cd", "bcd", "d"], &["abcd"]), ("a".into(), Some(1)));
    }

    #[test]
    fn nothing_follows_a_stop() {
        let mut stop = StopStrings::new(vec!["x".into()]);
        assert_eq!(stop.push("ax b"), StopOutcome { text: "a".into(), stopped: Some(0) });
        assert_eq!(stop.push("more"), StopOutcome { text: String::new(), stopped: Some(0) });
        assert_eq!(stop.finish(), "");
    }

    #[test]
    fn an_empty_stop_never_matches() {
        assert_eq!(run(&["", "b"], &["ab"]), ("a".into(), Some(1)));
        assert_eq!(run(&[""], &["ab"]), ("ab".into(), None));
    }

    #[test]
    fn a_stop_cuts_between_characters() {
        assert_eq!(run(&["é"], &["caf", "é!"]), ("caf".into(), Some(0)));
        // è and é share their first byte.
        assert_eq!(run(&["é"], &["è"]), ("è".into(), None));
    }
}
