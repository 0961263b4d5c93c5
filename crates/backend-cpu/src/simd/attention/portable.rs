//! Sixteen lanes in arrays.

use oxseek_tensor::dtype::bf16_to_f32;

use super::Lanes;
use crate::simd::panel::{Panel, portable::P};

// SAFETY of every block below: pointers have the elements that the trait asks for; no CPU feature is needed.
impl Lanes for P {
    const WIDE: bool = false;
    #[inline(always)]
    unsafe fn interleave(a: *const u8, b: *const u8) -> <P as Panel>::W {
        [a, b].map(|p| {
            // SAFETY: above.
            let halves = unsafe { p.cast::<[[u8; 2]; 16]>().read() };
            halves.map(|h| bf16_to_f32(u16::from_le_bytes(h)))
        })
    }
}
