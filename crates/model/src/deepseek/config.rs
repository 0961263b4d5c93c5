//! From a checkpoint's configuration to the shapes that the ops take.

use oxseek_tensor::backend::{GroupScore, MlaShape, RouterShape};
use oxseek_weights::{ModelConfig, TopkMethod, Yarn};

/// Epsilon of the two latent norms. The modelling code that the weights were trained with builds them with its
/// class default, whatever `rms_norm_eps` says.
pub const LATENT_NORM_EPS: f32 = 1e-6;

/// Sizes of the attention of every layer.
pub fn mla_shape(c: &ModelConfig) -> MlaShape {
    let (nope, rope) = (c.qk_nope_head_dim, c.qk_rope_head_dim);
    MlaShape {
        heads: c.num_attention_heads,
        nope,
        rope,
        value: c.v_head_dim,
        latent: c.kv_lora_rank,
        softmax_scale: (((nope + rope) as f64).powf(-0.5) * softmax_multiplier(c)) as f32,
    }
}

/// Sizes of the router of every MoE layer.
pub fn router_shape(c: &ModelConfig) -> RouterShape {
    let limited = c.topk_method != TopkMethod::Greedy;
    RouterShape {
        experts: c.n_routed_experts,
        top_k: c.num_experts_per_tok,
        groups: if limited { c.n_group } else { 1 },
        groups_kept: if limited { c.topk_group } else { 1 },
        group_score: match c.topk_method {
            TopkMethod::NoauxTc => GroupScore::TopTwoSum,
            TopkMethod::Greedy | TopkMethod::GroupLimitedGreedy => GroupScore::Max,
        },
        scoring: c.scoring,
        normalize: c.norm_topk_prob,
        scale: c.routed_scaling_factor,
    }
}

/// Rotary frequencies and what cos and sin are multiplied with (YaRN paper, section 3).
pub fn rope_frequencies(c: &ModelConfig) -> (Vec<f32>, f32) {
    let dim = c.qk_rope_head_dim;
    let plain = |i: usize| c.rope_theta.powf(-2.0 * i as f64 / dim as f64);
    let Some(yarn) = &c.yarn else {
        return ((0..dim / 2).map(|i| plain(i) as f32).collect(), 1.0);
    };
    let (low, high) = ramp_bounds(c, yarn);
    let frequency = |i: usize| {
        // Fast pairs keep their frequency, slow ones are interpolated by the factor.
        let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
        (plain(i) / yarn.factor * ramp + plain(i) * (1.0 - ramp)) as f32
    };
    ((0..dim / 2).map(frequency).collect(), magnitude(yarn) as f32)
}

/// The pairs between which YaRN goes from untouched to interpolated.
fn ramp_bounds(c: &ModelConfig, yarn: &Yarn) -> (f64, f64) {
    let dim = c.qk_rope_head_dim as f64;
    let pair_of = |rotations: f64| {
        dim * (yarn.original_max_position_embeddings / (rotations * std::f64::consts::TAU)).ln()
            / (2.0 * c.rope_theta.ln())
    };
    let low = pair_of(yarn.beta_fast).floor().max(0.0);
    let high = pair_of(yarn.beta_slow).ceil().min(dim - 1.0);
    (low, if low >= high { low + 0.001 } else { high })
}

fn mscale(factor: f64, m: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 }
}

fn magnitude(yarn: &Yarn) -> f64 {
    let nonzero = |m: Option<f64>| m.filter(|m| *m != 0.0);
    match (yarn.attention_factor, nonzero(yarn.mscale), nonzero(yarn.mscale_all_dim)) {
        (Some(factor), _, _) => factor,
        (None, Some(m), Some(all)) => mscale(yarn.factor, m) / mscale(yarn.factor, all),
        (None, _, _) => mscale(yarn.factor, 1.0),
    }
}

/// `m^2`: multiplies the whole score, its nope part too.
fn softmax_multiplier(c: &ModelConfig) -> f64 {
    let all = c.yarn.as_ref().and_then(|y| y.mscale_all_dim.map(|m| mscale(y.factor, m)));
    all.unwrap_or(1.0).powi(2)
}
