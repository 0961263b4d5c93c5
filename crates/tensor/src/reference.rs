//! Every op in scalar code: the truth that kernels are tested against.
//!
//! Written for reading, after the formulas of the papers; a sum runs in index order in F64 and is rounded once,
//! so that the reference is closer to the exact value than any kernel it judges. It is slow and does not care.

mod matmul;
mod mla;
mod moe;
mod norm;
mod rope;

use std::task::{Context, Poll};

use crate::{
    Backend, Error, HostMatrix,
    backend::{
        BLOCK_TOKENS, Buffer, Cache, CacheShape, DeviceInfo, ExpertMatrices, Experts, KvB, MlaShape, Mlp,
        Read, Rope, RouterShape, Routing, Segment, StepInput, Vector, Weight,
    },
    error::{at_most, expect, shape_error},
};

/// Activations `[rows_max, cols]`.
struct Activations {
    cols: usize,
    values: Vec<f32>,
}

impl Activations {
    fn rows_max(&self) -> usize {
        self.values.len() / self.cols
    }
    fn row(&self, r: usize) -> &[f32] {
        &self.values[r * self.cols..][..self.cols]
    }
    fn row_mut(&mut self, r: usize) -> &mut [f32] {
        &mut self.values[r * self.cols..][..self.cols]
    }
}

/// A matrix as F32: the reference expands what no other backend may.
struct Matrix {
    rows: usize,
    cols: usize,
    values: Vec<f32>,
}

impl Matrix {
    fn new(m: &HostMatrix) -> Self {
        let mut values = vec![0.0; m.rows() * m.cols()];
        for (r, row) in values.chunks_exact_mut(m.cols()).enumerate() {
            m.decode_row(r, row);
        }
        Self { rows: m.rows(), cols: m.cols(), values }
    }
    fn row(&self, r: usize) -> &[f32] {
        &self.values[r * self.cols..][..self.cols]
    }
}

struct Expert {
    gate: Matrix,
    up: Matrix,
    down: Matrix,
}

struct RoutingRows {
    top_k: usize,
    ids: Vec<u32>,
    weights: Vec<f32>,
}

struct LatentCache {
    shape: CacheShape,
    /// `[layers][blocks][BLOCK_TOKENS][latent + rope]`, as the cache's format gives them back.
    values: Vec<f32>,
}

impl LatentCache {
    fn width(&self) -> usize {
        self.shape.latent + self.shape.rope
    }
    /// What the cache's format keeps of a row.
    fn rounded(&self, row: &[f32]) -> Result<Vec<f32>, Error> {
        let (format, latent) = (self.shape.format, self.shape.latent);
        let (mut bytes, mut back) = (vec![0; self.shape.row_bytes()?], vec![0.0; row.len()]);
        format.encode_row(row, latent, &mut bytes);
        format.decode_row(&bytes, latent, &mut back);
        Ok(back)
    }
    fn offset(&self, layer: usize, block: u32, slot: usize) -> usize {
        ((layer * self.shape.blocks + block as usize) * BLOCK_TOKENS + slot) * self.width()
    }
}

struct RopeTable {
    inv_freq: Vec<f32>,
    magnitude: f32,
}

/// The scalar reference as a backend.
#[derive(Default)]
pub struct ReferenceBackend {
    matrices: Vec<Matrix>,
    vectors: Vec<Vec<f32>>,
    experts: Vec<Vec<Expert>>,
    ropes: Vec<RopeTable>,
    buffers: Vec<Activations>,
    routings: Vec<RoutingRows>,
    caches: Vec<LatentCache>,
    step: StepInput,
    reads: Vec<(Buffer, usize)>,
}

fn push<T>(list: &mut Vec<T>, item: T) -> u32 {
    list.push(item);
    (list.len() - 1) as u32
}

impl ReferenceBackend {
    /// A backend with nothing loaded.
    pub fn new() -> Self {
        Self::default()
    }

    fn matrix(&self, op: &'static str, w: Weight) -> Result<&Matrix, Error> {
        let n = self.matrices.len();
        self.matrices.get(w.0 as usize).ok_or(shape_error(op, "weight handle", n, w.0 as usize))
    }
    fn vector(&self, op: &'static str, v: Vector) -> Result<&[f32], Error> {
        let n = self.vectors.len();
        self.vectors.get(v.0 as usize).map(Vec::as_slice).ok_or(shape_error(
            op,
            "vector handle",
            n,
            v.0 as usize,
        ))
    }
    fn buffer(&self, op: &'static str, b: Buffer) -> Result<&Activations, Error> {
        let n = self.buffers.len();
        self.buffers.get(b.0 as usize).ok_or(shape_error(op, "buffer handle", n, b.0 as usize))
    }
    /// The buffer, if it has `rows` rows of `cols` columns.
    fn sized(&self, op: &'static str, b: Buffer, rows: usize, cols: usize) -> Result<&Activations, Error> {
        let a = self.buffer(op, b)?;
        expect(op, "columns", cols, a.cols)?;
        at_most(op, "rows", a.rows_max(), rows)?;
        Ok(a)
    }
    fn cache(&self, op: &'static str, c: Cache, layer: usize) -> Result<&LatentCache, Error> {
        let n = self.caches.len();
        let cache = self.caches.get(c.0 as usize).ok_or(shape_error(op, "cache handle", n, c.0 as usize))?;
        at_most(op, "layer", cache.shape.layers.saturating_sub(1), layer)?;
        Ok(cache)
    }
    fn rope(&self, op: &'static str, r: Rope, pairs: usize) -> Result<&RopeTable, Error> {
        let n = self.ropes.len();
        let rope = self.ropes.get(r.0 as usize).ok_or(shape_error(op, "rope handle", n, r.0 as usize))?;
        expect(op, "rope pairs", pairs, rope.inv_freq.len())?;
        Ok(rope)
    }
    fn routing(&self, op: &'static str, r: Routing) -> Result<&RoutingRows, Error> {
        let n = self.routings.len();
        self.routings.get(r.0 as usize).ok_or(shape_error(op, "routing handle", n, r.0 as usize))
    }
    fn rows(&self) -> usize {
        self.step.tokens.len()
    }
    /// Every row of the step with its segment and its position in its sequence.
    fn positions(&self) -> Vec<(Segment, usize)> {
        let rows = |s: &Segment| {
            let s = *s;
            (0..s.rows).map(move |r| (s, s.start + r))
        };
        self.step.segments.iter().flat_map(rows).collect()
    }
    /// Block id of a position of a segment's sequence.
    fn block_of(&self, segment: &Segment, position: usize) -> u32 {
        self.step.blocks[segment.first_block + position / BLOCK_TOKENS]
    }
    fn check_blocks(&self, op: &'static str, blocks: usize) -> Result<(), Error> {
        for &b in &self.step.blocks {
            if b as usize >= blocks {
                return Err(shape_error(op, "block id", blocks, b as usize));
            }
        }
        Ok(())
    }
}

impl Backend for ReferenceBackend {
    fn info(&self) -> DeviceInfo {
        DeviceInfo { backend: "reference", device: "scalar F64 sums, 1 thread".into() }
    }

    fn load_matrix(&mut self, matrix: HostMatrix) -> Result<Weight, Error> {
        Ok(Weight(push(&mut self.matrices, Matrix::new(&matrix))))
    }

    fn load_vector(&mut self, values: &[f32]) -> Result<Vector, Error> {
        Ok(Vector(push(&mut self.vectors, values.to_vec())))
    }

    fn load_experts(&mut self, experts: Vec<ExpertMatrices>) -> Result<Experts, Error> {
        let expand = |e: &ExpertMatrices| Expert {
            gate: Matrix::new(&e.gate),
            up: Matrix::new(&e.up),
            down: Matrix::new(&e.down),
        };
        Ok(Experts(push(&mut self.experts, experts.iter().map(expand).collect())))
    }

    fn load_kv_b(&mut self, shape: &MlaShape, matrix: HostMatrix) -> Result<KvB, Error> {
        let op = "load_kv_b";
        expect(op, "rows", shape.heads * (shape.nope + shape.value), matrix.rows())?;
        expect(op, "columns", shape.latent, matrix.cols())?;
        Ok(KvB(self.load_matrix(matrix)?.0))
    }

    fn load_rope(&mut self, inv_freq: &[f32], magnitude: f32) -> Result<Rope, Error> {
        Ok(Rope(push(&mut self.ropes, RopeTable { inv_freq: inv_freq.to_vec(), magnitude })))
    }

    fn alloc(&mut self, rows_max: usize, cols: usize) -> Result<Buffer, Error> {
        let n = rows_max.checked_mul(cols).ok_or(Error::Overflow { what: "activation buffer" })?;
        if n == 0 {
            return Err(shape_error("alloc", "elements", 1, 0));
        }
        Ok(Buffer(push(&mut self.buffers, Activations { cols, values: vec![0.0; n] })))
    }

    fn alloc_routing(&mut self, rows_max: usize, top_k: usize) -> Result<Routing, Error> {
        let n = rows_max.checked_mul(top_k).ok_or(Error::Overflow { what: "routing" })?;
        Ok(Routing(push(&mut self.routings, RoutingRows { top_k, ids: vec![0; n], weights: vec![0.0; n] })))
    }

    fn alloc_cache(&mut self, shape: CacheShape) -> Result<Cache, Error> {
        let n = [shape.blocks, BLOCK_TOKENS, shape.latent + shape.rope]
            .into_iter()
            .try_fold(shape.layers, usize::checked_mul)
            .ok_or(Error::Overflow { what: "latent cache" })?;
        Ok(Cache(push(&mut self.caches, LatentCache { shape, values: vec![0.0; n] })))
    }

    fn begin_step(&mut self, input: &StepInput) -> Result<(), Error> {
        input.check()?;
        self.step.clone_from(input);
        Ok(())
    }

    fn embed(&mut self, table: Weight, out: Buffer) -> Result<(), Error> {
        let op = "embed";
        let m = self.matrix(op, table)?;
        self.sized(op, out, self.rows(), m.cols)?;
        let mut rows = Vec::new();
        for &token in &self.step.tokens {
            at_most(op, "token", m.rows - 1, token as usize)?;
            rows.extend_from_slice(m.row(token as usize));
        }
        self.buffers[out.0 as usize].values[..rows.len()].copy_from_slice(&rows);
        Ok(())
    }

    fn rms_norm(
        &mut self,
        x: Buffer,
        weight: Vector,
        eps: f32,
        out: Buffer,
        rows: usize,
    ) -> Result<(), Error> {
        self.rms_norm_rows(x, weight, eps, out, rows)
    }

    fn matmul(&mut self, x: Buffer, weight: Weight, out: Buffer, rows: usize) -> Result<(), Error> {
        self.matmul_rows("matmul", x, weight, out, rows, false)
    }

    fn matmul_add(&mut self, x: Buffer, weight: Weight, out: Buffer, rows: usize) -> Result<(), Error> {
        self.matmul_rows("matmul_add", x, weight, out, rows, true)
    }

    fn rope_queries(&mut self, shape: &MlaShape, rope: Rope, q: Buffer) -> Result<(), Error> {
        self.rotate_queries(shape, rope, q)
    }

    fn mla_append(
        &mut self,
        shape: &MlaShape,
        rope: Rope,
        weight: Vector,
        eps: f32,
        kv: Buffer,
        cache: Cache,
        layer: usize,
    ) -> Result<(), Error> {
        self.append_latent(shape, rope, weight, eps, kv, cache, layer)
    }

    fn mla_attend(
        &mut self,
        shape: &MlaShape,
        q: Buffer,
        kv_b: KvB,
        cache: Cache,
        layer: usize,
        out: Buffer,
    ) -> Result<(), Error> {
        self.attend(shape, q, kv_b, cache, layer, out)
    }

    fn mlp(&mut self, x: Buffer, mlp: &Mlp, out: Buffer) -> Result<(), Error> {
        self.mlp_rows(x, mlp, out)
    }

    fn route(
        &mut self,
        shape: &RouterShape,
        x: Buffer,
        gate: Weight,
        bias: Option<Vector>,
        out: Routing,
    ) -> Result<(), Error> {
        self.route_rows(shape, x, gate, bias, out)
    }

    fn moe(
        &mut self,
        x: Buffer,
        routing: Routing,
        experts: Experts,
        shared: Option<&Mlp>,
        out: Buffer,
    ) -> Result<(), Error> {
        self.moe_rows(x, routing, experts, shared, out)
    }

    fn gather_rows(&mut self, x: Buffer, rows: &[u32], out: Buffer) -> Result<(), Error> {
        let op = "gather_rows";
        let x = self.buffer(op, x)?;
        self.sized(op, out, rows.len(), x.cols)?;
        let mut picked = Vec::new();
        for &r in rows {
            at_most(op, "row", x.rows_max() - 1, r as usize)?;
            picked.extend_from_slice(x.row(r as usize));
        }
        self.buffers[out.0 as usize].values[..picked.len()].copy_from_slice(&picked);
        Ok(())
    }

    fn concat(&mut self, a: Buffer, b: Buffer, out: Buffer) -> Result<(), Error> {
        let op = "concat";
        let (a, b) = (self.buffer(op, a)?, self.buffer(op, b)?);
        at_most(op, "rows", a.rows_max().min(b.rows_max()), self.rows())?;
        self.sized(op, out, self.rows(), a.cols + b.cols)?;
        let joined: Vec<f32> =
            (0..self.rows()).flat_map(|r| a.row(r).iter().chain(b.row(r)).copied()).collect();
        self.buffers[out.0 as usize].values[..joined.len()].copy_from_slice(&joined);
        Ok(())
    }

    fn copy_block(&mut self, cache: Cache, from: u32, to: u32) -> Result<(), Error> {
        let op = "copy_block";
        let shape = self.cache(op, cache, 0)?.shape;
        at_most(op, "block id", shape.blocks - 1, from.max(to) as usize)?;
        let cache = &mut self.caches[cache.0 as usize];
        let n = BLOCK_TOKENS * cache.width();
        for layer in 0..shape.layers {
            let (from, to) = (cache.offset(layer, from, 0), cache.offset(layer, to, 0));
            cache.values.copy_within(from..from + n, to);
        }
        Ok(())
    }

    fn write(&mut self, values: &[f32], out: Buffer) -> Result<(), Error> {
        let op = "write";
        let cols = self.buffer(op, out)?.cols;
        expect(op, "values", values.len() / cols * cols, values.len())?;
        self.sized(op, out, values.len() / cols, cols)?;
        self.buffers[out.0 as usize].values[..values.len()].copy_from_slice(values);
        Ok(())
    }

    fn read(&mut self, x: Buffer, rows: usize) -> Result<Read, Error> {
        let cols = self.buffer("read", x)?.cols;
        self.sized("read", x, rows, cols)?;
        self.reads.clear();
        Ok(Read(push(&mut self.reads, (x, rows))))
    }

    fn poll_read(&mut self, read: Read, _: &mut Context<'_>, out: &mut [f32]) -> Poll<Result<(), Error>> {
        let Some(&(x, rows)) = self.reads.get(read.0 as usize) else {
            return Poll::Ready(Err(shape_error(
                "poll_read",
                "read handle",
                self.reads.len(),
                read.0 as usize,
            )));
        };
        let x = &self.buffers[x.0 as usize];
        let n = rows * x.cols;
        Poll::Ready(expect("poll_read", "out", n, out.len()).map(|()| out.copy_from_slice(&x.values[..n])))
    }

    fn read_routing(&mut self, routing: Routing, rows: usize) -> Result<(Vec<u32>, Vec<f32>), Error> {
        let r = self.routing("read_routing", routing)?;
        at_most("read_routing", "rows", r.ids.len() / r.top_k, rows)?;
        Ok((r.ids[..rows * r.top_k].to_vec(), r.weights[..rows * r.top_k].to_vec()))
    }
}
