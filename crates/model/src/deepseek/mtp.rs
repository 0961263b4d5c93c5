//! The multi-token-prediction module (DeepSeek-V3 paper, section 2.2).

use oxseek_tensor::{
    Backend, Error,
    backend::{Cache, Rope, Vector, Weight},
};

use super::{layer::Layer, load::Loader, scratch::Scratch};
use crate::LoadError;

/// One MTP module: predicts token `i + 2` from the main model's hidden state at `i` and token `i + 1`.
pub(super) struct Mtp {
    embedding_norm: Vector,
    hidden_norm: Vector,
    /// `[D, 2D]`: takes the embedding half first, as the released weights expect.
    join: Weight,
    layer: Layer,
    /// `shared_head.norm`
    head_norm: Vector,
    /// Its layer in the cache and in the checkpoint.
    index: usize,
    eps: f32,
}

impl Mtp {
    pub(super) fn load(l: &mut Loader<'_>, rope: Rope, index: usize) -> Result<Self, LoadError> {
        let (hidden, eps) = (l.config().hidden_size, l.config().rms_norm_eps);
        let name = |part: &str| format!("model.layers.{index}.{part}.weight");
        Ok(Self {
            embedding_norm: l.vector(&name("enorm"), hidden)?,
            hidden_norm: l.vector(&name("hnorm"), hidden)?,
            join: l.matrix(&name("eh_proj"), hidden, 2 * hidden)?,
            layer: Layer::load(l, rope, index, true)?,
            head_norm: l.vector(&name("shared_head.norm"), hidden)?,
            index,
            eps,
        })
    }

    /// `s.last = rms(layer(eh_proj(rms(embed[t]) || rms(h))))`, where `t` is the step's token, one ahead of the
    /// hidden state `h` in `s.last`.
    pub(super) fn forward(
        &self,
        b: &mut dyn Backend,
        s: &Scratch,
        embed: Weight,
        cache: Cache,
        rows: usize,
    ) -> Result<(), Error> {
        b.embed(embed, s.x)?;
        b.rms_norm(s.x, self.embedding_norm, self.eps, s.x, rows)?;
        b.rms_norm(s.last, self.hidden_norm, self.eps, s.h, rows)?;
        b.concat(s.x, s.h, s.joined)?;
        b.matmul(s.joined, self.join, s.x, rows)?;
        self.layer.forward(b, s, cache, self.index, rows)?;
        b.rms_norm(s.x, self.head_norm, self.eps, s.last, rows)
    }
}
