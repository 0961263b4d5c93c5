//! Stop strings in streamed text.

/// Finds stop strings in text that comes in pieces. Text that may still become one is held back.
#[derive(Debug, Clone)]
pub struct StopStrings {
    stops: Vec<String>,
    held: String,
    stopped: bool,
}

/// What a piece of text led to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StopOutcome {
    /// Text that is certain not to be part of a stop string.
    pub text: String,
    /// The stop string that was found, by its index; nothing follows it.
    pub stopped: Option<usize>,
}

impl StopStrings {
    /// Looks for `stops`; empty ones are left out.
    pub fn new(mut stops: Vec<String>) -> Self {
        // An empty string would stop everything before it began; the wire refuses it with a message of its own.
        stops.retain(|s| !s.is_empty());
        Self { stops, held: String::new(), stopped: false }
    }

    /// Adds a piece of text.
    pub fn push(&mut self, piece: &str) -> StopOutcome {
        if self.stopped {
            return StopOutcome { text: String::new(), stopped: None };
        }
        self.held.push_str(piece);
        // The one that is complete first wins, whatever pieces the text came in; of those that end together the one
        // that began first.
        let found = self.stops.iter().enumerate().filter_map(|(i, s)| Some((self.held.find(s.as_str())?, i)));
        if let Some((at, i)) = found.min_by_key(|&(at, i)| (at + self.stops[i].len(), at)) {
            self.stopped = true;
            self.held.truncate(at);
            return StopOutcome { text: std::mem::take(&mut self.held), stopped: Some(i) };
        }
        let safe = self.held.len() - self.unfinished(&self.held);
        let rest = self.held.split_off(safe);
        StopOutcome { text: std::mem::replace(&mut self.held, rest), stopped: None }
    }

    /// What is left when no more text comes.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Bytes at the end of `text` that are the beginning of a stop string.
    fn unfinished(&self, text: &str) -> usize {
        let longest = |stop: &String| {
            let most = (stop.len() - 1).min(text.len());
            (1..=most).rev().find(|&n| stop.is_char_boundary(n) && text.ends_with(&stop[..n])).unwrap_or(0)
        };
        self.stops.iter().map(longest).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, Option<usize>) {
        let mut s = StopStrings::new(stops.iter().map(ToString::to_string).collect());
        let mut text = String::new();
        for p in pieces {
            let outcome = s.push(p);
            text += &outcome.text;
            if outcome.stopped.is_some() {
                return (text, outcome.stopped);
            }
        }
        (text + &s.finish(), None)
    }

    #[test]
    fn a_stop_string_over_pieces_is_found_and_not_shown() {
        assert_eq!(run(&["\n\nUser:"], &["Hi\n", "\nUs", "er: no"]), ("Hi".into(), Some(0)));
        assert_eq!(run(&["abc"], &["ab", "x", "ab"]), ("abxab".into(), None));
        assert_eq!(run(&["aab"], &["a", "a", "a", "b"]), ("a".into(), Some(0)));
    }

    #[test]
    fn the_first_to_end_wins_and_then_the_first_to_begin() {
        assert_eq!(run(&["b", "ab"], &["xab"]), ("x".into(), Some(1)));
        assert_eq!(run(&["abc", "ab"], &["xabc"]), ("x".into(), Some(1)));
        assert_eq!(run(&["", "é"], &["caf", "é"]), ("caf".into(), Some(0)));
    }
}
