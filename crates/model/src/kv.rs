//! The latent cache: one row of `kv_lora_rank + qk_rope_head_dim` values per token and layer, paged in blocks.

pub use oxseek_tensor::backend::BLOCK_TOKENS;
use oxseek_tensor::backend::CacheShape;
use oxseek_weights::ModelConfig;

/// Bytes of one cached value. The cache is F32 until a backend offers narrower rows.
const VALUE_BYTES: usize = 4;

/// Shape of a cache of `blocks` blocks for this model, its MTP layers included.
pub fn cache_shape(config: &ModelConfig, blocks: usize) -> CacheShape {
    CacheShape {
        layers: config.num_hidden_layers + config.num_nextn_predict_layers,
        blocks,
        latent: config.kv_lora_rank,
        rope: config.qk_rope_head_dim,
    }
}

/// Bytes that one token takes in the cache, over all layers.
pub fn bytes_per_token(config: &ModelConfig) -> usize {
    let shape = cache_shape(config, 1);
    shape.layers * (shape.latent + shape.rope) * VALUE_BYTES
}

/// Blocks that a sequence of `tokens` tokens takes.
pub fn blocks_for(tokens: usize) -> usize {
    tokens.div_ceil(BLOCK_TOKENS)
}
