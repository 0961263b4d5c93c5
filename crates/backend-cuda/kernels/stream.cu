// Products for few tokens, as fast as memory gives the weights: every warp streams its own part of the columns through
// its own ring in shared memory, from one tile of rows into the next, and never waits for the other warps to ask for
// more. Only when a tile is done do the eight parts meet. The sums are those of `multiply`, bit by bit.
#pragma once
#include "step.cuh"

// A stage is a run of 128 columns in BF16, two runs in FP8, of 16 rows of weights.
constexpr int STAGE_ROW_BYTES = 256;
constexpr int STAGE_BYTES = 16 * STAGE_ROW_BYTES;
// Two blocks on a multiprocessor of Hopper ask for 192 KiB together; the older ones have less shared memory.
#if __CUDA_ARCH__ >= 900
constexpr int STAGES = 3;
#else
constexpr int STAGES = 2;
#endif
// Floats between two tokens of a part's sums: no two lanes meet in a bank.
constexpr int TOKEN_STRIDE = 20;

// Two matrices of equal shape, or the same one twice, whose rows are multiplied with the same tokens.
struct Source {
  const uint8_t* data[2];
  const float* scales[2];
  int rows, row_bytes, cols;

  __device__ __forceinline__ Source(const Matrix& a, const Matrix& b)
      : data{a.data, b.data}, scales{(const float*)a.scales, (const float*)b.scales}, rows(a.rows), row_bytes(a.row_bytes), cols(a.cols) {}
  __device__ __forceinline__ Source() {}
};

// The tiles of a block in one phase: some that follow each other, so that most have their source in common.
struct Walk {
  int group = 0, block = 0, left = 0, blocks = 1;

  __device__ __forceinline__ void over(int from, int to, int blocks_of_group, int first_group) {
    blocks = max(blocks_of_group, 1);
    left = to - from;
    group = first_group + from / blocks;
    block = from % blocks;
  }
  __device__ __forceinline__ void step() {
    left--;
    if (++block == blocks) {
      block = 0;
      group++;
    }
  }
};

__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// What a warp has asked for. A tile has rows `block * Work::STEP` and the seven that follow of the first matrix, and
// rows `Work::OFFSET` further of the second.
template <int FORMAT, class Work>
struct Ring {
  static constexpr int RUN_BYTES = FORMAT == BF16 ? RUN * 2 : RUN;
  static constexpr int RUNS = STAGE_ROW_BYTES / RUN_BYTES;
  uint8_t* slots;
  Source source;
  Walk walk, late;
  const uint8_t* rows[2];
  int last[2], loaded = -1, at = 0, end = 0, slot = 0;

  // Asks for the next stage; whether there was one.
  __device__ __forceinline__ bool ask(const Work& work) {
    while (at >= end) {
      if (walk.left == 0) {
        if (late.left == 0) return false;
        walk = late;
        late.left = 0;
      }
      if (walk.group != loaded) {
        source = work.source(walk.group);
        loaded = walk.group;
      }
#pragma unroll
      for (int h = 0; h < 2; h++) {
        int row = min(walk.block * Work::STEP + h * Work::OFFSET, source.rows - 1);
        rows[h] = source.data[h] + (size_t)row * source.row_bytes;
        last[h] = source.rows - 1 - row;
      }
      part_of_warp(source.cols, at, end);
      walk.step();
    }
    int lane = threadIdx.x & 31, chunk = lane & 15, byte = at * RUN_BYTES + chunk * 16;
    if (byte < min(end * RUN_BYTES, source.row_bytes)) {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        int r = i * 2 + (lane >> 4);
        const uint8_t* from = rows[i >> 2] + (size_t)min(r & 7, last[i >> 2]) * source.row_bytes + byte;
        uint32_t to = (uint32_t)__cvta_generic_to_shared(slots + slot * STAGE_BYTES + r * STAGE_ROW_BYTES + ((chunk ^ (r & 1) << 2) << 4));
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
      }
    }
    at += RUNS;
    slot = slot + 1 == STAGES ? 0 : slot + 1;
    return true;
  }
};

// The 16 bytes of a stage's row that lie at `chunk`.
__device__ __forceinline__ uint4 staged(const uint8_t* stage, int row, int chunk) {
  return *(const uint4*)(stage + row * STAGE_ROW_BYTES + ((chunk ^ (row & 1) << 2) << 4));
}

// A lane's columns of x in one run.
template <int FORMAT, int NT>
__device__ __forceinline__ void bring_x(const __nv_bfloat16* const* xs, int run, int to, int cols, uint4 (*b)[NT]) {
  int t = threadIdx.x & 3;
#pragma unroll
  for (int s = 0; s < 4; s++) {
    int k = run * RUN + (FORMAT == BF16 ? s * 32 + t * 8 : (s >> 1) * 64 + t * 16 + (s & 1) * 8);
#pragma unroll
    for (int j = 0; j < NT; j++) b[s][j] = run < to && k < cols ? *(const uint4*)(xs[j] + k) : make_uint4(0, 0, 0, 0);
  }
}

// One run of a stage, `first` chunks into it, added to the sums; `whole` unless the row ends half way.
template <int FORMAT, int NT>
__device__ __forceinline__ void add_run(const uint8_t* stage, int first, const uint4 (*b)[NT], bool whole, const float* scale, float (*sums)[4]) {
  int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
  if constexpr (FORMAT == BF16) {
#pragma unroll
    for (int s = 0; s < 4; s++) {
      if (s == 2 && !whole) break;
      uint4 low = staged(stage, g, s * 4 + t), high = staged(stage, g + 8, s * 4 + t);
      uint32_t a[4] = {low.x, high.x, low.y, high.y}, c[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
      for (int j = 0; j < NT; j++) {
        mma(sums[j], a, b[s][j].x, b[s][j].y);
        mma(sums[j], c, b[s][j].z, b[s][j].w);
      }
    }
  } else {
    float part[NT][4] = {};
#pragma unroll
    for (int s = 0; s < 2; s++) {
      if (s == 1 && !whole) break;
      uint4 codes[2] = {staged(stage, g, first + s * 4 + t), staged(stage, g + 8, first + s * 4 + t)};
#pragma unroll
      for (int quarter = 0; quarter < 4; quarter++) {
        uint32_t low = (&codes[0].x)[quarter], high = (&codes[1].x)[quarter];
        uint32_t f[4] = {bf16_pair(low << 8), bf16_pair(high << 8), bf16_pair(low), bf16_pair(high)};
#pragma unroll
        for (int j = 0; j < NT; j++) {
          const uint32_t* v = &b[s * 2 + (quarter >> 1)][j].x + (quarter & 1) * 2;
          mma(part[j], f, __byte_perm(v[0], v[1], 0x5410), __byte_perm(v[0], v[1], 0x7632));
        }
      }
    }
#pragma unroll
    for (int j = 0; j < NT; j++)
#pragma unroll
      for (int c = 0; c < 4; c++) sums[j][c] = fmaf(part[j][c], scale[c >> 1], sums[j][c]);
  }
}

// A value of the sums: the eight parts in order.
template <int NT>
__device__ __forceinline__ float streamed(const float* room, int token, int row) {
  float sum = 0;
#pragma unroll
  for (int w = 0; w < WARPS; w++) sum += room[(w * NT * 8 + token) * TOKEN_STRIDE + row];
  return sum;
}

// All tiles of `work` that are this block's, NT times 8 tokens each. The weights of the early ones may be asked for
// before the kernels in front are done; with `ready` they may even be multiplied.
template <int FORMAT, int NT, class Work>
__device__ __forceinline__ void stream(const Work& work, bool ready) {
  extern __shared__ __align__(128) uint8_t bytes[];
  constexpr int PART = NT * 8 * TOKEN_STRIDE;
  using R = Ring<FORMAT, Work>;
  int warp = threadIdx.x >> 5, g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
  int column = threadIdx.x % Work::COLUMNS, token = threadIdx.x / Work::COLUMNS;
  float *rooms = (float*)(bytes + WARPS * STAGES * STAGE_BYTES), *room = rooms;
  R ring;
  ring.slots = bytes + warp * STAGES * STAGE_BYTES;
  Walk walk, late;
  {
    int tiles = work.early_groups * work.early_blocks, b = blockIdx.x, n = gridDim.x;
    walk.over((int)((int64_t)tiles * b / n), (int)((int64_t)tiles * (b + 1) / n), work.early_blocks, 0);
    ring.walk = walk;
  }
  auto open = [&] {
    begin();
    // The other way round, so that a block with one early tile more has none more here.
    int tiles = work.late_groups() * work.late_blocks, b = gridDim.x - 1 - blockIdx.x, n = gridDim.x;
    late.over((int)((int64_t)tiles * b / n), (int)((int64_t)tiles * (b + 1) / n), work.late_blocks, work.early_groups);
    ring.late = late;
  };
  Source source;
  const __nv_bfloat16* xs[NT];
  typename Work::Out* out = nullptr;
  // x of a stage. It stays for the next tile of a group whose parts are no longer.
  uint4 x[NT == 1 ? R::RUNS : 1][4][NT];
  int from = 0, to = 0, loaded = -1, slot = 0;
  bool early = true, opened = false, prime = true;
  while (true) {
    if (prime) {
      prime = false;
      for (int i = 0; i < STAGES;) {
        if (!ring.ask(work) && !opened && !ready) {
          open();
          opened = true;
          continue;
        }
        commit();
        i++;
      }
      if (!opened && !ready) {
        open();
        opened = true;
      }
    }
    if (walk.left == 0) {
      if (!early) break;
      early = false;
      if (!opened) {
        open();
        opened = prime = true;
      }
      walk = late;
      continue;
    }
    bool fresh = walk.group != loaded;
    if (fresh) {
      loaded = walk.group;
      source = work.source(walk.group);
      work.tokens(walk.group, g, xs);
      out = work.out_row(walk.group, token);
      part_of_warp(source.cols, from, to);
    }
    float sums[NT][4] = {};
    const float* scales[2] = {};
    if constexpr (FORMAT != BF16) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        int row = min(walk.block * Work::STEP + h * Work::OFFSET, source.rows - 1);
        scales[h] = source.scales[h] + (size_t)(row >> 7) * ((source.cols + 127) >> 7);
      }
    }
#pragma unroll 1
    for (int run = from; run < to; run += R::RUNS) {
      float scale[R::RUNS][2] = {};
#pragma unroll
      for (int r = 0; r < R::RUNS; r++) {
        if constexpr (FORMAT != BF16) {
#pragma unroll
          for (int h = 0; h < 2; h++) scale[r][h] = run + r < to ? scales[h][run + r] : 0.0f;
        }
        if constexpr (NT == 1) {
          if (fresh || to - from > R::RUNS) bring_x<FORMAT, NT>(xs, run + r, to, source.cols, x[r]);
        }
      }
      asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
      __syncwarp();
      const uint8_t* at = ring.slots + slot * STAGE_BYTES;
#pragma unroll
      for (int r = 0; r < R::RUNS; r++) {
        if (run + r >= to) break;
        if constexpr (NT > 1) {
          bring_x<FORMAT, NT>(xs, run + r, to, source.cols, x[0]);
        }
        add_run<FORMAT, NT>(at, r * 8, x[NT == 1 ? r : 0], (run + r + 1) * RUN <= source.cols, scale[r], sums);
      }
      __syncwarp();
      slot = slot + 1 == STAGES ? 0 : slot + 1;
      ring.ask(work);
      commit();
    }
    float* own = room + warp * PART;
#pragma unroll
    for (int j = 0; j < NT; j++)
#pragma unroll
      for (int c = 0; c < 4; c++) own[(j * 8 + 2 * t + (c & 1)) * TOKEN_STRIDE + g + (c >> 1) * 8] = sums[j][c];
    __syncthreads();
    int row = walk.block * Work::STEP + column;
    if (out && row < source.rows) work.template store<NT>(out + row, room, token, column);
    // The next tile's parts go to the other room, so that one barrier a tile is enough.
    room = rooms + (room == rooms ? WARPS * PART : 0);
    walk.step();
  }
}

// One product, or two of the same rows of x with weights of equally many columns: a group each.
struct Products {
  using Out = float;
  static constexpr int STEP = 16, OFFSET = 8, COLUMNS = 16;
  const Matrix *a, *b;
  const __nv_bfloat16* x;
  float *out_a, *out_b;
  int count, add, early_groups, early_blocks, late_blocks;

  __device__ __forceinline__ int late_groups() const { return late_blocks > 0; }
  __device__ __forceinline__ Source source(int group) const { return group == 0 ? Source(*a, *a) : Source(*b, *b); }
  template <int NT>
  __device__ __forceinline__ void tokens(int, int g, const __nv_bfloat16* (&xs)[NT]) const {
#pragma unroll
    for (int j = 0; j < NT; j++) xs[j] = x + (size_t)min(j * 8 + g, count - 1) * a->cols;
  }
  __device__ __forceinline__ float* out_row(int group, int token) const {
    if (token >= count) return nullptr;
    return group == 0 ? out_a + (size_t)token * a->rows : out_b + (size_t)token * b->rows;
  }
  template <int NT>
  __device__ __forceinline__ void store(float* to, const float* room, int token, int column) const {
    float y = streamed<NT>(room, token, column);
    *to = add ? *to + y : y;
  }
};

template <int FORMAT, int NT>
__device__ __forceinline__ void stream_products(const Matrix* first, const Matrix* second, const __nv_bfloat16* x, float* out, float* out_second, int count, int add) {
  Products work;
  work.a = first;
  work.b = second;
  work.x = x;
  work.out_a = out;
  work.out_b = out_second;
  work.count = count;
  work.add = add;
  work.early_groups = 1;
  work.early_blocks = (first->rows + 15) / 16;
  work.late_blocks = second ? (second->rows + 15) / 16 : 0;
  stream<FORMAT, NT>(work, false);
}

#define STREAM_PRODUCTS(name, FORMAT, NT)                                                                              \
  extern "C" __global__ void __launch_bounds__(256, 2) name(const Matrix* first, const Matrix* second, const __nv_bfloat16* x, float* out, \
                                                            float* out_second, int count, int add) {                   \
    stream_products<FORMAT, NT>(first, second, x, out, out_second, count, add);                                        \
  }
STREAM_PRODUCTS(stream_bf16_8, BF16, 1)
STREAM_PRODUCTS(stream_bf16_16, BF16, 2)
STREAM_PRODUCTS(stream_fp8_8, F8E4M3, 1)
STREAM_PRODUCTS(stream_fp8_16, F8E4M3, 2)

// Groups of tokens that choose the same expert, and before them, because they are known early, those of an expert that
// all tokens share.
struct Experts {
  const Matrix* experts;
  const Tile* groups;
  const int* list;
  int count, early_groups, early_blocks, late_blocks;

  __device__ __forceinline__ Experts(const Matrix* experts, const Tile* groups, const int* list, int count, int shared_rows, int rows, int step)
      : experts(experts), groups(groups), list(list), count(count), early_groups(shared_rows ? (count + 7) / 8 : 0), early_blocks((shared_rows + step - 1) / step),
        late_blocks((rows + step - 1) / step) {}
  __device__ __forceinline__ bool shared(int group) const { return group < early_groups; }
  __device__ __forceinline__ Tile tokens_of(int group) const {
    if (shared(group)) return {0, group * 8, min(8, count - group * 8), 0};
    return groups[1 + group - early_groups];
  }
  __device__ __forceinline__ int late_groups() const { return groups ? groups[0].first : 0; }
};

// inner = silu(gate x) * up x: a tile is eight rows of each.
struct Inner : Experts {
  using Out = __nv_bfloat16;
  static constexpr int STEP = 8, OFFSET = 0, COLUMNS = 8;
  Matrix gate, up;
  const __nv_bfloat16* x;
  __nv_bfloat16 *inner, *shared_inner;
  int top_k, inner_max, width;

  using Experts::Experts;
  __device__ __forceinline__ Source source(int group) const {
    if (shared(group)) return Source(gate, up);
    const Matrix* e = experts + 3 * tokens_of(group).expert;
    return Source(e[0], e[1]);
  }
  __device__ __forceinline__ void tokens(int group, int g, const __nv_bfloat16* (&xs)[1]) const {
    Tile own = tokens_of(group);
    int i = own.first + min(g, own.count - 1);
    xs[0] = x + (size_t)(shared(group) ? i : list[i] / top_k) * width;
  }
  __device__ __forceinline__ __nv_bfloat16* out_row(int group, int token) const {
    Tile own = tokens_of(group);
    if (token >= own.count) return nullptr;
    int at = own.first + token;
    return shared(group) ? shared_inner + (size_t)at * gate.rows : inner + (size_t)list[at] * inner_max;
  }
  template <int NT>
  __device__ __forceinline__ void store(__nv_bfloat16* to, const float* room, int token, int column) const {
    *to = __float2bfloat16_rn(silu(streamed<NT>(room, token, column)) * streamed<NT>(room, token, 8 + column));
  }
};

// y = down(inner) of each choice and of the shared expert, F32 `[choices + rows, width]`.
struct Outer : Experts {
  using Out = float;
  static constexpr int STEP = 16, OFFSET = 8, COLUMNS = 16;
  Matrix down;
  const __nv_bfloat16 *inner, *shared_inner;
  float* y;
  int inner_max, choices, width;

  using Experts::Experts;
  __device__ __forceinline__ Source source(int group) const {
    if (shared(group)) return Source(down, down);
    const Matrix& m = experts[3 * tokens_of(group).expert + 2];
    return Source(m, m);
  }
  __device__ __forceinline__ void tokens(int group, int g, const __nv_bfloat16* (&xs)[1]) const {
    Tile own = tokens_of(group);
    int i = own.first + min(g, own.count - 1);
    xs[0] = shared(group) ? shared_inner + (size_t)i * down.cols : inner + (size_t)list[i] * inner_max;
  }
  __device__ __forceinline__ float* out_row(int group, int token) const {
    Tile own = tokens_of(group);
    if (token >= own.count) return nullptr;
    int at = own.first + token;
    return y + (size_t)(shared(group) ? choices + at : list[at]) * width;
  }
  template <int NT>
  __device__ __forceinline__ void store(float* to, const float* room, int token, int column) const {
    *to = streamed<NT>(room, token, column);
  }
};

template <int FORMAT>
__device__ __forceinline__ void stream_inner(const Matrix* experts, const Tile* groups, const int* list, int top_k, const __nv_bfloat16* x, __nv_bfloat16* inner,
                                             int inner_max, const Matrix* gate, const Matrix* up, __nv_bfloat16* shared_inner, int count, int width, int ready) {
  Matrix a = gate ? *gate : Matrix{}, b = gate ? *up : Matrix{};
  Inner work(experts, groups, list, count, a.rows, inner_max, Inner::STEP);
  work.gate = a;
  work.up = b;
  work.x = x;
  work.inner = inner;
  work.shared_inner = shared_inner;
  work.top_k = top_k;
  work.inner_max = inner_max;
  work.width = width;
  stream<FORMAT, 1>(work, ready);
}
template <int FORMAT>
__device__ __forceinline__ void stream_outer(const Matrix* experts, const Tile* groups, const int* list, const __nv_bfloat16* inner, int inner_max, const Matrix* down,
                                             const __nv_bfloat16* shared_inner, float* y, int choices, int count, int width) {
  Matrix m = down ? *down : Matrix{};
  Outer work(experts, groups, list, count, m.rows, width, Outer::STEP);
  work.down = m;
  work.inner = inner;
  work.shared_inner = shared_inner;
  work.y = y;
  work.inner_max = inner_max;
  work.choices = choices;
  work.width = width;
  stream<FORMAT, 1>(work, false);
}

// `ready`: x was there before the kernel in front of this one began, which only chooses experts.
#define STREAM_EXPERTS(suffix, FORMAT)                                                                                 \
  extern "C" __global__ void __launch_bounds__(256, 2) stream_inner_##suffix(                                          \
      const Matrix* experts, const Tile* groups, const int* list, int top_k, const __nv_bfloat16* x, __nv_bfloat16* inner, int inner_max, \
      const Matrix* gate, const Matrix* up, __nv_bfloat16* shared_inner, int count, int width, int ready) {            \
    stream_inner<FORMAT>(experts, groups, list, top_k, x, inner, inner_max, gate, up, shared_inner, count, width, ready); \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(256, 2) stream_outer_##suffix(                                          \
      const Matrix* experts, const Tile* groups, const int* list, const __nv_bfloat16* inner, int inner_max, const Matrix* down, \
      const __nv_bfloat16* shared_inner, float* y, int choices, int count, int width) {                                \
    stream_outer<FORMAT>(experts, groups, list, inner, inner_max, down, shared_inner, y, choices, count, width);       \
  }
STREAM_EXPERTS(bf16, BF16)
STREAM_EXPERTS(fp8, F8E4M3)
