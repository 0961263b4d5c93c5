//! Attention in BF16, expanded: sixteen rows of a prompt lie side by side and share each key and value.
//!
//! Keys and values of a chunk of positions are made once per head and step, and used by all rows of the segment.

use std::ops::Range;

use oxseek_tensor::{
    backend::{BLOCK_TOKENS, Segment},
    dtype::bf16_to_f32,
};

use super::native::Native;
use crate::{
    kv_b::Panels,
    memory::Scratch,
    packed::{GROUP_ROWS, RUN, Rounding},
    simd::attention::{AttendChunk, CHUNK, DotRows, RowRuns, scratch_len},
};

/// Rows that pass over a chunk together.
const TOGETHER: usize = 2 * GROUP_ROWS;

/// Words of a row of `cols` BF16 in whole vectors: rows closer together than whole runs use all sets of a cache.
fn row_words(cols: usize) -> usize {
    cols.next_multiple_of(32) / 2
}

/// Words that rounding may write beyond a row, to the end of a run. The next row is made after it.
const BEYOND: usize = RUN / 2;

/// Positions whose keys and values are made at a time: a part of the L2 cache.
const SPAN: usize = 4 * CHUNK;
/// A part of a segment has at least so many rows: each part makes all keys and values anew.
const PART_ROWS_MIN: usize = 128;

/// At most `parts` parts of a segment, the last first: it sees most. A row's result does not depend on its part.
pub(super) fn divide(segment: &Segment, parts: usize) -> impl Iterator<Item = Segment> {
    let parts = parts.min(segment.rows / PART_ROWS_MIN).max(1);
    let each = segment.rows.div_ceil(parts).next_multiple_of(TOGETHER);
    let segment = *segment;
    (0..segment.rows).step_by(each).rev().map(move |from| Segment {
        row: segment.row + from,
        rows: each.min(segment.rows - from),
        start: segment.start + from,
        ..segment
    })
}

/// The rows of a segment while they pass over the positions.
struct Passing<'a> {
    queries: &'a [f32],
    /// Pairs of a query.
    units: usize,
    maxima: &'a mut [f32],
    sums: &'a mut [f32],
    o: &'a mut [f32],
    /// Values of a row of `o`.
    width: usize,
    scratch: &'a mut [f32],
}

/// Keys and values of some positions, for one head.
struct Span<'a> {
    keys: &'a [f32],
    values: &'a [f32],
    positions: Range<usize>,
}

impl Native<'_> {
    /// All rows of a segment, one head.
    pub(super) fn expanded(&self, scratch: &mut Scratch, segment: &Segment, head: usize) {
        let (key, value) = (self.shape.nope + self.shape.rope, self.shape.value);
        let (units, width) = (key.div_ceil(2), value.next_multiple_of(32));
        let rows = segment.rows.next_multiple_of(GROUP_ROWS);
        let (keys_len, values_len) = (SPAN * row_words(key) + BEYOND, SPAN * row_words(value) + BEYOND);
        let parts = [
            rows * units,
            rows * (2 + width),
            scratch_len(TOGETHER),
            keys_len + values_len,
            CHUNK * key.max(value) + row_words(key) + BEYOND,
            CHUNK * row_words(self.cache.width),
        ];
        let (_, [queries, found, scratch, made, wide, decoded]) = scratch.split(parts);
        let (keys, values) = made.split_at_mut(keys_len);
        self.pack_queries(segment, head, queries, wide);
        let (maxima, rest) = found.split_at_mut(rows);
        let (sums, o) = rest.split_at_mut(rows);
        maxima.fill(f32::NEG_INFINITY);
        sums.fill(0.0);
        o.fill(0.0);
        let mut passing = Passing { queries, units, maxima, sums, o, width, scratch };
        let end = segment.start + segment.rows;
        for from in (0..end).step_by(SPAN) {
            let to = end.min(from + SPAN);
            for chunk in (from..to).step_by(CHUNK) {
                let keys = &mut keys[(chunk - from) * row_words(key)..];
                let values = &mut values[(chunk - from) * row_words(value)..];
                let n = CHUNK.min(to - chunk);
                self.make_chunk(segment, head, (chunk, n), [keys, values], wide, decoded);
            }
            self.pass(segment, &mut passing, &Span { keys, values, positions: from..to });
        }
        for (r, (o, sum)) in passing.o.chunks_exact(width).zip(&*passing.sums).take(segment.rows).enumerate()
        {
            let out = self.out.at(((segment.row + r) * self.shape.heads + head) * value);
            for (d, v) in o[..value].iter().enumerate() {
                // SAFETY: only this task writes this head's output of this segment's rows.
                unsafe { *out.add(d) = v / sum };
            }
        }
    }

    /// Keys and values of the `n` positions from `first` on.
    fn make_chunk(
        &self,
        segment: &Segment,
        head: usize,
        (first, n): (usize, usize),
        [keys, values]: [&mut [f32]; 2],
        wide: &mut [f32],
        decoded: &mut [f32],
    ) {
        let end = (segment.start + segment.rows).div_ceil(BLOCK_TOKENS);
        let blocks = &self.blocks[segment.first_block..][first / BLOCK_TOKENS..end];
        let mut runs = [std::ptr::null(); CHUNK / BLOCK_TOKENS];
        let latents = self.rows_of(blocks, n, &mut runs, decoded);
        let (key, value) = (self.shape.nope + self.shape.rope, self.shape.value);
        self.make_rows(self.kv_b.keys, head, latents, (key, true), wide, keys);
        self.make_rows(self.kv_b.values, head, latents, (value, false), wide, values);
    }

    /// Takes the rows over a span, some at a time, so that what they found stays near.
    fn pass(&self, segment: &Segment, p: &mut Passing<'_>, span: &Span<'_>) {
        let (key, value) = (self.shape.nope + self.shape.rope, self.shape.value);
        let (key_words, value_words) = (row_words(key), row_words(value));
        let Range { start, end } = span.positions;
        // Rows before the span see nothing of it.
        let unseen = start.saturating_sub(segment.start) / TOGETHER * TOGETHER;
        for first in (unseen..segment.rows).step_by(TOGETHER) {
            let lanes = TOGETHER.min(segment.rows - first);
            let last = segment.start + first + lanes - 1;
            for from in (start..end.min(last + 1)).step_by(CHUNK) {
                let n = CHUNK.min(end - from);
                let seen = (segment.start + first + 1) as isize - from as isize;
                let key_runs = [span.keys[(from - start) * key_words..].as_ptr().cast()];
                let value_runs = [span.values[(from - start) * value_words..].as_ptr().cast()];
                let chunk = AttendChunk {
                    queries: p.queries[first * p.units..].as_ptr().cast(),
                    units: p.units,
                    lanes,
                    keys: RowRuns::new(&key_runs, CHUNK, key_words * 4, n),
                    values: RowRuns::new(&value_runs, CHUNK, value_words * 4, n),
                    width: p.width,
                    seen: (seen < n as isize).then_some(seen),
                    maxima: p.maxima[first..].as_mut_ptr(),
                    sums: p.sums[first..].as_mut_ptr(),
                    o: p.o[first * p.width..].as_mut_ptr(),
                    scratch: p.scratch.as_mut_ptr(),
                };
                // SAFETY: whole groups of queries, states and sums; rows of whole runs, `n` of each.
                unsafe { (self.kernels.attend_chunk)(&chunk) };
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
        latents: RowRuns<'_>,
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
        for (j, made) in wide.chunks_exact_mut(cols).take(latents.n).enumerate() {
            if rotated {
                self.copy_rope(latents, j, &mut made[panels.rows..]);
            }
            let out = &mut out[j * row_words(cols)..][..row_words(cols) + BEYOND];
            // SAFETY: room for whole runs.
            unsafe { self.kernels.round(Rounding::Bf16, made.as_ptr(), cols, out.as_mut_ptr()) };
        }
    }

    /// The rope part of a latent row.
    fn copy_rope(&self, latents: RowRuns<'_>, j: usize, out: &mut [f32]) {
        let at = latents.runs[j / latents.run].wrapping_add(j % latents.run * latents.stride);
        for (i, o) in out.iter_mut().enumerate() {
            // SAFETY: the row has `latent + rope` values.
            let bits = unsafe { at.add((self.shape.latent + i) * 2).cast::<[u8; 2]>().read() };
            *o = bf16_to_f32(u16::from_le_bytes(bits));
        }
    }
}
