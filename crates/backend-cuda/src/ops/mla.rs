//! `mla_append`, `mla_attend`.
//!
//! Both forms of attention are one function up to rounding, so every row takes the absorbed one, and rows of prompts
//! get the bits of single rows: a row does not depend on how its prompt was cut.

use oxseek_tensor::{
    CacheFormat, Error,
    backend::{BLOCK_TOKENS, Buffer, Cache, KvB, MlaShape, Rope, Segment, Vector},
    error::{at_most, expect},
};

use super::matmul::{GEMM_ALIGN, GEMM_ROWS, GEMM_THREADS, THREADS, WARPS};
use crate::{
    COLUMNS, CudaBackend, LatentCache, Product, RUN, Room, RoundedKvB,
    device::Pool,
    found,
    kernels::Kernel,
    queue::{Shape, arguments},
};

/// Threads of a block that attends for one head of one row.
const HEAD_THREADS: u32 = 128;
/// Absorbed queries that are kept at a time; more rows take turns.
const ABSORBED_BYTES_MAX: usize = 256 << 20;
/// The same of rows of prompts.
const QUERIES_BYTES_MAX: usize = 256 << 20;
/// Sums of blocks of the cache that are kept at a time.
const SUMS_BYTES_MAX: usize = 256 << 20;
/// Heads that a block of the tensor cores takes together, and values that one makes.
const HEADS: usize = 16;
const VALUES: usize = 32;
/// Rows that `absorb` takes together, and values that a block for eight rows makes.
const ROWS: usize = 8;
const VALUES_OF_EIGHT: usize = 128;
/// Most columns of a head's queries that `absorb` multiplies.
const NOPE_MAX: usize = RUN;
/// What `attend_rows` is made for: columns of the latent and the rope part, rows of the step together; and how many
/// rows of a sequence are worth it.
const ROWS_OF_PROMPT: (usize, usize, usize) = (512, 64, 4);
const ROWS_OF_PROMPT_MIN: usize = 4;
/// Sixteens of heads of all rows from which on each has a multiprocessor of its own.
const ROWS_ALONE_MIN: usize = 32;
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
            for (first, n, prompt) in self.ranges(shape) {
                let range = (first, n);
                if prompt {
                    self.attend_prompts(shape, q.at, kv_b, layer, row_bytes, to, range)?;
                } else {
                    self.attend_rounded(shape, q.at, kv_b, layer, row_bytes, to, range)?;
                }
            }
            self.buffers[to.0 as usize].rounded_rows = rows;
            return Ok(());
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

    /// Whether there are kernels made for these sizes.
    fn made_for(&self, shape: &MlaShape) -> bool {
        let (latent, rope, _) = ROWS_OF_PROMPT;
        self.device.overlaps() && (shape.latent, shape.rope) == (latent, rope)
    }

    /// The values of means in BF16.
    fn values_of_means(
        &mut self,
        shape: &MlaShape,
        kv_b: RoundedKvB,
        means: u64,
        (to, rounded): (u64, u64),
        (first, n): (usize, usize),
    ) {
        let MlaShape { heads, value, latent, .. } = *shape;
        let tokens = self.device.wide(Product::Bf16);
        let tiles = heads * n.div_ceil(tokens) * value.div_ceil(GEMM_ROWS);
        let blocks = tiles.min(self.device.multiprocessors());
        let grid = Shape::new([blocks, 1, 1], GEMM_THREADS).shared(self.gemm_bytes(Product::Bf16, tokens));
        let arguments = arguments![kv_b.values, means, to, rounded, first, n, heads, value, latent];
        self.queue.push(Kernel::ValuesRows, grid, arguments);
    }

    /// Rows of the step in order: first, how many, and whether they are rows of prompts.
    fn ranges(&self, shape: &MlaShape) -> Vec<(usize, usize, bool)> {
        let made_for = self.made_for(shape);
        let mut ranges: Vec<(usize, usize, bool)> = Vec::new();
        for s in &self.step.segments {
            let prompt = made_for && s.rows >= ROWS_OF_PROMPT_MIN;
            match ranges.last_mut() {
                Some((first, n, same)) if *same == prompt && *first + *n == s.row => *n += s.rows,
                _ => ranges.push((s.row, s.rows, prompt)),
            }
        }
        ranges
    }

    /// Attention of rows of prompts, whose weights are worth a product of their own.
    fn attend_prompts(
        &mut self,
        shape: &MlaShape,
        q: u64,
        kv_b: RoundedKvB,
        layer: u64,
        row_bytes: usize,
        out: Buffer,
        (from, rows): (usize, usize),
    ) -> Result<(), Error> {
        let op = "mla_attend";
        let MlaShape { heads, nope, rope, latent, softmax_scale, .. } = *shape;
        let (to, rounded) = (self.buffer(op, out)?.at, self.room_for_rounded(op, out)?);
        let (padded, width, per_tile) = (nope.next_multiple_of(COLUMNS), latent + rope, ROWS_OF_PROMPT.2);
        let together = (QUERIES_BYTES_MAX / (heads * width * 2)).clamp(1, rows.max(1));
        let room =
            |pool: &mut Pool, room: &mut Room, sizes: &[usize]| Self::grow(pool, room, "attention", sizes);
        let queries = room(&mut self.pool, &mut self.absorbed, &[together, heads, width, 2])?;
        let of_nope = room(&mut self.pool, &mut self.of_nope, &[together, heads, padded, 2])?;
        let means = room(&mut self.pool, &mut self.means, &[together, heads, latent, 2])?;
        let (step, tokens) = (self.step_argument(), self.device.wide(Product::Bf16));
        let (most, shared) = (self.device.multiprocessors(), self.gemm_bytes(Product::Bf16, tokens));
        for first in (from..from + rows).step_by(together) {
            let n = together.min(from + rows - first);
            let tiles = heads * n.div_ceil(tokens) * latent.div_ceil(GEMM_ROWS);
            let products = Shape::new([tiles.min(most), 1, 1], GEMM_THREADS).shared(shared);
            let arguments = arguments![q, of_nope, queries, first, heads, nope, padded, rope, latent];
            self.queue.push(Kernel::RoundQueries, Shape::new([n, 1, 1], THREADS), arguments);
            let arguments = arguments![kv_b.keys, of_nope, queries, n, heads, padded, rope, latent];
            self.queue.push(Kernel::AbsorbRows, products, arguments);
            let grid = Shape::new([n.div_ceil(per_tile), heads / HEADS, 1], GEMM_THREADS);
            let arguments =
                arguments![queries, step, layer, first, n, heads, row_bytes, softmax_scale, means];
            self.queue.push(Kernel::AttendRows, grid.shared(attend_rows_bytes(width)), arguments);
            self.values_of_means(shape, kv_b, means, (to, rounded), (first, n));
        }
        Ok(())
    }

    /// Attention of rows of sequences that go on: each block of the cache by itself, then the blocks in order, or, of
    /// many rows, one block after the other.
    fn attend_rounded(
        &mut self,
        shape: &MlaShape,
        q: u64,
        kv_b: RoundedKvB,
        layer: u64,
        row_bytes: usize,
        out: Buffer,
        (from, rows): (usize, usize),
    ) -> Result<(), Error> {
        let op = "mla_attend";
        let MlaShape { heads, nope, rope, value, latent, softmax_scale } = *shape;
        let (width, padded) = (latent + rope, nope.next_multiple_of(COLUMNS));
        let (to, rounded) = (self.buffer(op, out)?.at, self.room_for_rounded(op, out)?);
        let of_range = |s: &&Segment| (from..from + rows).contains(&s.row);
        let longest = self.step.segments.iter().filter(of_range).map(|s| s.start + s.rows).max().unwrap_or(1);
        // Rounded up, so that steps of about the same length are the same graph.
        let blocks = longest.div_ceil(BLOCK_TOKENS).next_power_of_two();
        let alone = self.made_for(shape) && rows * (heads / HEADS) >= ROWS_ALONE_MIN;
        let fresh = self.step.segments.iter().filter(of_range).map(|s| s.rows).max().unwrap_or(1);
        let per_row = if alone { heads * latent * 2 } else { blocks * heads * latent * 4 };
        let together = (SUMS_BYTES_MAX / per_row).clamp(1, rows.max(1));
        let room =
            |pool: &mut Pool, room: &mut Room, sizes: &[usize]| Self::grow(pool, room, "attention", sizes);
        let queries = room(&mut self.pool, &mut self.absorbed, &[together, heads, width, 2])?;
        let (mut sums, mut totals, mut means) = (0, 0, 0);
        if alone {
            means = room(&mut self.pool, &mut self.means, &[together, per_row])?;
        } else {
            sums = room(&mut self.pool, &mut self.sums, &[together, per_row])?;
            totals = room(&mut self.pool, &mut self.totals, &[together, blocks, heads, 8])?;
        }
        let step = self.step_argument();
        for first in (from..from + rows).step_by(together) {
            let n = together.min(from + rows - first);
            let append = if n == self.rows() { self.take_append(shape, q, layer, row_bytes) } else { None };
            let columns = latent / RUN + usize::from(append.is_some());
            let grid = Shape::new([columns, heads, n.div_ceil(ROWS)], THREADS).shared(4 * width);
            let [kv, weight, eps, frequencies, magnitude] = append.unwrap_or_default();
            let arguments = arguments![
                kv_b.keys,
                q,
                queries,
                first,
                n,
                nope,
                padded,
                rope,
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
            self.queue.push(Kernel::Absorb, grid, arguments);
            if alone {
                let grid = Shape::new([heads / HEADS, n, 1], GEMM_THREADS).shared(attend_row_bytes(width));
                let arguments =
                    arguments![queries, step, layer, first, heads, row_bytes, fresh, softmax_scale, means];
                self.queue.push(Kernel::AttendRow, grid, arguments);
                self.values_of_means(shape, kv_b, means, (to, rounded), (first, n));
                continue;
            }
            let grid = Shape::new([blocks, heads / HEADS, n], THREADS).shared(attend_bytes(width));
            let arguments = arguments![
                queries,
                step,
                layer,
                first,
                latent,
                rope,
                row_bytes,
                fresh,
                softmax_scale,
                sums,
                totals
            ];
            self.queue.push(Kernel::AttendBlock, grid, arguments);
            let few = n < VALUES_ROWS_MIN;
            let (kernel, tokens, values) = if few {
                (Kernel::AttendValues1, 1, VALUES)
            } else {
                (Kernel::AttendValues8, ROWS, VALUES_OF_EIGHT)
            };
            let grid = Shape::new([value.div_ceil(values), heads, n.div_ceil(tokens)], THREADS);
            let grid = grid.shared(values_bytes(tokens, values, latent));
            let arguments =
                arguments![kv_b.values, step, sums, totals, to, rounded, first, n, blocks, value, latent];
            self.queue.push(kernel, grid, arguments);
        }
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
        && shape.nope.is_multiple_of(16)
        && shape.nope <= NOPE_MAX
        && attend_bytes(shape.latent + shape.rope) <= SHARED_BYTES_MAX
        && values_bytes(ROWS, VALUES_OF_EIGHT, shape.latent) <= SHARED_BYTES_MAX / 2
}

/// Shared memory of `attend_values`: means in F32, in BF16 for eight rows, and sums of runs for eight rows.
fn values_bytes(rows: usize, values: usize, latent: usize) -> usize {
    4 * rows * latent + 2 * 8 * (latent + 8) + 4 * 8 * values * (latent / RUN)
}

/// Shared memory of `attend_rows`: 64 rows of queries and twice as many cached ones in BF16, from where wgmma wants
/// them.
fn attend_rows_bytes(width: usize) -> usize {
    3 * BLOCK_TOKENS * width * 2 + GEMM_ALIGN
}

/// Shared memory of `attend_row`: two blocks of cached rows and the queries in BF16, from where wgmma wants them, and
/// the weights of a block twice, its scores four times.
fn attend_row_bytes(width: usize) -> usize {
    let scores = 2 * 4 * BLOCK_TOKENS * HEADS;
    2 * width * (2 * BLOCK_TOKENS + HEADS) + 2 * 2 * BLOCK_TOKENS * HEADS + 2 * scores + GEMM_ALIGN
}

/// Shared memory of `attend_block`: 64 cached rows and 16 queries in BF16, weights and scores.
fn attend_bytes(width: usize) -> usize {
    2 * (BLOCK_TOKENS + HEADS) * (width + 8) + 2 * HEADS * (BLOCK_TOKENS + 8) + 4 * HEADS * (BLOCK_TOKENS + 2)
}
