//! Blocks of 32 columns with minima, with fifth bits, or with both; `packed/parts.rs` says how they lie.

use super::{Panel, block::Block};
use crate::packed::PackedFormat;

/// 16 scales and 16 minima, then 4 units of nibbles as in Q4_0.
pub(super) struct Q4_1;
/// 16 scales, a unit of fifth bits, 4 units of nibbles.
pub(super) struct Q5_0;
/// 16 scales and 16 minima, a unit of fifth bits, 4 units of nibbles.
pub(super) struct Q5_1;

/// 16 scales in BF16, then 4 units of nibbles as in Q4_0.
pub(super) struct Int4;

/// Unit `unit` out of 4 units at `at`: the low nibbles are units 0..4, the high ones units 4..8.
///
/// # Safety
/// 256 bytes at `at`; the features of `P`.
#[inline(always)]
pub(super) unsafe fn nibbles<P: Panel>(at: *const u8, unit: usize) -> P::U {
    // SAFETY: the caller's promise.
    unsafe {
        let both = P::load_u8(at.add(unit % 4 * 64));
        if unit < 4 { P::low_nibbles(both) } else { P::high_nibbles(both) }
    }
}

/// The same with fifth bits before the nibbles: bit `unit` of each byte is that of its column.
///
/// # Safety
/// 320 bytes at `at`; the features of `P`.
#[inline(always)]
unsafe fn codes_of_5_bits<P: Panel>(at: *const u8, unit: usize) -> P::U {
    // SAFETY: the caller's promise.
    unsafe { P::insert(nibbles::<P>(at.add(64), unit), P::load_u8(at), unit, 4, 16) }
}

impl<P: Panel> Block<P> for Q4_1 {
    const FORMAT: PackedFormat = PackedFormat::Q4_1;
    const CODE_MAX: usize = 15;
    const ZERO_SHIFT: Option<u32> = None;
    #[inline(always)]
    unsafe fn at(group: *const u8, b: usize) -> *const u8 {
        group.wrapping_add(b * 320)
    }
    #[inline(always)]
    unsafe fn unit(at: *const u8, _: usize, unit: usize) -> P::U {
        // SAFETY: unit < 8.
        unsafe { nibbles::<P>(at.add(64), unit) }
    }
    #[inline(always)]
    unsafe fn scale(at: *const u8, _: usize) -> P::F {
        // SAFETY: 32 bytes of halves.
        unsafe { P::load_f16(at) }
    }
    #[inline(always)]
    unsafe fn min(at: *const u8, _: usize) -> P::F {
        // SAFETY: as above.
        unsafe { P::load_f16(at.add(32)) }
    }
}

impl<P: Panel> Block<P> for Q5_0 {
    const FORMAT: PackedFormat = PackedFormat::Q5_0;
    const CODE_MAX: usize = 31;
    const ZERO_SHIFT: Option<u32> = Some(4);
    #[inline(always)]
    unsafe fn at(group: *const u8, b: usize) -> *const u8 {
        group.wrapping_add(b * 352)
    }
    #[inline(always)]
    unsafe fn unit(at: *const u8, _: usize, unit: usize) -> P::U {
        // SAFETY: unit < 8.
        unsafe { codes_of_5_bits::<P>(at.add(32), unit) }
    }
    #[inline(always)]
    unsafe fn scale(at: *const u8, _: usize) -> P::F {
        // SAFETY: 32 bytes of halves.
        unsafe { P::load_f16(at) }
    }
}

impl<P: Panel> Block<P> for Q5_1 {
    const FORMAT: PackedFormat = PackedFormat::Q5_1;
    const CODE_MAX: usize = 31;
    const ZERO_SHIFT: Option<u32> = None;
    #[inline(always)]
    unsafe fn at(group: *const u8, b: usize) -> *const u8 {
        group.wrapping_add(b * 384)
    }
    #[inline(always)]
    unsafe fn unit(at: *const u8, _: usize, unit: usize) -> P::U {
        // SAFETY: unit < 8.
        unsafe { codes_of_5_bits::<P>(at.add(64), unit) }
    }
    #[inline(always)]
    unsafe fn scale(at: *const u8, _: usize) -> P::F {
        // SAFETY: 32 bytes of halves.
        unsafe { P::load_f16(at) }
    }
    #[inline(always)]
    unsafe fn min(at: *const u8, _: usize) -> P::F {
        // SAFETY: as above.
        unsafe { P::load_f16(at.add(32)) }
    }
}

impl<P: Panel> Block<P> for Int4 {
    const FORMAT: PackedFormat = PackedFormat::Int4;
    const CODE_MAX: usize = 15;
    const ZERO_SHIFT: Option<u32> = Some(3);
    #[inline(always)]
    unsafe fn at(group: *const u8, b: usize) -> *const u8 {
        group.wrapping_add(b * 288)
    }
    #[inline(always)]
    unsafe fn unit(at: *const u8, _: usize, unit: usize) -> P::U {
        // SAFETY: unit < 8.
        unsafe { nibbles::<P>(at.add(32), unit) }
    }
    #[inline(always)]
    unsafe fn scale(at: *const u8, _: usize) -> P::F {
        // SAFETY: 32 bytes of BF16.
        unsafe { P::load_bf16_values(at) }
    }
}
