//! Rows of the latent cache of any format as BF16.

use oxseek_tensor::{CacheFormat, cache};

use super::{Lanes, RowRuns};
use crate::simd::panel::STREAM_AHEAD;

/// # Safety (of the kernel)
/// `rows` are rows of `format`; `out` has as many rows of `out_stride` bytes, a multiple of 4 that holds a row's BF16.
/// What pads them becomes zero.
pub(crate) struct CachedRows<'a> {
    pub(crate) format: CacheFormat,
    pub(crate) latent: usize,
    pub(crate) rope: usize,
    pub(crate) rows: RowRuns<'a>,
    pub(crate) out: *mut u8,
    pub(crate) out_stride: usize,
}

/// # Safety
/// As [`CachedRows`] says, and the CPU features of `P`.
#[inline(always)]
pub(in crate::simd) unsafe fn decode_rows<P: Lanes>(c: &CachedRows<'_>) {
    let (mut out, mut left) = (c.out, c.rows.n);
    for &run in c.rows.runs {
        let n = c.rows.run.min(left);
        for j in 0..n {
            // SAFETY: a row, and the room for it.
            unsafe {
                let row = run.add(j * c.rows.stride);
                for line in (0..c.rows.stride).step_by(64) {
                    P::prefetch(row.wrapping_add(STREAM_AHEAD + line));
                }
                decode_row::<P>(c, row, out);
                out = out.add(c.out_stride);
            }
        }
        left -= n;
    }
}

#[inline(always)]
unsafe fn decode_row<P: Lanes>(c: &CachedRows<'_>, row: *const u8, out: *mut u8) {
    let width = c.latent + c.rope;
    // SAFETY: the row has its format's parts; `out` holds `width` BF16 and what pads them.
    unsafe {
        match c.format {
            CacheFormat::F32 => decode::<P, Single>(row, width, 1.0, out),
            CacheFormat::F16 => decode::<P, Half>(row, width, 1.0, out),
            CacheFormat::Bf16 => copy(row, out, width * 2),
            CacheFormat::Q8_0 => decode_runs::<P, SignedByte>(c, row, out),
            CacheFormat::Fp8 => decode_runs::<P, Fp8>(c, row, out),
        }
        if c.out_stride > width * 2 {
            std::ptr::write_bytes(out.add(width * 2), 0, c.out_stride - width * 2);
        }
    }
}

/// A row of an 8-bit format: codes, scales, the rope part.
#[inline(always)]
unsafe fn decode_runs<P: Lanes, C: Code<P>>(c: &CachedRows<'_>, row: *const u8, out: *mut u8) {
    let (scales, rope) = cache::parts(c.latent);
    // SAFETY: as above.
    unsafe {
        for (run, first) in (0..c.latent).step_by(cache::CACHE_RUN).enumerate() {
            let scale = f32::from_le_bytes(row.add(scales + run * 4).cast::<[u8; 4]>().read());
            let n = cache::CACHE_RUN.min(c.latent - first);
            decode::<P, C>(row.add(first), n, scale, out.add(first * 2));
        }
        copy(row.add(rope), out.add(c.latent * 2), c.rope * 2);
    }
}

/// `n` bytes: calls would take longer than the copying of a few vectors.
#[inline(always)]
unsafe fn copy(from: *const u8, to: *mut u8, n: usize) {
    let mut i = 0;
    // SAFETY: `n` bytes at both.
    unsafe {
        while i + 32 <= n {
            to.add(i).cast::<[u8; 32]>().write(from.add(i).cast::<[u8; 32]>().read());
            i += 32;
        }
        if i < n {
            std::ptr::copy_nonoverlapping(from.add(i), to.add(i), n - i);
        }
    }
}

/// `n` codes, each times `scale`.
#[inline(always)]
unsafe fn decode<P: Lanes, C: Code<P>>(from: *const u8, n: usize, scale: f32, out: *mut u8) {
    // SAFETY: `n` codes and room for as many values; the last ones, if they are no whole vector, by way of copies.
    unsafe {
        let scale = P::splat(scale);
        let mut i = 0;
        while i + 16 <= n {
            P::store_bf16(P::mul(C::load(from.add(i * C::BYTES)), scale), out.add(i * 2));
            i += 16;
        }
        if i < n {
            let (mut codes, mut values) = ([0u8; 64], [0u8; 32]);
            std::ptr::copy_nonoverlapping(from.add(i * C::BYTES), codes.as_mut_ptr(), (n - i) * C::BYTES);
            P::store_bf16(P::mul(C::load(codes.as_ptr()), scale), values.as_mut_ptr());
            std::ptr::copy_nonoverlapping(values.as_ptr(), out.add(i * 2), (n - i) * 2);
        }
    }
}

/// How a value is stored, but for its scale.
trait Code<P: Lanes> {
    const BYTES: usize;
    /// Sixteen of them.
    unsafe fn load(p: *const u8) -> P::F;
}

struct Single;
struct Half;
struct SignedByte;
struct Fp8;

// SAFETY of every block below: the caller has sixteen codes at `p` and the CPU features of `P`.
impl<P: Lanes> Code<P> for Single {
    const BYTES: usize = 4;
    #[inline(always)]
    unsafe fn load(p: *const u8) -> P::F {
        // SAFETY: above.
        unsafe { P::load(p.cast()) }
    }
}

impl<P: Lanes> Code<P> for Half {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load(p: *const u8) -> P::F {
        // SAFETY: above.
        unsafe { P::load_f16(p) }
    }
}

impl<P: Lanes> Code<P> for SignedByte {
    const BYTES: usize = 1;
    #[inline(always)]
    unsafe fn load(p: *const u8) -> P::F {
        // SAFETY: above.
        unsafe { P::load_i8(p) }
    }
}

impl<P: Lanes> Code<P> for Fp8 {
    const BYTES: usize = 1;
    #[inline(always)]
    unsafe fn load(p: *const u8) -> P::F {
        const WHOLE: f32 = f32::from_bits((120 + 127) << 23);
        // SAFETY: above.
        unsafe { P::mul(P::load_e4m3_small(p), P::splat(WHOLE)) }
    }
}
