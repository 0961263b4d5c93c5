//! `rope_queries`.

use oxseek_tensor::{
    Error,
    backend::{Buffer, MlaShape, Rope},
};

use crate::{
    CudaBackend,
    kernels::Kernel,
    queue::{Shape, arguments},
};

impl CudaBackend {
    pub(crate) fn rotate_queries(&mut self, shape: &MlaShape, rope: Rope, q: Buffer) -> Result<(), Error> {
        let op = "rope_queries";
        let MlaShape { heads, nope, rope: turned, .. } = *shape;
        let q = self.sized(op, q, self.rows(), heads * (nope + turned))?;
        let positions = self.arrays.positions;
        let grid = Shape::new([self.rows(), 1, 1], 256);
        let table = self.rope(op, rope, turned)?;
        let (frequencies, magnitude) = (table.frequencies, table.magnitude);
        let arguments = arguments![q.at, positions, frequencies, magnitude, heads, nope, turned];
        self.queue.push(Kernel::RopeQueries, grid, arguments);
        Ok(())
    }
}
