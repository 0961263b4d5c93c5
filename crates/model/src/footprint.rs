//! What a checkpoint weighs and what a token costs to read.

use std::collections::BTreeMap;

use oxseek_tensor::CacheFormat;
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
        } else if t.model_name == "model.embed_tokens.weight" && !c.tie_word_embeddings {
            (1, c.vocab_size as u64)
        } else {
            (1, 1)
        };
        self.active_parameters += parameters * part / of;
        self.bytes_per_token += t.bytes as u64 * part / of;
    }
}

/// The layer that a tensor belongs to: `model.layers.12.` is 12.
fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()
}
