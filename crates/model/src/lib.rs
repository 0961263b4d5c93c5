//! The DeepSeek family over the backend door.
//!
//! [`LanguageModel`] is what the engine sees; [`DeepSeek`] is one implementation of it. `deepseek.rs` reads like
//! the paper; every piece beside it is one box of its architecture figure.
#![forbid(unsafe_code)]

pub mod batch;
pub mod deepseek;
pub mod footprint;
pub mod kv;

pub use batch::{Batch, LanguageModel, LogitRows, ModelError, ModelLimits, SequenceRows};
pub use deepseek::{DeepSeek, LoadError, LoadOptions};
pub use footprint::{Footprint, MatrixRole, StoredMatrices, stored_matrices};
