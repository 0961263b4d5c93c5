//! Sixteen rows in two vectors of AVX2.

use std::arch::x86_64::*;

use super::Panel;

/// Sixteen rows in two vectors.
pub(crate) struct P;

/// Brings a code that was moved into F32's exponent field back to its value.
const E4M3_SHIFT: f32 = f32::from_bits((120 + 127) << 23);

/// Both halves. Not a function that takes a closure: closures are not always inlined, and one that is not is compiled
/// without the level's features, which made block formats a hundred times slower.
macro_rules! two {
    (|$v:ident| $each:expr, $of:expr) => {{
        let of = $of;
        [
            {
                let $v = of[0];
                $each
            },
            {
                let $v = of[1];
                $each
            },
        ]
    }};
    (|$v:ident, $w:ident| $each:expr, $of:expr, $with:expr) => {{
        let (of, with) = ($of, $with);
        [
            {
                let ($v, $w) = (of[0], with[0]);
                $each
            },
            {
                let ($v, $w) = (of[1], with[1]);
                $each
            },
        ]
    }};
}

/// Has both vectors ready at this place of the program. Else the compiler orders products of a block by vectors, and
/// writes the broadcast activations of the first ones to the stack for the second ones.
///
/// # Safety
/// AVX.
#[inline]
#[target_feature(enable = "avx")]
unsafe fn together(mut v: [__m256i; 2]) -> [__m256i; 2] {
    // SAFETY: no instruction.
    unsafe {
        std::arch::asm!("/* {0} {1} */", inout(ymm_reg) v[0], inout(ymm_reg) v[1],
            options(nomem, nostack, preserves_flags));
    }
    v
}

/// The words of eight rows.
///
/// # Safety
/// AVX2; 8 bytes at `p` and at `p + 16`.
#[inline(always)]
unsafe fn e4m3_pairs(p: *const u8) -> __m256i {
    // SAFETY: the caller's promise.
    unsafe {
        let two = _mm_unpacklo_epi64(_mm_loadl_epi64(p.cast()), _mm_loadl_epi64(p.add(16).cast()));
        _mm256_cvtepu16_epi32(two)
    }
}

/// The values of the codes in the lowest bytes.
///
/// # Safety
/// AVX2.
#[inline(always)]
unsafe fn e4m3(code: __m256i) -> __m256 {
    // SAFETY: the caller's promise.
    unsafe {
        let rest = _mm256_and_si256(_mm256_slli_epi32::<20>(code), _mm256_set1_epi32(0x07f0_0000));
        let sign = _mm256_and_si256(_mm256_slli_epi32::<24>(code), _mm256_set1_epi32(i32::MIN));
        let bits = _mm256_castsi256_ps(_mm256_or_si256(rest, sign));
        _mm256_mul_ps(bits, _mm256_set1_ps(E4M3_SHIFT))
    }
}

// SAFETY of every block below: the level's kernels run only where AVX2, FMA and F16C were detected, and pointers have
// the bytes that the trait asks for; all loads and stores are unaligned ones.
impl Panel for P {
    type F = [__m256; 2];
    type I = [__m256i; 2];
    /// The even and the odd weights of the pairs, in F32.
    type W = [[__m256; 2]; 2];
    type U = [__m256i; 2];
    /// Two sums of 16 bits for each row.
    type Small = [__m256i; 2];
    type X = [__m256; 2];
    const TILE_BF16: usize = 4;
    const TILE_BYTES: usize = 4;
    const PAIRS: bool = false;
    const SMALL_MAX: usize = i16::MAX as usize;
    const OFFSET_IN_SUMS: bool = false;

    crate::simd::outlined!("avx2,fma,f16c");
    #[inline(always)]
    unsafe fn splat(v: f32) -> Self::F {
        // SAFETY: above.
        unsafe { [_mm256_set1_ps(v); 2] }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::F {
        // SAFETY: above.
        unsafe { [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))] }
    }
    #[inline(always)]
    unsafe fn store(v: Self::F, p: *mut f32) {
        // SAFETY: above.
        unsafe {
            _mm256_storeu_ps(p, v[0]);
            _mm256_storeu_ps(p.add(8), v[1]);
        }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> Self::F {
        // SAFETY: above.
        unsafe {
            [_mm256_cvtph_ps(_mm_loadu_si128(p.cast())), _mm256_cvtph_ps(_mm_loadu_si128(p.add(16).cast()))]
        }
    }
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // SAFETY: above.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: above.
        two!(|a, b| unsafe { _mm256_mul_ps(a, b) }, a, b)
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> Self::W {
        // SAFETY: above.
        unsafe {
            let v = [_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(32).cast())];
            let odd = _mm256_set1_epi32(-65536);
            [
                two!(|v| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(v)), v),
                two!(|v| _mm256_castsi256_ps(_mm256_and_si256(v, odd)), v),
            ]
        }
    }
    #[inline(always)]
    unsafe fn load_e4m3(p: *const u8) -> [Self::W; 2] {
        // SAFETY: above.
        unsafe {
            // Rows 0..8 or 8..16, each a word of its two codes.
            let low = [e4m3_pairs(p), e4m3_pairs(p.add(32))];
            let high = [e4m3_pairs(p.add(8)), e4m3_pairs(p.add(40))];
            [
                [two!(|v| e4m3(v), low), two!(|v| e4m3(_mm256_srli_epi32::<8>(v)), low)],
                [two!(|v| e4m3(v), high), two!(|v| e4m3(_mm256_srli_epi32::<8>(v)), high)],
            ]
        }
    }
    #[inline(always)]
    unsafe fn pair(p: *const u8) -> Self::X {
        // SAFETY: above.
        unsafe {
            let both = p.cast::<u32>().read_unaligned();
            [_mm256_set1_ps(f32::from_bits(both << 16)), _mm256_set1_ps(f32::from_bits(both & 0xffff_0000))]
        }
    }
    #[inline(always)]
    unsafe fn dot_bf16(acc: Self::F, w: Self::W, x: Self::X) -> Self::F {
        // SAFETY: above.
        unsafe {
            let acc = two!(|a, w| _mm256_fmadd_ps(w, x[0], a), acc, w[0]);
            two!(|a, w| _mm256_fmadd_ps(w, x[1], a), acc, w[1])
        }
    }
    #[inline(always)]
    unsafe fn zero_i() -> Self::I {
        // SAFETY: above.
        unsafe { [_mm256_setzero_si256(); 2] }
    }
    #[inline(always)]
    unsafe fn splat_shifted<const SHIFT: u32>(p: *const i32) -> Self::I {
        // SAFETY: above.
        unsafe { [_mm256_set1_epi32(*p << SHIFT); 2] }
    }
    #[inline(always)]
    unsafe fn to_f32(v: Self::I) -> Self::F {
        // SAFETY: above.
        two!(|v| unsafe { _mm256_cvtepi32_ps(v) }, v)
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> Self::U {
        // SAFETY: above.
        unsafe { [_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(32).cast())] }
    }
    #[inline(always)]
    unsafe fn low_nibbles(v: Self::U) -> Self::U {
        // SAFETY: above.
        two!(|v| unsafe { _mm256_and_si256(v, _mm256_set1_epi8(15)) }, v)
    }
    #[inline(always)]
    unsafe fn high_nibbles(v: Self::U) -> Self::U {
        // SAFETY: above.
        two!(|v| unsafe { _mm256_and_si256(_mm256_srli_epi16::<4>(v), _mm256_set1_epi8(15)) }, v)
    }
    /// Pairs of products stay within 16 bits: 2 * 127 * 127 < 2^15.
    #[inline(always)]
    unsafe fn dot_u7(acc: Self::I, w: Self::U, x: *const u8) -> Self::I {
        // SAFETY: above.
        unsafe {
            let x = _mm256_set1_epi32(x.cast::<i32>().read_unaligned());
            together(two!(
                |acc, w| {
                    let pairs = _mm256_maddubs_epi16(w, x);
                    _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
                },
                acc,
                w
            ))
        }
    }
    /// The sign goes over to x; a weight of -128 becomes 128, and 2 * 128 * 127 < 2^15.
    #[inline(always)]
    unsafe fn dot_s8(acc: Self::I, w: Self::U, x: *const u8) -> Self::I {
        // SAFETY: above.
        unsafe {
            let x = _mm256_set1_epi32(x.cast::<i32>().read_unaligned());
            together(two!(
                |acc, w| {
                    let w = _mm256_xor_si256(w, _mm256_set1_epi8(i8::MIN));
                    let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
                    _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
                },
                acc,
                w
            ))
        }
    }
    #[inline(always)]
    unsafe fn zero_small() -> Self::Small {
        // SAFETY: above.
        unsafe { [_mm256_setzero_si256(); 2] }
    }
    #[inline(always)]
    unsafe fn dot_small(acc: Self::Small, w: Self::U, x: *const u8) -> Self::Small {
        // SAFETY: above.
        unsafe {
            let x = _mm256_set1_epi32(x.cast::<i32>().read_unaligned());
            together(two!(|acc, w| _mm256_add_epi16(acc, _mm256_maddubs_epi16(w, x)), acc, w))
        }
    }
    #[inline(always)]
    unsafe fn widen(acc: Self::I, small: Self::Small) -> Self::I {
        // SAFETY: above.
        unsafe {
            let ones = _mm256_set1_epi16(1);
            two!(|acc, small| _mm256_add_epi32(acc, _mm256_madd_epi16(small, ones)), acc, small)
        }
    }
    #[inline(always)]
    unsafe fn bits<const SHIFT: u32, const MASK: i32>(p: *const u8) -> Self::I {
        // SAFETY: above.
        unsafe {
            let shift = _mm_cvtsi32_si128(SHIFT as i32);
            two!(
                |p| {
                    let words = _mm256_srl_epi32(_mm256_loadu_si256(p.cast()), shift);
                    _mm256_and_si256(words, _mm256_set1_epi32(MASK))
                },
                [p, p.add(32)]
            )
        }
    }
    #[inline(always)]
    unsafe fn join<const SHIFT: u32>(a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: above.
        unsafe {
            let shift = _mm_cvtsi32_si128(SHIFT as i32);
            two!(|a, b| _mm256_or_si256(a, _mm256_sll_epi32(b, shift)), a, b)
        }
    }
    #[inline(always)]
    unsafe fn word_bits(p: *const u8, shift: usize, mask: i32) -> Self::I {
        // SAFETY: above.
        unsafe {
            let count = _mm_cvtsi32_si128(shift as i32);
            two!(
                |p| {
                    let words = _mm256_srl_epi32(_mm256_loadu_si256(p.cast()), count);
                    _mm256_and_si256(words, _mm256_set1_epi32(mask))
                },
                [p, p.add(32)]
            )
        }
    }
    #[inline(always)]
    unsafe fn half_bits(p: *const u8, shift: usize, mask: i32) -> Self::I {
        // SAFETY: above.
        unsafe {
            let count = _mm_cvtsi32_si128(shift as i32);
            two!(
                |p| {
                    let words = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
                    _mm256_and_si256(_mm256_srl_epi32(words, count), _mm256_set1_epi32(mask))
                },
                [p, p.add(16)]
            )
        }
    }
    #[inline(always)]
    unsafe fn load_bf16_values(p: *const u8) -> Self::F {
        // SAFETY: above.
        unsafe {
            two!(
                |p| {
                    let words = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words))
                },
                [p, p.add(16)]
            )
        }
    }
    #[inline(always)]
    unsafe fn load_half_e8m0(p: *const u8) -> Self::F {
        // SAFETY: above.
        unsafe {
            two!(
                |p| {
                    let e = _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast()));
                    let normal = _mm256_slli_epi32::<23>(_mm256_sub_epi32(e, _mm256_set1_epi32(1)));
                    let small = _mm256_sllv_epi32(_mm256_set1_epi32(0x0020_0000), e);
                    let is_normal = _mm256_cmpgt_epi32(e, _mm256_set1_epi32(1));
                    _mm256_castsi256_ps(_mm256_blendv_epi8(small, normal, is_normal))
                },
                [p, p.add(8)]
            )
        }
    }
    #[inline(always)]
    unsafe fn field(v: Self::U, shift: usize, mask: u8) -> Self::U {
        // SAFETY: above.
        unsafe {
            let count = _mm_cvtsi32_si128(shift as i32);
            let mask = _mm256_set1_epi8(mask.cast_signed());
            two!(|v| _mm256_and_si256(_mm256_srl_epi16(v, count), mask), v)
        }
    }
    #[inline(always)]
    unsafe fn insert(low: Self::U, v: Self::U, from: usize, to: usize, mask: u8) -> Self::U {
        // SAFETY: above.
        unsafe {
            let count = _mm_cvtsi32_si128(from.abs_diff(to) as i32);
            let mask = _mm256_set1_epi8(mask.cast_signed());
            two!(
                |low, v| {
                    let moved =
                        if to > from { _mm256_sll_epi16(v, count) } else { _mm256_srl_epi16(v, count) };
                    _mm256_or_si256(low, _mm256_and_si256(moved, mask))
                },
                low,
                v
            )
        }
    }
    #[inline(always)]
    unsafe fn lookup(table: &[u8; 16], v: Self::U) -> Self::U {
        // SAFETY: above.
        unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            two!(|v| _mm256_shuffle_epi8(table, v), v)
        }
    }
}
