// Attention on the tensor cores, over the paged cache of latent rows in BF16, in the absorbed form for every row. The paper's
// W_UK and W_UV are kept apart, the first one transposed, so that both multiply rows that lie in one piece.
//
// A row's softmax is cut into blocks of 64 cached rows. A block's weights are powers of two: 2^(s log2(e) - e), where e is the
// least integer above its largest score. So blocks are put together with factors that are powers of two, which round
// nothing: one after the other (`attend_rows`, for prompts) or each by itself and then all in order (`attend_block` and
// `attend_values`, for few rows) gives the same bits.
#pragma once
#include "gemm.cu"

constexpr float LOG2_E = 1.44269504f;
// Of no block.
constexpr int EXPONENT_MIN = -(1 << 30);

__device__ __forceinline__ int exponent_of(float largest) { return max(-(1 << 28), min(1 << 28, __float2int_ru(largest))); }
// 2^n for n <= 0; what is too small to be normal is nothing.
__device__ __forceinline__ float power_of_two(int n) { return n < -126 ? 0.0f : __int_as_float((127 + n) << 23); }

// W_UK^T `[heads, latent, padded]`, whose columns behind `nope` stay zero, and W_UV `[heads, values, latent]`; a block per
// row of kv_b.
extern "C" __global__ void split_kv_b(const Matrix* kv_b, __nv_bfloat16* keys, __nv_bfloat16* of_values, int nope, int values, int padded) {
  begin();
  const Matrix m = *kv_b;
  int head = blockIdx.x / (nope + values), d = blockIdx.x % (nope + values);
  const uint8_t* p = m.data + (size_t)blockIdx.x * m.row_bytes;
  for (int c = threadIdx.x; c < m.cols; c += blockDim.x) {
    __nv_bfloat16 v = __float2bfloat16_rn(any_value(m, p, blockIdx.x, c));
    if (d < nope)
      keys[((size_t)head * m.cols + c) * padded + d] = v;
    else
      of_values[((size_t)head * values + d - nope) * m.cols + c] = v;
  }
}

// Products of 16 columns of 16 rows of weights, brought from memory, by eight tokens. Lane t has columns 4t to 4t + 3.
struct Sixteen {
  uint2 low, high;
  __device__ __forceinline__ void load(const __nv_bfloat16* w, int stride, int k) {
    int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
    low = *(const uint2*)(w + (size_t)g * stride + k + t * 4);
    high = *(const uint2*)(w + (size_t)(g + 8) * stride + k + t * 4);
  }
  __device__ __forceinline__ void multiply(float* sums, uint2 x) const {
    uint32_t a[4] = {low.x, high.x, low.y, high.y};
    mma(sums, a, x.x, x.y);
  }
};
__device__ __forceinline__ uint2 rounded_four(float4 v) {
  __nv_bfloat162 pair[2] = {__floats2bfloat162_rn(v.x, v.y), __floats2bfloat162_rn(v.z, v.w)};
  return *(const uint2*)pair;
}

// q~ = [W_UK^T q_nope, q_rope] in BF16 for few rows. A block has 128 latent columns of one head and eight rows, a warp 16
// columns. blockIdx = (latent / 128, head, rows / 8).
// With rows in `kv` the blocks behind the latent columns rotate the rope part of q on the way, in place, and append the
// latents of the rows to the cache.
extern "C" __global__ void __launch_bounds__(256) absorb(const __nv_bfloat16* keys, float* q, __nv_bfloat16* out, int first, int rows, int nope, int padded, int rope,
                                                         int latent, Step step, const float* kv, const float* weight, float eps, const float* frequencies,
                                                         float magnitude, uint8_t* layer, int row_bytes) {
  constexpr int SIXTEENS_MAX = RUN / 16;
  int head = blockIdx.y, heads = gridDim.y, token = blockIdx.z * 8, n = min(8, rows - token), width = latent + rope;
  int warp = threadIdx.x >> 5, g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
  auto turn = [&] {
    for (int i = threadIdx.x; i < n * rope / 2; i += blockDim.x) {
      int r = i / (rope / 2), c = i % (rope / 2);
      float2* at = (float2*)(q + ((size_t)(first + token + r) * heads + head) * (nope + rope) + nope) + c;
      float pair[2] = {at->x, at->y};
      if (kv) {
        rotate(pair, (float)step.positions[first + token + r], frequencies[c], magnitude);
        *at = make_float2(pair[0], pair[1]);
      }
      __nv_bfloat162* to_pair = (__nv_bfloat162*)(out + ((size_t)(token + r) * heads + head) * width + latent) + c;
      *to_pair = __floats2bfloat162_rn(pair[0], pair[1]);
    }
  };
  if (blockIdx.x * 128 >= latent) {
    begin();
    turn();
    if (head < n) append_row(kv, weight, eps, step, frequencies, magnitude, layer, CACHE_BF16, latent, rope, row_bytes, token + head);
    return;
  }
  int column = blockIdx.x * 128 + warp * 16;
  Sixteen w[SIXTEENS_MAX];
#pragma unroll
  for (int s = 0; s < SIXTEENS_MAX; s++)
    if (s * 16 < padded) w[s].load(keys + ((size_t)head * latent + column) * padded, padded, s * 16);
  begin();
  const float* x = q + ((size_t)(first + token + min(g, n - 1)) * heads + head) * (nope + rope) + t * 4;
  float4 v[SIXTEENS_MAX];
#pragma unroll
  for (int s = 0; s < SIXTEENS_MAX; s++) v[s] = s * 16 < nope ? *(const float4*)(x + s * 16) : make_float4(0, 0, 0, 0);
  float sums[4] = {};
#pragma unroll
  for (int s = 0; s < SIXTEENS_MAX; s++)
    if (s * 16 < padded) w[s].multiply(sums, rounded_four(v[s]));
#pragma unroll
  for (int c = 0; c < 4; c++) {
    int r = t * 2 + (c & 1);
    if (r < n) out[((size_t)(token + r) * heads + head) * width + column + g + (c >> 1) * 8] = __float2bfloat16_rn(0.0f + sums[c]);
  }
  if (!kv && blockIdx.x == 0) turn();
}

// For many rows: q in BF16, the nope parts apart, `[rows, heads, padded]`, and the rope parts where `absorb` puts them; a
// block per row.
extern "C" __global__ void round_queries(const float* q, __nv_bfloat16* of_nope, __nv_bfloat16* out, int first, int heads, int nope, int padded, int rope, int latent) {
  begin();
  const float* own = q + (size_t)(first + blockIdx.x) * heads * (nope + rope);
  for (int i = threadIdx.x; i < heads * padded / 4; i += blockDim.x) {
    int head = i / (padded / 4), c = i % (padded / 4) * 4;
    float4 v = c < nope ? *(const float4*)(own + (size_t)head * (nope + rope) + c) : make_float4(0, 0, 0, 0);
    *(uint2*)(of_nope + ((size_t)blockIdx.x * heads + head) * padded + c) = rounded_four(v);
  }
  for (int i = threadIdx.x; i < heads * rope / 4; i += blockDim.x) {
    int head = i / (rope / 4), c = i % (rope / 4) * 4;
    float4 v = *(const float4*)(own + (size_t)head * (nope + rope) + nope + c);
    *(uint2*)(out + ((size_t)blockIdx.x * heads + head) * (latent + rope) + latent + c) = rounded_four(v);
  }
}

// A product per head: x `[count, heads, cols]` times `[heads, rows, cols]`.
template <class O>
struct Heads {
  using Out = O;
  static constexpr int STEP = 16, OFFSET = 8;
  const __nv_bfloat16 *weights, *x;
  O* out;
  __nv_bfloat16* rounded;
  int heads, rows, cols, out_stride, count, width;

  __device__ __forceinline__ int blocks() const { return (rows + GEMM_ROWS - 1) / GEMM_ROWS; }
  __device__ __forceinline__ Source source(int group) const { return Source(weights + (size_t)(group % heads) * rows * cols, rows, cols); }
  __device__ __forceinline__ Tokens<O> tokens(int group) const {
    int head = group % heads, from = group / heads * width;
    return {x + (size_t)head * cols, out + (size_t)head * out_stride, nullptr, heads * cols, heads * out_stride, 1, from, min(width, count - from)};
  }
  __device__ __forceinline__ void put(O* to, float y) const {
    if constexpr (sizeof(O) == 2) {
      *to = __float2bfloat16_rn(y);
    } else {
      *to = y;
      rounded[to - out] = __float2bfloat16_rn(y);
    }
  }
};
template <class O>
__device__ __forceinline__ int gemm_jobs(const Heads<O>& w) {
  return (w.count + w.width - 1) / w.width * w.heads * w.blocks();
}
template <class O>
__device__ __forceinline__ void gemm_job(const Heads<O>& w, int i, int& group, int& block) {
  block = i % w.blocks();
  group = i / w.blocks();
}
// `absorb` and the second half of `attend_values` for many rows.
extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 1) absorb_rows(const __nv_bfloat16* keys, const __nv_bfloat16* of_nope, __nv_bfloat16* out, int count, int heads,
                                                                          int padded, int rope, int latent) {
  begin();
  gemm<BF16, WIDE_BF16>(Heads<__nv_bfloat16>{keys, of_nope, out, nullptr, heads, latent, padded, latent + rope, count, WIDE_BF16});
}
extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 1) values_rows(const __nv_bfloat16* of_values, const __nv_bfloat16* mean, float* out, __nv_bfloat16* rounded,
                                                                          int first, int count, int heads, int values, int latent) {
  begin();
  size_t at = (size_t)first * heads * values;
  gemm<BF16, WIDE_BF16>(Heads<float>{of_values, mean, out + at, rounded + at, heads, values, latent, values, count, WIDE_BF16});
}

// Four matrices of 8 rows by 16 bytes, whose rows lanes 8i to 8i + 7 name.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at));
}

// One block of 64 cached rows for 16 heads of one row of the step: exponent, sum of the softmax's weights and the weighted
// sum of the latent rows. blockIdx = (block of the cache, heads / 16, row); 8 warps.
// At most the last `fresh` rows of a sequence are appended in this step.
extern "C" __global__ void __launch_bounds__(256) attend_block(const __nv_bfloat16* queries, Step step, const uint8_t* layer, int first, int latent, int rope,
                                                               int row_bytes, int fresh, float softmax_scale, float* sums, float2* exponents_and_totals) {
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
  auto bring = [&](int begin, int end) {
    for (int r = begin + warp; r < end; r += WARPS)
      for (int c = lane; c < pieces; c += 32) {
        // What lies behind the sequence's end is zero: it is multiplied by zero.
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(rows + r * stride + c * 8)), "l"(from + (size_t)r * row_bytes + c * 16),
                     "r"(r < n ? 16 : 0)
                     : "memory");
      }
  };
  int old = max(0, min(64, position + 1 - fresh - block * 64));
  bring(0, old);
  begin();
  bring(old, 64);
  const __nv_bfloat16* query = queries + ((size_t)t * gridDim.y * 16 + blockIdx.y * 16) * width;
  for (int r = warp; r < 16; r += WARPS)
    for (int c = lane; c < pieces; c += 32) {
      uint32_t to = (uint32_t)__cvta_generic_to_shared(own + r * stride + c * 8);
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(query + (size_t)r * width + c * 8));
    }
  asm volatile("cp.async.commit_group; cp.async.wait_group 0;");
  __syncthreads();
  // Two sums take turns, so that a product need not wait for the one before it.
  float turns[2][4] = {}, c[4];
  uint32_t a_at = shared_address(own + (lane & 15) * stride + (lane >> 4) * 8), b_at = shared_address(rows + (warp * 8 + (lane & 7)) * stride + (lane >> 3) * 8);
#pragma unroll 3
  for (int k = 0; k < width; k += 32) {
    uint32_t b[4];
    load_matrices(b, b_at + k * 2);
#pragma unroll
    for (int turn = 0; turn < 2; turn++) {
      if (k + turn * 16 >= width) break;
      uint32_t f[4];
      load_matrices(f, a_at + (k + turn * 16) * 2);
      mma(turns[turn], f, b[turn * 2], b[turn * 2 + 1]);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; i++) c[i] = turns[0][i] + turns[1][i];
  for (int i = 0; i < 4; i++) {
    int p = warp * 8 + q4 * 2 + (i & 1);
    scores[(g + (i >> 1) * 8) * 66 + p] = p < n ? __fmul_rn(c[i], softmax_scale * LOG2_E) : -INFINITY;
  }
  __syncthreads();
  size_t part = ((size_t)t * gridDim.x + block) * gridDim.y * 16 + blockIdx.y * 16;
  for (int h = warp * 2; h < warp * 2 + 2; h++) {
    float2 s = *(const float2*)(scores + h * 66 + lane * 2);
    float most = fmaxf(s.x, s.y);
    for (int o = 16; o; o >>= 1) most = fmaxf(most, __shfl_xor_sync(~0u, most, o));
    int exponent = exponent_of(most);
    __nv_bfloat162 w = __floats2bfloat162_rn(exp2f(s.x - exponent), exp2f(s.y - exponent));
    *(__nv_bfloat162*)(weights + h * 72 + lane * 2) = w;
    float total = __bfloat162float(w.x) + __bfloat162float(w.y);
    // In the order of `attend_rows`, where a lane has two columns of each eight.
    for (int o = 4; o < 32; o *= 2) total += __shfl_xor_sync(~0u, total, o);
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    if (lane == 0) exponents_and_totals[part + h] = make_float2(__int_as_float(exponent), total);
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
#pragma unroll 4
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

// The mean over all blocks of the cache, in order, and o = W_UV mean, for up to TOKENS rows. A row's mean is made by 256 /
// TOKENS threads; then each warp makes products of 16 values and of a run of 128 columns, a run being a part.
// blockIdx = (values / VALUES, head, rows / TOKENS).
template <int TOKENS, int VALUES>
__device__ __forceinline__ void combine(const __nv_bfloat16* of_values, const Step& step, const float* sums, const float2* exponents_and_totals, float* out,
                                        __nv_bfloat16* rounded, int first, int rows, int blocks_max, int values, int latent) {
  extern __shared__ __align__(16) float room[];
  constexpr int TOGETHER = 256, THREADS = 256 / TOKENS, WIDE = TOKENS == 1 ? 2 : 4, UNITS = TOKENS == 1 ? 1 : 4;
  __shared__ float shares[TOKENS][TOGETHER], totals[TOKENS][TOGETHER];
  __shared__ int largest[WARPS];
  int head = blockIdx.y, heads = gridDim.y, warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, q4 = lane & 3;
  int n = min(TOKENS, rows - (int)blockIdx.z * TOKENS), runs = latent / RUN, stride = latent + 8;
  // Means in F32, the same in BF16 for eight rows, and the sums of the runs of 16 values for eight rows.
  __nv_bfloat16* means = (__nv_bfloat16*)(room + TOKENS * latent);
  float* parts = (float*)(means + 8 * stride);
  Sixteen w[RUN / 16];
  auto bring = [&](int unit) {
    int value = blockIdx.x * VALUES + unit / runs * 16;
#pragma unroll
    for (int s = 0; s < RUN / 16; s++) {
      int k = unit % runs * RUN + s * 16, low = min(value + g, values - 1), high = min(value + g + 8, values - 1);
      const __nv_bfloat16* p = of_values + (size_t)head * values * latent + k + q4 * 4;
      w[s] = {*(const uint2*)(p + (size_t)low * latent), *(const uint2*)(p + (size_t)high * latent)};
    }
  };
  bring(warp);
  begin();
  int own = threadIdx.x / THREADS, me = threadIdx.x % THREADS, t = blockIdx.z * TOKENS + own;
  auto wait = [] {
    if constexpr (TOKENS == 1)
      __syncthreads();
    else
      __syncwarp();
  };
  float* mean = room + own * latent;
  if (TOKENS == 1)
    for (int i = threadIdx.x; i < 8 * stride; i += 256) means[i] = __float2bfloat16_rn(0.0f);
  if (own >= n) {
    for (int i = me; i < latent; i += THREADS) means[own * stride + i] = __float2bfloat16_rn(0.0f);
  } else {
    int blocks = (step.positions[first + t] >> 6) + 1;
    size_t part = (size_t)t * blocks_max * heads + head;
    int most = EXPONENT_MIN;
    float total = 0;
    for (int b = me; b < blocks; b += THREADS) most = max(most, __float_as_int(exponents_and_totals[part + (size_t)b * heads].x));
    for (int o = 16; o; o >>= 1) most = max(most, __shfl_xor_sync(~0u, most, o));
    if constexpr (TOKENS == 1) {
      if (lane == 0) largest[warp] = most;
      __syncthreads();
      for (int i = 0; i < WARPS; i++) most = max(most, largest[i]);
    }
    for (int from = 0; from < blocks; from += TOGETHER) {
      int some = min(TOGETHER, blocks - from);
      wait();
      for (int b = me; b < some; b += THREADS) {
        float2 v = exponents_and_totals[part + (size_t)(from + b) * heads];
        shares[own][b] = power_of_two(__float_as_int(v.x) - most);
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
      for (int i = 0; i < WIDE; i++) means[own * stride + at + i] = __float2bfloat16_rn(mean[at + i] / total);
  }
  __syncthreads();
#pragma unroll 1
  for (int unit = warp; unit < VALUES / 16 * runs; unit += WARPS) {
    if (unit != warp) bring(unit);
    float products[4] = {};
#pragma unroll
    for (int s = 0; s < RUN / 16; s++) w[s].multiply(products, *(const uint2*)(means + g * stride + unit % runs * RUN + s * 16 + q4 * 4));
#pragma unroll
    for (int c = 0; c < 4; c++) parts[unit * 128 + (g + (c >> 1) * 8) * 8 + q4 * 2 + (c & 1)] = products[c];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < VALUES * n; i += 256) {
    int v = i % VALUES, r = i / VALUES;
    if (blockIdx.x * VALUES + v >= values) continue;
    float sum = 0;
    for (int run = 0; run < runs; run++) sum += parts[((v >> 4) * runs + run) * 128 + (v & 15) * 8 + r];
    size_t at = ((size_t)(first + blockIdx.z * TOKENS + r) * heads + head) * values + blockIdx.x * VALUES + v;
    out[at] = sum;
    rounded[at] = __float2bfloat16_rn(sum);
  }
}
#define ATTEND_VALUES(name, TOKENS, VALUES)                                                                            \
  extern "C" __global__ void __launch_bounds__(256) name(const __nv_bfloat16* of_values, Step step, const float* sums, const float2* exponents_and_totals, \
                                                         float* out, __nv_bfloat16* rounded, int first, int rows, int blocks_max, int values, int latent) { \
    combine<TOKENS, VALUES>(of_values, step, sums, exponents_and_totals, out, rounded, first, rows, blocks_max, values, latent); \
  }
ATTEND_VALUES(attend_values_1, 1, 32)
ATTEND_VALUES(attend_values_8, 8, 128)

// `attend_block` and the means of `attend_values` for rows of prompts, one block of the cache after the other: four rows of
// the step, 16 heads. One warpgroup brings cached rows, two multiply: each makes all scores and half of the latent
// columns. Rows of DeepSeek's sizes only, and only on Hopper. blockIdx = (rows / 4, heads / 16), the last rows first, for
// they have most to read.
constexpr int LATENT = 512, WIDTH = 576, ROWS_TOGETHER = 4;
// 64 rows of 64 columns, their 16-byte chunks swapped by the row's last three bits.
constexpr int SQUARE = 64 * 128, SQUARES = WIDTH / 64;
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// Squares of 64 rows from memory; those from row `n` on are zero.
__device__ __forceinline__ void bring_squares(uint32_t to, const uint8_t* from, size_t stride, int n) {
  int chunk = threadIdx.x & 7;
#pragma unroll 1
  for (int r = threadIdx.x >> 3 & 15; r < 64; r += 16) {
    const uint8_t* p = from + r * stride + chunk * 16;
    uint32_t at = to + r * 128 + ((chunk ^ (r & 7)) << 4);
#pragma unroll
    for (int s = 0; s < SQUARES; s++)
      asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(at + s * SQUARE), "l"(p + s * 128), "r"(r < n ? 16 : 0) : "memory");
  }
}
// d = P V + (add ? d : 0) for 64 columns: 16 rows of V, whose columns follow each other.
__device__ __forceinline__ void wgmma_of_rows(float (&d)[8][4], const uint32_t* a, uint64_t b, int add) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NAMES32 "}, {%32,%33,%34,%35}, %36, p, 1, 1, 1;}"
               : SUMS32(0)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

// The rows of a tile that are of one sequence, and how many of its blocks they read.
struct Alike {
  int from, to, blocks;
  __device__ __forceinline__ Alike(const Step& step, int row, int from, int end) : from(from), to(from + 1), blocks(0) {
    int table = step.tables[row + from], last = step.positions[row + from];
    while (to < end && step.tables[row + to] == table) last = max(last, step.positions[row + to++]);
    blocks = (last >> 6) + 1;
  }
};

// What a warp knows of its row of the step: 16 heads, of which a lane has g and g + 8.
struct RowState {
  float means[4][8][4];
  float total[2];
  int exponent[2];
};

// Scores of a block to weights, and what is known so far made smaller to fit them; returns the new weights' factors.
__device__ __forceinline__ void take_block(RowState& state, const float (&even)[8][4], const float (&odd)[8][4], int n, float scale, uint32_t (&weights)[4][4],
                                           float (&share)[2], float (&shrink)[2]) {
  int t = threadIdx.x & 3;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float most = -INFINITY, s[8][2];
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int c = 0; c < 2; c++) {
        s[j][c] = j * 8 + t * 2 + c < n ? __fmul_rn(even[j][h * 2 + c] + odd[j][h * 2 + c], scale) : -INFINITY;
        most = fmaxf(most, s[j][c]);
      }
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
    int exponent = n > 0 ? exponent_of(most) : EXPONENT_MIN;
    float sums[8];
#pragma unroll
    for (int j = 0; j < 8; j++) {
      __nv_bfloat162 w = n > 0 ? __floats2bfloat162_rn(exp2f(s[j][0] - exponent), exp2f(s[j][1] - exponent)) : __floats2bfloat162_rn(0, 0);
      sums[j] = __bfloat162float(w.x) + __bfloat162float(w.y);
      weights[j >> 1][h + (j & 1) * 2] = *(const uint32_t*)&w;
    }
    float total = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    int both = max(exponent, state.exponent[h]);
    share[h] = n > 0 ? power_of_two(exponent - both) : 0.0f;
    shrink[h] = power_of_two(state.exponent[h] - both);
    state.exponent[h] = both;
    state.total[h] = fmaf(share[h], total, state.total[h] * shrink[h]);
  }
}
#endif

extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 1) attend_rows(const __nv_bfloat16* queries, Step step, const uint8_t* layer, int first, int rows, int heads,
                                                                          int row_bytes, float softmax_scale, __nv_bfloat16* means) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(128) uint8_t bytes[];
  // Queries first, then cached rows in two turns.
  __shared__ uint64_t asked, full[2], empty[2];
  uint8_t* own = bytes + (-shared_address(bytes) & 1023);
  uint8_t* cached = own + SQUARES * SQUARE;
  if (threadIdx.x == 0) {
    barrier_init(&asked, 128);
    for (int i = 0; i < 2; i++) {
      barrier_init(&full[i], 128);
      barrier_init(&empty[i], 8);
    }
  }
  __syncthreads();
  begin();
  int tile = (gridDim.x - 1 - blockIdx.x) * ROWS_TOGETHER, end = min(ROWS_TOGETHER, rows - tile), turn = 0, parity = 0;
  auto step_turn = [&] {
    turn ^= 1;
    parity ^= !turn;
  };
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    // Rows of q~ are one head of one row of the step.
    auto landed = [&](uint64_t* barrier) {
      asm volatile("cp.async.wait_all;" ::: "memory");
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      barrier_arrive(barrier);
    };
    int chunk = threadIdx.x & 7;
#pragma unroll 1
    for (int r = threadIdx.x >> 3; r < 64; r += 16) {
      const uint8_t* p = (const uint8_t*)(queries + ((size_t)min(tile + (r >> 4), rows - 1) * heads + blockIdx.y * 16 + (r & 15)) * WIDTH) + chunk * 16;
      uint32_t at = shared_address(own) + r * 128 + ((chunk ^ (r & 7)) << 4);
#pragma unroll
      for (int s = 0; s < SQUARES; s++) copy_async<16>(at + s * SQUARE, p + s * 128);
    }
    landed(&asked);
#pragma unroll 1
    for (int from = 0; from < end;) {
      Alike alike(step, first + tile, from, end);
      const int* table = step.blocks + step.tables[first + tile + from];
      int last = 0;
      for (int r = alike.from; r < alike.to; r++) last = max(last, step.positions[first + tile + r]);
#pragma unroll 1
      for (int b = 0; b < alike.blocks; b++) {
        barrier_wait(&empty[turn], parity ^ 1);
        bring_squares(shared_address(cached + turn * SQUARES * SQUARE), layer + (size_t)table[b] * 64 * row_bytes, row_bytes, last + 1 - b * 64);
        landed(&full[turn]);
        step_turn();
      }
      from = alike.to;
    }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  int warp = (threadIdx.x >> 5) & 3, half = (threadIdx.x >> 7) - 1, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  float scale = softmax_scale * LOG2_E;
  RowState state;
#pragma unroll
  for (int slice = 0; slice < 4; slice++) fill(state.means[slice]);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    state.total[h] = 0;
    state.exponent[h] = EXPONENT_MIN;
  }
  barrier_wait(&asked, 0);
  uint64_t q = descriptor(shared_address(own));
#pragma unroll 1
  for (int from = 0; from < end;) {
    Alike alike(step, first + tile, from, end);
    int position = warp >= alike.from && warp < alike.to ? step.positions[first + tile + warp] : -1;
#pragma unroll 1
    for (int b = 0; b < alike.blocks; b++) {
      float even[8][4], odd[8][4], share[2], shrink[2];
      uint32_t weights[4][4];
      uint32_t rows_at = shared_address(cached + turn * SQUARES * SQUARE);
      uint64_t k = descriptor(rows_at);
      barrier_wait(&full[turn], parity);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int s = 0; s < SQUARES; s++)
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          wgmma(even, q + s * (SQUARE / 16) + i * 2, k + s * (SQUARE / 16) + i * 2, s || i);
          wgmma(odd, q + s * (SQUARE / 16) + i * 2 + 2, k + s * (SQUARE / 16) + i * 2 + 2, s || i);
        }
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      multiplied<0>();
      take_block(state, even, odd, position + 1 - b * 64, scale, weights, share, shrink);
      // Two slices of 64 columns are under way at a time.
      uint64_t v = descriptor(rows_at + half * 4 * SQUARE);
      auto ask = [&](int slice, float(&sums)[8][4]) {
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int s = 0; s < 4; s++) wgmma_of_rows(sums, weights[s], v + slice * (SQUARE / 16) + s * 128, s);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      };
      auto take = [&](int slice, const float(&sums)[8][4]) {
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
          for (int c = 0; c < 4; c++) state.means[slice][j][c] = fmaf(share[c >> 1], sums[j][c], state.means[slice][j][c] * shrink[c >> 1]);
      };
      ask(0, even);
      ask(1, odd);
      multiplied<1>();
      take(0, even);
      ask(2, even);
      multiplied<1>();
      take(1, odd);
      ask(3, odd);
      multiplied<1>();
      take(2, even);
      multiplied<0>();
      if (lane == 0) barrier_arrive(&empty[turn]);
      take(3, odd);
      step_turn();
    }
    from = alike.to;
  }
  if (warp >= end) return;
#pragma unroll
  for (int slice = 0; slice < 4; slice++)
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        __nv_bfloat16* to = means + ((size_t)(tile + warp) * heads + blockIdx.y * 16 + g + h * 8) * LATENT + (half * 4 + slice) * 64 + j * 8 + t * 2;
        *(__nv_bfloat162*)to = __floats2bfloat162_rn(state.means[slice][j][h * 2] / state.total[h], state.means[slice][j][h * 2 + 1] / state.total[h]);
      }
#else
  begin();
  __trap();
#endif
}

// `attend_block` for all blocks of the cache one after the other, and the means of `attend_values`: for so many rows that
// each may have a multiprocessor. 16 heads of one row. Products are turned: cached rows, or columns of the latent, are
// the 64 rows of a product, heads its 16 columns. One warpgroup brings cached rows, two multiply: each makes every second
// product of the scores, whose two sums they then exchange, and half of the latent columns. blockIdx = (heads / 16, row).
constexpr int QUERY_SQUARE = 16 * 128, WEIGHTS_BYTES = 16 * 128, SCORES_BYTES = 128 * 8 * 4;
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// d = A B + (add ? d : 0) for 16 columns: A of 64 rows, or, TURNED, of 16 rows whose 64 columns follow each other.
template <int TURNED>
__device__ __forceinline__ void wgmma_of_heads(float (&d)[2][4], uint64_t a, uint64_t b, int add) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %10, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7}, %8, %9, p, 1, 1, %11, 0;}"
               : SUMS4(0), SUMS4(1)
               : "l"(a), "l"(b), "r"(add), "n"(TURNED));
}
// The 128 threads of a warpgroup that multiplies.
__device__ __forceinline__ void meet(int half) { asm volatile("bar.sync %0, 128;" ::"r"(half + 1) : "memory"); }

// What a warpgroup's warps tell each other of a block: largest scores, sums of weights by every second row, and weights
// where wgmma reads them.
struct Told {
  float most[4][16];
  float sums[4][16][4];
  float totals[16];
};

// A thread knows of heads 8j + 2t + c; its warp, of one of these, the sum of all weights.
struct HeadState {
  float means[4][2][4];
  int exponent[2][2];
  float total;
};

// Scores of a block to weights, and the factors that join it to what is known so far.
__device__ __forceinline__ void weigh(HeadState& state, const float (&own)[2][4], const float (&other)[2][4], int n, float scale, Told& told, uint8_t* weights, int half,
                                      float (&share)[2][2], float (&shrink)[2][2]) {
  int warp = threadIdx.x >> 5 & 3, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  float s[2][4];
#pragma unroll
  for (int j = 0; j < 2; j++)
#pragma unroll
    for (int c = 0; c < 4; c++) s[j][c] = warp * 16 + (c >> 1) * 8 + g < n ? __fmul_rn(own[j][c] + other[j][c], scale) : -INFINITY;
#pragma unroll
  for (int j = 0; j < 2; j++)
#pragma unroll
    for (int c = 0; c < 2; c++) {
      float most = fmaxf(s[j][c], s[j][c + 2]);
#pragma unroll
      for (int o = 4; o < 32; o *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, o));
      if (g == 0) told.most[warp][j * 8 + t * 2 + c] = most;
    }
  meet(half);
#pragma unroll
  for (int j = 0; j < 2; j++)
#pragma unroll
    for (int c = 0; c < 2; c++) {
      int head = j * 8 + t * 2 + c;
      float most = fmaxf(fmaxf(told.most[0][head], told.most[1][head]), fmaxf(told.most[2][head], told.most[3][head]));
      int exponent = exponent_of(most), both = max(exponent, state.exponent[j][c]);
      share[j][c] = power_of_two(exponent - both);
      shrink[j][c] = power_of_two(state.exponent[j][c] - both);
      state.exponent[j][c] = both;
      float sum[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        __nv_bfloat16 w = __float2bfloat16_rn(exp2f(s[j][c + i * 2] - exponent));
        int column = (warp * 16 + i * 8 + g) * 2;
        *(__nv_bfloat16*)(weights + head * 128 + (column ^ (head & 7) << 4)) = w;
        // In the order of `take_block`: rows beside each other, then those 8, 16 and 32 apart, then 2 and 4.
        float weight = __bfloat162float(w);
        sum[i] = weight + __shfl_xor_sync(~0u, weight, 4);
      }
      if ((g & 1) == 0) told.sums[warp][head][g >> 1] = sum[0] + sum[1];
    }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  meet(half);
  int head = (warp >> 1) * 8 + t * 2 + (warp & 1);
  float4 of_warp[4];
#pragma unroll
  for (int w = 0; w < 4; w++) of_warp[w] = *(const float4*)told.sums[w][head];
  auto joined = [&](float a, float b, float c, float d) { return (a + b) + (c + d); };
  float total = joined(joined(of_warp[0].x, of_warp[1].x, of_warp[2].x, of_warp[3].x), joined(of_warp[0].y, of_warp[1].y, of_warp[2].y, of_warp[3].y),
                       joined(of_warp[0].z, of_warp[1].z, of_warp[2].z, of_warp[3].z), joined(of_warp[0].w, of_warp[1].w, of_warp[2].w, of_warp[3].w));
  float own_share = warp & 1 ? share[0][1] : share[0][0], own_shrink = warp & 1 ? shrink[0][1] : shrink[0][0];
  if (warp & 2) {
    own_share = warp & 1 ? share[1][1] : share[1][0];
    own_shrink = warp & 1 ? shrink[1][1] : shrink[1][0];
  }
  state.total = fmaf(own_share, total, state.total * own_shrink);
}
#endif

extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 1) attend_row(const __nv_bfloat16* queries, Step step, const uint8_t* layer, int first, int heads, int row_bytes,
                                                                         int fresh, float softmax_scale, __nv_bfloat16* means) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(128) uint8_t bytes[];
  __shared__ uint64_t full[2], empty[2];
  __shared__ __align__(16) Told told[2];
  // Cached rows in two turns, queries, weights, scores in two turns.
  uint8_t* cached = bytes + (-shared_address(bytes) & 1023);
  uint8_t* own = cached + 2 * SQUARES * SQUARE;
  uint8_t* weights = own + SQUARES * QUERY_SQUARE;
  // The arrays of the step came before all kernels of the step.
  int t = blockIdx.y, position = step.positions[first + t], blocks = (position >> 6) + 1;
  if (threadIdx.x == 0)
    for (int i = 0; i < 2; i++) {
      barrier_init(&full[i], 128);
      barrier_init(&empty[i], 8);
    }
  __syncthreads();
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    const int* table = step.blocks + step.tables[first + t];
    auto bring = [&](int b) {
      bring_squares(shared_address(cached + (b & 1) * SQUARES * SQUARE), layer + (size_t)table[b] * 64 * row_bytes, row_bytes, position + 1 - b * 64);
    };
    auto land = [&](int b) { asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(&full[b & 1])) : "memory"); };
    // At most the last `fresh` rows of a sequence are appended in this step.
    bool old = 64 + fresh <= position + 1;
    if (old) bring(0);
    begin();
    int r = threadIdx.x >> 3, chunk = threadIdx.x & 7;
    const uint8_t* query = (const uint8_t*)(queries + ((size_t)t * heads + blockIdx.x * 16 + r) * WIDTH) + chunk * 16;
#pragma unroll
    for (int s = 0; s < SQUARES; s++) copy_async<16>(shared_address(own) + s * QUERY_SQUARE + r * 128 + ((chunk ^ (r & 7)) << 4), query + s * 128);
    if (!old) bring(0);
    land(0);
#pragma unroll 1
    for (int b = 1; b < blocks; b++) {
      barrier_wait(&empty[b & 1], (b >> 1 & 1) ^ 1);
      bring(b);
      land(b);
    }
    // Nobody leaves while its copies are under way.
    asm volatile("cp.async.wait_all;" ::: "memory");
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  int warp = threadIdx.x >> 5 & 3, half = (threadIdx.x >> 7) - 1, lane = threadIdx.x & 31, g = lane >> 2, t4 = lane & 3;
  uint8_t *own_weights = weights + half * WEIGHTS_BYTES, *scores_at = weights + 2 * WEIGHTS_BYTES;
  uint64_t q = descriptor(shared_address(own)), p = descriptor(shared_address(own_weights));
  HeadState state;
#pragma unroll
  for (int slice = 0; slice < 4; slice++) fill(state.means[slice]);
  state.total = 0;
#pragma unroll
  for (int j = 0; j < 2; j++)
#pragma unroll
    for (int c = 0; c < 2; c++) state.exponent[j][c] = EXPONENT_MIN;
#pragma unroll 1
  for (int b = 0; b < blocks; b++) {
    float scores[2][4], other[2][4], share[2][2], shrink[2][2];
    uint32_t rows_at = shared_address(cached + (b & 1) * SQUARES * SQUARE);
    uint64_t k = descriptor(rows_at);
    barrier_wait(&full[b & 1], b >> 1 & 1);
    // The copies were made by others, in words; the tensor cores see them behind this.
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int s = 0; s < SQUARES; s++)
#pragma unroll
      for (int i = 0; i < 4; i += 2)
        wgmma_of_heads<0>(scores, k + s * (SQUARE / 16) + (i + half) * 2, q + s * (QUERY_SQUARE / 16) + (i + half) * 2, s || i);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    multiplied<0>();
    float4* exchanged = (float4*)(scores_at + (b & 1) * 2 * SCORES_BYTES) + (threadIdx.x & 127);
#pragma unroll
    for (int j = 0; j < 2; j++) exchanged[(half * 2 + j) * 128] = make_float4(scores[j][0], scores[j][1], scores[j][2], scores[j][3]);
    asm volatile("bar.sync 3, 256;" ::: "memory");
#pragma unroll
    for (int j = 0; j < 2; j++) *(float4*)other[j] = exchanged[((half ^ 1) * 2 + j) * 128];
    weigh(state, scores, other, position + 1 - b * 64, softmax_scale * LOG2_E, told[half], own_weights, half, share, shrink);
    float sums[4][2][4];
    uint64_t v = descriptor(rows_at + half * 4 * SQUARE);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int slice = 0; slice < 4; slice++)
#pragma unroll
      for (int s = 0; s < 4; s++) wgmma_of_heads<1>(sums[slice], v + slice * (SQUARE / 16) + s * 128, p + s * 2, s);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    multiplied<0>();
    if (lane == 0) barrier_arrive(&empty[b & 1]);
#pragma unroll
    for (int slice = 0; slice < 4; slice++)
#pragma unroll
      for (int j = 0; j < 2; j++)
#pragma unroll
        for (int c = 0; c < 4; c++) state.means[slice][j][c] = fmaf(share[j][c & 1], sums[slice][j][c], state.means[slice][j][c] * shrink[j][c & 1]);
  }
  if (g == 0) told[half].totals[(warp >> 1) * 8 + t4 * 2 + (warp & 1)] = state.total;
  meet(half);
#pragma unroll
  for (int j = 0; j < 2; j++)
#pragma unroll
    for (int c = 0; c < 2; c++) {
      int head = j * 8 + t4 * 2 + c;
      float total = told[half].totals[head];
      __nv_bfloat16* to = means + ((size_t)t * heads + blockIdx.x * 16 + head) * LATENT + half * 256 + warp * 16 + g;
#pragma unroll
      for (int slice = 0; slice < 4; slice++)
#pragma unroll
        for (int i = 0; i < 2; i++) to[slice * 64 + i * 8] = __float2bfloat16_rn(state.means[slice][j][c + i * 2] / total);
    }
#else
  begin();
  __trap();
#endif
}
