//! `mlp`, `route`, `moe`.

use oxseek_tensor::{
    DType, Error,
    backend::{Buffer, Experts, GroupScore, Mlp, RouterShape, Routing, Scoring, Vector, Weight},
    error::{at_most, expect},
};

use super::matmul::{
    GEMM_ROWS, GEMM_THREADS, NARROW, STREAM_ROWS, STREAM_TOKENS, STREAM_TOKENS_MAX, THREADS, WARPS,
};
use crate::{
    CudaBackend, Matrix, Product, Room,
    device::Pool,
    found,
    kernels::Kernel,
    queue::{Shape, arguments},
};

/// Shared memory of the router: scores and flags of experts and groups.
const ROUTER_BYTES_MAX: usize = 48 << 10;

/// Most experts that `moe_group` sorts by, and those up to which its shared memory is enough for all its threads.
const GROUP_EXPERTS_MAX: usize = 1024;
const GROUP_EXPERTS_FEW: usize = 256;
/// Rows up to which the last block of the gate's chooses; many would wait for each other.
const GATE_ROWS_FEW: usize = 16;
/// Most columns of a row whose norm the gate makes.
const NORM_COLUMNS_MAX: usize = 2048;
/// Blocks of the cluster that does both, and warps of each, of which each has an expert.
const NORM_CLUSTER: u32 = 8;
const NORM_CLUSTER_WARPS: u32 = 8;
/// Experts and rows that a block of `gate_logits` has, and its threads.
const GATE_TOGETHER: (usize, usize) = (4, 8);
const GATE_THREADS: u32 = 128;
/// Choices of an expert, on average, up to which its weights are streamed, and up to which its tiles are narrow.
const CHOICES_FEW: usize = STREAM_TOKENS;
const CHOICES_NARROW: usize = 80;
/// Bytes of a `Tile` of the kernels.
pub(crate) const TILE_BYTES: usize = 16;

/// The three matrices of an MLP.
struct MlpMatrices {
    gate: Matrix,
    up: Matrix,
    down: Matrix,
}

impl MlpMatrices {
    /// How the tensor cores multiply all three.
    fn product(&self) -> Option<Product> {
        let [gate, up, down] = [self.gate, self.up, self.down].map(|m| m.product);
        gate.filter(|_| gate == up && up == down)
    }
}

/// Choices of a router and the experts that they name, on the device.
#[derive(Default)]
struct Routed {
    records: u64,
    ids: u64,
    weights: u64,
    order: u64,
    top_k: usize,
    inner_max: usize,
    experts: usize,
    /// Choices by expert, and the tiles that they are cut into.
    list: u64,
    tiles: u64,
    /// The router made both already.
    grouped: bool,
    /// x was there before the router's kernel began.
    ready: bool,
    tile_tokens: usize,
    tiles_max: usize,
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

    /// Inner activations of an MLP in F32 for the rows of the step, in `shared_inner`.
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
        let at = self.sized(op, x, rows, mlp.gate.cols)?.at;
        let out = self.sized(op, out, rows, mlp.down.rows)?.at;
        if let Some(product) = mlp.product() {
            let x = self.rounded(op, x, rows)?;
            let sizes = [rows, mlp.gate.rows, 2];
            let inner = Self::grow(&mut self.pool, &mut self.shared_inner, "inner activations", &sizes)?;
            let routed = Routed::default();
            self.experts_inner(product, [rows, mlp.gate.cols], &routed, x, 0, Some((&mlp, inner)));
            self.multiply_rounded(product, mlp.down, inner, out, rows, true);
        } else {
            let inner = self.swiglu(&mlp, at)?;
            self.multiply(mlp.down, inner, out, rows, true);
        }
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
        let (list, tiles) = (routing.list, routing.tiles);
        let routing = &mut self.routings[out.0 as usize];
        (routing.experts, routing.single) = (shape.experts, rows == 1);
        let logits =
            Self::grow(&mut self.pool, &mut self.logits, "router logits", &[rows, shape.experts, 4])?;
        let (list, tiles) = if rows == 1 { (list, tiles) } else { (0, 0) };
        let known = matches!(m.dtype, DType::F32 | DType::BF16) && m.cols.is_multiple_of(4);
        self.routings[out.0 as usize].in_order = known;
        let grid = Shape::new([m.rows, rows, 1], GATE_THREADS);
        if known && rows <= GATE_ROWS_FEW {
            if self.arrived == 0 {
                self.arrived = self.zeroed("blocks of the router", &[GATE_ROWS_FEW, 4])?;
            }
            let router = router_argument(shape);
            let choice = arguments![bias, router, ids, weights, order, list, tiles];
            if let Some([from, weight, eps, rounded]) = self.take_norm(x.at, rows, m) {
                let (blocks, threads) = (NORM_CLUSTER, 32 * NORM_CLUSTER_WARPS);
                let grid = Shape::new([blocks as usize, rows, 1], threads).shared(shared);
                let norm = arguments![from, weight, eps, x.at, rounded, m.record];
                let arguments = [&norm[..], &choice[..]].concat();
                self.queue.push(Kernel::NormGateAndRoute, Shape { cluster: blocks, ..grid }, &arguments);
                return Ok(());
            }
            let gate = arguments![m.record, x.at, logits, self.arrived];
            let arguments = [&gate[..], &choice[..]].concat();
            self.queue.push(Kernel::GateAndRoute, grid.shared(shared), &arguments);
            return Ok(());
        }
        if known {
            let (experts, together) = GATE_TOGETHER;
            let grid = Shape::new([m.rows.div_ceil(experts), rows.div_ceil(together), 1], GATE_THREADS);
            self.queue.push(Kernel::GateLogits, grid, arguments![m.record, x.at, logits, rows]);
        } else {
            self.multiply(m, x.at, logits, rows, false);
        }
        let grid = Shape::new([rows, 1, 1], 32).shared(shared);
        let arguments = arguments![logits, bias, router_argument(shape), ids, weights, order, list, tiles];
        self.queue.push(Kernel::Route, grid, arguments);
        Ok(())
    }

    /// When what waits last is the norm that makes `x`, it leaves the line, and the caller does it: rows, weight,
    /// epsilon and where the rows in BF16 go.
    fn take_norm(&mut self, x: u64, rows: usize, gate: Matrix) -> Option<[u64; 4]> {
        let (norm, words) = self.queue.last(Kernel::RmsNorm)?;
        let &[from, weight, eps, to, rounded, width] = words else { return None };
        let experts_max = (NORM_CLUSTER * NORM_CLUSTER_WARPS) as usize;
        let fits = self.device.overlaps() && gate.cols <= NORM_COLUMNS_MAX && gate.rows <= experts_max;
        if !fits || (to, width) != (x, gate.cols as u64) || from == x || norm.grid[0] as usize != rows {
            return None;
        }
        self.queue.take_last();
        Some([from, weight, eps, rounded])
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
        let rows_of_x = x;
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
        let in_order = routed.in_order;
        let (list, tiles, grouped) = (routed.list, routed.tiles, routed.single && rows == 1);
        let (product, experts) = (set.product, set.sizes.len());
        let shared = shared.map(|m| self.mlp_matrices(op, m)).transpose()?;
        if let Some(m) = &shared {
            expect(op, "shared expert columns", width, m.gate.cols)?;
        }
        let alike = product.filter(|p| shared.as_ref().is_none_or(|m| m.product() == Some(*p)));
        if let Some(product) = alike.filter(|_| experts <= GROUP_EXPERTS_MAX) {
            let mut routed = Routed {
                records,
                ids,
                weights,
                order,
                top_k,
                inner_max,
                experts,
                list,
                tiles,
                grouped,
                ..Routed::default()
            };
            let x = self.rounded(op, rows_of_x, rows)?;
            // The kernels of the router wait before they let the next ones begin: x was there before.
            let router = [Kernel::GateAndRoute, Kernel::Route];
            routed.ready = in_order && router.into_iter().any(|k| self.queue.last(k).is_some());
            return self.moe_rounded(product, rows, width, &mut routed, shared.as_ref(), x, out.at);
        }
        let mut down_and_inner = (0, 0);
        if let Some(m) = &shared {
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

    /// Experts on the tensor cores: the choices sorted by expert, so that a weight is read once for its tokens.
    fn moe_rounded(
        &mut self,
        product: Product,
        rows: usize,
        width: usize,
        r: &mut Routed,
        shared: Option<&MlpMatrices>,
        x: u64,
        out: u64,
    ) -> Result<(), Error> {
        let choices = rows * r.top_k;
        at_most("moe", "choices", i32::MAX as usize, choices)?;
        r.tile_tokens = match choices / r.experts {
            _ if choices <= r.experts * CHOICES_FEW => STREAM_TOKENS,
            n if n <= CHOICES_NARROW => NARROW,
            _ => self.device.wide(product),
        };
        // An expert's last tile may be short.
        r.tiles_max = choices.min(r.experts + choices / r.tile_tokens);
        let room =
            |pool: &mut Pool, room: &mut Room, sizes: &[usize]| Self::grow(pool, room, "experts", sizes);
        if !r.grouped {
            r.list = room(&mut self.pool, &mut self.grouped, &[choices.max(64), 4])?;
            r.tiles = room(&mut self.pool, &mut self.tiles, &[(r.tiles_max + 1).max(64), TILE_BYTES])?;
        }
        let inner = room(&mut self.pool, &mut self.inner, &[choices, r.inner_max, 2])?;
        let outer = room(&mut self.pool, &mut self.outer, &[choices + rows, width, 4])?;
        let mut with_inner = None;
        if let Some(m) = shared {
            with_inner = Some((m, room(&mut self.pool, &mut self.shared_inner, &[rows, m.gate.rows, 2])?));
        }
        if !r.grouped {
            let threads_max = if r.experts <= GROUP_EXPERTS_FEW { 1024 } else { 256 };
            let threads = choices.next_multiple_of(32).clamp(128, threads_max);
            let one = Shape::new([1, 1, 1], threads as u32).shared(4 * r.experts * (3 + threads / 32));
            let arguments = arguments![r.ids, choices, r.experts, r.tile_tokens, r.list, r.tiles];
            self.queue.push(Kernel::MoeGroup, one, arguments);
        }
        self.experts_inner(product, [rows, width], r, x, inner, with_inner);
        self.experts_outer(product, [rows, width], r, inner, outer, with_inner);
        let grid = Shape::new([width.div_ceil(256), rows, 1], 256);
        let has_shared = shared.is_some();
        let arguments = arguments![outer, r.weights, r.order, r.top_k, choices, has_shared, out, width];
        self.queue.push(Kernel::ExpertsSum, grid, arguments);
        Ok(())
    }

    /// Blocks of a kernel that streams the weights of so many tiles, at most.
    fn stream_shape(&self, tiles: usize) -> Shape {
        Shape::new([tiles.min(self.device.streams()), 1, 1], THREADS).shared(self.stream_bytes(1))
    }

    /// Inner activations in BF16 of the tiles of experts and of a shared MLP for all rows.
    fn experts_inner(
        &mut self,
        product: Product,
        [rows, cols]: [usize; 2],
        r: &Routed,
        x: u64,
        inner: u64,
        shared: Option<(&MlpMatrices, u64)>,
    ) {
        let tokens = match rows {
            _ if r.tiles_max > 0 => r.tile_tokens,
            n if n <= STREAM_TOKENS_MAX => STREAM_TOKENS,
            n if n <= NARROW => NARROW,
            _ => self.device.wide(product),
        };
        let (gate, up, shared_inner, width) =
            shared.map_or((0, 0, 0, 0), |(m, inner)| (m.gate.record, m.up.record, inner, m.gate.rows));
        let shared_tiles = if shared.is_some() { rows.div_ceil(tokens) } else { 0 };
        if tokens == STREAM_TOKENS {
            let kernel = match product {
                Product::Bf16 => Kernel::StreamInnerBf16,
                Product::Fp8 => Kernel::StreamInnerFp8,
            };
            let grid = self.stream_shape(r.inner_max.max(width).div_ceil(8) * (r.tiles_max + shared_tiles));
            let arguments = arguments![
                r.records,
                r.tiles,
                r.list,
                r.top_k,
                x,
                inner,
                r.inner_max,
                gate,
                up,
                shared_inner,
                rows,
                cols,
                r.ready
            ];
            return self.queue.push(kernel, grid, arguments);
        }
        let kernel = match (product, tokens == NARROW) {
            (Product::Bf16, true) => Kernel::InnerBf16Narrow,
            (Product::Bf16, false) => Kernel::InnerBf16Wide,
            (Product::Fp8, true) => Kernel::InnerFp8Narrow,
            (Product::Fp8, false) => Kernel::InnerFp8Wide,
        };
        let blocks = |rows: usize| rows.div_ceil(GEMM_ROWS / 2);
        let tiles = blocks(r.inner_max) * r.tiles_max + blocks(width) * shared_tiles;
        let arguments = arguments![
            r.records,
            r.tiles,
            r.list,
            r.top_k,
            x,
            inner,
            r.inner_max,
            gate,
            up,
            shared_inner,
            rows,
            cols
        ];
        self.queue.push(kernel, self.gemm_shape(product, tokens, tiles), arguments);
    }

    /// Blocks of a kernel for many tokens that makes so many tiles, at most.
    fn gemm_shape(&self, product: Product, width: usize, tiles: usize) -> Shape {
        let blocks = tiles.min(self.device.multiprocessors());
        Shape::new([blocks, 1, 1], GEMM_THREADS).shared(self.gemm_bytes(product, width))
    }

    /// Outputs in F32 of each choice, and behind them of a shared MLP for all rows.
    fn experts_outer(
        &mut self,
        product: Product,
        [rows, width]: [usize; 2],
        r: &Routed,
        inner: u64,
        outer: u64,
        shared: Option<(&MlpMatrices, u64)>,
    ) {
        let choices = rows * r.top_k;
        let (down, shared_inner) = shared.map_or((0, 0), |(m, inner)| (m.down.record, inner));
        let shared_tiles = if shared.is_some() { rows.div_ceil(r.tile_tokens) } else { 0 };
        let tiles = r.tiles_max + shared_tiles;
        if r.tile_tokens == STREAM_TOKENS {
            let kernel = match product {
                Product::Bf16 => Kernel::StreamOuterBf16,
                Product::Fp8 => Kernel::StreamOuterFp8,
            };
            let grid = self.stream_shape(width.div_ceil(STREAM_ROWS) * tiles);
            let arguments = arguments![
                r.records,
                r.tiles,
                r.list,
                inner,
                r.inner_max,
                down,
                shared_inner,
                outer,
                choices,
                rows,
                width
            ];
            self.queue.push(kernel, grid, arguments);
        } else {
            let kernel = match (product, r.tile_tokens == NARROW) {
                (Product::Bf16, true) => Kernel::OuterBf16Narrow,
                (Product::Bf16, false) => Kernel::OuterBf16Wide,
                (Product::Fp8, true) => Kernel::OuterFp8Narrow,
                (Product::Fp8, false) => Kernel::OuterFp8Wide,
            };
            let arguments = arguments![
                r.records,
                r.tiles,
                r.list,
                inner,
                r.inner_max,
                down,
                shared_inner,
                outer,
                choices,
                rows,
                width
            ];
            let shape = self.gemm_shape(product, r.tile_tokens, width.div_ceil(GEMM_ROWS) * tiles);
            self.queue.push(kernel, shape, arguments);
        }
    }
}
