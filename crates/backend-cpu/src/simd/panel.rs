//! `y = x * W^T` for packed weights (`packed.rs`) and rounded activations (`rounded.rs`).
//!
//! Sixteen rows of W lie side by side, four bytes of each at a time, so that lane `r` of every vector belongs to row
//! `r` of the group: no sum ever crosses lanes, and a row's bits do not depend on how many tokens share a tile.
//! BF16 and FP8 weights meet BF16 activations; block formats meet 8-bit activations, and their integer sums are exact.

use std::marker::PhantomData;

use super::{Outlined, Output};
use crate::{
    packed::{GROUP_ROWS, PackedFormat, PanelRef, Rounding},
    rounded::{self, TILE_TOKENS_MAX},
};

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
mod block;
mod float;
mod k_quants;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
pub(crate) mod portable;
mod small_blocks;
mod tables;

/// Rows of rounded activations (`rounded.rs`), on their own or in tiles.
#[derive(Clone, Copy)]
pub(crate) struct RowsRef {
    pub(crate) words: *const f32,
    pub(crate) row_words: usize,
}

// SAFETY: it only points to activations, which nobody writes during the fork.
unsafe impl Send for RowsRef {}
// SAFETY: as above.
unsafe impl Sync for RowsRef {}

impl RowsRef {
    /// Row `row`, or what begins in its place.
    pub(crate) fn row(&self, row: usize) -> *const f32 {
        self.words.wrapping_add(row * self.row_words)
    }

    /// Rows or tiles from row `first` on.
    pub(crate) fn from(&self, first: usize) -> Self {
        Self { words: self.row(first), ..*self }
    }
}

/// Row groups `groups` of W times the rows of x.
///
/// # Safety (of the kernel)
/// `w` has the groups; `x` is as many rows as `out_rows`, as wide as `w`, rounded for its format and laid in tiles of
/// at most [`Kernels::tile_tokens`]; the i-th of `out_rows` is a row of `out`, `out_stride` apart, with room for the
/// rows of the groups from its start on, that no other thread touches.
///
/// [`Kernels::tile_tokens`]: super::Kernels::tile_tokens
pub(crate) struct PanelGemm<'a> {
    pub(crate) w: PanelRef,
    pub(crate) groups: std::ops::Range<usize>,
    pub(crate) x: RowsRef,
    pub(crate) out: *mut f32,
    pub(crate) out_stride: usize,
    pub(crate) out_rows: &'a [u32],
    pub(crate) output: Output<'a>,
    /// Groups that are likely to be asked for next, or null. Only a hint.
    pub(crate) then: *const u8,
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
    /// Sums of products of small weights for sixteen rows, before they are [widened](Panel::widen).
    type Small: Copy;
    /// One pair of BF16 activations for all rows.
    type X: Copy;
    /// Most tokens of one tile of BF16 products: what the registers hold.
    const TILE_BF16: usize;
    /// Most tokens of one tile of 8-bit products, which keep integer sums beside those in F32.
    const TILE_BYTES: usize;
    /// Whether tiles are two groups wide.
    const PAIRS: bool;
    /// Whether loops are unrolled where a format profits from it.
    const UNROLLS: bool = true;
    /// What such a sum has room for, of each sign; 0 where the level adds products to I32 at no cost.
    const SMALL_MAX: usize = 0;
    /// Whether `dot_s8` leaves the offset of 128 to the sums that a block begins with.
    const OFFSET_IN_SUMS: bool;

    unsafe fn splat(v: f32) -> Self::F;
    /// As [`Simd::outlined`].
    ///
    /// [`Simd::outlined`]: super::Simd::outlined
    unsafe fn outlined(part: impl Outlined);
    /// Sixteen F32 at `p`.
    unsafe fn load(p: *const f32) -> Self::F;
    /// The same, written.
    unsafe fn store(v: Self::F, p: *mut f32);
    /// Sixteen halves at `p`.
    unsafe fn load_f16(p: *const u8) -> Self::F;
    /// `a * b + c`
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;

    /// Asks for the cache line at `p`, which need not be there.
    unsafe fn prefetch(_p: *const u8) {}
    /// The same, into the nearest cache.
    unsafe fn prefetch_near(_p: *const u8) {}
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
    unsafe fn zero_small() -> Self::Small;
    /// As `dot_u7`; no half of a sum, two of the four products each, may exceed [`Panel::SMALL_MAX`].
    unsafe fn dot_small(acc: Self::Small, w: Self::U, x: *const u8) -> Self::Small;
    /// `acc + small`
    unsafe fn widen(acc: Self::I, small: Self::Small) -> Self::I;
    /// Sixteen I32 words at `p`, each shifted right by `SHIFT` and cut to `MASK`.
    unsafe fn bits<const SHIFT: u32, const MASK: i32>(p: *const u8) -> Self::I;
    /// `a | b << SHIFT`
    unsafe fn join<const SHIFT: u32>(a: Self::I, b: Self::I) -> Self::I;

    // What the formats of more than nibbles need; shifts and masks are constants once a kernel is compiled.

    /// Sixteen I32 words at `p`, each shifted right by `shift` and cut to `mask`.
    unsafe fn word_bits(p: *const u8, shift: usize, mask: i32) -> Self::I;
    /// Sixteen 16-bit words at `p`, each shifted right by `shift` and cut to `mask`.
    unsafe fn half_bits(p: *const u8, shift: usize, mask: i32) -> Self::I;
    /// Sixteen BF16 at `p`.
    unsafe fn load_bf16_values(p: *const u8) -> Self::F;
    /// `2^(e - 128)` for the sixteen bytes `e` at `p`.
    unsafe fn load_half_e8m0(p: *const u8) -> Self::F;
    /// Each byte shifted right by `shift` and cut to `mask`, which has no bit that comes from another byte.
    unsafe fn field(v: Self::U, shift: usize, mask: u8) -> Self::U;
    /// `low | bits`: the bits of `v` from bit `from` on, moved to bit `to` and cut to `mask`, likewise.
    unsafe fn insert(low: Self::U, v: Self::U, from: usize, to: usize, mask: u8) -> Self::U;
    /// `table[byte]` of bytes below 16.
    unsafe fn lookup(table: &[u8; 16], v: Self::U) -> Self::U;
}

/// A level of [`Panel`] that adds products to I32 at no cost.
macro_rules! no_small_sums {
    () => {
        type Small = ();
        #[inline(always)]
        unsafe fn zero_small() -> Self::Small {}
        #[inline(always)]
        unsafe fn dot_small((): (), _: Self::U, _: *const u8) -> Self::Small {}
        #[inline(always)]
        unsafe fn widen(acc: Self::I, (): ()) -> Self::I {
            acc
        }
    };
}
pub(in crate::simd) use no_small_sums;

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
            PackedFormat::Q4_1 => tiles::<P, block::Tile<small_blocks::Q4_1>>(g),
            PackedFormat::Q5_0 => tiles::<P, block::Tile<small_blocks::Q5_0>>(g),
            PackedFormat::Q5_1 => tiles::<P, block::Tile<small_blocks::Q5_1>>(g),
            PackedFormat::Q2K => tiles::<P, block::Tile<k_quants::Q2K>>(g),
            PackedFormat::Q3K => tiles::<P, block::Tile<k_quants::Q3K>>(g),
            PackedFormat::Q4K => tiles::<P, block::Tile<block::Q4K>>(g),
            PackedFormat::Q5K => tiles::<P, block::Tile<k_quants::Q5K>>(g),
            PackedFormat::Q6K => tiles::<P, block::Tile<k_quants::Q6K>>(g),
            PackedFormat::Iq4Nl => tiles::<P, block::Tile<tables::Iq4Nl>>(g),
            PackedFormat::Iq4Xs => tiles::<P, block::Tile<tables::Iq4Xs>>(g),
            PackedFormat::Mxfp4 => tiles::<P, block::Tile<tables::Mxfp4>>(g),
            PackedFormat::Int4 => tiles::<P, block::Tile<small_blocks::Int4>>(g),
        }
    }
}

/// Most tokens of a tile, by [`Rounding`].
pub(super) const fn tile_tokens<P: Panel>() -> [usize; 2] {
    assert!(P::TILE_BF16 <= TILE_TOKENS_MAX && P::TILE_BYTES <= TILE_TOKENS_MAX, "rows of a tile have room");
    let mut most = [0; 2];
    most[Rounding::Bf16 as usize] = P::TILE_BF16;
    most[Rounding::Bytes as usize] = P::TILE_BYTES;
    most
}

/// How one packed format is multiplied.
trait Tiled<P: Panel> {
    /// Most tokens of one tile.
    const TILE: usize;
    /// Tiles of fewer tokens always stream: they are the only ones of their groups, or it costs them nothing.
    const STREAMS_BELOW: usize;
    /// Whether the others have a second kernel that streams: worth its code in the formats that most people have.
    const STREAMS_WIDE: bool;

    /// The products of the groups at `w` with a tile of `T` tokens at `x`. `S`: nobody fetched the groups before, so
    /// this tile streams them.
    ///
    /// # Safety
    /// Both are whole; the features of `P`.
    unsafe fn tile<const G: usize, const T: usize, const S: bool>(
        w: &PanelRef,
        groups: [*const u8; G],
        x: *const f32,
        ahead: &Ahead,
    ) -> [[P::F; T]; G];
}

/// What will be needed soon: while the tiles of this pair of groups are computed, the next pair comes from memory, each
/// tile bringing its share. Tiles of the first pair bring the tokens of the next tile too.
pub(super) struct Ahead {
    /// Whether this tile is the first that reads its groups, and nobody fetched them before.
    streams: bool,
    /// Bytes between a line that streams in and the one in use.
    distance: usize,
    group_bytes: usize,
    /// The next pair of groups, from the share of the next tile on.
    next: *const u8,
    /// Bytes that each tile brings.
    share: usize,
    /// 256ths of a byte per step.
    step: usize,
    /// The tokens that lie behind those of this tile.
    tokens: *const u8,
    /// 256ths of a byte of them per step.
    tokens_step: usize,
}

impl Ahead {
    /// What a tile brings when `tiles` of them use the same `groups`, in `steps` steps each.
    fn new(groups: usize, group_bytes: usize, tiles: usize, steps: usize) -> Self {
        let (share, steps) = (groups * group_bytes / tiles, steps.max(1));
        let step = if tiles < AHEAD_TILES_MIN { 0 } else { share * 256 / steps };
        // Whole steps, so that no step's lines lie in two groups.
        let step_bytes = (group_bytes / steps).max(1);
        let distance = STREAM_AHEAD.div_ceil(step_bytes) * step_bytes;
        let nothing = std::ptr::null();
        let streams = step == 0;
        Self { streams, distance, group_bytes, next: nothing, share, step, tokens: nothing, tokens_step: 0 }
    }

    /// Brings `bytes` of tokens in the steps of a tile.
    fn bring(&mut self, tokens: *const u8, bytes: usize, steps: usize) {
        (self.tokens, self.tokens_step) = (tokens, bytes * 256 / steps.max(1));
    }

    /// For the first tile of groups that `next` comes after.
    fn from(&self, next: *const u8) -> Self {
        Self { next, ..*self }
    }

    /// For the next tile of the same groups.
    fn pass(&mut self) {
        self.streams = false;
        self.next = self.next.wrapping_add(if self.step > 0 { self.share } else { 0 });
    }

    /// What follows the bytes from `offset` on: after the end of the groups, the next ones.
    #[inline(always)]
    pub(super) fn stream<const G: usize, const S: bool>(
        &self,
        groups: [*const u8; G],
        offset: usize,
    ) -> Stream<G, S> {
        let offset = offset + self.distance;
        if offset < self.group_bytes {
            return Stream(groups).from(offset);
        }
        let mut at = [self.next; G];
        for (i, at) in at.iter_mut().enumerate() {
            *at = at.wrapping_add(i * self.group_bytes);
        }
        Stream(at).from(offset - self.group_bytes)
    }

    /// Asks for what step `step` is to bring.
    ///
    /// # Safety
    /// The features of `P`.
    #[inline(always)]
    pub(super) unsafe fn step<P: Panel>(&self, step: usize) {
        let (from, to) = ((step * self.step) >> 14, ((step + 1) * self.step) >> 14);
        for line in from..to {
            // SAFETY: a hint about a place that need not be there.
            unsafe { P::prefetch(self.next.wrapping_add(line * 64)) };
        }
        let (from, to) = ((step * self.tokens_step) >> 14, ((step + 1) * self.tokens_step) >> 14);
        for line in from..to {
            // SAFETY: as above.
            unsafe { P::prefetch(self.tokens.wrapping_add(line * 64)) };
        }
    }
}

/// The lines of the groups that come about [`STREAM_AHEAD`] bytes after those in use, if `S`.
pub(super) struct Stream<const G: usize, const S: bool>([*const u8; G]);

impl<const G: usize, const S: bool> Stream<G, S> {
    #[inline(always)]
    pub(super) fn from(&self, offset: usize) -> Self {
        let mut at = self.0;
        for at in &mut at {
            *at = at.wrapping_add(offset);
        }
        Self(at)
    }

    /// Asks for some of the lines: a few at a time, as a core can wait for no more.
    ///
    /// # Safety
    /// The features of `P`.
    #[inline(always)]
    pub(super) unsafe fn fetch<P: Panel>(&self, lines: std::ops::Range<usize>) {
        if S {
            for line in lines {
                for at in self.0 {
                    // SAFETY: a hint about a place that need not be there.
                    unsafe { P::prefetch_near(at.wrapping_add(line * 64)) };
                }
            }
        }
    }
}

/// From so many tiles on, the next pair of groups is fetched during the tiles of this one.
const AHEAD_TILES_MIN: usize = 3;
/// How far ahead of its use a line of weights is asked for: about what is under way to one core.
pub(super) const STREAM_AHEAD: usize = 4 << 10;
/// Bytes of activations that all groups use before the next ones come: a part of the L2 cache.
const X_BYTES_TOGETHER: usize = 384 << 10;

/// All tiles; tokens innermost, so that the weights of a pair of groups stay in cache.
#[inline(always)]
unsafe fn tiles<P: Panel, D: Tiled<P>>(g: &PanelGemm<'_>) {
    // SAFETY: the caller's promise is passed on.
    unsafe { if P::PAIRS { tiles_of::<P, D, 2>(g) } else { tiles_of::<P, D, 1>(g) } }
}

#[inline(always)]
unsafe fn tiles_of<P: Panel, D: Tiled<P>, const G: usize>(g: &PanelGemm<'_>) {
    let n = g.out_rows.len();
    let count = n.div_ceil(D::TILE);
    let together = (X_BYTES_TOGETHER / (g.x.row_words * 4 * D::TILE)).max(1);
    for from in (0..count).step_by(together) {
        let block = from..count.min(from + together);
        let tiles = rounded::tiles(n, D::TILE).skip(block.start).take(block.len());
        let ahead = Ahead::new(G, g.w.group_bytes, block.len(), g.w.cols / 128);
        for group in g.groups.clone().step_by(G) {
            let last = g.groups.end - 1;
            // Where there is no second group the first stands in for it, and its products are thrown away.
            let groups: [*const u8; G] = std::array::from_fn(|i| g.w.group((group + i).min(last)));
            let is_last = group + G >= g.groups.end && !g.then.is_null();
            let next = if is_last { g.then } else { g.w.group(group + G) };
            let mut ahead = ahead.from(next);
            for (first, width) in tiles.clone() {
                if group == g.groups.start && width > 1 {
                    let bytes = width * g.x.row_words * 4;
                    ahead.bring(g.x.row(first + width).cast(), bytes, g.w.cols / 128);
                }
                // SAFETY: the groups and the tile are the caller's, who has the features.
                unsafe { one_tile::<P, D, G>(Place { g, group, groups, first, ahead: &ahead }, width) };
                ahead.pass();
            }
        }
    }
}

/// A tile of a product: the `G` groups from `group` on, the tokens from `first` on.
#[derive(Clone, Copy)]
struct Place<'a, const G: usize> {
    g: &'a PanelGemm<'a>,
    group: usize,
    groups: [*const u8; G],
    first: usize,
    ahead: &'a Ahead,
}

/// The tile of `width` tokens. What a format has no tile for is left out by constants, before it is compiled.
#[inline(always)]
unsafe fn one_tile<P: Panel, D: Tiled<P>, const G: usize>(at: Place<'_, G>, width: usize) {
    macro_rules! widths {
        ($($n:literal)*) => {
            match width {
                // SAFETY: the caller's promise is passed on.
                $($n if const { $n <= D::TILE } => unsafe { streamed_or_not::<P, D, G, $n>(at) },)*
                _ => unreachable!("a tile of {width} tokens"),
            }
        };
    }
    widths!(1 2 3 4 5 6 7 8 9 10 11 12);
}

#[inline(always)]
unsafe fn streamed_or_not<P: Panel, D: Tiled<P>, const G: usize, const T: usize>(at: Place<'_, G>) {
    // SAFETY: the caller's promise is passed on.
    unsafe {
        if const { T < D::STREAMS_BELOW } {
            P::outlined(Tile::<'_, P, D, G, T, true>(at, PhantomData));
        } else if const { !D::STREAMS_WIDE } {
            P::outlined(Tile::<'_, P, D, G, T, false>(at, PhantomData));
        } else if at.ahead.streams {
            P::outlined(Tile::<'_, P, D, G, T, true>(at, PhantomData));
        } else {
            P::outlined(Tile::<'_, P, D, G, T, false>(at, PhantomData));
        }
    }
}

/// The tile of `T` tokens at a place; `S` as in [`Tiled::tile`].
struct Tile<'a, P, D, const G: usize, const T: usize, const S: bool>(Place<'a, G>, PhantomData<(P, D)>);

impl<P: Panel, D: Tiled<P>, const G: usize, const T: usize, const S: bool> Outlined
    for Tile<'_, P, D, G, T, S>
{
    #[inline(always)]
    unsafe fn run(self) {
        let Place { g, group, groups, first, ahead } = self.0;
        // SAFETY: whoever made it has groups, tile and output, and calls it with the features of `P`.
        unsafe {
            expect_output::<P, G>(g, group, &g.out_rows[first..first + T]);
            let sums = D::tile::<G, T, S>(&g.w, groups, g.x.row(first), ahead);
            emit::<P, G, T>(g, group, first, sums);
        }
    }
}

/// Asks for the places that a tile's products go to. Rows of an output are often a power of two apart, so that they
/// push each other out of the caches between two tiles.
#[inline(always)]
unsafe fn expect_output<P: Panel, const G: usize>(g: &PanelGemm<'_>, group: usize, rows: &[u32]) {
    let column = (group - g.groups.start) * GROUP_ROWS;
    for &row in rows {
        let out = g.out.wrapping_add(row as usize * g.out_stride + column).cast::<u8>();
        for i in 0..G {
            // SAFETY: a hint about a place that need not be there.
            unsafe { P::prefetch_near(out.wrapping_add(i * 64)) };
        }
    }
}

/// Writes the products of one tile out.
#[inline(always)]
unsafe fn emit<P: Panel, const G: usize, const T: usize>(
    g: &PanelGemm<'_>,
    group: usize,
    first_token: usize,
    sums: [[P::F; T]; G],
) {
    // SAFETY: the caller's promise; rows past the end of W are computed from padding and not written.
    unsafe {
        for (i, sums) in sums.into_iter().enumerate().take(g.groups.end - group) {
            let first = (group + i) * GROUP_ROWS;
            let n = GROUP_ROWS.min(g.w.rows - first);
            let column = first - g.groups.start * GROUP_ROWS;
            for (j, sum) in sums.into_iter().enumerate() {
                let out = g.out.add(g.out_rows[first_token + j] as usize * g.out_stride + column);
                if n == GROUP_ROWS {
                    write::<P>(g.output, first_token + j, sum, out);
                } else {
                    let mut rows = [0.0f32; GROUP_ROWS];
                    rows.as_mut_ptr().copy_from_nonoverlapping(out, n);
                    write::<P>(g.output, first_token + j, sum, rows.as_mut_ptr());
                    out.copy_from_nonoverlapping(rows.as_ptr(), n);
                }
            }
        }
    }
}

/// Writes the products of sixteen rows with token `token` to `out`.
#[inline(always)]
unsafe fn write<P: Panel>(output: Output<'_>, token: usize, sum: P::F, out: *mut f32) {
    // SAFETY: sixteen values at `out`.
    unsafe {
        let sum = match output {
            Output::Store => sum,
            Output::Add => P::fma(sum, P::splat(1.0), P::load(out)),
            Output::AddScaled(s) => P::fma(sum, P::splat(s[token]), P::load(out)),
        };
        P::store(sum, out);
    }
}
