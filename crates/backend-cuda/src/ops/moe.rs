//! `mlp`, `route`, `moe`.

use oxseek_tensor::{
    Error,
    backend::{Buffer, Experts, GroupScore, Mlp, RouterShape, Routing, Scoring, Vector, Weight},
    error::{at_most, expect},
};

use super::matmul::{THREADS, WARPS};
use crate::{
    CudaBackend, Matrix, found,
    kernels::Kernel,
    queue::{Shape, arguments},
};

/// Shared memory of the router: scores and flags of experts and groups.
const ROUTER_BYTES_MAX: usize = 48 << 10;

/// The three matrices of an MLP.
struct MlpMatrices {
    gate: Matrix,
    up: Matrix,
    down: Matrix,
}

fn check_mlp(op: &'static str, [gate, up, down]: [(usize, usize); 3]) -> Result<(), Error> {
    expect(op, "up rows", gate.0, up.0)?;
    expect(op, "up columns", gate.1, up.1)?;
    expect(op, "down columns", gate.0, down.1)?;
    expect(op, "down rows", gate.1, down.0)
}

/// `Router` of the kernels: seven numbers and a factor, two to a word.
fn router_argument(shape: &RouterShape) -> [u64; 4] {
    let flags =
        [shape.group_score == GroupScore::TopTwoSum, shape.scoring == Scoring::Sigmoid, shape.normalize]
            .map(u64::from);
    let pair = |low: u64, high: u64| low | high << 32;
    [
        pair(shape.experts as u64, shape.top_k as u64),
        pair(shape.groups as u64, shape.groups_kept as u64),
        pair(flags[0], flags[1]),
        pair(flags[2], u64::from(shape.scale.to_bits())),
    ]
}

impl CudaBackend {
    fn mlp_matrices(&self, op: &'static str, mlp: &Mlp) -> Result<MlpMatrices, Error> {
        let (gate, up, down) =
            (self.matrix(op, mlp.gate)?, self.matrix(op, mlp.up)?, self.matrix(op, mlp.down)?);
        check_mlp(op, [gate, up, down].map(|m| (m.rows, m.cols)))?;
        Ok(MlpMatrices { gate, up, down })
    }

    /// Inner activations of an MLP for the rows of the step, in `shared_inner`.
    fn swiglu(&mut self, mlp: &MlpMatrices, x: u64) -> Result<u64, Error> {
        let (rows, gate) = (self.rows(), mlp.gate);
        let sizes = [rows, gate.rows, 4];
        let inner = Self::grow(&mut self.pool, &mut self.shared_inner, "inner activations", &sizes)?;
        let shape = Shape::new([gate.rows.div_ceil(WARPS), rows, 1], THREADS);
        self.queue.push(Kernel::Swiglu, shape, arguments![gate.record, mlp.up.record, x, inner]);
        Ok(inner)
    }

    pub(crate) fn mlp_rows(&mut self, x: Buffer, mlp: &Mlp, out: Buffer) -> Result<(), Error> {
        let (op, rows) = ("mlp", self.rows());
        let mlp = self.mlp_matrices(op, mlp)?;
        Self::apart(op, x, out)?;
        let x = self.sized(op, x, rows, mlp.gate.cols)?;
        let out = self.sized(op, out, rows, mlp.down.rows)?;
        let inner = self.swiglu(&mlp, x.at)?;
        self.multiply(mlp.down, inner, out.at, rows, true);
        Ok(())
    }

    pub(crate) fn route_rows(
        &mut self,
        shape: &RouterShape,
        x: Buffer,
        gate: Weight,
        bias: Option<Vector>,
        out: Routing,
    ) -> Result<(), Error> {
        let (op, rows) = ("route", self.rows());
        let m = self.matrix(op, gate)?;
        expect(op, "gate rows", shape.experts, m.rows)?;
        let x = self.sized(op, x, rows, m.cols)?;
        let bias = bias.map_or(Ok(0), |b| self.vector(op, b, shape.experts))?;
        shape.check()?;
        let routing = found(op, "routing handle", &self.routings, out.0)?;
        expect(op, "top_k", shape.top_k, routing.top_k)?;
        at_most(op, "rows", routing.rows_max, rows)?;
        let shared = 9 * shape.experts + 5 * shape.groups;
        at_most(op, "bytes of scores", ROUTER_BYTES_MAX, shared)?;
        let (ids, weights, order) = (routing.ids, routing.weights, routing.order);
        self.routings[out.0 as usize].experts = shape.experts;
        let logits =
            Self::grow(&mut self.pool, &mut self.logits, "router logits", &[rows, shape.experts, 4])?;
        self.multiply(m, x.at, logits, rows, false);
        let grid = Shape::new([rows, 1, 1], 32).shared(shared);
        let arguments = arguments![logits, bias, router_argument(shape), ids, weights, order];
        self.queue.push(Kernel::Route, grid, arguments);
        Ok(())
    }

    pub(crate) fn moe_rows(
        &mut self,
        x: Buffer,
        routing: Routing,
        experts: Experts,
        shared: Option<&Mlp>,
        out: Buffer,
    ) -> Result<(), Error> {
        let (op, rows) = ("moe", self.rows());
        let width = self.buffer(op, x)?.cols;
        Self::apart(op, x, out)?;
        let (x, out) = (self.sized(op, x, rows, width)?, self.sized(op, out, rows, width)?);
        let set = found(op, "experts handle", &self.experts, experts.0)?;
        for sizes in &set.sizes {
            check_mlp(op, *sizes)?;
            expect(op, "expert columns", width, sizes[0].1)?;
        }
        let routed = found(op, "routing handle", &self.routings, routing.0)?;
        at_most(op, "rows", routed.rows_max, rows)?;
        at_most(op, "expert id", set.sizes.len(), routed.experts)?;
        let (records, inner_max, top_k) = (set.records, set.inner_max, routed.top_k);
        let (ids, weights, order) = (routed.ids, routed.weights, routed.order);
        let shared = shared.map(|m| self.mlp_matrices(op, m)).transpose()?;
        let mut down_and_inner = (0, 0);
        if let Some(m) = &shared {
            expect(op, "shared expert columns", width, m.gate.cols)?;
            down_and_inner = (m.down.record, self.swiglu(m, x.at)?);
        }
        let (down, shared_inner) = down_and_inner;
        let sizes = [rows, top_k, inner_max, 4];
        let inner = Self::grow(&mut self.pool, &mut self.inner, "inner activations of experts", &sizes)?;
        let shape = Shape::new([inner_max.div_ceil(WARPS), top_k, rows], THREADS);
        self.queue.push(Kernel::MoeInner, shape, arguments![records, ids, x.at, inner, inner_max]);
        let shape = Shape::new([width.div_ceil(WARPS), rows, 1], THREADS);
        let arguments = arguments![
            records,
            ids,
            weights,
            order,
            top_k,
            inner,
            inner_max,
            down,
            shared_inner,
            out.at,
            width
        ];
        self.queue.push(Kernel::MoeSum, shape, arguments);
        Ok(())
    }
}
