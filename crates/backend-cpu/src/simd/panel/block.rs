//! Block formats with 8-bit activations: integer sums per block, exact; scaled and summed in F32 per 128 columns.

use std::marker::PhantomData;

use super::{Panel, PanelGemm, Tiled};

/// A format of blocks of 32 columns, each with a scale and perhaps a minimum per row: `w = scale * (q - ZERO) - min`.
pub(super) trait Block<P: Panel> {
    /// `log2` of the value that stands for zero; `None` when the format has minima instead.
    const ZERO_SHIFT: Option<u32>;
    /// Whether eight blocks share a header.
    const SUPER: bool = false;
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
}

/// 16 halves, then 8 units of bytes.
pub(super) struct Q8_0;
/// 16 halves, then 4 units whose low nibbles are units 0..4 and whose high nibbles are units 4..8.
pub(super) struct Q4_0;
/// 256 columns: scales, minima, 12 bytes of 6-bit factors as three words per row, then four pairs of blocks of 8 units:
/// low nibbles the even block, high nibbles the odd one.
pub(super) struct Q4K;

impl<P: Panel> Block<P> for Q8_0 {
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
    const ZERO_SHIFT: Option<u32> = None;
    const SUPER: bool = true;
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
    #[inline(always)]
    unsafe fn min(at: *const u8, b: usize) -> P::F {
        // SAFETY: as above.
        unsafe {
            let factor = match b {
                0 => P::bits::<0, 63>(at.add(128)),
                1 => P::bits::<8, 63>(at.add(128)),
                2 => P::bits::<16, 63>(at.add(128)),
                3 => P::bits::<24, 63>(at.add(128)),
                4 => P::join::<4>(P::bits::<4, 15>(at.add(192)), P::bits::<6, 3>(at.add(128))),
                5 => P::join::<4>(P::bits::<12, 15>(at.add(192)), P::bits::<14, 3>(at.add(128))),
                6 => P::join::<4>(P::bits::<20, 15>(at.add(192)), P::bits::<22, 3>(at.add(128))),
                _ => P::join::<4>(P::bits::<28, 15>(at.add(192)), P::bits::<30, 3>(at.add(128))),
            };
            P::mul(P::to_f32(factor), P::load_f16(at.add(32)))
        }
    }
}

pub(super) struct Tile<D>(PhantomData<D>);

impl<P: Panel, D: Block<P>> Tiled<P> for Tile<D> {
    const WIDE_PAIRS: bool = false;

    #[inline(always)]
    unsafe fn tile<const G: usize, const T: usize>(
        g: &PanelGemm<'_>,
        group: usize,
        t: usize,
    ) -> [[P::F; T]; G] {
        // SAFETY: a group holds `blocks` blocks; a row of x whole runs of 128 bytes with one scale and eight sums each.
        unsafe {
            let blocks = g.w.cols / 32;
            let w: [*const u8; G] = std::array::from_fn(|i| g.w.group(group + i));
            let row: [usize; T] = std::array::from_fn(|j| g.tokens[t + j] as usize);
            let x: [*const u8; T] = std::array::from_fn(|j| g.x.data.add(row[j] * g.x.row_bytes));
            let sums: [*const i32; T] = std::array::from_fn(|j| g.x.minus_sums.add(row[j] * g.x.row_sums));
            let scales: [*const f32; T] = std::array::from_fn(|j| g.x.scales.add(row[j] * g.x.row_scales));
            let mut total = [[P::splat(0.0); T]; G];
            for run in 0..blocks.div_ceil(4) {
                let mut part = [[P::splat(0.0); T]; G];
                let end = blocks.min(run * 4 + 4);
                if end - run * 4 < 4 {
                    for b in run * 4..end {
                        add_block::<P, D, G, T>(&w, &x, &sums, b, b % 8, &mut part);
                    }
                } else if D::SUPER && run % 2 == 1 {
                    for place in 4..8 {
                        add_block::<P, D, G, T>(&w, &x, &sums, run * 4 + place - 4, place, &mut part);
                    }
                } else {
                    for place in 0..4 {
                        add_block::<P, D, G, T>(&w, &x, &sums, run * 4 + place, place, &mut part);
                    }
                }
                for j in 0..T {
                    let scale = P::splat(*scales[j].add(run));
                    for i in 0..G {
                        total[i][j] = P::fma(part[i][j], scale, total[i][j]);
                    }
                }
            }
            total
        }
    }
}

/// Adds block `b`; where the caller's loop is unrolled, its place in a super-block is known at compile time.
#[inline(always)]
unsafe fn add_block<P: Panel, D: Block<P>, const G: usize, const T: usize>(
    w: &[*const u8; G],
    x: &[*const u8; T],
    sums: &[*const i32; T],
    b: usize,
    place: usize,
    part: &mut [[P::F; T]; G],
) {
    // SAFETY: the caller keeps the block inside of the group.
    unsafe {
        for i in 0..G {
            let at = D::at(w[i], b);
            let mut acc: [P::I; T] = std::array::from_fn(|j| match D::ZERO_SHIFT {
                Some(7) if P::OFFSET_IN_SUMS => P::splat_shifted::<7>(sums[j].add(b)),
                Some(3) => P::splat_shifted::<3>(sums[j].add(b)),
                _ => P::zero_i(),
            });
            for unit in 0..8 {
                let u = D::unit(at, place, unit);
                for j in 0..T {
                    let x = x[j].add(b * 32 + unit * 4);
                    acc[j] = if D::ZERO_SHIFT == Some(7) {
                        P::dot_s8(acc[j], u, x)
                    } else {
                        P::dot_u7(acc[j], u, x)
                    };
                }
            }
            let scale = D::scale(at, place);
            for j in 0..T {
                part[i][j] = P::fma(P::to_f32(acc[j]), scale, part[i][j]);
            }
            if D::ZERO_SHIFT.is_none() {
                let min = D::min(at, place);
                for j in 0..T {
                    part[i][j] = P::fma(P::splat(*sums[j].add(b) as f32), min, part[i][j]);
                }
            }
        }
    }
}
