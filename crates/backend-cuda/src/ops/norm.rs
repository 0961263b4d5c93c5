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
        let (x, out) = (self.sized(op, x, rows, cols)?, self.sized(op, out, rows, cols)?);
        let shape = Shape::new([rows, 1, 1], 256);
        let no_copy = 0usize;
        self.queue.push(Kernel::RmsNorm, shape, arguments![x.at, weight, eps, out.at, no_copy, cols]);
        Ok(())
    }
}
