//! `mlp`, `route`, `moe`: experts grouped by token, so that each weight is read once per step.

use oxseek_tensor::{
    Error,
    backend::{Buffer, Experts, GroupScore, Mlp, RouterShape, Routing, Scoring, Vector, Weight},
    error::{expect, shape_error},
};

use super::{RowShares, WORK_WORTH_A_FORK, matmul::Input};
use crate::{
    CpuBackend,
    ahead::will_need,
    matrix::{Inputs, MatrixRef, Product},
    memory::Shared,
    packed::{RUN, Rounding},
    rounded::{RoundedRows, TILE_TOKENS_MAX, interleave, tiles},
    simd::{Output, RowsRef, WeightRef},
};

/// Tasks per thread of the first fork: enough that the last ones end together.
const TASKS_PER_THREAD: usize = 16;

/// From so many slots on, the second fork has two tasks per thread instead of four: each task reads all inner
/// activations, which are more than the caches hold.
const SLOTS_MANY: usize = 256;

/// Products of `gate`, and as many of `up`, that a task makes at a time: they stay in its L2 cache until they are used.
const GATED_VALUES_TOGETHER: usize = 16 << 10;

/// One MLP and the tokens that go through it.
struct Group {
    gate: MatrixRef,
    up: MatrixRef,
    down: MatrixRef,
    inner: usize,
    /// Its slots in [`FfnScratch::tokens`].
    from: usize,
    to: usize,
    /// Rows of `gate` and `up` that one task takes.
    chunk: usize,
}

impl Group {
    /// Multiply-adds of `gate` and `up`.
    fn work(&self) -> usize {
        (self.to - self.from) * self.inner * self.gate.cols * 2
    }
}

/// What a feed-forward op keeps from step to step for its memory.
#[derive(Default)]
pub(crate) struct FfnScratch {
    groups: Vec<Group>,
    /// Token of each slot, slots ordered by expert and then by token.
    tokens: Vec<u32>,
    /// Weight of each slot.
    weights: Vec<f32>,
    /// The inputs of each group side by side, rounded.
    tiled: [RoundedRows; 2],
    /// `silu(gate x) * up x` of each slot, exact and rounded as the `down` matrices ask.
    inner: Vec<f32>,
    rounded: [RoundedRows; 2],
    /// First task of each group in the first fork.
    first_task: Vec<usize>,
    choice: Choice,
}

/// Scratch of the router.
#[derive(Default)]
struct Choice {
    scores: Vec<f32>,
    biased: Vec<f32>,
    ranks: Vec<f32>,
    order: Vec<u32>,
}

impl CpuBackend {
    pub(crate) fn dense_ffn(&mut self, x: Buffer, mlp: &Mlp, out: Buffer) -> Result<(), Error> {
        let mut f = std::mem::take(&mut self.ffn);
        f.clear();
        let result = self.push_mlp("mlp", &mut f, mlp).and_then(|()| self.run_groups("mlp", &mut f, x, out));
        self.ffn = f;
        result
    }

    pub(crate) fn routed_ffn(
        &mut self,
        x: Buffer,
        routing: Routing,
        experts: Experts,
        shared: Option<&Mlp>,
        out: Buffer,
    ) -> Result<(), Error> {
        let op = "moe";
        let mut f = std::mem::take(&mut self.ffn);
        f.clear();
        let result = self
            .push_routed(op, &mut f, routing, experts)
            .and_then(|()| shared.map_or(Ok(()), |m| self.push_mlp(op, &mut f, m)))
            .and_then(|()| self.run_groups(op, &mut f, x, out));
        self.ffn = f;
        result
    }

    /// A group of all tokens, weight 1.
    fn push_mlp(&self, op: &'static str, f: &mut FfnScratch, mlp: &Mlp) -> Result<(), Error> {
        let (gate, up) = (self.factor(op, mlp.gate)?, self.factor(op, mlp.up)?);
        let down = self.factor(op, mlp.down)?;
        let from = f.tokens.len();
        f.tokens.extend(0..self.rows() as u32);
        f.weights.resize(f.tokens.len(), 1.0);
        f.push(op, gate, up, down, from)
    }

    /// A group per chosen expert, by ascending id.
    fn push_routed(
        &self,
        op: &'static str,
        f: &mut FfnScratch,
        routing: Routing,
        experts: Experts,
    ) -> Result<(), Error> {
        let n = self.experts.len();
        let missing = shape_error(op, "experts handle", n, experts.0 as usize);
        let experts = self.experts.get(experts.0 as usize).ok_or(missing)?;
        let routing = self.routing(op, routing, self.rows())?;
        let slots = self.rows() * routing.top_k;
        if let Some(e) = routing.ids[..slots].iter().find(|e| **e as usize >= experts.len()) {
            return Err(shape_error(op, "expert id below", experts.len(), *e as usize));
        }
        // Weights that may not have been read yet: the disk reads all chosen experts while the first are computed.
        let in_files = self.experts_on_disk;
        for (id, e) in experts.iter().enumerate() {
            let from = f.tokens.len();
            for (slot, &chosen) in routing.ids[..slots].iter().enumerate() {
                if chosen as usize == id {
                    f.tokens.push((slot / routing.top_k) as u32);
                    f.weights.push(routing.weights[slot]);
                }
            }
            if f.tokens.len() > from {
                if in_files {
                    [e.gate, e.up, e.down].iter().for_each(|m| will_need(self.matrices[*m].stored().data()));
                }
                let [gate, up, down] = [e.gate, e.up, e.down].map(|m| self.matrices[m].factor());
                f.push(op, gate, up, down, from)?;
            }
        }
        Ok(())
    }

    /// `out += sum over groups of weight * down(silu(gate x) * up x)`, in two forks: the inner activations of all
    /// groups, then the outputs, divided by columns so that each is summed in the order of the groups.
    fn run_groups(
        &mut self,
        op: &'static str,
        f: &mut FfnScratch,
        x: Buffer,
        out: Buffer,
    ) -> Result<(), Error> {
        Self::apart(op, x, out)?;
        let (rows, width) = (self.rows(), self.buffer(op, x)?.cols);
        self.sized(op, x, rows, width)?;
        self.sized(op, out, rows, width)?;
        if let Some(g) = f.groups.iter().find(|g| g.gate.cols != width) {
            return Err(shape_error(op, "MLP columns", width, g.gate.cols));
        }
        let stride = f.groups.iter().map(|g| g.inner).max().unwrap_or(0);
        f.shape_inner(stride);
        self.count_to(f.tokens.len());
        for g in &f.groups {
            [g.gate, g.up, g.down].iter().for_each(|w| self.profile.product(w, g.to - g.from));
        }
        let x = self.group_inputs(f, x, rows)?;
        self.inner_activations(f, &x, stride)?;
        self.outputs(f, out, width, stride)
    }

    /// The rows of `x` that each group takes, in every form that its weights ask for.
    fn group_inputs(&mut self, f: &mut FfnScratch, x: Buffer, rows: usize) -> Result<GroupInputs, Error> {
        let weights: Vec<MatrixRef> = f.groups.iter().flat_map(|g| [g.gate, g.up]).collect();
        let mut rounded = [None; 2];
        for rounding in self.round_inputs(x, rows, &weights)? {
            let most = self.kernels.tile_tokens(rounding);
            let alone = self.rounded[rounding as usize].rows();
            let (tiled, lists) = (&mut f.tiled[rounding as usize], f.groups.iter().map(|g| g.from..g.to));
            interleave(&mut self.pool, tiled, alone, &f.tokens, lists, most)?;
            rounded[rounding as usize] = Some((alone, tiled.view().from(0)));
        }
        let x = &self.buffers[x.0 as usize];
        Ok(GroupInputs { exact: x.values.as_ptr(), stride: x.cols, rounded })
    }

    fn inner_activations(&mut self, f: &mut FfnScratch, x: &GroupInputs, stride: usize) -> Result<(), Error> {
        let work: usize = f.groups.iter().map(Group::work).sum();
        // Tasks of about equal work, however many tokens an expert has; whole runs of rows, so that a task rounds what
        // it computed.
        let task_work = work.div_ceil(self.pool.threads() * TASKS_PER_THREAD).max(WORK_WORTH_A_FORK);
        f.first_task.clear();
        let mut tasks = 0;
        for g in &mut f.groups {
            let rows =
                (g.inner * task_work / g.work().max(1)).min(GATED_VALUES_TOGETHER / (g.to - g.from).max(1));
            g.chunk = rows.next_multiple_of(RUN).min(g.inner.next_multiple_of(RUN)).max(RUN);
            f.first_task.push(tasks);
            tasks += g.inner.div_ceil(g.chunk);
        }
        let inner = Shared::new(&mut f.inner);
        let rounded = f.rounded.each_mut().map(RoundedRows::view);
        let (groups, tokens, first_task) = (&f.groups, &f.tokens, &f.first_task);
        let (kernels, scratch, identity) = (self.kernels, &self.scratch, &self.identity);
        let order = self.pool.nodes().order(tasks, |task| {
            let group = first_task.partition_point(|&t| t <= task) - 1;
            ((task - first_task[group]) * groups[group].chunk, groups[group].inner)
        });
        self.pool.run(tasks, &|task, thread| {
            let task = order.as_ref().map_or(task, |order| order[task]);
            let group = first_task.partition_point(|&t| t <= task) - 1;
            let g = &groups[group];
            let from = (task - first_task[group]) * g.chunk;
            let to = g.inner.min(from + g.chunk);
            let (n, slots) = (to - from, g.to - g.from);
            // SAFETY: the pool gave this thread its number.
            let scratch = unsafe { scratch.of(thread) };
            let room = if slots > 1 { TILE_TOKENS_MAX * Rounding::Bf16.row_words(n) } else { 0 };
            let (panel, [gated, up, rows, ..]) = scratch.split([slots * n, slots * n, room, 0, 0, 0]);
            // The next task, most likely this thread's own.
            let next = &groups[if to < g.inner { group } else { (group + 1) % groups.len() }];
            let next = next.gate.place(if to < g.inner { to } else { 0 });
            let steps = [(g.gate, &mut *gated, g.up.place(from)), (g.up, &mut *up, next)];
            for (w, y, then) in steps {
                let product = Product {
                    rows: from..to,
                    x: x.of(g, tokens),
                    tokens: &tokens[g.from..g.to],
                    out: y.as_mut_ptr(),
                    out_stride: n,
                    out_rows: &identity[..slots],
                    output: Output::Store,
                    then,
                };
                // SAFETY: tokens are rows of x; the outputs are this thread's.
                unsafe { w.multiply(kernels, &product, panel) };
            }
            let Some(rounding) = g.down.rounding() else {
                for s in 0..slots {
                    let out = inner.at((g.from + s) * stride + from);
                    // SAFETY: only this task writes these columns of this group's slots.
                    unsafe { (kernels.silu_mul)(gated[s * n..].as_ptr(), up[s * n..].as_ptr(), out, n) };
                }
                return;
            };
            // SAFETY: all hold `slots * n` values.
            unsafe { (kernels.silu_mul)(gated.as_ptr(), up.as_ptr(), gated.as_mut_ptr(), slots * n) };
            let out = rounded[rounding as usize];
            if slots == 1 {
                // SAFETY: only this task writes these columns of this group's slots.
                return unsafe { out.round(kernels, rounding, gated.as_ptr(), n, g.from, from) };
            }
            let (first, words) = (rounding.row_words(from), rounding.row_words(n));
            for (tile, width) in tiles(slots, kernels.tile_tokens(rounding)) {
                let mut sources = [std::ptr::null(); TILE_TOKENS_MAX];
                for (j, source) in sources.iter_mut().enumerate().take(width) {
                    let row = rows[j * words..].as_mut_ptr();
                    // SAFETY: `n` values of this slot; `rows` has room for the words of a tile's rows.
                    unsafe { kernels.round(rounding, gated[(tile + j) * n..].as_ptr(), n, row) };
                    *source = row.cast_const();
                }
                // SAFETY: the rows have these words; only this task writes them to this tile.
                unsafe { out.interleave(&sources[..width], first..first + words, g.from + tile) };
            }
        })
    }

    fn outputs(&mut self, f: &mut FfnScratch, out: Buffer, width: usize, stride: usize) -> Result<(), Error> {
        let work: usize = f.groups.iter().map(|g| (g.to - g.from) * g.inner * width).sum();
        let each = if f.tokens.len() < SLOTS_MANY { 4 } else { 2 };
        let shares = RowShares::of_tasks(width, work, self.pool.threads(), each);
        let out = Shared::new(&mut self.buffers[out.0 as usize].values);
        let rounded = f.rounded.each_mut().map(|r| r.view().from(0));
        let inner = Input(f.inner.as_ptr());
        let (groups, tokens, weights) = (&f.groups, &f.tokens, &f.weights);
        let (kernels, scratch, identity) = (self.kernels, &self.scratch, &self.identity);
        self.pool.run(shares.tasks(), &|task, thread| {
            let columns = shares.of(task);
            // SAFETY: the pool gave this thread its number.
            let panel = unsafe { &mut scratch.of(thread).panel };
            for (i, g) in groups.iter().enumerate() {
                let rounded = rounded.map(|r| Some(r.from(g.from)));
                let then = match groups.get(i + 1) {
                    Some(next) => next.down.place(columns.start),
                    None => groups[0].down.place(columns.end.min(width - 1)),
                };
                let product = Product {
                    rows: columns.clone(),
                    x: Inputs { exact: inner.get(), stride, rounded },
                    tokens: &identity[g.from..g.to],
                    out: out.at(columns.start),
                    out_stride: width,
                    out_rows: &tokens[g.from..g.to],
                    output: Output::AddScaled(&weights[g.from..g.to]),
                    then,
                };
                // SAFETY: slots are rows of `inner`, tokens rows of `out`; tasks write disjoint columns.
                unsafe { g.down.multiply(kernels, &product, panel) };
            }
        })
    }

    pub(crate) fn route_rows(
        &mut self,
        shape: &RouterShape,
        x: Buffer,
        gate: Weight,
        bias: Option<Vector>,
        out: Routing,
    ) -> Result<(), Error> {
        let op = "route";
        shape.check()?;
        let rows = self.rows();
        let w = self.matrix(op, gate)?.clone();
        expect(op, "gate rows", shape.experts, w.rows())?;
        self.sized(op, x, rows, w.cols())?;
        let bias = bias.map(|b| self.vector(op, b, shape.experts).map(<[f32]>::to_vec)).transpose()?;
        expect(op, "top_k", shape.top_k, self.routing(op, out, rows)?.top_k)?;
        let mut logits = std::mem::take(&mut self.logits);
        logits.resize(rows * shape.experts, 0.0);
        self.profile.bytes += w.total_bytes() as u64;
        self.profile.multiply(None, rows * shape.experts * w.cols());
        let x = self.buffers[x.0 as usize].values.as_ptr();
        let result = self.gemm(&WeightRef::new(&w), shape.experts, x, rows, &mut logits, Output::Store);
        let routing = &mut self.routings[out.0 as usize];
        for (r, logits) in logits.chunks_exact(shape.experts).enumerate() {
            let slots = r * shape.top_k..(r + 1) * shape.top_k;
            let (ids, weights) = (&mut routing.ids[slots.clone()], &mut routing.weights[slots]);
            self.ffn.choice.choose(shape, logits, bias.as_deref(), ids, weights);
        }
        self.logits = logits;
        result
    }
}

/// The inputs of all groups.
struct GroupInputs {
    exact: *const f32,
    stride: usize,
    /// By [`Rounding`]: rows on their own, and the tiles of groups of several.
    rounded: [Option<(RowsRef, RowsRef)>; 2],
}

// SAFETY: it only points to activations, which nobody writes during the fork.
unsafe impl Send for GroupInputs {}
// SAFETY: as above.
unsafe impl Sync for GroupInputs {}

impl GroupInputs {
    fn of(&self, g: &Group, tokens: &[u32]) -> Inputs {
        let rounded = self.rounded.map(|r| {
            let (alone, tiled) = r?;
            let is_one = g.to - g.from == 1;
            Some(if is_one { alone.from(tokens[g.from] as usize) } else { tiled.from(g.from) })
        });
        Inputs { exact: self.exact, stride: self.stride, rounded }
    }
}

impl FfnScratch {
    fn clear(&mut self) {
        self.groups.clear();
        self.tokens.clear();
        self.weights.clear();
    }

    /// A group of the slots from `from` on.
    fn push(
        &mut self,
        op: &'static str,
        gate: MatrixRef,
        up: MatrixRef,
        down: MatrixRef,
        from: usize,
    ) -> Result<(), Error> {
        expect(op, "up rows", gate.rows, up.rows)?;
        expect(op, "up columns", gate.cols, up.cols)?;
        expect(op, "down columns", gate.rows, down.cols)?;
        expect(op, "down rows", gate.cols, down.rows)?;
        self.groups.push(Group { gate, up, down, inner: gate.rows, from, to: self.tokens.len(), chunk: 0 });
        Ok(())
    }

    /// Makes room for the inner activations of all slots, in the forms that the `down` matrices ask for.
    fn shape_inner(&mut self, stride: usize) {
        let slots = self.tokens.len();
        let asks = |r: Option<Rounding>| self.groups.iter().any(|g| g.down.rounding() == r);
        let [exact, bf16, bytes] = [None, Some(Rounding::Bf16), Some(Rounding::Bytes)].map(asks);
        if exact && self.inner.len() < slots * stride {
            self.inner.resize(slots * stride, 0.0);
        }
        for (asked, rounding) in [(bf16, Rounding::Bf16), (bytes, Rounding::Bytes)] {
            if asked {
                self.rounded[rounding as usize].shape(rounding, slots, stride);
            }
        }
    }
}

impl Choice {
    /// Expert ids by descending choice score, and their weights.
    fn choose(
        &mut self,
        shape: &RouterShape,
        logits: &[f32],
        bias: Option<&[f32]>,
        ids: &mut [u32],
        weights: &mut [f32],
    ) {
        self.score(shape.scoring, logits);
        self.biased.clone_from(&self.scores);
        if let Some(bias) = bias {
            self.biased.iter_mut().zip(bias).for_each(|(s, b)| *s += b);
        }
        if shape.groups > 1 {
            self.drop_groups(shape);
        }
        top_k(&self.biased, shape.top_k, &mut self.order);
        let mut sum = 0.0;
        for (id, &e) in ids.iter_mut().zip(&self.order) {
            *id = e;
            sum += self.scores[e as usize];
        }
        let norm = if shape.normalize && shape.top_k > 1 { sum + 1e-20 } else { 1.0 };
        for (w, &e) in weights.iter_mut().zip(&self.order) {
            *w = self.scores[e as usize] / norm * shape.scale;
        }
    }

    fn score(&mut self, scoring: Scoring, logits: &[f32]) {
        self.scores.clear();
        match scoring {
            Scoring::Sigmoid => self.scores.extend(logits.iter().map(|z| 1.0 / (1.0 + (-z).exp()))),
            Scoring::Softmax => {
                let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                self.scores.extend(logits.iter().map(|z| (z - max).exp()));
                let sum: f32 = self.scores.iter().sum();
                self.scores.iter_mut().for_each(|s| *s /= sum);
            }
        }
    }

    /// Takes the experts of all but the best groups out of the choice.
    fn drop_groups(&mut self, shape: &RouterShape) {
        let size = shape.experts / shape.groups;
        self.ranks.clear();
        for group in self.biased.chunks_exact(size) {
            let (mut best, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
            for &s in group {
                (best, second) = if s > best { (s, best) } else { (best, second.max(s)) };
            }
            self.ranks.push(match shape.group_score {
                GroupScore::Max => best,
                GroupScore::TopTwoSum => best + second,
            });
        }
        top_k(&self.ranks, shape.groups_kept, &mut self.order);
        for (g, group) in self.biased.chunks_exact_mut(size).enumerate() {
            if !self.order.contains(&(g as u32)) {
                group.fill(f32::NEG_INFINITY);
            }
        }
    }
}

/// Indices of the `k` largest values, descending; ties go to the smaller index.
fn top_k(values: &[f32], k: usize, order: &mut Vec<u32>) {
    order.clear();
    order.extend(0..values.len() as u32);
    let descending = |a: &u32, b: &u32| values[*b as usize].total_cmp(&values[*a as usize]).then(a.cmp(b));
    if k < order.len() {
        order.select_nth_unstable_by(k, descending);
        order.truncate(k);
    }
    order.sort_unstable_by(descending);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_go_to_the_smaller_index() {
        let mut order = Vec::new();
        top_k(&[1.0, 2.0, 2.0, 1.0, 2.0], 4, &mut order);
        assert_eq!(order, [1, 2, 4, 0]);
    }
}
