//! The latent cache: one row of `kv_lora_rank + qk_rope_head_dim` values per token and layer, paged in blocks.

pub use oxseek_tensor::backend::BLOCK_TOKENS;
use oxseek_tensor::{CacheFormat, backend::CacheShape};
use oxseek_weights::ModelConfig;

/// Shape of a cache of `blocks` blocks for this model, its MTP layers included.
pub fn cache_shape(config: &ModelConfig, blocks: usize, format: CacheFormat) -> CacheShape {
    CacheShape {
        layers: config.num_hidden_layers + config.num_nextn_predict_layers,
        blocks,
        latent: config.kv_lora_rank,
        rope: config.qk_rope_head_dim,
        format,
    }
}

/// Bytes that one token takes in the cache, over all layers.
pub fn bytes_per_token(config: &ModelConfig, format: CacheFormat) -> u64 {
    // Sizes of a real configuration do not overflow; one that does has no cache either.
    cache_shape(config, 1, format).bytes().map_or(u64::MAX, |bytes| (bytes / BLOCK_TOKENS) as u64)
}

/// Blocks that a sequence of `tokens` tokens takes.
pub fn blocks_for(tokens: usize) -> usize {
    tokens.div_ceil(BLOCK_TOKENS)
}
