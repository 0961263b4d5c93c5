//! `embed`, `matmul`, `matmul_add`.

use oxseek_tensor::{
    Error,
    backend::{Buffer, Weight},
    error::at_most,
};

use crate::{
    CudaBackend, Matrix,
    driver::DevicePtr,
    kernels::Kernel,
    queue::{Shape, arguments},
};

/// Warps of a block; each has a row of the weight.
pub(super) const WARPS: usize = 8;
pub(super) const THREADS: u32 = 32 * WARPS as u32;
/// Rows of x that a warp multiplies together: `TILE` of the kernels.
const TILE: usize = 4;

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
        let (x, out) = (self.sized(op, x, rows, m.cols)?, self.sized(op, out, rows, m.rows)?);
        self.multiply(m, x.at, out.at, rows, add);
        Ok(())
    }

    /// `out = x * W^T` or `out += x * W^T`, sizes checked.
    pub(super) fn multiply(&mut self, m: Matrix, x: DevicePtr, out: DevicePtr, rows: usize, add: bool) {
        let shape = Shape::new([m.rows.div_ceil(WARPS), rows.div_ceil(TILE), 1], THREADS);
        self.queue.push(Kernel::Matmul, shape, arguments![m.record, x, out, rows, add]);
    }
}
