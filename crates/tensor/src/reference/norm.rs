//! RMSNorm.

use super::ReferenceBackend;
use crate::{
    Error,
    backend::{Buffer, Vector},
};

/// `weight * x / sqrt(mean(x^2) + eps)`
pub(super) fn rms(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mean = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / x.len() as f64;
    let scale = 1.0 / (mean + f64::from(eps)).sqrt();
    x.iter().zip(weight).map(|(&v, &w)| (f64::from(w) * (f64::from(v) * scale)) as f32).collect()
}

impl ReferenceBackend {
    pub(super) fn rms_norm_rows(
        &mut self,
        x: Buffer,
        weight: Vector,
        eps: f32,
        out: Buffer,
        rows: usize,
    ) -> Result<(), Error> {
        let op = "rms_norm";
        let w = self.vector(op, weight)?;
        let x = self.sized(op, x, rows, w.len())?;
        self.sized(op, out, rows, w.len())?;
        let y: Vec<Vec<f32>> = (0..rows).map(|r| rms(x.row(r), w, eps)).collect();
        for (r, y) in y.iter().enumerate() {
            self.buffers[out.0 as usize].row_mut(r).copy_from_slice(y);
        }
        Ok(())
    }
}
