//! Blocks of 32 with whole numbers: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1.

use super::{
    fit::{self, Line, round_within},
    half, put_half, word,
};

/// `d: f16, q: [i8; 32]`; `w = d * q`.
pub(super) fn decode_q8_0(b: &[u8; 34], out: &mut [f32; 32]) {
    let d = half(b, 0);
    for (o, &q) in out.iter_mut().zip(&b[2..]) {
        *o = d * f32::from(q.cast_signed());
    }
}

/// The largest magnitude becomes 127.
pub(super) fn encode_q8_0(x: &[f32; 32], b: &mut [u8; 34]) {
    let d = x.iter().fold(0.0f32, |m, v| m.max(v.abs())) / 127.0;
    let inverse = fit::inverse(d);
    put_half(b, 0, d);
    for (q, &v) in b[2..].iter_mut().zip(x) {
        *q = ((v * inverse).round() as i8).cast_unsigned();
    }
}

/// The low nibbles are elements 0..16, the high ones 16..32.
pub(super) fn nibbles(q: &[u8]) -> [u8; 32] {
    std::array::from_fn(|i| q[i % 16] >> (i / 16 * 4) & 15)
}

/// The inverse of [`nibbles`]; higher bits of the codes are left out.
pub(super) fn put_nibbles(codes: &[u8; 32], q: &mut [u8]) {
    for (i, q) in q.iter_mut().enumerate().take(16) {
        *q = codes[i] & 15 | codes[i + 16] << 4;
    }
}

/// Bit `i` of a word is the fifth bit of code `i`.
fn codes_of_5_bits(high: u32, q: &[u8]) -> [u8; 32] {
    let low = nibbles(q);
    std::array::from_fn(|i| low[i] | ((high >> i & 1) as u8) << 4)
}

/// Writes the word at `at` and the nibbles after it.
fn put_codes_of_5_bits(codes: &[u8; 32], b: &mut [u8], at: usize) {
    let high = codes.iter().enumerate().fold(0, |word, (i, code)| word | u32::from(code >> 4 & 1) << i);
    b[at..at + 4].copy_from_slice(&high.to_le_bytes());
    put_nibbles(codes, &mut b[at + 4..]);
}

/// `w = d * (code - zero)`
fn decode_around(zero: f32, d: f32, codes: [u8; 32], out: &mut [f32; 32]) {
    for (o, code) in out.iter_mut().zip(codes) {
        *o = d * (f32::from(code) - zero);
    }
}

/// `w = d * code + m`
fn decode_from(d: f32, m: f32, codes: [u8; 32], out: &mut [f32; 32]) {
    for (o, code) in out.iter_mut().zip(codes) {
        *o = d * f32::from(code) + m;
    }
}

/// Where the value of the largest magnitude may come to lie: around `-zero`.
pub(super) fn places(zero: f32) -> impl Iterator<Item = f32> {
    (-9i8..=9).map(move |i| -zero - 0.1 * f32::from(i))
}

/// Writes the scale with the smallest error and gives the codes around `zero`.
fn fit_around(zero: f32, x: &[f32; 32], b: &mut [u8]) -> [u8; 32] {
    let nearest = |v: f32| round_within(v, -zero, zero - 1.0);
    let d = put_half(b, 0, fit::scale(x, places(zero), nearest));
    let inverse = fit::inverse(d);
    x.map(|v| (nearest(v * inverse) + zero) as u8)
}

/// Writes the scale and the minimum with the smallest error and gives the codes up to `high`.
fn fit_from(high: f32, x: &[f32; 32], b: &mut [u8]) -> [u8; 32] {
    let line = Line::best(x, high, false);
    let line = Line { scale: put_half(b, 0, line.scale), min: -put_half(b, 2, -line.min) };
    x.map(|v| line.code(v, high) as u8)
}

/// `d: f16, q: [u8; 16]`; `w = d * (code - 8)`.
pub(super) fn decode_q4_0(b: &[u8; 18], out: &mut [f32; 32]) {
    decode_around(8.0, half(b, 0), nibbles(&b[2..]), out);
}

pub(super) fn encode_q4_0(x: &[f32; 32], b: &mut [u8; 18]) {
    let codes = fit_around(8.0, x, b);
    put_nibbles(&codes, &mut b[2..]);
}

/// `d: f16, m: f16, q: [u8; 16]`; `w = d * code + m`.
pub(super) fn decode_q4_1(b: &[u8; 20], out: &mut [f32; 32]) {
    decode_from(half(b, 0), half(b, 2), nibbles(&b[4..]), out);
}

pub(super) fn encode_q4_1(x: &[f32; 32], b: &mut [u8; 20]) {
    let codes = fit_from(15.0, x, b);
    put_nibbles(&codes, &mut b[4..]);
}

/// `d: f16, high: u32, q: [u8; 16]`; `w = d * (code - 16)`.
pub(super) fn decode_q5_0(b: &[u8; 22], out: &mut [f32; 32]) {
    decode_around(16.0, half(b, 0), codes_of_5_bits(word(b, 2), &b[6..]), out);
}

pub(super) fn encode_q5_0(x: &[f32; 32], b: &mut [u8; 22]) {
    let codes = fit_around(16.0, x, b);
    put_codes_of_5_bits(&codes, b, 2);
}

/// `d: f16, m: f16, high: u32, q: [u8; 16]`; `w = d * code + m`.
pub(super) fn decode_q5_1(b: &[u8; 24], out: &mut [f32; 32]) {
    decode_from(half(b, 0), half(b, 2), codes_of_5_bits(word(b, 4), &b[8..]), out);
}

pub(super) fn encode_q5_1(x: &[f32; 32], b: &mut [u8; 24]) {
    let codes = fit_from(31.0, x, b);
    put_codes_of_5_bits(&codes, b, 4);
}
