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
/// Tokens that a block of the tensor cores takes together.
const TOKENS: [usize; 4] = [8, 16, 32, 64];

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
        let width = TOKENS.into_iter().find(|w| rows <= *w).unwrap_or(TOKENS[3]);
        let kernel = match (product, width) {
            (Product::Bf16, 8) => Kernel::ProductBf16x8,
            (Product::Bf16, 16) => Kernel::ProductBf16x16,
            (Product::Bf16, 32) => Kernel::ProductBf16x32,
            (Product::Bf16, _) => Kernel::ProductBf16x64,
            (Product::Fp8, 8) => Kernel::ProductFp8x8,
            (Product::Fp8, 16) => Kernel::ProductFp8x16,
            (Product::Fp8, 32) => Kernel::ProductFp8x32,
            (Product::Fp8, _) => Kernel::ProductFp8x64,
        };
        let tile = if width <= 16 { 16 } else { 32 };
        let shape = Shape::new([m.rows.div_ceil(tile), rows.div_ceil(width), 1], THREADS);
        let shape = shape.shared(parts_bytes(tile, width));
        self.queue.push(kernel, shape, arguments![m.record, x, out, rows, add]);
    }
}

/// Shared memory for the parts of a tile's sums, one of each warp.
pub(super) const fn parts_bytes(rows: usize, tokens: usize) -> usize {
    WARPS * rows * tokens * 4
}
