//! `rope_queries`, and the table of angles that a step shares.

use oxseek_tensor::{
    Error,
    backend::{Buffer, MlaShape, Rope},
    error::{expect, shape_error},
};

use super::{RowShares, matmul::Input};
use crate::{CpuBackend, memory::Shared};

/// Rotates interleaved pairs by `[cos, sin]` pairs.
pub(crate) fn rotate(x: &mut [f32], cos_sin: &[f32]) {
    for (pair, cs) in x.chunks_exact_mut(2).zip(cos_sin.chunks_exact(2)) {
        (pair[0], pair[1]) = (pair[0] * cs[0] - pair[1] * cs[1], pair[1] * cs[0] + pair[0] * cs[1]);
    }
}

impl CpuBackend {
    /// Makes cos and sin of every row of the step, once per step: every layer uses the same.
    pub(crate) fn prepare_rope(&mut self, op: &'static str, rope: Rope, width: usize) -> Result<(), Error> {
        let n = self.ropes.len();
        let missing = shape_error(op, "rope handle", n, rope.0 as usize);
        let table = self.ropes.get_mut(rope.0 as usize).ok_or(missing)?;
        expect(op, "rope width", table.inv_freq.len() * 2, width)?;
        if table.step == self.step_count {
            return Ok(());
        }
        table.rows.clear();
        for &position in &self.positions {
            for &freq in &table.inv_freq {
                let (sin, cos) = (position as f32 * freq).sin_cos();
                table.rows.extend([cos * table.magnitude, sin * table.magnitude]);
            }
        }
        table.step = self.step_count;
        Ok(())
    }

    pub(crate) fn rotate_queries(&mut self, shape: &MlaShape, rope: Rope, q: Buffer) -> Result<(), Error> {
        let op = "rope_queries";
        let head = shape.nope + shape.rope;
        let (rows, width) = (self.rows(), shape.heads * head);
        self.sized(op, q, rows, width)?;
        self.prepare_rope(op, rope, shape.rope)?;
        let table = Input(self.ropes[rope.0 as usize].rows.as_ptr());
        let q = Shared::new(&mut self.buffers[q.0 as usize].values);
        let shares = RowShares::new(rows, rows * shape.heads * shape.rope * 4, self.pool.threads());
        let (nope, rope) = (shape.nope, shape.rope);
        self.pool.run(shares.tasks(), &|task, _| {
            for r in shares.of(task) {
                // SAFETY: the buffer has the row, which no other task touches, and the table has a row for each.
                let (q, cos_sin) = unsafe {
                    (
                        std::slice::from_raw_parts_mut(q.at(r * width), width),
                        std::slice::from_raw_parts(table.get().add(r * rope), rope),
                    )
                };
                for head in q.chunks_exact_mut(head) {
                    rotate(&mut head[nope..], cos_sin);
                }
            }
        })
    }
}
