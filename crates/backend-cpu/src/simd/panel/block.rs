//! Block formats with 8-bit activations: integer sums per block, exact; scaled and summed in F32 per 128 columns.
#![allow(clippy::needless_range_loop, reason = "rows and groups of a tile index several arrays at once")]

use std::marker::PhantomData;

use super::{Ahead, Panel, Stream, Tiled};
use crate::{
    packed::{PackedFormat, PanelRef, RUN},
    rounded::{BYTE_RUN_WORDS, CODES, SUM_SHIFT, SUMS_16, SUMS_32, SUMS_HIGH, SUMS_LOW},
};

/// Activations are bytes from minus this to this.
const ACTIVATION_MAX: usize = 127;

/// A format of blocks of columns, each with a scale and perhaps a minimum per row: `w = scale * (q - ZERO) - min`.
pub(super) trait Block<P: Panel> {
    /// Four columns each: 8 of them to a block, or 4.
    const UNITS: usize = 8;
    /// No code is larger.
    const CODE_MAX: usize;
    /// `log2` of the value that stands for zero; `None` when the format has minima instead.
    const ZERO_SHIFT: Option<u32>;
    /// One of the formats that most people have.
    const COMMON: bool = false;
    const FORMAT: PackedFormat;
    /// Half cache lines of a block of all rows of a group, rounded up.
    const LINES_TWICE: usize = (Self::FORMAT.group_bytes(256) * 4 * Self::UNITS / 256).div_ceil(32);
    /// Whether the blocks of 256 columns share a header.
    const SUPER: bool = false;
    /// Whether the blocks of a run are unrolled where the level does so, so that their places in a super-block are
    /// constants: worth its code where a format must be as fast as memory.
    const UNROLLED: bool = false;
    /// Units whose products are summed as [`Panel::Small`] before they are widened; 0 where that gains nothing.
    const SMALL_UNITS: usize = {
        let most = P::SMALL_MAX / (2 * Self::CODE_MAX * ACTIVATION_MAX);
        if most < 2 {
            0
        } else if most < Self::UNITS {
            most / 2 * 2
        } else {
            Self::UNITS
        }
    };
    /// Where block `b` of a group lies, header included.
    unsafe fn at(group: *const u8, b: usize) -> *const u8;
    /// The unsigned weights of columns `4 * unit..` of the block that is `b`-th of its header.
    unsafe fn unit(at: *const u8, b: usize, unit: usize) -> P::U;
    /// The scales of a block.
    unsafe fn scale(at: *const u8, b: usize) -> P::F;
    /// What minus the sum of a block's activations is multiplied with.
    unsafe fn min(_at: *const u8, _b: usize) -> P::F {
        // SAFETY: arithmetic only.
        unsafe { P::splat(0.0) }
    }
    /// Whether the minima of a run's four blocks are multiplied together, as `mins` times `mins_scale` instead of
    /// [`Block::min`]: a dot product of bytes costs less than four products in F32.
    const MINS_TOGETHER: bool = false;
    /// The minima of blocks `first..first + 4`, a byte each, below 64.
    unsafe fn mins(_at: *const u8, _first: usize) -> P::U {
        unreachable!("a format whose minima are multiplied one by one")
    }
    unsafe fn mins_scale(_at: *const u8) -> P::F {
        unreachable!("a format whose minima are multiplied one by one")
    }
}

/// 16 halves, then 8 units of bytes.
pub(super) struct Q8_0;
/// 16 halves, then 4 units whose low nibbles are units 0..4 and whose high nibbles are units 4..8.
pub(super) struct Q4_0;
/// 256 columns: scales, minima, 12 bytes of 6-bit factors as three words per row, then four pairs of blocks of 8 units:
/// low nibbles the even block, high nibbles the odd one.
pub(super) struct Q4K;

impl<P: Panel> Block<P> for Q8_0 {
    const FORMAT: PackedFormat = PackedFormat::Q8_0;
    const CODE_MAX: usize = 255;
    const COMMON: bool = true;
    const ZERO_SHIFT: Option<u32> = Some(7);
    #[inline(always)]
    unsafe fn at(group: *const u8, b: usize) -> *const u8 {
        group.wrapping_add(b * (32 + 512))
    }
    #[inline(always)]
    unsafe fn unit(at: *const u8, _: usize, unit: usize) -> P::U {
        // SAFETY: unit < 8.
        unsafe { P::load_u8(at.add(32 + unit * 64)) }
    }
    #[inline(always)]
    unsafe fn scale(at: *const u8, _: usize) -> P::F {
        // SAFETY: 32 bytes of halves.
        unsafe { P::load_f16(at) }
    }
}

impl<P: Panel> Block<P> for Q4_0 {
    const FORMAT: PackedFormat = PackedFormat::Q4_0;
    const CODE_MAX: usize = 15;
    const COMMON: bool = true;
    const ZERO_SHIFT: Option<u32> = Some(3);
    #[inline(always)]
    unsafe fn at(group: *const u8, b: usize) -> *const u8 {
        group.wrapping_add(b * (32 + 256))
    }
    #[inline(always)]
    unsafe fn unit(at: *const u8, _: usize, unit: usize) -> P::U {
        // SAFETY: unit < 8.
        unsafe {
            let both = P::load_u8(at.add(32 + unit % 4 * 64));
            if unit < 4 { P::low_nibbles(both) } else { P::high_nibbles(both) }
        }
    }
    #[inline(always)]
    unsafe fn scale(at: *const u8, _: usize) -> P::F {
        // SAFETY: 32 bytes of halves.
        unsafe { P::load_f16(at) }
    }
}

/// Bytes of 16 super-blocks: halves, 6-bit factors, nibbles.
const Q4K_BYTES: usize = 16 * 144;

impl<P: Panel> Block<P> for Q4K {
    const FORMAT: PackedFormat = PackedFormat::Q4K;
    const CODE_MAX: usize = 15;
    const COMMON: bool = true;
    const ZERO_SHIFT: Option<u32> = None;
    const SUPER: bool = true;
    const UNROLLED: bool = true;
    #[inline(always)]
    unsafe fn at(group: *const u8, b: usize) -> *const u8 {
        group.wrapping_add(b / 8 * Q4K_BYTES)
    }
    #[inline(always)]
    unsafe fn unit(at: *const u8, b: usize, unit: usize) -> P::U {
        // SAFETY: unit < 8.
        unsafe {
            let both = P::load_u8(at.add(256 + b / 2 * 512 + unit * 64));
            if b.is_multiple_of(2) { P::low_nibbles(both) } else { P::high_nibbles(both) }
        }
    }
    #[inline(always)]
    unsafe fn scale(at: *const u8, b: usize) -> P::F {
        // SAFETY: words at 64 (scales 0..4), 128 (minima 0..4), 192 (low bits of scales and minima 4..8).
        unsafe {
            let factor = match b {
                0 => P::bits::<0, 63>(at.add(64)),
                1 => P::bits::<8, 63>(at.add(64)),
                2 => P::bits::<16, 63>(at.add(64)),
                3 => P::bits::<24, 63>(at.add(64)),
                4 => P::join::<4>(P::bits::<0, 15>(at.add(192)), P::bits::<6, 3>(at.add(64))),
                5 => P::join::<4>(P::bits::<8, 15>(at.add(192)), P::bits::<14, 3>(at.add(64))),
                6 => P::join::<4>(P::bits::<16, 15>(at.add(192)), P::bits::<22, 3>(at.add(64))),
                _ => P::join::<4>(P::bits::<24, 15>(at.add(192)), P::bits::<30, 3>(at.add(64))),
            };
            P::mul(P::to_f32(factor), P::load_f16(at))
        }
    }
    const MINS_TOGETHER: bool = true;
    #[inline(always)]
    unsafe fn mins(at: *const u8, first: usize) -> P::U {
        // SAFETY: factors from 64 on.
        unsafe { mins_of_6_bits::<P>(at.add(64), first) }
    }
    #[inline(always)]
    unsafe fn mins_scale(at: *const u8) -> P::F {
        // SAFETY: halves at 32.
        unsafe { P::load_f16(at.add(32)) }
    }
}

/// Q4_K and Q5_K: the minima of blocks `first..first + 4` out of three words: scales 0..4, minima 0..4, low bits of
/// both 4..8; the high bits of those lie above the first ones.
///
/// # Safety
/// 192 bytes at `at`; the features of `P`.
#[inline(always)]
pub(super) unsafe fn mins_of_6_bits<P: Panel>(at: *const u8, first: usize) -> P::U {
    // SAFETY: the caller's promise.
    unsafe {
        let minima = P::load_u8(at.add(64));
        if first == 0 {
            return P::field(minima, 0, 63);
        }
        P::insert(P::field(P::load_u8(at.add(128)), 4, 15), minima, 6, 4, 48)
    }
}

pub(super) struct Tile<D>(PhantomData<D>);

impl<P: Panel, D: Block<P>> Tiled<P> for Tile<D> {
    const TILE: usize = P::TILE_BYTES;
    const STREAMS_BELOW: usize = 4;
    const STREAMS_WIDE: bool = D::COMMON && P::PAIRS;

    #[inline(always)]
    unsafe fn tile<const G: usize, const T: usize, const S: bool>(
        w: &PanelRef,
        groups: [*const u8; G],
        x: *const f32,
        ahead: &Ahead,
    ) -> [[P::F; T]; G] {
        // SAFETY: a group holds `blocks` blocks, and the tile whole runs of 128 columns.
        unsafe {
            let per_run = 32 / D::UNITS;
            let blocks = w.cols / (4 * D::UNITS);
            let run_bytes = w.group_bytes * RUN / w.cols;
            let mut total = [[P::splat(0.0); T]; G];
            for run in 0..blocks.div_ceil(per_run) {
                let x = x.add(run * BYTE_RUN_WORDS * T);
                let mut part = [[P::splat(0.0); T]; G];
                let first = run * per_run;
                ahead.step::<P>(run);
                let stream = ahead.stream::<G, S>(groups, run * run_bytes);
                if !(D::UNROLLED && P::UNROLLS) || blocks - first < per_run {
                    for b in first..blocks.min(first + per_run) {
                        add_block::<P, D, G, T, S>(&groups, x, b, b % (2 * per_run), &stream, &mut part);
                    }
                } else if D::SUPER && run % 2 == 1 {
                    add_block::<P, D, G, T, S>(&groups, x, first, 4, &stream, &mut part);
                    add_block::<P, D, G, T, S>(&groups, x, first + 1, 5, &stream, &mut part);
                    add_block::<P, D, G, T, S>(&groups, x, first + 2, 6, &stream, &mut part);
                    add_block::<P, D, G, T, S>(&groups, x, first + 3, 7, &stream, &mut part);
                } else {
                    add_block::<P, D, G, T, S>(&groups, x, first, 0, &stream, &mut part);
                    add_block::<P, D, G, T, S>(&groups, x, first + 1, 1, &stream, &mut part);
                    add_block::<P, D, G, T, S>(&groups, x, first + 2, 2, &stream, &mut part);
                    add_block::<P, D, G, T, S>(&groups, x, first + 3, 3, &stream, &mut part);
                }
                if D::MINS_TOGETHER {
                    add_mins::<P, D, G, T>(&groups, x, first, &mut part);
                }
                for j in 0..T {
                    let scale = P::splat(*x.add(j));
                    for i in 0..G {
                        total[i][j] = P::fma(part[i][j], scale, total[i][j]);
                    }
                }
            }
            total
        }
    }
}

/// Adds block `b` to sums of the run at `x`; where the caller's loop is unrolled, its place in a super-block is known
/// at compile time.
#[inline(always)]
unsafe fn add_block<P: Panel, D: Block<P>, const G: usize, const T: usize, const S: bool>(
    w: &[*const u8; G],
    x: *const f32,
    b: usize,
    place: usize,
    stream: &Stream<G, S>,
    part: &mut [[P::F; T]; G],
) {
    // SAFETY: the caller keeps the block inside of the group, and `x` is the run that it belongs to.
    unsafe {
        let (sums, in_run) = if D::UNITS == 8 { (SUMS_32, place % 4) } else { (SUMS_16, place % 8) };
        let sums = x.add((sums + in_run) * T).cast::<i32>();
        let codes = x.add((CODES + in_run * D::UNITS) * T).cast::<u8>();
        // Loops, not closures: a closure that is not inlined is compiled without the level's features.
        let mut at = [D::at(w[0], b); G];
        for i in 1..G {
            at[i] = D::at(w[i], b);
        }
        let stream = stream.from(place % (32 / D::UNITS) * D::LINES_TWICE * 32);
        let mut acc = [[P::zero_i(); T]; G];
        if D::ZERO_SHIFT.is_some_and(|shift| shift != 7 || P::OFFSET_IN_SUMS) {
            for j in 0..T {
                let start = match D::ZERO_SHIFT {
                    Some(2) => P::splat_shifted::<2>(sums.add(j)),
                    Some(3) => P::splat_shifted::<3>(sums.add(j)),
                    Some(4) => P::splat_shifted::<4>(sums.add(j)),
                    Some(5) => P::splat_shifted::<5>(sums.add(j)),
                    _ => P::splat_shifted::<7>(sums.add(j)),
                };
                for acc in &mut acc {
                    acc[j] = start;
                }
            }
        }
        let mut small = [[P::zero_small(); T]; G];
        macro_rules! units {
            ($($unit:literal)*) => {$(
                add_unit::<P, D, G, T, S>(&at, codes, place, $unit, &stream, &mut acc, &mut small);
            )*};
        }
        units!(0 1 2 3);
        if D::UNITS == 8 {
            units!(4 5 6 7);
        }
        for i in 0..G {
            let scale = D::scale(at[i], place);
            for j in 0..T {
                part[i][j] = P::fma(P::to_f32(acc[i][j]), scale, part[i][j]);
            }
            if D::ZERO_SHIFT.is_none() && !D::MINS_TOGETHER {
                let min = D::min(at[i], place);
                for j in 0..T {
                    part[i][j] = P::fma(P::to_f32(P::splat_shifted::<0>(sums.add(j))), min, part[i][j]);
                }
            }
        }
    }
}

/// Adds what the minima of blocks `first..first + 4` make of the run at `x`.
#[inline(always)]
unsafe fn add_mins<P: Panel, D: Block<P>, const G: usize, const T: usize>(
    w: &[*const u8; G],
    x: *const f32,
    first: usize,
    part: &mut [[P::F; T]; G],
) {
    // SAFETY: the caller keeps the blocks inside of the group, and `x` is the run that they belong to.
    unsafe {
        let (high, low) = (x.add(SUMS_HIGH * T).cast::<u8>(), x.add(SUMS_LOW * T).cast::<u8>());
        for i in 0..G {
            let at = D::at(w[i], first);
            let (mins, scale) = (D::mins(at, first % 8), D::mins_scale(at));
            for j in 0..T {
                let sum = P::dot_u7(P::zero_i(), mins, high.add(j * 4));
                let sum = P::dot_u7(P::join::<SUM_SHIFT>(P::zero_i(), sum), mins, low.add(j * 4));
                part[i][j] = P::fma(P::to_f32(sum), scale, part[i][j]);
            }
        }
    }
}

/// Adds the products of four columns of a block.
#[inline(always)]
unsafe fn add_unit<P: Panel, D: Block<P>, const G: usize, const T: usize, const S: bool>(
    at: &[*const u8; G],
    codes: *const u8,
    place: usize,
    unit: usize,
    stream: &Stream<G, S>,
    acc: &mut [[P::I; T]; G],
    small: &mut [[P::Small; T]; G],
) {
    // SAFETY: as in `add_block`; as many products as `SMALL_UNITS` says have room.
    unsafe {
        let lines = D::LINES_TWICE.div_ceil(2);
        stream.fetch::<P>(unit * lines / D::UNITS..(unit + 1) * lines / D::UNITS);
        let mut w = [D::unit(at[0], place, unit); G];
        for i in 1..G {
            w[i] = D::unit(at[i], place, unit);
        }
        for j in 0..T {
            let x = codes.add((unit * T + j) * 4);
            for i in 0..G {
                if D::SMALL_UNITS > 0 {
                    small[i][j] = P::dot_small(small[i][j], w[i], x);
                } else if D::ZERO_SHIFT == Some(7) {
                    acc[i][j] = P::dot_s8(acc[i][j], w[i], x);
                } else {
                    acc[i][j] = P::dot_u7(acc[i][j], w[i], x);
                }
            }
        }
        if D::SMALL_UNITS > 0 && (unit + 1).is_multiple_of(D::SMALL_UNITS) {
            for i in 0..G {
                for j in 0..T {
                    acc[i][j] = P::widen(acc[i][j], small[i][j]);
                    small[i][j] = P::zero_small();
                }
            }
        }
    }
}
