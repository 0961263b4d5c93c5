// What plain and native kernels share.
#pragma once
#include "cache.cuh"

// Every kernel begins with this: on Hopper the next kernel may be put in place while this one runs, and this one waits
// here until those before it are done. Without it a kernel would read what is not written yet.
__device__ __forceinline__ void begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n\tgriddepcontrol.wait;" ::: "memory");
#endif
}

// As `begin`, but the next kernel is put in place only when those before this one are done: what they wrote may be read by
// the next kernel before its own `begin`.
__device__ __forceinline__ void begin_in_order() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n\tgriddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// `step` arrays that the host uploads in begin_step.
struct Step {
  const int* tokens;     // [T]
  const int* positions;  // [T]
  const int* tables;     // [T]: where the row's block table begins in `blocks`
  const int* blocks;
};

__device__ __forceinline__ float warp_sum(float v) {
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
  return v;
}

// The sum over all threads of the block; `room` has a float per warp.
__device__ float block_sum(float v, float* room) {
  v = warp_sum(v);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) room[threadIdx.x >> 5] = v;
  __syncthreads();
  float sum = 0;
  for (int w = 0; w < blockDim.x >> 5; w++) sum += room[w];
  return sum;
}

// What is asked of shared memory with cp.async is waited for in groups.
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

__device__ __forceinline__ float silu(float z) { return z / (1.0f + expf(-z)); }

// Tokens that one expert serves at a time.
struct Tile {
  int expert, first, count, unused;
};

// Column k of a row, whatever the format.
__device__ float any_value(const Matrix& m, const uint8_t* p, int row, int k) {
  float v = 0;
#define VALUE(FORMAT) v = value<FORMAT>(m, p, row, k)
  FOR_FORMAT(m.format, VALUE)
#undef VALUE
  return v;
}
