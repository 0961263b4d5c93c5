// Every op in plain F32 kernels for every format: exact precision. A row's sums run in one fixed order, whatever else
// is in the step.
#pragma once
#include "step.cuh"

// R rows of x (where `xs` point) with row n of the matrix; every lane gets the sums.
template <int FORMAT, int R>
__device__ __forceinline__ void dots(const Matrix& m, int n, const float* const* xs, float* sums) {
  const uint8_t* p = m.data + (size_t)n * m.row_bytes;
  float acc[R];
  for (int r = 0; r < R; r++) acc[r] = 0;
#pragma unroll 1
  for (int k = threadIdx.x & 31; k < m.cols; k += 32) {
    float w = value<FORMAT>(m, p, n, k);
#pragma unroll
    for (int r = 0; r < R; r++) acc[r] = fmaf(xs[r][k], w, acc[r]);
  }
#pragma unroll
  for (int r = 0; r < R; r++) sums[r] = warp_sum(acc[r]);
}

template <int R>
__device__ void dots_of(const Matrix& m, int n, const float* const* xs, float* sums) {
#define DOTS(FORMAT) dots<FORMAT, R>(m, n, xs, sums)
  FOR_FORMAT(m.format, DOTS)
#undef DOTS
}

template <int FORMAT>
__device__ void decode_row(const Matrix& m, int row, float* out) {
  const uint8_t* p = m.data + (size_t)row * m.row_bytes;
#pragma unroll 1
  for (int k = threadIdx.x; k < m.cols; k += blockDim.x) out[k] = value<FORMAT>(m, p, row, k);
}

// out[t] = table[tokens[t]]; one block per row.
extern "C" __global__ void embed(const Matrix* table, const int* tokens, float* out) {
  begin();
  const Matrix m = *table;
  int row = tokens[blockIdx.x];
#define DECODE(FORMAT) decode_row<FORMAT>(m, row, out + (size_t)blockIdx.x * m.cols)
  FOR_FORMAT(m.format, DECODE)
#undef DECODE
}

// One block of 256 threads per row; in place when x is out. `rounded` is null or takes the row in BF16. A row of whole
// fours that is not too long is read once.
extern "C" __global__ void __launch_bounds__(256) rms_norm(const float* x, const float* weight, float eps, float* out, __nv_bfloat16* rounded, int cols) {
  __shared__ float sums[32];
  constexpr int KEPT = 4;
  size_t at = (size_t)blockIdx.x * cols;
  const float* row = x + at;
  float sum = 0;
  if (cols % 4 == 0 && cols <= KEPT * 1024) {
    float4 v[KEPT], w[KEPT];
#pragma unroll
    for (int j = 0; j < KEPT; j++) {
      int i = threadIdx.x + j * 256;
      w[j] = i < cols / 4 ? ((const float4*)weight)[i] : make_float4(0, 0, 0, 0);
    }
    begin();
#pragma unroll
    for (int j = 0; j < KEPT; j++) {
      int i = threadIdx.x + j * 256;
      v[j] = i < cols / 4 ? ((const float4*)row)[i] : make_float4(0, 0, 0, 0);
      sum = fmaf(v[j].x, v[j].x, fmaf(v[j].y, v[j].y, fmaf(v[j].z, v[j].z, fmaf(v[j].w, v[j].w, sum))));
    }
    float scale = 1.0f / sqrtf(block_sum(sum, sums) / (float)cols + eps);
#pragma unroll
    for (int j = 0; j < KEPT; j++) {
      int i = threadIdx.x + j * 256;
      if (i >= cols / 4) break;
      float4 y = make_float4(w[j].x * (v[j].x * scale), w[j].y * (v[j].y * scale), w[j].z * (v[j].z * scale), w[j].w * (v[j].w * scale));
      ((float4*)(out + at))[i] = y;
      if (rounded) {
        __nv_bfloat162 pair[2] = {__floats2bfloat162_rn(y.x, y.y), __floats2bfloat162_rn(y.z, y.w)};
        ((uint2*)(rounded + at))[i] = *(const uint2*)pair;
      }
    }
    return;
  }
  begin();
  for (int i = threadIdx.x; i < cols; i += blockDim.x) sum = fmaf(row[i], row[i], sum);
  float scale = 1.0f / sqrtf(block_sum(sum, sums) / (float)cols + eps);
  for (int i = threadIdx.x; i < cols; i += blockDim.x) {
    float y = weight[i] * (row[i] * scale);
    out[at + i] = y;
    if (rounded) rounded[at + i] = __float2bfloat16_rn(y);
  }
}

constexpr int TILE = 4;

// A warp per row of the weight and four rows of x.
extern "C" __global__ void matmul(const Matrix* weight, const float* x, float* out, int rows, int add) {
  begin();
  const Matrix m = *weight;
  int n = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), first = blockIdx.y * TILE;
  if (n >= m.rows) return;
  const float* xs[TILE];
  for (int r = 0; r < TILE; r++) xs[r] = x + (size_t)min(first + r, rows - 1) * m.cols;
  float sums[TILE];
  dots_of<TILE>(m, n, xs, sums);
  if ((threadIdx.x & 31) == 0)
    for (int r = 0; r < TILE && first + r < rows; r++) {
      float* o = out + (size_t)(first + r) * m.rows + n;
      *o = add ? *o + sums[r] : sums[r];
    }
}

__device__ __forceinline__ void rotate(float* pair, float position, float frequency, float magnitude) {
  float s, c;
  sincosf(position * frequency, &s, &c);
  s *= magnitude;
  c *= magnitude;
  float a = pair[0], b = pair[1];
  pair[0] = __fsub_rn(__fmul_rn(a, c), __fmul_rn(b, s));
  pair[1] = __fadd_rn(__fmul_rn(b, c), __fmul_rn(a, s));
}

// Block per row; threads over heads and pairs.
extern "C" __global__ void rope_queries(float* q, const int* positions, const float* frequencies, float magnitude, int heads, int nope, int rope) {
  begin();
  int pairs = rope / 2, width = nope + rope;
  float position = (float)positions[blockIdx.x];
  for (int i = threadIdx.x; i < heads * pairs; i += blockDim.x) {
    int head = i / pairs, pair = i % pairs;
    rotate(q + ((size_t)blockIdx.x * heads + head) * width + nope + 2 * pair, position, frequencies[pair], magnitude);
  }
}

__device__ __forceinline__ const uint8_t* cache_row(const uint8_t* layer, const int* table, int position, int row_bytes) {
  return layer + ((size_t)table[position >> 6] * 64 + (position & 63)) * row_bytes;
}

// Row t of the step, by one block; shared memory holds it. `layer` is where the layer's blocks begin.
__device__ __forceinline__ void append_row(const float* kv, const float* weight, float eps, const Step& step, const float* frequencies, float magnitude,
                                           uint8_t* layer, int format, int latent, int rope, int row_bytes, int t) {
  extern __shared__ __align__(16) float room[];
  __shared__ float sums[32];
  float* row = room;
  int position = step.positions[t];
  const float* x = kv + (size_t)t * (latent + rope);
  float sum = 0;
  for (int i = threadIdx.x; i < latent; i += blockDim.x) sum = fmaf(x[i], x[i], sum);
  float scale = 1.0f / sqrtf(block_sum(sum, sums) / (float)latent + eps);
  for (int i = threadIdx.x; i < latent; i += blockDim.x) row[i] = weight[i] * (x[i] * scale);
  for (int i = threadIdx.x; i < rope / 2; i += blockDim.x) {
    float pair[2] = {x[latent + 2 * i], x[latent + 2 * i + 1]};
    rotate(pair, (float)position, frequencies[i], magnitude);
    row[latent + 2 * i] = pair[0];
    row[latent + 2 * i + 1] = pair[1];
  }
  __syncthreads();
  const uint8_t* at = cache_row(layer, step.blocks + step.tables[t], position, row_bytes);
  cache_store(format, row, latent, rope, (uint8_t*)at);
}
extern "C" __global__ void mla_append(const float* kv, const float* weight, float eps, Step step, const float* frequencies, float magnitude,
                                      uint8_t* layer, int format, int latent, int rope, int row_bytes) {
  begin();
  append_row(kv, weight, eps, step, frequencies, magnitude, layer, format, latent, rope, row_bytes, blockIdx.x);
}

template <int FORMAT>
__device__ void absorb_head(const Matrix& m, const float* q, int first_row, int nope, float* out) {
  for (int c = threadIdx.x; c < m.cols; c += blockDim.x) {
    float sum = 0;
#pragma unroll 1
    for (int d = 0; d < nope; d++)
      sum = fmaf(q[d], value<FORMAT>(m, m.data + (size_t)(first_row + d) * m.row_bytes, first_row + d, c), sum);
    out[c] = sum;
  }
}

// q~ = W_UK^T q_nope; block per (head, row).
extern "C" __global__ void mla_absorb(const Matrix* kv_b, const float* q, float* absorbed, int first, int heads, int nope, int rope, int values) {
  begin();
  const Matrix m = *kv_b;
  int head = blockIdx.x, t = blockIdx.y;
  const float* query = q + ((size_t)(first + t) * heads + head) * (nope + rope);
  float* out = absorbed + ((size_t)t * heads + head) * m.cols;
#define ABSORB(FORMAT) absorb_head<FORMAT>(m, query, head * (nope + values), nope, out)
  FOR_FORMAT(m.format, ABSORB)
#undef ABSORB
}

// The softmax's mean of the latent rows, over the positions in order; block per (head, row), in place of q~.
extern "C" __global__ void mla_mean(float* absorbed, const float* q, Step step, const uint8_t* layer, int format, int first, int heads, int nope,
                                    int rope, int latent, int row_bytes, float softmax_scale) {
  begin();
  extern __shared__ __align__(16) float room[];
  float *query = room, *mean = room + latent + rope, *scores = mean + latent;
  int head = blockIdx.x, t = blockIdx.y, row = first + t;
  float* own = absorbed + ((size_t)t * heads + head) * latent;
  const float* turned = q + ((size_t)row * heads + head) * (nope + rope) + nope;
  for (int i = threadIdx.x; i < latent; i += blockDim.x) {
    query[i] = own[i];
    mean[i] = 0;
  }
  for (int i = threadIdx.x; i < rope; i += blockDim.x) query[latent + i] = turned[i];
  const int* table = step.blocks + step.tables[row];
  int length = step.positions[row] + 1, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  float largest = -INFINITY, total = 0;
  for (int start = 0; start < length; start += 64) {
    int n = min(64, length - start);
    const uint8_t* block = cache_row(layer, table, start, row_bytes);
    __syncthreads();
    for (int p = warp; p < n; p += blockDim.x >> 5) {
      float sum = 0;
      for (int i = lane; i < latent + rope; i += 32) sum = fmaf(query[i], cache_value(format, block + (size_t)p * row_bytes, latent, i), sum);
      sum = warp_sum(sum);
      if (lane == 0) scores[p] = sum * softmax_scale;
    }
    __syncthreads();
    float most = largest;
    for (int p = 0; p < n; p++) most = fmaxf(most, scores[p]);
    float shrink = expf(largest - most);
    __syncthreads();
    for (int p = threadIdx.x; p < n; p += blockDim.x) scores[p] = expf(scores[p] - most);
    __syncthreads();
    total *= shrink;
    for (int p = 0; p < n; p++) total += scores[p];
    largest = most;
    for (int i = threadIdx.x; i < latent; i += blockDim.x) {
      float sum = mean[i] * shrink;
      for (int p = 0; p < n; p++) sum = fmaf(scores[p], cache_value(format, block + (size_t)p * row_bytes, latent, i), sum);
      mean[i] = sum;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < latent; i += blockDim.x) own[i] = mean[i] / total;
}

// o = W_UV mean; warp per value, blockIdx = (values / warps, head, row).
extern "C" __global__ void mla_values(const Matrix* kv_b, const float* mean, float* out, int first, int heads, int nope, int values) {
  begin();
  const Matrix m = *kv_b;
  int v = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), head = blockIdx.y, t = blockIdx.z;
  if (v >= values) return;
  const float* x = mean + ((size_t)t * heads + head) * m.cols;
  float sum;
  dots_of<1>(m, head * (nope + values) + nope + v, &x, &sum);
  if ((threadIdx.x & 31) == 0) out[((size_t)(first + t) * heads + head) * values + v] = sum;
}

// inner = silu(gate x) * up x; warp per inner value, blockIdx = (inner / warps, row).
extern "C" __global__ void swiglu(const Matrix* gate, const Matrix* up, const float* x, float* inner) {
  begin();
  const Matrix g = *gate, u = *up;
  int n = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), t = blockIdx.y;
  if (n >= g.rows) return;
  const float* row = x + (size_t)t * g.cols;
  float a, b;
  dots_of<1>(g, n, &row, &a);
  dots_of<1>(u, n, &row, &b);
  if ((threadIdx.x & 31) == 0) inner[(size_t)t * g.rows + n] = silu(a) * b;
}

// As swiglu with the expert of each (row, choice); blockIdx = (inner / warps, choice, row). Experts are triples.
extern "C" __global__ void moe_inner(const Matrix* experts, const int* ids, const float* x, float* inner, int inner_max) {
  begin();
  int choice = blockIdx.z * gridDim.y + blockIdx.y;
  const Matrix g = experts[3 * ids[choice]], u = experts[3 * ids[choice] + 1];
  int n = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
  if (n >= g.rows) return;
  const float* row = x + (size_t)blockIdx.z * g.cols;
  float a, b;
  dots_of<1>(g, n, &row, &a);
  dots_of<1>(u, n, &row, &b);
  if ((threadIdx.x & 31) == 0) inner[(size_t)choice * inner_max + n] = silu(a) * b;
}

// out += sum over the choices by rising expert id, the shared expert last; warp per output, blockIdx = (D / warps, row).
extern "C" __global__ void moe_sum(const Matrix* experts, const int* ids, const float* weights, const int* order, int top_k, const float* inner,
                                   int inner_max, const Matrix* shared, const float* shared_inner, float* out, int width) {
  begin();
  int n = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), t = blockIdx.y;
  if (n >= width) return;
  float sum = 0;
  for (int j = 0; j < top_k; j++) {
    int choice = t * top_k + order[t * top_k + j];
    const Matrix down = experts[3 * ids[choice] + 2];
    const float* x = inner + (size_t)choice * inner_max;
    float y;
    dots_of<1>(down, n, &x, &y);
    sum = fmaf(weights[choice], y, sum);
  }
  if (shared) {
    const Matrix down = *shared;
    const float* x = shared_inner + (size_t)t * down.cols;
    float y;
    dots_of<1>(down, n, &x, &y);
    sum += y;
  }
  if ((threadIdx.x & 31) == 0) out[(size_t)t * width + n] += sum;
}

// The best of `n` scores that is not taken: higher first, then the smaller index; NaN counts as the lowest.
__device__ __forceinline__ int warp_best(const float* scores, const uint8_t* taken, int n) {
  float best = -INFINITY;
  int at = INT_MAX;
  for (int i = threadIdx.x & 31; i < n; i += 32)
    if (!taken[i] && (at == INT_MAX || scores[i] > best)) {
      best = scores[i] == scores[i] ? scores[i] : -INFINITY;
      at = i;
    }
  for (int o = 16; o; o >>= 1) {
    float b = __shfl_xor_sync(~0u, best, o);
    int a = __shfl_xor_sync(~0u, at, o);
    if (at == INT_MAX || (a != INT_MAX && (b > best || (b == best && a < at)))) {
      best = b;
      at = a;
    }
  }
  return at;
}

struct Router {
  int experts, top_k, groups, groups_kept, top_two, sigmoid, normalize;
  float scale;
};

// Most experts that a token chooses for which the choices stay in shared memory.
constexpr int CHOICES_MAX = 32;

// A number that orders as the score does; NaN as the lowest.
__device__ __forceinline__ uint32_t order_of(float score) {
  uint32_t bits = __float_as_uint((score == score ? score : -INFINITY) + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Scores, groups, choices of row t by one warp. Shared memory: two floats and a byte per expert, a float and a byte per
// group. A single row is its own sorting by expert: `list` and `tiles`, if they are given, are those of `moe_group`.
template <class Logit>
__device__ __forceinline__ void route_row(float* room, int t, const Logit& logit, const float* bias, const Router& r, int* ids, float* weights, int* order, int* list,
                          Tile* tiles) {
  __shared__ int near[CHOICES_MAX];
  float *scores = room, *choice = room + r.experts, *ranks = choice + r.experts;
  uint8_t *taken = (uint8_t*)(ranks + r.groups), *kept = taken + r.experts;
  int lane = threadIdx.x & 31;
#pragma unroll 1
  for (int e = lane; e < r.experts; e += 32) choice[e] = logit(e);
  __syncwarp();
  const float* z = choice;
  if (r.sigmoid) {
  #pragma unroll 1
  for (int e = lane; e < r.experts; e += 32) scores[e] = (float)(1.0 / (1.0 + exp(-(double)z[e])));
  } else {
    float most = -INFINITY;
  #pragma unroll 1
  for (int e = lane; e < r.experts; e += 32) most = fmaxf(most, z[e]);
    for (int o = 16; o; o >>= 1) most = fmaxf(most, __shfl_xor_sync(~0u, most, o));
    // The first two of a lane side by side, and only once.
    double sum = 0, kept[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int e = lane + i * 32;
      kept[i] = e < r.experts ? exp((double)z[e] - (double)most) : 0.0;
    }
    sum = kept[0] + kept[1];
#pragma unroll 1
    for (int e = lane + 64; e < r.experts; e += 32) sum += exp((double)z[e] - (double)most);
    for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
#pragma unroll
    for (int i = 0; i < 2; i++)
      if (lane + i * 32 < r.experts) scores[lane + i * 32] = (float)(kept[i] / sum);
#pragma unroll 1
    for (int e = lane + 64; e < r.experts; e += 32) scores[e] = (float)(exp((double)z[e] - (double)most) / sum);
  }
#pragma unroll 1
  for (int e = lane; e < r.experts; e += 32) {
    choice[e] = scores[e] + (bias ? bias[e] : 0.0f);
    taken[e] = 0;
  }
  __syncwarp();
  if (r.groups > 1) {
    int size = r.experts / r.groups;
    for (int g = lane; g < r.groups; g += 32) {
      float first = -INFINITY, second = -INFINITY;
      for (int i = 0; i < size; i++) {
        float v = choice[g * size + i];
        if (v > first) {
          second = first;
          first = v;
        } else if (v > second) {
          second = v;
        }
      }
      ranks[g] = r.top_two ? (size > 1 ? first + second : first) : first;
      kept[g] = 0;
    }
    __syncwarp();
    for (int i = 0; i < r.groups_kept; i++) {
      int g = warp_best(ranks, kept, r.groups);
      if (lane == 0) kept[g] = 1;
      __syncwarp();
    }
  #pragma unroll 1
  for (int e = lane; e < r.experts; e += 32)
      if (!kept[e / size]) taken[e] = 1;
    __syncwarp();
  }
  float sum = 0;
  int* far = ids + (size_t)t * r.top_k;
  int* chosen = r.top_k <= CHOICES_MAX ? near : far;
  if (r.experts <= 64 && r.top_k <= CHOICES_MAX) {
    // In the order of `warp_best`, as numbers that order as the scores do; nothing is below those that are taken.
    uint32_t keys[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int e = lane + i * 32;
      keys[i] = e < r.experts && !taken[e] ? order_of(choice[e]) : 0;
    }
#pragma unroll 1
    for (int j = 0; j < r.top_k; j++) {
      uint32_t most = __reduce_max_sync(~0u, max(keys[0], keys[1]));
      unsigned low = __ballot_sync(~0u, keys[0] == most), high = __ballot_sync(~0u, keys[1] == most);
      int e = low ? __ffs(low) - 1 : 31 + __ffs(high);
      if (lane == e) keys[0] = 0;
      if (lane + 32 == e) keys[1] = 0;
      if (lane == 0) chosen[j] = far[j] = e;
      sum += scores[e];
    }
    __syncwarp();
  } else {
    for (int j = 0; j < r.top_k; j++) {
      int e = warp_best(choice, taken, r.experts);
      if (lane == 0) {
        chosen[j] = far[j] = e;
        taken[e] = 1;
      }
      sum += scores[e];
      __syncwarp();
    }
  }
  float norm = r.normalize && r.top_k > 1 ? sum + 1e-20f : 1.0f;
  for (int j = lane; j < r.top_k; j += 32) {
    weights[(size_t)t * r.top_k + j] = scores[chosen[j]] / norm * r.scale;
    int place = 0;
    for (int i = 0; i < r.top_k; i++) place += chosen[i] < chosen[j];
    order[(size_t)t * r.top_k + place] = j;
    if (list) {
      if (j == 0) tiles[0].first = r.top_k;
      list[j] = j;
      tiles[1 + j] = {chosen[j], j, 1, 0};
    }
  }
}

extern "C" __global__ void route(const float* logits, const float* bias, Router r, int* ids, float* weights, int* order, int* list, Tile* tiles) {
  begin();
  extern __shared__ __align__(16) float room[];
  route_row(room, blockIdx.x, [&](int e) { return logits[(size_t)blockIdx.x * r.experts + e]; }, bias, r, ids, weights, order, list, tiles);
}

// out[i] = x[rows[i]]; a block per row.
extern "C" __global__ void gather_rows(const float* x, const int* rows, float* out, int cols) {
  begin();
  for (int i = threadIdx.x; i < cols; i += blockDim.x) out[(size_t)blockIdx.x * cols + i] = x[(size_t)rows[blockIdx.x] * cols + i];
}

// out[t] = a[t] || b[t]; a block per row.
extern "C" __global__ void concat(const float* a, const float* b, float* out, int left, int right) {
  begin();
  size_t t = blockIdx.x;
  for (int i = threadIdx.x; i < left + right; i += blockDim.x)
    out[t * (left + right) + i] = i < left ? a[t * left + i] : b[t * right + i - left];
}
