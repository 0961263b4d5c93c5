//! `rms_norm`.

use oxseek_tensor::{
    Error,
    backend::{Buffer, Vector},
};

use crate::{
    CudaBackend,
    kernels::Kernel,
    queue::{Shape, arguments},
};

/// Columns of a row that its block keeps in registers.
const KEPT_COLUMNS_MAX: usize = 4096;

impl CudaBackend {
    pub(crate) fn norm_rows(
        &mut self,
        x: Buffer,
        weight: Vector,
        eps: f32,
        out: Buffer,
        rows: usize,
    ) -> Result<(), Error> {
        let op = "rms_norm";
        let cols = self.buffer(op, x)?.cols;
        let weight = self.vector(op, weight, cols)?;
        let (x, to) = (self.sized(op, x, rows, cols)?, self.sized(op, out, rows, cols)?);
        let shape = Shape::new([rows, 1, 1], 256);
        let arguments_of_norm = arguments![weight, eps, to.at, to.rounded];
        if let Some((sum, words)) = self.queue.last(Kernel::ExpertsSum)
            && let &[y, weights, order, top_k, choices, shared, sums, width] = words
            && sums == x.at
            && width == cols as u64
            && sum.grid[1] as usize == rows
            && to.at != x.at
            && cols.is_multiple_of(4)
            && cols <= KEPT_COLUMNS_MAX
        {
            let first = arguments![y, weights, order, top_k, choices, shared, sums, width];
            self.queue.take_last();
            self.queue.push(Kernel::ExpertsSumNorm, shape, &[&first[..], &arguments_of_norm[..]].concat());
            self.buffers[out.0 as usize].rounded_rows = if to.rounded == 0 { 0 } else { rows };
            return Ok(());
        }
        // The BF16 rows are written along if anybody ever wanted them.
        let arguments = arguments![x.at, weight, eps, to.at, to.rounded, cols];
        self.queue.push(Kernel::RmsNorm, shape, arguments);
        self.buffers[out.0 as usize].rounded_rows = if to.rounded == 0 { 0 } else { rows };
        Ok(())
    }
}
