//! The kernels: each algorithm once over a small vector trait, the intrinsics apart, one file per level.
//!
//! Every sum over `k` runs the same way whatever the batch: one vector accumulator per (row of x, row of W), lanes
//! filled in order of `k`, a zero-padded tail, one fixed reduction. A tile only decides how many such pairs are in
//! flight. That is what makes a row's result independent of its neighbours.
#![allow(unsafe_code, reason = "kernels read and write through raw pointers; each states what it needs")]
#![allow(
    clippy::inline_always,
    reason = "an intrinsic must be inlined into code compiled for its CPU feature"
)]
#![allow(clippy::wildcard_imports, reason = "intrinsics")]
#![allow(clippy::cast_ptr_alignment, reason = "words of packed weights are read unaligned")]
#![allow(clippy::missing_safety_doc, reason = "the trait and the kernel tables state it once")]

pub(crate) mod attention;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512_vnni;
mod elementwise;
mod gemm;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
pub(crate) mod panel;
pub(crate) mod peak;
pub(crate) mod portable;
mod rounding;

use crate::packed::Rounding;
pub(crate) use gemm::{Gemm, Output, WeightRef};
use panel::Panel;
pub(crate) use panel::{PanelGemm, RowsRef};
use peak::Peak;

/// The kernels of one level. All are safe to call when the level is available and what each states holds.
pub(crate) struct Kernels {
    pub(crate) gemm: unsafe fn(&Gemm<'_>),
    pub(crate) decode_row: unsafe fn(&WeightRef, usize, *mut f32),
    pub(crate) weighted_sum: unsafe fn(&WeightRef, usize, *const f32, usize, *mut f32, *mut f32),
    pub(crate) weighted_rows: unsafe fn(&elementwise::WeightedRows),
    pub(crate) softmax_block: unsafe fn(*mut f32, usize, f32, f32) -> (f32, f32),
    pub(crate) silu_mul: unsafe fn(*const f32, *const f32, *mut f32, usize),
    pub(crate) rms_norm: unsafe fn(*const f32, *const f32, f32, *mut f32, usize),
    pub(crate) panel_gemm: unsafe fn(&PanelGemm<'_>),
    pub(crate) dot_rows: unsafe fn(&attention::DotRows<'_>),
    pub(crate) attend_chunk: unsafe fn(&attention::AttendChunk<'_>),
    pub(crate) decode_rows: unsafe fn(&attention::CachedRows<'_>),
    round: unsafe fn(Rounding, *const f32, usize, *mut f32),
    /// Most tokens of a tile of `panel_gemm`, by [`Rounding`].
    tile_tokens: [usize; 2],
    /// Products of F32, BF16 and bytes as fast as they go, for the probe of `limits.rs`.
    pub(crate) peaks: [Peak; 3],
}

impl Kernels {
    /// Rounds `n` values to the words of a rounded row.
    ///
    /// # Safety
    /// `n` values at `x`, room for the words of whole runs at `out`; the CPU has the features of the level.
    pub(crate) unsafe fn round(&self, rounding: Rounding, x: *const f32, n: usize, out: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { (self.round)(rounding, x, n, out) }
    }

    /// Most tokens of a tile of packed products.
    pub(crate) fn tile_tokens(&self, rounding: Rounding) -> usize {
        self.tile_tokens[rounding as usize]
    }
}

pub(crate) use elementwise::WeightedRows;

/// A part of a kernel that is compiled on its own. A kernel whose hundreds of tiles are all inlined takes the compiler
/// minutes, as its time grows faster than a function's length.
pub(crate) trait Outlined {
    /// # Safety
    /// As whoever made it says, and the CPU features of its level.
    unsafe fn run(self);
}

/// A vector of F32 lanes and the few operations that the kernels need.
///
/// # Safety
/// All methods require the CPU features of their level; pointers need `LANES` readable or writable elements and no
/// alignment.
pub(crate) trait Simd: Copy {
    const LANES: usize;
    /// Rows of x and rows of W in one register tile.
    const TILE_TOKENS: usize;
    /// Runs `part` in a function of its own that is compiled with the level's features.
    unsafe fn outlined(part: impl Outlined);
    unsafe fn splat(v: f32) -> Self;
    unsafe fn load(p: *const f32) -> Self;
    unsafe fn store(self, p: *mut f32);
    unsafe fn load_f16(p: *const u8) -> Self;
    unsafe fn load_bf16(p: *const u8) -> Self;
    /// Codes as F32 times 2^-120: sign, exponent and mantissa moved into place; the caller's scale brings 2^120.
    unsafe fn load_e4m3(p: *const u8) -> Self;
    unsafe fn add(self, b: Self) -> Self;
    unsafe fn mul(self, b: Self) -> Self;
    /// `self * b + c`
    unsafe fn fma(self, b: Self, c: Self) -> Self;
    unsafe fn max(self, b: Self) -> Self;
    unsafe fn min(self, b: Self) -> Self;
    unsafe fn div(self, b: Self) -> Self;
    /// `2^n` where `self` is `n + 1.5 * 2^23`, n a whole number in -126..=127.
    unsafe fn pow2_of_shifted(self) -> Self;
    /// The sums of the lanes of four vectors, each over the same tree.
    unsafe fn sum4(v: [Self; 4]) -> [f32; 4];
    /// The largest lane.
    unsafe fn max_lane(self) -> f32;
}

/// Makes the `outlined` of [`Simd`] and [`Panel`] for a level's CPU features.
macro_rules! outlined {
    ($($features:literal)?) => {
        #[inline(never)]
        $(#[target_feature(enable = $features)])?
        unsafe fn outlined(part: impl $crate::simd::Outlined) {
            // SAFETY: the caller's promise is passed on.
            unsafe { part.run() }
        }
    };
}
pub(crate) use outlined;

/// Makes a level's [`Kernels`]: the generic algorithms compiled with the level's CPU features.
macro_rules! kernels {
    ($simd:ty, $panel:ty $(, $features:literal)?) => {
        use super::{Gemm, Kernels, PanelGemm, WeightRef, WeightedRows, elementwise, gemm as algorithm};
        use super::{attention, panel, peak, rounding};

        $(#[target_feature(enable = $features)])?
        unsafe fn gemm(g: &Gemm<'_>) {
            // SAFETY: the caller's promise is passed on.
            unsafe { algorithm::gemm::<$simd>(g) }
        }
        $(#[target_feature(enable = $features)])?
        unsafe fn decode_row(w: &WeightRef, row: usize, out: *mut f32) {
            // SAFETY: the caller's promise is passed on.
            unsafe { algorithm::decode_row::<$simd>(w, row, out) }
        }
        $(#[target_feature(enable = $features)])?
        unsafe fn weighted_sum(
            w: &WeightRef,
            first: usize,
            p: *const f32,
            n: usize,
            out: *mut f32,
            row: *mut f32,
        ) {
            // SAFETY: the caller's promise is passed on.
            unsafe { algorithm::weighted_sum::<$simd>(w, first, p, n, out, row) }
        }
        $(#[target_feature(enable = $features)])?
        unsafe fn weighted_rows(w: &WeightedRows) {
            // SAFETY: the caller's promise is passed on.
            unsafe { elementwise::weighted_rows::<$simd>(w) }
        }
        $(#[target_feature(enable = $features)])?
        unsafe fn softmax_block(s: *mut f32, n: usize, scale: f32, max: f32) -> (f32, f32) {
            // SAFETY: the caller's promise is passed on.
            unsafe { elementwise::softmax_block::<$simd>(s, n, scale, max) }
        }
        $(#[target_feature(enable = $features)])?
        unsafe fn silu_mul(g: *const f32, u: *const f32, out: *mut f32, n: usize) {
            // SAFETY: the caller's promise is passed on.
            unsafe { elementwise::silu_mul::<$simd>(g, u, out, n) }
        }
        $(#[target_feature(enable = $features)])?
        unsafe fn rms_norm(x: *const f32, w: *const f32, eps: f32, out: *mut f32, n: usize) {
            // SAFETY: the caller's promise is passed on.
            unsafe { elementwise::rms_norm::<$simd>(x, w, eps, out, n) }
        }
        $(#[target_feature(enable = $features)])?
        unsafe fn panel_gemm(g: &PanelGemm<'_>) {
            // SAFETY: the caller's promise is passed on.
            unsafe { panel::panel_gemm::<$panel>(g) }
        }
        $(#[target_feature(enable = $features)])?
        unsafe fn round(rounding: crate::packed::Rounding, x: *const f32, n: usize, out: *mut f32) {
            // SAFETY: the caller's promise is passed on.
            unsafe { rounding::round(rounding, x, n, out) }
        }
        $(#[target_feature(enable = $features)])?
        unsafe fn f32_products(data: *const u8, rounds: usize) -> (u64, f32) {
            // SAFETY: the caller's promise is passed on.
            unsafe { peak::f32_products::<$simd>(data, rounds) }
        }
        $(#[target_feature(enable = $features)])?
        unsafe fn bf16_products(data: *const u8, rounds: usize) -> (u64, f32) {
            // SAFETY: the caller's promise is passed on.
            unsafe { peak::bf16_products::<$panel>(data, rounds) }
        }
        $(#[target_feature(enable = $features)])?
        unsafe fn byte_products(data: *const u8, rounds: usize) -> (u64, f32) {
            // SAFETY: the caller's promise is passed on.
            unsafe { peak::byte_products::<$panel>(data, rounds) }
        }

        $(#[target_feature(enable = $features)])?
        unsafe fn dot_rows(d: &attention::DotRows<'_>) {
            // SAFETY: the caller's promise is passed on.
            unsafe { attention::dot_rows::<$panel>(d) }
        }
        $(#[target_feature(enable = $features)])?
        unsafe fn attend_chunk(c: &attention::AttendChunk<'_>) {
            // SAFETY: the caller's promise is passed on.
            unsafe { attention::attend_chunk::<$simd, $panel>(c) }
        }
        $(#[target_feature(enable = $features)])?
        unsafe fn decode_rows(c: &attention::CachedRows<'_>) {
            // SAFETY: the caller's promise is passed on.
            unsafe { attention::decode_rows::<$panel>(c) }
        }

        /// This level's kernels.
        pub(crate) static KERNELS: Kernels = Kernels {
            gemm,
            decode_row,
            weighted_sum,
            weighted_rows,
            softmax_block,
            silu_mul,
            rms_norm,
            panel_gemm,
            dot_rows,
            attend_chunk,
            decode_rows,
            round,
            tile_tokens: panel::tile_tokens::<$panel>(),
            peaks: [f32_products, bf16_products, byte_products],
        };
    };
}
pub(crate) use kernels;
