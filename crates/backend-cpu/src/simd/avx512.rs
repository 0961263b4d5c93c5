//! AVX-512 F, BW, DQ and VL: sixteen lanes.

use std::arch::x86_64::*;

use super::Simd;

/// Sixteen lanes.
#[derive(Clone, Copy)]
pub(crate) struct V(__m512);

// SAFETY of every block below: the level's kernels run only where AVX-512 F, BW, DQ and VL were detected, and pointers
// have the readable or writable elements that the trait asks for; all loads and stores are unaligned ones.
impl Simd for V {
    const LANES: usize = 16;
    const TILE_TOKENS: usize = 6;
    super::outlined!("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c");
    #[inline(always)]
    unsafe fn splat(v: f32) -> Self {
        // SAFETY: above.
        unsafe { V(_mm512_set1_ps(v)) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: above.
        unsafe { V(_mm512_loadu_ps(p)) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: above.
        unsafe { _mm512_storeu_ps(p, self.0) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> Self {
        // SAFETY: above.
        unsafe { V(_mm512_cvtph_ps(_mm256_loadu_si256(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> Self {
        // SAFETY: above.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            V(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
        }
    }
    #[inline(always)]
    unsafe fn load_e4m3(p: *const u8) -> Self {
        // SAFETY: above.
        unsafe {
            let code = _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()));
            let rest = _mm512_and_si512(_mm512_slli_epi32::<20>(code), _mm512_set1_epi32(0x07f0_0000));
            // rest | (sign & 0x80000000) in one instruction
            let sign = _mm512_slli_epi32::<24>(code);
            let both = _mm512_ternarylogic_epi32::<0xf8>(rest, sign, _mm512_set1_epi32(i32::MIN));
            V(_mm512_castsi512_ps(both))
        }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        // SAFETY: above.
        unsafe { V(_mm512_add_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        // SAFETY: above.
        unsafe { V(_mm512_mul_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        // SAFETY: above.
        unsafe { V(_mm512_fmadd_ps(self.0, b.0, c.0)) }
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        // SAFETY: above.
        unsafe { V(_mm512_max_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn min(self, b: Self) -> Self {
        // SAFETY: above.
        unsafe { V(_mm512_min_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        // SAFETY: above.
        unsafe { V(_mm512_div_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn pow2_of_shifted(self) -> Self {
        // SAFETY: above.
        unsafe {
            let n = _mm512_slli_epi32::<23>(_mm512_castps_si512(self.0));
            V(_mm512_castsi512_ps(_mm512_add_epi32(n, _mm512_set1_epi32(127 << 23))))
        }
    }
    #[inline(always)]
    unsafe fn sum4(v: [Self; 4]) -> [f32; 4] {
        // SAFETY: above.
        unsafe {
            let half = |v: V| _mm256_add_ps(_mm512_castps512_ps256(v.0), _mm512_extractf32x8_ps::<1>(v.0));
            let ab = _mm256_hadd_ps(half(v[0]), half(v[1]));
            let cd = _mm256_hadd_ps(half(v[2]), half(v[3]));
            let abcd = _mm256_hadd_ps(ab, cd);
            let sum = _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps::<1>(abcd));
            let mut out = [0.0; 4];
            _mm_storeu_ps(out.as_mut_ptr(), sum);
            out
        }
    }
    #[inline(always)]
    unsafe fn max_lane(self) -> f32 {
        // SAFETY: above.
        unsafe { _mm512_reduce_max_ps(self.0) }
    }
}

super::kernels!(V, super::panel::avx2::P, "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c");
