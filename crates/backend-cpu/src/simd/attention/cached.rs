//! Rows of the latent cache of any format as BF16.

use oxseek_tensor::{CacheFormat, cache};

use super::{Lanes, RowRuns};
use crate::simd::panel::STREAM_AHEAD;

/// Rows of the latent cache, and where their BF16 go.
///
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

#[cfg(test)]
mod tests {
    use oxseek_tensor::{conformance::Random, dtype::f32_to_bf16};

    use super::*;
    use crate::Level;

    const ROWS: usize = 5;
    /// Rows of a run.
    const RUN: usize = 3;

    /// Rows of a format, some of them with what is not finite.
    fn stored(format: CacheFormat, latent: usize, rope: usize) -> (Vec<u8>, usize) {
        let (mut random, width) = (Random::new(latent as u64), latent + rope);
        let row_bytes = format.row_bytes(latent, rope).unwrap();
        let mut bytes = vec![0xaa; ROWS * row_bytes];
        for (j, out) in bytes.chunks_exact_mut(row_bytes).enumerate() {
            let mut row: Vec<f32> = random.normals(width).iter().map(|v| v * 3.0).collect();
            if j == 3 {
                row[latent] = f32::NAN;
                row[latent - 1] = f32::INFINITY;
            }
            format.encode_row(&row, latent, out);
        }
        (bytes, row_bytes)
    }

    fn not_finite(bf16: u16) -> bool {
        bf16 & 0x7f80 == 0x7f80
    }

    #[test]
    fn rows_are_those_of_the_scalar_codec_rounded() {
        for level in Level::available() {
            for format in CacheFormat::ALL {
                for (latent, rope) in [(1, 2), (9, 6), (31, 2), (128, 64), (300, 3), (512, 64)] {
                    let (bytes, row_bytes) = stored(format, latent, rope);
                    let (width, stride) = (latent + rope, (latent + rope).next_multiple_of(32) * 2);
                    let mut out = vec![0xaa; ROWS * stride];
                    let runs = [bytes.as_ptr(), bytes[RUN * row_bytes..].as_ptr()];
                    let rows = RowRuns::new(&runs, RUN, row_bytes, ROWS);
                    let out_at = out.as_mut_ptr();
                    let cached = CachedRows { format, latent, rope, rows, out: out_at, out_stride: stride };
                    // SAFETY: rows of the format, and room for as many.
                    unsafe { (level.kernels().unwrap().decode_rows)(&cached) };
                    let mut want = vec![0.0; width];
                    for (j, out) in out.chunks_exact(stride).enumerate() {
                        format.decode_row(&bytes[j * row_bytes..][..row_bytes], latent, &mut want);
                        let halves = out.as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b));
                        for (i, found) in halves.enumerate() {
                            let want = want.get(i).map_or(0, |v| f32_to_bf16(*v));
                            let same = found == want || (not_finite(found) && not_finite(want));
                            assert!(same, "{level} {format} {latent} row {j} value {i}: {found:x} {want:x}");
                        }
                    }
                }
            }
        }
    }
}
