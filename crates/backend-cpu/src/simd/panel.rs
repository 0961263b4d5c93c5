//! `y = x * W^T` for packed weights (`packed.rs`) and rounded activations (`rounded.rs`).
//!
//! Sixteen rows of W lie side by side, four bytes of each at a time, so that lane `r` of every vector belongs to row
//! `r` of the group: no sum ever crosses lanes, and a row's bits do not depend on how many tokens share a tile.
//! BF16 and FP8 weights meet BF16 activations; block formats meet 8-bit activations, and their integer sums are exact.

use super::Output;
use crate::packed::{GROUP_ROWS, PackedFormat, PanelRef};

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
mod block;
mod float;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
pub(crate) mod portable;

/// One row of rounded activations per token.
#[derive(Clone, Copy)]
pub(crate) struct RowsRef {
    /// BF16 pairs, or signed bytes.
    pub(crate) data: *const u8,
    pub(crate) row_bytes: usize,
    /// Bytes: a scale per 128 columns.
    pub(crate) scales: *const f32,
    pub(crate) row_scales: usize,
    /// Bytes: minus the sum of each 32 columns.
    pub(crate) minus_sums: *const i32,
    pub(crate) row_sums: usize,
}

// SAFETY: it only points to activations, which nobody writes during the fork.
unsafe impl Send for RowsRef {}
// SAFETY: as above.
unsafe impl Sync for RowsRef {}

/// Row groups `groups` of W times the listed rows of x.
///
/// # Safety (of the kernel)
/// `w` has the groups; each of `tokens` is a row of `x`, as wide as `w` and rounded for its format; the i-th of
/// `out_rows` is a row of `out`, `out_stride` apart, with room for the rows of the groups from its start on, that no
/// other thread touches.
pub(crate) struct PanelGemm<'a> {
    pub(crate) w: PanelRef,
    pub(crate) groups: std::ops::Range<usize>,
    pub(crate) x: RowsRef,
    pub(crate) tokens: &'a [u32],
    pub(crate) out: *mut f32,
    pub(crate) out_stride: usize,
    pub(crate) out_rows: &'a [u32],
    pub(crate) output: Output<'a>,
}

/// Sixteen rows at once, on one level.
///
/// # Safety
/// All methods require the CPU features of their level; pointers need what each says and no alignment.
pub(crate) trait Panel {
    /// Sixteen F32.
    type F: Copy;
    /// Sixteen I32.
    type I: Copy;
    /// Sixteen pairs of BF16 weights.
    type W: Copy;
    /// Sixteen times four unsigned weights of 8 bits.
    type U: Copy;
    /// One pair of BF16 activations for all rows.
    type X: Copy;
    /// Most tokens of one tile: what the registers hold.
    const TILE_TOKENS: usize;
    /// Whether two groups fit into one tile.
    const PAIRS: bool;
    /// Whether `dot_s8` leaves the offset of 128 to the sums that a block begins with.
    const OFFSET_IN_SUMS: bool;

    unsafe fn splat(v: f32) -> Self::F;
    /// Sixteen F32 at `p`.
    unsafe fn store(v: Self::F, p: *mut f32);
    /// Sixteen halves at `p`.
    unsafe fn load_f16(p: *const u8) -> Self::F;
    /// `a * b + c`
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;

    /// Asks for the cache line at `p`, which need not be there.
    unsafe fn prefetch(_p: *const u8) {}
    /// 64 bytes at `p`.
    unsafe fn load_bf16(p: *const u8) -> Self::W;
    /// 64 codes at `p`, as `packed.rs` orders them: the pairs of two units.
    unsafe fn load_e4m3(p: *const u8) -> [Self::W; 2];
    /// 4 bytes at `p`.
    unsafe fn pair(p: *const u8) -> Self::X;
    /// `acc + w * x`, both products of each pair.
    unsafe fn dot_bf16(acc: Self::F, w: Self::W, x: Self::X) -> Self::F;

    /// `*p << SHIFT` in all lanes.
    unsafe fn splat_shifted<const SHIFT: u32>(p: *const i32) -> Self::I;
    unsafe fn to_f32(v: Self::I) -> Self::F;
    /// 64 bytes at `p`.
    unsafe fn load_u8(p: *const u8) -> Self::U;
    unsafe fn low_nibbles(v: Self::U) -> Self::U;
    unsafe fn high_nibbles(v: Self::U) -> Self::U;
    unsafe fn zero_i() -> Self::I;
    /// `acc + sum of four products w * x`, w at most 127; 4 signed bytes at `x`, none of them -128.
    unsafe fn dot_u7(acc: Self::I, w: Self::U, x: *const u8) -> Self::I;
    /// The same for weights that are 128 too large: as they are if [`Panel::OFFSET_IN_SUMS`], else minus 128.
    unsafe fn dot_s8(acc: Self::I, w: Self::U, x: *const u8) -> Self::I;
    /// Sixteen I32 words at `p`, each shifted right by `SHIFT` and cut to `MASK`.
    unsafe fn bits<const SHIFT: u32, const MASK: i32>(p: *const u8) -> Self::I;
    /// `a | b << SHIFT`
    unsafe fn join<const SHIFT: u32>(a: Self::I, b: Self::I) -> Self::I;
}

/// # Safety
/// As [`PanelGemm`] says, and the CPU features of `P`.
#[inline(always)]
pub(super) unsafe fn panel_gemm<P: Panel>(g: &PanelGemm<'_>) {
    // SAFETY: the caller's promise is passed on.
    unsafe {
        match g.w.format {
            PackedFormat::Bf16 => tiles::<P, float::Bf16>(g),
            PackedFormat::E4m3 => tiles::<P, float::E4m3>(g),
            PackedFormat::Q8_0 => tiles::<P, block::Tile<block::Q8_0>>(g),
            PackedFormat::Q4_0 => tiles::<P, block::Tile<block::Q4_0>>(g),
            PackedFormat::Q4K => tiles::<P, block::Tile<block::Q4K>>(g),
        }
    }
}

/// How one packed format is multiplied.
trait Tiled<P: Panel> {
    /// Whether a tile of two groups pays for many tokens, too.
    const WIDE_PAIRS: bool;

    /// The products of groups `group..group + G` with tokens `t..t + T`.
    ///
    /// # Safety
    /// Both lie inside of `g`; the features of `P`.
    unsafe fn tile<const G: usize, const T: usize>(
        g: &PanelGemm<'_>,
        group: usize,
        t: usize,
    ) -> [[P::F; T]; G];
}

/// All tiles; tokens innermost, so that a group's weights stay in cache.
#[inline(always)]
unsafe fn tiles<P: Panel, D: Tiled<P>>(g: &PanelGemm<'_>) {
    let mut group = g.groups.start;
    while group < g.groups.end {
        let pair = P::PAIRS && group + 1 < g.groups.end;
        let wide = if pair && D::WIDE_PAIRS { 2 } else { 1 };
        let mut t = 0;
        // Many tokens: one group at a time where two do not fit.
        for group in (group..group + if pair { 2 } else { 1 }).step_by(wide) {
            t = 0;
            // SAFETY: groups and tokens lie inside of the caller's.
            unsafe {
                while P::TILE_TOKENS >= 12 && g.tokens.len() - t >= 12 {
                    if wide == 2 {
                        emit::<P, D, 2, 12>(g, group, t);
                    } else {
                        emit::<P, D, 1, 12>(g, group, t);
                    }
                    t += 12;
                }
                while P::TILE_TOKENS >= 8 && g.tokens.len() - t >= 8 {
                    if wide == 2 {
                        emit::<P, D, 2, 8>(g, group, t);
                    } else {
                        emit::<P, D, 1, 8>(g, group, t);
                    }
                    t += 8;
                }
            }
        }
        // SAFETY: as above.
        unsafe {
            while g.tokens.len() - t >= 4 {
                if pair {
                    emit::<P, D, 2, 4>(g, group, t);
                } else {
                    emit::<P, D, 1, 4>(g, group, t);
                }
                t += 4;
            }
            if g.tokens.len() - t >= 2 {
                if pair {
                    emit::<P, D, 2, 2>(g, group, t);
                } else {
                    emit::<P, D, 1, 2>(g, group, t);
                }
                t += 2;
            }
            if g.tokens.len() > t {
                if pair { emit::<P, D, 2, 1>(g, group, t) } else { emit::<P, D, 1, 1>(g, group, t) }
            }
        }
        group += if pair { 2 } else { 1 };
    }
}

/// Computes one tile and writes it out.
#[inline(always)]
unsafe fn emit<P: Panel, D: Tiled<P>, const G: usize, const T: usize>(
    g: &PanelGemm<'_>,
    group: usize,
    t: usize,
) {
    // SAFETY: the caller's promise; rows past the end of W are computed from padding and not written.
    unsafe {
        let sums = D::tile::<G, T>(g, group, t);
        for (i, sums) in sums.into_iter().enumerate() {
            let first = (group + i) * GROUP_ROWS;
            let n = GROUP_ROWS.min(g.w.rows - first);
            for (j, sum) in sums.into_iter().enumerate() {
                let mut y = [0.0f32; GROUP_ROWS];
                P::store(sum, y.as_mut_ptr());
                let column = first - g.groups.start * GROUP_ROWS;
                let out = g.out.add(g.out_rows[t + j] as usize * g.out_stride + column);
                for (r, y) in y.into_iter().enumerate().take(n) {
                    let out = out.add(r);
                    match g.output {
                        Output::Store => *out = y,
                        Output::Add => *out += y,
                        Output::AddScaled(s) => *out += s[t + j] * y,
                    }
                }
            }
        }
    }
}
