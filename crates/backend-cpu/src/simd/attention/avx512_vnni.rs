//! Sixteen lanes in one vector.

use std::arch::x86_64::*;

use super::Lanes;
use crate::simd::{avx512_vnni::P, panel::Panel};

// SAFETY of every block below: the level's kernels run only where its features were detected, and pointers have the
// elements that the trait asks for; all loads are unaligned ones.
impl Lanes for P {
    const WIDE: bool = true;
    #[inline(always)]
    unsafe fn interleave(a: *const u8, b: *const u8) -> <P as Panel>::W {
        // SAFETY: above.
        unsafe {
            let even = _mm512_cvtepu16_epi32(_mm256_loadu_si256(a.cast()));
            let odd = _mm512_cvtepu16_epi32(_mm256_loadu_si256(b.cast()));
            _mm512_or_si512(even, _mm512_slli_epi32::<16>(odd))
        }
    }
}
