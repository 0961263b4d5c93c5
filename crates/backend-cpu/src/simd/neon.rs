//! aarch64 NEON: four lanes.

use std::arch::aarch64::*;

use super::Simd;

/// Four lanes.
#[derive(Clone, Copy)]
pub(crate) struct V(float32x4_t);

/// IEEE half bits to F32, exact: moved into place and scaled by 2^112, which also makes subnormals right; infinities
/// and NaN get the largest exponent. Baseline NEON has no conversion that Rust exposes on stable.
#[inline(always)]
unsafe fn halves(h: uint16x4_t) -> float32x4_t {
    // SAFETY: arithmetic only, on baseline NEON.
    unsafe {
        let h = vmovl_u16(h);
        let sign = vshlq_n_u32::<16>(vandq_u32(h, vdupq_n_u32(0x8000)));
        let magnitude = vandq_u32(h, vdupq_n_u32(0x7fff));
        let scaled = vmulq_f32(
            vreinterpretq_f32_u32(vshlq_n_u32::<13>(magnitude)),
            vdupq_n_f32(f32::from_bits((112 + 127) << 23)),
        );
        let special = vcgeq_u32(magnitude, vdupq_n_u32(0x7c00));
        let exponent = vandq_u32(special, vdupq_n_u32(0x7f80_0000));
        vreinterpretq_f32_u32(vorrq_u32(vorrq_u32(vreinterpretq_u32_f32(scaled), exponent), sign))
    }
}

// SAFETY of every block below: NEON is part of the aarch64 baseline, and pointers have the readable or writable
// elements that the trait asks for; NEON loads and stores of bytes and F32 need no more than element alignment, which
// `vld1` does not trap on.
impl Simd for V {
    const LANES: usize = 4;
    const TILE_TOKENS: usize = 4;
    super::outlined!("neon");
    #[inline(always)]
    unsafe fn splat(v: f32) -> Self {
        // SAFETY: above.
        unsafe { V(vdupq_n_f32(v)) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: above; through bytes, as weights may lie at any address.
        unsafe { V(vreinterpretq_f32_u8(vld1q_u8(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: above.
        unsafe { vst1q_u8(p.cast(), vreinterpretq_u8_f32(self.0)) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> Self {
        // SAFETY: above.
        unsafe { V(halves(vreinterpret_u16_u8(vld1_u8(p)))) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> Self {
        // SAFETY: above.
        unsafe { V(vreinterpretq_f32_u32(vshll_n_u16::<16>(vreinterpret_u16_u8(vld1_u8(p))))) }
    }
    #[inline(always)]
    unsafe fn load_e4m3(p: *const u8) -> Self {
        // SAFETY: above.
        unsafe {
            let four = vcreate_u8(u64::from(p.cast::<u32>().read_unaligned()));
            let code = vmovl_u16(vget_low_u16(vmovl_u8(four)));
            let sign = vandq_u32(vshlq_n_u32::<24>(code), vdupq_n_u32(0x8000_0000));
            let rest = vandq_u32(vshlq_n_u32::<20>(code), vdupq_n_u32(0x07f0_0000));
            V(vreinterpretq_f32_u32(vorrq_u32(sign, rest)))
        }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        // SAFETY: above.
        unsafe { V(vaddq_f32(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        // SAFETY: above.
        unsafe { V(vmulq_f32(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        // SAFETY: above.
        unsafe { V(vfmaq_f32(c.0, self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        // SAFETY: above.
        unsafe { V(vmaxq_f32(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn min(self, b: Self) -> Self {
        // SAFETY: above.
        unsafe { V(vminq_f32(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        // SAFETY: above.
        unsafe { V(vdivq_f32(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn pow2_of_shifted(self) -> Self {
        // SAFETY: above.
        unsafe {
            let n = vshlq_n_u32::<23>(vreinterpretq_u32_f32(self.0));
            V(vreinterpretq_f32_u32(vaddq_u32(n, vdupq_n_u32(127 << 23))))
        }
    }
    #[inline(always)]
    unsafe fn sum4(v: [Self; 4]) -> [f32; 4] {
        // SAFETY: above.
        unsafe {
            let sum = vpaddq_f32(vpaddq_f32(v[0].0, v[1].0), vpaddq_f32(v[2].0, v[3].0));
            let mut out = [0.0; 4];
            vst1q_f32(out.as_mut_ptr(), sum);
            out
        }
    }
    #[inline(always)]
    unsafe fn max_lane(self) -> f32 {
        // SAFETY: above.
        unsafe { vmaxvq_f32(self.0) }
    }
}

super::kernels!(V, super::panel::neon::P, "neon");
