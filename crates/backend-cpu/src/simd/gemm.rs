//! `y = x * W^T` for weights in any storage format.

use std::marker::PhantomData;

use oxseek_tensor::{DType, HostMatrix, blocks, dtype::FP8_BLOCK};

use super::{Outlined, Simd};

/// Rows of W in one register tile.
const TILE_ROWS: usize = 4;
/// From this many tokens on, weight rows are decoded to F32 once and used for all of them.
const DECODE_TOKENS_MIN: usize = 4;
/// Brings a code that was moved into F32's exponent field back to its value.
const E4M3_SHIFT: f32 = f32::from_bits((120 + 127) << 23);

/// A weight matrix, or F32 rows of any origin, as kernels see it.
#[derive(Clone, Copy)]
pub(crate) struct WeightRef {
    pub(crate) dtype: DType,
    pub(crate) data: *const u8,
    /// Bytes from one row to the next.
    pub(crate) row_bytes: usize,
    pub(crate) cols: usize,
    /// FP8: row-major grid of block scales.
    pub(crate) scales: *const f32,
    /// INT4: a BF16 per 32 columns, row-major.
    group_scales: *const u8,
}

// SAFETY: it only points to weights, which nobody writes.
unsafe impl Send for WeightRef {}
// SAFETY: as above.
unsafe impl Sync for WeightRef {}

impl WeightRef {
    pub(crate) fn new(m: &HostMatrix) -> Self {
        Self {
            dtype: m.dtype(),
            data: m.data().as_ptr(),
            row_bytes: m.row_bytes(),
            cols: m.cols(),
            scales: m.scales().map_or(std::ptr::null(), <[f32]>::as_ptr),
            group_scales: m.group_scales().map_or(std::ptr::null(), <[u8]>::as_ptr),
        }
    }

    /// F32 rows of `cols` values, `stride` values apart.
    pub(crate) fn rows_of(data: *const f32, cols: usize, stride: usize) -> Self {
        let (scales, group_scales) = (std::ptr::null(), std::ptr::null());
        Self { dtype: DType::F32, data: data.cast(), row_bytes: stride * 4, cols, scales, group_scales }
    }

    /// # Safety
    /// FP8, and `row` and block column `block` inside the matrix.
    #[inline(always)]
    unsafe fn scale(&self, row: usize, block: usize) -> f32 {
        // SAFETY: the grid has ceil(cols / 128) columns and the caller's row and block lie inside.
        unsafe { *self.scales.add(row / FP8_BLOCK * self.cols.div_ceil(FP8_BLOCK) + block) }
    }
}

/// What becomes of `y`.
#[derive(Clone, Copy)]
pub(crate) enum Output<'a> {
    Store,
    Add,
    /// `out += weights[i] * y` for the i-th token of the call.
    AddScaled(&'a [f32]),
}

/// Rows `rows` of W times the listed rows of x.
///
/// # Safety (of the kernel)
/// `w` has the rows; each of `tokens` is a row of `x` (`w.cols` values, `x_stride` apart); the i-th of `out_rows` is a
/// row of `out` with room for `rows.len()` values from its start on, `out_stride` apart, that no other thread touches;
/// `panel` has room for `panel_len` values.
pub(crate) struct Gemm<'a> {
    pub(crate) w: WeightRef,
    pub(crate) rows: std::ops::Range<usize>,
    pub(crate) x: *const f32,
    pub(crate) x_stride: usize,
    pub(crate) tokens: &'a [u32],
    pub(crate) out: *mut f32,
    pub(crate) out_stride: usize,
    pub(crate) out_rows: &'a [u32],
    pub(crate) output: Output<'a>,
    /// Room for decoded rows; empty when `w` is F32 or tokens are few.
    pub(crate) panel: *mut f32,
    pub(crate) panel_len: usize,
}

/// How one storage format becomes lanes.
trait Decode<S: Simd> {
    const BYTES: usize;
    const SCALED: bool = false;
    /// # Safety
    /// `LANES` elements readable at `p`, and the CPU features of `S`.
    unsafe fn load(p: *const u8, scale: S) -> S;
}

struct F32;
struct F16;
struct Bf16;
struct E4m3;

impl<S: Simd> Decode<S> for F32 {
    const BYTES: usize = 4;
    #[inline(always)]
    unsafe fn load(p: *const u8, _: S) -> S {
        // SAFETY: the caller's promise.
        unsafe { S::load(p.cast()) }
    }
}
impl<S: Simd> Decode<S> for F16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load(p: *const u8, _: S) -> S {
        // SAFETY: the caller's promise.
        unsafe { S::load_f16(p) }
    }
}
impl<S: Simd> Decode<S> for Bf16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load(p: *const u8, _: S) -> S {
        // SAFETY: the caller's promise.
        unsafe { S::load_bf16(p) }
    }
}
impl<S: Simd> Decode<S> for E4m3 {
    const BYTES: usize = 1;
    const SCALED: bool = true;
    #[inline(always)]
    unsafe fn load(p: *const u8, scale: S) -> S {
        // SAFETY: the caller's promise.
        unsafe { S::load_e4m3(p).mul(scale) }
    }
}

/// # Safety
/// As [`Gemm`] says, and the CPU features of `S`.
#[inline(always)]
pub(super) unsafe fn gemm<S: Simd>(g: &Gemm<'_>) {
    // SAFETY: the caller's promise is passed on.
    unsafe {
        match g.w.dtype {
            DType::F32 => rows_of_w::<S, F32>(g),
            DType::F16 => decoded_or_direct::<S, F16>(g),
            DType::BF16 => decoded_or_direct::<S, Bf16>(g),
            DType::F8E4M3 => decoded_or_direct::<S, E4m3>(g),
            _ => {
                decoded::<S>(g, |row, out| decode_blocks(&g.w, row, out));
            }
        }
    }
}

#[inline(always)]
unsafe fn decoded_or_direct<S: Simd, D: Decode<S>>(g: &Gemm<'_>) {
    // SAFETY: the caller's promise is passed on; `decoded` gives rows of `w` and room for them.
    unsafe {
        if g.tokens.len() < DECODE_TOKENS_MIN || g.panel_len < g.w.cols * TILE_ROWS {
            rows_of_w::<S, D>(g);
        } else {
            decoded::<S>(g, |row, out| decode::<S, D>(&g.w, row, out));
        }
    }
}

/// Decodes as many rows as the panel holds, uses them for all tokens, and goes on.
#[inline(always)]
unsafe fn decoded<S: Simd>(g: &Gemm<'_>, decode_row: impl Fn(usize, *mut f32)) {
    let panel_rows = g.panel_len / g.w.cols / TILE_ROWS * TILE_ROWS;
    assert!(panel_rows > 0, "the panel holds a tile of every matrix that was loaded");
    let mut from = g.rows.start;
    while from < g.rows.end {
        let to = g.rows.end.min(from + panel_rows);
        for row in from..to {
            decode_row(row, g.panel.wrapping_add((row - from) * g.w.cols));
        }
        let part = Gemm {
            w: WeightRef::rows_of(g.panel, g.w.cols, g.w.cols),
            rows: 0..to - from,
            out: g.out.wrapping_add(from - g.rows.start),
            ..*g
        };
        // SAFETY: the decoded rows are F32 rows of the same width; the outputs are a part of the caller's.
        unsafe { rows_of_w::<S, F32>(&part) };
        from = to;
    }
}

/// # Safety
/// `row` is a row of `w`, `out` has room for `w.cols` values.
unsafe fn decode_blocks(w: &WeightRef, row: usize, out: *mut f32) {
    // SAFETY: the caller's promise.
    unsafe {
        let bytes = std::slice::from_raw_parts(w.data.add(row * w.row_bytes), w.row_bytes);
        let out = std::slice::from_raw_parts_mut(out, w.cols);
        if w.dtype == DType::INT4 {
            let n = w.cols / 32 * 2;
            blocks::decode_int4(bytes, std::slice::from_raw_parts(w.group_scales.add(row * n), n), out);
        } else {
            blocks::decode_row(w.dtype, bytes, out);
        }
    }
}

/// Tiles of `TILE_TOKENS x TILE_ROWS`, tokens innermost so that a tile's weight rows stay in cache.
#[inline(always)]
unsafe fn rows_of_w<S: Simd, D: Decode<S>>(g: &Gemm<'_>) {
    let mut row = g.rows.start;
    while row < g.rows.end {
        let rows = TILE_ROWS.min(g.rows.end - row);
        let mut t = 0;
        while t < g.tokens.len() {
            let left = (g.tokens.len() - t).min(S::TILE_TOKENS);
            macro_rules! tile {
                ($n:literal) => {{
                    S::outlined(Tile::<'_, S, D, $n> { g, t, row, rows, of: PhantomData });
                    $n
                }};
            }
            // SAFETY: tokens t.. and rows row.. lie inside the caller's.
            t += unsafe {
                match left {
                    6.. if const { S::TILE_TOKENS >= 6 } => tile!(6),
                    4.. if const { S::TILE_TOKENS >= 4 } => tile!(4),
                    3.. if const { S::TILE_TOKENS >= 3 } => tile!(3),
                    2.. => tile!(2),
                    _ => tile!(1),
                }
            };
        }
        row += rows;
    }
}

/// `T` tokens from `t` on times up to four rows from `row` on.
struct Tile<'a, S, D, const T: usize> {
    g: &'a Gemm<'a>,
    t: usize,
    row: usize,
    rows: usize,
    of: PhantomData<(S, D)>,
}

impl<S: Simd, D: Decode<S>, const T: usize> Outlined for Tile<'_, S, D, T> {
    #[inline(always)]
    unsafe fn run(self) {
        // SAFETY: whoever made it has the tokens and rows, and calls it with the features of `S`.
        unsafe { tile::<S, D, T>(self.g, self.t, self.row, self.rows) }
    }
}

/// `T` tokens times up to four rows; rows past the end are computed from the last one and thrown away.
#[inline(always)]
unsafe fn tile<S: Simd, D: Decode<S>, const T: usize>(g: &Gemm<'_>, t: usize, row: usize, rows: usize) {
    // SAFETY: see each block; `cols` elements are readable in every row of x and W, and the last partial vector goes
    // through a zero-padded copy.
    unsafe {
        let row_of = |r: usize| row + r.min(rows - 1);
        let w: [*const u8; TILE_ROWS] = std::array::from_fn(|r| g.w.data.add(row_of(r) * g.w.row_bytes));
        let x: [*const f32; T] = std::array::from_fn(|i| g.x.add(g.tokens[t + i] as usize * g.x_stride));
        let zero = S::splat(0.0);
        let mut acc = [[zero; TILE_ROWS]; T];
        let whole = g.w.cols / S::LANES * S::LANES;
        let mut k = 0;
        while k < g.w.cols {
            // One FP8 scale block at a time; the other formats have no scales and run through.
            let end = if D::SCALED { g.w.cols.min(k + FP8_BLOCK) } else { g.w.cols };
            let scale: [S; TILE_ROWS] = if D::SCALED {
                std::array::from_fn(|r| S::splat(g.w.scale(row_of(r), k / FP8_BLOCK) * E4M3_SHIFT))
            } else {
                [zero; TILE_ROWS]
            };
            while k < end.min(whole) {
                let wv: [S; TILE_ROWS] = std::array::from_fn(|r| D::load(w[r].add(k * D::BYTES), scale[r]));
                for i in 0..T {
                    let xv = S::load(x[i].add(k));
                    for r in 0..TILE_ROWS {
                        acc[i][r] = wv[r].fma(xv, acc[i][r]);
                    }
                }
                k += S::LANES;
            }
            if k < end {
                let n = end - k;
                let wv: [S; TILE_ROWS] =
                    std::array::from_fn(|r| load_tail::<S, D>(w[r].add(k * D::BYTES), n, scale[r]));
                for i in 0..T {
                    let xv = load_tail::<S, F32>(x[i].add(k).cast(), n, zero);
                    for r in 0..TILE_ROWS {
                        acc[i][r] = wv[r].fma(xv, acc[i][r]);
                    }
                }
                k = end;
            }
        }
        for (i, acc) in acc.into_iter().enumerate() {
            let y = S::sum4(acc);
            let out = g.out.add(g.out_rows[t + i] as usize * g.out_stride + (row - g.rows.start));
            for (r, &y) in y.iter().enumerate().take(rows) {
                let out = out.add(r);
                match g.output {
                    Output::Store => *out = y,
                    Output::Add => *out += y,
                    Output::AddScaled(s) => *out += s[t + i] * y,
                }
            }
        }
    }
}

/// The last `n < LANES` elements, the other lanes zero.
#[inline(always)]
unsafe fn load_tail<S: Simd, D: Decode<S>>(p: *const u8, n: usize, scale: S) -> S {
    let mut padded = [0u8; 64];
    // SAFETY: `n` elements are readable, at most 15 of 4 bytes; 64 bytes hold LANES elements of any format.
    unsafe {
        std::ptr::copy_nonoverlapping(p, padded.as_mut_ptr(), n * D::BYTES);
        D::load(padded.as_ptr(), scale)
    }
}

/// # Safety
/// `row` is a row of `w`, `out` has room for `w.cols` values, and the CPU features of `S`.
#[inline(always)]
pub(super) unsafe fn decode_row<S: Simd>(w: &WeightRef, row: usize, out: *mut f32) {
    // SAFETY: the caller's promise is passed on.
    unsafe {
        match w.dtype {
            DType::F32 => decode::<S, F32>(w, row, out),
            DType::F16 => decode::<S, F16>(w, row, out),
            DType::BF16 => decode::<S, Bf16>(w, row, out),
            DType::F8E4M3 => decode::<S, E4m3>(w, row, out),
            _ => decode_blocks(w, row, out),
        }
    }
}

/// `out = sum_j p[j] * w[first + j]` over `n` rows: the product with a transposed part of W.
///
/// # Safety
/// The rows are rows of `w`; `p` has `n` values and `out` room for `w.cols`; `row` has room for one decoded row; the
/// CPU features of `S`.
#[inline(always)]
pub(super) unsafe fn weighted_sum<S: Simd>(
    w: &WeightRef,
    first: usize,
    p: *const f32,
    n: usize,
    out: *mut f32,
    row: *mut f32,
) {
    // SAFETY: the caller's promise is passed on.
    unsafe {
        match w.dtype {
            DType::F32 => weighted_columns::<S, F32>(w, first, p, n, out, row),
            DType::F16 => weighted_columns::<S, F16>(w, first, p, n, out, row),
            DType::BF16 => weighted_columns::<S, Bf16>(w, first, p, n, out, row),
            DType::F8E4M3 => weighted_columns::<S, E4m3>(w, first, p, n, out, row),
            _ => {
                std::slice::from_raw_parts_mut(out, w.cols).fill(0.0);
                for j in 0..n {
                    decode_blocks(w, first + j, row);
                    super::elementwise::axpy::<S>(*p.add(j), row, out, w.cols);
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn weighted_columns<S: Simd, D: Decode<S>>(
    w: &WeightRef,
    first: usize,
    p: *const f32,
    n: usize,
    out: *mut f32,
    row: *mut f32,
) {
    /// Vectors of one pass over the rows; at most one FP8 block wide.
    const TOGETHER: usize = 8;
    let width = TOGETHER * S::LANES;
    // SAFETY: whole chunks lie inside of the rows, and of one FP8 block as `width` divides 128; the rest is decoded to
    // `row` first.
    unsafe {
        let whole = w.cols / width * width;
        for k in (0..whole).step_by(width) {
            let mut acc = [S::splat(0.0); TOGETHER];
            for j in 0..n {
                let scale = if D::SCALED { w.scale(first + j, k / FP8_BLOCK) * E4M3_SHIFT } else { 0.0 };
                let (scale, factor) = (S::splat(scale), S::splat(*p.add(j)));
                let at = w.data.add((first + j) * w.row_bytes + k * D::BYTES);
                for (i, acc) in acc.iter_mut().enumerate() {
                    *acc = factor.fma(D::load(at.add(i * S::LANES * D::BYTES), scale), *acc);
                }
            }
            for (i, acc) in acc.into_iter().enumerate() {
                acc.store(out.add(k + i * S::LANES));
            }
        }
        if whole < w.cols {
            let rest = w.cols - whole;
            std::slice::from_raw_parts_mut(out.add(whole), rest).fill(0.0);
            for j in 0..n {
                decode::<S, D>(w, first + j, row);
                super::elementwise::axpy::<S>(*p.add(j), row.add(whole), out.add(whole), rest);
            }
        }
    }
}

#[inline(always)]
unsafe fn decode<S: Simd, D: Decode<S>>(w: &WeightRef, row: usize, out: *mut f32) {
    // SAFETY: the caller promises the row and the room; the tail goes through a padded copy on both sides.
    unsafe {
        let p = w.data.add(row * w.row_bytes);
        let mut k = 0;
        while k < w.cols {
            let end = if D::SCALED { w.cols.min(k + FP8_BLOCK) } else { w.cols };
            let scale = S::splat(if D::SCALED { w.scale(row, k / FP8_BLOCK) * E4M3_SHIFT } else { 0.0 });
            while k + S::LANES <= end {
                D::load(p.add(k * D::BYTES), scale).store(out.add(k));
                k += S::LANES;
            }
            if k < end {
                let mut lanes = [0.0f32; 16];
                load_tail::<S, D>(p.add(k * D::BYTES), end - k, scale).store(lanes.as_mut_ptr());
                std::ptr::copy_nonoverlapping(lanes.as_ptr(), out.add(k), end - k);
                k = end;
            }
        }
    }
}
