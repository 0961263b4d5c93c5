//! Nibbles that index a table: IQ4_NL, IQ4_XS, MXFP4.

use super::{
    factor_unit, fit, half,
    plain::{nibbles, put_nibbles},
    put_half, round_factors,
};

/// The values of the codes of IQ4_NL and IQ4_XS.
pub const IQ4_VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// Twice the values of E2M1 codes.
pub const E2M1_DOUBLED: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// The code of IQ4 nearest to `v`.
fn iq4_code(v: f32) -> u8 {
    let mut code = 0;
    for pair in IQ4_VALUES.windows(2) {
        let middle = 0.5 * (f32::from(pair[0]) + f32::from(pair[1]));
        code += u8::from(v > middle);
    }
    code
}

/// The value of IQ4 nearest to `v`.
fn iq4_nearest(v: f32) -> f32 {
    let mut nearest = f32::from(IQ4_VALUES[0]);
    for pair in IQ4_VALUES.windows(2) {
        let (low, high) = (f32::from(pair[0]), f32::from(pair[1]));
        nearest = if v > 0.5 * (low + high) { high } else { nearest };
    }
    nearest
}

/// Where the value of the largest magnitude may come to lie: around either end of the table.
fn iq4_places() -> impl Iterator<Item = f32> {
    (-7i8..=7).map(|i| f32::from(IQ4_VALUES[0]) - 2.0 * f32::from(i)).chain([105.0, 113.0, 121.0])
}

fn iq4_decode(d: f32, q: &[u8], out: &mut [f32]) {
    for (o, code) in out.iter_mut().zip(nibbles(q)) {
        *o = d * f32::from(IQ4_VALUES[usize::from(code)]);
    }
}

fn iq4_encode(d: f32, x: &[f32; 32], q: &mut [u8]) {
    let inverse = fit::inverse(d);
    put_nibbles(&x.map(|v| iq4_code(v * inverse)), q);
}

/// `d: f16, q: [u8; 16]`; `w = d * value(code)`.
pub(super) fn decode_iq4_nl(b: &[u8; 18], out: &mut [f32; 32]) {
    iq4_decode(half(b, 0), &b[2..], out);
}

pub(super) fn encode_iq4_nl(x: &[f32; 32], b: &mut [u8; 18]) {
    let d = put_half(b, 0, fit::scale(x, iq4_places(), iq4_nearest));
    iq4_encode(d, x, &mut b[2..]);
}

/// `d: f16, high: u16, low: [u8; 4], q: [u8; 128]`: eight sub-blocks of 32, whose factors have four bits in `low` and
/// two in `high`; `w = d * (factor - 32) * value(code)`.
pub(super) fn decode_iq4_xs(b: &[u8; 136], out: &mut [f32; 256]) {
    let d = half(b, 0);
    let high = u16::from_le_bytes([b[2], b[3]]);
    for (j, (out, q)) in out.chunks_exact_mut(32).zip(b[8..].chunks_exact(16)).enumerate() {
        let factor = b[4 + j / 2] >> (j % 2 * 4) & 15 | ((high >> (2 * j) & 3) as u8) << 4;
        iq4_decode(d * (f32::from(factor) - 32.0), q, out);
    }
}

pub(super) fn encode_iq4_xs(x: &[f32; 256], b: &mut [u8; 136]) {
    let parts = x.as_chunks::<32>().0;
    let scales: [f32; 8] = std::array::from_fn(|j| fit::scale(&parts[j], iq4_places(), iq4_nearest));
    b.fill(0);
    let d = put_half(b, 0, factor_unit(&scales, -32.0));
    let factors = round_factors(&scales, d, 32.0, |j, step| fit::error(&parts[j], step, iq4_nearest));
    let mut high = 0;
    for (j, (factor, x)) in factors.into_iter().zip(parts).enumerate() {
        iq4_encode(d * factor, x, &mut b[8 + 16 * j..][..16]);
        let factor = (factor + 32.0) as u8;
        b[4 + j / 2] |= (factor & 15) << (j % 2 * 4);
        high |= u16::from(factor >> 4) << (2 * j);
    }
    b[2..4].copy_from_slice(&high.to_le_bytes());
}

/// `2^(e - 128)`: half of what the byte means, for values that are doubled.
pub fn half_of_e8m0(e: u8) -> f32 {
    if e < 2 { f32::from_bits(0x0020_0000 << e) } else { f32::from_bits((u32::from(e) - 1) << 23) }
}

/// The E2M1 code nearest to half of `v`.
fn e2m1_code(v: f32) -> u8 {
    let mut code = 0;
    for pair in E2M1_DOUBLED[..8].windows(2) {
        let middle = 0.5 * (f32::from(pair[0]) + f32::from(pair[1]));
        code += u8::from(v.abs() > middle);
    }
    if v < 0.0 && code > 0 { code | 8 } else { code }
}

/// `e: u8, q: [u8; 16]`; `w = 2^(e - 127) * value(code)`.
pub(super) fn decode_mxfp4(b: &[u8; 17], out: &mut [f32; 32]) {
    let d = half_of_e8m0(b[0]);
    for (o, code) in out.iter_mut().zip(nibbles(&b[1..])) {
        *o = d * f32::from(E2M1_DOUBLED[usize::from(code)]);
    }
}

/// The power of two with the smallest error of three.
pub(super) fn encode_mxfp4(x: &[f32; 32], b: &mut [u8; 17]) {
    let largest = fit::extreme(x).abs();
    // The largest magnitude comes to lie between 4 and 8; the largest value is 6.
    let exponent = ((largest.to_bits() >> 23) as i32 - 2).clamp(1, 252);
    let nearest = |v: f32| f32::from(E2M1_DOUBLED[usize::from(e2m1_code(v))]);
    let (mut best, mut least) = (0, f32::INFINITY);
    for e in [exponent, exponent + 1, exponent - 1] {
        let e = if largest == 0.0 { 0 } else { e as u8 };
        let error = fit::error(x, half_of_e8m0(e), nearest);
        if error < least {
            (best, least) = (e, error);
        }
    }
    b[0] = best;
    let inverse = fit::inverse(half_of_e8m0(best));
    put_nibbles(&x.map(|v| e2m1_code(v * inverse)), &mut b[1..]);
}
