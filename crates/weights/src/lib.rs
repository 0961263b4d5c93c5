//! Checkpoints: Hugging Face folders of safetensors and their configuration.
//!
//! A file is hostile: sizes are checked arithmetic, ranges are proven against the real length before any slice is
//! made, and every error names the file, the tensor or field, what was expected and what was found.
#![deny(unsafe_code)]

mod checkpoint;
mod config;
mod error;
mod json;
mod mmap;
mod safetensors;

pub use checkpoint::{Checkpoint, TensorInfo};
pub use config::{ModelConfig, TopkMethod, Yarn};
pub use error::Error;
pub use safetensors::{HEADER_BYTES_MAX, SafeTensors, TensorView};
