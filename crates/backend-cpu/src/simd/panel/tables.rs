//! Nibbles that index a table of sixteen values; `packed/parts.rs` says how the blocks lie.

use oxseek_tensor::blocks::{E2M1_DOUBLED, IQ4_VALUES};

use super::{Panel, block::Block, small_blocks::nibbles};
use crate::packed::PackedFormat;

/// 16 scales, then 4 units of nibbles as in Q4_0.
pub(super) struct Iq4Nl;
/// 256 columns: 16 scales, 16 times the high bits of eight factors, a word of their low bits, then the 4 units of
/// nibbles of each block.
pub(super) struct Iq4Xs;
/// 16 exponents, then 4 units of nibbles.
pub(super) struct Mxfp4;

/// The values of a table, moved up to be unsigned.
const fn unsigned(values: [i8; 16], zero: i16) -> [u8; 16] {
    let mut table = [0; 16];
    let mut code = 0;
    while code < 16 {
        table[code] = (values[code] as i16 + zero) as u8;
        code += 1;
    }
    table
}

static IQ4: [u8; 16] = unsigned(IQ4_VALUES, 128);
static E2M1: [u8; 16] = unsigned(E2M1_DOUBLED, 16);

impl<P: Panel> Block<P> for Iq4Nl {
    const FORMAT: PackedFormat = PackedFormat::Iq4Nl;
    const CODE_MAX: usize = 255;
    const ZERO_SHIFT: Option<u32> = Some(7);
    #[inline(always)]
    unsafe fn at(group: *const u8, b: usize) -> *const u8 {
        group.wrapping_add(b * 288)
    }
    #[inline(always)]
    unsafe fn unit(at: *const u8, _: usize, unit: usize) -> P::U {
        // SAFETY: unit < 8.
        unsafe { P::lookup(&IQ4, nibbles::<P>(at.add(32), unit)) }
    }
    #[inline(always)]
    unsafe fn scale(at: *const u8, _: usize) -> P::F {
        // SAFETY: 32 bytes of halves.
        unsafe { P::load_f16(at) }
    }
}

impl<P: Panel> Block<P> for Iq4Xs {
    const FORMAT: PackedFormat = PackedFormat::Iq4Xs;
    const CODE_MAX: usize = 255;
    const ZERO_SHIFT: Option<u32> = Some(7);
    const SUPER: bool = true;
    #[inline(always)]
    unsafe fn at(group: *const u8, b: usize) -> *const u8 {
        group.wrapping_add(b / 8 * 2176)
    }
    #[inline(always)]
    unsafe fn unit(at: *const u8, b: usize, unit: usize) -> P::U {
        // SAFETY: b < 8, unit < 8.
        unsafe { P::lookup(&IQ4, nibbles::<P>(at.add(128 + b * 256), unit)) }
    }
    /// `d * (factor - 32)`, rounded once.
    #[inline(always)]
    unsafe fn scale(at: *const u8, b: usize) -> P::F {
        // SAFETY: halves at 0 and 32, words at 64.
        unsafe {
            let d = P::load_f16(at);
            let high = P::half_bits(at.add(32), 2 * b, 3);
            let factor = P::join::<4>(P::word_bits(at.add(64), 4 * b, 15), high);
            P::fma(P::to_f32(factor), d, P::mul(d, P::splat(-32.0)))
        }
    }
}

impl<P: Panel> Block<P> for Mxfp4 {
    const FORMAT: PackedFormat = PackedFormat::Mxfp4;
    const CODE_MAX: usize = 28;
    const ZERO_SHIFT: Option<u32> = Some(4);
    #[inline(always)]
    unsafe fn at(group: *const u8, b: usize) -> *const u8 {
        group.wrapping_add(b * 272)
    }
    #[inline(always)]
    unsafe fn unit(at: *const u8, _: usize, unit: usize) -> P::U {
        // SAFETY: unit < 8.
        unsafe { P::lookup(&E2M1, nibbles::<P>(at.add(16), unit)) }
    }
    /// Half of what the exponents mean, as the table has twice the values.
    #[inline(always)]
    unsafe fn scale(at: *const u8, _: usize) -> P::F {
        // SAFETY: 16 bytes.
        unsafe { P::load_half_e8m0(at) }
    }
}
