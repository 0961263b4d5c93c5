//! Sixteen lanes in arrays.

use oxseek_tensor::dtype::{bf16_to_f32, f32_to_bf16};

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
    #[inline(always)]
    unsafe fn load_i8(p: *const u8) -> <P as Panel>::F {
        // SAFETY: above.
        unsafe { p.cast::<[i8; 16]>().read() }.map(f32::from)
    }
    #[inline(always)]
    unsafe fn load_e4m3_small(p: *const u8) -> <P as Panel>::F {
        // SAFETY: above.
        let codes = unsafe { p.cast::<[u8; 16]>().read() };
        codes.map(|c| f32::from_bits((u32::from(c & 0x80) << 24) | (u32::from(c & 0x7f) << 20)))
    }
    #[inline(always)]
    unsafe fn store_bf16(v: <P as Panel>::F, p: *mut u8) {
        // SAFETY: above.
        unsafe { p.cast::<[[u8; 2]; 16]>().write(v.map(|v| f32_to_bf16(v).to_le_bytes())) };
    }
}
