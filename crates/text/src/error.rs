//! What can go wrong with text.

use thiserror::Error;

/// What can go wrong with text. No message holds a prompt.
#[derive(Debug, Error)]
pub enum Error {
    /// A tokenizer.json that is broken or of an unsupported kind.
    #[error("tokenizer.json: {0}")]
    Tokenizer(String),
    /// A vocabulary of a GGUF file that is broken or of an unsupported kind.
    #[error("tokenizer.ggml: {0}")]
    Vocabulary(String),
    /// Text that the tokenizer gave up on.
    #[error("cannot tokenise the text: {0}")]
    Encode(String),
    /// A chat template that is broken.
    #[error("chat template: {0}")]
    Template(String),
    /// A chat template that refused the conversation through `raise_exception`.
    #[error("the chat template refuses this conversation: {0}")]
    Refused(String),
    /// A chat template that does too much or writes too much.
    #[error("chat template: over its limit of {0}")]
    Limit(&'static str),
}
