//! What a number, a matrix and a compute backend are.
//!
//! * [`dtype`]: storage formats and their scalar codecs (F32, F16, BF16, FP8 E4M3, UE8M0).
//! * [`blocks`]: the codecs of GGUF's block formats.
//! * [`matrix`]: a weight as it lies in a file, never expanded.
//! * [`backend`]: the one list of ops that a backend implements.
//! * [`reference`]: every op in scalar code; the truth that kernels are tested against.
//! * [`conformance`]: the op tests that any backend runs.
#![forbid(unsafe_code)]

pub mod backend;
pub mod blocks;
pub mod cache;
pub mod conformance;
pub mod dtype;
pub mod error;
pub mod matrix;
pub mod reference;

pub use backend::Backend;
pub use cache::CacheFormat;
pub use dtype::DType;
pub use error::Error;
pub use matrix::{ByteRegion, HostMatrix};
