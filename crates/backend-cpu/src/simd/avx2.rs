//! AVX2 with FMA and F16C: eight lanes.

use std::arch::x86_64::*;

use super::Simd;

/// Eight lanes.
#[derive(Clone, Copy)]
pub(crate) struct V(__m256);

// SAFETY of every block below: the level's kernels run only where AVX2, FMA and F16C were detected, and pointers have
// the readable or writable elements that the trait asks for; all loads and stores are unaligned ones.
impl Simd for V {
    const LANES: usize = 8;
    const TILE_TOKENS: usize = 2;
    super::outlined!("avx2,fma,f16c");
    #[inline(always)]
    unsafe fn splat(v: f32) -> Self {
        // SAFETY: above.
        unsafe { V(_mm256_set1_ps(v)) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: above.
        unsafe { V(_mm256_loadu_ps(p)) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: above.
        unsafe { _mm256_storeu_ps(p, self.0) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> Self {
        // SAFETY: above.
        unsafe { V(_mm256_cvtph_ps(_mm_loadu_si128(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> Self {
        // SAFETY: above.
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            V(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide)))
        }
    }
    #[inline(always)]
    unsafe fn load_e4m3(p: *const u8) -> Self {
        // SAFETY: above.
        unsafe {
            let code = _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast()));
            let sign = _mm256_and_si256(_mm256_slli_epi32::<24>(code), _mm256_set1_epi32(i32::MIN));
            let rest = _mm256_and_si256(_mm256_slli_epi32::<20>(code), _mm256_set1_epi32(0x07f0_0000));
            V(_mm256_castsi256_ps(_mm256_or_si256(sign, rest)))
        }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        // SAFETY: above.
        unsafe { V(_mm256_add_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        // SAFETY: above.
        unsafe { V(_mm256_mul_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        // SAFETY: above.
        unsafe { V(_mm256_fmadd_ps(self.0, b.0, c.0)) }
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        // SAFETY: above.
        unsafe { V(_mm256_max_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn min(self, b: Self) -> Self {
        // SAFETY: above.
        unsafe { V(_mm256_min_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        // SAFETY: above.
        unsafe { V(_mm256_div_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn pow2_of_shifted(self) -> Self {
        // SAFETY: above.
        unsafe {
            let n = _mm256_slli_epi32::<23>(_mm256_castps_si256(self.0));
            V(_mm256_castsi256_ps(_mm256_add_epi32(n, _mm256_set1_epi32(127 << 23))))
        }
    }
    #[inline(always)]
    unsafe fn sum4(v: [Self; 4]) -> [f32; 4] {
        // SAFETY: above.
        unsafe {
            let ab = _mm256_hadd_ps(v[0].0, v[1].0);
            let cd = _mm256_hadd_ps(v[2].0, v[3].0);
            let abcd = _mm256_hadd_ps(ab, cd);
            let sum = _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps::<1>(abcd));
            let mut out = [0.0; 4];
            _mm_storeu_ps(out.as_mut_ptr(), sum);
            out
        }
    }
    #[inline(always)]
    unsafe fn max_lane(self) -> f32 {
        let mut lanes = [0.0; 8];
        // SAFETY: above.
        unsafe { self.store(lanes.as_mut_ptr()) };
        lanes.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
}

super::kernels!(V, super::panel::avx2::P, "avx2,fma,f16c");
