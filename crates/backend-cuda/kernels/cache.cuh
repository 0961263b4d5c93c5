// Rows of the latent cache: `cache.rs` of the crate tensor, bit by bit.
#pragma once
#include "formats.cuh"

// The order of `CacheFormat::ALL`.
enum CacheFormat { CACHE_F32, CACHE_BF16, CACHE_F16, CACHE_Q8_0, CACHE_FP8 };

__device__ __forceinline__ int cache_scales(int latent) { return (latent + 3) & ~3; }
__device__ __forceinline__ int cache_rope(int latent) { return cache_scales(latent) + (latent + 127) / 128 * 4; }

// Value i of a row, the rope part behind the latent.
__device__ __forceinline__ float cache_value(int format, const uint8_t* row, int latent, int i) {
  if (format == CACHE_F32) return ((const float*)row)[i];
  if (format == CACHE_BF16) return bf16_bits(((const uint16_t*)row)[i]);
  if (format == CACHE_F16) return __half2float(((const __half*)row)[i]);
  if (i >= latent) return bf16_bits(((const uint16_t*)(row + cache_rope(latent)))[i - latent]);
  float scale = ((const float*)(row + cache_scales(latent)))[i >> 7];
  float v = format == CACHE_Q8_0 ? (float)(int8_t)row[i] : e4m3(row[i]);
  return __fmul_rn(v, scale);
}

__device__ __forceinline__ uint8_t e4m3_code(float x) {
  uint32_t u = __float_as_uint(x);
  if (x != x) return 0x7f;
  uint8_t sign = u >> 24 & 0x80;
  float a = fminf(fabsf(x), 448.0f);
  if (a < 0.015625f) return sign | (uint8_t)__float2int_rn(a * 512.0f);
  uint32_t v = __float_as_uint(a);
  uint32_t r = v + 0x7ffff + (v >> 20 & 1);
  return sign | (uint8_t)((r >> 20) - (120 << 3));
}

// Stores a row of `latent + rope` values that all threads of the block see in shared memory.
__device__ void cache_store(int format, const float* row, int latent, int rope, uint8_t* out) {
  int n = latent + rope;
  if (format == CACHE_F32) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) ((float*)out)[i] = row[i];
  } else if (format == CACHE_BF16) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) ((__nv_bfloat16*)out)[i] = __float2bfloat16_rn(row[i]);
  } else if (format == CACHE_F16) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) ((__half*)out)[i] = __float2half_rn(row[i]);
  } else {
    float most = format == CACHE_Q8_0 ? 127.0f : 448.0f;
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    for (int run = warp; run < (latent + 127) / 128; run += blockDim.x >> 5) {
      // As integers, magnitudes order as the numbers do, and NaN is above all.
      uint32_t bits = 0;
      for (int i = run * 128 + lane; i < min(latent, run * 128 + 128); i += 32)
        bits = max(bits, __float_as_uint(row[i]) & 0x7fffffff);
      for (int o = 16; o; o >>= 1) bits = max(bits, __shfl_xor_sync(~0u, bits, o));
      float largest = __uint_as_float(bits);
      bool tiny = largest < 1e-30f;
      float inverse = tiny ? 0.0f : __fdiv_rn(most, largest);
      if (lane == 0) ((float*)(out + cache_scales(latent)))[run] = tiny ? 0.0f : __fdiv_rn(largest, most);
      for (int i = run * 128 + lane; i < min(latent, run * 128 + 128); i += 32) {
        float v = __fmul_rn(row[i], inverse);
        out[i] = format == CACHE_FP8 ? e4m3_code(v) : (uint8_t)(int8_t)max(-127, min(127, __float2int_rn(v)));
      }
    }
    for (int i = latent + threadIdx.x; i < cache_scales(latent); i += blockDim.x) out[i] = 0;
    __nv_bfloat16* tail = (__nv_bfloat16*)(out + cache_rope(latent));
    for (int i = threadIdx.x; i < rope; i += blockDim.x) tail[i] = __float2bfloat16_rn(row[latent + i]);
  }
}
