//! Where the time of steps goes, op by op.

use std::time::Instant;

use oxseek_tensor::backend::{MlaShape, MultiplyAdds, OpCost, Segment};

use crate::{matrix::MatrixRef, packed::Rounding, sizes};

/// Costs by op, in the order of their first call.
#[derive(Debug, Default)]
pub(crate) struct Profile {
    pub(crate) costs: Vec<OpCost>,
    /// Bytes that the running op has read so far.
    pub(crate) bytes: u64,
    /// Multiply-adds of the running op so far.
    weights: MultiplyAdds,
    attention: MultiplyAdds,
}

impl Profile {
    pub(crate) fn add(&mut self, op: &'static str, since: Instant) {
        let seconds = since.elapsed().as_secs_f64();
        let at = self.costs.iter().position(|c| c.op == op).unwrap_or_else(|| {
            let (weights, attention) = Default::default();
            self.costs.push(OpCost { op, calls: 0, seconds: 0.0, bytes: 0, weights, attention });
            self.costs.len() - 1
        });
        let cost = &mut self.costs[at];
        cost.calls += 1;
        cost.seconds += seconds;
        cost.bytes += std::mem::take(&mut self.bytes);
        cost.weights += std::mem::take(&mut self.weights);
        cost.attention += std::mem::take(&mut self.attention);
    }

    /// Notes that the running op multiplies `rows` rows with `w`, which it reads once.
    pub(crate) fn product(&mut self, w: &MatrixRef, rows: usize) {
        self.bytes += w.bytes as u64;
        self.multiply(w.rounding(), rows * w.rows * w.cols);
    }

    /// Notes multiply-adds with weights.
    pub(crate) fn multiply(&mut self, rounding: Option<Rounding>, multiply_adds: usize) {
        self.weights += sizes::multiply_adds(rounding, multiply_adds as u64);
    }

    /// Notes the products of the running attention, whose factors are BF16 or exact.
    pub(crate) fn attend(&mut self, shape: &MlaShape, segments: &[Segment], rounding: Option<Rounding>) {
        let rows: usize = segments.iter().map(|s| s.rows).sum();
        self.multiply(rounding, rows * shape.heads * (shape.nope + shape.value) * shape.latent);
        let work = segments.iter().map(|s| s.attention_work(shape)).sum::<u64>();
        self.attention += sizes::multiply_adds(rounding, work);
    }
}
