// What the kernels of products multiply: which rows of which weights with which tokens, and where the results go.
#pragma once
#include "native.cu"

// Two matrices of equal shape, or the same one twice, whose rows are multiplied with the same tokens.
struct Source {
  const uint8_t* data[2];
  const float* scales[2];
  int rows, row_bytes, cols;

  __device__ __forceinline__ Source(const Matrix& a, const Matrix& b)
      : data{a.data, b.data}, scales{(const float*)a.scales, (const float*)b.scales}, rows(a.rows), row_bytes(a.row_bytes), cols(a.cols) {}
  __device__ __forceinline__ Source(const __nv_bfloat16* m, int rows, int cols)
      : data{(const uint8_t*)m, (const uint8_t*)m}, scales{}, rows(rows), row_bytes(cols * 2), cols(cols) {}
  __device__ __forceinline__ Source() {}
};

// Tokens of a group: rows `first` and so on of x and of the output, or, with a list, those that it names; the list counts
// in choices, of which each row of x has `choices`.
template <class Out>
struct Tokens {
  const __nv_bfloat16* x;
  Out* out;
  const int* list;
  int x_stride, out_stride, choices, first, count;

  // Row i of x, the last one in place of those behind it.
  __device__ __forceinline__ const __nv_bfloat16* row(int i) const {
    int at = first + min(i, count - 1);
    if (list) at = list[at];
    if (choices > 1) at /= choices;
    return x + (size_t)at * x_stride;
  }
  __device__ __forceinline__ Out* out_row(int i) const {
    if (i >= count) return nullptr;
    int at = list ? list[first + i] : first + i;
    return out + (size_t)at * out_stride;
  }
};

// A tile of STEP rows of the first matrix stands beside as many that lie OFFSET rows further in the second. Blocks of
// rows are counted from the first group's on: those of early groups are known before the kernels in front are done.

// One product, or two of the same rows of x with weights of equally many columns: a group each, for `width` tokens.
struct Products {
  using Out = float;
  static constexpr int STEP = 16, OFFSET = 8, COLUMNS = 16;
  const Matrix *a, *b;
  const __nv_bfloat16* x;
  float *out_a, *out_b;
  int count, add, width, early_groups, early_blocks, late_blocks;

  // `tiles` of STEP rows are a block's.
  __device__ __forceinline__ Products(const Matrix* a, const Matrix* b, const __nv_bfloat16* x, float* out_a, float* out_b, int count, int add, int width, int tiles)
      : a(a), b(b), x(x), out_a(out_a), out_b(out_b), count(count), add(add), width(width), early_groups(1) {
    int step = STEP * tiles;
    early_blocks = (a->rows + step - 1) / step;
    late_blocks = b ? (b->rows + step - 1) / step : 0;
  }
  __device__ __forceinline__ int late_groups() const { return late_blocks > 0; }
  __device__ __forceinline__ Source source(int group) const { return group & 1 ? Source(*b, *b) : Source(*a, *a); }
  __device__ __forceinline__ Tokens<float> tokens(int group) const {
    int first = (group >> 1) * width, rows = group & 1 ? b->rows : a->rows;
    return {x, group & 1 ? out_b : out_a, nullptr, a->cols, rows, 1, first, min(width, count - first)};
  }
  __device__ __forceinline__ void put(float* to, float y) const { *to = add ? *to + y : y; }
};

// Groups of tokens that choose the same expert, and before them, because they are known early, those of an expert that
// all tokens share.
struct Experts {
  const Matrix* experts;
  const Tile* groups;
  const int* list;
  int count, width, early_groups, early_blocks, late_blocks;

  __device__ __forceinline__ Experts(const Matrix* experts, const Tile* groups, const int* list, int count, int shared_rows, int rows, int width, int step)
      : experts(experts), groups(groups), list(list), count(count), width(width), early_groups(shared_rows ? (count + width - 1) / width : 0),
        early_blocks((shared_rows + step - 1) / step), late_blocks((rows + step - 1) / step) {}
  __device__ __forceinline__ bool shared(int group) const { return group < early_groups; }
  __device__ __forceinline__ Tile tokens_of(int group) const {
    if (shared(group)) return {0, group * width, min(width, count - group * width), 0};
    return groups[1 + group - early_groups];
  }
  __device__ __forceinline__ int late_groups() const { return groups ? groups[0].first : 0; }
};

// inner = silu(gate x) * up x: a tile is eight rows of each.
struct Inner : Experts {
  using Out = __nv_bfloat16;
  static constexpr int STEP = 8, OFFSET = 0, COLUMNS = 8;
  Matrix gate, up;
  const __nv_bfloat16* x;
  __nv_bfloat16 *inner, *shared_inner;
  int top_k, inner_max, cols;

  __device__ __forceinline__ Inner(const Matrix* experts, const Tile* groups, const int* list, int top_k, const __nv_bfloat16* x, __nv_bfloat16* inner, int inner_max,
                                   const Matrix& gate, const Matrix& up, __nv_bfloat16* shared_inner, int count, int cols, int width, int tiles)
      : Experts(experts, groups, list, count, gate.rows, inner_max, width, STEP * tiles), gate(gate), up(up), x(x), inner(inner), shared_inner(shared_inner),
        top_k(top_k), inner_max(inner_max), cols(cols) {}
  __device__ __forceinline__ Source source(int group) const {
    if (shared(group)) return Source(gate, up);
    const Matrix* e = experts + 3 * tokens_of(group).expert;
    return Source(e[0], e[1]);
  }
  __device__ __forceinline__ Tokens<Out> tokens(int group) const {
    Tile own = tokens_of(group);
    if (shared(group)) return {x, shared_inner, nullptr, cols, gate.rows, 1, own.first, own.count};
    return {x, inner, list, cols, inner_max, top_k, own.first, own.count};
  }
  __device__ __forceinline__ void put(__nv_bfloat16* to, float z, float u) const { *to = __float2bfloat16_rn(silu(z) * u); }
};

// y = down(inner) of each choice and of the shared expert, F32 `[choices + count, rows]`.
struct Outer : Experts {
  using Out = float;
  static constexpr int STEP = 16, OFFSET = 8, COLUMNS = 16;
  Matrix down;
  const __nv_bfloat16 *inner, *shared_inner;
  float* y;
  int inner_max, choices, rows;

  __device__ __forceinline__ Outer(const Matrix* experts, const Tile* groups, const int* list, const __nv_bfloat16* inner, int inner_max, const Matrix& down,
                                   const __nv_bfloat16* shared_inner, float* y, int choices, int count, int rows, int width, int tiles)
      : Experts(experts, groups, list, count, down.rows, rows, width, STEP * tiles), down(down), inner(inner), shared_inner(shared_inner), y(y),
        inner_max(inner_max), choices(choices), rows(rows) {}
  __device__ __forceinline__ Source source(int group) const {
    if (shared(group)) return Source(down, down);
    const Matrix& m = experts[3 * tokens_of(group).expert + 2];
    return Source(m, m);
  }
  __device__ __forceinline__ Tokens<float> tokens(int group) const {
    Tile own = tokens_of(group);
    if (shared(group)) return {shared_inner, y + (size_t)choices * rows, nullptr, down.cols, rows, 1, own.first, own.count};
    return {inner, y, list, inner_max, rows, 1, own.first, own.count};
  }
  __device__ __forceinline__ void put(float* to, float y) const { *to = y; }
};

// A matrix or, in place of none, an empty one.
__device__ __forceinline__ Matrix matrix_or_none(const Matrix* m) { return m ? *m : Matrix{}; }

// Floats between two tokens of a part's sums: no two lanes meet in a bank.
constexpr int TOKEN_STRIDE = 20;
// A value of the sums: the eight parts in order.
template <int NT>
__device__ __forceinline__ float streamed(const float* room, int token, int row) {
  float sum = 0;
#pragma unroll
  for (int w = 0; w < WARPS; w++) sum += room[(w * NT * 8 + token) * TOKEN_STRIDE + row];
  return sum;
}
