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
    #[inline(always)]
    unsafe fn load_i8(p: *const u8) -> <P as Panel>::F {
        // SAFETY: above.
        unsafe {
            let bytes = vreinterpretq_s8_u8(vld1q_u8(p));
            let (low, high) = (vmovl_s8(vget_low_s8(bytes)), vmovl_s8(vget_high_s8(bytes)));
            [
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))),
                vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))),
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
                vcvtq_f32_s32(vmovl_s16(vget_high_s16(high))),
            ]
        }
    }
    #[inline(always)]
    unsafe fn load_e4m3_small(p: *const u8) -> <P as Panel>::F {
        // SAFETY: above.
        unsafe {
            let codes = vld1q_u8(p);
            let (low, high) = (vmovl_u8(vget_low_u8(codes)), vmovl_u8(vget_high_u8(codes)));
            [
                small(vget_low_u16(low)),
                small(vget_high_u16(low)),
                small(vget_low_u16(high)),
                small(vget_high_u16(high)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(v: <P as Panel>::F, p: *mut u8) {
        // SAFETY: above.
        unsafe {
            vst1q_u8(p, vreinterpretq_u8_u16(vcombine_u16(rounded(v[0]), rounded(v[1]))));
            vst1q_u8(p.add(16), vreinterpretq_u8_u16(vcombine_u16(rounded(v[2]), rounded(v[3]))));
        }
    }
}

/// Four BF16 at `p`.
#[inline(always)]
unsafe fn widen(p: *const u8) -> float32x4_t {
    // SAFETY: the caller's promise.
    unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vreinterpret_u16_u8(vld1_u8(p)))) }
}

/// Four E4M3 codes times 2^-120.
#[inline(always)]
unsafe fn small(codes: uint16x4_t) -> float32x4_t {
    // SAFETY: arithmetic only.
    unsafe {
        let code = vmovl_u16(codes);
        let sign = vandq_u32(vshlq_n_u32::<24>(code), vdupq_n_u32(0x8000_0000));
        let rest = vandq_u32(vshlq_n_u32::<20>(code), vdupq_n_u32(0x07f0_0000));
        vreinterpretq_f32_u32(vorrq_u32(sign, rest))
    }
}

/// The bits of four BF16.
#[inline(always)]
unsafe fn rounded(v: float32x4_t) -> uint16x4_t {
    // SAFETY: arithmetic only.
    unsafe {
        let bits = vreinterpretq_u32_f32(v);
        let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
        let near = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
        let quiet = vorrq_u32(bits, vdupq_n_u32(0x0040_0000));
        vshrn_n_u32::<16>(vbslq_u32(vceqq_f32(v, v), near, quiet))
    }
}
