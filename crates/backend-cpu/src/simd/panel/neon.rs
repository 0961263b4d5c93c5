//! Sixteen rows in four vectors of NEON.

use std::arch::aarch64::*;

use oxseek_tensor::{blocks::half_of_e8m0, dtype::f16_to_f32};

use super::Panel;

/// Sixteen rows in four vectors.
pub(crate) struct P;

/// Brings a code that was moved into F32's exponent field back to its value.
const E4M3_SHIFT: f32 = f32::from_bits((120 + 127) << 23);

fn each<A: Copy, B: Copy, C>(a: [A; 4], b: [B; 4], f: impl Fn(A, B) -> C) -> [C; 4] {
    [f(a[0], b[0]), f(a[1], b[1]), f(a[2], b[2]), f(a[3], b[3])]
}

// SAFETY of every block below: NEON is part of the aarch64 baseline, and pointers have the bytes that the trait asks
// for; loads of bytes need no alignment.
impl Panel for P {
    type F = [float32x4_t; 4];
    type I = [int32x4_t; 4];
    /// The even and the odd weights of the pairs, in F32.
    type W = [[float32x4_t; 4]; 2];
    type U = [uint8x16_t; 4];
    type X = [f32; 2];
    const TILE_BF16: usize = 4;
    const TILE_BYTES: usize = 4;
    const PAIRS: bool = false;
    const OFFSET_IN_SUMS: bool = false;

    crate::simd::outlined!("neon");
    super::no_small_sums!();
    #[inline(always)]
    unsafe fn splat(v: f32) -> Self::F {
        // SAFETY: above.
        unsafe { [vdupq_n_f32(v); 4] }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::F {
        // SAFETY: above.
        unsafe { [vld1q_f32(p), vld1q_f32(p.add(4)), vld1q_f32(p.add(8)), vld1q_f32(p.add(12))] }
    }
    #[inline(always)]
    unsafe fn store(v: Self::F, p: *mut f32) {
        // SAFETY: above.
        unsafe {
            for (i, v) in v.into_iter().enumerate() {
                vst1q_f32(p.add(4 * i), v);
            }
        }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> Self::F {
        let mut wide = [0.0f32; 16];
        for (r, w) in wide.iter_mut().enumerate() {
            // SAFETY: above.
            *w = f16_to_f32(unsafe { p.cast::<u16>().add(r).read_unaligned() });
        }
        // SAFETY: sixteen values.
        unsafe { [0, 4, 8, 12].map(|i| vld1q_f32(wide.as_ptr().add(i))) }
    }
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // SAFETY: above.
        unsafe { std::array::from_fn(|i| vfmaq_f32(c[i], a[i], b[i])) }
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: above.
        each(a, b, |a, b| unsafe { vmulq_f32(a, b) })
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> Self::W {
        // SAFETY: above.
        unsafe {
            let v = [0, 16, 32, 48].map(|i| vreinterpretq_u32_u8(vld1q_u8(p.add(i))));
            let odd = vdupq_n_u32(0xffff_0000);
            [
                v.map(|v| vreinterpretq_f32_u32(vshlq_n_u32::<16>(v))),
                v.map(|v| vreinterpretq_f32_u32(vandq_u32(v, odd))),
            ]
        }
    }
    #[inline(always)]
    unsafe fn load_e4m3(p: *const u8) -> [Self::W; 2] {
        // SAFETY: above; 16 bytes for each four rows.
        unsafe {
            let decode = |code: uint32x4_t| {
                let rest = vandq_u32(vshlq_n_u32::<20>(code), vdupq_n_u32(0x07f0_0000));
                let sign = vandq_u32(vshlq_n_u32::<24>(code), vdupq_n_u32(0x8000_0000));
                vmulq_n_f32(vreinterpretq_f32_u32(vorrq_u32(rest, sign)), E4M3_SHIFT)
            };
            let half = |h: usize| {
                let v = [0, 16, 32, 48].map(|i| vmovl_u16(vreinterpret_u16_u8(vld1_u8(p.add(i + 8 * h)))));
                [v.map(decode), v.map(|v| decode(vshrq_n_u32::<8>(v)))]
            };
            [half(0), half(1)]
        }
    }
    #[inline(always)]
    unsafe fn pair(p: *const u8) -> Self::X {
        // SAFETY: above.
        let both = unsafe { p.cast::<u32>().read_unaligned() };
        [f32::from_bits(both << 16), f32::from_bits(both & 0xffff_0000)]
    }
    #[inline(always)]
    unsafe fn dot_bf16(acc: Self::F, w: Self::W, x: Self::X) -> Self::F {
        // SAFETY: above.
        unsafe {
            let acc = each(acc, w[0], |a, w| vfmaq_n_f32(a, w, x[0]));
            each(acc, w[1], |a, w| vfmaq_n_f32(a, w, x[1]))
        }
    }
    #[inline(always)]
    unsafe fn zero_i() -> Self::I {
        // SAFETY: above.
        unsafe { [vdupq_n_s32(0); 4] }
    }
    #[inline(always)]
    unsafe fn splat_shifted<const SHIFT: u32>(p: *const i32) -> Self::I {
        // SAFETY: above.
        unsafe { [vdupq_n_s32(*p << SHIFT); 4] }
    }
    #[inline(always)]
    unsafe fn to_f32(v: Self::I) -> Self::F {
        // SAFETY: above.
        v.map(|v| unsafe { vcvtq_f32_s32(v) })
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> Self::U {
        // SAFETY: above.
        unsafe { [0, 16, 32, 48].map(|i| vld1q_u8(p.add(i))) }
    }
    #[inline(always)]
    unsafe fn low_nibbles(v: Self::U) -> Self::U {
        // SAFETY: above.
        v.map(|v| unsafe { vandq_u8(v, vdupq_n_u8(15)) })
    }
    #[inline(always)]
    unsafe fn high_nibbles(v: Self::U) -> Self::U {
        // SAFETY: above.
        v.map(|v| unsafe { vshrq_n_u8::<4>(v) })
    }
    /// Pairs of products stay within 16 bits: 2 * 127 * 127 < 2^15.
    #[inline(always)]
    unsafe fn dot_u7(acc: Self::I, w: Self::U, x: *const u8) -> Self::I {
        // SAFETY: above.
        unsafe {
            let x = vreinterpretq_s8_s32(vdupq_n_s32(x.cast::<i32>().read_unaligned()));
            each(acc, w, |acc, w| {
                let w = vreinterpretq_s8_u8(w);
                let (low, high) = (vmull_s8(vget_low_s8(w), vget_low_s8(x)), vmull_high_s8(w, x));
                vpadalq_s16(acc, vpaddq_s16(low, high))
            })
        }
    }
    #[inline(always)]
    unsafe fn dot_s8(acc: Self::I, w: Self::U, x: *const u8) -> Self::I {
        // SAFETY: above; 2 * 128 * 127 < 2^15.
        unsafe { Self::dot_u7(acc, w.map(|w| veorq_u8(w, vdupq_n_u8(128))), x) }
    }
    #[inline(always)]
    unsafe fn bits<const SHIFT: u32, const MASK: i32>(p: *const u8) -> Self::I {
        // SAFETY: above.
        unsafe {
            let shift = vdupq_n_s32(-(SHIFT as i32));
            [0, 16, 32, 48].map(|i| {
                let words = vshlq_u32(vreinterpretq_u32_u8(vld1q_u8(p.add(i))), shift);
                vandq_s32(vreinterpretq_s32_u32(words), vdupq_n_s32(MASK))
            })
        }
    }
    #[inline(always)]
    unsafe fn join<const SHIFT: u32>(a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: above.
        unsafe {
            let shift = vdupq_n_s32(SHIFT as i32);
            each(a, b, |a, b| vorrq_s32(a, vshlq_s32(b, shift)))
        }
    }
    #[inline(always)]
    unsafe fn word_bits(p: *const u8, shift: usize, mask: i32) -> Self::I {
        // SAFETY: above.
        unsafe {
            let shift = vdupq_n_s32(-(shift as i32));
            [0, 16, 32, 48].map(|i| {
                let words = vshlq_u32(vreinterpretq_u32_u8(vld1q_u8(p.add(i))), shift);
                vandq_s32(vreinterpretq_s32_u32(words), vdupq_n_s32(mask))
            })
        }
    }
    #[inline(always)]
    unsafe fn half_bits(p: *const u8, shift: usize, mask: i32) -> Self::I {
        // SAFETY: above.
        unsafe {
            let shift = vdupq_n_s32(-(shift as i32));
            [0, 8, 16, 24].map(|i| {
                let words = vshlq_u32(vmovl_u16(vreinterpret_u16_u8(vld1_u8(p.add(i)))), shift);
                vandq_s32(vreinterpretq_s32_u32(words), vdupq_n_s32(mask))
            })
        }
    }
    #[inline(always)]
    unsafe fn load_bf16_values(p: *const u8) -> Self::F {
        // SAFETY: above.
        unsafe {
            [0, 8, 16, 24].map(|i| {
                let words = vmovl_u16(vreinterpret_u16_u8(vld1_u8(p.add(i))));
                vreinterpretq_f32_u32(vshlq_n_u32::<16>(words))
            })
        }
    }
    #[inline(always)]
    unsafe fn load_half_e8m0(p: *const u8) -> Self::F {
        let mut wide = [0.0f32; 16];
        for (r, w) in wide.iter_mut().enumerate() {
            // SAFETY: above.
            *w = half_of_e8m0(unsafe { *p.add(r) });
        }
        // SAFETY: sixteen values.
        unsafe { [0, 4, 8, 12].map(|i| vld1q_f32(wide.as_ptr().add(i))) }
    }
    #[inline(always)]
    unsafe fn field(v: Self::U, shift: usize, mask: u8) -> Self::U {
        // SAFETY: above.
        unsafe {
            let shift = vdupq_n_s8(-(shift as i8));
            v.map(|v| vandq_u8(vshlq_u8(v, shift), vdupq_n_u8(mask)))
        }
    }
    #[inline(always)]
    unsafe fn insert(low: Self::U, v: Self::U, from: usize, to: usize, mask: u8) -> Self::U {
        // SAFETY: above.
        unsafe {
            let shift = vdupq_n_s8(to as i8 - from as i8);
            each(low, v, |low, v| vorrq_u8(low, vandq_u8(vshlq_u8(v, shift), vdupq_n_u8(mask))))
        }
    }
    #[inline(always)]
    unsafe fn lookup(table: &[u8; 16], v: Self::U) -> Self::U {
        // SAFETY: above.
        unsafe {
            let table = vld1q_u8(table.as_ptr());
            v.map(|v| vqtbl1q_u8(table, v))
        }
    }
}
