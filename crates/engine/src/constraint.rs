//! Constrained decoding: what an answer may say next, token by token.

/// Starts the constraint of each answer of a request. It is shared, since a request has `n` answers and may be cloned.
pub trait Grammar: Send + Sync {
    /// A constraint before the first token of an answer. It is called on the engine thread, so what costs time
    /// (parsing a schema, building a lexer) belongs before the request is submitted.
    ///
    /// # Errors
    /// A message fit for a client; the request then fails alone.
    fn start(&self) -> Result<Box<dyn Constraint>, String>;
}

/// Follows one answer and says which tokens may come next.
///
/// For every token of the answer there is one call of [`Constraint::allowed`], then, when the token does not end the
/// answer, one of [`Constraint::commit`]. Calls of `allowed` run beside the model's forward, on a thread of their own,
/// so a mask that takes milliseconds costs the others of the step only what it takes longer than the forward. A panic
/// in either, or an error, fails the request alone.
pub trait Constraint: Send {
    /// What may come next. `mask` comes with no token allowed, and is looked at only for [`Allowed::Masked`].
    ///
    /// # Errors
    /// A message fit for a client.
    fn allowed(&mut self, mask: &mut TokenMask) -> Result<Allowed, String>;

    /// The token was chosen and belongs to the answer.
    ///
    /// # Errors
    /// A message fit for a client.
    fn commit(&mut self, token: u32) -> Result<(), String>;
}

/// What a constraint allows at a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allowed {
    /// Every token; the mask costs nothing then.
    Any,
    /// The tokens of the mask. Where the answer may end, the mask holds the model's end tokens too.
    Masked,
    /// The answer is complete: nothing but a token that ends it (the model's own or one of the request's), whatever
    /// `min_tokens` and `ignore_eos` say.
    End,
}

/// A set of token ids, one bit each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenMask {
    words: Vec<u32>,
    vocab: usize,
}

impl TokenMask {
    /// No token of a vocabulary of `vocab`.
    pub fn new(vocab: usize) -> Self {
        Self { words: vec![0; vocab.div_ceil(32)], vocab }
    }

    /// Adds a token; ids outside of the vocabulary are left out.
    pub fn allow(&mut self, id: u32) {
        if (id as usize) < self.vocab {
            self.words[id as usize / 32] |= 1 << (id % 32);
        }
    }

    /// Whether a token is in the set.
    pub fn allows(&self, id: u32) -> bool {
        self.words.get(id as usize / 32).is_some_and(|w| w >> (id % 32) & 1 == 1)
    }

    /// Takes every token out.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// The bits: token `i` is bit `i % 32`, counted from the lowest, of word `i / 32`. Bits behind the vocabulary are
    /// not looked at.
    pub fn words_mut(&mut self) -> &mut [u32] {
        &mut self.words
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_holds_what_was_allowed() {
        let mut mask = TokenMask::new(70);
        [0, 31, 32, 69, 70, 1000].into_iter().for_each(|id| mask.allow(id));
        let held: Vec<u32> = (0..200).filter(|&id| mask.allows(id)).collect();
        assert_eq!(held, [0, 31, 32, 69]);
        assert_eq!(mask.words_mut().len(), 3);
        mask.clear();
        assert!(!(0..200).any(|id| mask.allows(id)));
    }
}
