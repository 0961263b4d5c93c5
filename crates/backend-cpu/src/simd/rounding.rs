//! Rounding of activations: plain loops that the compiler turns into each level's vectors.

use crate::{packed::RUN, rounded::SUM_COLUMNS};

/// `n` values to BF16, nearest even, then zeros to the end of the run. NaN stays NaN.
///
/// # Safety
/// `n` values at `x`, room for whole runs at `out`.
#[inline(always)]
pub(super) unsafe fn round_bf16(x: *const f32, n: usize, out: *mut u16) {
    // SAFETY: the caller's promise.
    let (x, out) = unsafe {
        (std::slice::from_raw_parts(x, n), std::slice::from_raw_parts_mut(out, n.next_multiple_of(RUN)))
    };
    for (o, v) in out.iter_mut().zip(x) {
        let u = v.to_bits();
        // A NaN whose payload is all low bits must not round to infinity, nor wrap around.
        let rounded =
            if u & 0x7fff_ffff > 0x7f80_0000 { u | 0x0040_0000 } else { u + 0x7fff + ((u >> 16) & 1) };
        *o = (rounded >> 16) as u16;
    }
    out[n..].fill(0);
}

/// `n` values to signed bytes: per run of 128 the largest magnitude becomes 127. Also minus the sums of each 32 bytes.
/// A run with a value that is not finite gets a scale that is not finite.
///
/// # Safety
/// `n` values at `x`, room for whole runs at `out`, `scales` and `minus_sums`.
#[inline(always)]
pub(super) unsafe fn round_bytes(
    x: *const f32,
    n: usize,
    out: *mut i8,
    scales: *mut f32,
    minus_sums: *mut i32,
) {
    const SHIFT: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to a whole number, nearest even
    let runs = n.div_ceil(RUN);
    // SAFETY: the caller's promise.
    let (x, out, scales, minus_sums) = unsafe {
        (
            std::slice::from_raw_parts(x, n),
            std::slice::from_raw_parts_mut(out, runs * RUN),
            std::slice::from_raw_parts_mut(scales, runs),
            std::slice::from_raw_parts_mut(minus_sums, runs * (RUN / SUM_COLUMNS)),
        )
    };
    let parts = out.as_chunks_mut::<RUN>().0.iter_mut().zip(scales).zip(minus_sums.as_chunks_mut::<4>().0);
    for (run, ((out, scale), sums)) in parts.enumerate() {
        let x = &x[run * RUN..];
        let mut padded = [0.0f32; RUN];
        let len = x.len().min(RUN);
        padded[..len].copy_from_slice(&x[..len]);
        // As integers, magnitudes order as the numbers do, and NaN is above all.
        let largest = padded.iter().fold(0, |m, v| m.max(v.to_bits() & 0x7fff_ffff));
        let largest = f32::from_bits(largest);
        *scale = largest / 127.0;
        let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
        for ((o, v), sum) in
            out.as_chunks_mut::<SUM_COLUMNS>().0.iter_mut().zip(padded.as_chunks::<SUM_COLUMNS>().0).zip(sums)
        {
            let mut total = 0;
            for (o, v) in o.iter_mut().zip(v) {
                let q = ((v * inverse + SHIFT).to_bits() as i32).wrapping_sub(SHIFT.to_bits() as i32);
                // Below 2^-126 the inverse overflows; such a run is as good as zero but must stay in range.
                let q = q.clamp(-127, 127);
                *o = q as i8;
                total += q;
            }
            *sum = -total;
        }
    }
}
