//! Tokens to text as they come, whole characters only.

use std::sync::Arc;

use crate::Tokenizer;

/// Turns a stream of tokens into text. Bytes of an unfinished character are held back; bytes that can no longer
/// become one turn into U+FFFD.
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    skip_special: bool,
    held: Vec<u8>,
}

impl Detokenizer {
    /// A stream without text yet. `skip_special` leaves out the tokens that the tokenizer marks as special.
    pub fn new(tokenizer: Arc<Tokenizer>, skip_special: bool) -> Self {
        Self { tokenizer, skip_special, held: Vec::new() }
    }

    /// The text that this token completes.
    pub fn push(&mut self, id: u32) -> String {
        if self.skip_special && self.tokenizer.is_special(id) {
            return String::new();
        }
        self.held.extend_from_slice(self.tokenizer.token_bytes(id));
        let mut text = String::new();
        let mut done = 0;
        for chunk in self.held.utf8_chunks() {
            text.push_str(chunk.valid());
            done += chunk.valid().len();
            let rest = chunk.invalid();
            // At the very end an unfinished character may still be completed by the next token.
            if done + rest.len() == self.held.len() && is_unfinished(rest) {
                break;
            }
            if !rest.is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
            }
            done += rest.len();
        }
        self.held.drain(..done);
        text
    }

    /// What is left when no more tokens come.
    pub fn finish(&mut self) -> String {
        let rest = String::from_utf8_lossy(&self.held).into_owned();
        self.held.clear();
        rest
    }
}

/// Whether `bytes` are the beginning of a character.
fn is_unfinished(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|e| e.valid_up_to() == 0 && e.error_len().is_none())
}
