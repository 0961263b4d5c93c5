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
PRODUCT(product_bf16_8, BF16, 1, 1)
PRODUCT(product_bf16_16, BF16, 1, 2)
PRODUCT(product_bf16_32, BF16, 2, 4)
PRODUCT(product_bf16_64, BF16, 2, 8)
PRODUCT(product_fp8_8, F8E4M3, 1, 1)
PRODUCT(product_fp8_16, F8E4M3, 1, 2)
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
// block with a thread per expert. tiles[0].first is the number of tiles, which begin at tiles[1].
extern "C" __global__ void moe_group(const int* ids, int choices, int experts, int width, int* list, Tile* tiles) {
  begin();
  extern __shared__ __align__(16) float room[];
  constexpr int TOGETHER = 4096;
  __shared__ short near[TOGETHER];
  int *starts = (int*)room, *first_tiles = starts + blockDim.x, e = threadIdx.x, n = 0;
  for (int from = 0; from < choices; from += TOGETHER) {
    int some = min(TOGETHER, choices - from);
    __syncthreads();
    for (int c = threadIdx.x; c < some; c += blockDim.x) near[c] = (short)ids[from + c];
    __syncthreads();
#pragma unroll 8
    for (int c = 0; c < some; c++) n += near[c] == e;
  }
  if (e >= experts) n = 0;
  int own_tiles = (n + width - 1) / width;
  starts[e] = n;
  first_tiles[e] = own_tiles;
  for (int step = 1; step < blockDim.x; step *= 2) {
    __syncthreads();
    int a = e >= step ? starts[e - step] : 0, b = e >= step ? first_tiles[e - step] : 0;
    __syncthreads();
    starts[e] += a;
    first_tiles[e] += b;
  }
  __syncthreads();
  if (e == blockDim.x - 1) tiles[0].first = first_tiles[e];
  int at = starts[e] - n, tile = first_tiles[e] - own_tiles;
  for (int i = 0; i < own_tiles; i++) tiles[1 + tile + i] = {e, at + i * width, min(width, n - i * width), 0};
  for (int from = 0; from < choices; from += TOGETHER) {
    int some = min(TOGETHER, choices - from);
    __syncthreads();
    if (choices > TOGETHER)
      for (int c = threadIdx.x; c < some; c += blockDim.x) near[c] = (short)ids[from + c];
    __syncthreads();
#pragma unroll 8
    for (int c = 0; c < some; c++)
      if (near[c] == e && e < experts) list[at++] = from + c;
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
EXPERTS(bf16_8, BF16, 1)
EXPERTS(bf16_32, BF16, 4)
EXPERTS(fp8_8, F8E4M3, 1)
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

// q~ = [W_UK^T q_nope, q_rope] in BF16. A block has 128 latent columns of one head and up to TOKENS rows; four groups of
// 64 threads divide the nope dimensions. blockIdx = (latent / 128, head, rows / TOKENS).
template <int TOKENS>
__device__ __forceinline__ void absorb(const __nv_bfloat16* kv_b, const float* q, __nv_bfloat16* out, int first, int rows, int nope, int rope, int values,
                                       int latent) {
  extern __shared__ __align__(16) float room[];
  float *queries = room, *parts = room + TOKENS * nope;
  int head = blockIdx.y, heads = gridDim.y, token = blockIdx.z * TOKENS, n = min(TOKENS, rows - token);
  for (int i = threadIdx.x; i < n * nope; i += blockDim.x)
    queries[i] = q[((size_t)(first + token + i / nope) * heads + head) * (nope + rope) + i % nope];
  __syncthreads();
  int pair = threadIdx.x & 63, group = threadIdx.x >> 6, column = blockIdx.x * 128 + pair * 2;
  float sums[TOKENS][2] = {};
  int from = nope * group / 4, to = nope * (group + 1) / 4;
  const __nv_bfloat16* w = kv_b + (size_t)head * (nope + values) * latent + column;
#pragma unroll 16
  for (int d = from; d < to; d++) {
    float2 v = __bfloat1622float2(*(const __nv_bfloat162*)(w + (size_t)d * latent));
#pragma unroll
    for (int r = 0; r < TOKENS; r++) {
      float a = r < n ? queries[r * nope + d] : 0.0f;
      sums[r][0] = fmaf(a, v.x, sums[r][0]);
      sums[r][1] = fmaf(a, v.y, sums[r][1]);
    }
  }
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
  if (blockIdx.x == 0)
    for (int i = threadIdx.x; i < n * rope; i += blockDim.x) {
      int r = i / rope, c = i % rope;
      float v = q[((size_t)(first + token + r) * heads + head) * (nope + rope) + nope + c];
      out[((size_t)(token + r) * heads + head) * width + latent + c] = __float2bfloat16_rn(v);
    }
}
extern "C" __global__ void __launch_bounds__(256) absorb_1(const __nv_bfloat16* kv_b, const float* q, __nv_bfloat16* out, int first, int rows, int nope,
                                                           int rope, int values, int latent) {
  begin();
  absorb<1>(kv_b, q, out, first, rows, nope, rope, values, latent);
}
extern "C" __global__ void __launch_bounds__(256) absorb_8(const __nv_bfloat16* kv_b, const float* q, __nv_bfloat16* out, int first, int rows, int nope,
                                                           int rope, int values, int latent) {
  begin();
  absorb<8>(kv_b, q, out, first, rows, nope, rope, values, latent);
}

// One block of 64 cached rows for 16 heads of one row of the step: largest score, sum of the softmax's weights and the
// weighted sum of the latent rows. blockIdx = (block of the cache, heads / 16, row); 8 warps.
extern "C" __global__ void __launch_bounds__(256) attend_block(const __nv_bfloat16* queries, Step step, const uint8_t* layer, int first, int latent, int rope,
                                                               int row_bytes, float softmax_scale, float* sums, float* largest_and_total) {
  begin();
  extern __shared__ __align__(16) float room[];
  int width = latent + rope, stride = width + 8;
  __nv_bfloat16* rows = (__nv_bfloat16*)room;                    // [64][stride]
  __nv_bfloat16* own = rows + 64 * stride;                        // [16][stride]
  __nv_bfloat16* weights = own + 16 * stride;                     // [16][72]
  float* scores = (float*)(weights + 16 * 72);                    // [16][66]
  int t = blockIdx.z, block = blockIdx.x, position = step.positions[first + t];
  int n = min(64, position + 1 - block * 64);
  if (n <= 0) return;
  int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, q4 = lane & 3, pieces = width / 8;
  const uint8_t* from = layer + (size_t)step.blocks[step.tables[first + t] + block] * 64 * row_bytes;
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
  float c[4] = {};
#pragma unroll 4
  for (int k = 0; k < width; k += 16) {
    const __nv_bfloat16 *a = own + g * stride + k + q4 * 2, *b = rows + (warp * 8 + g) * stride + k + q4 * 2;
    uint32_t f[4] = {*(const uint32_t*)a, *(const uint32_t*)(a + 8 * stride), *(const uint32_t*)(a + 8), *(const uint32_t*)(a + 8 * stride + 8)};
    mma(c, f, *(const uint32_t*)b, *(const uint32_t*)(b + 8));
  }
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

// The mean over all blocks of the cache, in order, and o = W_UV mean, for TOKENS rows. blockIdx = (values / 32, head,
// rows / TOKENS); 8 warps with four values each.
template <int TOKENS>
__device__ __forceinline__ void combine(const __nv_bfloat16* kv_b, const Step& step, const float* sums, const float* largest_and_total, float* out,
                                        __nv_bfloat16* rounded, int first, int rows, int blocks_max, int nope, int values, int latent) {
  extern __shared__ __align__(16) float room[];
  constexpr int TOGETHER = 256;
  __shared__ float shares[TOGETHER], totals[TOGETHER], largest[WARPS];
  int head = blockIdx.y, heads = gridDim.y, warp = threadIdx.x >> 5, lane = threadIdx.x & 31, n = min(TOKENS, rows - (int)blockIdx.z * TOKENS);
  for (int r = 0; r < TOKENS; r++) {
    float* mean = room + r * latent;
    if (r >= n) {
      for (int i = threadIdx.x; i < latent; i += blockDim.x) mean[i] = 0;
      continue;
    }
    int t = blockIdx.z * TOKENS + r, blocks = (step.positions[first + t] >> 6) + 1;
    size_t part = (size_t)t * blocks_max * heads + head;
    float most = -INFINITY, total = 0;
    for (int b = threadIdx.x; b < blocks; b += blockDim.x) most = fmaxf(most, largest_and_total[(part + (size_t)b * heads) * 2]);
    for (int o = 16; o; o >>= 1) most = fmaxf(most, __shfl_xor_sync(~0u, most, o));
    __syncthreads();
    if (lane == 0) largest[warp] = most;
    __syncthreads();
    for (int w = 0; w < WARPS; w++) most = fmaxf(most, largest[w]);
    for (int i = threadIdx.x; i < latent; i += blockDim.x) mean[i] = 0;
    for (int from = 0; from < blocks; from += TOGETHER) {
      int some = min(TOGETHER, blocks - from);
      __syncthreads();
      if (threadIdx.x < some) {
        float2 v = ((const float2*)largest_and_total)[part + (size_t)(from + threadIdx.x) * heads];
        shares[threadIdx.x] = expf(v.x - most);
        totals[threadIdx.x] = v.y;
      }
      __syncthreads();
      for (int b = 0; b < some; b++) total = fmaf(shares[b], totals[b], total);
      const float* from_sums = sums + (part + (size_t)from * heads) * latent;
      for (int i = threadIdx.x; i < latent; i += blockDim.x) {
        float sum = mean[i];
#pragma unroll 8
        for (int b = 0; b < some; b++) sum = fmaf(shares[b], from_sums[(size_t)b * heads * latent + i], sum);
        mean[i] = sum;
      }
    }
    for (int i = threadIdx.x; i < latent; i += blockDim.x) mean[i] /= total;
  }
  __syncthreads();
  for (int j = 0; j < 4; j++) {
    int v = blockIdx.x * 32 + warp * 4 + j;
    if (v >= values) break;
    const __nv_bfloat162* w = (const __nv_bfloat162*)(kv_b + ((size_t)head * (nope + values) + nope + v) * latent);
    float products[TOKENS] = {};
#pragma unroll 4
    for (int i = lane; i < latent / 2; i += 32) {
      float2 a = __bfloat1622float2(w[i]);
#pragma unroll
      for (int r = 0; r < TOKENS; r++) {
        float2 m = ((const float2*)(room + r * latent))[i];
        products[r] = fmaf(a.y, m.y, fmaf(a.x, m.x, products[r]));
      }
    }
#pragma unroll
    for (int r = 0; r < TOKENS; r++) {
      float sum = warp_sum(products[r]);
      size_t at = ((size_t)(first + blockIdx.z * TOKENS + r) * heads + head) * values + v;
      if (lane == 0 && r < n) {
        out[at] = sum;
        rounded[at] = __float2bfloat16_rn(sum);
      }
    }
  }
}
#define ATTEND_VALUES(name, TOKENS) \
  extern "C" __global__ void __launch_bounds__(256) name(const __nv_bfloat16* kv_b, Step step, const float* sums, const float* largest_and_total, float* out, \
                                                         __nv_bfloat16* rounded, int first, int rows, int blocks_max, int nope, int values, int latent) { \
    begin(); \
    combine<TOKENS>(kv_b, step, sums, largest_and_total, out, rounded, first, rows, blocks_max, nope, values, latent); \
  }
ATTEND_VALUES(attend_values_1, 1)
ATTEND_VALUES(attend_values_8, 8)

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
extern "C" __global__ void __launch_bounds__(128) gate_logits(const Matrix* gate, const float* x, float* logits) {
  begin();
  __shared__ float sums[4];
  const Matrix m = *gate;
  int e = blockIdx.x, t = blockIdx.y;
  const float4* row = (const float4*)(x + (size_t)t * m.cols);
  const uint8_t* w = m.data + (size_t)e * m.row_bytes;
  float sum = 0;
#pragma unroll 4
  for (int i = threadIdx.x; i < m.cols / 4; i += 128) {
    float4 a = row[i], b;
    if (m.format == F32) {
      b = ((const float4*)w)[i];
    } else {
      uint2 v = ((const uint2*)w)[i];
      b = make_float4(bf16_bits(v.x & 0xffff), bf16_bits(v.x >> 16), bf16_bits(v.y & 0xffff), bf16_bits(v.y >> 16));
    }
    sum = fmaf(a.x, b.x, sum);
    sum = fmaf(a.y, b.y, sum);
    sum = fmaf(a.z, b.z, sum);
    sum = fmaf(a.w, b.w, sum);
  }
  sum = block_sum(sum, sums);
  if (threadIdx.x == 0) logits[(size_t)t * m.rows + e] = sum;
}
