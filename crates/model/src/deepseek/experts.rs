//! The feed-forward half of a layer: a dense SwiGLU MLP, or routed and shared experts (DeepSeekMoE).

use oxseek_tensor::{
    Backend, Error,
    backend::{ExpertMatrices, Experts, Mlp},
};

use super::{load::Loader, router::Router, scratch::Scratch};
use crate::LoadError;

/// The feed-forward half of one layer.
pub(super) enum FeedForward {
    /// The first layers.
    Dense(Mlp),
    /// The rest.
    Moe {
        router: Router,
        routed: Experts,
        /// All shared experts as one MLP of their summed width.
        shared: Option<Mlp>,
    },
}

impl FeedForward {
    pub(super) fn load_dense(l: &mut Loader<'_>, prefix: &str) -> Result<Self, LoadError> {
        let inner = l.config().intermediate_size;
        Ok(Self::Dense(load_mlp(l, prefix, inner)?))
    }

    pub(super) fn load_moe(l: &mut Loader<'_>, prefix: &str) -> Result<Self, LoadError> {
        let c = l.config();
        let (experts, inner, shared) = (c.n_routed_experts, c.moe_intermediate_size, c.n_shared_experts);
        let router = Router::load(l, prefix)?;
        let mut routed = Vec::with_capacity(experts);
        for e in 0..experts {
            routed.push(expert_matrices(l, &format!("{prefix}.experts.{e}"), inner)?);
        }
        Ok(Self::Moe {
            router,
            routed: l.backend().load_experts(routed)?,
            shared: match shared {
                0 => None,
                n => Some(load_mlp(l, &format!("{prefix}.shared_experts"), n * inner)?),
            },
        })
    }

    /// `s.x += ffn(s.h)` for the rows of the step.
    pub(super) fn forward(&self, b: &mut dyn Backend, s: &Scratch) -> Result<(), Error> {
        match self {
            Self::Dense(mlp) => b.mlp(s.h, mlp, s.x),
            Self::Moe { router, routed, shared } => {
                router.forward(b, s)?;
                b.moe(s.h, s.routing, *routed, shared.as_ref(), s.x)
            }
        }
    }
}

fn expert_matrices(l: &Loader<'_>, prefix: &str, inner: usize) -> Result<ExpertMatrices, LoadError> {
    let hidden = l.config().hidden_size;
    let name = |part: &str| format!("{prefix}.{part}.weight");
    Ok(ExpertMatrices {
        gate: l.host_matrix(&name("gate_proj"), inner, hidden)?,
        up: l.host_matrix(&name("up_proj"), inner, hidden)?,
        down: l.host_matrix(&name("down_proj"), hidden, inner)?,
    })
}

fn load_mlp(l: &mut Loader<'_>, prefix: &str, inner: usize) -> Result<Mlp, LoadError> {
    let m = expert_matrices(l, prefix, inner)?;
    let b = l.backend();
    Ok(Mlp { gate: b.load_matrix(m.gate)?, up: b.load_matrix(m.up)?, down: b.load_matrix(m.down)? })
}
