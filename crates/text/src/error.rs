//! What can go wrong between text and tokens.

use thiserror::Error;

/// An error of a tokenizer, a chat template or their files.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum Error {
    /// A file that does not parse.
    #[error("{file}: {message}")]
    File {
        /// Name of the file.
        file: &'static str,
        /// What the parser said.
        message: String,
    },
    /// A file that asks for something this crate does not do.
    #[error("{file}: {field}: unsupported: {value}")]
    Unsupported {
        /// Name of the file.
        file: &'static str,
        /// Path of the field.
        field: &'static str,
        /// What the field holds.
        value: String,
    },
    /// An added token that cannot be used.
    #[error("tokenizer.json: added token {content:?}: {problem}")]
    AddedToken {
        /// Text of the token.
        content: String,
        /// Why it cannot be used.
        problem: &'static str,
    },
    /// The tokenizer failed on a text.
    #[error("tokenizer: {0}")]
    Encode(String),
    /// The chat template failed, or refused the conversation through `raise_exception`.
    #[error("chat template: {message}")]
    Template {
        /// The template's own words if it refused; otherwise what went wrong.
        message: String,
        /// Line of the template, from 1, where known.
        line: Option<usize>,
        /// Whether the template itself refused the conversation: the client's mistake, not the model's.
        raised: bool,
    },
    /// The chat template is over one of its limits.
    #[error("chat template: {what} is over the limit of {limit}")]
    TemplateLimit {
        /// What was bounded, with its unit.
        what: &'static str,
        /// The bound.
        limit: u64,
    },
}

/// [`Error::File`] in one line.
pub(crate) fn file_error(file: &'static str, source: &dyn std::fmt::Display) -> Error {
    Error::File { file, message: source.to_string() }
}
