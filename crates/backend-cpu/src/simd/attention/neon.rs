//! Sixteen lanes in four vectors of NEON.

use std::arch::aarch64::*;

use super::Lanes;
use crate::simd::panel::{Panel, neon::P};

// SAFETY of every block below: NEON is part of the aarch64 baseline, and pointers have the elements that the trait asks
// for; loads of bytes need no alignment.
impl Lanes for P {
    const WIDE: bool = false;
    #[inline(always)]
    unsafe fn interleave(a: *const u8, b: *const u8) -> <P as Panel>::W {
        // SAFETY: above.
        unsafe {
            [
                [widen(a), widen(a.add(8)), widen(a.add(16)), widen(a.add(24))],
                [widen(b), widen(b.add(8)), widen(b.add(16)), widen(b.add(24))],
            ]
        }
    }
}

/// Four F32 at `p`.
#[inline(always)]
unsafe fn widest(p: *const f32) -> float32x4_t {
    // SAFETY: the caller's promise.
    unsafe { vreinterpretq_f32_u8(vld1q_u8(p.cast())) }
}

/// Four BF16 at `p`.
#[inline(always)]
unsafe fn widen(p: *const u8) -> float32x4_t {
    // SAFETY: the caller's promise.
    unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vreinterpret_u16_u8(vld1_u8(p)))) }
}
