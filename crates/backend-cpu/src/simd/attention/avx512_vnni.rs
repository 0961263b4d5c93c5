//! Sixteen lanes in one vector.

use std::arch::x86_64::*;

use super::Lanes;
use crate::simd::{avx512_vnni::P, panel::Panel};

/// Of two vectors of 32 halves one after the other, those that become pairs.
static PAIRS: [u16; 64] = {
    let (mut table, mut i) = ([0; 64], 0);
    while i < 64 {
        table[i as usize] = i / 2 + i % 2 * 32;
        i += 1;
    }
    table
};

/// Of one vector of sixteen even and then sixteen odd halves, those that become pairs.
static PLACES: [u16; 32] = {
    let (mut table, mut i) = ([0; 32], 0);
    while i < 32 {
        table[i as usize] = i / 2 + i % 2 * 16;
        i += 1;
    }
    table
};

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
    #[inline(always)]
    unsafe fn interleave_more(a: *const u8, b: *const u8) -> [__m512i; 2] {
        // SAFETY: above; the table has 64 halves.
        unsafe {
            let (even, odd) = (_mm512_loadu_si512(a.cast()), _mm512_loadu_si512(b.cast()));
            let pairs = PAIRS.as_ptr();
            let (low, high) = (_mm512_loadu_si512(pairs.cast()), _mm512_loadu_si512(pairs.add(32).cast()));
            [_mm512_permutex2var_epi16(even, low, odd), _mm512_permutex2var_epi16(even, high, odd)]
        }
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const u8) -> __m512 {
        // SAFETY: above.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_e4m3_small(p: *const u8) -> __m512 {
        // SAFETY: above.
        unsafe {
            let code = _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()));
            let rest = _mm512_and_si512(_mm512_slli_epi32::<20>(code), _mm512_set1_epi32(0x07f0_0000));
            let sign = _mm512_slli_epi32::<24>(code);
            // rest | (sign & 0x80000000)
            let both = _mm512_ternarylogic_epi32::<0xf8>(rest, sign, _mm512_set1_epi32(i32::MIN));
            _mm512_castsi512_ps(both)
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(v: __m512, p: *mut u8) {
        // SAFETY: above; both types are sixteen BF16.
        unsafe {
            let halves = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(v));
            _mm256_storeu_si256(p.cast(), halves);
        }
    }
    #[inline(always)]
    unsafe fn store_pairs(even: *const f32, odd: *const f32, p: *mut u8) {
        // SAFETY: above; both types are 32 BF16.
        unsafe {
            let halves = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(odd), _mm512_loadu_ps(even));
            let halves = std::mem::transmute::<__m512bh, __m512i>(halves);
            let order = _mm512_loadu_si512(PLACES.as_ptr().cast());
            _mm512_storeu_si512(p.cast(), _mm512_permutexvar_epi16(order, halves));
        }
    }
}
