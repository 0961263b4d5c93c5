// Products for many tokens on the tensor cores: a block makes tiles of 128 rows of weights by NT tokens. One warpgroup
// brings 64 columns at a time of both into a ring in shared memory, two others multiply: wgmma on Hopper, mma.sync
// elsewhere.
//
// The sums are those of `stream.cu`, bit by bit: a row must not depend on how many rows stand beside it, or a prompt
// computed again after preemption, or found in the prefix cache, would not be the one that was computed first. Hence
// the eight parts of the columns, each summed from zero, and the same 16 columns in each product of the tensor cores:
// within those 16 their order is of no matter, they are added at once. With BF16 weights they follow each other; with FP8
// the columns of x lie in shared memory in the order in which the lanes of `add_run` take them, in pieces of four.
#pragma once
#include "work.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// Tokens of a wide tile, by format: what registers are there for the sums.
constexpr int WIDE_BF16 = 128, WIDE_FP8 = 96;
constexpr int GEMM_STAGES = 6;
#else
constexpr int WIDE_BF16 = 96, WIDE_FP8 = 64;
constexpr int GEMM_STAGES = 3;
#endif
constexpr int NARROW = 64;
constexpr int GEMM_ROWS = 128, GEMM_COLUMNS = 64, GEMM_THREADS = 384;
// Stages that are under way while the one before them is handed over.
constexpr int GEMM_LAG = GEMM_STAGES - 2;

// A barrier in shared memory that counts arrivals; `parity` of the phase to wait for.
__device__ __forceinline__ void barrier_init(uint64_t* b, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* b) {
  asm volatile("{.reg .b64 s; mbarrier.arrive.shared.b64 s, [%0];}" ::"r"(shared_address(b)) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint64_t* b, int parity) {
  asm volatile(
      "{.reg .pred p;\n"
      "again:\n"
#if __CUDA_ARCH__ >= 900
      "mbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n"
#else
      "mbarrier.test_wait.parity.shared.b64 p, [%0], %1;\n"
#endif
      "@!p bra again;}" ::"r"(shared_address(b)),
      "r"(parity)
      : "memory");
}

// Where a stage is in the ring, and which phase of its barriers is next.
struct Slot {
  int at = 0, parity = 0;
  __device__ __forceinline__ void step() {
    if (++at == GEMM_STAGES) {
      at = 0;
      parity ^= 1;
    }
  }
};

// Weights as stored, then the columns of x: 128 bytes a token, its 16-byte chunks swapped by the token's last three bits.
template <int FORMAT, int NT>
struct Stage {
  static constexpr int WEIGHT_ROW_BYTES = FORMAT == BF16 ? 128 : 64;
  static constexpr int WEIGHTS = GEMM_ROWS * WEIGHT_ROW_BYTES, BYTES = WEIGHTS + NT * 128;
};

// Where a piece of x goes in its row of 128 bytes: BF16 pieces of eight columns stay, FP8 pieces of four are turned, for a
// lane of `add_run` has 16 columns and multiplies four of them at a time.
template <int FORMAT>
struct Pieces {
  static constexpr int BYTES = FORMAT == BF16 ? 16 : 8, OF_ROW = 128 / BYTES, ROWS = 128 / OF_ROW;
  __device__ __forceinline__ static int place(int piece) { return FORMAT == BF16 ? piece * 16 : ((piece & 3) * 4 + (piece >> 2)) * 8; }
};
template <int BYTES>
__device__ __forceinline__ void copy_async(uint32_t to, const void* from) {
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ int gemm_jobs(const Products& w) { return (w.count + w.width - 1) / w.width * (w.early_blocks + w.late_blocks); }
__device__ __forceinline__ void gemm_job(const Products& w, int i, int& group, int& block) {
  int blocks = w.early_blocks + w.late_blocks;
  block = i % blocks;
  group = i / blocks * 2 + (block >= w.early_blocks);
  if (group & 1) block -= w.early_blocks;
}
__device__ __forceinline__ int gemm_jobs(const Experts& w) { return w.early_groups * w.early_blocks + w.late_groups() * w.late_blocks; }
__device__ __forceinline__ void gemm_job(const Experts& w, int i, int& group, int& block) {
  int early = w.early_groups * w.early_blocks, blocks = i < early ? w.early_blocks : w.late_blocks;
  if (i >= early) i -= early;
  else early = -1;
  group = i / blocks + (early < 0 ? 0 : w.early_groups);
  block = i % blocks;
}

// Row r of a tile is one of two matrices: eight rows of the first, eight of the second, and so on.
template <class Work>
__device__ __forceinline__ const uint8_t* weight_row(const Source& source, int block, int r) {
  int h = r >> 3 & 1, row = block * 8 * Work::STEP + (r >> 4) * Work::STEP + h * Work::OFFSET + (r & 7);
  return (h ? source.data[1] : source.data[0]) + (size_t)min(row, source.rows - 1) * source.row_bytes;
}

// What the 128 threads of a warpgroup bring: a stage's weights and x, and the stages that are under way.
template <int FORMAT, int NT>
struct Bringer {
  using S = Stage<FORMAT, NT>;
  using P = Pieces<FORMAT>;
  uint32_t ring, to_x;
  uint64_t *full, *empty;
  int thread, piece, own, under_way = 0;
  Slot slot, late;
  const uint8_t* x;
  // In pieces from the first token of this thread.
  int xs[NT / P::ROWS];

  __device__ __forceinline__ Bringer(uint32_t ring, uint64_t* full, uint64_t* empty)
      : ring(ring), full(full), empty(empty), thread(threadIdx.x), piece(thread % P::OF_ROW), own(thread / P::OF_ROW) {
    int place = P::place(piece);
    to_x = S::WEIGHTS + own * 128 + (((place >> 4) ^ (own & 7)) << 4) + (place & 8);
  }
  template <class Out>
  __device__ __forceinline__ void open(const Tokens<Out>& tokens) {
    x = (const uint8_t*)tokens.row(own);
#pragma unroll
    for (int j = 0; j < NT / P::ROWS; j++) xs[j] = (int)(((const uint8_t*)tokens.row(j * P::ROWS + own) - x) / P::BYTES);
  }
  template <class Work>
  __device__ __forceinline__ void weights(const Source& source, int block, int k, int slot_at) {
    uint32_t stage = ring + slot_at * S::BYTES;
    if constexpr (FORMAT == BF16) {
#pragma unroll
      for (int r = 0; r < GEMM_ROWS; r += P::ROWS)
        copy_async<16>(stage + to_x - S::WEIGHTS + r * 128, weight_row<Work>(source, block, r + own) + k * 2 + piece * 16);
    } else {
#pragma unroll
      for (int r = thread >> 2; r < GEMM_ROWS; r += 32)
        copy_async<16>(stage + r * 64 + (thread & 3) * 16, weight_row<Work>(source, block, r) + k + (thread & 3) * 16);
    }
  }
  // x of the stage whose weights were asked for; what is far enough behind is handed over.
  __device__ __forceinline__ void rest(int k) {
    uint32_t stage = ring + slot.at * S::BYTES;
#pragma unroll
    for (int j = 0; j < NT / P::ROWS; j++) copy_async<P::BYTES>(stage + to_x + j * P::ROWS * 128, x + ((int64_t)xs[j] * P::BYTES + piece * P::BYTES + k * 2));
    commit();
    slot.step();
    if (++under_way > GEMM_LAG) {
      asm volatile("cp.async.wait_group %0;" ::"n"(GEMM_LAG) : "memory");
      hand_over();
    }
  }
  __device__ __forceinline__ void hand_over() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
    barrier_arrive(&full[late.at]);
    late.step();
    under_way--;
  }
  __device__ __forceinline__ void close() {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    while (under_way) hand_over();
  }
};

// Brings all stages of all tiles of this block.
template <int FORMAT, int NT, class Work>
__device__ __forceinline__ void bring_tiles(const Work& work, uint32_t ring, uint64_t* full, uint64_t* empty) {
  Bringer<FORMAT, NT> bringer(ring, full, empty);
  int jobs = gemm_jobs(work);
#pragma unroll 1
  for (int i = blockIdx.x; i < jobs; i += gridDim.x) {
    int group, block;
    gemm_job(work, i, group, block);
    Source source = work.source(group);
    bringer.open(work.tokens(group));
#pragma unroll 1
    for (int k = 0; k < source.cols; k += GEMM_COLUMNS) {
      barrier_wait(&empty[bringer.slot.at], bringer.slot.parity ^ 1);
      bringer.template weights<Work>(source, block, k, bringer.slot.at);
      bringer.rest(k);
    }
  }
  bringer.close();
}

// This lane's part of FP8 weights as a product of 16 columns wants it: rows g and g + 8 of this warp's 16. Lane t has
// columns 2t, 2t + 1, 2t + 8 and 2t + 9 of 16: half of a piece of four columns and half of another, which lies 32
// columns further. A word is such a piece; four of them follow each other.
template <class Word>
struct Codes {
  Word low[2], high[2];

  __device__ __forceinline__ void load(const uint8_t* weights, int row, int step) {
    int t = threadIdx.x & 3;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const uint8_t* p = weights + (row + h * 8) * 64 + (t >> 1) * 16 + step * 4;
      low[h] = *(const Word*)p;
      high[h] = *(const Word*)(p + 32);
    }
  }
  __device__ __forceinline__ void step(int s, uint32_t* a) const {
    uint32_t pick = threadIdx.x & 1 ? picked(2, 3) : picked(0, 1);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      a[h] = bf16_pair(((const uint32_t*)&low[h])[s], pick);
      a[h + 2] = bf16_pair(((const uint32_t*)&high[h])[s], pick);
    }
  }
};

template <int N>
__device__ __forceinline__ void fill(float (&sums)[N][4]) {
#pragma unroll
  for (int j = 0; j < N; j++)
#pragma unroll
    for (int c = 0; c < 4; c++) sums[j][c] = 0;
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SUMS4(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define SUMS16(j) SUMS4(j), SUMS4(j + 1), SUMS4(j + 2), SUMS4(j + 3)
#define SUMS32(j) SUMS16(j), SUMS16(j + 4)
#define NAMES32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES48 NAMES32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define NAMES64 NAMES48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
// d = A B + (add ? d : 0): A of 64 rows from shared memory or from registers, B of N tokens, 16 columns.
#define WGMMA_SHARED(N, NAMES, SUMS, A, B, ADD)                                                                                \
  __device__ __forceinline__ void wgmma(float (&d)[N / 8][4], uint64_t a, uint64_t b, int add) {                       \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %" ADD ", 0;\n"                                                        \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" NAMES "}, %" A ", %" B ", p, 1, 1, 0, 0;}" \
                 : SUMS                                                                                                \
                 : "l"(a), "l"(b), "r"(add));                                                                          \
  }
#define WGMMA_REGISTERS(N, NAMES, SUMS, A, B, ADD)                                                                      \
  __device__ __forceinline__ void wgmma(float (&d)[N / 8][4], const uint32_t* a, uint64_t b, int add) {                \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %" ADD ", 0;\n"                                                        \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" NAMES "}, {" A "}, %" B ", p, 1, 1, 0;}" \
                 : SUMS                                                                                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                                      \
  }
#define SUMS48 SUMS32(0), SUMS16(8)
#define SUMS64 SUMS32(0), SUMS32(8)
WGMMA_SHARED(64, NAMES32, SUMS32(0), "32", "33", "34")
WGMMA_SHARED(128, NAMES64, SUMS64, "64", "65", "66")
WGMMA_REGISTERS(64, NAMES32, SUMS32(0), "%32,%33,%34,%35", "36", "37")
WGMMA_REGISTERS(96, NAMES48, SUMS48, "%48,%49,%50,%51", "52", "53")

// Rows of 128 bytes whose chunks are swapped; eight of them are 1,024 bytes.
__device__ __forceinline__ uint64_t descriptor(uint32_t address) { return (uint64_t)1 << 62 | (uint64_t)64 << 32 | (uint64_t)1 << 16 | (address & 0x3ffff) >> 4; }
#endif

// The sums of one stage: from zero, or added to `sums`. On Hopper they are there only after `multiplied`.
template <int FORMAT, int NT>
__device__ __forceinline__ void multiply_stage(const uint8_t* weights, const uint8_t* x, float (&sums)[NT / 8][4], bool first) {
  int warp = (threadIdx.x >> 5) - 4, lane = threadIdx.x & 31;
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  uint64_t b = descriptor(shared_address(x));
  if constexpr (FORMAT == BF16) {
    uint64_t a = descriptor(shared_address(weights + (warp >> 2) * 64 * 128));
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int s = 0; s < 4; s++) wgmma(sums, a + s * 2, b + s * 2, !first || s);
  } else {
    Codes<uint4> codes;
    codes.load(weights, warp * 16 + (lane >> 2), 0);
    uint32_t a[4][4];
#pragma unroll
    for (int s = 0; s < 4; s++) codes.step(s, a[s]);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int s = 0; s < 4; s++) wgmma(sums, a[s], b + s * 2, !first || s);
  }
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  if (first) fill(sums);
  // Lanes 8i to 8i + 7 name the rows of the i-th of four matrices of 8 rows by 16 bytes.
  int row = lane & 7, matrix = lane >> 3;
#pragma unroll 1
  for (int s = 0; s < 4; s++) {
    uint32_t a[4];
    if constexpr (FORMAT == BF16) {
      uint32_t at = shared_address(weights) + (warp * 16 + (matrix & 1) * 8 + row) * 128 + (((s * 2 + (matrix >> 1)) ^ row) << 4);
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(at));
    } else {
      Codes<uint32_t> codes;
      codes.load(weights, warp * 16 + (lane >> 2), s);
      codes.step(0, a);
    }
#pragma unroll
    for (int j = 0; j < NT / 8; j += 2) {
      uint32_t b[4], at = shared_address(x) + ((j + (matrix >> 1)) * 8 + row) * 128 + (((s * 2 + (matrix & 1)) ^ row) << 4);
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(at));
      mma(sums[j], a, b[0], b[1]);
      mma(sums[j + 1], a, b[2], b[3]);
    }
  }
#endif
}
// Waits until at most PENDING stages are still being multiplied.
template <int PENDING>
__device__ __forceinline__ void multiplied() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
#endif
}

// The columns of a part: from run to run.
__device__ __forceinline__ void part_of(int cols, int part, int& from, int& to) {
  int runs = (cols + RUN - 1) / RUN;
  from = runs * part / WARPS;
  to = runs * (part + 1) / WARPS;
}

// Parts `first` to `last` of a tile's columns, one after the other: `take(part, sums)` gets each that is not empty.
template <int FORMAT, int NT, class Take>
__device__ __forceinline__ void multiply_parts(const Source& source, int row, int first, int last, uint8_t* ring, uint64_t* full, uint64_t* empty, Slot& slot,
                                               const Take& take) {
  using S = Stage<FORMAT, NT>;
  int lane = threadIdx.x & 31, stages = source.cols / GEMM_COLUMNS, runs = (source.cols + RUN - 1) / RUN;
  const float* scales[2] = {};
  if constexpr (FORMAT != BF16) {
#pragma unroll
    for (int h = 0; h < 2; h++) scales[h] = source.scales[h] + (size_t)(min(row, source.rows - 1) >> 7) * runs;
  }
  int given = slot.at;
  auto give_back = [&] {
    __syncwarp();
    if (lane == 0) barrier_arrive(&empty[given]);
    given = given + 1 == GEMM_STAGES ? 0 : given + 1;
  };
  auto next = [&](float(&sums)[NT / 8][4], bool first) {
    barrier_wait(&full[slot.at], slot.parity);
    const uint8_t* stage = ring + slot.at * S::BYTES;
    multiply_stage<FORMAT, NT>(stage, stage + S::WEIGHTS, sums, first);
    slot.step();
  };
  float sums[NT / 8][4];
#pragma unroll 1
  for (int part = first; part < last; part++) {
    int from, to;
    part_of(source.cols, part, from, to);
    if (from == to) continue;
    if constexpr (FORMAT == BF16) {
      int n = min(2 * to, stages) - 2 * from;
      next(sums, true);
#pragma unroll 1
      for (int s = 1; s < n; s++) {
        next(sums, false);
        multiplied<1>();
        give_back();
      }
      multiplied<0>();
      give_back();
      take(part, sums);
    } else {
      float of_part[NT / 8][4];
      fill(of_part);
#pragma unroll 1
      for (int run = from; run < to; run++) {
        float scale[2] = {scales[0][run], scales[1][run]};
        next(sums, true);
        if (2 * run + 1 < stages) {
          next(sums, false);
          multiplied<1>();
          give_back();
        }
        multiplied<0>();
        give_back();
#pragma unroll
        for (int j = 0; j < NT / 8; j++)
#pragma unroll
          for (int c = 0; c < 4; c++) of_part[j][c] = fmaf(sums[j][c], scale[c >> 1], of_part[j][c]);
      }
      take(part, of_part);
    }
  }
}

template <int FORMAT, int NT, class Work>
__device__ __forceinline__ void multiply_tiles(const Work& work, uint8_t* ring, uint64_t* full, uint64_t* empty) {
  int warp = (threadIdx.x >> 5) - 4, g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3, jobs = gemm_jobs(work);
  Slot slot;
#pragma unroll 1
  for (int i = blockIdx.x; i < jobs; i += gridDim.x) {
    int group, block;
    gemm_job(work, i, group, block);
    Source source = work.source(group);
    float totals[NT / 8][4];
    fill(totals);
    multiply_parts<FORMAT, NT>(source, block * 8 * Work::STEP, 0, WARPS, ring, full, empty, slot, [&](int, const float(&sums)[NT / 8][4]) {
#pragma unroll
      for (int j = 0; j < NT / 8; j++)
#pragma unroll
        for (int c = 0; c < 4; c++) totals[j][c] += sums[j][c];
    });
    int row = block * 8 * Work::STEP + warp * Work::STEP + g;
    auto tokens = work.tokens(group);
#pragma unroll
    for (int j = 0; j < NT / 8; j++)
#pragma unroll
      for (int c = 0; c < 2; c++) {
        auto* out = tokens.out_row(j * 8 + t * 2 + c);
        if (!out) continue;
        if constexpr (Work::OFFSET == 0) {
          if (row < source.rows) work.put(out + row, totals[j][c], totals[j][c + 2]);
        } else {
          if (row < source.rows) work.put(out + row, totals[j][c]);
          if (row + 8 < source.rows) work.put(out + row + 8, totals[j][c + 2]);
        }
      }
  }
}

template <int FORMAT, int NT, class Work>
__device__ __forceinline__ void gemm(const Work& work) {
  extern __shared__ __align__(128) uint8_t bytes[];
  __shared__ uint64_t full[GEMM_STAGES], empty[GEMM_STAGES];
  // wgmma reads rows whose chunks are swapped from multiples of 1,024 bytes.
  uint8_t* ring = bytes + (-shared_address(bytes) & 1023);
  if (threadIdx.x < GEMM_STAGES) {
    barrier_init(&full[threadIdx.x], 128);
    barrier_init(&empty[threadIdx.x], 8);
  }
  __syncthreads();
  if (threadIdx.x < 128) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("setmaxnreg.dec.sync.aligned.u32 104;");
#endif
    bring_tiles<FORMAT, NT>(work, shared_address(ring), full, empty);
  } else {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("setmaxnreg.inc.sync.aligned.u32 200;");
#endif
    multiply_tiles<FORMAT, NT>(work, ring, full, empty);
  }
}

// A product of up to 64 rows by few tiles: the blocks of a cluster divide the parts of a tile's columns, each keeps its
// own, and all add them up in order, some tokens each. Only on Hopper and later.
constexpr int PART_STRIDE = GEMM_ROWS + 4;
template <int FORMAT>
__device__ __forceinline__ void split_gemm(const Products& work) {
#if __CUDA_ARCH__ >= 900
  constexpr int NT = NARROW;
  extern __shared__ __align__(128) uint8_t bytes[];
  __shared__ uint64_t full[GEMM_STAGES], empty[GEMM_STAGES];
  uint8_t* ring = bytes + (-shared_address(bytes) & 1023);
  float* parts = (float*)(ring + GEMM_STAGES * Stage<FORMAT, NT>::BYTES);
  int rank, ranks, group, block;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(ranks));
  int first = WARPS * rank / ranks, last = WARPS * (rank + 1) / ranks, of_rank = WARPS / ranks;
  if (threadIdx.x < GEMM_STAGES) {
    barrier_init(&full[threadIdx.x], 128);
    barrier_init(&empty[threadIdx.x], 8);
  }
  gemm_job(work, blockIdx.x / ranks, group, block);
  Source source = work.source(group);
  __syncthreads();
  if (threadIdx.x < 128) {
    int from, to, other;
    part_of(source.cols, first, from, other);
    part_of(source.cols, last - 1, other, to);
    from *= RUN;
    to = min(to * RUN, source.cols);
    Bringer<FORMAT, NT> bringer(shared_address(ring), full, empty);
    // The first weights while the kernels in front still run.
    int early = from + GEMM_STAGES * GEMM_COLUMNS;
#pragma unroll 1
    for (int k = from; k < min(early, to); k += GEMM_COLUMNS) bringer.template weights<Products>(source, block, k, (k - from) / GEMM_COLUMNS);
    begin();
    bringer.open(work.tokens(group));
#pragma unroll 1
    for (int k = from; k < to; k += GEMM_COLUMNS) {
      if (k >= early) {
        barrier_wait(&empty[bringer.slot.at], bringer.slot.parity ^ 1);
        bringer.template weights<Products>(source, block, k, bringer.slot.at);
      }
      bringer.rest(k);
    }
    bringer.close();
  } else {
    begin();
    int warp = (threadIdx.x >> 5) - 4, g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
    Slot slot;
    multiply_parts<FORMAT, NT>(source, block * GEMM_ROWS, first, last, ring, full, empty, slot, [&](int part, const float(&sums)[NT / 8][4]) {
      float* own = parts + (part - first) * NT * PART_STRIDE + warp * 16 + g;
#pragma unroll
      for (int j = 0; j < NT / 8; j++)
#pragma unroll
        for (int c = 0; c < 4; c++) own[(j * 8 + t * 2 + (c & 1)) * PART_STRIDE + (c >> 1) * 8] = sums[j][c];
    });
  }
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  auto tokens = work.tokens(group);
  int own_tokens = NT / ranks;
  // Four rows of a token at a time: each answer of another block takes long.
  constexpr int FOURS = GEMM_ROWS / 4;
  int runs = (source.cols + RUN - 1) / RUN;
  for (int i = threadIdx.x; i < own_tokens * FOURS; i += GEMM_THREADS) {
    int token = rank * own_tokens + i / FOURS, own = i % FOURS * 4, row = block * GEMM_ROWS + own;
    float* out = tokens.out_row(token);
    if (!out || row >= source.rows) continue;
    float of_part[WARPS][4], sums[4] = {};
#pragma unroll
    for (int part = 0; part < WARPS; part++) {
      float* v = of_part[part];
      asm volatile("{.reg .b32 a; mapa.shared::cluster.u32 a, %4, %5; ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [a];}"
                   : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
                   : "r"(shared_address(parts + ((part % of_rank) * NT + token) * PART_STRIDE + own)), "r"(part / of_rank));
    }
#pragma unroll
    for (int part = 0; part < WARPS; part++)
#pragma unroll
      for (int c = 0; c < 4; c++) sums[c] += runs * part / WARPS < runs * (part + 1) / WARPS ? of_part[part][c] : 0.0f;
    if (source.rows % 4 == 0) {
      float4* to = (float4*)(out + row);
      float4 before = work.add ? *to : make_float4(0, 0, 0, 0);
      *to = work.add ? make_float4(before.x + sums[0], before.y + sums[1], before.z + sums[2], before.w + sums[3]) : make_float4(sums[0], sums[1], sums[2], sums[3]);
    } else {
#pragma unroll
      for (int c = 0; c < 4; c++)
        if (row + c < source.rows) work.put(out + row + c, sums[c]);
    }
  }
  // Nobody leaves while others read its parts.
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  begin();
  __trap();
#endif
}
#define SPLIT_GEMM(suffix, FORMAT)                                                                                     \
  extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 1) product_##suffix(const Matrix* first, const Matrix* second, const __nv_bfloat16* x, float* out, \
                                                                                 float* out_second, int count, int add) { \
    split_gemm<FORMAT>(Products(first, second, x, out, out_second, count, add, NARROW, 8));                            \
  }
SPLIT_GEMM(bf16_split, BF16)
SPLIT_GEMM(fp8_split, F8E4M3)

#define GEMM(suffix, FORMAT, NT)                                                                                       \
  extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 1) product_##suffix(const Matrix* first, const Matrix* second, const __nv_bfloat16* x, float* out, \
                                                                                 float* out_second, int count, int add) { \
    begin();                                                                                                           \
    gemm<FORMAT, NT>(Products(first, second, x, out, out_second, count, add, NT, 8));                             \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 1) inner_##suffix(                                        \
      const Matrix* experts, const Tile* groups, const int* list, int top_k, const __nv_bfloat16* x, __nv_bfloat16* inner, int inner_max, \
      const Matrix* gate, const Matrix* up, __nv_bfloat16* shared_inner, int count, int cols) {                        \
    begin();                                                                                                           \
    gemm<FORMAT, NT>(Inner(experts, groups, list, top_k, x, inner, inner_max, matrix_or_none(gate), matrix_or_none(up), shared_inner, count, cols, NT, 8)); \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 1) outer_##suffix(                                        \
      const Matrix* experts, const Tile* groups, const int* list, const __nv_bfloat16* inner, int inner_max, const Matrix* down, \
      const __nv_bfloat16* shared_inner, float* y, int choices, int count, int rows) {                                 \
    begin();                                                                                                           \
    gemm<FORMAT, NT>(Outer(experts, groups, list, inner, inner_max, matrix_or_none(down), shared_inner, y, choices, count, rows, NT, 8)); \
  }
GEMM(bf16_narrow, BF16, NARROW)
GEMM(bf16_wide, BF16, WIDE_BF16)
GEMM(fp8_narrow, F8E4M3, NARROW)
GEMM(fp8_wide, F8E4M3, WIDE_FP8)
