//! From a checkpoint's tensors to a backend's handles.

use oxseek_tensor::{
    Backend, HostMatrix,
    backend::{KvB, KvBParts, MlaShape, Vector, Weight},
};
use oxseek_weights::{Checkpoint, ModelConfig};

use crate::LoadError;

/// A checkpoint and the backend it goes to.
pub(super) struct Loader<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) backend: &'a mut dyn Backend,
}

impl<'a> Loader<'a> {
    pub(super) fn config(&self) -> &'a ModelConfig {
        self.checkpoint.config()
    }

    pub(super) fn backend(&mut self) -> &mut dyn Backend {
        self.backend
    }

    /// The tensor as stored, its shape proven.
    pub(super) fn host_matrix(&self, name: &str, rows: usize, cols: usize) -> Result<HostMatrix, LoadError> {
        Ok(self.checkpoint.matrix(name, rows, cols)?)
    }

    pub(super) fn matrix(&mut self, name: &str, rows: usize, cols: usize) -> Result<Weight, LoadError> {
        Ok(self.backend.load_matrix(self.checkpoint.matrix(name, rows, cols)?)?)
    }

    pub(super) fn kv_b(&mut self, name: &str, shape: &MlaShape) -> Result<KvB, LoadError> {
        let rows = shape.heads * (shape.nope + shape.value);
        let whole = self.checkpoint.matrix(name, rows, shape.latent)?;
        Ok(match self.checkpoint.kv_b_parts(name)? {
            Some([keys, values]) => self.backend.load_kv_b_apart(shape, whole, KvBParts { keys, values })?,
            None => self.backend.load_kv_b(shape, whole)?,
        })
    }

    pub(super) fn vector(&mut self, name: &str, len: usize) -> Result<Vector, LoadError> {
        Ok(self.backend.load_vector(&self.checkpoint.vector(name, len)?)?)
    }
}
