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
        // The BF16 rows are written along if anybody ever wanted them.
        let arguments = arguments![x.at, weight, eps, to.at, to.rounded, cols];
        self.queue.push(Kernel::RmsNorm, shape, arguments);
        self.buffers[out.0 as usize].rounded_rows = if to.rounded == 0 { 0 } else { rows };
        Ok(())
    }
}
