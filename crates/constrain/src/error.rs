//! What can be wrong with a grammar.

use thiserror::Error;

/// A grammar that cannot be followed. The messages are fit for a client; they may quote its own grammar.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Error {
    /// It is too large, too deep or too much work.
    #[error("the grammar is too large: {0}")]
    Limit(String),
    /// It is broken, or asks for what cannot be done.
    #[error("the grammar cannot be used: {0}")]
    Grammar(String),
    /// The tokenizer does not fit.
    #[error("constrained output is not possible with this tokenizer: {0}")]
    Tokenizer(String),
}

impl Error {
    /// llguidance's messages, which may be long.
    pub(crate) fn grammar(message: &impl ToString) -> Self {
        let message = message.to_string();
        // llguidance's name of a grammar after whose first step nothing may follow.
        if message.starts_with("NoExtension") {
            return Self::Grammar("no text is valid for it".into());
        }
        Self::Grammar(message.lines().next().unwrap_or_default().chars().take(300).collect())
    }
}
