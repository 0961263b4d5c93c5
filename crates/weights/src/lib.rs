//! Checkpoints: Hugging Face folders of safetensors and their configuration, and GGUF files.
//!
//! A file is hostile: sizes are checked arithmetic, ranges are proven against the real length before any slice is
//! made, and every error names the file, the tensor or field, what was expected and what was found.
#![deny(unsafe_code)]

mod checkpoint;
mod config;
mod error;
pub mod gguf;
mod json;
mod mmap;
mod safetensors;
mod shards;

pub use checkpoint::{Checkpoint, TensorInfo};
pub use config::{ModelConfig, TopkMethod, Yarn};
pub use error::Error;
pub use gguf::Gguf;
pub use safetensors::{HEADER_BYTES_MAX, SafeTensors, TensorView};
