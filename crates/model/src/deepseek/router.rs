//! The router of a MoE layer (DeepSeek-V3 paper, section 2.1.2).

use oxseek_tensor::{
    Backend, Error,
    backend::{RouterShape, Vector, Weight},
};
use oxseek_weights::TopkMethod;

use super::{config::router_shape, load::Loader, scratch::Scratch};
use crate::LoadError;

/// Scores all experts and chooses a few per token.
pub(super) struct Router {
    shape: RouterShape,
    /// `[E, D]`
    gate: Weight,
    /// `noaux_tc`: moves the choice, never the weights.
    bias: Option<Vector>,
}

impl Router {
    pub(super) fn load(l: &mut Loader<'_>, prefix: &str) -> Result<Self, LoadError> {
        let c = l.config();
        let shape = router_shape(c);
        let (hidden, biased) = (c.hidden_size, c.topk_method == TopkMethod::NoauxTc);
        Ok(Self {
            shape,
            gate: l.matrix(&format!("{prefix}.gate.weight"), shape.experts, hidden)?,
            bias: if biased {
                Some(l.vector(&format!("{prefix}.gate.e_score_correction_bias"), shape.experts)?)
            } else {
                None
            },
        })
    }

    /// Writes the choices for `s.h` into `s.routing`.
    pub(super) fn forward(&self, b: &mut dyn Backend, s: &Scratch) -> Result<(), Error> {
        b.route(&self.shape, s.h, self.gate, self.bias, s.routing)
    }
}
