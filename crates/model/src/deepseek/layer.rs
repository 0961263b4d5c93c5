//! One decoder layer: pre-normed attention and feed-forward, each added to the residual stream.

use oxseek_tensor::{
    Backend, Error,
    backend::{Cache, Rope, Vector},
};

use super::{attention::Attention, experts::FeedForward, load::Loader, scratch::Scratch};
use crate::LoadError;

/// One decoder layer.
pub(super) struct Layer {
    attention_norm: Vector,
    attention: Attention,
    ffn_norm: Vector,
    ffn: FeedForward,
    eps: f32,
}

impl Layer {
    /// Loads layer `i`; `moe` says which feed-forward it has.
    pub(super) fn load(l: &mut Loader<'_>, rope: Rope, i: usize, moe: bool) -> Result<Self, LoadError> {
        let (hidden, eps) = (l.config().hidden_size, l.config().rms_norm_eps);
        let prefix = format!("model.layers.{i}");
        Ok(Self {
            attention_norm: l.vector(&format!("{prefix}.input_layernorm.weight"), hidden)?,
            attention: Attention::load(l, rope, &format!("{prefix}.self_attn"))?,
            ffn_norm: l.vector(&format!("{prefix}.post_attention_layernorm.weight"), hidden)?,
            ffn: if moe {
                FeedForward::load_moe(l, &format!("{prefix}.mlp"))?
            } else {
                FeedForward::load_dense(l, &format!("{prefix}.mlp"))?
            },
            eps,
        })
    }

    /// `x = x + Attn(rms(x)); x = x + FFN(rms(x))` for the rows of the step, over layer `i` of the cache.
    pub(super) fn forward(
        &self,
        b: &mut dyn Backend,
        s: &Scratch,
        cache: Cache,
        i: usize,
        rows: usize,
    ) -> Result<(), Error> {
        b.rms_norm(s.x, self.attention_norm, self.eps, s.h, rows)?;
        self.attention.forward(b, s, cache, i, rows)?;
        b.rms_norm(s.x, self.ffn_norm, self.eps, s.h, rows)?;
        self.ffn.forward(b, s)
    }
}
