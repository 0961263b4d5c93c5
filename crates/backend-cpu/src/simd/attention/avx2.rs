//! Sixteen lanes in two vectors of AVX2.

use std::arch::x86_64::*;

use super::Lanes;
use crate::simd::panel::{Panel, avx2::P};

// SAFETY of every block below: the level's kernels run only where AVX2 was detected, and pointers have the elements
// that the trait asks for; all loads are unaligned ones.
impl Lanes for P {
    const WIDE: bool = false;
    #[inline(always)]
    unsafe fn interleave(a: *const u8, b: *const u8) -> <P as Panel>::W {
        // SAFETY: above.
        unsafe { [[widen(a), widen(a.add(16))], [widen(b), widen(b.add(16))]] }
    }
}

/// Eight BF16 at `p`.
#[inline(always)]
unsafe fn widen(p: *const u8) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe {
        let halves = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(halves))
    }
}
