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
    #[inline(always)]
    unsafe fn load_i8(p: *const u8) -> <P as Panel>::F {
        // SAFETY: above.
        unsafe { [signed(p), signed(p.add(8))] }
    }
    #[inline(always)]
    unsafe fn load_e4m3_small(p: *const u8) -> <P as Panel>::F {
        // SAFETY: above.
        unsafe { [small(p), small(p.add(8))] }
    }
    #[inline(always)]
    unsafe fn store_bf16(v: <P as Panel>::F, p: *mut u8) {
        // SAFETY: above.
        unsafe {
            // Packing works in halves of a vector: put the quarters in order.
            let packed = _mm256_packus_epi32(rounded(v[0]), rounded(v[1]));
            _mm256_storeu_si256(p.cast(), _mm256_permute4x64_epi64::<0b11_01_10_00>(packed));
        }
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

/// Eight signed bytes at `p`.
#[inline(always)]
unsafe fn signed(p: *const u8) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()))) }
}

/// Eight E4M3 codes at `p`, times 2^-120.
#[inline(always)]
unsafe fn small(p: *const u8) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe {
        let code = _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast()));
        let sign = _mm256_and_si256(_mm256_slli_epi32::<24>(code), _mm256_set1_epi32(i32::MIN));
        let rest = _mm256_and_si256(_mm256_slli_epi32::<20>(code), _mm256_set1_epi32(0x07f0_0000));
        _mm256_castsi256_ps(_mm256_or_si256(sign, rest))
    }
}

/// The bits of eight BF16, each in a word.
#[inline(always)]
unsafe fn rounded(v: __m256) -> __m256i {
    // SAFETY: arithmetic only.
    unsafe {
        let bits = _mm256_castps_si256(v);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let near = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
        let is_nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
        _mm256_srli_epi32::<16>(_mm256_blendv_epi8(near, quiet, is_nan))
    }
}
