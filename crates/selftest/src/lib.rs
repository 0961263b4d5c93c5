//! Checks a backend and the model against golden answers.
//!
//! `goldens/README.md` says which program made each golden. [`fixture`] compares tiny checkpoints with the
//! logits, router choices, greedy text and MTP logits of Hugging Face transformers; [`demo`] compares the demo
//! model's greedy text; [`agreement`] says how far rounded activations move it. All are run by the tests for every
//! CPU level and by `oxseek selftest`.
#![forbid(unsafe_code)]

pub mod agreement;
pub mod demo;
pub mod fixture;
pub mod golden;
mod rescaled;
mod sequence;

use std::path::PathBuf;

use oxseek_tensor::Backend;
use thiserror::Error;

/// Makes a fresh backend for each model that is checked.
pub type MakeBackend<'a> = dyn FnMut() -> Result<Box<dyn Backend>, oxseek_tensor::Error> + 'a;

/// Why a check could not be made (a wrong answer is not an error but a figure).
#[derive(Debug, Error)]
pub enum Error {
    /// A golden file cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A golden file lacks a tensor or has it in another shape.
    #[error("golden {name}: {why}")]
    Golden {
        /// The tensor.
        name: String,
        /// What is wrong with it.
        why: String,
    },
    /// The checkpoint cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] oxseek_weights::Error),
    /// The backend refused.
    #[error(transparent)]
    Backend(#[from] oxseek_tensor::Error),
    /// The model could not be made.
    #[error(transparent)]
    Load(#[from] oxseek_model::LoadError),
    /// A forward failed.
    #[error(transparent)]
    Forward(#[from] oxseek_model::ModelError),
}
