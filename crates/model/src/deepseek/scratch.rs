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
        let routing = b.alloc_routing(o.step_rows_max, c.num_experts_per_tok.max(1))?;
        Self::from_buffers(c, o, routing, &mut |rows, cols| b.alloc(rows, cols))
    }

    /// Bytes of all buffers, without making them.
    pub(super) fn bytes(c: &ModelConfig, o: &LoadOptions) -> u64 {
        let mut values = (2 * o.step_rows_max * c.num_experts_per_tok.max(1)) as u64;
        let counted = Self::from_buffers(c, o, Routing(0), &mut |rows, cols| {
            values = values.saturating_add((rows as u64).saturating_mul(cols as u64));
            Ok(Buffer(0))
        });
        debug_assert!(counted.is_ok(), "counting never fails");
        values.saturating_mul(4)
    }

    fn from_buffers(
        c: &ModelConfig,
        o: &LoadOptions,
        routing: Routing,
        alloc: &mut dyn FnMut(usize, usize) -> Result<Buffer, Error>,
    ) -> Result<Self, Error> {
        let shape = mla_shape(c);
        let (t, r) = (o.step_rows_max, o.logit_rows_max);
        let mtp_rows = if c.num_nextn_predict_layers > 0 { r } else { 1 };
        Ok(Self {
            x: alloc(t, c.hidden_size)?,
            h: alloc(t, c.hidden_size)?,
            q_latent: alloc(t, c.q_lora_rank.unwrap_or(1))?,
            q: alloc(t, shape.heads * (shape.nope + shape.rope))?,
            kv: alloc(t, shape.latent + shape.rope)?,
            attended: alloc(t, shape.heads * shape.value)?,
            routing,
            last: alloc(r, c.hidden_size)?,
            logits: alloc(r, c.vocab_size)?,
            joined: alloc(mtp_rows, 2 * c.hidden_size)?,
        })
    }
}
