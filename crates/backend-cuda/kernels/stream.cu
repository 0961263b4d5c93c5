// Products for few tokens, as fast as memory gives the weights: every warp streams its own part of the columns through
// its own ring in shared memory, from one tile of rows into the next, and never waits for the other warps to ask for
// more. Only when a tile is done do the eight parts meet. The sums are those of `multiply`, bit by bit.
#pragma once
#include "work.cuh"

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

// 16-byte chunks of a stage's rows are swapped, so that no two lanes meet in a bank.
template <int FORMAT>
__device__ __forceinline__ int swap_of(int row) {
  return FORMAT == BF16 ? (row & 3) << 1 : (row & 1) << 2;
}

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
        uint32_t to = (uint32_t)__cvta_generic_to_shared(slots + slot * STAGE_BYTES + r * STAGE_ROW_BYTES + ((chunk ^ swap_of<FORMAT>(r)) << 4));
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
      }
    }
    at += RUNS;
    slot = slot + 1 == STAGES ? 0 : slot + 1;
    return true;
  }
};

// The 16 codes of a stage's row that lie at `chunk`.
__device__ __forceinline__ uint4 staged_codes(const uint8_t* stage, int row, int chunk) {
  return *(const uint4*)(stage + row * STAGE_ROW_BYTES + ((chunk ^ swap_of<F8E4M3>(row)) << 4));
}
// Four BF16 of a stage's row: the t-th four of 16 columns.
__device__ __forceinline__ uint2 staged_four(const uint8_t* stage, int row, int sixteen, int t) {
  return *(const uint2*)(stage + row * STAGE_ROW_BYTES + (((sixteen * 2 + (t >> 1)) ^ swap_of<BF16>(row)) << 4) + (t & 1) * 8);
}

// A lane's columns of x in one run.
template <int FORMAT, int NT>
__device__ __forceinline__ void bring_x(const __nv_bfloat16* const* xs, int run, int to, int cols, uint4 (*b)[NT]) {
  int t = threadIdx.x & 3;
#pragma unroll
  for (int s = 0; s < 4; s++) {
    // BF16: four of 16 columns and four of the next 16.
    int k = run * RUN + (FORMAT == BF16 ? s * 32 + t * 4 : (s >> 1) * 64 + t * 16 + (s & 1) * 8);
#pragma unroll
    for (int j = 0; j < NT; j++) {
      b[s][j] = make_uint4(0, 0, 0, 0);
      if (run >= to || k >= cols) continue;
      if constexpr (FORMAT == BF16) {
        uint2 low = *(const uint2*)(xs[j] + k), high = *(const uint2*)(xs[j] + k + 16);
        b[s][j] = make_uint4(low.x, low.y, high.x, high.y);
      } else {
        b[s][j] = *(const uint4*)(xs[j] + k);
      }
    }
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
      uint2 low[2] = {staged_four(stage, g, s * 2, t), staged_four(stage, g, s * 2 + 1, t)};
      uint2 high[2] = {staged_four(stage, g + 8, s * 2, t), staged_four(stage, g + 8, s * 2 + 1, t)};
      uint32_t a[4] = {low[0].x, high[0].x, low[0].y, high[0].y}, c[4] = {low[1].x, high[1].x, low[1].y, high[1].y};
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
      uint4 codes[2] = {staged_codes(stage, g, first + s * 4 + t), staged_codes(stage, g + 8, first + s * 4 + t)};
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
      auto tokens = work.tokens(walk.group);
#pragma unroll
      for (int j = 0; j < NT; j++) xs[j] = tokens.row(j * 8 + g);
      out = tokens.out_row(token);
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
    if (out && row < source.rows) {
      if constexpr (Work::OFFSET == 0)
        work.put(out + row, streamed<NT>(room, token, column), streamed<NT>(room, token, 8 + column));
      else
        work.put(out + row, streamed<NT>(room, token, column));
    }
    // The next tile's parts go to the other room, so that one barrier a tile is enough.
    room = rooms + (room == rooms ? WARPS * PART : 0);
    walk.step();
  }
}

#define STREAM_PRODUCTS(name, FORMAT, NT)                                                                              \
  extern "C" __global__ void __launch_bounds__(256, 2) name(const Matrix* first, const Matrix* second, const __nv_bfloat16* x, float* out, \
                                                            float* out_second, int count, int add) {                   \
    stream<FORMAT, NT>(Products(first, second, x, out, out_second, count, add, 16, 1), false);                         \
  }
STREAM_PRODUCTS(stream_bf16_8, BF16, 1)
STREAM_PRODUCTS(stream_bf16_16, BF16, 2)
STREAM_PRODUCTS(stream_fp8_8, F8E4M3, 1)
STREAM_PRODUCTS(stream_fp8_16, F8E4M3, 2)

// `ready`: x was there before the kernel in front of this one began, which only chooses experts.
#define STREAM_EXPERTS(suffix, FORMAT)                                                                                 \
  extern "C" __global__ void __launch_bounds__(256, 2) stream_inner_##suffix(                                          \
      const Matrix* experts, const Tile* groups, const int* list, int top_k, const __nv_bfloat16* x, __nv_bfloat16* inner, int inner_max, \
      const Matrix* gate, const Matrix* up, __nv_bfloat16* shared_inner, int count, int cols, int ready) {             \
    stream<FORMAT, 1>(Inner(experts, groups, list, top_k, x, inner, inner_max, matrix_or_none(gate), matrix_or_none(up), shared_inner, count, cols, 8, 1), ready); \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(256, 2) stream_outer_##suffix(                                          \
      const Matrix* experts, const Tile* groups, const int* list, const __nv_bfloat16* inner, int inner_max, const Matrix* down, \
      const __nv_bfloat16* shared_inner, float* y, int choices, int count, int rows) {                                 \
    stream<FORMAT, 1>(Outer(experts, groups, list, inner, inner_max, matrix_or_none(down), shared_inner, y, choices, count, rows, 8, 1), false); \
  }
STREAM_EXPERTS(bf16, BF16)
STREAM_EXPERTS(fp8, F8E4M3)
