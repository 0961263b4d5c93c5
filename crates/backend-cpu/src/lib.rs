//! The CPU backend: AVX-512, AVX2, NEON and portable kernels, chosen at run time in one binary.
//!
//! * `detect.rs`: which level this CPU has.
//! * `threads.rs`: the pool; one fork and join per op at most. `numa.rs`: which threads and weights are near.
//! * `packed.rs`, `packing.rs`, `huge.rs`: weights laid out for the kernels, in the background, in large pages.
//! * `simd/`: the kernels. `ops/`: what each op forks and how rows become tasks.
#![deny(unsafe_code)]

mod ahead;
mod bandwidth;
mod cache;
mod detect;
mod huge;
mod kv_b;
mod limits;
mod matrix;
mod memory;
mod numa;
mod ops;
mod packed;
mod packing;
mod paging;
mod profile;
mod rounded;
mod simd;
mod sizes;
mod threads;

use std::{
    path::Path,
    sync::Arc,
    task::{Context, Poll},
};

use oxseek_tensor::{
    Backend, DType, Error, HostMatrix,
    backend::{
        BLOCK_TOKENS, Buffer, Cache, CacheShape, DeviceInfo, ExpertMatrices, Experts, KvB, KvBParts,
        MlaShape, Mlp, OpCost, Read, Rope, RouterShape, Routing, StepInput, Vector, Weight,
    },
    error::{at_most, expect, shape_error},
};

pub use bandwidth::read_bandwidth;
use cache::LatentCache;
pub use detect::Level;
use kv_b::PackedKvB;
pub use limits::{LimitProbe, Limits};
use matrix::{Matrix, MatrixRef};
use memory::PerThread;
use numa::Topology;
use packing::Packer;
use simd::Kernels;
pub use sizes::MatrixCost;
use threads::Pool;

/// Values of decoded weight rows that a thread keeps at a time: half of a usual L2 cache.
const PANEL_VALUES: usize = 128 << 10;
/// Largest FP8 block scale that the kernels take; real ones are far below 1.
const FP8_SCALE_MAX: f32 = 128.0;

/// What a CPU backend is made with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CpuOptions {
    /// Threads that compute, the engine's own included; default: the cores this process may use.
    pub threads: Option<usize>,
    /// SIMD level; default: the best this CPU has.
    pub level: Option<Level>,
    /// What activations are rounded to; default: not at all.
    pub precision: Precision,
}

/// How exact products of activations and weights are. Sums are always F32, and so is everything between products.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Precision {
    /// Activations are F32: results are those of the scalar reference.
    #[default]
    Exact,
    /// Activations are rounded to what the CPU multiplies fastest with the weights' format: BF16 for BF16 and FP8
    /// weights (as PyTorch runs them), 8 bits with a scale per 128 columns for block formats. F32 and F16 weights and
    /// the router stay exact. Attention multiplies BF16: queries, cached rows, the softmax's weights and `kv_b`.
    Native,
}

impl Precision {
    fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Native => "native",
        }
    }
}

/// Activations `[rows_max, cols]`.
struct Activations {
    cols: usize,
    values: Vec<f32>,
    /// Counts the ops that wrote to it.
    version: u64,
}

/// Numbers of an expert's matrices.
#[derive(Clone, Copy)]
struct ExpertRows {
    gate: usize,
    up: usize,
    down: usize,
}

struct RoutingRows {
    top_k: usize,
    ids: Vec<u32>,
    weights: Vec<f32>,
}

struct RopeTable {
    inv_freq: Vec<f32>,
    magnitude: f32,
    /// cos and sin of every row of the step, `[T, pairs, 2]`; made when the step first needs it.
    rows: Vec<f32>,
    /// The step that `rows` belongs to.
    step: u64,
}

/// The CPU as a [`Backend`].
pub struct CpuBackend {
    level: Level,
    kernels: &'static Kernels,
    pool: Pool,
    scratch: PerThread,
    panel_len: usize,
    precision: Precision,
    profile: profile::Profile,
    matrices: Vec<Matrix>,
    packer: Packer,
    /// Routed experts are not packed; their pages are asked for when they are chosen.
    experts_on_disk: bool,
    vectors: Vec<Vec<f32>>,
    experts: Vec<Vec<ExpertRows>>,
    ropes: Vec<RopeTable>,
    buffers: Vec<Activations>,
    routings: Vec<RoutingRows>,
    kv_bs: Vec<kv_b::KvBFactor>,
    kv_b_memory: huge::Arena,
    attention: ops::mla::NativeScratch,
    caches: Vec<LatentCache>,
    reads: Vec<(Buffer, usize)>,
    step: StepInput,
    step_count: u64,
    /// Position of each row in its sequence.
    positions: Vec<usize>,
    /// `0, 1, 2, ...`: rows that are not picked from anywhere.
    identity: Vec<u32>,
    /// Router logits, `[T, E]`.
    logits: Vec<f32>,
    /// The last rounded inputs, one for each rounding.
    rounded: [rounded::LastInput; 2],
    ffn: ops::moe::FfnScratch,
    /// Tasks of the last attention, kept for their memory.
    attention_tasks: Vec<ops::mla::Task>,
}

impl CpuBackend {
    /// A backend on `options.threads` threads.
    ///
    /// # Errors
    /// [`Error::Device`] when the CPU lacks the level, or threads cannot be started.
    pub fn new(options: CpuOptions) -> Result<Self, Error> {
        let (level, kernels) = Level::choose(options.level)?;
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        let pool = Pool::new(options.threads.unwrap_or_else(cores), Topology::read(Path::new("/")))?;
        Ok(Self {
            level,
            kernels,
            scratch: PerThread::new(pool.threads()),
            panel_len: 0,
            precision: options.precision,
            profile: profile::Profile::default(),
            matrices: Vec::new(),
            packer: Packer::new(Arc::clone(pool.nodes())),
            pool,
            experts_on_disk: false,
            vectors: Vec::new(),
            experts: Vec::new(),
            ropes: Vec::new(),
            buffers: Vec::new(),
            routings: Vec::new(),
            kv_bs: Vec::new(),
            kv_b_memory: huge::Arena::default(),
            attention: ops::mla::NativeScratch::default(),
            caches: Vec::new(),
            reads: Vec::new(),
            step: StepInput::default(),
            step_count: 0,
            positions: Vec::new(),
            identity: Vec::new(),
            logits: Vec::new(),
            rounded: Default::default(),
            ffn: ops::moe::FfnScratch::default(),
            attention_tasks: Vec::new(),
        })
    }

    /// Leaves routed experts that are loaded from here on in their files, for machines whose memory does not hold a
    /// packed copy of them. Results are the same, bit by bit.
    pub fn leave_experts_on_disk(&mut self) {
        self.experts_on_disk = true;
    }

    /// The SIMD level in use.
    pub fn level(&self) -> Level {
        self.level
    }

    /// Threads that compute.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    fn rows(&self) -> usize {
        self.step.tokens.len()
    }

    /// Refuses a weight that the kernels cannot take, and makes room to decode or pack its rows.
    fn make_room_for(&mut self, m: &HostMatrix) -> Result<(), Error> {
        if m.rows() == 0 || m.cols() == 0 {
            return Err(shape_error("load_matrix", "elements", 1, 0));
        }
        if let Some(s) = m.scales().and_then(|s| s.iter().find(|s| s.is_nan() || s.abs() >= FP8_SCALE_MAX)) {
            let why = format!("FP8 block scale {s}: the CPU kernels take scales below {FP8_SCALE_MAX}");
            return Err(Error::Device(why));
        }
        if m.dtype() != DType::F32 {
            let rows = m.cols().next_multiple_of(packed::RUN).saturating_mul(matrix::PANEL_ROWS_MIN);
            self.panel_len = self.panel_len.max(PANEL_VALUES).max(rows);
            self.scratch.grow_panels(self.panel_len);
        }
        Ok(())
    }

    /// Takes a weight. Unless `pack`, its rows are packed each time they are used.
    fn admit(&mut self, m: HostMatrix, pack: bool) -> Result<usize, Error> {
        self.make_room_for(&m)?;
        let format = self.precision.packed_format(m.dtype());
        let number = self.matrices.len();
        if let Some(format) = format.filter(|_| pack) {
            self.packer.push(number, m.clone(), format)?;
        }
        self.matrices.push(Matrix::new(m, format));
        Ok(number)
    }

    /// Runs an op and notes what it cost. Two looks at the clock are nothing beside an op.
    fn timed<T>(&mut self, op: &'static str, run: impl FnOnce(&mut Self) -> T) -> T {
        let since = std::time::Instant::now();
        let result = run(self);
        self.profile.add(op, since);
        result
    }

    /// Takes over what the packer has finished.
    fn take_packed(&mut self, wait: bool) {
        while let Some((number, packed)) = self.packer.take(wait) {
            self.matrices[number].set_packed(packed);
        }
    }

    /// Notes that an op writes to `b`: what was rounded from it before is stale.
    fn touch(&mut self, b: Buffer) {
        if let Some(b) = self.buffers.get_mut(b.0 as usize) {
            b.version += 1;
        }
    }

    /// Makes `identity` long enough.
    fn count_to(&mut self, n: usize) {
        for i in self.identity.len()..n {
            self.identity.push(i as u32);
        }
    }

    /// A weight as it was loaded.
    fn matrix(&self, op: &'static str, w: Weight) -> Result<&HostMatrix, Error> {
        let n = self.matrices.len();
        let missing = shape_error(op, "weight handle", n, w.0 as usize);
        self.matrices.get(w.0 as usize).map(Matrix::stored).ok_or(missing)
    }

    /// A weight as products use it.
    fn factor(&self, op: &'static str, w: Weight) -> Result<MatrixRef, Error> {
        self.matrix(op, w)?;
        Ok(self.matrices[w.0 as usize].factor())
    }

    fn vector(&self, op: &'static str, v: Vector, len: usize) -> Result<&[f32], Error> {
        let n = self.vectors.len();
        let vector =
            self.vectors.get(v.0 as usize).ok_or(shape_error(op, "vector handle", n, v.0 as usize))?;
        expect(op, "vector", len, vector.len())?;
        Ok(vector)
    }

    fn buffer(&self, op: &'static str, b: Buffer) -> Result<&Activations, Error> {
        let n = self.buffers.len();
        self.buffers.get(b.0 as usize).ok_or(shape_error(op, "buffer handle", n, b.0 as usize))
    }

    /// The buffer, if it has `rows` rows of `cols` columns.
    fn sized(&self, op: &'static str, b: Buffer, rows: usize, cols: usize) -> Result<&Activations, Error> {
        let a = self.buffer(op, b)?;
        expect(op, "columns", cols, a.cols)?;
        at_most(op, "rows", a.values.len() / a.cols, rows)?;
        Ok(a)
    }

    /// Input and output of an op whose tasks read all of the one while they write the other.
    fn apart(op: &'static str, x: Buffer, out: Buffer) -> Result<(), Error> {
        if x == out {
            Err(shape_error(op, "output buffer apart from", x.0 as usize, out.0 as usize))
        } else {
            Ok(())
        }
    }

    fn cache(
        &self,
        op: &'static str,
        c: Cache,
        layer: usize,
        shape: &MlaShape,
    ) -> Result<&LatentCache, Error> {
        let n = self.caches.len();
        let cache = self.caches.get(c.0 as usize).ok_or(shape_error(op, "cache handle", n, c.0 as usize))?;
        at_most(op, "layer", cache.shape.layers.saturating_sub(1), layer)?;
        expect(op, "cache latent", shape.latent, cache.shape.latent)?;
        expect(op, "cache rope", shape.rope, cache.shape.rope)?;
        match self.step.blocks.iter().find(|b| **b as usize >= cache.shape.blocks) {
            Some(b) => Err(shape_error(op, "block id below", cache.shape.blocks, *b as usize)),
            None => Ok(cache),
        }
    }

    fn routing(&self, op: &'static str, r: Routing, rows: usize) -> Result<&RoutingRows, Error> {
        let n = self.routings.len();
        let routing =
            self.routings.get(r.0 as usize).ok_or(shape_error(op, "routing handle", n, r.0 as usize))?;
        at_most(op, "rows", routing.ids.len() / routing.top_k.max(1), rows)?;
        Ok(routing)
    }
}

fn push<T>(list: &mut Vec<T>, item: T) -> u32 {
    list.push(item);
    (list.len() - 1) as u32
}

/// `n` zeroed values, or an error instead of an abort when there is no memory for them.
fn zeroed(what: &'static str, sizes: &[usize]) -> Result<Vec<f32>, Error> {
    let n = sizes.iter().try_fold(1usize, |n, &s| n.checked_mul(s)).ok_or(Error::Overflow { what })?;
    let bytes = n.checked_mul(4).filter(|b| isize::try_from(*b).is_ok()).ok_or(Error::Overflow { what })?;
    if n == 0 {
        return Err(shape_error("alloc", "elements", 1, 0));
    }
    let mut probe: Vec<f32> = Vec::new();
    probe.try_reserve_exact(n).map_err(|_| Error::OutOfMemory { what, bytes })?;
    drop(probe);
    // `vec!` of zeros takes untouched pages from the system: a large cache costs memory only where it is used.
    Ok(vec![0.0; n])
}

impl CpuBackend {
    fn take_kv_b(
        &mut self,
        shape: &MlaShape,
        matrix: HostMatrix,
        parts: Option<&KvBParts>,
    ) -> Result<KvB, Error> {
        let op = "load_kv_b";
        expect(op, "rows", shape.heads * (shape.nope + shape.value), matrix.rows())?;
        expect(op, "columns", shape.latent, matrix.cols())?;
        let factor = match self.precision {
            Precision::Exact => {
                self.make_room_for(&matrix)?;
                kv_b::Factor::Stored(matrix)
            }
            Precision::Native => {
                let (arena, pool) = (&mut self.kv_b_memory, &mut self.pool);
                kv_b::Factor::Packed(PackedKvB::new(&matrix, parts, shape, arena, pool)?)
            }
        };
        Ok(KvB(push(&mut self.kv_bs, kv_b::KvBFactor { shape: *shape, factor })))
    }
}

impl Backend for CpuBackend {
    fn info(&self) -> DeviceInfo {
        let (cpu, level, threads) = (detect::cpu_description(), self.level, self.threads());
        DeviceInfo {
            backend: "cpu",
            device: format!("{cpu}, kernels {level}, {threads} threads, {} products", self.precision.name()),
        }
    }

    fn load_matrix(&mut self, matrix: HostMatrix) -> Result<Weight, Error> {
        Ok(Weight(self.admit(matrix, true)? as u32))
    }

    fn load_table(&mut self, matrix: HostMatrix) -> Result<Weight, Error> {
        Ok(Weight(self.admit(matrix, false)? as u32))
    }

    fn load_vector(&mut self, values: &[f32]) -> Result<Vector, Error> {
        Ok(Vector(push(&mut self.vectors, values.to_vec())))
    }

    fn load_experts(&mut self, experts: Vec<ExpertMatrices>) -> Result<Experts, Error> {
        let (mut rows, pack) = (Vec::with_capacity(experts.len()), !self.experts_on_disk);
        for e in experts {
            rows.push(ExpertRows {
                gate: self.admit(e.gate, pack)?,
                up: self.admit(e.up, pack)?,
                down: self.admit(e.down, pack)?,
            });
        }
        Ok(Experts(push(&mut self.experts, rows)))
    }

    fn load_kv_b(&mut self, shape: &MlaShape, matrix: HostMatrix) -> Result<KvB, Error> {
        self.take_kv_b(shape, matrix, None)
    }

    fn load_kv_b_apart(
        &mut self,
        shape: &MlaShape,
        matrix: HostMatrix,
        parts: KvBParts,
    ) -> Result<KvB, Error> {
        let op = "load_kv_b_apart";
        expect(op, "rows of keys", shape.heads * shape.latent, parts.keys.rows())?;
        expect(op, "columns of keys", shape.nope, parts.keys.cols())?;
        expect(op, "rows of values", shape.heads * shape.value, parts.values.rows())?;
        expect(op, "columns of values", shape.latent, parts.values.cols())?;
        self.take_kv_b(shape, matrix, Some(&parts))
    }

    fn load_rope(&mut self, inv_freq: &[f32], magnitude: f32) -> Result<Rope, Error> {
        let table = RopeTable { inv_freq: inv_freq.to_vec(), magnitude, rows: Vec::new(), step: 0 };
        Ok(Rope(push(&mut self.ropes, table)))
    }

    fn alloc(&mut self, rows_max: usize, cols: usize) -> Result<Buffer, Error> {
        let values = zeroed("activation buffer", &[rows_max, cols])?;
        self.count_to(rows_max.max(BLOCK_TOKENS));
        Ok(Buffer(push(&mut self.buffers, Activations { cols, values, version: 0 })))
    }

    fn alloc_routing(&mut self, rows_max: usize, top_k: usize) -> Result<Routing, Error> {
        let weights = zeroed("routing", &[rows_max, top_k])?;
        Ok(Routing(push(&mut self.routings, RoutingRows { top_k, ids: vec![0; weights.len()], weights })))
    }

    fn alloc_cache(&mut self, shape: CacheShape) -> Result<Cache, Error> {
        Ok(Cache(push(&mut self.caches, LatentCache::new(shape, self.pool.nodes())?)))
    }

    fn take_profile(&mut self) -> Vec<OpCost> {
        std::mem::take(&mut self.profile.costs)
    }

    fn settle(&mut self) -> Result<(), Error> {
        self.take_packed(true);
        Ok(())
    }

    fn begin_step(&mut self, input: &StepInput) -> Result<(), Error> {
        input.check()?;
        self.packer.step_begins();
        self.take_packed(false);
        self.step.clone_from(input);
        self.step_count += 1;
        self.positions.clear();
        for s in &self.step.segments {
            self.positions.extend(s.start..s.start + s.rows);
        }
        Ok(())
    }

    fn embed(&mut self, table: Weight, out: Buffer) -> Result<(), Error> {
        self.touch(out);
        self.timed("embed", |b| b.embed_rows(table, out))
    }

    fn rms_norm(
        &mut self,
        x: Buffer,
        weight: Vector,
        eps: f32,
        out: Buffer,
        rows: usize,
    ) -> Result<(), Error> {
        self.touch(out);
        self.timed("rms_norm", |b| b.norm_rows(x, weight, eps, out, rows))
    }

    fn matmul(&mut self, x: Buffer, weight: Weight, out: Buffer, rows: usize) -> Result<(), Error> {
        self.touch(out);
        self.timed("matmul", |b| b.project("matmul", x, weight, out, rows, simd::Output::Store))
    }

    fn matmul_add(&mut self, x: Buffer, weight: Weight, out: Buffer, rows: usize) -> Result<(), Error> {
        self.touch(out);
        self.timed("matmul_add", |b| b.project("matmul_add", x, weight, out, rows, simd::Output::Add))
    }

    fn rope_queries(&mut self, shape: &MlaShape, rope: Rope, q: Buffer) -> Result<(), Error> {
        self.touch(q);
        self.timed("rope_queries", |b| b.rotate_queries(shape, rope, q))
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
        self.timed("mla_append", |b| b.append_latent(shape, rope, weight, eps, kv, cache, layer))
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
        self.touch(out);
        self.timed("mla_attend", |b| b.attend(shape, q, kv_b, cache, layer, out))
    }

    fn mlp(&mut self, x: Buffer, mlp: &Mlp, out: Buffer) -> Result<(), Error> {
        self.touch(out);
        self.timed("mlp", |b| b.dense_ffn(x, mlp, out))
    }

    fn route(
        &mut self,
        shape: &RouterShape,
        x: Buffer,
        gate: Weight,
        bias: Option<Vector>,
        out: Routing,
    ) -> Result<(), Error> {
        self.timed("route", |b| b.route_rows(shape, x, gate, bias, out))
    }

    fn moe(
        &mut self,
        x: Buffer,
        routing: Routing,
        experts: Experts,
        shared: Option<&Mlp>,
        out: Buffer,
    ) -> Result<(), Error> {
        self.touch(out);
        self.timed("moe", |b| b.routed_ffn(x, routing, experts, shared, out))
    }

    fn gather_rows(&mut self, x: Buffer, rows: &[u32], out: Buffer) -> Result<(), Error> {
        let op = "gather_rows";
        self.touch(out);
        Self::apart(op, x, out)?;
        let from = self.buffer(op, x)?;
        let (cols, rows_max) = (from.cols, from.values.len() / from.cols);
        self.sized(op, out, rows.len(), cols)?;
        for &r in rows {
            at_most(op, "row", rows_max - 1, r as usize)?;
        }
        let mut to = std::mem::take(&mut self.buffers[out.0 as usize].values);
        for (&r, to) in rows.iter().zip(to.chunks_exact_mut(cols)) {
            to.copy_from_slice(&self.buffers[x.0 as usize].values[r as usize * cols..][..cols]);
        }
        self.buffers[out.0 as usize].values = to;
        Ok(())
    }

    fn concat(&mut self, a: Buffer, b: Buffer, out: Buffer) -> Result<(), Error> {
        let op = "concat";
        self.touch(out);
        let rows = self.rows();
        Self::apart(op, a, out)?;
        Self::apart(op, b, out)?;
        let (left, right) = (self.buffer(op, a)?.cols, self.buffer(op, b)?.cols);
        self.sized(op, a, rows, left)?;
        self.sized(op, b, rows, right)?;
        self.sized(op, out, rows, left + right)?;
        let mut to = std::mem::take(&mut self.buffers[out.0 as usize].values);
        for (r, to) in to.chunks_exact_mut(left + right).take(rows).enumerate() {
            to[..left].copy_from_slice(&self.buffers[a.0 as usize].values[r * left..][..left]);
            to[left..].copy_from_slice(&self.buffers[b.0 as usize].values[r * right..][..right]);
        }
        self.buffers[out.0 as usize].values = to;
        Ok(())
    }

    fn copy_block(&mut self, cache: Cache, from: u32, to: u32) -> Result<(), Error> {
        let op = "copy_block";
        let n = self.caches.len();
        let missing = shape_error(op, "cache handle", n, cache.0 as usize);
        let cache = self.caches.get_mut(cache.0 as usize).ok_or(missing)?;
        at_most(op, "block id", cache.shape.blocks - 1, from.max(to) as usize)?;
        cache.copy_block(from, to);
        Ok(())
    }

    fn write(&mut self, values: &[f32], out: Buffer) -> Result<(), Error> {
        let op = "write";
        self.touch(out);
        let cols = self.buffer(op, out)?.cols;
        expect(op, "values in whole rows", values.len() / cols * cols, values.len())?;
        self.sized(op, out, values.len() / cols, cols)?;
        self.buffers[out.0 as usize].values[..values.len()].copy_from_slice(values);
        Ok(())
    }

    fn read(&mut self, x: Buffer, rows: usize) -> Result<Read, Error> {
        let cols = self.buffer("read", x)?.cols;
        self.sized("read", x, rows, cols)?;
        // Ops run as they are called, so a read-back is ready at once and only the last one is remembered.
        self.reads.clear();
        Ok(Read(push(&mut self.reads, (x, rows))))
    }

    fn poll_read(&mut self, read: Read, _: &mut Context<'_>, out: &mut [f32]) -> Poll<Result<(), Error>> {
        let op = "poll_read";
        let Some(&(x, rows)) = self.reads.get(read.0 as usize) else {
            return Poll::Ready(Err(shape_error(op, "read handle", self.reads.len(), read.0 as usize)));
        };
        if rows > 0 {
            self.packer.step_is_over();
        }
        let x = &self.buffers[x.0 as usize];
        let n = rows * x.cols;
        Poll::Ready(expect(op, "out", n, out.len()).map(|()| out.copy_from_slice(&x.values[..n])))
    }

    fn read_routing(&mut self, routing: Routing, rows: usize) -> Result<(Vec<u32>, Vec<f32>), Error> {
        let r = self.routing("read_routing", routing, rows)?;
        Ok((r.ids[..rows * r.top_k].to_vec(), r.weights[..rows * r.top_k].to_vec()))
    }
}
