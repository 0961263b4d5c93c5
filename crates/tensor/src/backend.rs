//! The one list of ops that a backend implements.
//!
//! The ops are coarse: a CPU forks and joins its threads once per op, a GPU may fuse inside one and capture a
//! step as a graph. Everything that changes from step to step (tokens, positions, block tables) is handed over
//! once, in [`Backend::begin_step`]; the ops that follow name only buffers that were made at start. Buffers are
//! opaque handles that the backend owns; activations are F32. Reading back is the only place that waits, and is
//! a poll, so that a browser can await it.
//!
//! **Row invariance.** What an op writes for one row must not depend on which other rows are in the step, nor
//! on the number of threads: a dot product is summed in one fixed order, attention walks the cache in one fixed
//! order. A request's greedy text is then the same alone and in any batch.
//!
//! Shapes are row-major. `T` is the number of rows (tokens) of the step, `D` the hidden size.

use std::{
    ops::AddAssign,
    task::{Context, Poll},
};

use crate::{
    CacheFormat, Error, HostMatrix,
    error::{at_most, expect, shape_error},
};

/// Tokens in one block of the paged latent cache.
pub const BLOCK_TOKENS: usize = 64;

macro_rules! handle {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub struct $name(pub u32);
    };
}
handle!(
    /// A loaded weight matrix.
    Weight
);
handle!(
    /// A loaded F32 vector (norm weights, router bias).
    Vector
);
handle!(
    /// F32 activations `[rows_max, cols]`.
    Buffer
);
handle!(
    /// The routed experts of one layer.
    Experts
);
handle!(
    /// Chosen experts and their weights, `[rows_max, top_k]` each.
    Routing
);
handle!(
    /// What makes keys and values of one layer from latent rows.
    KvB
);
handle!(
    /// The paged latent cache of all layers.
    Cache
);
handle!(
    /// Rotary frequencies.
    Rope
);
handle!(
    /// A read-back that was asked for.
    Read
);

/// What a backend runs on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// The backend: `reference`, `cpu`, `cuda`, `wgpu`.
    pub backend: &'static str,
    /// The device and what of it is used, for people: `AMD EPYC, AVX-512, 2 threads`.
    pub device: String,
}

/// The matrices of a SwiGLU MLP: `down(silu(gate x) * up x)`.
#[derive(Debug, Clone, Copy)]
pub struct Mlp {
    /// `[inner, D]`
    pub gate: Weight,
    /// `[inner, D]`
    pub up: Weight,
    /// `[D, inner]`
    pub down: Weight,
}

/// One routed expert as it is loaded: the same three matrices as [`Mlp`].
#[derive(Debug, Clone)]
pub struct ExpertMatrices {
    /// `[inner, D]`
    pub gate: HostMatrix,
    /// `[inner, D]`
    pub up: HostMatrix,
    /// `[D, inner]`
    pub down: HostMatrix,
}

/// A layer's `kv_b` in two parts, as newer GGUF files have it.
#[derive(Debug, Clone)]
pub struct KvBParts {
    /// `[H*kl, dn]`: the key rows, transposed head by head.
    pub keys: HostMatrix,
    /// `[H*dv, kl]`
    pub values: HostMatrix,
}

/// Sizes of a paged latent cache. A token has one row of `latent + rope` values in each layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheShape {
    /// Layers, MTP layers included.
    pub layers: usize,
    /// Blocks of [`BLOCK_TOKENS`] tokens; a block id names the same block in every layer.
    pub blocks: usize,
    /// `kv_lora_rank`
    pub latent: usize,
    /// `qk_rope_head_dim`
    pub rope: usize,
    /// How rows are stored: what is read back is what the format could keep.
    pub format: CacheFormat,
}

impl CacheShape {
    /// Bytes of one row.
    ///
    /// # Errors
    /// [`Error::Overflow`]
    pub fn row_bytes(&self) -> Result<usize, Error> {
        self.format.row_bytes(self.latent, self.rope)
    }

    /// Bytes of the whole cache.
    ///
    /// # Errors
    /// [`Error::Overflow`]
    pub fn bytes(&self) -> Result<usize, Error> {
        [self.layers, self.blocks, BLOCK_TOKENS]
            .into_iter()
            .try_fold(self.row_bytes()?, usize::checked_mul)
            .ok_or(Error::Overflow { what: "latent cache" })
    }
}

/// Sizes of multi-head latent attention (DeepSeek-V2 paper, section 2.1).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MlaShape {
    /// Attention heads, `H`.
    pub heads: usize,
    /// `qk_nope_head_dim`, `dn`
    pub nope: usize,
    /// `qk_rope_head_dim`, `dr`; the rope pairs are interleaved (2i, 2i+1)
    pub rope: usize,
    /// `v_head_dim`, `dv`
    pub value: usize,
    /// `kv_lora_rank`, `kl`
    pub latent: usize,
    /// What scores are multiplied with before the softmax.
    pub softmax_scale: f32,
}

/// What one op has cost since the profile began.
#[derive(Debug, Clone, PartialEq)]
pub struct OpCost {
    /// The op, as the backend door names it.
    pub op: &'static str,
    /// How often it ran.
    pub calls: u64,
    /// Time spent in it.
    pub seconds: f64,
    /// Bytes of weights and cache that it read, each counted once per call.
    pub bytes: u64,
    /// Multiply-adds of weights: every row of activations with each weight that it meets, once.
    pub weights: MultiplyAdds,
    /// Multiply-adds of attention over the cache: scores, weighted sums, and rows expanded again. They grow with the
    /// context.
    pub attention: MultiplyAdds,
}

/// Multiply-adds by what the activations are when they meet the other factor.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MultiplyAdds {
    /// F32.
    pub f32: u64,
    /// BF16.
    pub bf16: u64,
    /// 8 bits.
    pub bytes: u64,
}

impl MultiplyAdds {
    /// F32, BF16, 8 bits.
    pub fn by_kind(self) -> [u64; 3] {
        [self.f32, self.bf16, self.bytes]
    }

    /// All of them.
    pub fn total(self) -> u64 {
        self.by_kind().iter().sum()
    }
}

impl AddAssign for MultiplyAdds {
    fn add_assign(&mut self, b: Self) {
        self.f32 += b.f32;
        self.bf16 += b.bf16;
        self.bytes += b.bytes;
    }
}

/// How a router turns logits into choices (DeepSeek-V3 paper, section 2.1.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scoring {
    /// V2: `softmax(z)` over all experts.
    Softmax,
    /// V3: `sigmoid(z)`.
    Sigmoid,
}

/// How groups of experts are ranked before the experts themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupScore {
    /// V2 `group_limited_greedy`: the best score of the group.
    Max,
    /// V3 `noaux_tc`: the sum of the group's two best biased scores.
    TopTwoSum,
}

/// The router of one MoE layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RouterShape {
    /// Routed experts, `E`.
    pub experts: usize,
    /// Experts chosen per token.
    pub top_k: usize,
    /// Groups of contiguous experts; 1 for no group limit.
    pub groups: usize,
    /// Groups that stay in the choice.
    pub groups_kept: usize,
    /// How groups are ranked.
    pub group_score: GroupScore,
    /// How logits become scores.
    pub scoring: Scoring,
    /// Divide the chosen scores by their sum (`norm_topk_prob`).
    pub normalize: bool,
    /// `routed_scaling_factor`
    pub scale: f32,
}

impl RouterShape {
    /// Checks that the sizes fit together; every backend's `route` starts with it.
    ///
    /// # Errors
    /// [`Error::Shape`]
    pub fn check(&self) -> Result<(), Error> {
        let op = "route";
        if self.groups == 0 || self.top_k == 0 || self.experts == 0 {
            return Err(shape_error(op, "experts, groups and top_k", 1, 0));
        }
        let per_group = self.experts / self.groups;
        expect(op, "experts in whole groups", per_group * self.groups, self.experts)?;
        at_most(op, "groups kept", self.groups, self.groups_kept)?;
        at_most(op, "top_k", per_group * self.groups_kept, self.top_k)
    }
}

/// How the rows of a segment attend. Both are the same function up to F32 rounding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttendMode {
    /// Scores against the latent rows themselves, with `W_UK` folded into the query. For few rows.
    Absorbed,
    /// Keys and values are expanded from the latent rows into scratch. For many rows.
    Expanded,
}

/// Consecutive rows of a step that are consecutive tokens of one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// First row of the step.
    pub row: usize,
    /// Number of rows.
    pub rows: usize,
    /// Position in the sequence of the first row; row `r` attends to positions `0..=start + r`.
    pub start: usize,
    /// Where this sequence's block ids begin in [`StepInput::blocks`]; `ceil((start + rows) / 64)` follow.
    pub first_block: usize,
    /// How these rows attend.
    pub mode: AttendMode,
}

impl Segment {
    /// Multiply-adds of its attention beside each row's own products with `kv_b`: scores and weighted sums, and in the
    /// expanded form the keys and values of the rows that were in the cache before.
    pub fn attention_work(&self, shape: &MlaShape) -> u64 {
        let MlaShape { heads, nope, rope, value, latent, .. } = *shape;
        // Row r sees start + r + 1 positions.
        let seen = self.rows * self.start + self.rows * (self.rows + 1) / 2;
        let per_head = match self.mode {
            AttendMode::Absorbed => seen * (2 * latent + rope),
            AttendMode::Expanded => seen * (nope + rope + value) + self.start * latent * (nope + value),
        };
        (heads * per_head) as u64
    }
}

/// Everything that changes from step to step. The rows of all segments together are rows `0..T`, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StepInput {
    /// Token of each row, `[T]`.
    pub tokens: Vec<u32>,
    /// The segments, ordered by row, without gaps.
    pub segments: Vec<Segment>,
    /// Block ids of all segments; equal tables may be shared.
    pub blocks: Vec<u32>,
}

impl StepInput {
    /// Checks that the segments cover the rows in order and that their block tables are long enough; every
    /// backend's `begin_step` starts with it.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Overflow`]
    pub fn check(&self) -> Result<(), Error> {
        let op = "begin_step";
        let mut row = 0;
        for s in &self.segments {
            expect(op, "segment row", row, s.row)?;
            if s.rows == 0 {
                return Err(shape_error(op, "segment rows", 1, 0));
            }
            row = s.row.checked_add(s.rows).ok_or(Error::Overflow { what: "segment rows" })?;
            let end = s.start.checked_add(s.rows).ok_or(Error::Overflow { what: "segment position" })?;
            let table = s
                .first_block
                .checked_add(end.div_ceil(BLOCK_TOKENS))
                .ok_or(Error::Overflow { what: "block table" })?;
            at_most(op, "block table", self.blocks.len(), table)?;
        }
        expect(op, "rows of all segments", self.tokens.len(), row)
    }
}

/// A device that can run the DeepSeek family.
///
/// The `load_*` and `alloc_*` calls happen at start; the rest once per step and layer. A call with handles of
/// another backend, or with shapes that do not fit, is an [`Error`], never undefined.
pub trait Backend: Send {
    /// What this runs on.
    fn info(&self) -> DeviceInfo;

    /// Takes a weight as stored.
    fn load_matrix(&mut self, matrix: HostMatrix) -> Result<Weight, Error>;

    /// Takes a weight of which [`Backend::embed`] reads rows; products with it are right, but need not be fast.
    fn load_table(&mut self, matrix: HostMatrix) -> Result<Weight, Error> {
        self.load_matrix(matrix)
    }

    /// Takes a vector.
    fn load_vector(&mut self, values: &[f32]) -> Result<Vector, Error>;

    /// Takes the routed experts of one layer, ordered by expert id.
    fn load_experts(&mut self, experts: Vec<ExpertMatrices>) -> Result<Experts, Error>;

    /// Takes a layer's `kv_b`, `[H*(dn+dv), kl]`: per head `dn` key rows and then `dv` value rows.
    fn load_kv_b(&mut self, shape: &MlaShape, matrix: HostMatrix) -> Result<KvB, Error>;

    /// The same, of a file that has it in parts: `matrix` is what they are together. Absorbed attention may multiply
    /// with the parts.
    fn load_kv_b_apart(
        &mut self,
        shape: &MlaShape,
        matrix: HostMatrix,
        _parts: KvBParts,
    ) -> Result<KvB, Error> {
        self.load_kv_b(shape, matrix)
    }

    /// Takes rotary frequencies: pair `i` at position `p` turns by `p as f32 * inv_freq[i]`; cos and sin are
    /// multiplied by `magnitude`.
    fn load_rope(&mut self, inv_freq: &[f32], magnitude: f32) -> Result<Rope, Error>;

    /// Makes an activation buffer `[rows_max, cols]`, zeroed.
    fn alloc(&mut self, rows_max: usize, cols: usize) -> Result<Buffer, Error>;

    /// Makes a buffer for the choices of a router.
    fn alloc_routing(&mut self, rows_max: usize, top_k: usize) -> Result<Routing, Error>;

    /// Makes the paged latent cache, zeroed.
    fn alloc_cache(&mut self, shape: CacheShape) -> Result<Cache, Error>;

    /// What each op has cost since the last call; empty when the backend does not measure.
    fn take_profile(&mut self) -> Vec<OpCost> {
        Vec::new()
    }

    /// Waits for work that the backend does in the background after loading, such as laying weights out anew, so that
    /// what follows runs at its full speed. Results do not depend on it.
    fn settle(&mut self) -> Result<(), Error> {
        Ok(())
    }

    /// Begins a step: tokens, positions and block tables that the ops below use.
    fn begin_step(&mut self, input: &StepInput) -> Result<(), Error>;

    /// `out[t] = table[tokens[t]]`, `[T, D]`.
    fn embed(&mut self, table: Weight, out: Buffer) -> Result<(), Error>;

    /// `out[r] = weight * x[r] / sqrt(mean(x[r]^2) + eps)` for `rows` rows as wide as `weight`.
    fn rms_norm(
        &mut self,
        x: Buffer,
        weight: Vector,
        eps: f32,
        out: Buffer,
        rows: usize,
    ) -> Result<(), Error>;

    /// `out[r] = x[r] * W^T` for `rows` rows.
    fn matmul(&mut self, x: Buffer, weight: Weight, out: Buffer, rows: usize) -> Result<(), Error>;

    /// `out[r] += x[r] * W^T` for `rows` rows: a projection back into the residual stream.
    fn matmul_add(&mut self, x: Buffer, weight: Weight, out: Buffer, rows: usize) -> Result<(), Error>;

    /// Rotates the rope part of every head of `q`, `[T, H*(dn+dr)]`, in place.
    fn rope_queries(&mut self, shape: &MlaShape, rope: Rope, q: Buffer) -> Result<(), Error>;

    /// Writes one cache row per token: `kv` is `[T, kl+dr]` (latent first); the latent is RMS-normed with
    /// `weight` and `eps`, the rope part is rotated, and the row is rounded to the cache's format.
    fn mla_append(
        &mut self,
        shape: &MlaShape,
        rope: Rope,
        weight: Vector,
        eps: f32,
        kv: Buffer,
        cache: Cache,
        layer: usize,
    ) -> Result<(), Error>;

    /// Causal attention of `q` `[T, H*(dn+dr)]` (rotated) over the cache; `out` is `[T, H*dv]`.
    fn mla_attend(
        &mut self,
        shape: &MlaShape,
        q: Buffer,
        kv_b: KvB,
        cache: Cache,
        layer: usize,
        out: Buffer,
    ) -> Result<(), Error>;

    /// `out[t] += down(silu(gate x[t]) * up x[t])`.
    fn mlp(&mut self, x: Buffer, mlp: &Mlp, out: Buffer) -> Result<(), Error>;

    /// Scores `x` `[T, D]` with `gate` `[E, D]` in F32 and chooses experts. `bias` moves the choice and never
    /// the weights. Ties go to the smaller index.
    fn route(
        &mut self,
        shape: &RouterShape,
        x: Buffer,
        gate: Weight,
        bias: Option<Vector>,
        out: Routing,
    ) -> Result<(), Error>;

    /// `out[t] += sum_j w[t,j] * E_{idx[t,j]}(x[t]) + shared(x[t])`, summed in the order of the expert ids,
    /// the shared expert last.
    fn moe(
        &mut self,
        x: Buffer,
        routing: Routing,
        experts: Experts,
        shared: Option<&Mlp>,
        out: Buffer,
    ) -> Result<(), Error>;

    /// `out[i] = x[rows[i]]`: the rows whose logits are wanted.
    fn gather_rows(&mut self, x: Buffer, rows: &[u32], out: Buffer) -> Result<(), Error>;

    /// `out[t] = a[t] || b[t]`: the input of an MTP module, `[T, cols(a) + cols(b)]`.
    fn concat(&mut self, a: Buffer, b: Buffer, out: Buffer) -> Result<(), Error>;

    /// Copies cache block `from` to block `to` in every layer.
    fn copy_block(&mut self, cache: Cache, from: u32, to: u32) -> Result<(), Error>;

    /// Copies host values into rows `0..` of `out`; `values` is a whole number of rows.
    fn write(&mut self, values: &[f32], out: Buffer) -> Result<(), Error>;

    /// Asks for rows `0..rows` of `x`, once everything before has run.
    fn read(&mut self, x: Buffer, rows: usize) -> Result<Read, Error>;

    /// Fetches what [`Backend::read`] asked for into `out` (`rows * cols` long). A native backend may block and
    /// is then always ready; a browser returns `Pending` and wakes `cx`.
    fn poll_read(&mut self, read: Read, cx: &mut Context<'_>, out: &mut [f32]) -> Poll<Result<(), Error>>;

    /// The experts and weights chosen for rows `0..rows`, row-major `[rows, top_k]`, each row by descending
    /// score. For tests and inspection, not for the hot path.
    fn read_routing(&mut self, routing: Routing, rows: usize) -> Result<(Vec<u32>, Vec<f32>), Error>;
}

/// Reads rows `0..rows` of `x`, waiting in place.
///
/// # Errors
/// What the backend answers; [`Error::Device`] when it cannot wait in place (a browser: await
/// [`Backend::poll_read`] there).
pub fn read_now(backend: &mut dyn Backend, x: Buffer, rows: usize, out: &mut [f32]) -> Result<(), Error> {
    let read = backend.read(x, rows)?;
    match backend.poll_read(read, &mut Context::from_waker(std::task::Waker::noop()), out) {
        Poll::Ready(result) => result,
        Poll::Pending => Err(Error::Device("this backend cannot be waited for in place".into())),
    }
}
