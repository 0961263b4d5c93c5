//! Text in and out of a model.
//!
//! A chat becomes a prompt through [`guard_messages`], [`ChatTemplate::render`] and
//! [`Tokenizer::encode_rendered`]; a completion prompt goes through [`Tokenizer::encode`]. Tokens become
//! text again through a [`Detokenizer`], and [`StopStrings`] ends it.

#![forbid(unsafe_code)]

mod detokenizer;
mod error;
mod json;
mod messages;
mod stop;
mod template;
mod time;
mod tokenizer;

pub use detokenizer::Detokenizer;
pub use error::Error;
pub use messages::{guard_messages, guard_value};
pub use stop::{StopOutcome, StopStrings};
pub use template::{ChatTemplate, TEMPLATE_FUEL_MAX, TEMPLATE_OUTPUT_BYTES_MAX, TEMPLATE_SOURCE_BYTES_MAX};
pub use tokenizer::{ControlTokens, TOKEN_IDS_MAX, Tokenizer};
