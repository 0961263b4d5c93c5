//! `mla_append`, `mla_attend`: attention over the paged latent cache.
//!
//! Both forms walk the cache in blocks of 64 positions from the first one on with a running softmax, whatever the
//! batch, so a row's result depends on its own sequence alone.

use oxseek_tensor::{
    Error,
    backend::{AttendMode, BLOCK_TOKENS, Buffer, Cache, MlaShape, Rope, Segment, Vector, Weight},
    error::expect,
};

use super::{matmul::Input, rope::rotate};
use crate::{
    CpuBackend,
    memory::{Scratch, Shared},
    simd::{Gemm, Kernels, Output, WeightRef, WeightedRows},
};

/// Most heads of one row that a task attends with: they share each cache row that it reads.
const HEADS_PER_TASK_MAX: usize = 8;

/// What one task attends.
#[derive(Clone, Copy)]
pub(crate) enum Task {
    /// One row, heads `from..to`.
    Absorbed { segment: Segment, row: usize, from: usize, to: usize },
    /// All rows of a segment, one head.
    Expanded { segment: Segment, head: usize },
}

impl CpuBackend {
    pub(crate) fn append_latent(
        &mut self,
        shape: &MlaShape,
        rope: Rope,
        weight: Vector,
        eps: f32,
        kv: Buffer,
        cache: Cache,
        layer: usize,
    ) -> Result<(), Error> {
        let op = "mla_append";
        let width = shape.latent + shape.rope;
        self.sized(op, kv, self.rows(), width)?;
        self.vector(op, weight, shape.latent)?;
        self.cache(op, cache, layer, shape)?;
        self.prepare_rope(op, rope, shape.rope)?;
        let (w, kv) = (&self.vectors[weight.0 as usize], &self.buffers[kv.0 as usize].values);
        let table = &self.ropes[rope.0 as usize].rows;
        let cache = &mut self.caches[cache.0 as usize];
        // One thread: a row is short, and two rows of a broken batch may name the same slot.
        for s in &self.step.segments {
            for r in s.row..s.row + s.rows {
                let position = s.start + r - s.row;
                let block = self.step.blocks[s.first_block + position / BLOCK_TOKENS];
                let at = cache.offset(layer, block, position % BLOCK_TOKENS);
                let (from, to) = (&kv[r * width..][..width], &mut cache.values[at..at + width]);
                let latent = shape.latent;
                // SAFETY: all three slices hold `latent` values.
                unsafe { (self.kernels.rms_norm)(from.as_ptr(), w.as_ptr(), eps, to.as_mut_ptr(), latent) };
                to[latent..].copy_from_slice(&from[latent..]);
                rotate(&mut to[latent..], &table[r * shape.rope..][..shape.rope]);
            }
        }
        Ok(())
    }

    pub(crate) fn attend(
        &mut self,
        shape: &MlaShape,
        q: Buffer,
        kv_b: Weight,
        cache: Cache,
        layer: usize,
        out: Buffer,
    ) -> Result<(), Error> {
        let op = "mla_attend";
        Self::apart(op, q, out)?;
        let w = self.matrix(op, kv_b)?;
        expect(op, "kv_b rows", shape.heads * (shape.nope + shape.value), w.rows())?;
        expect(op, "kv_b columns", shape.latent, w.cols())?;
        let (kv_b, kv_b_bytes) = (WeightRef::new(w), w.total_bytes());
        self.sized(op, q, self.rows(), shape.heads * (shape.nope + shape.rope))?;
        self.sized(op, out, self.rows(), shape.heads * shape.value)?;
        let c = self.cache(op, cache, layer, shape)?;
        let cache = CacheRows { rows: Input(c.values[c.offset(layer, 0, 0)..].as_ptr()), width: c.width() };
        let rows: usize = self.step.segments.iter().map(|s| s.start + s.rows).sum();
        self.profile.bytes += (kv_b_bytes + rows * (shape.latent + shape.rope) * 4) as u64;
        self.profile.attend(shape, &self.step.segments);
        self.count_to(self.rows().max(shape.heads));
        let tasks = self.attention_tasks(shape);
        let attention = Attention {
            shape: *shape,
            kernels: self.kernels,
            kv_b,
            cache,
            blocks: &self.step.blocks,
            identity: &self.identity,
            q: Input(self.buffers[q.0 as usize].values.as_ptr()),
            out: Shared::new(&mut self.buffers[out.0 as usize].values),
            panel_len: self.panel_len,
        };
        let scratch = &self.scratch;
        let result = self.pool.run(tasks.len(), &|task, thread| {
            // SAFETY: the pool gave this thread its number.
            let scratch = unsafe { scratch.of(thread) };
            match tasks[task] {
                Task::Absorbed { segment, row, from, to } => {
                    attention.absorbed(scratch, &segment, row, from, to);
                }
                Task::Expanded { segment, head } => attention.expanded(scratch, &segment, head),
            }
        });
        self.attention_tasks = tasks;
        result
    }

    fn attention_tasks(&mut self, shape: &MlaShape) -> Vec<Task> {
        let mut tasks = std::mem::take(&mut self.attention_tasks);
        tasks.clear();
        let group = shape.heads.div_ceil(self.pool.threads()).min(HEADS_PER_TASK_MAX);
        for &segment in &self.step.segments {
            match segment.mode {
                AttendMode::Expanded => {
                    tasks.extend((0..shape.heads).map(|head| Task::Expanded { segment, head }));
                }
                AttendMode::Absorbed => {
                    for row in 0..segment.rows {
                        tasks.extend((0..shape.heads).step_by(group).map(|from| {
                            let to = shape.heads.min(from + group);
                            Task::Absorbed { segment, row, from, to }
                        }));
                    }
                }
            }
        }
        tasks
    }
}

/// One layer of the cache.
#[derive(Clone, Copy)]
struct CacheRows {
    rows: Input,
    width: usize,
}

impl CacheRows {
    /// The first row of a block; block ids were checked against the cache.
    fn block(&self, id: u32) -> *const f32 {
        self.rows.get().wrapping_add(id as usize * BLOCK_TOKENS * self.width)
    }
}

struct Attention<'a> {
    shape: MlaShape,
    kernels: &'static Kernels,
    kv_b: WeightRef,
    cache: CacheRows,
    blocks: &'a [u32],
    identity: &'a [u32],
    q: Input,
    out: Shared,
    panel_len: usize,
}

impl Attention<'_> {
    /// First row of a head's key rows in `kv_b`; its value rows follow.
    fn key_row(&self, head: usize) -> usize {
        head * (self.shape.nope + self.shape.value)
    }

    /// Rows `rows` of `w` times `tokens` of `x`.
    ///
    /// # Safety
    /// As [`Gemm`] says; `panel` has `panel_len` values when `w` is not F32.
    unsafe fn gemm(
        &self,
        w: WeightRef,
        rows: std::ops::Range<usize>,
        (x, x_stride, tokens): (*const f32, usize, &[u32]),
        (out, out_stride): (*mut f32, usize),
        panel: &mut [f32],
    ) {
        let g = Gemm {
            w,
            rows,
            x,
            x_stride,
            tokens,
            out,
            out_stride,
            out_rows: &self.identity[..tokens.len()],
            output: Output::Store,
            panel: panel.as_mut_ptr(),
            panel_len: self.panel_len.min(panel.len()),
        };
        // SAFETY: the caller's promise.
        unsafe { (self.kernels.gemm)(&g) }
    }

    /// `q~ = W_UK^T q_nope`; scores against the latent rows; `o = W_UV (sum_s p_s c_s)`.
    fn absorbed(&self, scratch: &mut Scratch, segment: &Segment, row: usize, from: usize, to: usize) {
        let MlaShape { heads, nope, rope, value, latent, softmax_scale } = self.shape;
        let (width, group) = (latent + rope, to - from);
        let sizes = [group * width, group * latent, group * BLOCK_TOKENS, latent, group * 2, 0];
        let (panel, [q_latent, mean, scores, decoded, state, _]) = scratch.split(sizes);
        let q_row = self.q.get().wrapping_add((segment.row + row) * heads * (nope + rope));
        mean.fill(0.0);
        for h in 0..group {
            let q = q_row.wrapping_add((from + h) * (nope + rope));
            let (absorbed, rotated) = q_latent[h * width..][..width].split_at_mut(latent);
            let (first, out, row) = (self.key_row(from + h), absorbed.as_mut_ptr(), decoded.as_mut_ptr());
            // SAFETY: these are the head's key rows; `absorbed` and `decoded` hold `latent` values; q has `nope`.
            unsafe { (self.kernels.weighted_sum)(&self.kv_b, first, q, nope, out, row) };
            // SAFETY: the rope part of this head's query.
            rotated.copy_from_slice(unsafe { std::slice::from_raw_parts(q.add(nope), rope) });
            state[2 * h..2 * h + 2].copy_from_slice(&[f32::NEG_INFINITY, 0.0]);
        }
        let keys = segment.start + row + 1;
        for b in 0..keys.div_ceil(BLOCK_TOKENS) {
            let n = BLOCK_TOKENS.min(keys - b * BLOCK_TOKENS);
            let block = self.cache.block(self.blocks[segment.first_block + b]);
            // SAFETY: the block has `n` rows of `width` values, the query latents are `group` rows of it.
            unsafe {
                self.gemm(
                    WeightRef::rows_of(block, width, width),
                    0..n,
                    (q_latent.as_ptr(), width, &self.identity[..group]),
                    (scores.as_mut_ptr(), BLOCK_TOKENS),
                    &mut [],
                );
            }
            for h in 0..group {
                let weights = &mut scores[h * BLOCK_TOKENS..][..BLOCK_TOKENS];
                let o = &mut mean[h * latent..][..latent];
                let state = &mut state[2 * h..2 * h + 2];
                // SAFETY: 64 scores, `n` cache rows whose first `latent` values are summed into `o`.
                unsafe { self.accumulate(weights, n, softmax_scale, state, (block, width), o) };
            }
        }
        for h in 0..group {
            let inverse = 1.0 / state[2 * h + 1];
            mean[h * latent..][..latent].iter_mut().for_each(|v| *v *= inverse);
            let first = self.key_row(from + h) + nope;
            let out = self.out.at(((segment.row + row) * heads + from + h) * value);
            let token = [h as u32];
            // SAFETY: this head's value rows; only this task writes this row's and head's output.
            unsafe {
                self.gemm(
                    self.kv_b,
                    first..first + value,
                    (mean.as_ptr(), latent, &token),
                    (out, value),
                    panel,
                );
            }
        }
    }

    /// Keys and values of a block are expanded once and used by all rows of the segment.
    fn expanded(&self, scratch: &mut Scratch, segment: &Segment, head: usize) {
        let MlaShape { heads, nope, rope, value, latent, softmax_scale } = self.shape;
        let (rows, key, q_width) = (segment.rows, nope + rope, heads * (nope + rope));
        let sizes =
            [BLOCK_TOKENS * key, BLOCK_TOKENS * value, rows * BLOCK_TOKENS, rows * value, rows * 2, 0];
        let (panel, [keys, values, scores, o, state, _]) = scratch.split(sizes);
        o.fill(0.0);
        for s in state.chunks_exact_mut(2) {
            s.copy_from_slice(&[f32::NEG_INFINITY, 0.0]);
        }
        let end = segment.start + rows;
        let first = self.key_row(head);
        for b in 0..end.div_ceil(BLOCK_TOKENS) {
            let at = b * BLOCK_TOKENS;
            let n = BLOCK_TOKENS.min(end - at);
            let block = self.cache.block(self.blocks[segment.first_block + b]);
            let cached = (block, self.cache.width, &self.identity[..n]);
            // Rows before this block's first position do not see it.
            let from = at.saturating_sub(segment.start);
            let tokens = &self.identity[segment.row + from..segment.row + rows];
            // SAFETY: the block has `n` rows that begin with `latent` values; the scratch holds 64 keys and values and
            // 64 scores per row; the queries are this segment's rows.
            unsafe {
                self.gemm(self.kv_b, first..first + nope, cached, (keys.as_mut_ptr(), key), panel);
                for j in 0..n {
                    let rotated = block.add(j * self.cache.width + latent);
                    keys[j * key + nope..][..rope].copy_from_slice(std::slice::from_raw_parts(rotated, rope));
                }
                let value_rows = first + nope..first + nope + value;
                self.gemm(self.kv_b, value_rows, cached, (values.as_mut_ptr(), value), panel);
                self.gemm(
                    WeightRef::rows_of(keys.as_ptr(), key, key),
                    0..n,
                    (self.q.get().add(head * key), q_width, tokens),
                    (scores.as_mut_ptr(), BLOCK_TOKENS),
                    &mut [],
                );
            }
            for r in from..rows {
                let weights = &mut scores[(r - from) * BLOCK_TOKENS..][..BLOCK_TOKENS];
                let seen = BLOCK_TOKENS.min(segment.start + r + 1 - at);
                let (state, o) = (&mut state[2 * r..2 * r + 2], &mut o[r * value..][..value]);
                // SAFETY: 64 scores, `seen <= n` rows of `value` values.
                unsafe { self.accumulate(weights, seen, softmax_scale, state, (values.as_ptr(), value), o) };
            }
        }
        for r in 0..rows {
            let inverse = 1.0 / state[2 * r + 1];
            let out = self.out.at(((segment.row + r) * heads + head) * value);
            for (d, v) in o[r * value..][..value].iter().enumerate() {
                // SAFETY: only this task writes this head's output of this segment's rows.
                unsafe { *out.add(d) = v * inverse };
            }
        }
    }

    /// Adds a block to a running softmax: `state` is the maximum and the sum so far.
    ///
    /// # Safety
    /// 64 values at `scores`, the first `n` set; `n` rows at `v` of `o.len()` values.
    unsafe fn accumulate(
        &self,
        scores: &mut [f32],
        n: usize,
        scale: f32,
        state: &mut [f32],
        (v, stride): (*const f32, usize),
        o: &mut [f32],
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            let (max, sum) = (self.kernels.softmax_block)(scores.as_mut_ptr(), n, scale, state[0]);
            let keep = (state[0] - max).exp();
            state[0] = max;
            state[1] = state[1] * keep + sum;
            (self.kernels.weighted_rows)(&WeightedRows {
                p: scores.as_ptr(),
                n,
                v,
                stride,
                o: o.as_mut_ptr(),
                width: o.len(),
                keep,
            });
        }
    }
}
