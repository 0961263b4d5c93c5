//! What can be wrong with a checkpoint.

use std::path::PathBuf;

use thiserror::Error;

/// What is wrong with a checkpoint. Each names the file, and the tensor or field where there is one.
#[derive(Debug, Error)]
pub enum Error {
    /// The system would not let us read a file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A folder that is no checkpoint we can read.
    #[error("{}: {why}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What is missing or unsupported, and what to do.
        why: String,
    },
    /// A safetensors file whose header does not hold.
    #[error("{file}: {why}")]
    File {
        /// The file.
        file: String,
        /// What was expected and what was found.
        why: String,
    },
    /// A tensor that is missing or not what was expected.
    #[error("{file}: tensor {tensor}: {why}")]
    Tensor {
        /// The file it is in, or should be in.
        file: String,
        /// The tensor.
        tensor: String,
        /// What was expected and what was found.
        why: String,
    },
    /// A configuration field that is missing, out of range or unsupported.
    #[error("{file}: {field}: {why}")]
    Config {
        /// The file.
        file: &'static str,
        /// The field.
        field: String,
        /// What was expected and what was found.
        why: String,
    },
}
