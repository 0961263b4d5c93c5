// Storage formats of weights, one value at a time. What is read back equals `blocks.rs` of the crate tensor bit by bit:
// products are rounded before they are added, so no multiply-add is fused here.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

// The order of `DType::ALL`.
enum Format { F32, F16, BF16, F8E4M3, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2K, Q3K, Q4K, Q5K, Q6K, IQ4_NL, IQ4_XS, MXFP4, INT4 };

// A weight as stored; the host writes these 32 bytes.
struct Matrix {
  const uint8_t* data;
  // FP8: F32 per 128x128 block. INT4: BF16 per 32 columns.
  const uint8_t* scales;
  int format, rows, cols, row_bytes;
};

static __device__ const int8_t IQ4_VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
static __device__ const int8_t E2M1_DOUBLED[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

__device__ __forceinline__ float bf16_bits(uint32_t bits) { return __uint_as_float(bits << 16); }
__device__ __forceinline__ float half_at(const uint8_t* b) {
  return __half2float(__ushort_as_half((unsigned short)(b[0] | b[1] << 8)));
}
__device__ __forceinline__ uint32_t word_at(const uint8_t* b) {
  return b[0] | b[1] << 8 | b[2] << 16 | (uint32_t)b[3] << 24;
}
// FP8 E4M3 "fn": shifted into a half, whose exponent has another bias; NaN stays NaN.
__device__ __forceinline__ float e4m3(uint32_t code) {
  uint32_t bits = (code & 0x80) << 24 | (code & 0x7f) << 20;
  float v = __uint_as_float(bits) * 0x1p120f;
  return (code & 0x7f) == 0x7f ? __uint_as_float(0x7fc00000) : v;
}
__device__ __forceinline__ int nibble(const uint8_t* q, int i) { return q[i & 15] >> (i >> 4 << 2) & 15; }
// Q4_K, Q5_K: the 6 bits of scale and minimum of sub-block j.
__device__ __forceinline__ void factors_of_6_bits(const uint8_t* s, int j, int& scale, int& least) {
  if (j < 4) {
    scale = s[j] & 63;
    least = s[j + 4] & 63;
  } else {
    scale = (s[j + 4] & 15) | s[j - 4] >> 6 << 4;
    least = s[j + 4] >> 4 | s[j] >> 6 << 4;
  }
}
__device__ __forceinline__ float from_line(float d, int scale, int q, float dmin, int least) {
  return __fsub_rn(__fmul_rn(__fmul_rn(d, (float)scale), (float)q), __fmul_rn(dmin, (float)least));
}

// Column k of the row that begins at `p`.
template <int FORMAT>
__device__ __forceinline__ float value(const Matrix& m, const uint8_t* p, int row, int k) {
  if constexpr (FORMAT == F32) return ((const float*)p)[k];
  if constexpr (FORMAT == F16) return __half2float(((const __half*)p)[k]);
  if constexpr (FORMAT == BF16) return bf16_bits(((const uint16_t*)p)[k]);
  if constexpr (FORMAT == F8E4M3) {
    int grid = (m.cols + 127) >> 7;
    return __fmul_rn(e4m3(p[k]), ((const float*)m.scales)[(size_t)(row >> 7) * grid + (k >> 7)]);
  }
  if constexpr (FORMAT == INT4) {
    float scale = bf16_bits(((const uint16_t*)m.scales)[(size_t)row * (m.cols >> 5) + (k >> 5)]);
    return __fmul_rn(scale, (float)(p[k >> 1] >> ((k & 1) << 2) & 15) - 8.0f);
  }
  if constexpr (FORMAT == Q8_0 || FORMAT == Q4_0 || FORMAT == Q4_1 || FORMAT == Q5_0 || FORMAT == Q5_1 ||
                FORMAT == IQ4_NL || FORMAT == MXFP4) {
    constexpr int bytes = FORMAT == Q8_0 ? 34 : FORMAT == Q4_1 ? 20 : FORMAT == Q5_0 ? 22 : FORMAT == Q5_1 ? 24 : FORMAT == MXFP4 ? 17 : 18;
    const uint8_t* b = p + (size_t)(k >> 5) * bytes;
    int i = k & 31;
    if constexpr (FORMAT == MXFP4) {
      uint32_t e = b[0];
      float d = e < 2 ? __uint_as_float(0x00200000u << e) : __uint_as_float((e - 1) << 23);
      return __fmul_rn(d, (float)E2M1_DOUBLED[nibble(b + 1, i)]);
    }
    float d = half_at(b);
    if constexpr (FORMAT == Q8_0) return __fmul_rn(d, (float)(int8_t)b[2 + i]);
    if constexpr (FORMAT == Q4_0) return __fmul_rn(d, (float)nibble(b + 2, i) - 8.0f);
    if constexpr (FORMAT == IQ4_NL) return __fmul_rn(d, (float)IQ4_VALUES[nibble(b + 2, i)]);
    if constexpr (FORMAT == Q4_1) return __fadd_rn(__fmul_rn(d, (float)nibble(b + 4, i)), half_at(b + 2));
    if constexpr (FORMAT == Q5_0) {
      int code = nibble(b + 6, i) | (word_at(b + 2) >> i & 1) << 4;
      return __fmul_rn(d, (float)code - 16.0f);
    }
    if constexpr (FORMAT == Q5_1) {
      int code = nibble(b + 8, i) | (word_at(b + 4) >> i & 1) << 4;
      return __fadd_rn(__fmul_rn(d, (float)code), half_at(b + 2));
    }
  }
  constexpr int bytes = FORMAT == Q2K ? 84 : FORMAT == Q3K ? 110 : FORMAT == Q4K ? 144 : FORMAT == Q5K ? 176 : FORMAT == Q6K ? 210 : 136;
  const uint8_t* b = p + (size_t)(k >> 8) * bytes;
  int i = k & 255;
  if constexpr (FORMAT == Q2K) {
    int j = i >> 4, at = (j >> 3) * 32 + (j & 1) * 16 + (i & 15), shift = (j & 7) >> 1 << 1;
    return from_line(half_at(b + 80), b[j] & 15, b[16 + at] >> shift & 3, half_at(b + 82), b[j] >> 4);
  }
  if constexpr (FORMAT == Q3K) {
    int j = i >> 4, l = i & 15, at = (j >> 3) * 32 + (j & 1) * 16 + l, shift = (j & 7) >> 1 << 1;
    const uint8_t* s = b + 96;
    int factor = (s[j & 7] >> (j >> 3 << 2) & 15) | (s[8 + (j & 3)] >> (j >> 2 << 1) & 3) << 4;
    int high = b[(j & 1) * 16 + l] >> (j >> 1) & 1;
    int code = (b[32 + at] >> shift & 3) | high << 2;
    return __fmul_rn(__fmul_rn(half_at(b + 108), (float)factor - 32.0f), (float)code - 4.0f);
  }
  if constexpr (FORMAT == Q4K || FORMAT == Q5K) {
    int j = i >> 5, l = i & 31, scale, least;
    factors_of_6_bits(b + 4, j, scale, least);
    constexpr int q = FORMAT == Q4K ? 16 : 48;
    int code = b[q + (j >> 1) * 32 + l] >> ((j & 1) << 2) & 15;
    if constexpr (FORMAT == Q5K) code |= (b[16 + l] >> j & 1) << 4;
    return from_line(half_at(b), scale, code, half_at(b + 2), least);
  }
  if constexpr (FORMAT == Q6K) {
    int part = i >> 7, quarter = (i & 127) >> 5, l = i & 31;
    int low = b[part * 64 + (quarter & 1) * 32 + l] >> (quarter >> 1 << 2) & 15;
    int high = b[128 + part * 32 + l] >> (quarter << 1) & 3;
    float d = __fmul_rn(half_at(b + 208), (float)(int8_t)b[192 + (i >> 4)]);
    return __fmul_rn(d, (float)(low | high << 4) - 32.0f);
  }
  if constexpr (FORMAT == IQ4_XS) {
    int j = i >> 5;
    int high = b[2] | b[3] << 8;
    int factor = (b[4 + (j >> 1)] >> ((j & 1) << 2) & 15) | (high >> (2 * j) & 3) << 4;
    float d = __fmul_rn(half_at(b), (float)factor - 32.0f);
    return __fmul_rn(d, (float)IQ4_VALUES[nibble(b + 8 + 16 * j, i & 31)]);
  }
}

// Calls `body<FORMAT>(...)` for the format of a matrix.
#define FOR_FORMAT(format, CALL)                                                                                    \
  switch (format) {                                                                                                 \
    case F32: CALL(F32); break;                                                                                     \
    case F16: CALL(F16); break;                                                                                     \
    case BF16: CALL(BF16); break;                                                                                   \
    case F8E4M3: CALL(F8E4M3); break;                                                                               \
    case Q8_0: CALL(Q8_0); break;                                                                                   \
    case Q4_0: CALL(Q4_0); break;                                                                                   \
    case Q4_1: CALL(Q4_1); break;                                                                                   \
    case Q5_0: CALL(Q5_0); break;                                                                                   \
    case Q5_1: CALL(Q5_1); break;                                                                                   \
    case Q2K: CALL(Q2K); break;                                                                                     \
    case Q3K: CALL(Q3K); break;                                                                                     \
    case Q4K: CALL(Q4K); break;                                                                                     \
    case Q5K: CALL(Q5K); break;                                                                                     \
    case Q6K: CALL(Q6K); break;                                                                                     \
    case IQ4_NL: CALL(IQ4_NL); break;                                                                               \
    case IQ4_XS: CALL(IQ4_XS); break;                                                                               \
    case MXFP4: CALL(MXFP4); break;                                                                                 \
    case INT4: CALL(INT4); break;                                                                                   \
  }
