//! `y = x * W^T`.

use super::{Matrix, ReferenceBackend};
use crate::{
    Error,
    backend::{Buffer, Weight},
};

/// The dot product of two equally long slices.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

/// `W * x`, one value per row of `W`.
pub(super) fn matvec(w: &Matrix, x: &[f32]) -> Vec<f32> {
    (0..w.rows).map(|r| dot(w.row(r), x) as f32).collect()
}

impl ReferenceBackend {
    pub(super) fn matmul_rows(
        &mut self,
        op: &'static str,
        x: Buffer,
        weight: Weight,
        out: Buffer,
        rows: usize,
        add: bool,
    ) -> Result<(), Error> {
        let w = self.matrix(op, weight)?;
        let x = self.sized(op, x, rows, w.cols)?;
        self.sized(op, out, rows, w.rows)?;
        let y: Vec<Vec<f32>> = (0..rows).map(|r| matvec(w, x.row(r))).collect();
        for (r, y) in y.iter().enumerate() {
            for (o, y) in self.buffers[out.0 as usize].row_mut(r).iter_mut().zip(y) {
                *o = if add { *o + y } else { *y };
            }
        }
        Ok(())
    }
}
