//! Attention in BF16, absorbed: the heads of a row lie side by side and share each cache row that is read.
//!
//! Three forks: queries in latent space, scores and weighted sums over splits of the positions, values from what the
//! splits found. Splits have one length, from the first position on, so a row's bits depend on its position alone.

use std::ops::Range;

use oxseek_tensor::{
    Error,
    backend::{AttendMode, BLOCK_TOKENS, Buffer, MlaShape, Segment},
};

use super::{super::matmul::Input, expanded};
use crate::{
    CpuBackend,
    cache::LatentRows,
    kv_b::{KvBPanels, ROWS, RoundedInputs, SLICE},
    memory::{Scratch, Shared},
    packed::{GROUP_ROWS, RUN, Rounding},
    simd::{
        Kernels, WeightedRows,
        attention::{AttendChunk, CHUNK, CachedRows, RowRuns, scratch_len},
    },
};

/// F32 of what the splits of rows in flight found, unless one row takes more.
const FOUND_MAX: usize = 16 << 20;

/// Memory that attentions leave to each other.
#[derive(Default)]
pub(crate) struct NativeScratch {
    rows: Vec<Row>,
    works: Vec<Work>,
    /// Per row and group of heads, a panel of their queries.
    queries: Vec<f32>,
    /// Per row and split, the maxima, the sums and the weighted sums of all lanes.
    found: Vec<f32>,
}

/// A row that attends.
#[derive(Clone, Copy)]
struct Row {
    /// In the step.
    in_step: usize,
    /// Positions that it sees.
    keys: usize,
    first_block: usize,
    /// Where its splits begin in `found`.
    slot: usize,
}

/// A split of a row's positions, for some groups of heads.
struct Work {
    row: usize,
    split: usize,
    groups: Range<usize>,
}

/// What all tasks read.
pub(super) struct Native<'a> {
    pub(super) shape: MlaShape,
    pub(super) kernels: &'static Kernels,
    pub(super) kv_b: KvBPanels,
    pub(super) cache: LatentRows,
    pub(super) blocks: &'a [u32],
    rows: &'a [Row],
    q: Input,
    queries: Shared,
    found: Shared,
    pub(super) out: Shared,
}

impl CpuBackend {
    pub(super) fn attend_natively(
        &mut self,
        shape: &MlaShape,
        q: Buffer,
        kv_b: KvBPanels,
        cache: LatentRows,
        out: Buffer,
    ) -> Result<(), Error> {
        let mut memory = std::mem::take(&mut self.attention);
        memory.rows.clear();
        for s in self.step.segments.iter().filter(|s| s.mode == AttendMode::Absorbed) {
            for r in 0..s.rows {
                let keys = s.start + r + 1;
                memory.rows.push(Row { in_step: s.row + r, keys, first_block: s.first_block, slot: 0 });
            }
        }
        let sizes = Sizes::new(shape, cache.width);
        let (mut first, mut result) = (0, self.attend_expanded(shape, q, kv_b, cache, out));
        while first < memory.rows.len() && result.is_ok() {
            let n = sizes.place(&mut memory.rows[first..]);
            result = self.attend_rows(shape, q, kv_b, cache, out, &mut memory, first..first + n);
            first += n;
        }
        self.attention = memory;
        result
    }

    /// The segments whose rows attend to keys and values.
    fn attend_expanded(
        &mut self,
        shape: &MlaShape,
        q: Buffer,
        kv_b: KvBPanels,
        cache: LatentRows,
        out: Buffer,
    ) -> Result<(), Error> {
        let expanded = |s: &&Segment| s.mode == AttendMode::Expanded;
        let segments: Vec<Segment> = self.step.segments.iter().filter(expanded).copied().collect();
        let native = Native {
            shape: *shape,
            kernels: self.kernels,
            kv_b,
            cache,
            blocks: &self.step.blocks,
            rows: &[],
            q: Input(self.buffers[q.0 as usize].values.as_ptr()),
            queries: Shared::new(&mut []),
            found: Shared::new(&mut []),
            out: Shared::new(&mut self.buffers[out.0 as usize].values),
        };
        let (scratch, heads) = (&self.scratch, shape.heads);
        let parts = (2 * self.pool.threads()).div_ceil((segments.len() * heads).max(1));
        let works: Vec<(Segment, usize)> = (segments.iter())
            .flat_map(|s| expanded::divide(s, parts))
            .flat_map(|part| (0..heads).map(move |head| (part, head)))
            .collect();
        self.pool.run(works.len(), &|task, thread| {
            let (part, head) = &works[task];
            // SAFETY: the pool gave this thread its number.
            native.expanded(unsafe { scratch.of(thread) }, part, *head);
        })
    }

    fn attend_rows(
        &mut self,
        shape: &MlaShape,
        q: Buffer,
        kv_b: KvBPanels,
        cache: LatentRows,
        out: Buffer,
        memory: &mut NativeScratch,
        rows: Range<usize>,
    ) -> Result<(), Error> {
        let sizes = Sizes::new(shape, cache.width);
        let rows = &memory.rows[rows];
        let slots: usize = rows.iter().map(Row::splits).sum();
        grow(&mut memory.queries, rows.len() * sizes.queries);
        grow(&mut memory.found, slots * sizes.slot);
        memory.works.clear();
        let groups_each = sizes.groups.div_ceil((2 * self.pool.threads()).div_ceil(slots));
        for (row, r) in rows.iter().enumerate() {
            // The long splits first, so that the threads end together.
            for split in (0..r.splits()).rev() {
                memory.works.extend((0..sizes.groups).step_by(groups_each).map(|g| Work {
                    row,
                    split,
                    groups: g..sizes.groups.min(g + groups_each),
                }));
            }
        }
        let native = Native {
            shape: *shape,
            kernels: self.kernels,
            kv_b,
            cache,
            blocks: &self.step.blocks,
            rows,
            q: Input(self.buffers[q.0 as usize].values.as_ptr()),
            queries: Shared::new(&mut memory.queries),
            found: Shared::new(&mut memory.found),
            out: Shared::new(&mut self.buffers[out.0 as usize].values),
        };
        let (scratch, works) = (&self.scratch, &memory.works);
        let (slices, batches) = (shape.latent.div_ceil(SLICE), rows.len().div_ceil(ROWS));
        let batch = |i: usize| i * ROWS..rows.len().min((i + 1) * ROWS);
        self.pool.run(sizes.groups * slices * batches, &|task, thread| {
            // SAFETY: the pool gave this thread its number.
            let scratch = unsafe { scratch.of(thread) };
            let (place, slice) = (task / slices, task % slices);
            native.queries(scratch, place % sizes.groups, slice, batch(place / sizes.groups));
        })?;
        self.pool.run(works.len(), &|task, thread| {
            // SAFETY: the pool gave this thread its number.
            native.sums(unsafe { scratch.of(thread) }, &works[task]);
        })?;
        self.pool.run(shape.heads * batches, &|task, thread| {
            // SAFETY: the pool gave this thread its number.
            let scratch = unsafe { scratch.of(thread) };
            native.values(scratch, task % shape.heads, batch(task / shape.heads));
        })
    }
}

fn grow(list: &mut Vec<f32>, len: usize) {
    if list.len() < len {
        list.resize(len, 0.0);
    }
}

impl Row {
    fn splits(&self) -> usize {
        let mut splits = 0;
        while split_start(splits) < self.keys {
            splits += 1;
        }
        splits
    }
}

/// The first position of a split. The first ones are short, so that threads share short contexts too; the later ones
/// are long enough that adding splits up costs little.
fn split_start(split: usize) -> usize {
    CHUNK
        * match split {
            0..4 => split,
            4..10 => 4 + (split - 4) * 2,
            _ => 16 + (split - 10) * 4,
        }
}

/// Sizes in F32, or words of four bytes.
#[derive(Clone, Copy)]
struct Sizes {
    /// Groups of heads.
    groups: usize,
    lanes: usize,
    /// Pairs of a cache row.
    units: usize,
    /// Latent values in whole vectors.
    width: usize,
    /// All panels of a row.
    queries: usize,
    /// What one split found.
    slot: usize,
}

impl Sizes {
    fn new(shape: &MlaShape, cache_width: usize) -> Self {
        let groups = shape.heads.div_ceil(GROUP_ROWS);
        let (lanes, units) = (groups * GROUP_ROWS, cache_width.div_ceil(2));
        let width = shape.latent.next_multiple_of(32);
        Self { groups, lanes, units, width, queries: lanes * units, slot: lanes * (2 + width) }
    }

    /// Gives rows their slots; says how many fit at a time.
    fn place(&self, rows: &mut [Row]) -> usize {
        let (most, mut slots) = (FOUND_MAX / self.slot, 0);
        for (i, row) in rows.iter_mut().enumerate() {
            if i > 0 && slots + row.splits() > most {
                return i;
            }
            row.slot = slots;
            slots += row.splits();
        }
        rows.len()
    }
}

impl Native<'_> {
    fn sizes(&self) -> Sizes {
        Sizes::new(&self.shape, self.cache.width)
    }

    /// `softmax_scale * log2(e)`: scores become powers of two.
    pub(super) fn scale(&self) -> f32 {
        self.shape.softmax_scale * std::f32::consts::LOG2_E
    }

    /// One slice of `W_UK^T q_nope` of a group's heads; the last slice brings the rope part along.
    fn queries(&self, scratch: &mut Scratch, group: usize, slice: usize, rows: Range<usize>) {
        let MlaShape { heads, nope, rope, latent, .. } = self.shape;
        let (sizes, first) = (self.sizes(), slice * SLICE);
        let cols = SLICE.min(latent - first);
        let last = first + cols == latent;
        let (absorb, rounding) = (&self.kv_b.absorb, self.kv_b.absorb.rounding());
        let (stride, made_stride) = (rounding.row_words(nope), SLICE + rope);
        let parts = [
            ROWS * stride,
            ROWS * made_stride,
            nope.max(rope),
            made_stride.next_multiple_of(RUN),
            ROWS * stride,
            0,
        ];
        let (_, [nopes, made, scaled, words, tiled, _]) = scratch.split(parts);
        let n = cols + if last { rope } else { 0 };
        for lane in 0..GROUP_ROWS {
            let head = group * GROUP_ROWS + lane;
            if head < heads {
                for (i, row) in self.rows[rows.clone()].iter().enumerate() {
                    let q = self.query(row.in_step, head);
                    scaled.iter_mut().zip(&q[..nope]).for_each(|(s, q)| *s = q * self.scale());
                    // SAFETY: the row has room for `nope` values in whole runs.
                    unsafe {
                        let out = nopes.as_mut_ptr().add(i * stride);
                        self.kernels.round(rounding, scaled.as_ptr(), nope, out);
                    }
                }
                let mut x = RoundedInputs { words: nopes, row_words: stride, n: rows.len(), tiled };
                // SAFETY: the head has these outputs; the rows hold `nope` values, padded with zeros.
                unsafe {
                    absorb.multiply(self.kernels, head, first..first + cols, &mut x, made, made_stride);
                };
            }
            for (i, r) in rows.clone().enumerate() {
                if head < heads {
                    let made = &mut made[i * made_stride..][..n];
                    if last {
                        let q = &self.query(self.rows[r].in_step, head)[nope..];
                        made[cols..].iter_mut().zip(q).for_each(|(m, q)| *m = q * self.scale());
                    }
                    // SAFETY: room for whole runs.
                    unsafe { self.kernels.round(Rounding::Bf16, made.as_ptr(), n, words.as_mut_ptr()) };
                } else {
                    words.fill(0.0);
                }
                let panel = r * sizes.queries + (group * sizes.units + first / 2) * GROUP_ROWS + lane;
                for (u, word) in words[..n.div_ceil(2)].iter().enumerate() {
                    // As integers: a word may look like a signalling NaN.
                    // SAFETY: this task writes these units of the group's panel of these rows.
                    unsafe {
                        let out = self.queries.at(panel + u * GROUP_ROWS).cast::<u32>();
                        out.write(word.to_bits());
                    }
                }
            }
        }
    }

    /// A head's query of a row of the step.
    pub(super) fn query(&self, row: usize, head: usize) -> &[f32] {
        let width = self.shape.nope + self.shape.rope;
        let at = self.q.get().wrapping_add((row * self.shape.heads + head) * width);
        // SAFETY: the buffer has the row, and nobody writes it during the fork.
        unsafe { std::slice::from_raw_parts(at, width) }
    }

    /// Where a split of a row begins in `found`: maxima, sums, weighted sums.
    fn slot(&self, row: &Row, split: usize) -> *mut f32 {
        self.found.at((row.slot + split) * self.sizes().slot)
    }

    /// The running softmax of some groups of heads over one split.
    fn sums(&self, scratch: &mut Scratch, work: &Work) {
        let (sizes, row) = (self.sizes(), &self.rows[work.row]);
        let (first, end) = (work.groups.start * GROUP_ROWS, work.groups.end * GROUP_ROWS);
        let (lanes, width) = (end.min(self.shape.heads) - first, self.cache.width);
        let stride = width.next_multiple_of(32) / 2;
        let decoded = if self.cache.in_place() { 0 } else { CHUNK * stride };
        let (_, [scratch, decoded, ..]) = scratch.split([scratch_len(lanes), decoded, 0, 0, 0, 0]);
        let slot = self.slot(row, work.split);
        let (maxima, sums) = (slot.wrapping_add(first), slot.wrapping_add(sizes.lanes + first));
        let o = slot.wrapping_add(2 * sizes.lanes + first * sizes.width);
        // SAFETY: these lanes of the slot belong to this task.
        unsafe {
            std::slice::from_raw_parts_mut(maxima, end - first).fill(f32::NEG_INFINITY);
            std::slice::from_raw_parts_mut(sums, end - first).fill(0.0);
            std::slice::from_raw_parts_mut(o, (end - first) * sizes.width).fill(0.0);
        }
        let panel = work.row * sizes.queries + work.groups.start * sizes.units * GROUP_ROWS;
        let end = row.keys.min(split_start(work.split + 1));
        for from in (split_start(work.split)..end).step_by(CHUNK) {
            let n = CHUNK.min(end - from);
            let blocks = &self.blocks[row.first_block + from / BLOCK_TOKENS..]
                [..(row.keys - from).div_ceil(BLOCK_TOKENS)];
            let mut runs = [std::ptr::null(); CHUNK / BLOCK_TOKENS];
            let keys = self.rows_of(blocks, n, &mut runs, decoded);
            let chunk = AttendChunk {
                queries: self.queries.at(panel).cast(),
                units: sizes.units,
                lanes,
                keys,
                values: keys,
                width: sizes.width,
                seen: None,
                maxima,
                sums,
                o,
                scratch: scratch.as_mut_ptr(),
            };
            // SAFETY: the panel was made by the fork before; rows are padded to whole pairs and vectors.
            unsafe { (self.kernels.attend_chunk)(&chunk) };
        }
    }

    /// The first `n` cached rows of some blocks in BF16: where they lie, or decoded.
    pub(super) fn rows_of<'a>(
        &self,
        blocks: &[u32],
        n: usize,
        runs: &'a mut [*const u8; CHUNK / BLOCK_TOKENS],
        decoded: &mut [f32],
    ) -> RowRuns<'a> {
        let count = n.div_ceil(BLOCK_TOKENS);
        let mut stored = [std::ptr::null(); CHUNK / BLOCK_TOKENS];
        for (run, block) in stored.iter_mut().zip(blocks) {
            *run = self.cache.block(*block);
        }
        if self.cache.in_place() {
            *runs = stored;
            let next = blocks.get(count).map_or(std::ptr::null(), |block| self.cache.block(*block));
            return RowRuns { next, ..RowRuns::new(&runs[..count], BLOCK_TOKENS, self.cache.row_bytes, n) };
        }
        let rows = RowRuns::new(&stored[..count], BLOCK_TOKENS, self.cache.row_bytes, n);
        let (latent, width) = (self.cache.latent, self.cache.width);
        let stride = width.next_multiple_of(32) * 2;
        let out = decoded.as_mut_ptr().cast();
        let cached = CachedRows {
            format: self.cache.format,
            latent,
            rope: width - latent,
            rows,
            out,
            out_stride: stride,
        };
        // SAFETY: rows of the cache; `decoded` has room for a chunk of them.
        unsafe { (self.kernels.decode_rows)(&cached) };
        runs[0] = out;
        RowRuns::new(&runs[..1], CHUNK, stride, n)
    }

    /// The values of a head from what the splits found.
    fn values(&self, scratch: &mut Scratch, head: usize, rows: Range<usize>) {
        let MlaShape { heads, value, latent, .. } = self.shape;
        let (means, rounding) = (&self.kv_b.means, self.kv_b.means.rounding());
        let (sizes, stride) = (self.sizes(), rounding.row_words(latent));
        let splits = self.rows[rows.clone()].iter().map(Row::splits).max().unwrap_or(1);
        let parts = [ROWS * stride, latent, splits, ROWS * value, ROWS * stride, 0];
        let (_, [rounded, mean, weights, made, tiled, _]) = scratch.split(parts);
        for (i, row) in self.rows[rows.clone()].iter().enumerate() {
            let weights = &mut weights[..row.splits()];
            self.split_weights(row, head, weights);
            mean.fill(0.0);
            let first = self.slot(row, 0).wrapping_add(2 * sizes.lanes + head * sizes.width);
            // SAFETY: each split has this head's sums; the row has room for whole runs.
            unsafe {
                (self.kernels.weighted_rows)(&WeightedRows {
                    p: weights.as_ptr(),
                    n: weights.len(),
                    v: first,
                    stride: sizes.slot,
                    o: mean.as_mut_ptr(),
                    width: latent,
                    keep: 0.0,
                });
                let out = rounded.as_mut_ptr().add(i * stride);
                self.kernels.round(rounding, mean.as_ptr(), latent, out);
            }
        }
        let mut x = RoundedInputs { words: rounded, row_words: stride, n: rows.len(), tiled };
        // SAFETY: all of the head's outputs; the rows hold `latent` values, padded with zeros.
        unsafe { means.multiply(self.kernels, head, 0..value, &mut x, made, value) };
        for (made, row) in made.chunks_exact(value).zip(&self.rows[rows]) {
            let out = self.out.at((row.in_step * heads + head) * value);
            // SAFETY: only this task writes this head's output of these rows.
            unsafe { std::ptr::copy_nonoverlapping(made.as_ptr(), out, value) };
        }
    }

    /// What each split counts for: its part of the softmax's sum, over its own.
    fn split_weights(&self, row: &Row, head: usize, weights: &mut [f32]) {
        let lanes = self.sizes().lanes;
        // SAFETY: every split of the row has its maxima and sums.
        let state =
            |split| unsafe { (*self.slot(row, split).add(head), *self.slot(row, split).add(lanes + head)) };
        let max = (0..weights.len()).fold(f32::NEG_INFINITY, |m, s| m.max(state(s).0));
        let mut sum = 0.0;
        for (split, weight) in weights.iter_mut().enumerate() {
            let (own, part) = state(split);
            *weight = (own - max).exp2();
            sum += *weight * part;
        }
        weights.iter_mut().for_each(|w| *w /= sum);
    }
}
