//! Tokens to text, one at a time.

use std::sync::Arc;

use crate::tokenizer::Tokenizer;

/// Turns a stream of tokens into text without ever showing half a character.
///
/// The concatenation of everything that [`push`](Self::push) and [`finish`](Self::finish) return is the
/// lossy UTF-8 decoding of the tokens' bytes, wherever the stream is cut. A U+FFFD that the model did not
/// write appears only for bytes that no later byte can complete.
#[derive(Debug)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    skip_control: bool,
    /// The start of a character whose rest has not come yet: 3 bytes at most between two calls.
    pending: Vec<u8>,
}

impl Detokenizer {
    /// A detokenizer at the start of a text. `skip_control` leaves out the text of control tokens
    /// ([`Tokenizer::is_control`]).
    pub fn new(tokenizer: Arc<Tokenizer>, skip_control: bool) -> Self {
        Self { tokenizer, skip_control, pending: Vec::new() }
    }

    /// The text that `id` completes: whole characters only, often none. An id that the tokenizer does not
    /// know has no text.
    pub fn push(&mut self, id: u32) -> String {
        if self.skip_control && self.tokenizer.is_control(id) {
            return String::new();
        }
        self.pending.extend_from_slice(self.tokenizer.bytes(id));
        self.take_whole_characters()
    }

    /// Ends the text: a character that never got its last bytes becomes U+FFFD.
    pub fn finish(&mut self) -> String {
        let pending = std::mem::take(&mut self.pending);
        String::from_utf8_lossy(&pending).into_owned()
    }

    fn take_whole_characters(&mut self) -> String {
        let mut text = String::new();
        let mut rest: &[u8] = &self.pending;
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    rest = after;
                    // No length: the bytes are the start of a character that may still be completed.
                    let Some(invalid) = error.error_len() else { break };
                    text.push(char::REPLACEMENT_CHARACTER);
                    rest = &rest[invalid..];
                }
            }
        }
        let kept = rest.len();
        self.pending.drain(..self.pending.len() - kept);
        text
    }
}
