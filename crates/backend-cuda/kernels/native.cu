// Native precision: BF16 activations times BF16 or FP8 weights on the tensor cores, sums in F32.
//
// Every product divides the columns, a multiple of 64, into eight parts of runs of 128, by the number of columns alone;
// each part is summed in order, 16 columns at a time, and the parts are added in order. So a row's bits do not depend on
// the rows beside it, nor on how many of them a block takes.
#pragma once
#include "plain.cu"

constexpr int RUN = 128;
constexpr int WARPS = 8;

__device__ __forceinline__ void mma(float* c, const uint32_t* a, uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Two bytes of a word of FP8 codes as BF16 times 2^-120, which is the difference of the exponents' biases; exact. `pick`
// names the bytes, each with its sign over the byte above it. A code of NaN, which no checkpoint has, becomes 480.
__device__ constexpr uint32_t picked(int first, int second) { return (uint32_t)(first | (first | 8) << 4 | second << 8 | (second | 8) << 12); }
__device__ __forceinline__ uint32_t small_pair(uint32_t codes, uint32_t pick) {
  uint32_t extended;
  asm("prmt.b32 %0, %1, %1, %2;" : "=r"(extended) : "r"(codes), "r"(pick));
  return extended << 4 & 0x87f087f0u;
}
__device__ __forceinline__ uint32_t bf16_pair(uint32_t codes, uint32_t pick) {
  const uint32_t unit = 0x7b807b80u;  // 2^120
  uint32_t v;
  asm("{fma.rn.bf16x2 %0, %1, %2, %3;}" : "=r"(v) : "r"(small_pair(codes, pick)), "r"(unit), "r"(0x80008000u));
  return v;
}

__device__ __forceinline__ void part_of_warp(int cols, int& from, int& to) {
  int runs = (cols + RUN - 1) / RUN, warp = threadIdx.x >> 5;
  from = runs * warp / WARPS;
  to = runs * (warp + 1) / WARPS;
}

// x in BF16.
extern "C" __global__ void round_rows(const float* x, __nv_bfloat16* out, int n) {
  begin();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) out[i] = __float2bfloat16_rn(x[i]);
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
  // What depends on no choice is asked for first, then the choices together: each answer takes long.
  float4 own[KEPT], of_shared[KEPT];
#pragma unroll
  for (int j = 0; j < KEPT; j++) {
    int i = min((int)threadIdx.x + j * 256, fours - 1);
    own[j] = ((const float4*)(out + (size_t)t * width))[i];
    if (shared) of_shared[j] = ((const float4*)(y + (size_t)(choices + t) * width))[i];
  }
#if __CUDA_ARCH__ >= 900
  constexpr int TOGETHER = 8;
#else
  constexpr int TOGETHER = 4;
#endif
#pragma unroll 1
  for (int from = 0; from < top_k; from += TOGETHER) {
    int choice[TOGETHER];
    float weight[TOGETHER];
#pragma unroll
    for (int c = 0; c < TOGETHER; c++) choice[c] = t * top_k + (from + c < top_k ? order[t * top_k + from + c] : 0);
#pragma unroll
    for (int c = 0; c < TOGETHER; c++) weight[c] = weights[choice[c]];
#pragma unroll
    for (int j = 0; j < KEPT; j++) {
      int i = threadIdx.x + j * 256;
      if (i >= fours) break;
      float4 a[TOGETHER];
#pragma unroll
      for (int c = 0; c < TOGETHER; c++)
        if (from + c < top_k) a[c] = ((const float4*)(y + (size_t)choice[c] * width))[i];
#pragma unroll
      for (int c = 0; c < TOGETHER; c++)
        if (from + c < top_k)
          v[j] = make_float4(fmaf(weight[c], a[c].x, v[j].x), fmaf(weight[c], a[c].y, v[j].y), fmaf(weight[c], a[c].z, v[j].z), fmaf(weight[c], a[c].w, v[j].w));
    }
  }
  float sum = 0;
#pragma unroll
  for (int j = 0; j < KEPT; j++) {
    int i = threadIdx.x + j * 256;
    if (i < fours) {
      if (shared) v[j] = make_float4(v[j].x + of_shared[j].x, v[j].y + of_shared[j].y, v[j].z + of_shared[j].z, v[j].w + of_shared[j].w);
      v[j] = make_float4(own[j].x + v[j].x, own[j].y + v[j].y, own[j].z + v[j].z, own[j].w + v[j].w);
      ((float4*)(out + (size_t)t * width))[i] = v[j];
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

// Four weights of an expert's gate, which is F32 or BF16.
__device__ __forceinline__ float4 gate_weights(const Matrix& m, int expert, int i) {
  const uint8_t* w = m.data + (size_t)expert * m.row_bytes;
  if (m.format == F32) return ((const float4*)w)[i];
  uint2 v = ((const uint2*)w)[i];
  return make_float4(bf16_bits(v.x & 0xffff), bf16_bits(v.x >> 16), bf16_bits(v.y & 0xffff), bf16_bits(v.y >> 16));
}

// Router logits in F32 of few rows: a block per expert and row of x, the same sums for any batch. `format` is F32 or BF16, and the
// columns are a multiple of four.
__device__ __forceinline__ void gate_logit(const Matrix* gate, const float* x, float* logits) {
  // Weights that a thread brings before the kernels in front are done.
  constexpr int KEPT = 4;
  __shared__ float sums[4];
  const Matrix m = *gate;
  int e = blockIdx.x, t = blockIdx.y, fours = m.cols / 4;
  const float4* row = (const float4*)(x + (size_t)t * m.cols);
  float sum = 0;
  auto add = [&](float4 a, float4 b) {
    sum = fmaf(a.x, b.x, sum);
    sum = fmaf(a.y, b.y, sum);
    sum = fmaf(a.z, b.z, sum);
    sum = fmaf(a.w, b.w, sum);
  };
  float4 kept[KEPT];
#pragma unroll
  for (int j = 0; j < KEPT; j++) kept[j] = gate_weights(m, e, min((int)threadIdx.x + j * 128, fours - 1));
  begin_in_order();
#pragma unroll
  for (int j = 0; j < KEPT; j++) {
    int i = threadIdx.x + j * 128;
    if (i < fours) add(row[i], kept[j]);
  }
#pragma unroll 4
  for (int i = threadIdx.x + KEPT * 128; i < fours; i += 128) add(row[i], gate_weights(m, e, i));
  sum = block_sum(sum, sums);
  if (threadIdx.x == 0) logits[(size_t)t * m.rows + e] = sum;
}

// The same sums for many rows: a block has four experts and eight rows, so that both are read less often.
// blockIdx = (experts / 4, rows / 8).
extern "C" __global__ void __launch_bounds__(128) gate_logits(const Matrix* gate, const float* x, float* logits, int rows) {
  constexpr int EXPERTS = 4, ROWS = 8, KEPT = 4;
  __shared__ float sums[ROWS * EXPERTS][4];
  const Matrix m = *gate;
  int expert = blockIdx.x * EXPERTS, row = blockIdx.y * ROWS, fours = m.cols / 4, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  float acc[ROWS][EXPERTS] = {};
  begin_in_order();
#pragma unroll 1
  for (int from = threadIdx.x; from < fours; from += KEPT * 128) {
    float4 w[EXPERTS][KEPT];
#pragma unroll
    for (int e = 0; e < EXPERTS; e++)
#pragma unroll
      for (int j = 0; j < KEPT; j++) w[e][j] = gate_weights(m, min(expert + e, m.rows - 1), min(from + j * 128, fours - 1));
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const float4* own = (const float4*)(x + (size_t)min(row + r, rows - 1) * m.cols);
#pragma unroll
      for (int j = 0; j < KEPT; j++) {
        if (from + j * 128 >= fours) break;
        float4 a = own[from + j * 128];
#pragma unroll
        for (int e = 0; e < EXPERTS; e++)
          acc[r][e] = fmaf(a.w, w[e][j].w, fmaf(a.z, w[e][j].z, fmaf(a.y, w[e][j].y, fmaf(a.x, w[e][j].x, acc[r][e]))));
      }
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++)
#pragma unroll
    for (int e = 0; e < EXPERTS; e++) {
      float sum = warp_sum(acc[r][e]);
      if (lane == 0) sums[r * EXPERTS + e][warp] = sum;
    }
  __syncthreads();
  int r = threadIdx.x / EXPERTS, e = threadIdx.x % EXPERTS;
  if (r >= ROWS || row + r >= rows || expert + e >= m.rows) return;
  float sum = 0;
  for (int w = 0; w < 4; w++) sum += sums[threadIdx.x][w];
  logits[(size_t)(row + r) * m.rows + expert + e] = sum;
}

// The last block of a row chooses, when `gate_logit` of all of them is done. `arrived` counts a row's blocks; it is zero
// before and after.
__device__ __forceinline__ void route_last(const float* logits, unsigned* arrived, const float* bias, const Router& r, int* ids, float* weights, int* order, int* list,
                                           Tile* tiles) {
  extern __shared__ __align__(16) float room[];
  __shared__ bool last;
  int t = blockIdx.y;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(&arrived[t], 1) + 1 == gridDim.x;
    __threadfence();
  }
  __syncthreads();
  if (!last || threadIdx.x >= 32) return;
  if (threadIdx.x == 0) arrived[t] = 0;
  // Other blocks have written them.
  auto logit = [&](int e) { return __ldcg(logits + (size_t)t * r.experts + e); };
  route_row(room, t, logit, bias, r, ids, weights, order, list, tiles);
}

// `gate_logits` and then `route`.
extern "C" __global__ void __launch_bounds__(128, 8) gate_and_route(const Matrix* gate, const float* x, float* logits, unsigned* arrived, const float* bias,
                                                                 Router r, int* ids, float* weights, int* order, int* list, Tile* tiles) {
  gate_logit(gate, x, logits);
  route_last(logits, arrived, bias, r, ids, weights, order, list, tiles);
}

// `rms_norm`, `gate_logits` and `route` of a row of at most 2,048 whole fours and at most 64 experts: the eight blocks of a
// cluster, with an expert a warp, make the norm each, and the first of them chooses. The sums are those of the other
// kernels' threads. Only on Hopper and later. blockIdx = (experts / 8, row).
extern "C" __global__ void __launch_bounds__(256) norm_gate_and_route(const float* x, const float* norm, float eps, float* normed, __nv_bfloat16* rounded,
                                                                      const Matrix* gate, const float* bias, Router r, int* ids, float* weights, int* order, int* list,
                                                                      Tile* tiles) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(16) float room[];
  __shared__ float4 row[512];
  __shared__ float sums[32], logits[64];
  const Matrix m = *gate;
  int t = blockIdx.y, fours = m.cols / 4, warp = threadIdx.x >> 5, lane = threadIdx.x & 31, e = blockIdx.x * 8 + warp;
  float4 n[2], v[2], w[16];
  // Says that this block runs: its shared memory may be written by others, who wait for that below.
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#pragma unroll
  for (int j = 0; j < 2; j++) n[j] = ((const float4*)norm)[min((int)threadIdx.x + j * 256, fours - 1)];
#pragma unroll
  for (int j = 0; j < 16; j++) w[j] = gate_weights(m, min(e, m.rows - 1), min(lane + j * 32, fours - 1));
  begin();
  float sum = 0;
#pragma unroll
  for (int j = 0; j < 2; j++) {
    int i = threadIdx.x + j * 256;
    v[j] = i < fours ? ((const float4*)(x + (size_t)t * m.cols))[i] : make_float4(0, 0, 0, 0);
    sum = fmaf(v[j].x, v[j].x, fmaf(v[j].y, v[j].y, fmaf(v[j].z, v[j].z, fmaf(v[j].w, v[j].w, sum))));
  }
  float scale = 1.0f / sqrtf(block_sum(sum, sums) / (float)m.cols + eps);
#pragma unroll
  for (int j = 0; j < 2; j++) {
    int i = threadIdx.x + j * 256;
    float4 y = make_float4(n[j].x * (v[j].x * scale), n[j].y * (v[j].y * scale), n[j].z * (v[j].z * scale), n[j].w * (v[j].w * scale));
    row[i] = y;
    if (blockIdx.x > 0 || i >= fours) continue;
    ((float4*)(normed + (size_t)t * m.cols))[i] = y;
    if (rounded) {
      __nv_bfloat162 pair[2] = {__floats2bfloat162_rn(y.x, y.y), __floats2bfloat162_rn(y.z, y.w)};
      ((uint2*)(rounded + (size_t)t * m.cols))[i] = *(const uint2*)pair;
    }
  }
  __syncthreads();
  // Those of four threads of a block of `gate_logit`.
  float quarters[4] = {}, logit = 0;
#pragma unroll
  for (int j = 0; j < 16; j++) {
    if (lane + j * 32 >= fours) break;
    float4 y = row[lane + j * 32];
    float& q = quarters[j & 3];
    q = fmaf(y.x, w[j].x, q);
    q = fmaf(y.y, w[j].y, q);
    q = fmaf(y.z, w[j].z, q);
    q = fmaf(y.w, w[j].w, q);
  }
#pragma unroll
  for (int i = 0; i < 4; i++) logit += warp_sum(quarters[i]);
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  if (lane == 0 && e < m.rows)
    asm volatile("{.reg .b32 a; mapa.shared::cluster.u32 a, %0, 0; st.shared::cluster.f32 [a], %1;}" ::"r"(shared_address(&logits[e])), "f"(logit) : "memory");
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  if (blockIdx.x > 0 || warp > 0) return;
  route_row(room, t, [&](int expert) { return logits[expert]; }, bias, r, ids, weights, order, list, tiles);
#else
  begin();
  __trap();
#endif
}
