//! The activations of a step, made once.

use oxseek_tensor::{
    Backend, Error,
    backend::{Buffer, Routing},
};
use oxseek_weights::ModelConfig;

use super::{LoadOptions, config::mla_shape};

/// The activations of a step. `T` rows unless said otherwise.
pub(super) struct Scratch {
    /// Residual stream, `[T, D]`.
    pub(super) x: Buffer,
    /// Normed residual, `[T, D]`.
    pub(super) h: Buffer,
    /// Query latent, `[T, ql]`.
    pub(super) q_latent: Buffer,
    /// Queries, `[T, H*(dn+dr)]`.
    pub(super) q: Buffer,
    /// New latent rows before norm and rotation, `[T, kl+dr]`.
    pub(super) kv: Buffer,
    /// Attention output, `[T, H*dv]`.
    pub(super) attended: Buffer,
    /// Chosen experts, `[T, top_k]`.
    pub(super) routing: Routing,
    /// Final hidden states of the rows whose logits are wanted, `[R, D]`, after the final norm.
    pub(super) last: Buffer,
    /// Logits, `[R, V]`.
    pub(super) logits: Buffer,
    /// MTP input, `[R, 2D]`; as small as may be where there is no MTP module.
    pub(super) joined: Buffer,
}

impl Scratch {
    pub(super) fn new(b: &mut dyn Backend, c: &ModelConfig, o: &LoadOptions) -> Result<Self, Error> {
        let shape = mla_shape(c);
        let (t, r) = (o.step_rows_max, o.logit_rows_max);
        let mtp_rows = if c.num_nextn_predict_layers > 0 { r } else { 1 };
        Ok(Self {
            x: b.alloc(t, c.hidden_size)?,
            h: b.alloc(t, c.hidden_size)?,
            q_latent: b.alloc(t, c.q_lora_rank.unwrap_or(1))?,
            q: b.alloc(t, shape.heads * (shape.nope + shape.rope))?,
            kv: b.alloc(t, shape.latent + shape.rope)?,
            attended: b.alloc(t, shape.heads * shape.value)?,
            routing: b.alloc_routing(t, c.num_experts_per_tok.max(1))?,
            last: b.alloc(r, c.hidden_size)?,
            logits: b.alloc(r, c.vocab_size)?,
            joined: b.alloc(mtp_rows, 2 * c.hidden_size)?,
        })
    }
}
