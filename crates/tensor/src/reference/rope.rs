//! Rotary position embedding over interleaved pairs (2i, 2i+1).

use super::{ReferenceBackend, RopeTable};
use crate::{
    Error,
    backend::{Buffer, MlaShape, Rope},
};

/// Rotates `x` (`2 * pairs` long) to `position`. The angle is an F32 product, as in the modelling code.
pub(super) fn rotate(table: &RopeTable, position: usize, x: &mut [f32]) {
    for (pair, &freq) in x.chunks_exact_mut(2).zip(&table.inv_freq) {
        let (sin, cos) = (position as f32 * freq).sin_cos();
        let (sin, cos) = (sin * table.magnitude, cos * table.magnitude);
        (pair[0], pair[1]) = (pair[0] * cos - pair[1] * sin, pair[1] * cos + pair[0] * sin);
    }
}

impl ReferenceBackend {
    pub(super) fn rotate_queries(&mut self, shape: &MlaShape, rope: Rope, q: Buffer) -> Result<(), Error> {
        let op = "rope_queries";
        self.rope(op, rope, shape.rope / 2)?;
        let width = shape.nope + shape.rope;
        self.sized(op, q, self.rows(), shape.heads * width)?;
        let table = &self.ropes[rope.0 as usize];
        for (r, (_, position)) in self.positions().into_iter().enumerate() {
            for head in self.buffers[q.0 as usize].row_mut(r).chunks_exact_mut(width) {
                rotate(table, position, &mut head[shape.nope..]);
            }
        }
        Ok(())
    }
}
