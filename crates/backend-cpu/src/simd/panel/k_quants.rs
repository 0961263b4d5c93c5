//! Super-blocks of 256 columns with codes of 2, 3, 5 and 6 bits; `packed/parts.rs` says how they lie.

use super::{
    Panel,
    block::{Block, mins_of_6_bits},
};
use crate::packed::PackedFormat;

/// 16 scales, 16 minima, four words of sixteen factors (low nibble scale, high one minimum), 16 units of 2-bit codes.
pub(super) struct Q2K;
/// 16 scales, three words of sixteen 6-bit factors, 8 units of third bits, 16 units of 2-bit codes.
pub(super) struct Q3K;
/// Scales, minima and factors as in Q4_K, 8 units of fifth bits, then nibbles as in Q4_K.
pub(super) struct Q5K;
/// 16 scales, four words of sixteen factors plus 128, 32 units of nibbles, 16 units of two high bits.
pub(super) struct Q6K;

/// Q2_K, Q3_K: the two bits of unit `unit` of block `b`; each half of a super-block has 8 units at `at`, whose bytes
/// hold four blocks each.
///
/// # Safety
/// 1024 bytes at `at`; the features of `P`.
#[inline(always)]
unsafe fn codes_of_2_bits<P: Panel>(at: *const u8, b: usize, unit: usize) -> P::U {
    // SAFETY: b < 16, unit < 4.
    unsafe { P::field(P::load_u8(at.add((b / 8 * 8 + b % 2 * 4 + unit) * 64)), b % 8 / 2 * 2, 3) }
}

impl<P: Panel> Block<P> for Q2K {
    const FORMAT: PackedFormat = PackedFormat::Q2K;
    const CODE_MAX: usize = 3;
    const UNITS: usize = 4;
    const ZERO_SHIFT: Option<u32> = None;
    const SUPER: bool = true;
    #[inline(always)]
    unsafe fn at(group: *const u8, b: usize) -> *const u8 {
        group.wrapping_add(b / 16 * 84 * 16)
    }
    #[inline(always)]
    unsafe fn unit(at: *const u8, b: usize, unit: usize) -> P::U {
        // SAFETY: 16 units at 320.
        unsafe { codes_of_2_bits::<P>(at.add(320), b, unit) }
    }
    #[inline(always)]
    unsafe fn scale(at: *const u8, b: usize) -> P::F {
        // SAFETY: halves at 0, words at 64.
        unsafe {
            let factor = P::word_bits(at.add(64 + b / 4 * 64), b % 4 * 8, 15);
            P::mul(P::to_f32(factor), P::load_f16(at))
        }
    }
    #[inline(always)]
    unsafe fn min(at: *const u8, b: usize) -> P::F {
        // SAFETY: halves at 32, words at 64.
        unsafe {
            let factor = P::word_bits(at.add(64 + b / 4 * 64), b % 4 * 8 + 4, 15);
            P::mul(P::to_f32(factor), P::load_f16(at.add(32)))
        }
    }
}

impl<P: Panel> Block<P> for Q3K {
    const FORMAT: PackedFormat = PackedFormat::Q3K;
    const CODE_MAX: usize = 7;
    const UNITS: usize = 4;
    const ZERO_SHIFT: Option<u32> = Some(2);
    const SUPER: bool = true;
    #[inline(always)]
    unsafe fn at(group: *const u8, b: usize) -> *const u8 {
        group.wrapping_add(b / 16 * 110 * 16)
    }
    #[inline(always)]
    unsafe fn unit(at: *const u8, b: usize, unit: usize) -> P::U {
        // SAFETY: 8 units at 224, 16 units at 736.
        unsafe {
            let third = P::load_u8(at.add(224 + (b % 2 * 4 + unit) * 64));
            P::insert(codes_of_2_bits::<P>(at.add(736), b, unit), third, b / 2, 2, 4)
        }
    }
    /// `d * (factor - 32)`, rounded once.
    #[inline(always)]
    unsafe fn scale(at: *const u8, b: usize) -> P::F {
        // SAFETY: halves at 0, words at 32.
        unsafe {
            let d = P::load_f16(at);
            let low = P::word_bits(at.add(32 + b % 8 / 4 * 64), b % 4 * 8 + b / 8 * 4, 15);
            let high = P::word_bits(at.add(32 + 128), b % 4 * 8 + b / 4 * 2, 3);
            P::fma(P::to_f32(P::join::<4>(low, high)), d, P::mul(d, P::splat(-32.0)))
        }
    }
}

impl<P: Panel> Block<P> for Q5K {
    const FORMAT: PackedFormat = PackedFormat::Q5K;
    const CODE_MAX: usize = 31;
    const ZERO_SHIFT: Option<u32> = None;
    const SUPER: bool = true;
    #[inline(always)]
    unsafe fn at(group: *const u8, b: usize) -> *const u8 {
        group.wrapping_add(b / 8 * 176 * 16)
    }
    #[inline(always)]
    unsafe fn unit(at: *const u8, b: usize, unit: usize) -> P::U {
        // SAFETY: 8 units at 256, 32 units at 768.
        unsafe {
            let both = P::load_u8(at.add(768 + b / 2 * 512 + unit * 64));
            P::insert(P::field(both, b % 2 * 4, 15), P::load_u8(at.add(256 + unit * 64)), b, 4, 16)
        }
    }
    #[inline(always)]
    unsafe fn scale(at: *const u8, b: usize) -> P::F {
        // SAFETY: halves at 0, factors from 64 on.
        unsafe { P::mul(P::to_f32(scale_of_6_bits::<P>(at.add(64), b)), P::load_f16(at)) }
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

/// Q5_K: the scale of block `b` out of three words: scales 0..4, minima 0..4, low bits of both 4..8; the high bits of
/// those lie above the first ones.
///
/// # Safety
/// 192 bytes at `at`; the features of `P`.
#[inline(always)]
unsafe fn scale_of_6_bits<P: Panel>(at: *const u8, b: usize) -> P::I {
    // SAFETY: the caller's promise.
    unsafe {
        let shift = b % 4 * 8;
        if b < 4 {
            return P::word_bits(at, shift, 63);
        }
        P::join::<4>(P::word_bits(at.add(128), shift, 15), P::word_bits(at, shift + 6, 3))
    }
}

impl<P: Panel> Block<P> for Q6K {
    const FORMAT: PackedFormat = PackedFormat::Q6K;
    const CODE_MAX: usize = 63;
    const COMMON: bool = true;
    const UNITS: usize = 4;
    const ZERO_SHIFT: Option<u32> = Some(5);
    const SUPER: bool = true;
    #[inline(always)]
    unsafe fn at(group: *const u8, b: usize) -> *const u8 {
        group.wrapping_add(b / 16 * 210 * 16)
    }
    /// Each half of a super-block has four quarters of 32 columns: nibbles of two share a byte, high bits of all four.
    #[inline(always)]
    unsafe fn unit(at: *const u8, b: usize, unit: usize) -> P::U {
        // SAFETY: 32 units at 288, 16 units at 2336.
        unsafe {
            let (half, quarter, unit) = (b / 8, b % 8 / 2, b % 2 * 4 + unit);
            let both = P::load_u8(at.add(288 + (half * 16 + quarter % 2 * 8 + unit) * 64));
            let high = P::load_u8(at.add(2336 + (half * 8 + unit) * 64));
            P::insert(P::field(both, quarter / 2 * 4, 15), high, quarter * 2, 4, 0x30)
        }
    }
    /// `d * factor`, rounded once.
    #[inline(always)]
    unsafe fn scale(at: *const u8, b: usize) -> P::F {
        // SAFETY: halves at 0, words at 32.
        unsafe {
            let d = P::load_f16(at);
            let factor = P::word_bits(at.add(32 + b / 4 * 64), b % 4 * 8, 255);
            P::fma(P::to_f32(factor), d, P::mul(d, P::splat(-128.0)))
        }
    }
}
