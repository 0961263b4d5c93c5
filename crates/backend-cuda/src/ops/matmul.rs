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
/// Rows of weights that a block of the tensor cores takes together.
const ROWS: usize = 32;
/// Tokens that a block of the tensor cores takes together.
const TOKENS: [usize; 2] = [32, 64];
/// Tokens of a tile of a kernel that streams its weights, and most that it takes together.
pub(super) const STREAM_TOKENS: usize = 8;
pub(super) const STREAM_TOKENS_MAX: usize = 2 * STREAM_TOKENS;
/// Rows of weights of a tile of a kernel that streams them.
pub(super) const STREAM_ROWS: usize = 16;
/// `STAGE_BYTES` and `TOKEN_STRIDE` of the kernels.
const STAGE_BYTES: usize = 4096;
const TOKEN_STRIDE: usize = 20;

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
        let width = TOKENS.into_iter().find(|w| rows <= *w).unwrap_or(TOKENS[1]);
        let kernel = match (product, width) {
            (Product::Bf16, 32) => Kernel::ProductBf16x32,
            (Product::Bf16, _) => Kernel::ProductBf16x64,
            (Product::Fp8, 32) => Kernel::ProductFp8x32,
            (Product::Fp8, _) => Kernel::ProductFp8x64,
        };
        let shape = Shape::new([m.rows.div_ceil(ROWS), rows.div_ceil(width), 1], THREADS);
        let shape = shape.shared(parts_bytes(ROWS, width));
        self.queue.push(kernel, shape, arguments![m.record, x, out, rows, add]);
    }

    /// The same of few rows. Two products of the same rows one after the other are launched together.
    fn stream(&mut self, product: Product, m: Matrix, x: DevicePtr, out: DevicePtr, rows: usize, add: bool) {
        let few = rows <= STREAM_TOKENS;
        let kernel = match (product, few) {
            (Product::Bf16, true) => Kernel::StreamBf16x8,
            (Product::Bf16, false) => Kernel::StreamBf16x16,
            (Product::Fp8, true) => Kernel::StreamFp8x8,
            (Product::Fp8, false) => Kernel::StreamFp8x16,
        };
        let (mut blocks, mut second) = (m.rows.div_ceil(STREAM_ROWS), (0, 0));
        let (mut first, mut first_out) = (m.record, out);
        if !add
            && let Some((shape, &[record, 0, same, other, _, count, 0])) = self.queue.last(kernel)
            && same == x
            && other != out
            && count == rows as u64
        {
            blocks += shape.grid[0] as usize;
            second = (m.record, out);
            (first, first_out) = (record, other);
            self.queue.take_last();
        }
        let shape = Shape::new([blocks.min(self.device.streams()), 1, 1], THREADS);
        let shape = shape.shared(self.stream_bytes(if few { 1 } else { 2 }));
        self.queue.push(kernel, shape, arguments![first, second.0, x, first_out, second.1, rows, add]);
    }

    /// Shared memory of a kernel that streams weights for so many times 8 tokens: the warps' rings, and room for the
    /// parts of two tiles.
    pub(super) fn stream_bytes(&self, tiles: usize) -> usize {
        let ring = self.device.stages() * STAGE_BYTES;
        WARPS * (ring + 2 * tiles * STREAM_TOKENS * TOKEN_STRIDE * 4)
    }
}

/// Shared memory for the parts of a tile's sums, one of each warp.
pub(super) const fn parts_bytes(rows: usize, tokens: usize) -> usize {
    WARPS * rows * tokens * 4
}
