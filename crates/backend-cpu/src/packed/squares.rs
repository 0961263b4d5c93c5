//! Turning squares: sixteen bytes of four rows become four lines that hold the same columns of all four.
#![allow(unsafe_code, reason = "vectors of the CPU's basic set")]

/// Sixteen bytes of each of four rows.
pub(super) type Square<'a> = [&'a [u8; 16]; 4];

/// Line `w` has word `w` of each row, every byte with the bits of `flip` changed.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
#[allow(clippy::inline_always, reason = "part of the innermost loop of packing")]
pub(super) fn turn_words(rows: Square<'_>, flip: u8) -> [[u8; 16]; 4] {
    #[allow(clippy::wildcard_imports, reason = "intrinsics, as everywhere")]
    use std::arch::x86_64::*;
    // SAFETY: SSE2 is part of the architecture; a row is sixteen bytes, and so is a vector.
    unsafe {
        let flip = _mm_set1_epi8(flip.cast_signed());
        let [a, b, c, d] = rows.map(|row| _mm_xor_si128(_mm_loadu_si128(row.as_ptr().cast()), flip));
        let low = [_mm_unpacklo_epi32(a, b), _mm_unpacklo_epi32(c, d)];
        let high = [_mm_unpackhi_epi32(a, b), _mm_unpackhi_epi32(c, d)];
        [
            _mm_unpacklo_epi64(low[0], low[1]),
            _mm_unpackhi_epi64(low[0], low[1]),
            _mm_unpacklo_epi64(high[0], high[1]),
            _mm_unpackhi_epi64(high[0], high[1]),
        ]
        .map(|line| std::mem::transmute::<__m128i, [u8; 16]>(line))
    }
}

/// The same without intrinsics.
#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
#[allow(clippy::inline_always, reason = "part of the innermost loop of packing")]
pub(super) fn turn_words(rows: Square<'_>, flip: u8) -> [[u8; 16]; 4] {
    std::array::from_fn(|w| std::array::from_fn(|i| rows[i / 4][w * 4 + i % 4] ^ flip))
}

/// Line `w` has the first two bytes of word `w` of each row, then the last two of each.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
#[allow(clippy::inline_always, reason = "part of the innermost loop of packing")]
pub(super) fn turn_pairs(rows: Square<'_>) -> [[u8; 16]; 4] {
    #[allow(clippy::wildcard_imports, reason = "intrinsics, as everywhere")]
    use std::arch::x86_64::*;
    // SAFETY: as in `turn_words`.
    unsafe {
        let [a, b, c, d] = rows.map(|row| _mm_loadu_si128(row.as_ptr().cast()));
        let low = [_mm_unpacklo_epi16(a, b), _mm_unpacklo_epi16(c, d)];
        let high = [_mm_unpackhi_epi16(a, b), _mm_unpackhi_epi16(c, d)];
        [
            _mm_unpacklo_epi32(low[0], low[1]),
            _mm_unpackhi_epi32(low[0], low[1]),
            _mm_unpacklo_epi32(high[0], high[1]),
            _mm_unpackhi_epi32(high[0], high[1]),
        ]
        .map(|line| std::mem::transmute::<__m128i, [u8; 16]>(line))
    }
}

/// The same without intrinsics.
#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
#[allow(clippy::inline_always, reason = "part of the innermost loop of packing")]
pub(super) fn turn_pairs(rows: Square<'_>) -> [[u8; 16]; 4] {
    std::array::from_fn(|w| std::array::from_fn(|i| rows[i / 2 % 4][w * 4 + i / 8 * 2 + i % 2]))
}

/// Asks for `len` bytes at `p`, which need not be there.
#[inline(always)]
#[allow(clippy::inline_always, reason = "part of the innermost loop of packing")]
pub(super) fn prefetch(p: *const u8, len: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..len).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint, which never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(line).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (p, len);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_its_place() {
        let rows: [[u8; 16]; 4] = std::array::from_fn(|r| std::array::from_fn(|i| (r * 16 + i) as u8));
        let (words, pairs) = (turn_words(rows.each_ref(), 0x80), turn_pairs(rows.each_ref()));
        for (r, row) in rows.iter().enumerate() {
            for (i, byte) in row.iter().enumerate() {
                assert_eq!(words[i / 4][r * 4 + i % 4], byte ^ 0x80);
                assert_eq!(pairs[i / 4][i % 4 / 2 * 8 + r * 2 + i % 2], *byte);
            }
        }
    }
}
