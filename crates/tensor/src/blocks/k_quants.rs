//! Super-blocks of 256 with factors of few bits: Q2_K to Q6_K.

use super::{
    factor_unit,
    fit::{self, Line, round_within},
    half,
    plain::places,
    put_half, round_factors,
};

/// Q4_K, Q5_K: scale and minimum factors (6 bits each) of sub-block `j` out of the 12 bytes that hold eight of each.
fn factors_of_6_bits(s: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (s[j] & 63, s[j + 4] & 63)
    } else {
        ((s[j + 4] & 15) | (s[j - 4] >> 6) << 4, (s[j + 4] >> 4) | (s[j] >> 6) << 4)
    }
}

/// The inverse of [`factors_of_6_bits`], into zeros, for `j` in rising order.
fn put_factors_of_6_bits(s: &mut [u8], j: usize, scale: u8, min: u8) {
    if j < 4 {
        s[j] |= scale;
        s[j + 4] |= min;
    } else {
        s[j + 4] |= (scale & 15) | min << 4;
        s[j - 4] |= scale >> 4 << 6;
        s[j] |= min >> 4 << 6;
    }
}

/// Q3_K: the factor (6 bits) of sub-block `j` out of the 12 bytes that hold sixteen.
fn factor_q3_k(s: &[u8], j: usize) -> u8 {
    let low = s[j % 8] >> (j / 8 * 4) & 15;
    low | (s[8 + j % 4] >> (j / 4 * 2) & 3) << 4
}

/// Q2_K, Q3_K: where the 2 bits of element `l` of sub-block `j` (16 elements) are: byte and shift. Half a super-block
/// has 32 bytes; each pair of sub-blocks has two bits of them.
fn place_of_2_bits(j: usize, l: usize) -> (usize, usize) {
    (j / 8 * 32 + j % 2 * 16 + l, j % 8 / 2 * 2)
}

/// `factors: [u8; 16], q: [u8; 64], d: f16, dmin: f16`: sixteen sub-blocks of 16; the low nibble of a factor is that of
/// the scale, the high one that of the minimum; `w = d * scale * q - dmin * min`.
pub(super) fn decode_q2_k(b: &[u8; 84], out: &mut [f32; 256]) {
    let (d, dmin) = (half(b, 80), half(b, 82));
    for (j, out) in out.chunks_exact_mut(16).enumerate() {
        let (d, min) = (d * f32::from(b[j] & 15), dmin * f32::from(b[j] >> 4));
        for (l, o) in out.iter_mut().enumerate() {
            let (at, shift) = place_of_2_bits(j, l);
            *o = d * f32::from(b[16 + at] >> shift & 3) - min;
        }
    }
}

pub(super) fn encode_q2_k(x: &[f32; 256], b: &mut [u8; 84]) {
    b.fill(0);
    let lines = Lines::<16>::fit(x, 3.0, 15.0, b, [80, 82]);
    for (j, (scale, min)) in lines.factors(x).into_iter().enumerate() {
        b[j] = scale | min << 4;
        for (l, code) in lines.codes(x, j, scale, min).enumerate() {
            let (at, shift) = place_of_2_bits(j, l);
            b[16 + at] |= code << shift;
        }
    }
}

/// `high: [u8; 32], q: [u8; 64], factors: [u8; 12], d: f16`: sixteen sub-blocks of 16, codes of 3 bits;
/// `w = d * (factor - 32) * (code - 4)`.
pub(super) fn decode_q3_k(b: &[u8; 110], out: &mut [f32; 256]) {
    let d = half(b, 108);
    for (j, out) in out.chunks_exact_mut(16).enumerate() {
        let d = d * (f32::from(factor_q3_k(&b[96..108], j)) - 32.0);
        for (l, o) in out.iter_mut().enumerate() {
            let (at, shift) = place_of_2_bits(j, l);
            let high = b[j % 2 * 16 + l] >> (j / 2) & 1;
            *o = d * (f32::from(b[32 + at] >> shift & 3 | high << 2) - 4.0);
        }
    }
}

pub(super) fn encode_q3_k(x: &[f32; 256], b: &mut [u8; 110]) {
    b.fill(0);
    let signed = Signed::fit(x, 4.0, 32.0, b, 108);
    for (j, factor) in signed.factors(x).into_iter().enumerate() {
        for (l, code) in signed.codes(x, j, factor).enumerate() {
            let (at, shift) = place_of_2_bits(j, l);
            b[32 + at] |= (code & 3) << shift;
            b[j % 2 * 16 + l] |= code >> 2 << (j / 2);
        }
        let factor = (factor + 32.0) as u8;
        b[96 + j % 8] |= (factor & 15) << (j / 8 * 4);
        b[96 + 8 + j % 4] |= factor >> 4 << (j / 4 * 2);
    }
}

/// `d: f16, dmin: f16, factors: [u8; 12], q: [u8; 128]`: eight sub-blocks of 32, two to each 32 bytes, the even one in
/// the low nibbles; `w = d * scale * q - dmin * min`.
pub(super) fn decode_q4_k(b: &[u8; 144], out: &mut [f32; 256]) {
    let (d, dmin) = (half(b, 0), half(b, 2));
    for (j, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, min) = factors_of_6_bits(&b[4..16], j);
        let (d, min) = (d * f32::from(scale), dmin * f32::from(min));
        for (o, &q) in out.iter_mut().zip(&b[16 + j / 2 * 32..]) {
            *o = d * f32::from((q >> (j % 2 * 4)) & 15) - min;
        }
    }
}

pub(super) fn encode_q4_k(x: &[f32; 256], b: &mut [u8; 144]) {
    b.fill(0);
    let lines = Lines::<32>::fit(x, 15.0, 63.0, b, [0, 2]);
    for (j, (scale, min)) in lines.factors(x).into_iter().enumerate() {
        put_factors_of_6_bits(&mut b[4..16], j, scale, min);
        for (l, code) in lines.codes(x, j, scale, min).enumerate() {
            b[16 + j / 2 * 32 + l] |= code << (j % 2 * 4);
        }
    }
}

/// As Q4_K, with `high: [u8; 32]` before the nibbles: bit `j` of byte `l` is the fifth bit of element `l` of sub-block
/// `j`.
pub(super) fn decode_q5_k(b: &[u8; 176], out: &mut [f32; 256]) {
    let (d, dmin) = (half(b, 0), half(b, 2));
    for (j, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, min) = factors_of_6_bits(&b[4..16], j);
        let (d, min) = (d * f32::from(scale), dmin * f32::from(min));
        for (l, o) in out.iter_mut().enumerate() {
            let low = b[48 + j / 2 * 32 + l] >> (j % 2 * 4) & 15;
            *o = d * f32::from(low | (b[16 + l] >> j & 1) << 4) - min;
        }
    }
}

pub(super) fn encode_q5_k(x: &[f32; 256], b: &mut [u8; 176]) {
    b.fill(0);
    let lines = Lines::<32>::fit(x, 31.0, 63.0, b, [0, 2]);
    for (j, (scale, min)) in lines.factors(x).into_iter().enumerate() {
        put_factors_of_6_bits(&mut b[4..16], j, scale, min);
        for (l, code) in lines.codes(x, j, scale, min).enumerate() {
            b[48 + j / 2 * 32 + l] |= (code & 15) << (j % 2 * 4);
            b[16 + l] |= code >> 4 << j;
        }
    }
}

/// Q6_K: where element `i` has its low four bits and its high two: byte and shift of each. Of the 128 elements of a
/// half, 32 share a shift.
fn places_q6_k(i: usize) -> ((usize, usize), (usize, usize)) {
    let (half, quarter, l) = (i / 128, i % 128 / 32, i % 32);
    ((half * 64 + quarter % 2 * 32 + l, quarter / 2 * 4), (128 + half * 32 + l, quarter * 2))
}

/// `low: [u8; 128], high: [u8; 64], factors: [i8; 16], d: f16`: sixteen sub-blocks of 16, codes of 6 bits;
/// `w = d * factor * (code - 32)`.
pub(super) fn decode_q6_k(b: &[u8; 210], out: &mut [f32; 256]) {
    let d = half(b, 208);
    for (i, o) in out.iter_mut().enumerate() {
        let d = d * f32::from(b[192 + i / 16].cast_signed());
        let ((low, low_shift), (high, high_shift)) = places_q6_k(i);
        let code = b[low] >> low_shift & 15 | (b[high] >> high_shift & 3) << 4;
        *o = d * (f32::from(code) - 32.0);
    }
}

pub(super) fn encode_q6_k(x: &[f32; 256], b: &mut [u8; 210]) {
    b.fill(0);
    let signed = Signed::fit(x, 32.0, 128.0, b, 208);
    for (j, factor) in signed.factors(x).into_iter().enumerate() {
        b[192 + j] = (factor as i8).cast_unsigned();
        for (l, code) in signed.codes(x, j, factor).enumerate() {
            let ((low, low_shift), (high, high_shift)) = places_q6_k(j * 16 + l);
            b[low] |= (code & 15) << low_shift;
            b[high] |= code >> 4 << high_shift;
        }
    }
}

/// The sub-blocks of `N` elements of a super-block, each `d * scale * q - dmin * min` for whole factors.
struct Lines<const N: usize> {
    parts: [Line; 16],
    d: f32,
    dmin: f32,
    /// Largest code, largest factor.
    high: f32,
    factor_high: f32,
}

impl<const N: usize> Lines<N> {
    const COUNT: usize = 256 / N;

    /// Writes the two halves into the block.
    fn fit(x: &[f32; 256], high: f32, factor_high: f32, b: &mut [u8], halves_at: [usize; 2]) -> Self {
        let mut parts = [Line { scale: 0.0, min: 0.0 }; 16];
        for (line, x) in parts.iter_mut().zip(x.chunks_exact(N)) {
            *line = Line::best(x, high, true);
        }
        let largest = |of: fn(&Line) -> f32| parts.iter().map(of).fold(0.0, f32::max) / factor_high;
        let d = put_half(b, halves_at[0], largest(|l| l.scale));
        let dmin = put_half(b, halves_at[1], largest(|l| l.min));
        Self { parts, d, dmin, high, factor_high }
    }

    fn line(&self, scale: f32, min: f32) -> Line {
        Line { scale: self.d * scale, min: self.dmin * min }
    }

    /// Scale and minimum factors of each sub-block: the best of the nearest ones and their neighbours.
    fn factors(&self, x: &[f32; 256]) -> Vec<(u8, u8)> {
        let within = |f: f32| f.clamp(0.0, self.factor_high);
        let near = |v: f32, d: f32| {
            let f = round_within(v * fit::inverse(d), 0.0, self.factor_high);
            [f, within(f - 1.0), within(f + 1.0)]
        };
        let best = |(line, x): (&Line, &[f32])| {
            let (mut best, mut least) = ((0, 0), f32::INFINITY);
            for scale in near(line.scale, self.d) {
                for min in near(line.min, self.dmin) {
                    let error = self.line(scale, min).error(x, self.high);
                    if error < least {
                        (best, least) = ((scale as u8, min as u8), error);
                    }
                }
            }
            best
        };
        self.parts[..Self::COUNT].iter().zip(x.chunks_exact(N)).map(best).collect()
    }

    /// The codes of sub-block `j`.
    fn codes(&self, x: &[f32; 256], j: usize, scale: u8, min: u8) -> impl Iterator<Item = u8> {
        let line = self.line(f32::from(scale), f32::from(min));
        x[j * N..][..N].iter().map(move |&v| line.code(v, self.high) as u8)
    }
}

/// Sixteen sub-blocks of a super-block, each `d * factor * (code - zero)` for whole signed factors.
struct Signed {
    scales: [f32; 16],
    d: f32,
    zero: f32,
    /// Minus the smallest factor; the largest is one less.
    factor_low: f32,
}

impl Signed {
    /// Writes the half into the block.
    fn fit(x: &[f32; 256], zero: f32, factor_low: f32, b: &mut [u8], half_at: usize) -> Self {
        let mut scales = [0.0; 16];
        for (scale, x) in scales.iter_mut().zip(x.as_chunks::<16>().0) {
            *scale = fit::scale(x, places(zero), |v| round_within(v, -zero, zero - 1.0));
        }
        Self { d: put_half(b, half_at, factor_unit(&scales, -factor_low)), scales, zero, factor_low }
    }

    fn factors(&self, x: &[f32; 256]) -> [f32; 16] {
        let parts = x.as_chunks::<16>().0;
        let nearest = |v: f32| round_within(v, -self.zero, self.zero - 1.0);
        round_factors(&self.scales, self.d, self.factor_low, |j, step| fit::error(&parts[j], step, nearest))
    }

    /// The codes of sub-block `j`.
    fn codes(&self, x: &[f32; 256], j: usize, factor: f32) -> impl Iterator<Item = u8> {
        let (zero, inverse) = (self.zero, fit::inverse(self.d * factor));
        x[j * 16..][..16].iter().map(move |&v| (round_within(v * inverse, -zero, zero - 1.0) + zero) as u8)
    }
}
