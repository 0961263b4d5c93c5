//! The DeepSeek family over the backend door.
//!
//! [`LanguageModel`] is what the engine sees; the rest of the crate is one implementation of it.
#![forbid(unsafe_code)]

pub mod batch;

pub use batch::{Batch, LanguageModel, LogitRows, ModelError, ModelLimits, SequenceRows};
