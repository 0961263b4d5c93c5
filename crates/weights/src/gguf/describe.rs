//! A model's configuration as metadata: the reverse of `config.rs`, in the keys of llama.cpp's converter.

use std::io;

use oxseek_tensor::backend::Scoring;

use super::{
    GgufWriter,
    config::{ARCHITECTURE, ARCHITECTURE_KEY},
    writer::invalid,
};
use crate::{ModelConfig, TopkMethod, Yarn};

/// Layer counts by which llama.cpp knows models that have no low rank for queries; others must say that it is 0.
const LITE_LAYERS: [usize; 2] = [26, 27];

/// Writes the configuration.
///
/// # Errors
/// When the model is one that the keys cannot describe; the error names the field.
pub fn describe(config: &ModelConfig, to: &mut GgufWriter) -> io::Result<()> {
    let c = config;
    to.set(ARCHITECTURE_KEY, ARCHITECTURE)?;
    to.set("general.type", "model")?;
    let mut keys = Keys { to };
    keys.size("block_count", c.num_hidden_layers + c.num_nextn_predict_layers)?;
    keys.size("context_length", c.max_position_embeddings)?;
    keys.size("embedding_length", c.hidden_size)?;
    keys.size("feed_forward_length", c.intermediate_size)?;
    keys.size("vocab_size", c.vocab_size)?;
    if c.num_nextn_predict_layers > 0 {
        keys.size("nextn_predict_layers", c.num_nextn_predict_layers)?;
    }
    keys.attention(c)?;
    keys.rope(c)?;
    keys.experts(c)
}

struct Keys<'a> {
    to: &'a mut GgufWriter,
}

impl Keys<'_> {
    fn set(&mut self, key: &str, value: impl Into<super::Value>) -> io::Result<()> {
        self.to.set(&format!("{ARCHITECTURE}.{key}"), value)
    }

    fn size(&mut self, key: &str, n: usize) -> io::Result<()> {
        let n = u32::try_from(n).map_err(|_| invalid(format!("{key}: {n} does not fit")))?;
        self.set(key, n)
    }

    fn attention(&mut self, c: &ModelConfig) -> io::Result<()> {
        self.size("attention.head_count", c.num_attention_heads)?;
        // The latent cache is what llama.cpp sees as the one head of keys and values.
        self.size("attention.head_count_kv", 1)?;
        self.size("attention.key_length", c.kv_lora_rank + c.qk_rope_head_dim)?;
        self.size("attention.value_length", c.kv_lora_rank)?;
        self.size("attention.key_length_mla", c.qk_nope_head_dim + c.qk_rope_head_dim)?;
        self.size("attention.value_length_mla", c.v_head_dim)?;
        self.size("attention.kv_lora_rank", c.kv_lora_rank)?;
        match c.q_lora_rank {
            None if LITE_LAYERS.contains(&c.num_hidden_layers) => {}
            rank => self.size("attention.q_lora_rank", rank.unwrap_or(0))?,
        }
        self.set("attention.layer_norm_rms_epsilon", c.rms_norm_eps)
    }

    fn rope(&mut self, c: &ModelConfig) -> io::Result<()> {
        if !c.rope_interleave {
            return Err(invalid("rope_interleave: false cannot be described in a GGUF file".into()));
        }
        self.size("rope.dimension_count", c.qk_rope_head_dim)?;
        self.set("rope.freq_base", c.rope_theta as f32)?;
        let Some(yarn) = &c.yarn else { return Ok(()) };
        let Yarn { mscale, mscale_all_dim, attention_factor, .. } = *yarn;
        if attention_factor.is_some_and(|f| f != 1.0) {
            return Err(invalid("rope_scaling.attention_factor cannot be described in a GGUF file".into()));
        }
        if mscale != mscale_all_dim {
            let why =
                "rope_scaling.mscale: one that is not mscale_all_dim cannot be described in a GGUF file";
            return Err(invalid(why.into()));
        }
        self.set("rope.scaling.type", "yarn")?;
        self.set("rope.scaling.factor", yarn.factor as f32)?;
        self.size("rope.scaling.original_context_length", yarn.original_max_position_embeddings as usize)?;
        self.set("rope.scaling.yarn_beta_fast", yarn.beta_fast as f32)?;
        self.set("rope.scaling.yarn_beta_slow", yarn.beta_slow as f32)?;
        if let Some(m) = mscale_all_dim {
            self.set("rope.scaling.yarn_log_multiplier", (0.1 * m) as f32)?;
        }
        Ok(())
    }

    fn experts(&mut self, c: &ModelConfig) -> io::Result<()> {
        let moe = |layer: &usize| c.is_moe_layer(*layer);
        let dense = (0..c.num_hidden_layers).find(moe).unwrap_or(c.num_hidden_layers);
        if !(dense..c.num_hidden_layers).all(|layer| moe(&layer)) {
            let why = "layers without experts after layers with experts cannot be described in a GGUF file";
            return Err(invalid(format!("moe_layer_freq: {why}")));
        }
        self.size("leading_dense_block_count", dense)?;
        let inner = if c.n_routed_experts > 0 { c.moe_intermediate_size } else { c.intermediate_size };
        self.size("expert_feed_forward_length", inner)?;
        self.size("expert_shared_count", c.n_shared_experts)?;
        if c.n_routed_experts == 0 {
            return Ok(());
        }
        self.size("expert_count", c.n_routed_experts)?;
        self.size("expert_used_count", c.num_experts_per_tok)?;
        let (groups, kept) = match c.topk_method {
            TopkMethod::Greedy => (1, 1),
            TopkMethod::GroupLimitedGreedy | TopkMethod::NoauxTc => (c.n_group, c.topk_group),
        };
        self.size("expert_group_count", groups)?;
        self.size("expert_group_used_count", kept)?;
        let gating = match (c.scoring, c.topk_method) {
            (Scoring::Softmax, TopkMethod::NoauxTc) => {
                return Err(invalid("topk_method: noaux_tc with softmax cannot be described".into()));
            }
            (Scoring::Sigmoid, TopkMethod::GroupLimitedGreedy) => {
                return Err(invalid(
                    "topk_method: group_limited_greedy with sigmoid cannot be described".into(),
                ));
            }
            (Scoring::Softmax, _) => 1u32,
            (Scoring::Sigmoid, _) => 2u32,
        };
        self.set("expert_gating_func", gating)?;
        self.set("expert_weights_scale", c.routed_scaling_factor)?;
        self.set("expert_weights_norm", c.norm_topk_prob)
    }
}
