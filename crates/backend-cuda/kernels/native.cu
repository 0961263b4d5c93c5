// Native precision: BF16 activations times BF16 or FP8 weights on the tensor cores, sums in F32.
//
// Eight warps of a block divide the columns, a multiple of 64, into eight parts of runs of 128, by the number of columns alone; each part
// is summed in order and the parts are added in order. So a row's bits do not depend on the rows beside it, nor on how
// many of them a block takes.
#include "step.cuh"

constexpr int RUN = 128;
constexpr int WARPS = 8;

__device__ __forceinline__ void mma(float* c, const uint32_t* a, uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Weights are read once: they leave the first cache to the activations.
__device__ __forceinline__ uint4 load_weights(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
// Two FP8 codes, in the upper byte of each half, as two BF16; exact. A code of NaN, which no checkpoint has, becomes 480.
__device__ __forceinline__ uint32_t bf16_pair(uint32_t codes) {
  uint32_t bits = (codes & 0x80008000u) | (codes & 0x7f007f00u) >> 4;
  const uint32_t unit = 0x7b807b80u;  // 2^120: the difference of the exponents' biases
  uint32_t v;
  asm("{fma.rn.bf16x2 %0, %1, %2, %3;}" : "=r"(v) : "r"(bits), "r"(unit), "r"(0x80008000u));
  return v;
}

// STEPS times 32 columns of BF16 weights from column k on, added to the sums.
template <int STEPS, int MT, int NT>
__device__ __forceinline__ void add_bf16(const uint8_t* const (*w)[2], const __nv_bfloat16* const* x, int k, float (*sums)[NT][4]) {
  uint4 a[STEPS][MT][2], b[STEPS][NT];
#pragma unroll
  for (int s = 0; s < STEPS; s++) {
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
      for (int r = 0; r < 2; r++) a[s][i][r] = load_weights(w[i][r] + (size_t)(k + s * 32) * 2);
#pragma unroll
    for (int j = 0; j < NT; j++) b[s][j] = *(const uint4*)(x[j] + k + s * 32);
  }
#pragma unroll
  for (int s = 0; s < STEPS; s++)
#pragma unroll
    for (int i = 0; i < MT; i++) {
      uint32_t first[4] = {a[s][i][0].x, a[s][i][1].x, a[s][i][0].y, a[s][i][1].y};
      uint32_t second[4] = {a[s][i][0].z, a[s][i][1].z, a[s][i][0].w, a[s][i][1].w};
#pragma unroll
      for (int j = 0; j < NT; j++) {
        mma(sums[i][j], first, b[s][j].x, b[s][j].y);
        mma(sums[i][j], second, b[s][j].z, b[s][j].w);
      }
    }
}

// STEPS times 64 columns of FP8 codes from column k on, added to the sums, without their scale.
template <int STEPS, int MT, int NT>
__device__ __forceinline__ void add_fp8(const uint8_t* const (*w)[2], const __nv_bfloat16* const* x, int k, float (*sums)[NT][4]) {
  uint4 a[STEPS][MT][2];
#pragma unroll
  for (int s = 0; s < STEPS; s++)
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
      for (int r = 0; r < 2; r++) a[s][i][r] = load_weights(w[i][r] + k + s * 64);
#pragma unroll
  for (int s = 0; s < STEPS; s++) {
#pragma unroll
    for (int quarter = 0; quarter < 4; quarter++) {
      uint32_t b[NT][2];
#pragma unroll
      for (int j = 0; j < NT; j++) {
        uint2 v = *(const uint2*)(x[j] + k + s * 64 + quarter * 4);
        b[j][0] = __byte_perm(v.x, v.y, 0x5410);  // columns 0 and 2
        b[j][1] = __byte_perm(v.x, v.y, 0x7632);  // columns 1 and 3
      }
#pragma unroll
      for (int i = 0; i < MT; i++) {
        const uint32_t* low = &a[s][i][0].x;
        const uint32_t* high = &a[s][i][1].x;
        uint32_t codes[2] = {low[quarter], high[quarter]};
        uint32_t f[4] = {bf16_pair(codes[0] << 8), bf16_pair(codes[1] << 8), bf16_pair(codes[0]), bf16_pair(codes[1])};
#pragma unroll
        for (int j = 0; j < NT; j++) mma(sums[i][j], f, b[j][0], b[j][1]);
      }
    }
  }
}

template <int MT, int NT>
__device__ __forceinline__ void clear(float (*sums)[NT][4]) {
#pragma unroll
  for (int i = 0; i < MT; i++)
#pragma unroll
    for (int j = 0; j < NT; j++)
#pragma unroll
      for (int c = 0; c < 4; c++) sums[i][j][c] = 0;
}

// MT tiles of 16 weight rows by NT tiles of 8 tokens over runs [from, to), of which the last of a row may be short. A lane
// has rows g and g + 8 of each weight tile at `w`, and token g of each token tile at `x`, where g = lane / 4; which columns
// meet in one mma is of no matter as long as both sides agree.
template <int FORMAT, int MT, int NT>
__device__ __forceinline__ void multiply(const uint8_t* const (*w)[2], const float* const* scales, const __nv_bfloat16* const* x, int cols, int from, int to,
                                         float (*sums)[NT][4]) {
  int t = threadIdx.x & 3;
  clear<MT, NT>(sums);
#pragma unroll 1
  for (int run = from; run < to; run++) {
    bool whole = (run + 1) * RUN <= cols;
    if constexpr (FORMAT == BF16) {
      constexpr int STEPS = MT * NT > 8 ? 2 : 4;
      int k = run * RUN + t * 8;
      if (whole) {
#pragma unroll 1
        for (int s = 0; s < 4; s += STEPS) add_bf16<STEPS, MT, NT>(w, x, k + s * 32, sums);
      } else {
#pragma unroll 1
        for (; k < cols; k += 32) add_bf16<1, MT, NT>(w, x, k, sums);
      }
    } else {
      float part[MT][NT][4];
      clear<MT, NT>(part);
      int k = run * RUN + t * 16;
      if (whole)
        add_fp8<2, MT, NT>(w, x, k, part);
      else
        add_fp8<1, MT, NT>(w, x, k, part);
#pragma unroll
      for (int i = 0; i < MT; i++) {
        float scale = scales[i][run];
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
          for (int c = 0; c < 4; c++) sums[i][j][c] = fmaf(part[i][j][c], scale, sums[i][j][c]);
      }
    }
  }
}

__device__ __forceinline__ void part_of_warp(int cols, int& from, int& to) {
  int runs = (cols + RUN - 1) / RUN, warp = threadIdx.x >> 5;
  from = runs * warp / WARPS;
  to = runs * (warp + 1) / WARPS;
}

// Asks for 16 rows of a weight, this warp's runs of them, while the kernels before this one still run.
template <int FORMAT>
__device__ __forceinline__ void ask_for(const Matrix& m, int row) {
#if __CUDA_ARCH__ >= 900
  constexpr int bytes = FORMAT == BF16 ? RUN * 2 : RUN;
  int lane = threadIdx.x & 31, from, to;
  part_of_warp(m.cols, from, to);
  const uint8_t* p = m.data + (size_t)min(row + (lane >> 1), m.rows - 1) * m.row_bytes;
  for (int at = from * bytes + (lane & 1) * 128; at < min(to * bytes, m.row_bytes); at += 256) asm volatile("prefetch.global.L2 [%0];" ::"l"(p + at));
#endif
}

// Adds the eight parts in order. `room` holds 8 parts of [MT * 16][NT * 8]; afterwards value (row, token) of the sum is
// returned by `summed`.
template <int MT, int NT>
__device__ __forceinline__ void share(float* room, const float (*sums)[NT][4]) {
  int warp = threadIdx.x >> 5, g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
  float* own = room + warp * MT * NT * 128;
#pragma unroll
  for (int i = 0; i < MT; i++)
#pragma unroll
    for (int j = 0; j < NT; j++)
#pragma unroll
      for (int c = 0; c < 4; c++) own[(j * 8 + 2 * t + (c & 1)) * (MT * 16) + i * 16 + g + (c >> 1) * 8] = sums[i][j][c];
  __syncthreads();
}
template <int MT, int NT>
__device__ __forceinline__ float summed(const float* room, int token, int row) {
  float sum = 0;
#pragma unroll
  for (int w = 0; w < WARPS; w++) sum += room[w * MT * NT * 128 + token * (MT * 16) + row];
  return sum;
}

// Rows of a weight tile for this lane, the last row in place of those behind it.
__device__ __forceinline__ void tile_of(const Matrix& m, int row, const uint8_t** w, const float** scales) {
  int g = (threadIdx.x & 31) >> 2;
  w[0] = m.data + (size_t)min(row + g, m.rows - 1) * m.row_bytes;
  w[1] = m.data + (size_t)min(row + g + 8, m.rows - 1) * m.row_bytes;
  *scales = (const float*)m.scales + (size_t)(min(row, m.rows - 1) >> 7) * ((m.cols + 127) >> 7);
}

// out = x W^T or out += x W^T; blockIdx = (rows of W / (16 MT), tokens / (8 NT)).
template <int FORMAT, int MT, int NT>
__device__ __forceinline__ void product(const Matrix* weight, const __nv_bfloat16* x, float* out, int rows, int add) {
  extern __shared__ __align__(16) float room[];
  const Matrix m = *weight;
  int row = blockIdx.x * MT * 16, token = blockIdx.y * NT * 8, g = (threadIdx.x & 31) >> 2, from, to;
  const uint8_t* w[MT][2];
  const float* scales[MT];
  const __nv_bfloat16* xs[NT];
#pragma unroll
  for (int i = 0; i < MT; i++) ask_for<FORMAT>(m, row + i * 16);
  begin();
#pragma unroll
  for (int i = 0; i < MT; i++) tile_of(m, row + i * 16, w[i], &scales[i]);
#pragma unroll
  for (int j = 0; j < NT; j++) xs[j] = x + (size_t)min(token + j * 8 + g, rows - 1) * m.cols;
  part_of_warp(m.cols, from, to);
  float sums[MT][NT][4];
  multiply<FORMAT, MT, NT>(w, scales, xs, m.cols, from, to, sums);
  share<MT, NT>(room, sums);
  for (int i = threadIdx.x; i < MT * 16 * NT * 8; i += blockDim.x) {
    int n = i % (MT * 16), r = i / (MT * 16);
    if (row + n < m.rows && token + r < rows) {
      float y = summed<MT, NT>(room, r, n);
      float* o = out + (size_t)(token + r) * m.rows + row + n;
      *o = add ? *o + y : y;
    }
  }
}

#define PRODUCT(name, FORMAT, MT, NT) \
  extern "C" __global__ void __launch_bounds__(256) name(const Matrix* w, const __nv_bfloat16* x, float* out, int rows, int add) { \
    product<FORMAT, MT, NT>(w, x, out, rows, add); \
  }
PRODUCT(product_bf16_32, BF16, 2, 4)
PRODUCT(product_bf16_64, BF16, 2, 8)
PRODUCT(product_fp8_32, F8E4M3, 2, 4)
PRODUCT(product_fp8_64, F8E4M3, 2, 8)

// x in BF16.
extern "C" __global__ void round_rows(const float* x, __nv_bfloat16* out, int n) {
  begin();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) out[i] = __float2bfloat16_rn(x[i]);
}

// A weight in BF16, `[rows, cols]`; a block per row.
extern "C" __global__ void to_bf16(const Matrix* weight, __nv_bfloat16* out) {
  begin();
  const Matrix m = *weight;
  const uint8_t* p = m.data + (size_t)blockIdx.x * m.row_bytes;
  for (int k = threadIdx.x; k < m.cols; k += blockDim.x)
    out[(size_t)blockIdx.x * m.cols + k] = __float2bfloat16_rn(any_value(m, p, blockIdx.x, k));
}

// Sorts the choices of all rows by expert, those of one expert by row, and cuts them into tiles of at most `width`; one
// block, whose shared memory holds three words per expert and one more per warp. tiles[0].first is the number of tiles,
// which begin at tiles[1].
extern "C" __global__ void __launch_bounds__(1024) moe_group(const int* ids, int choices, int experts, int width, int* list, Tile* tiles) {
  begin();
  extern __shared__ __align__(16) float room[];
  int *ends = (int*)room, *counts = ends + experts, *first_tiles = counts + experts, *of_warp = first_tiles + experts;
  int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, warps = blockDim.x >> 5;
  for (int e = threadIdx.x; e < experts; e += blockDim.x) counts[e] = 0;
  for (int i = threadIdx.x; i < warps * experts; i += blockDim.x) of_warp[i] = 0;
  __syncthreads();
  for (int c = threadIdx.x; c < choices; c += blockDim.x) atomicAdd(&counts[ids[c]], 1);
  __syncthreads();
  if (warp == 0) {
    int at = 0, tile = 0;
    for (int from = 0; from < experts; from += 32) {
      int e = from + lane, n = e < experts ? counts[e] : 0, own_tiles = (n + width - 1) / width, a = n, b = own_tiles;
      for (int o = 1; o < 32; o *= 2) {
        int before = __shfl_up_sync(~0u, a, o), tiles_before = __shfl_up_sync(~0u, b, o);
        if (lane >= o) {
          a += before;
          b += tiles_before;
        }
      }
      if (e < experts) {
        ends[e] = at + a - n;
        first_tiles[e] = tile + b - own_tiles;
      }
      at += __shfl_sync(~0u, a, 31);
      tile += __shfl_sync(~0u, b, 31);
    }
    if (lane == 0) tiles[0].first = tile;
  }
  __syncthreads();
  for (int e = threadIdx.x; e < experts; e += blockDim.x)
    for (int i = 0, n = counts[e]; i * width < n; i++) tiles[1 + first_tiles[e] + i] = {e, ends[e] + i * width, min(width, n - i * width), 0};
  __syncthreads();
  for (int from = 0; from < choices; from += blockDim.x) {
    int c = from + threadIdx.x, e = c < choices ? ids[c] : -1;
    unsigned alike = __match_any_sync(~0u, e);
    int before = __popc(alike & ((1u << lane) - 1));
    if (e >= 0 && before == 0) of_warp[warp * experts + e] = __popc(alike);
    __syncthreads();
    for (int i = threadIdx.x; i < experts; i += blockDim.x) {
      int end = ends[i], busy = min(warps, (choices - from + 31) / 32);
      for (int w = 0; w < busy; w++) {
        int n = of_warp[w * experts + i];
        of_warp[w * experts + i] = end;
        end += n;
      }
      ends[i] = end;
    }
    __syncthreads();
    if (e >= 0) list[of_warp[warp * experts + e] + before] = c;
    __syncthreads();
    for (int i = threadIdx.x; i < warps * experts; i += blockDim.x) of_warp[i] = 0;
    __syncthreads();
  }
}

// inner = silu(gate x) * up x in BF16. blockIdx.y below `routed` is a tile of experts, above it a tile of the shared
// expert's tokens; blockIdx.x is a tile of 16 inner values.
template <int FORMAT, int NT>
__device__ __forceinline__ void inner_tile(const Matrix* experts, const Tile* tiles, const int* list, int routed, int top_k, const __nv_bfloat16* x,
                                           __nv_bfloat16* inner, int inner_max, const Matrix* gate, const Matrix* up, __nv_bfloat16* shared_inner, int rows) {
  extern __shared__ __align__(16) float room[];
  int row = blockIdx.x * 16, g = (threadIdx.x & 31) >> 2, from, to;
  bool shared = blockIdx.y >= routed;
  Tile tile = {0, (int)(blockIdx.y - routed) * NT * 8, NT * 8, 0};
  if (shared) {
    ask_for<FORMAT>(*gate, row);
    ask_for<FORMAT>(*up, row);
  }
  begin();
  if (shared) {
    tile.count = min(NT * 8, rows - tile.first);
  } else {
    if (blockIdx.y >= tiles[0].first) return;
    tile = tiles[1 + blockIdx.y];
    gate = experts + 3 * tile.expert;
    up = gate + 1;
  }
  const Matrix a = *gate, b = *up;
  if (row >= a.rows) return;
  const uint8_t* w[2][2];
  const float* scales[2];
  const __nv_bfloat16* xs[NT];
  tile_of(a, row, w[0], &scales[0]);
  tile_of(b, row, w[1], &scales[1]);
#pragma unroll
  for (int j = 0; j < NT; j++) {
    int i = tile.first + min(j * 8 + g, tile.count - 1);
    xs[j] = x + (size_t)(shared ? i : list[i] / top_k) * a.cols;
  }
  part_of_warp(a.cols, from, to);
  float sums[2][NT][4];
  multiply<FORMAT, 2, NT>(w, scales, xs, a.cols, from, to, sums);
  share<2, NT>(room, sums);
  for (int i = threadIdx.x; i < 16 * NT * 8; i += blockDim.x) {
    int n = i & 15, r = i >> 4;
    if (r < tile.count && row + n < a.rows) {
      float z = summed<2, NT>(room, r, n), u = summed<2, NT>(room, r, 16 + n);
      int at = tile.first + r;
      __nv_bfloat16* to_row = shared ? shared_inner + (size_t)at * a.rows : inner + (size_t)list[at] * inner_max;
      to_row[row + n] = __float2bfloat16_rn(silu(z) * u);
    }
  }
}

// y = down(inner) of each choice and of the shared expert, F32 `[choices + rows, width]`.
template <int FORMAT, int NT>
__device__ __forceinline__ void outer_tile(const Matrix* experts, const Tile* tiles, const int* list, int routed, const __nv_bfloat16* inner, int inner_max,
                                           const Matrix* down, const __nv_bfloat16* shared_inner, float* y, int choices, int rows) {
  extern __shared__ __align__(16) float room[];
  int row = blockIdx.x * 16, g = (threadIdx.x & 31) >> 2, from, to;
  bool shared = blockIdx.y >= routed;
  Tile tile = {0, (int)(blockIdx.y - routed) * NT * 8, NT * 8, 0};
  if (shared) ask_for<FORMAT>(*down, row);
  begin();
  if (shared) {
    tile.count = min(NT * 8, rows - tile.first);
  } else {
    if (blockIdx.y >= tiles[0].first) return;
    tile = tiles[1 + blockIdx.y];
    down = experts + 3 * tile.expert + 2;
  }
  const Matrix m = *down;
  const uint8_t* w[1][2];
  const float* scales[1];
  const __nv_bfloat16* xs[NT];
  tile_of(m, row, w[0], &scales[0]);
#pragma unroll
  for (int j = 0; j < NT; j++) {
    int i = tile.first + min(j * 8 + g, tile.count - 1);
    xs[j] = shared ? shared_inner + (size_t)i * m.cols : inner + (size_t)list[i] * inner_max;
  }
  part_of_warp(m.cols, from, to);
  float sums[1][NT][4];
  multiply<FORMAT, 1, NT>(w, scales, xs, m.cols, from, to, sums);
  share<1, NT>(room, sums);
  for (int i = threadIdx.x; i < 16 * NT * 8; i += blockDim.x) {
    int n = i & 15, r = i >> 4;
    if (r < tile.count && row + n < m.rows) {
      int at = tile.first + r;
      y[(size_t)(shared ? choices + at : list[at]) * m.rows + row + n] = summed<1, NT>(room, r, n);
    }
  }
}

#define EXPERTS(suffix, FORMAT, NT) \
  extern "C" __global__ void __launch_bounds__(256) experts_inner_##suffix(                                        \
      const Matrix* experts, const Tile* tiles, const int* list, int routed, int top_k, const __nv_bfloat16* x, __nv_bfloat16* inner, int inner_max, \
      const Matrix* gate, const Matrix* up, __nv_bfloat16* shared_inner, int rows) { \
    inner_tile<FORMAT, NT>(experts, tiles, list, routed, top_k, x, inner, inner_max, gate, up, shared_inner, rows); \
  } \
  extern "C" __global__ void __launch_bounds__(256) experts_outer_##suffix(                                        \
      const Matrix* experts, const Tile* tiles, const int* list, int routed, const __nv_bfloat16* inner, int inner_max, const Matrix* down,          \
      const __nv_bfloat16* shared_inner, float* y, int choices, int rows) { \
    outer_tile<FORMAT, NT>(experts, tiles, list, routed, inner, inner_max, down, shared_inner, y, choices, rows);  \
  }
EXPERTS(bf16_32, BF16, 4)
EXPERTS(fp8_32, F8E4M3, 4)

// out += the choices' y by rising expert id, each times its weight, the shared expert's y last; blockIdx = (D / 256, row).
extern "C" __global__ void experts_sum(const float* y, const float* weights, const int* order, int top_k, int choices, int shared, float* out, int width) {
  begin();
  int n = blockIdx.x * blockDim.x + threadIdx.x, t = blockIdx.y;
  if (n >= width) return;
  float sum = 0;
  for (int j = 0; j < top_k; j++) {
    int choice = t * top_k + order[t * top_k + j];
    sum = fmaf(weights[choice], y[(size_t)choice * width + n], sum);
  }
  if (shared) sum += y[(size_t)(choices + t) * width + n];
  out[(size_t)t * width + n] += sum;
}

// `experts_sum` and then `rms_norm` of the sums, a block per row of at most 4,096 whole fours; the same sums as those two.
extern "C" __global__ void __launch_bounds__(256) experts_sum_norm(const float* y, const float* weights, const int* order, int top_k, int choices, int shared,
                                                                   float* out, int width, const float* norm, float eps, float* normed,
                                                                   __nv_bfloat16* rounded) {
  __shared__ float sums[32];
  constexpr int KEPT = 4;
  float4 v[KEPT], w[KEPT];
  int t = blockIdx.x, fours = width / 4;
#pragma unroll
  for (int j = 0; j < KEPT; j++) {
    int i = threadIdx.x + j * 256;
    w[j] = i < fours ? ((const float4*)norm)[i] : make_float4(0, 0, 0, 0);
    v[j] = make_float4(0, 0, 0, 0);
  }
  begin();
  for (int c = 0; c < top_k; c++) {
    int choice = t * top_k + order[t * top_k + c];
    float weight = weights[choice];
#pragma unroll
    for (int j = 0; j < KEPT; j++) {
      int i = threadIdx.x + j * 256;
      if (i >= fours) break;
      float4 a = ((const float4*)(y + (size_t)choice * width))[i];
      v[j] = make_float4(fmaf(weight, a.x, v[j].x), fmaf(weight, a.y, v[j].y), fmaf(weight, a.z, v[j].z), fmaf(weight, a.w, v[j].w));
    }
  }
  float sum = 0;
#pragma unroll
  for (int j = 0; j < KEPT; j++) {
    int i = threadIdx.x + j * 256;
    if (i < fours) {
      if (shared) {
        float4 a = ((const float4*)(y + (size_t)(choices + t) * width))[i];
        v[j] = make_float4(v[j].x + a.x, v[j].y + a.y, v[j].z + a.z, v[j].w + a.w);
      }
      float4* o = (float4*)(out + (size_t)t * width) + i;
      float4 a = *o;
      v[j] = make_float4(a.x + v[j].x, a.y + v[j].y, a.z + v[j].z, a.w + v[j].w);
      *o = v[j];
    }
    sum = fmaf(v[j].x, v[j].x, fmaf(v[j].y, v[j].y, fmaf(v[j].z, v[j].z, fmaf(v[j].w, v[j].w, sum))));
  }
  float scale = 1.0f / sqrtf(block_sum(sum, sums) / (float)width + eps);
#pragma unroll
  for (int j = 0; j < KEPT; j++) {
    int i = threadIdx.x + j * 256;
    if (i >= fours) break;
    float4 n = make_float4(w[j].x * (v[j].x * scale), w[j].y * (v[j].y * scale), w[j].z * (v[j].z * scale), w[j].w * (v[j].w * scale));
    ((float4*)(normed + (size_t)t * width))[i] = n;
    if (rounded) {
      __nv_bfloat162 pair[2] = {__floats2bfloat162_rn(n.x, n.y), __floats2bfloat162_rn(n.z, n.w)};
      ((uint2*)(rounded + (size_t)t * width))[i] = *(const uint2*)pair;
    }
  }
}

// q~ = [W_UK^T q_nope, q_rope] in BF16. A block has 128 latent columns of one head and up to TOKENS rows; four groups of
// 64 threads divide the nope dimensions. blockIdx = (latent / 128, head, rows / TOKENS).
// With rows in `kv` the blocks behind the latent columns rotate the rope part of q on the way, in place, and append the
// latents of the rows to the cache.
struct Append {
  const float *kv, *weight;
  float eps;
  const float* frequencies;
  float magnitude;
  uint8_t* layer;
  int row_bytes;
};
template <int TOKENS>
__device__ __forceinline__ void absorb(const __nv_bfloat16* kv_b, float* q, __nv_bfloat16* out, int first, int rows, int nope, int rope, int values,
                                       int latent, const Step& step, const Append& append) {
  extern __shared__ __align__(16) float room[];
  // Weights that a thread brings before the kernels in front are done.
  constexpr int KEPT = TOKENS == 1 ? 32 : 1;
  float *queries = room, *parts = room + TOKENS * nope;
  int head = blockIdx.y, heads = gridDim.y, token = blockIdx.z * TOKENS, n = min(TOKENS, rows - token);
  int pair = threadIdx.x & 63, group = threadIdx.x >> 6, column = blockIdx.x * 128 + pair * 2;
  int from = nope * group / 4, to = nope * (group + 1) / 4;
  auto turn = [&] {
    for (int i = threadIdx.x; i < n * rope / 2; i += blockDim.x) {
      int r = i / (rope / 2), c = i % (rope / 2);
      float2* at = (float2*)(q + ((size_t)(first + token + r) * heads + head) * (nope + rope) + nope) + c;
      float pair[2] = {at->x, at->y};
      if (append.kv) {
        rotate(pair, (float)step.positions[first + token + r], append.frequencies[c], append.magnitude);
        *at = make_float2(pair[0], pair[1]);
      }
      __nv_bfloat162* to_pair = (__nv_bfloat162*)(out + ((size_t)(token + r) * heads + head) * (latent + rope) + latent) + c;
      *to_pair = __floats2bfloat162_rn(pair[0], pair[1]);
    }
  };
  if (blockIdx.x * 128 >= latent) {
    begin();
    turn();
    if (head < n)
      append_row(append.kv, append.weight, append.eps, step, append.frequencies, append.magnitude, append.layer, CACHE_BF16, latent, rope,
                 append.row_bytes, token + head);
    return;
  }
  const __nv_bfloat16* w = kv_b + (size_t)head * (nope + values) * latent + column;
  __nv_bfloat162 kept[KEPT];
#pragma unroll
  for (int i = 0; i < KEPT; i++) kept[i] = *(const __nv_bfloat162*)(w + (size_t)min(from + i, nope - 1) * latent);
  begin();
  for (int i = threadIdx.x; i < n * nope; i += blockDim.x)
    queries[i] = q[((size_t)(first + token + i / nope) * heads + head) * (nope + rope) + i % nope];
  __syncthreads();
  float sums[TOKENS][2] = {};
  auto add = [&](int d, __nv_bfloat162 weight) {
    float2 v = __bfloat1622float2(weight);
#pragma unroll
    for (int r = 0; r < TOKENS; r++) {
      float a = r < n ? queries[r * nope + d] : 0.0f;
      sums[r][0] = fmaf(a, v.x, sums[r][0]);
      sums[r][1] = fmaf(a, v.y, sums[r][1]);
    }
  };
#pragma unroll
  for (int i = 0; i < KEPT; i++)
    if (from + i < to) add(from + i, kept[i]);
#pragma unroll 16
  for (int d = from + KEPT; d < to; d++) add(d, *(const __nv_bfloat162*)(w + (size_t)d * latent));
#pragma unroll
  for (int r = 0; r < TOKENS; r++) {
    parts[(group * TOKENS + r) * 128 + pair * 2] = sums[r][0];
    parts[(group * TOKENS + r) * 128 + pair * 2 + 1] = sums[r][1];
  }
  __syncthreads();
  int width = latent + rope;
  for (int i = threadIdx.x; i < n * 128; i += blockDim.x) {
    int r = i >> 7, c = i & 127;
    float sum = 0;
    for (int p = 0; p < 4; p++) sum += parts[(p * TOKENS + r) * 128 + c];
    out[((size_t)(token + r) * heads + head) * width + blockIdx.x * 128 + c] = __float2bfloat16_rn(sum);
  }
  if (!append.kv && blockIdx.x == 0) turn();
}
#define ABSORB(name, TOKENS)                                                                                           \
  extern "C" __global__ void __launch_bounds__(256) name(const __nv_bfloat16* kv_b, float* q, __nv_bfloat16* out, int first, int rows, int nope, int rope, \
                                                         int values, int latent, Step step, const float* kv, const float* weight, float eps, \
                                                         const float* frequencies, float magnitude, uint8_t* layer, int row_bytes) { \
    Append append = {kv, weight, eps, frequencies, magnitude, layer, row_bytes};                                       \
    absorb<TOKENS>(kv_b, q, out, first, rows, nope, rope, values, latent, step, append);                               \
  }
ABSORB(absorb_1, 1)
ABSORB(absorb_8, 8)

// One block of 64 cached rows for 16 heads of one row of the step: largest score, sum of the softmax's weights and the
// weighted sum of the latent rows. blockIdx = (block of the cache, heads / 16, row); 8 warps.
extern "C" __global__ void __launch_bounds__(256) attend_block(const __nv_bfloat16* queries, Step step, const uint8_t* layer, int first, int latent, int rope,
                                                               int row_bytes, float softmax_scale, float* sums, float* largest_and_total) {
  extern __shared__ __align__(16) float room[];
  int width = latent + rope, stride = width + 8;
  __nv_bfloat16* rows = (__nv_bfloat16*)room;                    // [64][stride]
  __nv_bfloat16* own = rows + 64 * stride;                        // [16][stride]
  __nv_bfloat16* weights = own + 16 * stride;                     // [16][72]
  float* scores = (float*)(weights + 16 * 72);                    // [16][66]
  // The arrays of the step came before all kernels of the step.
  int t = blockIdx.z, block = blockIdx.x, position = step.positions[first + t];
  int n = min(64, position + 1 - block * 64);
  if (n <= 0) {
    begin();
    return;
  }
  int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, q4 = lane & 3, pieces = width / 8;
  const uint8_t* from = layer + (size_t)step.blocks[step.tables[first + t] + block] * 64 * row_bytes;
#if __CUDA_ARCH__ >= 900
  // Into the second cache only, where a row that is being written is seen as well.
  for (int i = threadIdx.x * 128; i < n * row_bytes; i += blockDim.x * 128) asm volatile("prefetch.global.L2 [%0];" ::"l"(from + i));
#endif
  begin();
  for (int r = warp; r < 64; r += WARPS)
    for (int c = lane; c < pieces; c += 32) {
      uint32_t to = (uint32_t)__cvta_generic_to_shared(rows + r * stride + c * 8);
      // What lies behind the sequence's end is zero: it is multiplied by zero.
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from + (size_t)r * row_bytes + c * 16), "r"(r < n ? 16 : 0));
    }
  const __nv_bfloat16* query = queries + ((size_t)t * gridDim.y * 16 + blockIdx.y * 16) * width;
  for (int r = warp; r < 16; r += WARPS)
    for (int c = lane; c < pieces; c += 32) {
      uint32_t to = (uint32_t)__cvta_generic_to_shared(own + r * stride + c * 8);
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(query + (size_t)r * width + c * 8));
    }
  asm volatile("cp.async.commit_group; cp.async.wait_group 0;");
  __syncthreads();
  // Four sums take turns, so that a product need not wait for the one before it.
  float turns[4][4] = {}, c[4];
  for (int from_k = 0; from_k < width; from_k += 64)
#pragma unroll
    for (int turn = 0; turn < 4; turn++) {
      int k = from_k + turn * 16;
      if (k >= width) break;
      const __nv_bfloat16 *a = own + g * stride + k + q4 * 2, *b = rows + (warp * 8 + g) * stride + k + q4 * 2;
      uint32_t f[4] = {*(const uint32_t*)a, *(const uint32_t*)(a + 8 * stride), *(const uint32_t*)(a + 8), *(const uint32_t*)(a + 8 * stride + 8)};
      mma(turns[turn], f, *(const uint32_t*)b, *(const uint32_t*)(b + 8));
    }
#pragma unroll
  for (int i = 0; i < 4; i++) c[i] = (turns[0][i] + turns[1][i]) + (turns[2][i] + turns[3][i]);
  for (int i = 0; i < 4; i++) {
    int p = warp * 8 + q4 * 2 + (i & 1);
    scores[(g + (i >> 1) * 8) * 66 + p] = p < n ? c[i] * softmax_scale : -INFINITY;
  }
  __syncthreads();
  size_t part = ((size_t)t * gridDim.x + block) * gridDim.y * 16 + blockIdx.y * 16;
  for (int h = warp * 2; h < warp * 2 + 2; h++) {
    float a = scores[h * 66 + lane], b = scores[h * 66 + lane + 32], most = fmaxf(a, b);
    for (int o = 16; o; o >>= 1) most = fmaxf(most, __shfl_xor_sync(~0u, most, o));
    __nv_bfloat16 wa = __float2bfloat16_rn(expf(a - most)), wb = __float2bfloat16_rn(expf(b - most));
    weights[h * 72 + lane] = wa;
    weights[h * 72 + lane + 32] = wb;
    float total = warp_sum(__bfloat162float(wa) + __bfloat162float(wb));
    if (lane == 0) {
      largest_and_total[(part + h) * 2] = most;
      largest_and_total[(part + h) * 2 + 1] = total;
    }
  }
  __syncthreads();
  uint32_t f[4][4];
  for (int k = 0; k < 4; k++) {
    const __nv_bfloat16* a = weights + g * 72 + k * 16 + q4 * 2;
    f[k][0] = *(const uint32_t*)a;
    f[k][1] = *(const uint32_t*)(a + 8 * 72);
    f[k][2] = *(const uint32_t*)(a + 8);
    f[k][3] = *(const uint32_t*)(a + 8 * 72 + 8);
  }
  for (int column = warp * 8; column < latent; column += WARPS * 8) {
    float o[4] = {};
#pragma unroll
    for (int h = 0; h < 2; h++) {
      uint32_t at = (uint32_t)__cvta_generic_to_shared(rows + (h * 32 + lane) * stride + column), b[4];
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(at));
      mma(o, f[h * 2], b[0], b[1]);
      mma(o, f[h * 2 + 1], b[2], b[3]);
    }
    float* out = sums + (part + g) * latent + column + q4 * 2;
    *(float2*)out = make_float2(o[0], o[1]);
    *(float2*)(out + 8 * (size_t)latent) = make_float2(o[2], o[3]);
  }
}

// The mean over all blocks of the cache, in order, and o = W_UV mean, for TOKENS rows. A row's mean is made by 256 / TOKENS
// threads, then each of 8 warps makes four values, PASSES times. blockIdx = (values / (32 PASSES), head, rows / TOKENS).
template <int TOKENS, int PASSES>
__device__ __forceinline__ void combine(const __nv_bfloat16* kv_b, const Step& step, const float* sums, const float* largest_and_total, float* out,
                                        __nv_bfloat16* rounded, int first, int rows, int blocks_max, int nope, int values, int latent) {
  extern __shared__ __align__(16) float room[];
  constexpr int TOGETHER = 256, THREADS = 256 / TOKENS, WIDE = TOKENS == 1 ? 2 : 4, UNITS = TOKENS == 1 ? 1 : 4;
  // Pairs of columns of each value that a lane brings before the kernels in front are done.
  constexpr int KEPT = 8;
  __shared__ float shares[TOKENS][TOGETHER], totals[TOKENS][TOGETHER], largest[WARPS];
  int head = blockIdx.y, heads = gridDim.y, warp = threadIdx.x >> 5, lane = threadIdx.x & 31, n = min(TOKENS, rows - (int)blockIdx.z * TOKENS);
  const __nv_bfloat162* w[4];
  __nv_bfloat162 kept[4][KEPT];
  auto bring = [&](int pass) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      int v = min((blockIdx.x * PASSES + pass) * 32 + warp * 4 + j, values - 1);
      w[j] = (const __nv_bfloat162*)(kv_b + ((size_t)head * (nope + values) + nope + v) * latent);
#pragma unroll
      for (int i = 0; i < KEPT; i++) kept[j][i] = w[j][min(lane + i * 32, latent / 2 - 1)];
    }
  };
  bring(0);
  begin();
  int own = threadIdx.x / THREADS, me = threadIdx.x % THREADS, t = blockIdx.z * TOKENS + own;
  auto wait = [] {
    if constexpr (TOKENS == 1)
      __syncthreads();
    else
      __syncwarp();
  };
  float* mean = room + own * latent;
  if (own >= n) {
    for (int i = me; i < latent; i += THREADS) mean[i] = 0;
  } else {
    int blocks = (step.positions[first + t] >> 6) + 1;
    size_t part = (size_t)t * blocks_max * heads + head;
    float most = -INFINITY, total = 0;
    for (int b = me; b < blocks; b += THREADS) most = fmaxf(most, largest_and_total[(part + (size_t)b * heads) * 2]);
    for (int o = 16; o; o >>= 1) most = fmaxf(most, __shfl_xor_sync(~0u, most, o));
    if constexpr (TOKENS == 1) {
      if (lane == 0) largest[warp] = most;
      __syncthreads();
      for (int i = 0; i < WARPS; i++) most = fmaxf(most, largest[i]);
    }
    for (int from = 0; from < blocks; from += TOGETHER) {
      int some = min(TOGETHER, blocks - from);
      wait();
      for (int b = me; b < some; b += THREADS) {
        float2 v = ((const float2*)largest_and_total)[part + (size_t)(from + b) * heads];
        shares[own][b] = expf(v.x - most);
        totals[own][b] = v.y;
      }
      wait();
#pragma unroll 8
      for (int b = 0; b < some; b++) total = fmaf(shares[own][b], totals[own][b], total);
      for (int at = me * WIDE; at < latent; at += THREADS * WIDE * UNITS) {
        float acc[UNITS][WIDE];
#pragma unroll
        for (int u = 0; u < UNITS; u++)
#pragma unroll
          for (int i = 0; i < WIDE; i++) acc[u][i] = from && at + u * THREADS * WIDE < latent ? mean[at + u * THREADS * WIDE + i] : 0.0f;
        const float* p = sums + (part + (size_t)from * heads) * latent + at;
#pragma unroll 8 / UNITS
        for (int b = 0; b < some; b++) {
          float share = shares[own][b];
#pragma unroll
          for (int u = 0; u < UNITS; u++) {
            const float* q = p + (size_t)b * heads * latent + u * THREADS * WIDE;
            float v[WIDE] = {};
            if (at + u * THREADS * WIDE < latent) {
              if constexpr (WIDE == 2)
                *(float2*)v = *(const float2*)q;
              else
                *(float4*)v = *(const float4*)q;
            }
#pragma unroll
            for (int i = 0; i < WIDE; i++) acc[u][i] = fmaf(share, v[i], acc[u][i]);
          }
        }
#pragma unroll
        for (int u = 0; u < UNITS; u++)
#pragma unroll
          for (int i = 0; i < WIDE; i++)
            if (at + u * THREADS * WIDE < latent) mean[at + u * THREADS * WIDE + i] = acc[u][i];
      }
    }
    // A thread divides the columns that it made.
    for (int at = me * WIDE; at < latent; at += THREADS * WIDE)
#pragma unroll
      for (int i = 0; i < WIDE; i++) mean[at + i] /= total;
  }
  __syncthreads();
#pragma unroll 1
  for (int pass = 0; pass < PASSES; pass++) {
    int v = (blockIdx.x * PASSES + pass) * 32 + warp * 4;
    if (v >= values) break;
    if (pass) bring(pass);
    float products[4][TOKENS] = {};
    auto add = [&](int i, const __nv_bfloat162* weights) {
      float2 a[4];
#pragma unroll
      for (int j = 0; j < 4; j++) a[j] = __bfloat1622float2(weights[j]);
#pragma unroll
      for (int r = 0; r < TOKENS; r++) {
        float2 m = ((const float2*)(room + r * latent))[i];
#pragma unroll
        for (int j = 0; j < 4; j++) products[j][r] = fmaf(a[j].y, m.y, fmaf(a[j].x, m.x, products[j][r]));
      }
    };
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
      __nv_bfloat162 weights[4] = {kept[0][i], kept[1][i], kept[2][i], kept[3][i]};
      if (lane + i * 32 < latent / 2) add(lane + i * 32, weights);
    }
    for (int i = lane + KEPT * 32; i < latent / 2; i += 32) {
      __nv_bfloat162 weights[4] = {w[0][i], w[1][i], w[2][i], w[3][i]};
      add(i, weights);
    }
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int r = 0; r < TOKENS; r++) {
        float sum = warp_sum(products[j][r]);
        size_t at = ((size_t)(first + blockIdx.z * TOKENS + r) * heads + head) * values + v + j;
        if (lane == 0 && r < n && v + j < values) {
          out[at] = sum;
          rounded[at] = __float2bfloat16_rn(sum);
        }
      }
  }
}
#define ATTEND_VALUES(name, TOKENS, PASSES) \
  extern "C" __global__ void __launch_bounds__(256) name(const __nv_bfloat16* kv_b, Step step, const float* sums, const float* largest_and_total, float* out, \
                                                         __nv_bfloat16* rounded, int first, int rows, int blocks_max, int nope, int values, int latent) { \
    combine<TOKENS, PASSES>(kv_b, step, sums, largest_and_total, out, rounded, first, rows, blocks_max, nope, values, latent); \
  }
ATTEND_VALUES(attend_values_1, 1, 1)
ATTEND_VALUES(attend_values_8, 8, 4)

// Random weights for benchmarks: `format` codes of about normal values times `deviation`.
extern "C" __global__ void fill_random(uint8_t* out, size_t n, int format, float deviation, uint32_t seed) {
  begin();
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
    uint64_t z = (i + 1) * 0x9e3779b97f4a7c15ull + seed * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    z ^= z >> 31;
    float sum = 0;
    for (int j = 0; j < 4; j++) sum += (float)(z >> 16 * j & 0xffff) / 65536.0f - 0.5f;
    float v = sum * 1.7320508f * deviation;
    if (format == F32) ((float*)out)[i] = v;
    if (format == BF16) ((__nv_bfloat16*)out)[i] = __float2bfloat16_rn(v);
    if (format == F8E4M3) out[i] = e4m3_code(v);
  }
}

// Router logits in F32: a block per expert and row of x, the same sums for any batch. `format` is F32 or BF16, and the
// columns are a multiple of four.
__device__ __forceinline__ void gate_logit(const Matrix* gate, const float* x, float* logits) {
  // Weights that a thread brings before the kernels in front are done.
  constexpr int KEPT = 4;
  __shared__ float sums[4];
  const Matrix m = *gate;
  int e = blockIdx.x, t = blockIdx.y, fours = m.cols / 4;
  const float4* row = (const float4*)(x + (size_t)t * m.cols);
  const uint8_t* w = m.data + (size_t)e * m.row_bytes;
  auto weights = [&](int i) {
    if (m.format == F32) return ((const float4*)w)[i];
    uint2 v = ((const uint2*)w)[i];
    return make_float4(bf16_bits(v.x & 0xffff), bf16_bits(v.x >> 16), bf16_bits(v.y & 0xffff), bf16_bits(v.y >> 16));
  };
  float sum = 0;
  auto add = [&](float4 a, float4 b) {
    sum = fmaf(a.x, b.x, sum);
    sum = fmaf(a.y, b.y, sum);
    sum = fmaf(a.z, b.z, sum);
    sum = fmaf(a.w, b.w, sum);
  };
  float4 kept[KEPT];
#pragma unroll
  for (int j = 0; j < KEPT; j++) kept[j] = weights(min((int)threadIdx.x + j * 128, fours - 1));
  begin_in_order();
#pragma unroll
  for (int j = 0; j < KEPT; j++) {
    int i = threadIdx.x + j * 128;
    if (i < fours) add(row[i], kept[j]);
  }
#pragma unroll 4
  for (int i = threadIdx.x + KEPT * 128; i < fours; i += 128) add(row[i], weights(i));
  sum = block_sum(sum, sums);
  if (threadIdx.x == 0) logits[(size_t)t * m.rows + e] = sum;
}
extern "C" __global__ void __launch_bounds__(128) gate_logits(const Matrix* gate, const float* x, float* logits) { gate_logit(gate, x, logits); }

// `gate_logits` and then `route`: the last block of a row chooses. `arrived` counts a row's blocks; it is zero before and
// after.
extern "C" __global__ void __launch_bounds__(128) gate_and_route(const Matrix* gate, const float* x, float* logits, unsigned* arrived, const float* bias,
                                                                 Router r, int* ids, float* weights, int* order, int* list, Tile* tiles) {
  extern __shared__ __align__(16) float room[];
  __shared__ bool last;
  int t = blockIdx.y;
  gate_logit(gate, x, logits);
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(&arrived[t], 1) + 1 == gridDim.x;
    __threadfence();
  }
  __syncthreads();
  if (!last || threadIdx.x >= 32) return;
  route_row(room, t, logits, bias, r, ids, weights, order, list, tiles);
  if (threadIdx.x == 0) arrived[t] = 0;
}
