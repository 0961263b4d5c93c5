//! SwiGLU MLP, router and mixture of experts (DeepSeek-V3 paper, section 2.1.2).

use super::{
    Matrix, ReferenceBackend,
    matmul::{dot, matvec},
};
use crate::{
    Error,
    backend::{Buffer, Experts, GroupScore, Mlp, RouterShape, Routing, Scoring, Vector, Weight},
    error::{at_most, expect, shape_error},
};

/// `down(silu(gate x) * up x)`
fn swiglu(gate: &Matrix, up: &Matrix, down: &Matrix, x: &[f32]) -> Vec<f32> {
    let silu = |z: f32| (f64::from(z) / (1.0 + (-f64::from(z)).exp())) as f32;
    let inner: Vec<f32> = matvec(gate, x).into_iter().zip(matvec(up, x)).map(|(g, u)| silu(g) * u).collect();
    matvec(down, &inner)
}

fn check_mlp(op: &'static str, gate: &Matrix, up: &Matrix, down: &Matrix) -> Result<(), Error> {
    expect(op, "up rows", gate.rows, up.rows)?;
    expect(op, "up columns", gate.cols, up.cols)?;
    expect(op, "down columns", gate.rows, down.cols)?;
    expect(op, "down rows", gate.cols, down.rows)
}

/// Indices of the `k` largest values, descending; ties go to the smaller index.
fn top_k(values: &[f64], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]).then(a.cmp(&b)));
    order.truncate(k);
    order
}

/// Expert ids by descending choice score, and their weights.
fn choose(shape: &RouterShape, logits: &[f32], bias: Option<&[f32]>) -> (Vec<usize>, Vec<f32>) {
    // Scores are rounded to F32 before they are compared: that is what every kernel and every reference
    // implementation compares, and exact F64 comparisons would break F32 ties differently.
    let scores: Vec<f32> = match shape.scoring {
        Scoring::Sigmoid => logits.iter().map(|&z| (1.0 / (1.0 + (-f64::from(z)).exp())) as f32).collect(),
        Scoring::Softmax => {
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let e: Vec<f64> = logits.iter().map(|&z| (f64::from(z) - f64::from(max)).exp()).collect();
            let sum: f64 = e.iter().sum();
            e.iter().map(|e| (e / sum) as f32).collect()
        }
    };
    let mut choice: Vec<f64> =
        (0..scores.len()).map(|e| f64::from(scores[e] + bias.map_or(0.0, |b| b[e]))).collect();
    if shape.groups > 1 {
        let size = shape.experts / shape.groups;
        let rank = |group: &[f64]| match shape.group_score {
            GroupScore::Max => group.iter().copied().fold(f64::NEG_INFINITY, f64::max),
            GroupScore::TopTwoSum => top_k(group, 2).into_iter().map(|i| group[i] as f32).sum::<f32>().into(),
        };
        let ranks: Vec<f64> = choice.chunks_exact(size).map(rank).collect();
        let kept = top_k(&ranks, shape.groups_kept);
        for (g, group) in choice.chunks_exact_mut(size).enumerate() {
            if !kept.contains(&g) {
                group.fill(f64::NEG_INFINITY);
            }
        }
    }
    let ids = top_k(&choice, shape.top_k);
    let sum: f32 = ids.iter().map(|&e| scores[e]).sum();
    let norm = if shape.normalize && shape.top_k > 1 { sum + 1e-20 } else { 1.0 };
    let weights = ids.iter().map(|&e| scores[e] / norm * shape.scale).collect();
    (ids, weights)
}

impl ReferenceBackend {
    pub(super) fn mlp_rows(&mut self, x: Buffer, mlp: &Mlp, out: Buffer) -> Result<(), Error> {
        let op = "mlp";
        let (gate, up, down) =
            (self.matrix(op, mlp.gate)?, self.matrix(op, mlp.up)?, self.matrix(op, mlp.down)?);
        check_mlp(op, gate, up, down)?;
        let x = self.sized(op, x, self.rows(), gate.cols)?;
        self.sized(op, out, self.rows(), down.rows)?;
        let y: Vec<Vec<f32>> = (0..self.rows()).map(|r| swiglu(gate, up, down, x.row(r))).collect();
        self.add_rows(out, &y);
        Ok(())
    }

    pub(super) fn route_rows(
        &mut self,
        shape: &RouterShape,
        x: Buffer,
        gate: Weight,
        bias: Option<Vector>,
        out: Routing,
    ) -> Result<(), Error> {
        let op = "route";
        let w = self.matrix(op, gate)?;
        expect(op, "gate rows", shape.experts, w.rows)?;
        let x = self.sized(op, x, self.rows(), w.cols)?;
        let bias = bias.map(|b| self.vector(op, b)).transpose()?;
        if let Some(b) = bias {
            expect(op, "bias", shape.experts, b.len())?;
        }
        shape.check()?;
        let routing = self.routing(op, out)?;
        expect(op, "top_k", shape.top_k, routing.top_k)?;
        at_most(op, "rows", routing.ids.len() / shape.top_k, self.rows())?;
        let choices: Vec<_> = (0..self.rows())
            .map(|r| {
                let logits: Vec<f32> = (0..w.rows).map(|e| dot(w.row(e), x.row(r)) as f32).collect();
                choose(shape, &logits, bias)
            })
            .collect();
        let routing = &mut self.routings[out.0 as usize];
        for (r, (ids, weights)) in choices.into_iter().enumerate() {
            for (j, (e, w)) in ids.into_iter().zip(weights).enumerate() {
                routing.ids[r * shape.top_k + j] = e as u32;
                routing.weights[r * shape.top_k + j] = w;
            }
        }
        Ok(())
    }

    pub(super) fn moe_rows(
        &mut self,
        x: Buffer,
        routing: Routing,
        experts: Experts,
        shared: Option<&Mlp>,
        out: Buffer,
    ) -> Result<(), Error> {
        let op = "moe";
        let n = self.experts.len();
        let set = self.experts.get(experts.0 as usize).ok_or(shape_error(
            op,
            "experts handle",
            n,
            experts.0 as usize,
        ))?;
        let routing = self.routing(op, routing)?;
        let width = self.buffer(op, x)?.cols;
        let x = self.sized(op, x, self.rows(), width)?;
        self.sized(op, out, self.rows(), width)?;
        for e in set {
            check_mlp(op, &e.gate, &e.up, &e.down)?;
            expect(op, "expert columns", width, e.gate.cols)?;
        }
        let shared = match shared {
            Some(m) => Some((self.matrix(op, m.gate)?, self.matrix(op, m.up)?, self.matrix(op, m.down)?)),
            None => None,
        };
        let mut y = Vec::new();
        for r in 0..self.rows() {
            let mut sum = vec![0.0f64; width];
            let slots = r * routing.top_k..(r + 1) * routing.top_k;
            for (&e, &w) in routing.ids[slots.clone()].iter().zip(&routing.weights[slots]) {
                let e = set.get(e as usize).ok_or(shape_error(op, "expert id", set.len(), e as usize))?;
                for (s, v) in sum.iter_mut().zip(swiglu(&e.gate, &e.up, &e.down, x.row(r))) {
                    *s += f64::from(w) * f64::from(v);
                }
            }
            if let Some((gate, up, down)) = shared {
                for (s, v) in sum.iter_mut().zip(swiglu(gate, up, down, x.row(r))) {
                    *s += f64::from(v);
                }
            }
            y.push(sum.into_iter().map(|s| s as f32).collect());
        }
        self.add_rows(out, &y);
        Ok(())
    }

    fn add_rows(&mut self, out: Buffer, y: &[Vec<f32>]) {
        for (r, y) in y.iter().enumerate() {
            for (o, y) in self.buffers[out.0 as usize].row_mut(r).iter_mut().zip(y) {
                *o += y;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 8] = [0.0, 1.0, -1.0, 2.0, 1.5, 0.5, 3.0, -2.0];

    fn close(found: &[f32], want: &[f32]) {
        for (f, w) in found.iter().zip(want) {
            assert!((f - w).abs() < 2e-6 * w.abs(), "{found:?} {want:?}");
        }
    }

    /// A worked example: V3 rules and V2 rules on the same logits.
    #[test]
    fn noaux_tc_chooses_with_the_bias_and_weighs_without() {
        let shape = RouterShape {
            experts: 8,
            top_k: 2,
            groups: 2,
            groups_kept: 1,
            group_score: GroupScore::TopTwoSum,
            scoring: Scoring::Sigmoid,
            normalize: true,
            scale: 2.5,
        };
        let bias = [0.3, 0.0, 0.0, -0.2, 0.0, 0.1, -0.4, 0.0];
        let (ids, weights) = choose(&shape, &LOGITS, Some(&bias));
        assert_eq!(ids, [4, 5]);
        close(&weights, &[1.419_366_7, 1.080_633_2]);
    }

    #[test]
    fn v2_takes_the_best_expert_as_the_group_score() {
        let shape = RouterShape {
            experts: 8,
            top_k: 2,
            groups: 2,
            groups_kept: 1,
            group_score: GroupScore::Max,
            scoring: Scoring::Softmax,
            normalize: false,
            scale: 16.0,
        };
        let (ids, weights) = choose(&shape, &LOGITS, None);
        assert_eq!(ids, [6, 4]);
        close(&weights, &[8.495_858, 1.895_682_2]);
    }

    #[test]
    fn ties_go_to_the_smaller_index() {
        assert_eq!(top_k(&[1.0, 2.0, 2.0, 1.0, 2.0], 4), [1, 2, 4, 0]);
    }
}
