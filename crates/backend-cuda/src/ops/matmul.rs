//! `embed`, `matmul`, `matmul_add`.

use oxseek_tensor::{
    Error,
    backend::{Buffer, Weight},
    error::at_most,
};

use crate::{
    CudaBackend, Matrix, Product,
    driver::DevicePtr,
    kernels::Kernel,
    queue::{Shape, arguments},
};

/// Warps of a block; each has a row of the weight.
pub(super) const WARPS: usize = 8;
pub(super) const THREADS: u32 = 32 * WARPS as u32;
/// Rows of x that a warp multiplies together: `TILE` of the kernels.
const TILE: usize = 4;
/// Tokens of a tile of a kernel that streams its weights, and most that it takes together.
pub(super) const STREAM_TOKENS: usize = 8;
pub(super) const STREAM_TOKENS_MAX: usize = 2 * STREAM_TOKENS;
/// Rows of weights of a tile of a kernel that streams them.
pub(super) const STREAM_ROWS: usize = 16;
/// `STAGE_BYTES` and `TOKEN_STRIDE` of the kernels.
const STAGE_BYTES: usize = 4096;
const TOKEN_STRIDE: usize = 20;
/// Rows of weights of a tile of a kernel for many tokens, its threads, and tokens of a narrow tile.
pub(super) const GEMM_ROWS: usize = 128;
pub(super) const GEMM_THREADS: u32 = 384;
pub(super) const NARROW: usize = 64;
/// Blocks that divide the columns of a narrow tile, where tiles are few or very few, and what they keep their parts in.
const CLUSTERS: [usize; 2] = [4, 8];
const PARTS_BYTES: usize = WARPS / CLUSTERS[0] * NARROW * (GEMM_ROWS + 4) * 4;
/// Columns that it brings at a time, and where wgmma wants them to begin.
const GEMM_COLUMNS: usize = 64;
pub(super) const GEMM_ALIGN: usize = 1024;

impl CudaBackend {
    pub(crate) fn embed_tokens(&mut self, table: Weight, out: Buffer) -> Result<(), Error> {
        let op = "embed";
        let m = self.matrix(op, table)?;
        let out = self.sized(op, out, self.rows(), m.cols)?;
        for &token in &self.step.tokens {
            at_most(op, "token", m.rows - 1, token as usize)?;
        }
        let shape = Shape::new([self.rows(), 1, 1], THREADS);
        self.queue.push(Kernel::Embed, shape, arguments![m.record, self.arrays.tokens, out.at]);
        Ok(())
    }

    pub(crate) fn matmul_rows(
        &mut self,
        op: &'static str,
        x: Buffer,
        weight: Weight,
        out: Buffer,
        rows: usize,
        add: bool,
    ) -> Result<(), Error> {
        let m = self.matrix(op, weight)?;
        Self::apart(op, x, out)?;
        let (at, out) = (self.sized(op, x, rows, m.cols)?.at, self.sized(op, out, rows, m.rows)?.at);
        match m.product {
            Some(product) => {
                let x = self.rounded(op, x, rows)?;
                self.multiply_rounded(product, m, x, out, rows, add);
            }
            None => self.multiply(m, at, out, rows, add),
        }
        Ok(())
    }

    /// `out = x * W^T` or `out += x * W^T`, sizes checked.
    pub(super) fn multiply(&mut self, m: Matrix, x: DevicePtr, out: DevicePtr, rows: usize, add: bool) {
        let shape = Shape::new([m.rows.div_ceil(WARPS), rows.div_ceil(TILE), 1], THREADS);
        self.queue.push(Kernel::Matmul, shape, arguments![m.record, x, out, rows, add]);
    }

    /// The same of BF16 rows on the tensor cores.
    pub(super) fn multiply_rounded(
        &mut self,
        product: Product,
        m: Matrix,
        x: DevicePtr,
        out: DevicePtr,
        rows: usize,
        add: bool,
    ) {
        if rows <= STREAM_TOKENS_MAX {
            return self.stream(product, m, x, out, rows, add);
        }
        let narrow = rows <= NARROW;
        let (tiles, most) = (m.rows.div_ceil(GEMM_ROWS), self.device.multiprocessors());
        if narrow && self.device.overlaps() && tiles * CLUSTERS[0] <= most {
            let kernel = match product {
                Product::Bf16 => Kernel::ProductBf16Split,
                Product::Fp8 => Kernel::ProductFp8Split,
            };
            let bytes = self.gemm_bytes(product, NARROW) + PARTS_BYTES;
            let shape = Shape { cluster: CLUSTERS[0] as u32, ..Shape::new([1, 1, 1], GEMM_THREADS) };
            return self.push_product(kernel, shape.shared(bytes), (tiles, most), m, x, out, rows, add);
        }
        let kernel = match (product, narrow) {
            (Product::Bf16, true) => Kernel::ProductBf16Narrow,
            (Product::Bf16, false) => Kernel::ProductBf16Wide,
            (Product::Fp8, true) => Kernel::ProductFp8Narrow,
            (Product::Fp8, false) => Kernel::ProductFp8Wide,
        };
        let width = if narrow { NARROW } else { self.device.wide(product) };
        let tiles = tiles * rows.div_ceil(width);
        let shape = Shape::new([1, 1, 1], GEMM_THREADS).shared(self.gemm_bytes(product, width));
        self.push_product(kernel, shape, (tiles, most), m, x, out, rows, add);
    }

    /// The same of few rows.
    fn stream(&mut self, product: Product, m: Matrix, x: DevicePtr, out: DevicePtr, rows: usize, add: bool) {
        let few = rows <= STREAM_TOKENS;
        let kernel = match (product, few) {
            (Product::Bf16, true) => Kernel::StreamBf16x8,
            (Product::Bf16, false) => Kernel::StreamBf16x16,
            (Product::Fp8, true) => Kernel::StreamFp8x8,
            (Product::Fp8, false) => Kernel::StreamFp8x16,
        };
        let shape = Shape::new([1, 1, 1], THREADS).shared(self.stream_bytes(if few { 1 } else { 2 }));
        let tiles = (m.rows.div_ceil(STREAM_ROWS), self.device.streams());
        self.push_product(kernel, shape, tiles, m, x, out, rows, add);
    }

    /// Launches a product of so many tiles on at most so many blocks, or on a cluster for each tile. Two products of
    /// the same rows one after the other are launched together.
    fn push_product(
        &mut self,
        kernel: Kernel,
        shape: Shape,
        (mut tiles, most): (usize, usize),
        m: Matrix,
        x: DevicePtr,
        out: DevicePtr,
        rows: usize,
        add: bool,
    ) {
        let mut second = (0, 0);
        let (mut first, mut first_out) = (m.record, out);
        if !add
            && let Some((last, &[record, 0, same, other, _, count, 0])) = self.queue.last(kernel)
            && same == x
            && other != out
            && count == rows as u64
        {
            tiles += (last.grid[0] / last.cluster) as usize;
            second = (m.record, out);
            (first, first_out) = (record, other);
            self.queue.take_last();
        }
        let (mut blocks, mut cluster) = (tiles.min(most), 1);
        if shape.cluster > 1 {
            cluster = CLUSTERS[usize::from(tiles * CLUSTERS[1] <= most)];
            blocks = tiles * cluster;
        }
        let shape = Shape { grid: [blocks as u32, 1, 1], cluster: cluster as u32, ..shape };
        self.queue.push(kernel, shape, arguments![first, second.0, x, first_out, second.1, rows, add]);
    }

    /// Shared memory of a kernel that streams weights for so many times 8 tokens: the warps' rings, and room for the
    /// parts of two tiles.
    pub(super) fn stream_bytes(&self, tiles: usize) -> usize {
        let ring = self.device.stages() * STAGE_BYTES;
        WARPS * (ring + 2 * tiles * STREAM_TOKENS * TOKEN_STRIDE * 4)
    }

    /// Shared memory of a kernel for many tokens: its ring, whose stages hold columns of weights and of tokens.
    pub(super) fn gemm_bytes(&self, product: Product, width: usize) -> usize {
        let weights = match product {
            Product::Bf16 => 2 * GEMM_ROWS * GEMM_COLUMNS,
            Product::Fp8 => GEMM_ROWS * GEMM_COLUMNS,
        };
        self.device.gemm_stages() * (weights + 2 * width * GEMM_COLUMNS) + GEMM_ALIGN
    }
}
