//! Text: tokenizer, streaming detokenizer, stop strings, chat templates, turns.
#![forbid(unsafe_code)]

mod detokenizer;
mod error;
mod messages;
mod reasoning;
mod stop;
mod template;
mod tokenizer;
mod turn;
mod vocabulary;
mod written;

pub use detokenizer::Detokenizer;
pub use error::Error;
pub use messages::{guard_messages, guard_value};
pub use reasoning::{Part, ReasoningSplit};
pub use stop::{StopOutcome, StopStrings};
pub use template::{ChatTemplate, SOURCE_BYTES_MAX};
pub use tokenizer::{ControlTokens, Tokenizer};
pub use turn::{CallStyle, Turn, TurnFormat, TurnPart, TurnStart};
pub use vocabulary::Vocabulary;
pub use written::WrittenVocabulary;
