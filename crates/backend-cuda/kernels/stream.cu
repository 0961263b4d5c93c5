// Products for few tokens, as fast as memory gives the weights: every warp streams its own part of the columns through
// its own ring in shared memory, from one tile of rows into the next, and never waits for the other warps to ask for
// more. Only when a tile is done do the eight parts meet. The sums are those of `multiply`, bit by bit.
#pragma once
#include "work.cuh"

// A stage is a run of 128 columns in BF16, two runs in FP8, of 16 rows of weights.
constexpr int STAGE_ROW_BYTES = 256;
constexpr int STAGE_BYTES = 16 * STAGE_ROW_BYTES;
// Two blocks on a multiprocessor of Hopper ask for 192 KiB together; the others have less shared memory.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr int STAGES = 3;
// FP8 runs that are multiplied side by side; elsewhere there are not registers enough for two.
constexpr int BESIDE = 2;
#else
constexpr int STAGES = 2;
constexpr int BESIDE = 1;
#endif

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
  // FP8: the scales of a stage's runs, of both matrices each.
  float* scales;
  Source source;
  Walk walk, late;
  const uint8_t* rows[2];
  const float* scales_of_rows[2];
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
        if constexpr (FORMAT != BF16) scales_of_rows[h] = source.scales[h] + (size_t)(row >> 7) * ((source.cols + 127) >> 7);
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
    if constexpr (FORMAT != BF16) {
      // A lane's scale is that of the first matrix, or of the second for odd lanes.
      int64_t apart = (lane & 1) * (scales_of_rows[1] - scales_of_rows[0]);
      int run = at + (lane >> 1);
      if (lane < 2 * RUNS && run < end)
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(scales + slot * 2 * RUNS + lane)), "l"(scales_of_rows[0] + apart + run) : "memory");
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

// Two BF16 times 2^64.
__device__ __forceinline__ uint32_t larger(uint32_t pair) {
  __nv_bfloat162 v = __hmul2(*(const __nv_bfloat162*)&pair, __float2bfloat162_rn(0x1p64f));
  return *(const uint32_t*)&v;
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
        // Two pieces of two columns side by side, as the pairs of codes are. The codes' exponents are 120 too small: 64 of
        // that are put here, the rest at the end.
        uint4 v = *(const uint4*)(xs[j] + k);
        b[s][j] = make_uint4(larger(__byte_perm(v.x, v.y, 0x5410)), larger(__byte_perm(v.x, v.y, 0x7632)), larger(__byte_perm(v.z, v.w, 0x5410)),
                             larger(__byte_perm(v.z, v.w, 0x7632)));
      }
    }
  }
}

// A run of BF16 added to the sums; `whole` unless the row ends half way.
template <int NT>
__device__ __forceinline__ void add_bf16(const uint8_t* stage, const uint4 (*b)[NT], bool whole, float (*sums)[4]) {
  int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
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
}

// The same of COUNT runs of FP8 beside each other, from run `first` of the stage on, so that no product waits for the one
// before it. Only the last of them can be half a run.
template <int COUNT, int NT>
__device__ __forceinline__ void add_fp8(const uint8_t* stage, int first, const uint4 (*b)[4][NT], bool whole, const float* scale, float (*sums)[4]) {
  int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
  float part[COUNT][NT][4] = {};
#pragma unroll
  for (int s = 0; s < 2; s++) {
    uint4 codes[COUNT][2];
#pragma unroll
    for (int r = 0; r < COUNT; r++)
#pragma unroll
      for (int h = 0; h < 2; h++) codes[r][h] = staged_codes(stage, g + h * 8, (first + r) * 8 + s * 4 + t);
#pragma unroll
    for (int quarter = 0; quarter < 4; quarter++)
#pragma unroll
      for (int r = 0; r < COUNT; r++) {
        if (s == 1 && r == COUNT - 1 && !whole) continue;
        uint32_t low = (&codes[r][0].x)[quarter], high = (&codes[r][1].x)[quarter];
        uint32_t f[4] = {small_pair(low, picked(0, 2)), small_pair(high, picked(0, 2)), small_pair(low, picked(1, 3)), small_pair(high, picked(1, 3))};
#pragma unroll
        for (int j = 0; j < NT; j++) {
          const uint32_t* v = &b[r][s * 2 + (quarter >> 1)][j].x + (quarter & 1) * 2;
          mma(part[r][j], f, v[0], v[1]);
        }
      }
  }
#pragma unroll
  for (int r = 0; r < COUNT; r++)
#pragma unroll
    for (int j = 0; j < NT; j++)
#pragma unroll
      for (int c = 0; c < 4; c++) sums[j][c] = fmaf(part[r][j][c], scale[r * 2 + (c >> 1)] * 0x1p56f, sums[j][c]);
}

// All tiles of `work` that are this block's, NT times 8 tokens each. The weights of the early ones may be asked for
// before the kernels in front are done, those of the late ones too if all is KNOWN; with `ready` the early ones may even
// be multiplied. IN_ORDER: what those in front of this kernel wrote is known to the next one.
template <int FORMAT, int NT, bool KNOWN, bool IN_ORDER, class Work>
__device__ __forceinline__ void stream(const Work& work, bool ready) {
  extern __shared__ __align__(128) uint8_t bytes[];
  constexpr int PART = NT * 8 * TOKEN_STRIDE;
  using R = Ring<FORMAT, Work>;
  int warp = threadIdx.x >> 5, g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
  int column = threadIdx.x % Work::COLUMNS, token = threadIdx.x / Work::COLUMNS;
  float *rooms = (float*)(bytes + WARPS * STAGES * STAGE_BYTES), *room = rooms;
  R ring;
  ring.slots = bytes + warp * STAGES * STAGE_BYTES;
  __shared__ __align__(16) float scales[WARPS][STAGES][4];
  ring.scales = scales[warp][0];
  Walk walk, late;
  {
    int tiles = work.early_groups * work.early_blocks, b = blockIdx.x, n = gridDim.x;
    walk.over((int)((int64_t)tiles * b / n), (int)((int64_t)tiles * (b + 1) / n), work.early_blocks, 0);
    ring.walk = walk;
  }
  auto see = [&] {
    // The other way round, so that a block with one early tile more has none more here.
    int tiles = work.late_groups() * work.late_blocks, b = gridDim.x - 1 - blockIdx.x, n = gridDim.x;
    late.over((int)((int64_t)tiles * b / n), (int)((int64_t)tiles * (b + 1) / n), work.late_blocks, work.early_groups);
    ring.late = late;
  };
  auto open = [&] {
    if constexpr (IN_ORDER)
      begin_in_order();
    else
      begin();
    if constexpr (!KNOWN) see();
  };
  if constexpr (KNOWN) see();
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
        if (!ring.ask(work) && !KNOWN && !opened && !ready) {
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
#pragma unroll 1
    for (int run = from; run < to; run += R::RUNS) {
#pragma unroll
      for (int r = 0; r < R::RUNS; r++)
        if constexpr (NT == 1) {
          if (fresh || to - from > R::RUNS) bring_x<FORMAT, NT>(xs, run + r, to, source.cols, x[r]);
        }
      asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
      __syncwarp();
      const uint8_t* at = ring.slots + slot * STAGE_BYTES;
      const float* of_stage = scales[warp][slot];
      float scale[4];
      if constexpr (BESIDE == 2) *(float4*)scale = *(const float4*)of_stage;
      auto whole = [&](int runs) { return (run + runs) * RUN <= source.cols; };
      if constexpr (FORMAT == BF16) {
        if constexpr (NT > 1) bring_x<FORMAT, NT>(xs, run, to, source.cols, x[0]);
        add_bf16<NT>(at, x[0], whole(1), sums);
      } else if constexpr (NT == 1 && BESIDE == 2) {
        if (run + 1 < to)
          add_fp8<2, NT>(at, 0, x, whole(2), scale, sums);
        else
          add_fp8<1, NT>(at, 0, x, whole(1), scale, sums);
      } else {
#pragma unroll
        for (int r = 0; r < R::RUNS; r++) {
          if (run + r >= to) break;
          if constexpr (NT > 1) bring_x<FORMAT, NT>(xs, run + r, to, source.cols, x[0]);
          add_fp8<1, NT>(at, r, x + (NT > 1 ? 0 : r), whole(r + 1), BESIDE == 2 ? scale + r * 2 : of_stage + r * 2, sums);
        }
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

// A second block would not fit in the shared memory of Blackwell's cards.
#if __CUDA_ARCH__ >= 1200
constexpr int STREAM_BLOCKS = 1;
#else
constexpr int STREAM_BLOCKS = 2;
#endif

#define STREAM_PRODUCTS(name, FORMAT, NT)                                                                              \
  extern "C" __global__ void __launch_bounds__(256, STREAM_BLOCKS) name(const Matrix* first, const Matrix* second, const __nv_bfloat16* x, float* out, \
                                                            float* out_second, int count, int add) {                   \
    stream<FORMAT, NT, true, false>(Products(first, second, x, out, out_second, count, add, 16, 1), false);                         \
  }
STREAM_PRODUCTS(stream_bf16_8, BF16, 1)
STREAM_PRODUCTS(stream_bf16_16, BF16, 2)
STREAM_PRODUCTS(stream_fp8_8, F8E4M3, 1)
STREAM_PRODUCTS(stream_fp8_16, F8E4M3, 2)

// `ready`: x was there before the kernel in front of this one began, which only chooses experts. `stream_outer` follows
// `stream_inner`, so the choices are there before it begins.
#define STREAM_EXPERTS(suffix, FORMAT)                                                                                 \
  extern "C" __global__ void __launch_bounds__(256, STREAM_BLOCKS) stream_inner_##suffix(                                          \
      const Matrix* experts, const Tile* groups, const int* list, int top_k, const __nv_bfloat16* x, __nv_bfloat16* inner, int inner_max, \
      const Matrix* gate, const Matrix* up, __nv_bfloat16* shared_inner, int count, int cols, int ready) {             \
    stream<FORMAT, 1, false, true>(Inner(experts, groups, list, top_k, x, inner, inner_max, matrix_or_none(gate), matrix_or_none(up), shared_inner, count, cols, 8, 1), ready); \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(256, STREAM_BLOCKS) stream_outer_##suffix(                                          \
      const Matrix* experts, const Tile* groups, const int* list, const __nv_bfloat16* inner, int inner_max, const Matrix* down, \
      const __nv_bfloat16* shared_inner, float* y, int choices, int count, int rows) {                                 \
    stream<FORMAT, 1, true, false>(Outer(experts, groups, list, inner, inner_max, matrix_or_none(down), shared_inner, y, choices, count, rows, 8, 1), false); \
  }
STREAM_EXPERTS(bf16, BF16)
STREAM_EXPERTS(fp8, F8E4M3)
