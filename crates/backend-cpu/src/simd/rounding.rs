//! Rounding of activations: plain loops that the compiler turns into each level's vectors.

use crate::{
    packed::{RUN, Rounding},
    rounded::{BYTE_RUN_WORDS, CODES, SUM_SHIFT, SUMS_16, SUMS_32, SUMS_HIGH, SUMS_LOW},
};

/// `n` values as words of a rounded row (`rounded.rs`), padded to whole runs.
///
/// # Safety
/// `n` values at `x`, room for the words of whole runs at `out`.
#[inline(always)]
pub(super) unsafe fn round(rounding: Rounding, x: *const f32, n: usize, out: *mut f32) {
    // SAFETY: the caller's promise.
    unsafe {
        match rounding {
            Rounding::Bf16 => round_bf16(x, n, out.cast()),
            Rounding::Bytes => round_bytes(x, n, out),
        }
    }
}

/// `n` values to BF16, nearest even, then zeros to the end of the run. NaN stays NaN.
///
/// # Safety
/// `n` values at `x`, room for whole runs at `out`.
#[inline(always)]
unsafe fn round_bf16(x: *const f32, n: usize, out: *mut u16) {
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

/// `n` values to signed bytes: per run of 128 the largest magnitude becomes 127. Also minus the sums of each 32 and of
/// each 16 bytes, those of 32 in two forms. A run with a value that is not finite gets a scale that is not finite.
///
/// # Safety
/// `n` values at `x`, room for whole runs at `out`.
#[inline(always)]
unsafe fn round_bytes(x: *const f32, n: usize, out: *mut f32) {
    // SAFETY: the caller's promise.
    let (x, out) = unsafe {
        let words = n.div_ceil(RUN) * BYTE_RUN_WORDS;
        (std::slice::from_raw_parts(x, n), std::slice::from_raw_parts_mut(out.cast::<[u8; 4]>(), words))
    };
    for (x, out) in x.chunks(RUN).zip(out.as_chunks_mut::<BYTE_RUN_WORDS>().0) {
        let mut padded = [0.0f32; RUN];
        padded[..x.len()].copy_from_slice(x);
        round_byte_run(&padded, out);
    }
}

#[inline(always)]
fn round_byte_run(x: &[f32; RUN], out: &mut [[u8; 4]; BYTE_RUN_WORDS]) {
    const SHIFT: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to a whole number, nearest even
    // As integers, magnitudes order as the numbers do, and NaN is above all.
    let largest = x.iter().fold(0, |m, v| m.max(v.to_bits() & 0x7fff_ffff));
    let largest = f32::from_bits(largest);
    let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
    let codes: [i8; RUN] = std::array::from_fn(|i| {
        let q = ((x[i] * inverse + SHIFT).to_bits() as i32).wrapping_sub(SHIFT.to_bits() as i32);
        // Below 2^-126 the inverse overflows; such a run is as good as zero but must stay in range.
        q.clamp(-127, 127) as i8
    });
    let sums: [i32; RUN / 16] =
        std::array::from_fn(|s| -codes[s * 16..][..16].iter().map(|q| i32::from(*q)).sum::<i32>());
    out[0] = (largest / 127.0).to_le_bytes();
    for (s, pair) in sums.as_chunks::<2>().0.iter().enumerate() {
        let sum = pair[0] + pair[1];
        out[SUMS_32 + s] = sum.to_le_bytes();
        out[SUMS_HIGH][s] = (sum >> SUM_SHIFT).to_le_bytes()[0];
        out[SUMS_LOW][s] = sum.to_le_bytes()[0] & ((1 << SUM_SHIFT) - 1);
    }
    for (s, sum) in sums.iter().enumerate() {
        out[SUMS_16 + s] = sum.to_le_bytes();
    }
    for (word, four) in out[CODES..].iter_mut().zip(codes.as_chunks::<4>().0) {
        *word = four.map(i8::cast_unsigned);
    }
}
