//! AVX-512 with VNNI, BF16 and VBMI (Zen 4, Sapphire Rapids and later): dot products of bytes and of BF16 pairs.

use std::arch::x86_64::*;

use super::{avx512::V, panel::Panel};
use crate::packed::E4M3_TO_BF16;

/// Sixteen rows in one vector.
pub(crate) struct P;

// SAFETY of every block below: the level's kernels run only where all of its features were detected, and pointers have
// the bytes that the trait asks for; all loads and stores are unaligned ones.
impl Panel for P {
    type F = __m512;
    type I = __m512i;
    type W = __m512i;
    type U = __m512i;
    type X = __m512i;
    const TILE_BF16: usize = 12;
    const TILE_BYTES: usize = 6;
    const PAIRS: bool = true;
    const OFFSET_IN_SUMS: bool = true;

    crate::simd::outlined!(
        "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx512vbmi,avx2,fma,f16c"
    );
    super::panel::no_small_sums!();
    #[inline(always)]
    unsafe fn splat(v: f32) -> __m512 {
        // SAFETY: above.
        unsafe { _mm512_set1_ps(v) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m512 {
        // SAFETY: above.
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(v: __m512, p: *mut f32) {
        // SAFETY: above.
        unsafe { _mm512_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> __m512 {
        // SAFETY: above.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: above.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        // SAFETY: above.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn prefetch(p: *const u8) {
        // SAFETY: a hint; it never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
    #[inline(always)]
    unsafe fn prefetch_near(p: *const u8) {
        // SAFETY: a hint; it never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> __m512i {
        // SAFETY: above.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    /// The low and high bytes of 64 codes come out of two tables of 128 entries.
    #[inline(always)]
    unsafe fn load_e4m3(p: *const u8) -> [__m512i; 2] {
        // SAFETY: above; each table has 128 bytes.
        unsafe {
            let codes = _mm512_loadu_si512(p.cast());
            let table = |bytes: &[u8; 128]| {
                let p = bytes.as_ptr();
                (_mm512_loadu_si512(p.cast()), _mm512_loadu_si512(p.add(64).cast()))
            };
            let (l0, l1) = table(&E4M3_TO_BF16.0);
            let (h0, h1) = table(&E4M3_TO_BF16.1);
            let low = _mm512_permutex2var_epi8(l0, codes, l1);
            let high = _mm512_permutex2var_epi8(h0, codes, h1);
            // high | (codes & 0x80)
            let high = _mm512_ternarylogic_epi32::<0xf8>(high, codes, _mm512_set1_epi8(i8::MIN));
            [_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)]
        }
    }
    #[inline(always)]
    unsafe fn pair(p: *const u8) -> __m512i {
        // SAFETY: above.
        unsafe { _mm512_set1_epi32(p.cast::<i32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn dot_bf16(acc: __m512, w: __m512i, x: __m512i) -> __m512 {
        // SAFETY: above; both types are 32 BF16.
        unsafe {
            let (w, x) =
                (std::mem::transmute::<__m512i, __m512bh>(w), std::mem::transmute::<__m512i, __m512bh>(x));
            _mm512_dpbf16_ps(acc, w, x)
        }
    }
    #[inline(always)]
    unsafe fn zero_i() -> __m512i {
        // SAFETY: above.
        unsafe { _mm512_setzero_si512() }
    }
    #[inline(always)]
    unsafe fn splat_shifted<const SHIFT: u32>(p: *const i32) -> __m512i {
        // SAFETY: above.
        unsafe { _mm512_slli_epi32::<SHIFT>(_mm512_set1_epi32(*p)) }
    }
    #[inline(always)]
    unsafe fn to_f32(v: __m512i) -> __m512 {
        // SAFETY: above.
        unsafe { _mm512_cvtepi32_ps(v) }
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> __m512i {
        // SAFETY: above.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn low_nibbles(v: __m512i) -> __m512i {
        // SAFETY: above.
        unsafe { _mm512_and_si512(v, _mm512_set1_epi8(15)) }
    }
    #[inline(always)]
    unsafe fn high_nibbles(v: __m512i) -> __m512i {
        // SAFETY: above.
        unsafe { _mm512_and_si512(_mm512_srli_epi16::<4>(v), _mm512_set1_epi8(15)) }
    }
    #[inline(always)]
    unsafe fn dot_u7(acc: __m512i, w: __m512i, x: *const u8) -> __m512i {
        // SAFETY: above.
        unsafe { _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(x.cast::<i32>().read_unaligned())) }
    }
    #[inline(always)]
    unsafe fn dot_s8(acc: __m512i, w: __m512i, x: *const u8) -> __m512i {
        // SAFETY: above.
        unsafe { Self::dot_u7(acc, w, x) }
    }
    #[inline(always)]
    unsafe fn bits<const SHIFT: u32, const MASK: i32>(p: *const u8) -> __m512i {
        // SAFETY: above.
        unsafe {
            let words = _mm512_srli_epi32::<SHIFT>(_mm512_loadu_si512(p.cast()));
            _mm512_and_si512(words, _mm512_set1_epi32(MASK))
        }
    }
    #[inline(always)]
    unsafe fn join<const SHIFT: u32>(a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: above.
        unsafe { _mm512_or_si512(a, _mm512_slli_epi32::<SHIFT>(b)) }
    }
    #[inline(always)]
    unsafe fn word_bits(p: *const u8, shift: usize, mask: i32) -> __m512i {
        // SAFETY: above.
        unsafe {
            let words = _mm512_srl_epi32(_mm512_loadu_si512(p.cast()), _mm_cvtsi32_si128(shift as i32));
            _mm512_and_si512(words, _mm512_set1_epi32(mask))
        }
    }
    #[inline(always)]
    unsafe fn half_bits(p: *const u8, shift: usize, mask: i32) -> __m512i {
        // SAFETY: above.
        unsafe {
            let words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            let words = _mm512_srl_epi32(words, _mm_cvtsi32_si128(shift as i32));
            _mm512_and_si512(words, _mm512_set1_epi32(mask))
        }
    }
    #[inline(always)]
    unsafe fn load_bf16_values(p: *const u8) -> __m512 {
        // SAFETY: above.
        unsafe {
            let words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words))
        }
    }
    #[inline(always)]
    unsafe fn load_half_e8m0(p: *const u8) -> __m512 {
        // SAFETY: above.
        unsafe {
            let e = _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()));
            let normal = _mm512_slli_epi32::<23>(_mm512_sub_epi32(e, _mm512_set1_epi32(1)));
            let small = _mm512_cmplt_epi32_mask(e, _mm512_set1_epi32(2));
            let bits = _mm512_mask_sllv_epi32(normal, small, _mm512_set1_epi32(0x0020_0000), e);
            _mm512_castsi512_ps(bits)
        }
    }
    #[inline(always)]
    unsafe fn field(v: __m512i, shift: usize, mask: u8) -> __m512i {
        // SAFETY: above.
        unsafe {
            let moved = _mm512_srl_epi16(v, _mm_cvtsi32_si128(shift as i32));
            _mm512_and_si512(moved, _mm512_set1_epi8(mask.cast_signed()))
        }
    }
    #[inline(always)]
    unsafe fn insert(low: __m512i, v: __m512i, from: usize, to: usize, mask: u8) -> __m512i {
        // SAFETY: above.
        unsafe {
            let count = _mm_cvtsi32_si128(from.abs_diff(to) as i32);
            let moved = if to > from { _mm512_sll_epi16(v, count) } else { _mm512_srl_epi16(v, count) };
            // low | (moved & mask)
            _mm512_ternarylogic_epi32::<0xf8>(low, moved, _mm512_set1_epi8(mask.cast_signed()))
        }
    }
    #[inline(always)]
    unsafe fn lookup(table: &[u8; 16], v: __m512i) -> __m512i {
        // SAFETY: above.
        unsafe {
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
            _mm512_shuffle_epi8(table, v)
        }
    }
}

super::kernels!(V, P, "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx512vbmi,avx2,fma,f16c");
