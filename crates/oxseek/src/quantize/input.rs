//! The tensors of a model as a GGUF file is to have them, row by row as F32.

use std::ops::Range;

use oxseek_tensor::{DType, HostMatrix};
use oxseek_weights::{
    Checkpoint, Error, ModelConfig,
    gguf::{GgufTensor, Slot, Source, layout},
};

/// A tensor to be written.
pub struct Input {
    /// Its name in a GGUF file.
    pub name: String,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    rows: Rows,
}

/// Where its rows come from.
enum Rows {
    /// Matrices that lie one after the other: one, or one per expert.
    Stack(Vec<HostMatrix>),
    Values(Vec<f32>),
    /// Part of a `kv_b_proj`.
    Latent {
        whole: HostMatrix,
        part: LatentPart,
        heads: Heads,
    },
}

#[derive(Clone, Copy)]
enum LatentPart {
    Keys,
    Values,
}

#[derive(Clone, Copy)]
struct Heads {
    key: usize,
    value: usize,
    latent: usize,
}

impl Input {
    /// All tensors of a checkpoint: those of a GGUF file under the names that they have there, others as llama.cpp's
    /// converter lays them out.
    pub fn all(checkpoint: &Checkpoint) -> Result<Vec<Self>, Error> {
        if let Some(gguf) = checkpoint.gguf() {
            let input = |t: GgufTensor<'_>| {
                let rows = Rows::Stack(vec![gguf.rows_of(t.name)?]);
                Ok(Self { name: t.name.into(), shape: t.shape.to_vec(), rows })
            };
            return gguf.tensors().map(input).collect();
        }
        layout(checkpoint.config()).into_iter().map(|slot| Self::of_slot(checkpoint, slot)).collect()
    }

    fn of_slot(checkpoint: &Checkpoint, slot: Slot) -> Result<Self, Error> {
        let (rows, cols) = (slot.rows(), slot.cols());
        let c = checkpoint.config();
        let rows = match &slot.source {
            Source::Vector(name) => Rows::Values(checkpoint.vector(name, cols)?),
            Source::Matrix(name) => Rows::Stack(vec![checkpoint.matrix(name, rows, cols)?]),
            Source::Experts { layer, kind } => {
                let name = |e: usize| format!("model.layers.{layer}.mlp.experts.{e}.{kind}_proj.weight");
                let each = rows / c.n_routed_experts.max(1);
                let matrices = (0..c.n_routed_experts).map(|e| checkpoint.matrix(&name(e), each, cols));
                Rows::Stack(matrices.collect::<Result<_, _>>()?)
            }
            Source::LatentKeys { layer } => Self::latent(checkpoint, c, *layer, LatentPart::Keys)?,
            Source::LatentValues { layer } => Self::latent(checkpoint, c, *layer, LatentPart::Values)?,
        };
        Ok(Self { name: slot.name, shape: slot.shape, rows })
    }

    fn latent(
        checkpoint: &Checkpoint,
        c: &ModelConfig,
        layer: usize,
        part: LatentPart,
    ) -> Result<Rows, Error> {
        let heads = Heads { key: c.qk_nope_head_dim, value: c.v_head_dim, latent: c.kv_lora_rank };
        let name = format!("model.layers.{layer}.self_attn.kv_b_proj.weight");
        let rows = c.num_attention_heads * (heads.key + heads.value);
        Ok(Rows::Latent { whole: checkpoint.matrix(&name, rows, heads.latent)?, part, heads })
    }

    /// Elements of a row.
    pub fn cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(0)
    }

    /// Rows, over all outer sizes.
    pub fn rows(&self) -> usize {
        self.shape.iter().rev().skip(1).product()
    }

    /// The format that its rows have now; `None` for a vector that has been read already.
    pub fn dtype(&self) -> Option<DType> {
        match &self.rows {
            Rows::Stack(matrices) => matrices.first().map(HostMatrix::dtype),
            Rows::Latent { whole, .. } => Some(whole.dtype()),
            Rows::Values(_) => None,
        }
    }

    /// Rows that are made together: a head, where its rows must be turned.
    pub fn rows_together(&self) -> usize {
        match &self.rows {
            Rows::Latent { part: LatentPart::Keys, heads, .. } => heads.latent,
            _ => 1,
        }
    }

    /// Some rows as they lie in the file, if that is how `dtype` has them.
    pub fn stored(&self, dtype: DType, rows: Range<usize>) -> Option<&[u8]> {
        let Rows::Stack(matrices) = &self.rows else { return None };
        let each = matrices.first()?.rows();
        let matrix = &matrices[rows.start / each];
        let from = rows.start % each;
        let inside = matrix.dtype() == dtype && dtype != DType::F8E4M3 && from + rows.len() <= each;
        let row = matrix.row_bytes();
        inside.then(|| &matrix.data()[from * row..(from + rows.len()) * row])
    }

    /// Some rows as F32: whole groups of [`Input::rows_together`].
    pub fn decode(&self, rows: Range<usize>, out: &mut [f32]) {
        let cols = self.cols();
        match &self.rows {
            Rows::Values(values) => out.copy_from_slice(values),
            Rows::Stack(matrices) => {
                let each = matrices.first().map_or(1, HostMatrix::rows);
                for (row, out) in rows.zip(out.chunks_exact_mut(cols)) {
                    matrices[row / each].decode_row(row % each, out);
                }
            }
            Rows::Latent { whole, part: LatentPart::Values, heads } => {
                for (row, out) in rows.zip(out.chunks_exact_mut(cols)) {
                    let (head, i) = (row / heads.value, row % heads.value);
                    whole.decode_row(head * (heads.key + heads.value) + heads.key + i, out);
                }
            }
            Rows::Latent { whole, part: LatentPart::Keys, heads } => {
                let first = rows.start / heads.latent;
                for (head, out) in (first..).zip(out.chunks_exact_mut(heads.latent * heads.key)) {
                    heads.turn(whole, head, out);
                }
            }
        }
    }
}

impl Heads {
    /// The key rows of a head as `[latent, key]`.
    fn turn(self, whole: &HostMatrix, head: usize, out: &mut [f32]) {
        let mut along = vec![0.0; self.latent];
        for i in 0..self.key {
            whole.decode_row(head * (self.key + self.value) + i, &mut along);
            for (out, v) in out[i..].iter_mut().step_by(self.key).zip(&along) {
                *out = *v;
            }
        }
    }
}
