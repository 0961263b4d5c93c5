//! What a checkpoint weighs and what a token costs to read.

use std::collections::BTreeMap;

use oxseek_tensor::{CacheFormat, DType};
use oxseek_weights::{Checkpoint, TensorInfo};

use crate::kv;

/// Sizes of a checkpoint, from its headers alone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Footprint {
    /// Parameters of the main model (FP8 block scales are not parameters).
    pub parameters: u64,
    /// Parameters of the MTP modules.
    pub mtp_parameters: u64,
    /// Parameters that one token uses, embedding row and head included.
    pub active_parameters: u64,
    /// Bytes per storage format, MTP modules and scales included.
    pub bytes_by_format: BTreeMap<String, u64>,
    /// Weight bytes that decoding one token reads.
    pub bytes_per_token: u64,
    /// Latent cache bytes per token, over all layers.
    pub cache_bytes_per_token: u64,
    /// Bytes of memory for weights that are made at load, because they cannot be used as they lie in the files.
    pub made_bytes: u64,
}

impl Footprint {
    /// Reads the sizes off a checkpoint's headers, for a cache in `format`.
    pub fn of(checkpoint: &Checkpoint, format: CacheFormat) -> Self {
        let mut all = Self {
            cache_bytes_per_token: kv::bytes_per_token(checkpoint.config(), format),
            made_bytes: checkpoint.made_bytes(),
            ..Self::default()
        };
        for t in checkpoint.tensors() {
            all.add(checkpoint, &t);
        }
        all
    }

    fn add(&mut self, checkpoint: &Checkpoint, t: &TensorInfo) {
        let c = checkpoint.config();
        *self.bytes_by_format.entry(t.dtype.to_string()).or_default() += t.bytes as u64;
        let parameters = t.parameters;
        if layer_of(&t.model_name).is_some_and(|l| l >= c.num_hidden_layers) {
            self.mtp_parameters += parameters;
            return;
        }
        self.parameters += parameters;
        // Of the routed experts a token reads its top-k, of the embedding its row.
        let (part, of) = if t.model_name.contains(".mlp.experts.") {
            (c.num_experts_per_tok as u64, c.n_routed_experts.max(1) as u64)
        } else if t.model_name == EMBEDDING && !c.tie_word_embeddings {
            (1, c.vocab_size as u64)
        } else {
            (1, 1)
        };
        self.active_parameters += parameters * part / of;
        self.bytes_per_token += t.bytes as u64 * part / of;
    }
}

/// What a weight matrix is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MatrixRole {
    /// Every token meets it.
    Dense,
    /// Matrices of routed experts: a token meets those of its top-k.
    Routed,
    /// The embedding, of which a token takes a row.
    Embedding,
}

/// One tensor of matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredMatrices {
    /// What they are for.
    pub role: MatrixRole,
    /// Whether they belong to a MTP module.
    pub mtp: bool,
    /// Their format; `None` for one that is not supported.
    pub dtype: Option<DType>,
    /// How many there are: the experts of a stack, or one.
    pub count: usize,
    /// Rows of each.
    pub rows: usize,
    /// Columns of each.
    pub cols: usize,
    /// Bytes of all of them.
    pub bytes: u64,
}

/// The matrices that a backend will be given, from the headers alone. Those that are made at load out of others are
/// not among them, see [`Footprint::made_bytes`].
pub fn stored_matrices(checkpoint: &Checkpoint) -> Vec<StoredMatrices> {
    checkpoint.tensors().filter_map(|t| matrices_of(checkpoint, &t)).collect()
}

fn matrices_of(checkpoint: &Checkpoint, t: &TensorInfo) -> Option<StoredMatrices> {
    let c = checkpoint.config();
    let name = t.model_name.as_ref();
    let parts_of_another = name.contains(".k_b_proj.") || name.contains(".v_b_proj.");
    if t.parameters == 0 || parts_of_another {
        return None;
    }
    let (count, rows, cols) = match *t.shape {
        [rows, cols] => (1, rows, cols),
        [count, rows, cols] => (count, rows, cols),
        _ => return None,
    };
    let role = if name.contains(".mlp.experts.") {
        MatrixRole::Routed
    } else if name == EMBEDDING && !c.tie_word_embeddings {
        MatrixRole::Embedding
    } else {
        MatrixRole::Dense
    };
    let mtp = layer_of(name).is_some_and(|l| l >= c.num_hidden_layers);
    let dtype = DType::ALL.into_iter().find(|d| d.name() == t.dtype);
    Some(StoredMatrices { role, mtp, dtype, count, rows, cols, bytes: t.bytes as u64 })
}

const EMBEDDING: &str = "model.embed_tokens.weight";

/// The layer that a tensor belongs to: `model.layers.12.` is 12.
fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()
}
