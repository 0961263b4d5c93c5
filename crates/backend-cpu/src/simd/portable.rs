//! No intrinsics: eight lanes as an array, which compilers turn into whatever the target's baseline has.

use oxseek_tensor::dtype::{bf16_to_f32, f16_to_f32};

use super::Simd;

const LANES: usize = 8;

/// Eight lanes.
#[derive(Clone, Copy)]
pub(crate) struct V([f32; LANES]);

impl V {
    #[inline(always)]
    fn each(a: V, b: V, f: impl Fn(f32, f32) -> f32) -> V {
        V(std::array::from_fn(|i| f(a.0[i], b.0[i])))
    }

    /// # Safety
    /// `LANES` elements of `N` bytes readable at `p`.
    #[inline(always)]
    unsafe fn decode<const N: usize>(p: *const u8, f: impl Fn([u8; N]) -> f32) -> V {
        // SAFETY: the caller's promise; byte arrays need no alignment.
        V(std::array::from_fn(|i| f(unsafe { *p.add(i * N).cast::<[u8; N]>() })))
    }
}

// SAFETY of every block below: pointers have the readable or writable elements that the trait asks for.
impl Simd for V {
    const LANES: usize = LANES;
    const TILE_TOKENS: usize = 2;
    super::outlined!();
    #[inline(always)]
    unsafe fn splat(v: f32) -> Self {
        V([v; LANES])
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: LANES values are readable.
        unsafe { V(p.cast::<[f32; LANES]>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: LANES values are writable.
        unsafe { p.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> Self {
        // SAFETY: LANES halves are readable.
        unsafe { V::decode::<2>(p, |b| f16_to_f32(u16::from_le_bytes(b))) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> Self {
        // SAFETY: LANES halves are readable.
        unsafe { V::decode::<2>(p, |b| bf16_to_f32(u16::from_le_bytes(b))) }
    }
    #[inline(always)]
    unsafe fn load_e4m3(p: *const u8) -> Self {
        let place = |[c]: [u8; 1]| f32::from_bits((u32::from(c & 0x80) << 24) | (u32::from(c & 0x7f) << 20));
        // SAFETY: LANES codes are readable.
        unsafe { V::decode::<1>(p, place) }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        V::each(self, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        V::each(self, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        // Not `mul_add`: without hardware for it that is a slow library call.
        V(std::array::from_fn(|i| self.0[i] * b.0[i] + c.0[i]))
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        V::each(self, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn min(self, b: Self) -> Self {
        V::each(self, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        V::each(self, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn pow2_of_shifted(self) -> Self {
        V(self.0.map(|v| f32::from_bits((v.to_bits() << 23).wrapping_add(127 << 23))))
    }
    #[inline(always)]
    unsafe fn sum4(v: [Self; 4]) -> [f32; 4] {
        v.map(|V(l)| ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7])))
    }
    #[inline(always)]
    unsafe fn max_lane(self) -> f32 {
        self.0.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
}

super::kernels!(V, super::panel::portable::P);
