//! `kv_b_proj`: the up-projection of the latent to keys and values.
//!
//! Older files have it whole. Newer ones have its key rows transposed, `[H, kl, dn]`, so that absorbed attention can
//! multiply queries with them in blocks along `dn`, and its value rows, `[H, dv, kl]`. The backend's attention takes
//! one matrix `[H*(dn+dv), kl]`, from which it makes both of its forms, so the two parts are put together here, once
//! per layer. Blocks along `dn` cannot be turned into blocks along `kl` without rounding all of them anew, so
//! quantised parts are stored as F16: its rounding is a sixteenth of that of Q8_0, the finest of the block formats,
//! and F32 would take twice the memory (4.1 GB instead of 2.0 GB for the 61 layers of DeepSeek-V3). Parts in F32, F16
//! or BF16 stay exactly as they are.

use std::{num::NonZero, ops::Range, thread};

use oxseek_tensor::{
    ByteRegion, DType, HostMatrix,
    dtype::{f32_to_bf16, f32_to_f16},
};

use super::{Gguf, names, tensor_error};
use crate::{Error, ModelConfig};

/// The two parts of a layer.
struct Parts {
    /// `[H*kl, dn]`
    keys: HostMatrix,
    /// `[H*dv, kl]`
    values: HostMatrix,
    heads: usize,
    key: usize,
    value: usize,
    latent: usize,
}

/// `kv_b_proj` of a layer.
pub(super) fn matrix(
    gguf: &Gguf,
    config: &ModelConfig,
    layer: &str,
    (rows, cols): (usize, usize),
) -> Result<HostMatrix, Error> {
    let whole = names::kv_b(layer);
    if gguf.has(&whole) || !gguf.has(&names::k_b(layer)) {
        return gguf.slab(&whole, &[rows, cols], 0, (rows, cols));
    }
    let parts = Parts::of(gguf, config, layer)?;
    let dtype = joined_dtype(parts.keys.dtype(), parts.values.dtype());
    // A value past the largest half is absurd for a weight, but it must not become infinite.
    let (dtype, bytes) = match parts.join(dtype) {
        Some(bytes) => (dtype, bytes),
        None => (DType::F32, parts.join(DType::F32).unwrap_or_default()),
    };
    HostMatrix::new(dtype, rows, cols, ByteRegion::from_vec(bytes), None).map_err(|e| {
        let name = names::k_b(layer);
        match gguf.entry(&name) {
            Some((part, _)) => tensor_error(part, &name, e.to_string()),
            None => gguf.missing(&name, &[rows, cols]),
        }
    })
}

/// The two parts of a layer's `kv_b_proj`, `[H*kl, dn]` and `[H*dv, kl]`, if the file has it in parts.
pub(super) fn parts(
    gguf: &Gguf,
    config: &ModelConfig,
    layer: &str,
) -> Result<Option<[HostMatrix; 2]>, Error> {
    if gguf.has(&names::kv_b(layer)) || !gguf.has(&names::k_b(layer)) {
        return Ok(None);
    }
    let Parts { keys, values, .. } = Parts::of(gguf, config, layer)?;
    Ok(Some([keys, values]))
}

/// Bytes that putting the parts of all layers together takes.
pub(super) fn joined_bytes(gguf: &Gguf, config: &ModelConfig) -> u64 {
    let values =
        config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim) * config.kv_lora_rank;
    let layers = 0..config.num_hidden_layers + config.num_nextn_predict_layers;
    let of = |layer: usize| {
        let layer = layer.to_string();
        let kind = |name: &str| gguf.tensor(name).and_then(|t| t.kind.dtype());
        match (kind(&names::k_b(&layer)), kind(&names::v_b(&layer))) {
            (Some(keys), Some(v)) if !gguf.has(&names::kv_b(&layer)) => {
                (values * joined_dtype(keys, v).block_bytes()) as u64
            }
            _ => 0,
        }
    };
    layers.map(of).sum()
}

/// The smallest format that holds both parts: exactly, or as the head of this file says when they are quantised.
fn joined_dtype(keys: DType, values: DType) -> DType {
    let quantised = |d: DType| d.block_len() > 1;
    match (keys, values) {
        _ if keys == values && !quantised(keys) => keys,
        _ if [keys, values].into_iter().all(|d| d == DType::F16 || quantised(d)) => DType::F16,
        _ => DType::F32,
    }
}

impl Parts {
    fn of(gguf: &Gguf, c: &ModelConfig, layer: &str) -> Result<Self, Error> {
        let (heads, latent) = (c.num_attention_heads, c.kv_lora_rank);
        let (key, value) = (c.qk_nope_head_dim, c.v_head_dim);
        Ok(Self {
            keys: gguf.slab(&names::k_b(layer), &[heads, latent, key], 0, (heads * latent, key))?,
            values: gguf.slab(&names::v_b(layer), &[heads, value, latent], 0, (heads * value, latent))?,
            heads,
            key,
            value,
            latent,
        })
    }

    /// All heads in `dtype`, on all cores; `None` when a finite value would not stay finite.
    fn join(&self, dtype: DType) -> Option<Vec<u8>> {
        let head_bytes = (self.key + self.value) * self.latent * dtype.block_bytes();
        let mut out = vec![0; self.heads * head_bytes];
        let threads = thread::available_parallelism().map_or(1, NonZero::get).min(self.heads);
        let heads_each = self.heads.div_ceil(threads);
        let mut works = out.chunks_mut(heads_each * head_bytes).enumerate();
        let range = |i: usize| i * heads_each..((i + 1) * heads_each).min(self.heads);
        let finite = if threads == 1 {
            // Where there are no threads (a browser) there is one core.
            works.all(|(i, out)| self.join_heads(dtype, range(i), out))
        } else {
            thread::scope(|scope| {
                let spawn = |(i, out)| scope.spawn(move || self.join_heads(dtype, range(i), out));
                let running: Vec<_> = works.map(spawn).collect();
                running.into_iter().all(|t| t.join().unwrap_or(false))
            })
        };
        finite.then_some(out)
    }

    /// Some heads into `out`: per head the key rows, then the value rows.
    fn join_heads(&self, dtype: DType, heads: Range<usize>, out: &mut [u8]) -> bool {
        let size = dtype.block_bytes();
        let row_bytes = self.latent * size;
        let mut finite = true;
        let (mut columns, mut along) = (vec![0.0; COLUMNS_TOGETHER * self.key], vec![0.0; self.latent]);
        for (head, out) in heads.zip(out.chunks_exact_mut((self.key + self.value) * row_bytes)) {
            let (key_rows, value_rows) = out.split_at_mut(self.key * row_bytes);
            for first in (0..self.latent).step_by(COLUMNS_TOGETHER) {
                let n = COLUMNS_TOGETHER.min(self.latent - first);
                for (i, column) in columns.chunks_exact_mut(self.key).take(n).enumerate() {
                    self.keys.decode_row(head * self.latent + first + i, column);
                }
                for (i, row) in key_rows.chunks_exact_mut(row_bytes).enumerate() {
                    let across = columns[i..].iter().step_by(self.key).take(n);
                    along.iter_mut().zip(across).for_each(|(to, x)| *to = *x);
                    finite &= put(dtype, &along[..n], &mut row[first * size..][..n * size]);
                }
            }
            for (i, row) in value_rows.chunks_exact_mut(row_bytes).enumerate() {
                self.values.decode_row(head * self.value + i, &mut along);
                finite &= put(dtype, &along, row);
            }
        }
        finite
    }
}

/// Columns of the key rows that are decoded before they are written: a cache line of each row.
const COLUMNS_TOGETHER: usize = 32;

/// Whether all finite values have stayed finite.
fn put(dtype: DType, values: &[f32], out: &mut [u8]) -> bool {
    let halves = out.as_chunks_mut::<2>().0.iter_mut().zip(values);
    match dtype {
        DType::F16 => halves.fold(true, |finite, (out, x)| {
            let bits = f32_to_f16(*x);
            *out = bits.to_le_bytes();
            finite & (bits & 0x7fff != 0x7c00 || x.is_infinite())
        }),
        DType::BF16 => {
            halves.for_each(|(out, x)| *out = f32_to_bf16(*x).to_le_bytes());
            true
        }
        _ => {
            out.as_chunks_mut::<4>().0.iter_mut().zip(values).for_each(|(out, x)| *out = x.to_le_bytes());
            true
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(keys: HostMatrix, values: HostMatrix) -> Parts {
        Parts { keys, values, heads: 3, key: 2, value: 1, latent: 4 }
    }

    fn f16(rows: usize, cols: usize, values: &[f32]) -> HostMatrix {
        let bytes = values.iter().flat_map(|&v| f32_to_f16(v).to_le_bytes()).collect();
        HostMatrix::new(DType::F16, rows, cols, ByteRegion::from_vec(bytes), None).unwrap()
    }

    #[test]
    fn keys_are_transposed_head_by_head() {
        let keys: Vec<f32> = (0..24).map(|i| i as f32).collect();
        let values: Vec<f32> = (0..12).map(|i| 100.0 + i as f32).collect();
        let parts = parts(f16(12, 2, &keys), f16(3, 4, &values));
        let joined = parts.join(DType::F16).unwrap();
        let joined = HostMatrix::new(DType::F16, 9, 4, ByteRegion::from_vec(joined), None).unwrap();
        for head in 0..3 {
            for row in 0..3 {
                let mut found = [0.0; 4];
                joined.decode_row(head * 3 + row, &mut found);
                let key = |c: usize| keys[(head * 4 + c) * 2 + row];
                let expected: [f32; 4] =
                    std::array::from_fn(|c| if row < 2 { key(c) } else { values[head * 4 + c] });
                assert_eq!(found, expected, "head {head} row {row}");
            }
        }
    }

    #[test]
    fn a_value_too_large_for_a_half_is_noticed() {
        let keys = HostMatrix::from_f32(12, 2, &[70_000.0; 24]).unwrap();
        let parts = parts(keys, f16(3, 4, &[1.0; 12]));
        assert!(parts.join(DType::F16).is_none());
        assert!(parts.join(DType::F32).is_some());
    }

    #[test]
    fn the_joined_format_loses_nothing_that_was_exact() {
        use DType::{BF16, F16, F32, Q4_0, Q8_0};
        for (keys, values, joined) in [
            (F32, F32, F32),
            (F16, F16, F16),
            (BF16, BF16, BF16),
            (BF16, F16, F32),
            (Q8_0, Q4_0, F16),
            (Q8_0, F16, F16),
            (Q8_0, BF16, F32),
            (F32, Q8_0, F32),
        ] {
            assert_eq!(joined_dtype(keys, values), joined);
        }
    }
}
