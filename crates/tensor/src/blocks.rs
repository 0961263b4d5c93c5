//! Scalar codecs of GGUF's block formats (llama.cpp, ggml-common.h names the layouts).
//!
//! A decoder is the truth of its format, bit by bit (`goldens/gguf_blocks`). An encoder looks for the scales with the
//! smallest squared error; the same values give the same bytes everywhere.

mod fit;
mod k_quants;
mod plain;
mod tables;

pub use tables::{E2M1_DOUBLED, IQ4_VALUES, half_of_e8m0};

use crate::{
    DType, Error,
    dtype::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16},
};

/// A row of `dtype`'s blocks; `out` has the elements of `bytes`' blocks. Formats without blocks, or whose scales lie
/// apart, are left alone.
pub fn decode_row(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        DType::Q8_0 => each_block(bytes, out, plain::decode_q8_0),
        DType::Q4_0 => each_block(bytes, out, plain::decode_q4_0),
        DType::Q4_1 => each_block(bytes, out, plain::decode_q4_1),
        DType::Q5_0 => each_block(bytes, out, plain::decode_q5_0),
        DType::Q5_1 => each_block(bytes, out, plain::decode_q5_1),
        DType::Q2K => each_block(bytes, out, k_quants::decode_q2_k),
        DType::Q3K => each_block(bytes, out, k_quants::decode_q3_k),
        DType::Q4K => each_block(bytes, out, k_quants::decode_q4_k),
        DType::Q5K => each_block(bytes, out, k_quants::decode_q5_k),
        DType::Q6K => each_block(bytes, out, k_quants::decode_q6_k),
        DType::IQ4_NL => each_block(bytes, out, tables::decode_iq4_nl),
        DType::IQ4_XS => each_block(bytes, out, tables::decode_iq4_xs),
        DType::MXFP4 => each_block(bytes, out, tables::decode_mxfp4),
        DType::F32 | DType::F16 | DType::BF16 | DType::F8E4M3 | DType::INT4 => {}
    }
}

/// A row of INT4: `codes` has two columns a byte, the even one in the low nibble, `scales` a BF16 per 32 columns;
/// `w = scale * (code - 8)`.
pub fn decode_int4(codes: &[u8], scales: &[u8], out: &mut [f32]) {
    let blocks = codes.as_chunks::<16>().0.iter().zip(scales.as_chunks::<2>().0);
    for ((codes, scale), out) in blocks.zip(out.as_chunks_mut::<32>().0) {
        let scale = bf16_to_f32(u16::from_le_bytes(*scale));
        for (code, pair) in codes.iter().zip(out.as_chunks_mut::<2>().0) {
            *pair = [code & 15, code >> 4].map(|code| scale * (f32::from(code) - 8.0));
        }
    }
}

/// Writes the values `x`, a whole number of blocks, in `dtype` to `out`. Values that are not finite give blocks without
/// meaning.
///
/// # Errors
/// [`Error::Blocks`] or [`Error::MatrixBytes`] when the sizes do not fit; [`Error::ScalesApart`] for a format whose
/// rows are no rows without the scales that lie beside them.
pub fn encode_row(dtype: DType, x: &[f32], out: &mut [u8]) -> Result<(), Error> {
    let (cols, name) = (x.len(), dtype.name());
    let expected = dtype.row_bytes(cols).ok_or(Error::Blocks {
        rows: 1,
        cols,
        dtype: name,
        block: dtype.block_len(),
    })?;
    if out.len() != expected {
        return Err(Error::MatrixBytes { rows: 1, cols, dtype: name, expected, found: out.len() });
    }
    match dtype {
        DType::F32 => each_value(x, out, f32::to_le_bytes),
        DType::F16 => each_value(x, out, |v| f32_to_f16(v).to_le_bytes()),
        DType::BF16 => each_value(x, out, |v| f32_to_bf16(v).to_le_bytes()),
        DType::F8E4M3 | DType::INT4 => return Err(Error::ScalesApart { dtype: name }),
        DType::Q8_0 => each_values(x, out, plain::encode_q8_0),
        DType::Q4_0 => each_values(x, out, plain::encode_q4_0),
        DType::Q4_1 => each_values(x, out, plain::encode_q4_1),
        DType::Q5_0 => each_values(x, out, plain::encode_q5_0),
        DType::Q5_1 => each_values(x, out, plain::encode_q5_1),
        DType::Q2K => each_values(x, out, k_quants::encode_q2_k),
        DType::Q3K => each_values(x, out, k_quants::encode_q3_k),
        DType::Q4K => each_values(x, out, k_quants::encode_q4_k),
        DType::Q5K => each_values(x, out, k_quants::encode_q5_k),
        DType::Q6K => each_values(x, out, k_quants::encode_q6_k),
        DType::IQ4_NL => each_values(x, out, tables::encode_iq4_nl),
        DType::IQ4_XS => each_values(x, out, tables::encode_iq4_xs),
        DType::MXFP4 => each_values(x, out, tables::encode_mxfp4),
    }
    Ok(())
}

fn each_block<const B: usize, const N: usize>(
    bytes: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; B], &mut [f32; N]),
) {
    let (blocks, _) = bytes.as_chunks::<B>();
    let (out, _) = out.as_chunks_mut::<N>();
    for (block, out) in blocks.iter().zip(out) {
        decode(block, out);
    }
}

fn each_values<const B: usize, const N: usize>(
    x: &[f32],
    out: &mut [u8],
    encode: impl Fn(&[f32; N], &mut [u8; B]),
) {
    let (x, _) = x.as_chunks::<N>();
    let (out, _) = out.as_chunks_mut::<B>();
    for (x, out) in x.iter().zip(out) {
        encode(x, out);
    }
}

fn each_value<const B: usize>(x: &[f32], out: &mut [u8], encode: impl Fn(f32) -> [u8; B]) {
    for (&v, out) in x.iter().zip(out.as_chunks_mut::<B>().0) {
        *out = encode(v);
    }
}

fn half(bytes: &[u8], at: usize) -> f32 {
    f16_to_f32(u16::from_le_bytes([bytes[at], bytes[at + 1]]))
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Writes the half nearest to `x` and gives it back. What is too large becomes the largest: infinity times a code of
/// zero would be no number.
fn put_half(bytes: &mut [u8], at: usize, x: f32) -> f32 {
    let bits = f32_to_f16(x.clamp(-65504.0, 65504.0));
    bytes[at..at + 2].copy_from_slice(&bits.to_le_bytes());
    f16_to_f32(bits)
}

/// The scale of signed factors that gives the largest magnitude of `scales` the factor `low`.
fn factor_unit(scales: &[f32], low: f32) -> f32 {
    fit::extreme(scales) / low
}

/// Whole factors of `-low..low` for `scales`: the best of the nearest one and its neighbours, by the error that
/// `error(i, factor * d)` gives for the i-th.
fn round_factors<const N: usize>(
    scales: &[f32; N],
    d: f32,
    low: f32,
    error: impl Fn(usize, f32) -> f32,
) -> [f32; N] {
    let inverse = fit::inverse(d);
    std::array::from_fn(|i| {
        let near = fit::round_within(scales[i] * inverse, -low, low - 1.0);
        let (mut best, mut least) = (0.0, f32::INFINITY);
        for factor in [near, near - 1.0, near + 1.0] {
            let factor = factor.clamp(-low, low - 1.0);
            let error = error(i, factor * d);
            if error < least {
                (best, least) = (factor, error);
            }
        }
        best
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::conformance::Random;

    fn round_trip(dtype: DType, x: &[f32]) -> Vec<f32> {
        let mut bytes = vec![0xaa; dtype.row_bytes(x.len()).unwrap()];
        encode_row(dtype, x, &mut bytes).unwrap();
        let mut y = vec![0.0; x.len()];
        decode_row(dtype, &bytes, &mut y);
        y
    }

    fn relative_error(dtype: DType, x: &[f32]) -> f64 {
        let y = round_trip(dtype, x);
        let square = |v: f64| v * v;
        let error: f64 = x.iter().zip(&y).map(|(x, y)| square(f64::from(x - y))).sum();
        (error / x.iter().map(|x| square((*x).into())).sum::<f64>()).sqrt()
    }

    /// The formats with blocks, and the relative error that normal values may come back with.
    const BOUNDS: [(DType, f64); 13] = [
        (DType::Q8_0, 0.0055),
        (DType::Q4_0, 0.0800),
        (DType::Q4_1, 0.0710),
        (DType::Q5_0, 0.0400),
        (DType::Q5_1, 0.0345),
        (DType::Q2K, 0.2650),
        (DType::Q3K, 0.1450),
        (DType::Q4K, 0.0710),
        (DType::Q5K, 0.0350),
        (DType::Q6K, 0.0175),
        (DType::IQ4_NL, 0.0745),
        (DType::IQ4_XS, 0.0750),
        (DType::MXFP4, 0.1150),
    ];

    #[test]
    fn blocks_keep_what_their_bits_can() {
        let x = Random::new(7).normals(256 * 200);
        for (dtype, bound) in BOUNDS {
            let error = relative_error(dtype, &x);
            assert!(error < bound && error > bound / 2.0, "{dtype}: {error}, bound {bound}");
        }
    }

    /// Values that are not centred, of sizes at either end of a half.
    #[test]
    fn sizes_and_offsets_do_not_matter_much() {
        let x = Random::new(8).normals(256 * 8);
        for (dtype, bound) in BOUNDS {
            for scale in [1e-3, 1.0, 3e3] {
                let x: Vec<f32> = x.iter().map(|v| (v + 0.7) * scale).collect();
                let error = relative_error(dtype, &x);
                assert!(error < 1.2 * bound, "{dtype} times {scale}: {error}, bound {bound}");
            }
        }
    }

    /// The words 0x76543210 and 0xfedcba98 of compressed-tensors.
    #[test]
    fn int4_counts_from_the_lowest_nibble() {
        let codes: Vec<u8> = [0x7654_3210_u32, 0xfedc_ba98].map(u32::to_le_bytes).concat().repeat(2);
        let mut out = [0.0; 32];
        decode_int4(&codes, &f32_to_bf16(0.5).to_le_bytes(), &mut out);
        for (i, v) in out.iter().enumerate() {
            assert!((v - 0.5 * ((i % 16) as f32 - 8.0)).abs() < 1e-9, "{i}: {v}");
        }
    }

    #[test]
    fn zeros_stay_zero() {
        for (dtype, _) in BOUNDS {
            assert!(round_trip(dtype, &[0.0; 256]).iter().all(|y| *y == 0.0), "{dtype}");
        }
    }

    /// A sub-block that is much smaller than the others, one value alone, all values the same.
    #[test]
    fn uneven_blocks_come_back() {
        let uneven: Vec<f32> = (0..256).map(|i| (i / 32 + 1) as f32 * ((i % 16) as f32 - 5.0)).collect();
        let alone: Vec<f32> = (0..256).map(|i| if i == 77 { -3.0 } else { 0.0 }).collect();
        let same = vec![0.37; 256];
        for (dtype, bound) in BOUNDS {
            for x in [&uneven, &alone, &same] {
                let error = relative_error(dtype, x);
                assert!(error < 1.5 * bound, "{dtype}: {error}, bound {bound}");
            }
        }
    }

    #[test]
    fn values_of_no_size_do_no_harm() {
        let mut random = Random::new(9);
        for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, 1e-40] {
            for all in [false, true] {
                let x: Vec<f32> =
                    (0..256).map(|i| if all || i == 100 { odd } else { random.normal() }).collect();
                for (dtype, _) in BOUNDS {
                    let y = round_trip(dtype, &x);
                    let finite = x.iter().all(|v| v.is_finite());
                    assert!(!finite || y.iter().all(|y| y.is_finite()), "{dtype} {odd} {all}");
                }
            }
        }
    }

    #[test]
    fn rows_that_do_not_fit_are_refused() {
        let blocks = encode_row(DType::Q4K, &[0.0; 255], &mut [0; 144]).unwrap_err();
        assert_eq!(blocks, Error::Blocks { rows: 1, cols: 255, dtype: "Q4_K", block: 256 });
        let bytes = encode_row(DType::Q4_0, &[0.0; 32], &mut [0; 17]).unwrap_err();
        assert_eq!(bytes, Error::MatrixBytes { rows: 1, cols: 32, dtype: "Q4_0", expected: 18, found: 17 });
        let apart = encode_row(DType::INT4, &[0.0; 32], &mut [0; 16]).unwrap_err();
        assert_eq!(apart, Error::ScalesApart { dtype: "INT4" });
        let apart = encode_row(DType::F8E4M3, &[0.0; 2], &mut [0; 2]).unwrap_err();
        assert_eq!(apart, Error::ScalesApart { dtype: "F8_E4M3" });
        let mut out = [0; 4];
        encode_row(DType::BF16, &[1.0, -2.0], &mut out).unwrap();
        assert_eq!(out, [0x80, 0x3f, 0x00, 0xc0]);
    }
}
