//! Sixteen lanes in arrays.

use super::Lanes;
use crate::simd::panel::{Panel, portable::P};

// SAFETY of every block below: pointers have the elements that the trait asks for; no CPU feature is needed.
impl Lanes for P {
    const WIDE: bool = false;
    #[inline(always)]
    unsafe fn load(p: *const f32) -> <P as Panel>::F {
        // SAFETY: above.
        unsafe { p.cast::<<P as Panel>::F>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn interleave(a: *const u8, b: *const u8) -> <P as Panel>::W {
        // SAFETY: above.
        [a, b].map(|p| {
            std::array::from_fn(|i| {
                f32::from_bits(u32::from(unsafe { p.cast::<u16>().add(i).read_unaligned() }) << 16)
            })
        })
    }
}
