//! Sixteen rows in plain arrays: the truth that the other levels agree with, and what every CPU runs.

use oxseek_tensor::{
    blocks::half_of_e8m0,
    dtype::{bf16_to_f32, e4m3_to_f32, f16_to_f32},
};

use super::Panel;
use crate::packed::GROUP_ROWS;

/// Sixteen rows in arrays.
pub(crate) struct P;

type Lanes<T> = [T; GROUP_ROWS];

unsafe fn word(p: *const u8, r: usize) -> u32 {
    // SAFETY: the callers have 64 bytes at `p`, and `r < 16`.
    unsafe { p.cast::<u32>().add(r).read_unaligned() }
}

// SAFETY of every block below: pointers have the bytes that the trait asks for; no CPU feature is needed.
impl Panel for P {
    type F = Lanes<f32>;
    type I = Lanes<i32>;
    /// The even and the odd weights of the pairs.
    type W = [Lanes<f32>; 2];
    type U = Lanes<[u8; 4]>;
    type X = [f32; 2];
    const TILE_BF16: usize = 4;
    const TILE_BYTES: usize = 2;
    const PAIRS: bool = false;
    const UNROLLS: bool = false;
    const OFFSET_IN_SUMS: bool = false;

    crate::simd::outlined!();
    super::no_small_sums!();
    #[inline(always)]
    unsafe fn splat(v: f32) -> Self::F {
        [v; GROUP_ROWS]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::F {
        // SAFETY: above.
        unsafe { p.cast::<Self::F>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(v: Self::F, p: *mut f32) {
        // SAFETY: above.
        unsafe { p.cast::<Self::F>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> Self::F {
        // SAFETY: above.
        std::array::from_fn(|r| f16_to_f32(unsafe { p.cast::<u16>().add(r).read_unaligned() }))
    }
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        std::array::from_fn(|r| a[r] * b[r] + c[r])
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        std::array::from_fn(|r| a[r] * b[r])
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> Self::W {
        // SAFETY: above.
        let words: Lanes<u32> = std::array::from_fn(|r| unsafe { word(p, r) });
        [words.map(|w| f32::from_bits(w << 16)), words.map(|w| f32::from_bits(w & 0xffff_0000))]
    }
    #[inline(always)]
    unsafe fn load_e4m3(p: *const u8) -> [Self::W; 2] {
        let code = |half: usize, odd: usize| {
            // SAFETY: above; 16 bytes for each four rows.
            std::array::from_fn(|r| e4m3_to_f32(unsafe { *p.add(r / 4 * 16 + half * 8 + r % 4 * 2 + odd) }))
        };
        [[code(0, 0), code(0, 1)], [code(1, 0), code(1, 1)]]
    }
    #[inline(always)]
    unsafe fn pair(p: *const u8) -> Self::X {
        // SAFETY: above.
        let both = unsafe { p.cast::<u32>().read_unaligned() };
        [f32::from_bits(both << 16), f32::from_bits(both & 0xffff_0000)]
    }
    #[inline(always)]
    unsafe fn dot_bf16(acc: Self::F, w: Self::W, x: Self::X) -> Self::F {
        std::array::from_fn(|r| acc[r] + w[0][r] * x[0] + w[1][r] * x[1])
    }
    #[inline(always)]
    unsafe fn zero_i() -> Self::I {
        [0; GROUP_ROWS]
    }
    #[inline(always)]
    unsafe fn splat_shifted<const SHIFT: u32>(p: *const i32) -> Self::I {
        // SAFETY: above.
        [unsafe { *p } << SHIFT; GROUP_ROWS]
    }
    #[inline(always)]
    unsafe fn to_f32(v: Self::I) -> Self::F {
        v.map(|v| v as f32)
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> Self::U {
        // SAFETY: above.
        unsafe { p.cast::<Self::U>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn low_nibbles(v: Self::U) -> Self::U {
        v.map(|v| v.map(|b| b & 15))
    }
    #[inline(always)]
    unsafe fn high_nibbles(v: Self::U) -> Self::U {
        v.map(|v| v.map(|b| b >> 4))
    }
    #[inline(always)]
    unsafe fn dot_u7(acc: Self::I, w: Self::U, x: *const u8) -> Self::I {
        // SAFETY: above.
        let x = unsafe { x.cast::<[i8; 4]>().read_unaligned() };
        std::array::from_fn(|r| (0..4).fold(acc[r], |sum, k| sum + i32::from(w[r][k]) * i32::from(x[k])))
    }
    #[inline(always)]
    unsafe fn dot_s8(acc: Self::I, w: Self::U, x: *const u8) -> Self::I {
        // SAFETY: above.
        let x = unsafe { x.cast::<[i8; 4]>().read_unaligned() };
        std::array::from_fn(|r| {
            (0..4).fold(acc[r], |sum, k| sum + (i32::from(w[r][k]) - 128) * i32::from(x[k]))
        })
    }
    #[inline(always)]
    unsafe fn bits<const SHIFT: u32, const MASK: i32>(p: *const u8) -> Self::I {
        // SAFETY: above.
        std::array::from_fn(|r| (unsafe { word(p, r) } >> SHIFT) as i32 & MASK)
    }
    #[inline(always)]
    unsafe fn join<const SHIFT: u32>(a: Self::I, b: Self::I) -> Self::I {
        std::array::from_fn(|r| a[r] | b[r] << SHIFT)
    }
    #[inline(always)]
    unsafe fn word_bits(p: *const u8, shift: usize, mask: i32) -> Self::I {
        // SAFETY: above.
        std::array::from_fn(|r| (unsafe { word(p, r) } >> shift) as i32 & mask)
    }
    #[inline(always)]
    unsafe fn half_bits(p: *const u8, shift: usize, mask: i32) -> Self::I {
        // SAFETY: above.
        std::array::from_fn(|r| i32::from(unsafe { p.cast::<u16>().add(r).read_unaligned() } >> shift) & mask)
    }
    #[inline(always)]
    unsafe fn load_bf16_values(p: *const u8) -> Self::F {
        // SAFETY: above.
        std::array::from_fn(|r| bf16_to_f32(unsafe { p.cast::<u16>().add(r).read_unaligned() }))
    }
    #[inline(always)]
    unsafe fn load_half_e8m0(p: *const u8) -> Self::F {
        // SAFETY: above.
        std::array::from_fn(|r| half_of_e8m0(unsafe { *p.add(r) }))
    }
    #[inline(always)]
    unsafe fn field(v: Self::U, shift: usize, mask: u8) -> Self::U {
        v.map(|v| v.map(|b| b >> shift & mask))
    }
    #[inline(always)]
    unsafe fn insert(low: Self::U, v: Self::U, from: usize, to: usize, mask: u8) -> Self::U {
        let moved = |b: u8| if to > from { b << (to - from) } else { b >> (from - to) };
        std::array::from_fn(|r| std::array::from_fn(|k| low[r][k] | moved(v[r][k]) & mask))
    }
    #[inline(always)]
    unsafe fn lookup(table: &[u8; 16], v: Self::U) -> Self::U {
        v.map(|v| v.map(|b| table[usize::from(b)]))
    }
}
