//! `mla_append`, `mla_attend`.
//!
//! Both forms of attention are one function up to rounding, so every row takes the absorbed one: a row's bits do not
//! depend on how its prompt was cut.

use oxseek_tensor::{
    CacheFormat, Error,
    backend::{BLOCK_TOKENS, Buffer, Cache, KvB, MlaShape, Rope, Vector},
    error::{at_most, expect},
};

use super::matmul::{THREADS, WARPS};
use crate::{
    CudaBackend, LatentCache, RUN, Room,
    device::Pool,
    found,
    kernels::Kernel,
    queue::{Shape, arguments},
};

/// Threads of a block that attends for one head of one row.
const HEAD_THREADS: u32 = 128;
/// Absorbed queries that are kept at a time; more rows take turns.
const ABSORBED_BYTES_MAX: usize = 256 << 20;
/// Sums of blocks of the cache that are kept at a time.
const SUMS_BYTES_MAX: usize = 256 << 20;
/// Heads that a block of the tensor cores takes together, and values that one makes.
const HEADS: usize = 16;
const VALUES: usize = 32;
/// Values that a block for eight rows makes.
const VALUES_OF_EIGHT: usize = 128;
/// From so many rows on, `attend_values` has blocks enough to give each eight rows, which share the weights.
const VALUES_ROWS_MIN: usize = 64;
/// What every GPU that is supported gives a block.
const SHARED_BYTES_MAX: usize = 99 << 10;

/// The cache's format as the kernels count them.
fn format_code(format: CacheFormat) -> usize {
    CacheFormat::ALL.iter().position(|f| *f == format).unwrap_or_default()
}

impl LatentCache {
    fn layer(&self, layer: usize) -> u64 {
        self.at + (layer * self.shape.blocks * BLOCK_TOKENS * self.row_bytes) as u64
    }
}

impl CudaBackend {
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
        let (latent, turned) = (shape.latent, shape.rope);
        let weight = self.vector(op, weight, latent)?;
        let kv = self.sized(op, kv, self.rows(), latent + turned)?;
        let (cache, table) = (self.cache(op, cache, layer, shape)?, self.rope(op, rope, turned)?);
        let (rows, format) = (cache.layer(layer), format_code(cache.shape.format));
        let (frequencies, magnitude, row_bytes) = (table.frequencies, table.magnitude, cache.row_bytes);
        let shared = 4 * (latent + turned);
        at_most(op, "bytes of a row in F32", SHARED_BYTES_MAX, shared)?;
        let step = self.step_argument();
        let grid = Shape::new([self.rows(), 1, 1], THREADS).shared(shared);
        let arguments = arguments![
            kv.at,
            weight,
            eps,
            step,
            frequencies,
            magnitude,
            rows,
            format,
            latent,
            turned,
            row_bytes
        ];
        self.queue.push(Kernel::MlaAppend, grid, arguments);
        Ok(())
    }

    pub(crate) fn attend(
        &mut self,
        shape: &MlaShape,
        q: Buffer,
        kv_b: KvB,
        cache: Cache,
        layer: usize,
        out: Buffer,
    ) -> Result<(), Error> {
        let op = "mla_attend";
        let MlaShape { heads, nope, rope, value, latent, softmax_scale } = *shape;
        let factor = *found(op, "kv_b handle", &self.kv_bs, kv_b.0)?;
        let kv_b = factor.matrix;
        expect(op, "kv_b rows", heads * (nope + value), kv_b.rows)?;
        expect(op, "kv_b columns", latent, kv_b.cols)?;
        let (rows, width) = (self.rows(), nope + rope);
        Self::apart(op, q, out)?;
        let q = self.sized(op, q, rows, heads * width)?;
        self.touch(out);
        let to = out;
        let out = self.sized(op, out, rows, heads * value)?;
        let cache = self.cache(op, cache, layer, shape)?;
        if let Some(kv_b) = factor.rounded
            && takes_tensor_cores(shape, cache.shape.format)
        {
            let (layer, row_bytes) = (cache.layer(layer), cache.row_bytes);
            return self.attend_rounded(shape, q.at, kv_b, layer, row_bytes, to);
        }
        let (at, format, row_bytes) = (cache.layer(layer), format_code(cache.shape.format), cache.row_bytes);
        let shared = 4 * (2 * latent + rope + BLOCK_TOKENS);
        at_most(op, "bytes of a query in F32", SHARED_BYTES_MAX, shared)?;
        let per_row = heads * latent * 4;
        let together = (ABSORBED_BYTES_MAX / per_row).clamp(1, rows.max(1));
        let absorbed =
            Self::grow(&mut self.pool, &mut self.absorbed, "absorbed queries", &[together, per_row])?;
        let step = self.step_argument();
        for first in (0..rows).step_by(together) {
            let n = together.min(rows - first);
            let heads_of_rows = Shape::new([heads, n, 1], HEAD_THREADS);
            let absorb = arguments![kv_b.record, q.at, absorbed, first, heads, nope, rope, value];
            self.queue.push(Kernel::MlaAbsorb, heads_of_rows, absorb);
            let mean = arguments![
                absorbed,
                q.at,
                step,
                at,
                format,
                first,
                heads,
                nope,
                rope,
                latent,
                row_bytes,
                softmax_scale
            ];
            self.queue.push(Kernel::MlaMean, heads_of_rows.shared(shared), mean);
            let values = Shape::new([value.div_ceil(WARPS), heads, n], THREADS);
            let arguments = arguments![kv_b.record, absorbed, out.at, first, heads, nope, value];
            self.queue.push(Kernel::MlaValues, values, arguments);
        }
        Ok(())
    }

    /// Attention on the tensor cores: each block of the cache by itself, then the blocks in order.
    fn attend_rounded(
        &mut self,
        shape: &MlaShape,
        q: u64,
        kv_b: u64,
        layer: u64,
        row_bytes: usize,
        out: Buffer,
    ) -> Result<(), Error> {
        let op = "mla_attend";
        let MlaShape { heads, nope, rope, value, latent, softmax_scale } = *shape;
        let (rows, width) = (self.rows(), latent + rope);
        let (to, rounded) = (self.buffer(op, out)?.at, self.room_for_rounded(op, out)?);
        let longest = self.step.segments.iter().map(|s| s.start + s.rows).max().unwrap_or(1);
        // Rounded up, so that steps of about the same length are the same graph.
        let blocks = longest.div_ceil(BLOCK_TOKENS).next_power_of_two();
        let per_row = blocks * heads * latent * 4;
        let together = (SUMS_BYTES_MAX / per_row).clamp(1, rows.max(1));
        let room =
            |pool: &mut Pool, room: &mut Room, sizes: &[usize]| Self::grow(pool, room, "attention", sizes);
        let queries = room(&mut self.pool, &mut self.absorbed, &[together, heads, width, 2])?;
        let sums = room(&mut self.pool, &mut self.sums, &[together, per_row])?;
        let totals = room(&mut self.pool, &mut self.totals, &[together, blocks, heads, 8])?;
        let step = self.step_argument();
        for first in (0..rows).step_by(together) {
            let n = together.min(rows - first);
            let tokens = if n == 1 { 1 } else { 8 };
            let shared = 4 * tokens * (nope + 4 * RUN);
            let append = if n == rows { self.take_append(shape, q, layer, row_bytes) } else { None };
            let kernel = if n == 1 { Kernel::Absorb1 } else { Kernel::Absorb8 };
            let columns = latent / RUN + usize::from(append.is_some());
            let grid =
                Shape::new([columns, heads, n.div_ceil(tokens)], THREADS).shared(shared.max(4 * width));
            let [kv, weight, eps, frequencies, magnitude] = append.unwrap_or_default();
            let arguments = arguments![
                kv_b,
                q,
                queries,
                first,
                n,
                nope,
                rope,
                value,
                latent,
                step,
                kv,
                weight,
                eps,
                frequencies,
                magnitude,
                layer,
                row_bytes
            ];
            self.queue.push(kernel, grid, arguments);
            let grid = Shape::new([blocks, heads / HEADS, n], THREADS).shared(attend_bytes(width));
            let arguments =
                arguments![queries, step, layer, first, latent, rope, row_bytes, softmax_scale, sums, totals];
            self.queue.push(Kernel::AttendBlock, grid, arguments);
            let few = n < VALUES_ROWS_MIN;
            let (kernel, tokens, values) = if few {
                (Kernel::AttendValues1, 1, VALUES)
            } else {
                (Kernel::AttendValues8, 8, VALUES_OF_EIGHT)
            };
            let grid = Shape::new([value.div_ceil(values), heads, n.div_ceil(tokens)], THREADS);
            let grid = grid.shared(4 * tokens * latent);
            let arguments =
                arguments![kv_b, step, sums, totals, to, rounded, first, n, blocks, nope, value, latent];
            self.queue.push(kernel, grid, arguments);
        }
        self.buffers[out.0 as usize].rounded_rows = rows;
        Ok(())
    }
}

impl CudaBackend {
    /// When all that waits last is to rotate the queries `q` and to append the rows of the step to `layer`, both leave
    /// the line, and the caller does it: rows, norm, epsilon, frequencies and magnitude.
    fn take_append(&mut self, shape: &MlaShape, q: u64, layer: u64, row_bytes: usize) -> Option<[u64; 5]> {
        let MlaShape { heads, nope, rope, latent, .. } = *shape;
        let rows = self.rows() as u32;
        let (grid, words) = self.queue.last(Kernel::MlaAppend)?;
        let &[kv, weight, eps, _, _, _, _, frequencies, magnitude, at, format, latent_of, rope_of, bytes] =
            words
        else {
            return None;
        };
        let sizes = [format, latent_of, rope_of, bytes];
        let expected = [format_code(CacheFormat::Bf16), latent, rope, row_bytes].map(|n| n as u64);
        if grid.grid[0] != rows || at != layer || sizes != expected {
            return None;
        }
        let turn = [q, self.arrays.positions, frequencies, magnitude, heads as u64, nope as u64, rope as u64];
        let (grid, words) = self.queue.nth_last(1, Kernel::RopeQueries)?;
        if grid.grid[0] != rows || words != turn {
            return None;
        }
        self.queue.take_last();
        self.queue.take_last();
        Some([kv, weight, eps, frequencies, magnitude])
    }
}

/// Whether the sizes are those of `attend_block`'s tiles.
fn takes_tensor_cores(shape: &MlaShape, format: CacheFormat) -> bool {
    format == CacheFormat::Bf16
        && shape.heads.is_multiple_of(HEADS)
        && shape.latent.is_multiple_of(RUN)
        && shape.rope.is_multiple_of(16)
        && shape.nope.is_multiple_of(2)
        && attend_bytes(shape.latent + shape.rope) <= SHARED_BYTES_MAX
        && 4 * 8 * (shape.nope + 4 * RUN).max(shape.latent) <= SHARED_BYTES_MAX / 2
}

/// Shared memory of `attend_block`: 64 cached rows and 16 queries in BF16, weights and scores.
fn attend_bytes(width: usize) -> usize {
    2 * (BLOCK_TOKENS + HEADS) * (width + 8) + 2 * HEADS * (BLOCK_TOKENS + 8) + 4 * HEADS * (BLOCK_TOKENS + 2)
}
