//! The CUDA backend: the NVIDIA driver opened at run time, kernels in one embedded fatbin.
//!
//! * `driver.rs`: the few driver functions that are used, behind checked calls. `device.rs`: devices and their memory.
//! * `kernels.rs`: the kernels' names and machine code; `kernels/*.cu` are their sources, `cargo xtask cuda` builds
//!   them.
//! * `queue.rs`: ops note launches; a whole step goes to the device at once, as a CUDA graph once it came before.
//! * `ops/`: what each op checks and launches.
#![deny(unsafe_code)]

mod device;
mod driver;
mod kernels;
mod ops;
mod queue;

use std::{
    sync::{Arc, atomic::AtomicU64},
    task::{Context, Poll},
};

use oxseek_tensor::{
    Backend, DType, Error, HostMatrix,
    backend::{
        BLOCK_TOKENS, Buffer, Cache, CacheShape, DeviceInfo, ExpertMatrices, Experts, KvB, MlaShape, Mlp,
        Read, Rope, RouterShape, Routing, StepInput, Vector, Weight,
    },
    error::{at_most, expect, shape_error},
};

use device::{Device, Pool};
use driver::{DevicePtr, Driver};
use kernels::Kernel;
use queue::{Queue, Shape, arguments};

/// Most rows of a step: what the second dimension of a grid allows.
const STEP_ROWS_MAX: usize = 65_535;
/// Columns that the tensor cores take in one order.
const RUN: usize = 128;
/// What the columns of a product are a multiple of.
const COLUMNS: usize = 64;
/// Deviation of random vectors: norms and biases of benchmarks.
const RANDOM_VECTOR: f32 = 0.1;
/// Bytes that are copied to measure the memory's bandwidth.
const COPY_BYTES: usize = 512 << 20;
/// Values that are worth a thread that copies them, and most such threads.
const COPY_VALUES_OF_THREAD: usize = 1 << 20;
const COPY_THREADS_MAX: usize = 6;
/// Bytes of a `Matrix` of the kernels.
const MATRIX_BYTES: usize = 32;

/// What a CUDA backend is made with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CudaOptions {
    /// Which of the machine's devices, as the driver counts them (`CUDA_VISIBLE_DEVICES` is heeded).
    pub ordinal: usize,
    /// What activations are rounded to; default: not at all.
    pub precision: Precision,
    /// For benchmarks: weights are random numbers made on the device, what is loaded gives only shapes and formats.
    pub random_weights: bool,
}

/// How exact products of activations and weights are. Sums are always F32.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Precision {
    /// Activations are F32: results are those of the scalar reference.
    #[default]
    Exact,
    /// Activations are rounded to BF16 for the tensor cores where weights are BF16 or FP8 and their columns a multiple
    /// of 64; attention multiplies BF16 where the cache is BF16. The router and everything else stay exact.
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

/// How many CUDA devices this machine has.
///
/// # Errors
/// [`Error::Device`] with the reason: no driver, or one that is too old.
pub fn device_count() -> Result<usize, Error> {
    Driver::get()?.device_count()
}

/// Activations `[rows_max, cols]`.
#[derive(Clone, Copy)]
struct Activations {
    rows_max: usize,
    cols: usize,
    at: DevicePtr,
    /// The same in BF16, made when it is first wanted.
    rounded: DevicePtr,
    /// Rows of `rounded` that are those of `at`.
    rounded_rows: usize,
}

/// A weight on the device.
#[derive(Clone, Copy)]
struct Matrix {
    rows: usize,
    cols: usize,
    dtype: DType,
    /// How the tensor cores multiply it, if they do.
    product: Option<Product>,
    /// The `Matrix` of the kernels.
    record: DevicePtr,
}

/// `Matrix` of the kernels.
type Record = [u8; MATRIX_BYTES];

/// What the tensor cores multiply BF16 activations with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Product {
    Bf16,
    Fp8,
}

/// A layer's `kv_b`: as loaded, and in BF16 for the tensor cores.
#[derive(Clone, Copy)]
struct KvBFactor {
    matrix: Matrix,
    rounded: Option<RoundedKvB>,
}

/// `kv_b` in BF16: `W_UK` of each head, transposed, with columns of zeros behind, and `W_UV`.
#[derive(Clone, Copy)]
struct RoundedKvB {
    keys: DevicePtr,
    values: DevicePtr,
}

struct ExpertSet {
    /// Three records (gate, up, down) per expert.
    records: DevicePtr,
    /// `[rows, cols]` of the three matrices of each expert.
    sizes: Vec<[(usize, usize); 3]>,
    inner_max: usize,
    /// How the tensor cores multiply all of them.
    product: Option<Product>,
}

struct RoutingRows {
    rows_max: usize,
    top_k: usize,
    /// Experts of the router that wrote it last.
    experts: usize,
    ids: DevicePtr,
    weights: DevicePtr,
    /// The choices of a row by rising expert id.
    order: DevicePtr,
    /// Of a single row: its choices by expert, as `moe_group` makes them for many.
    list: DevicePtr,
    tiles: DevicePtr,
    /// Whether the router that wrote it last had a single row.
    single: bool,
    /// Whether its kernels let the next ones begin only after those in front of them.
    in_order: bool,
}

struct RopeTable {
    pairs: usize,
    frequencies: DevicePtr,
    magnitude: f32,
}

struct LatentCache {
    shape: CacheShape,
    row_bytes: usize,
    at: DevicePtr,
}

/// What `begin_step` brings to the device, in memory that grows when a step needs more.
#[derive(Default)]
struct StepArrays {
    rows_max: usize,
    blocks_max: usize,
    /// Four arrays one after the other, so that one copy brings them.
    tokens: DevicePtr,
    positions: DevicePtr,
    tables: DevicePtr,
    blocks: DevicePtr,
}

/// Memory that an op uses for itself; it grows, and what it grew out of stays in the pool.
#[derive(Default)]
struct Room {
    at: DevicePtr,
    bytes: usize,
}

/// An NVIDIA GPU as a [`Backend`].
pub struct CudaBackend {
    device: Arc<Device>,
    options: CudaOptions,
    /// Seed of the next random weight.
    seed: usize,
    // Dropped in this order: the queue waits for the device, then the memory goes.
    queue: Queue,
    pool: Pool,
    matrices: Vec<Matrix>,
    kv_bs: Vec<KvBFactor>,
    vectors: Vec<(DevicePtr, usize)>,
    experts: Vec<ExpertSet>,
    ropes: Vec<RopeTable>,
    buffers: Vec<Activations>,
    routings: Vec<RoutingRows>,
    caches: Vec<LatentCache>,
    step: StepInput,
    arrays: StepArrays,
    /// Row numbers of `gather_rows`, and whether a waiting launch uses them.
    gathered: Room,
    gathering: bool,
    logits: Room,
    /// Zeros between the kernels that count in it, once there are any.
    arrived: DevicePtr,
    absorbed: Room,
    of_nope: Room,
    means: Room,
    inner: Room,
    shared_inner: Room,
    grouped: Room,
    tiles: Room,
    outer: Room,
    sums: Room,
    totals: Room,
    read: Option<(Buffer, usize)>,
}

impl CudaBackend {
    /// A backend on one device.
    ///
    /// # Errors
    /// [`Error::Device`] in words: no driver, too old a driver, no such device, too old a device.
    pub fn new(options: CudaOptions) -> Result<Self, Error> {
        let device = Device::open(options.ordinal)?;
        device.enter()?;
        Ok(Self {
            queue: Queue::new(Arc::clone(&device))?,
            pool: Pool::new(Arc::clone(&device)),
            device,
            options,
            seed: 1,
            matrices: Vec::new(),
            kv_bs: Vec::new(),
            vectors: Vec::new(),
            experts: Vec::new(),
            ropes: Vec::new(),
            buffers: Vec::new(),
            routings: Vec::new(),
            caches: Vec::new(),
            step: StepInput::default(),
            arrays: StepArrays::default(),
            gathered: Room::default(),
            gathering: false,
            logits: Room::default(),
            arrived: 0,
            absorbed: Room::default(),
            of_nope: Room::default(),
            means: Room::default(),
            inner: Room::default(),
            shared_inner: Room::default(),
            grouped: Room::default(),
            tiles: Room::default(),
            outer: Room::default(),
            sums: Room::default(),
            totals: Room::default(),
            read: None,
        })
    }

    /// Free and total bytes of the device's memory.
    ///
    /// # Errors
    /// [`Error::Device`]
    pub fn memory(&self) -> Result<(usize, usize), Error> {
        self.device.enter()?;
        self.device.driver.memory()
    }

    /// Bytes per second that the device's memory reads and writes together, in a large copy.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] or [`Error::Device`].
    pub fn copy_bandwidth(&mut self) -> Result<f64, Error> {
        const COPIES: usize = 20;
        self.device.enter()?;
        let mut pool = Pool::new(Arc::clone(&self.device));
        let (from, to) = (pool.take("copy", COPY_BYTES)?, pool.take("copy", COPY_BYTES)?);
        self.queue.copy(to, from, COPY_BYTES)?;
        self.queue.wait()?;
        let start = std::time::Instant::now();
        for _ in 0..COPIES {
            self.queue.copy(to, from, COPY_BYTES)?;
        }
        self.queue.wait()?;
        Ok((2 * COPIES * COPY_BYTES) as f64 / start.elapsed().as_secs_f64())
    }

    /// Nanoseconds in which this backend waited for the device, from its start on; it goes on counting.
    pub fn waited(&self) -> Arc<AtomicU64> {
        self.queue.waited()
    }

    /// Bytes that this backend took from the device.
    pub fn taken_bytes(&self) -> usize {
        self.pool.taken()
    }

    fn rows(&self) -> usize {
        self.step.tokens.len()
    }

    fn matrix(&self, op: &'static str, w: Weight) -> Result<Matrix, Error> {
        found(op, "weight handle", &self.matrices, w.0).copied()
    }

    fn vector(&self, op: &'static str, v: Vector, len: usize) -> Result<DevicePtr, Error> {
        let &(at, found) = found(op, "vector handle", &self.vectors, v.0)?;
        expect(op, "vector", len, found)?;
        Ok(at)
    }

    fn buffer(&self, op: &'static str, b: Buffer) -> Result<Activations, Error> {
        found(op, "buffer handle", &self.buffers, b.0).copied()
    }

    /// The buffer, if it has `rows` rows of `cols` columns.
    fn sized(&self, op: &'static str, b: Buffer, rows: usize, cols: usize) -> Result<Activations, Error> {
        let a = self.buffer(op, b)?;
        expect(op, "columns", cols, a.cols)?;
        at_most(op, "rows", a.rows_max, rows)?;
        Ok(a)
    }

    /// Input and output of an op whose blocks read all of the one while they write the other.
    fn apart(op: &'static str, x: Buffer, out: Buffer) -> Result<(), Error> {
        if x == out {
            Err(shape_error(op, "output buffer apart from", x.0 as usize, out.0 as usize))
        } else {
            Ok(())
        }
    }

    /// Notes that an op writes to `b`: what was rounded from it is stale.
    fn touch(&mut self, b: Buffer) {
        if let Some(a) = self.buffers.get_mut(b.0 as usize) {
            a.rounded_rows = 0;
        }
    }

    /// Where the BF16 rows of `b` go.
    fn room_for_rounded(&mut self, op: &'static str, b: Buffer) -> Result<DevicePtr, Error> {
        let a = self.buffer(op, b)?;
        if a.rounded != 0 {
            return Ok(a.rounded);
        }
        let at = self.pool.take("rounded activations", a.rows_max * a.cols * 2)?;
        self.buffers[b.0 as usize].rounded = at;
        Ok(at)
    }

    /// The first `rows` rows of `b` in BF16.
    fn rounded(&mut self, op: &'static str, b: Buffer, rows: usize) -> Result<DevicePtr, Error> {
        let to = self.room_for_rounded(op, b)?;
        let a = self.buffer(op, b)?;
        if a.rounded_rows < rows {
            let n = rows * a.cols;
            at_most(op, "activations", i32::MAX as usize, n)?;
            let shape = Shape::new([n.div_ceil(1024).min(1024), 1, 1], 256);
            self.queue.push(Kernel::RoundRows, shape, arguments![a.at, to, n]);
            self.buffers[b.0 as usize].rounded_rows = rows;
        }
        Ok(to)
    }

    fn rope(&self, op: &'static str, r: Rope, rope: usize) -> Result<&RopeTable, Error> {
        let table = found(op, "rope handle", &self.ropes, r.0)?;
        expect(op, "rope pairs", rope / 2, table.pairs)?;
        Ok(table)
    }

    fn cache(
        &self,
        op: &'static str,
        c: Cache,
        layer: usize,
        shape: &MlaShape,
    ) -> Result<&LatentCache, Error> {
        let cache = found(op, "cache handle", &self.caches, c.0)?;
        at_most(op, "layer", cache.shape.layers.saturating_sub(1), layer)?;
        expect(op, "cache latent", shape.latent, cache.shape.latent)?;
        expect(op, "cache rope", shape.rope, cache.shape.rope)?;
        match self.step.blocks.iter().find(|b| **b as usize >= cache.shape.blocks) {
            Some(b) => Err(shape_error(op, "block id below", cache.shape.blocks, *b as usize)),
            None => Ok(cache),
        }
    }

    /// `Step` of the kernels.
    fn step_argument(&self) -> [u64; 4] {
        let a = &self.arrays;
        [a.tokens, a.positions, a.tables, a.blocks]
    }

    /// Takes memory and fills it.
    fn place(&mut self, what: &'static str, bytes: &[u8]) -> Result<DevicePtr, Error> {
        let at = self.pool.take(what, bytes.len())?;
        self.queue.upload(at, bytes)?;
        Ok(at)
    }

    /// Takes zeroed memory.
    fn zeroed(&mut self, what: &'static str, sizes: &[usize]) -> Result<DevicePtr, Error> {
        let bytes = sizes.iter().try_fold(1usize, |n, s| n.checked_mul(*s));
        let bytes = bytes.filter(|b| isize::try_from(*b).is_ok()).ok_or(Error::Overflow { what })?;
        if bytes == 0 {
            return Err(shape_error("alloc", "elements", 1, 0));
        }
        let at = self.pool.take(what, bytes)?;
        self.queue.zero(at, bytes)?;
        Ok(at)
    }

    /// Brings a weight to the device and gives what the kernels know of it.
    fn bring(&mut self, m: &HostMatrix) -> Result<Record, Error> {
        if m.rows() == 0 || m.cols() == 0 {
            return Err(shape_error("load_matrix", "elements", 1, 0));
        }
        for size in [m.rows(), m.cols(), m.row_bytes()] {
            at_most("load_matrix", "rows, columns or bytes of a row", i32::MAX as usize, size)?;
        }
        if self.options.random_weights {
            return self.bring_random(m);
        }
        let data = self.place("weights", m.data())?;
        let scales = match (m.scales(), m.group_scales()) {
            (Some(s), _) => self.place("block scales", &bytes_of(s))?,
            (None, Some(s)) => self.place("group scales", s)?,
            (None, None) => 0,
        };
        m.release();
        Ok(record_of(m, data, scales))
    }

    /// A weight of the same shape and format whose values are random.
    fn bring_random(&mut self, m: &HostMatrix) -> Result<Record, Error> {
        let deviation = 1.0 / (m.cols() as f32).sqrt();
        let elements = m.rows() * m.cols();
        let (data, scales) = match m.dtype() {
            DType::F32 | DType::BF16 => (self.random(m.dtype(), elements, deviation)?, 0),
            DType::F8E4M3 => {
                let grid = m.rows().div_ceil(128) * m.cols().div_ceil(128);
                (self.random(m.dtype(), elements, 1.0)?, self.random(DType::F32, grid, deviation)?)
            }
            other => {
                let (op, dtype) = ("random weights", other.name());
                return Err(Error::Unsupported { op, backend: "cuda", dtype });
            }
        };
        Ok(record_of(m, data, scales))
    }

    fn random(&mut self, dtype: DType, n: usize, deviation: f32) -> Result<DevicePtr, Error> {
        let at = self.pool.take("weights", n * dtype.block_bytes())?;
        self.seed += 1;
        let shape = Shape::new([n.div_ceil(1024).min(4096), 1, 1], 256);
        self.queue.push(
            Kernel::FillRandom,
            shape,
            arguments![at, n, format_code(dtype), deviation, self.seed],
        );
        self.queue.flush()?;
        Ok(at)
    }

    /// How the tensor cores multiply a weight, if they do.
    fn product_of(&self, m: &HostMatrix) -> Option<Product> {
        let product = match m.dtype() {
            DType::BF16 => Product::Bf16,
            DType::F8E4M3 => Product::Fp8,
            _ => return None,
        };
        (self.options.precision == Precision::Native && m.cols().is_multiple_of(COLUMNS)).then_some(product)
    }

    fn admit(&mut self, m: &HostMatrix) -> Result<Matrix, Error> {
        self.device.enter()?;
        let record = self.bring(m)?;
        let (rows, cols, dtype, product) = (m.rows(), m.cols(), m.dtype(), self.product_of(m));
        Ok(Matrix { rows, cols, dtype, product, record: self.place("weights", &record)? })
    }

    /// Makes `room` at least `bytes` large.
    fn grow(
        pool: &mut Pool,
        room: &mut Room,
        what: &'static str,
        sizes: &[usize],
    ) -> Result<DevicePtr, Error> {
        let bytes =
            sizes.iter().try_fold(1usize, |n, s| n.checked_mul(*s)).ok_or(Error::Overflow { what })?;
        if bytes > room.bytes {
            let bytes = bytes.checked_next_power_of_two().ok_or(Error::Overflow { what })?;
            *room = Room { at: pool.take(what, bytes)?, bytes };
        }
        Ok(room.at)
    }

    /// Makes room for the arrays of a step.
    fn grow_arrays(&mut self, rows: usize, blocks: usize) -> Result<(), Error> {
        let now = &self.arrays;
        if rows <= now.rows_max && blocks <= now.blocks_max {
            return Ok(());
        }
        let rows_max = rows.next_power_of_two().max(now.rows_max).max(64);
        let blocks_max = blocks.next_power_of_two().max(now.blocks_max).max(256);
        let tokens = self.pool.take("step", 4 * (3 * rows_max + blocks_max))?;
        let part = |n: usize| tokens + (4 * n * rows_max) as u64;
        let (positions, tables, blocks) = (part(1), part(2), part(3));
        self.arrays = StepArrays { rows_max, blocks_max, tokens, positions, tables, blocks };
        Ok(())
    }
}

/// What a handle names.
fn found<'a, T>(op: &'static str, what: &'static str, list: &'a [T], handle: u32) -> Result<&'a T, Error> {
    list.get(handle as usize).ok_or(shape_error(op, what, list.len(), handle as usize))
}

fn push<T>(list: &mut Vec<T>, item: T) -> u32 {
    list.push(item);
    (list.len() - 1) as u32
}

/// A format as the kernels count them.
fn format_code(dtype: DType) -> usize {
    DType::ALL.iter().position(|d| *d == dtype).unwrap_or_default()
}

fn record_of(m: &HostMatrix, data: DevicePtr, scales: DevicePtr) -> Record {
    let mut record = [0; MATRIX_BYTES];
    record[..8].copy_from_slice(&data.to_le_bytes());
    record[8..16].copy_from_slice(&scales.to_le_bytes());
    let sizes = [format_code(m.dtype()), m.rows(), m.cols(), m.row_bytes()];
    for (field, v) in record[16..].chunks_exact_mut(4).zip(sizes) {
        field.copy_from_slice(&(v as u32).to_le_bytes());
    }
    record
}

fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn bytes_of_words(words: impl Iterator<Item = u32>) -> Vec<u8> {
    words.flat_map(u32::to_le_bytes).collect()
}

impl Backend for CudaBackend {
    fn info(&self) -> DeviceInfo {
        let facts = &self.device.facts;
        let (major, minor) = facts.capability;
        DeviceInfo {
            backend: "cuda",
            device: format!(
                "{}, compute capability {major}.{minor}, {} multiprocessors, {} products",
                facts.name,
                facts.multiprocessors,
                self.options.precision.name()
            ),
        }
    }

    fn load_matrix(&mut self, matrix: HostMatrix) -> Result<Weight, Error> {
        let matrix = self.admit(&matrix)?;
        Ok(Weight(push(&mut self.matrices, matrix)))
    }

    fn load_vector(&mut self, values: &[f32]) -> Result<Vector, Error> {
        self.device.enter()?;
        let at = if self.options.random_weights {
            self.random(DType::F32, values.len(), RANDOM_VECTOR)?
        } else {
            self.place("vector", &bytes_of(values))?
        };
        Ok(Vector(push(&mut self.vectors, (at, values.len()))))
    }

    fn load_experts(&mut self, experts: Vec<ExpertMatrices>) -> Result<Experts, Error> {
        self.device.enter()?;
        let (mut records, mut sizes) = (Vec::new(), Vec::new());
        let first = experts.first().and_then(|e| self.product_of(&e.gate));
        let mut alike = true;
        for e in &experts {
            let three = [&e.gate, &e.up, &e.down];
            alike &= three.iter().all(|m| self.product_of(m) == first);
            for m in three {
                records.extend(self.bring(m)?);
            }
            sizes.push(three.map(|m| (m.rows(), m.cols())));
        }
        let inner_max = sizes.iter().map(|s| s[0].0).max().unwrap_or(0);
        let records = self.place("experts", &records)?;
        Ok(Experts(push(
            &mut self.experts,
            ExpertSet { records, sizes, inner_max, product: first.filter(|_| alike) },
        )))
    }

    fn load_kv_b(&mut self, shape: &MlaShape, matrix: HostMatrix) -> Result<KvB, Error> {
        let op = "load_kv_b";
        expect(op, "rows", shape.heads * (shape.nope + shape.value), matrix.rows())?;
        expect(op, "columns", shape.latent, matrix.cols())?;
        let matrix = self.admit(&matrix)?;
        let rounded = match self.options.precision {
            Precision::Exact => None,
            Precision::Native => {
                let MlaShape { heads, nope, value, latent, .. } = *shape;
                let padded = nope.next_multiple_of(COLUMNS);
                let keys = self.zeroed("kv_b in BF16", &[heads, latent, padded, 2])?;
                let values = self.pool.take("kv_b in BF16", heads * value * latent * 2)?;
                let rows = Shape::new([matrix.rows, 1, 1], 256);
                let arguments = arguments![matrix.record, keys, values, nope, value, padded];
                self.queue.push(Kernel::SplitKvB, rows, arguments);
                self.queue.flush()?;
                Some(RoundedKvB { keys, values })
            }
        };
        Ok(KvB(push(&mut self.kv_bs, KvBFactor { matrix, rounded })))
    }

    fn load_rope(&mut self, inv_freq: &[f32], magnitude: f32) -> Result<Rope, Error> {
        self.device.enter()?;
        let frequencies = self.place("rotary frequencies", &bytes_of(inv_freq))?;
        let table = RopeTable { pairs: inv_freq.len(), frequencies, magnitude };
        Ok(Rope(push(&mut self.ropes, table)))
    }

    fn alloc(&mut self, rows_max: usize, cols: usize) -> Result<Buffer, Error> {
        self.device.enter()?;
        let at = self.zeroed("activation buffer", &[rows_max, cols, 4])?;
        Ok(Buffer(push(&mut self.buffers, Activations { rows_max, cols, at, rounded: 0, rounded_rows: 0 })))
    }

    fn alloc_routing(&mut self, rows_max: usize, top_k: usize) -> Result<Routing, Error> {
        self.device.enter()?;
        let mut array = || self.zeroed("routing", &[rows_max, top_k, 4]);
        let (ids, weights, order) = (array()?, array()?, array()?);
        let list = self.zeroed("routing", &[top_k, 4])?;
        let tiles = self.zeroed("routing", &[top_k + 1, ops::TILE_BYTES])?;
        let routing = RoutingRows {
            rows_max,
            top_k,
            experts: 1,
            ids,
            weights,
            order,
            list,
            tiles,
            single: false,
            in_order: false,
        };
        Ok(Routing(push(&mut self.routings, routing)))
    }

    fn alloc_cache(&mut self, shape: CacheShape) -> Result<Cache, Error> {
        self.device.enter()?;
        let (row_bytes, bytes) = (shape.row_bytes()?, shape.bytes()?);
        let at = self.zeroed("latent cache", &[bytes])?;
        Ok(Cache(push(&mut self.caches, LatentCache { shape, row_bytes, at })))
    }

    fn begin_step(&mut self, input: &StepInput) -> Result<(), Error> {
        let op = "begin_step";
        input.check()?;
        at_most(op, "rows", STEP_ROWS_MAX, input.tokens.len())?;
        let last = input.segments.iter().map(|s| s.start + s.rows).max().unwrap_or(0);
        at_most(op, "position", i32::MAX as usize, last)?;
        at_most(op, "blocks", i32::MAX as usize, input.blocks.len())?;
        self.device.enter()?;
        self.queue.flush()?;
        self.gathering = false;
        self.grow_arrays(input.tokens.len(), input.blocks.len())?;
        let rows_max = self.arrays.rows_max;
        let mut words = vec![0; 3 * rows_max];
        words[..input.tokens.len()].copy_from_slice(&input.tokens);
        for s in &input.segments {
            for r in 0..s.rows {
                words[rows_max + s.row + r] = (s.start + r) as u32;
                words[2 * rows_max + s.row + r] = s.first_block as u32;
            }
        }
        words.extend(&input.blocks);
        self.queue.upload(self.arrays.tokens, &bytes_of_words(words.into_iter()))?;
        self.step.clone_from(input);
        Ok(())
    }

    fn embed(&mut self, table: Weight, out: Buffer) -> Result<(), Error> {
        self.touch(out);
        self.embed_tokens(table, out)
    }

    fn rms_norm(
        &mut self,
        x: Buffer,
        weight: Vector,
        eps: f32,
        out: Buffer,
        rows: usize,
    ) -> Result<(), Error> {
        self.norm_rows(x, weight, eps, out, rows)
    }

    fn matmul(&mut self, x: Buffer, weight: Weight, out: Buffer, rows: usize) -> Result<(), Error> {
        self.touch(out);
        self.matmul_rows("matmul", x, weight, out, rows, false)
    }

    fn matmul_add(&mut self, x: Buffer, weight: Weight, out: Buffer, rows: usize) -> Result<(), Error> {
        self.touch(out);
        self.matmul_rows("matmul_add", x, weight, out, rows, true)
    }

    fn rope_queries(&mut self, shape: &MlaShape, rope: Rope, q: Buffer) -> Result<(), Error> {
        self.touch(q);
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
        self.touch(out);
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
        self.touch(out);
        self.moe_rows(x, routing, experts, shared, out)
    }

    fn gather_rows(&mut self, x: Buffer, rows: &[u32], out: Buffer) -> Result<(), Error> {
        let op = "gather_rows";
        self.touch(out);
        Self::apart(op, x, out)?;
        let x = self.buffer(op, x)?;
        let out = self.sized(op, out, rows.len(), x.cols)?;
        for &r in rows {
            at_most(op, "row", x.rows_max - 1, r as usize)?;
        }
        self.device.enter()?;
        if self.gathering {
            self.queue.flush()?;
        }
        self.gathering = true;
        let list =
            Self::grow(&mut self.pool, &mut self.gathered, "rows to gather", &[rows.len().max(64), 4])?;
        self.queue.upload(list, &bytes_of_words(rows.iter().copied()))?;
        let shape = Shape::new([rows.len(), 1, 1], 256);
        self.queue.push(Kernel::GatherRows, shape, arguments![x.at, list, out.at, x.cols]);
        Ok(())
    }

    fn concat(&mut self, a: Buffer, b: Buffer, out: Buffer) -> Result<(), Error> {
        let op = "concat";
        self.touch(out);
        Self::apart(op, a, out)?;
        Self::apart(op, b, out)?;
        let (a, b) = (self.buffer(op, a)?, self.buffer(op, b)?);
        at_most(op, "rows", a.rows_max.min(b.rows_max), self.rows())?;
        let out = self.sized(op, out, self.rows(), a.cols + b.cols)?;
        let shape = Shape::new([self.rows(), 1, 1], 256);
        self.queue.push(Kernel::Concat, shape, arguments![a.at, b.at, out.at, a.cols, b.cols]);
        Ok(())
    }

    fn copy_block(&mut self, cache: Cache, from: u32, to: u32) -> Result<(), Error> {
        let op = "copy_block";
        let cache = found(op, "cache handle", &self.caches, cache.0)?;
        at_most(op, "block id", cache.shape.blocks - 1, from.max(to) as usize)?;
        self.device.enter()?;
        let bytes = BLOCK_TOKENS * cache.row_bytes;
        for layer in 0..cache.shape.layers {
            let at = |block: u32| cache.at + ((layer * cache.shape.blocks + block as usize) * bytes) as u64;
            self.queue.copy(at(to), at(from), bytes)?;
        }
        Ok(())
    }

    fn write(&mut self, values: &[f32], out: Buffer) -> Result<(), Error> {
        let op = "write";
        self.touch(out);
        let cols = self.buffer(op, out)?.cols;
        expect(op, "values", values.len() / cols * cols, values.len())?;
        let out = self.sized(op, out, values.len() / cols, cols)?;
        self.device.enter()?;
        self.queue.flush()?;
        self.queue.upload(out.at, &bytes_of(values))
    }

    fn read(&mut self, x: Buffer, rows: usize) -> Result<Read, Error> {
        let cols = self.buffer("read", x)?.cols;
        let from = self.sized("read", x, rows, cols)?;
        self.device.enter()?;
        self.read = None;
        self.queue.download(from.at, rows * cols * 4)?;
        self.read = Some((x, rows));
        Ok(Read(0))
    }

    fn poll_read(&mut self, read: Read, _: &mut Context<'_>, out: &mut [f32]) -> Poll<Result<(), Error>> {
        Poll::Ready(self.fetch(read, out))
    }

    fn read_routing(&mut self, routing: Routing, rows: usize) -> Result<(Vec<u32>, Vec<f32>), Error> {
        let op = "read_routing";
        let r = found(op, "routing handle", &self.routings, routing.0)?;
        at_most(op, "rows", r.rows_max, rows)?;
        let (n, ids, weights) = (rows * r.top_k, r.ids, r.weights);
        self.device.enter()?;
        self.read = None;
        self.queue.download(ids, n * 4)?;
        self.queue.wait()?;
        let ids = self.queue.downloaded().map(|p| p.words(n).to_vec()).unwrap_or_default();
        self.queue.download(weights, n * 4)?;
        self.queue.wait()?;
        let weights = self.queue.downloaded().map(|p| p.values(n).to_vec()).unwrap_or_default();
        Ok((ids, weights))
    }
}

impl CudaBackend {
    fn fetch(&mut self, read: Read, out: &mut [f32]) -> Result<(), Error> {
        let op = "poll_read";
        let Some((x, rows)) = self.read.filter(|_| read == Read(0)) else {
            return Err(shape_error(op, "read handle", 0, read.0 as usize));
        };
        let n = rows * self.buffer(op, x)?.cols;
        expect(op, "out", n, out.len())?;
        self.device.enter()?;
        self.queue.wait()?;
        if let Some(pinned) = self.queue.downloaded() {
            copy_values(pinned.values(n), out);
        }
        Ok(())
    }
}

/// Copies values; many by several threads, for one copies slower than the device sends.
fn copy_values(from: &[f32], to: &mut [f32]) {
    let threads = (from.len() / COPY_VALUES_OF_THREAD).clamp(1, COPY_THREADS_MAX);
    let share = from.len().div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        let mut shares = from.chunks(share).zip(to.chunks_mut(share));
        let own = shares.next();
        for (from, to) in shares {
            scope.spawn(|| to.copy_from_slice(from));
        }
        if let Some((from, to)) = own {
            to.copy_from_slice(from);
        }
    });
}
