//! Attention in BF16, expanded: sixteen rows of a prompt lie side by side and share each key and value.
//!
//! Keys and values of a chunk of positions are made once per head and step, and used by all rows of the segment.

use oxseek_tensor::{
    backend::{BLOCK_TOKENS, Segment},
    dtype::bf16_to_f32,
};

use super::native::Native;
use crate::{
    kv_b::Panels,
    memory::Scratch,
    packed::{GROUP_ROWS, RUN, Rounding},
    simd::attention::{AttendChunk, Bf16Rows, CHUNK, DotRows, scratch_len},
};

/// Rows that pass over a chunk together.
const TOGETHER: usize = 2 * GROUP_ROWS;

/// Words of a row of `cols` BF16 in whole runs.
fn row_words(cols: usize) -> usize {
    cols.next_multiple_of(RUN) / 2
}

impl Native<'_> {
    /// All rows of a segment, one head.
    pub(super) fn expanded(&self, scratch: &mut Scratch, segment: &Segment, head: usize) {
        let (key, value) = (self.shape.nope + self.shape.rope, self.shape.value);
        let (units, width) = (key.div_ceil(2), value.next_multiple_of(32));
        let rows = segment.rows.next_multiple_of(GROUP_ROWS);
        let (keys_len, values_len) = (CHUNK * row_words(key), CHUNK * row_words(value));
        let parts = [
            rows * units,
            rows * (2 + width),
            scratch_len(TOGETHER),
            keys_len + values_len,
            CHUNK * key.max(value) + row_words(key),
            CHUNK * row_words(self.cache.width) + self.cache.width,
        ];
        let (_, [queries, found, scratch, made, wide, decoded]) = scratch.split(parts);
        let (keys, values) = made.split_at_mut(keys_len);
        let (decoded, row) = decoded.split_at_mut(CHUNK * row_words(self.cache.width));
        self.pack_queries(segment, head, queries, wide);
        let (maxima, rest) = found.split_at_mut(rows);
        let (sums, o) = rest.split_at_mut(rows);
        maxima.fill(f32::NEG_INFINITY);
        sums.fill(0.0);
        o.fill(0.0);
        let end = segment.start + segment.rows;
        for from in (0..end).step_by(CHUNK) {
            let n = CHUNK.min(end - from);
            let blocks =
                &self.blocks[segment.first_block + from / BLOCK_TOKENS..][..n.div_ceil(BLOCK_TOKENS)];
            let mut runs = [std::ptr::null(); CHUNK / BLOCK_TOKENS];
            let latents = self.rows_of(blocks, n, &mut runs, decoded, row);
            self.make_rows(self.kv_b.keys, head, latents, (key, true), wide, keys);
            self.make_rows(self.kv_b.values, head, latents, (value, false), wide, values);
            let (key_runs, value_runs) = ([keys.as_ptr().cast()], [values.as_ptr().cast()]);
            // Rows before the chunk see nothing of it.
            let unseen = from.saturating_sub(segment.start) / TOGETHER * TOGETHER;
            for first in (unseen..segment.rows).step_by(TOGETHER) {
                let seen = (segment.start + first + 1) as isize - from as isize;
                let chunk = AttendChunk {
                    queries: queries[first * units..].as_ptr().cast(),
                    units,
                    lanes: TOGETHER.min(segment.rows - first),
                    keys: Bf16Rows { runs: &key_runs, run: CHUNK, stride: row_words(key) * 4, n },
                    values: Bf16Rows { runs: &value_runs, run: CHUNK, stride: row_words(value) * 4, n },
                    width,
                    seen: (seen < n as isize).then_some(seen),
                    maxima: maxima[first..].as_mut_ptr(),
                    sums: sums[first..].as_mut_ptr(),
                    o: o[first * width..].as_mut_ptr(),
                    scratch: scratch.as_mut_ptr(),
                };
                // SAFETY: whole groups of queries, states and sums; rows of whole runs, `n` of each.
                unsafe { (self.kernels.attend_chunk)(&chunk) };
            }
        }
        for (r, (o, sum)) in o.chunks_exact(width).zip(&*sums).take(segment.rows).enumerate() {
            let out = self.out.at(((segment.row + r) * self.shape.heads + head) * value);
            for (d, v) in o[..value].iter().enumerate() {
                // SAFETY: only this task writes this head's output of this segment's rows.
                unsafe { *out.add(d) = v / sum };
            }
        }
    }

    /// The head's queries of all rows as panels; what pads the last one is zero.
    fn pack_queries(&self, segment: &Segment, head: usize, panels: &mut [f32], wide: &mut [f32]) {
        let key = self.shape.nope + self.shape.rope;
        let units = key.div_ceil(2);
        panels[segment.rows / GROUP_ROWS * GROUP_ROWS * units..].fill(0.0);
        let (scaled, words) = wide.split_at_mut(key);
        for r in 0..segment.rows {
            let q = self.query(segment.row + r, head);
            scaled.iter_mut().zip(q).for_each(|(s, q)| *s = q * self.scale());
            // SAFETY: room for whole runs.
            unsafe { self.kernels.round(Rounding::Bf16, scaled.as_ptr(), key, words.as_mut_ptr()) };
            let panel = &mut panels[r / GROUP_ROWS * GROUP_ROWS * units + r % GROUP_ROWS..];
            for (out, word) in panel.iter_mut().step_by(GROUP_ROWS).zip(&words[..units]) {
                *out = *word;
            }
        }
    }

    /// Keys, with the rotated part of the latent rows, or values, in BF16.
    fn make_rows(
        &self,
        panels: Panels,
        head: usize,
        latents: Bf16Rows<'_>,
        (cols, rotated): (usize, bool),
        wide: &mut [f32],
        out: &mut [f32],
    ) {
        let d = DotRows {
            panel: panels.at(head, 0),
            units: panels.units,
            cols: panels.rows,
            rows: latents,
            out: wide.as_mut_ptr(),
            out_stride: cols,
        };
        // SAFETY: the head's panel; latent rows go on with their rope part, which pairs with zeros of an odd panel.
        unsafe { (self.kernels.dot_rows)(&d) };
        let rows = wide.chunks_exact_mut(cols).zip(out.chunks_exact_mut(row_words(cols)));
        for (j, (made, out)) in rows.take(latents.n).enumerate() {
            if rotated {
                self.copy_rope(latents, j, &mut made[panels.rows..]);
            }
            // SAFETY: room for whole runs.
            unsafe { self.kernels.round(Rounding::Bf16, made.as_ptr(), cols, out.as_mut_ptr()) };
        }
    }

    /// The rope part of a latent row.
    fn copy_rope(&self, latents: Bf16Rows<'_>, j: usize, out: &mut [f32]) {
        let at = latents.runs[j / latents.run].wrapping_add(j % latents.run * latents.stride);
        for (i, o) in out.iter_mut().enumerate() {
            // SAFETY: the row has `latent + rope` values.
            let bits = unsafe { at.add((self.shape.latent + i) * 2).cast::<[u8; 2]>().read() };
            *o = bf16_to_f32(u16::from_le_bytes(bits));
        }
    }
}
