//! `rms_norm`.

use oxseek_tensor::{
    Error,
    backend::{Buffer, Vector},
};

use super::{RowShares, matmul::Input};
use crate::{CpuBackend, memory::Shared};

impl CpuBackend {
    pub(crate) fn norm_rows(
        &mut self,
        x: Buffer,
        weight: Vector,
        eps: f32,
        out: Buffer,
        rows: usize,
    ) -> Result<(), Error> {
        let op = "rms_norm";
        let width = self.buffer(op, x)?.cols;
        self.vector(op, weight, width)?;
        self.sized(op, x, rows, width)?;
        self.sized(op, out, rows, width)?;
        let w = Input(self.vectors[weight.0 as usize].as_ptr());
        // In place is allowed: then both are the same rows, and a row is read before it is written.
        let x = Shared::new(&mut self.buffers[x.0 as usize].values);
        let out = Shared::new(&mut self.buffers[out.0 as usize].values);
        let shares = RowShares::new(rows, rows * width * 2, self.pool.threads());
        let kernel = self.kernels.rms_norm;
        self.pool.run(shares.tasks(), &|task, _| {
            for r in shares.of(task) {
                // SAFETY: both buffers have the row, and no other task touches it.
                unsafe { kernel(x.at(r * width), w.get(), eps, out.at(r * width), width) };
            }
        })
    }
}
