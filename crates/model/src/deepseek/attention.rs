//! Multi-head latent attention (DeepSeek-V2 paper, section 2.1).

use oxseek_tensor::{
    Backend, Error,
    backend::{Cache, KvB, MlaShape, Rope, Vector, Weight},
};

use super::{
    config::{LATENT_NORM_EPS, mla_shape},
    load::Loader,
    scratch::Scratch,
};
use crate::LoadError;

/// The attention of one layer.
pub(super) struct Attention {
    shape: MlaShape,
    rope: Rope,
    query: Query,
    /// `[kl + dr, D]`: latent rows first, rope rows last.
    kv_a: Weight,
    kv_a_norm: Vector,
    /// `[H*(dn+dv), kl]`: per head, key rows and then value rows.
    kv_b: KvB,
    /// `[D, H*dv]`
    output: Weight,
}

/// How queries are made.
enum Query {
    /// V2-Lite, Moonlight: `[H*(dn+dr), D]`.
    Full(Weight),
    /// The others: through a normed latent of `q_lora_rank`.
    LowRank {
        /// `[ql, D]`
        a: Weight,
        norm: Vector,
        /// `[H*(dn+dr), ql]`
        b: Weight,
    },
}

impl Attention {
    pub(super) fn load(l: &mut Loader<'_>, rope: Rope, prefix: &str) -> Result<Self, LoadError> {
        let c = l.config();
        let shape = mla_shape(c);
        let (hidden, query_rank) = (c.hidden_size, c.q_lora_rank);
        let heads = shape.heads * (shape.nope + shape.rope);
        let name = |part: &str| format!("{prefix}.{part}.weight");
        let query = match query_rank {
            None => Query::Full(l.matrix(&name("q_proj"), heads, hidden)?),
            Some(rank) => Query::LowRank {
                a: l.matrix(&name("q_a_proj"), rank, hidden)?,
                norm: l.vector(&name("q_a_layernorm"), rank)?,
                b: l.matrix(&name("q_b_proj"), heads, rank)?,
            },
        };
        Ok(Self {
            shape,
            rope,
            query,
            kv_a: l.matrix(&name("kv_a_proj_with_mqa"), shape.latent + shape.rope, hidden)?,
            kv_a_norm: l.vector(&name("kv_a_layernorm"), shape.latent)?,
            kv_b: l.kv_b(&name("kv_b_proj"), &shape)?,
            output: l.matrix(&name("o_proj"), hidden, shape.heads * shape.value)?,
        })
    }

    /// `s.x += o_proj(attention(s.h))` for the rows of the step; appends their rows to layer `layer` of the cache.
    pub(super) fn forward(
        &self,
        b: &mut dyn Backend,
        s: &Scratch,
        cache: Cache,
        layer: usize,
        rows: usize,
    ) -> Result<(), Error> {
        // Both products of `s.h` follow each other, so that a backend may launch them together.
        match &self.query {
            Query::Full(w) => {
                b.matmul(s.h, *w, s.q, rows)?;
                b.matmul(s.h, self.kv_a, s.kv, rows)?;
            }
            Query::LowRank { a, norm, b: up } => {
                b.matmul(s.h, *a, s.q_latent, rows)?;
                b.matmul(s.h, self.kv_a, s.kv, rows)?;
                b.rms_norm(s.q_latent, *norm, LATENT_NORM_EPS, s.q_latent, rows)?;
                b.matmul(s.q_latent, *up, s.q, rows)?;
            }
        }
        b.rope_queries(&self.shape, self.rope, s.q)?;
        b.mla_append(&self.shape, self.rope, self.kv_a_norm, LATENT_NORM_EPS, s.kv, cache, layer)?;
        b.mla_attend(&self.shape, s.q, self.kv_b, cache, layer, s.attended)?;
        b.matmul_add(s.attended, self.output, s.x, rows)
    }
}
