//! Where the time of steps goes, op by op.

use std::time::Instant;

use oxseek_tensor::backend::OpCost;

/// Costs by op, in the order of their first call.
#[derive(Debug, Default)]
pub(crate) struct Profile {
    pub(crate) costs: Vec<OpCost>,
    /// Bytes that the running op has read so far.
    pub(crate) bytes: u64,
}

impl Profile {
    pub(crate) fn add(&mut self, op: &'static str, since: Instant) {
        let seconds = since.elapsed().as_secs_f64();
        let at = self.costs.iter().position(|c| c.op == op).unwrap_or_else(|| {
            self.costs.push(OpCost { op, calls: 0, seconds: 0.0, bytes: 0 });
            self.costs.len() - 1
        });
        let cost = &mut self.costs[at];
        cost.calls += 1;
        cost.seconds += seconds;
        cost.bytes += std::mem::take(&mut self.bytes);
    }
}
