//! Grammars that an answer must follow: JSON, regular expressions, grammars of the user's, and tool calls in a model's
//! own format, as masks over its tokens. The work is llguidance's; what is here are rules, bounds and formats.
#![forbid(unsafe_code)]

mod calls;
mod compile;
mod error;
mod gbnf;
mod limits;
mod rule;
mod urgency;

pub use calls::CallRules;
pub use compile::{Compiled, Follower, Grammars};
pub use error::Error;
pub use limits::{DEPTH_MAX, GRAMMAR_BYTES_MAX, REGEX_BYTES_MAX, SCHEMA_BYTES_MAX};
pub use rule::AnswerRule;
