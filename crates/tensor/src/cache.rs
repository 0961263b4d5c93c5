//! How a row of the latent cache is stored, and the scalar codecs that say what every backend reads back.

use std::fmt;

use crate::{
    Error,
    dtype::{E4M3_TABLE, bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_e4m3, f32_to_f16},
};

/// Latent values that share a scale in the 8-bit formats.
pub const CACHE_RUN: usize = 128;
/// Runs below this are stored as zeros: the inverse of their scale would not be finite.
const LARGEST_MIN: f32 = 1e-30;

/// Storage of the rows of a latent cache: `latent` values, then `rope` values.
///
/// The 8-bit formats hold a code per latent value, padded to whole words of 4 bytes, then an F32 scale per
/// [`CACHE_RUN`] values, then the rope part in BF16: it is an eighth of the row, has no norm that bounds it, and its
/// error would grow with the largest of its values.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum CacheFormat {
    /// IEEE single precision.
    #[default]
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
    /// Signed bytes; the largest magnitude of a run becomes 127.
    Q8_0,
    /// FP8 E4M3; the largest magnitude of a run becomes 448.
    Fp8,
}

impl CacheFormat {
    /// Every format, for tests that walk them all.
    pub const ALL: [Self; 5] = [Self::F32, Self::Bf16, Self::F16, Self::Q8_0, Self::Fp8];

    /// The name that users see.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::Q8_0 => "q8_0",
            Self::Fp8 => "fp8",
        }
    }

    /// Bytes of one row.
    ///
    /// # Errors
    /// [`Error::Overflow`]
    pub fn row_bytes(self, latent: usize, rope: usize) -> Result<usize, Error> {
        let bytes = match self {
            Self::F32 => latent.checked_add(rope).and_then(|n| n.checked_mul(4)),
            Self::Bf16 | Self::F16 => latent.checked_add(rope).and_then(|n| n.checked_mul(2)),
            Self::Q8_0 | Self::Fp8 => latent
                .checked_next_multiple_of(4)
                .and_then(|n| n.checked_add(latent.div_ceil(CACHE_RUN) * 4))
                .and_then(|n| n.checked_add(rope.checked_mul(2)?)),
        };
        bytes.ok_or(Error::Overflow { what: "latent cache" })
    }

    /// Stores `row`, `latent` values and then the rope part, in `out`.
    ///
    /// # Panics
    /// When `out` is not [`CacheFormat::row_bytes`] long.
    #[inline]
    pub fn encode_row(self, row: &[f32], latent: usize, out: &mut [u8]) {
        match self {
            Self::F32 => put_each(row, out, f32::to_le_bytes),
            Self::Bf16 => put_each(row, out, |v| f32_to_bf16(v).to_le_bytes()),
            Self::F16 => put_each(row, out, |v| f32_to_f16(v).to_le_bytes()),
            Self::Q8_0 => encode_runs(row, latent, out, 127.0, signed_byte),
            Self::Fp8 => encode_runs(row, latent, out, 448.0, f32_to_e4m3),
        }
    }

    /// Reads a row back into `out`.
    ///
    /// # Panics
    /// When `bytes` is not [`CacheFormat::row_bytes`] long.
    #[inline]
    pub fn decode_row(self, bytes: &[u8], latent: usize, out: &mut [f32]) {
        match self {
            Self::F32 => get_each(bytes, out, f32::from_le_bytes),
            Self::Bf16 => get_each(bytes, out, |b| bf16_to_f32(u16::from_le_bytes(b))),
            Self::F16 => get_each(bytes, out, |b| f16_to_f32(u16::from_le_bytes(b))),
            Self::Q8_0 => decode_runs(bytes, latent, out, |q| f32::from(q.cast_signed())),
            Self::Fp8 => decode_runs(bytes, latent, out, |code| E4M3_TABLE[usize::from(code)]),
        }
    }
}

impl fmt::Display for CacheFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

fn put_each<const N: usize>(row: &[f32], out: &mut [u8], put: impl Fn(f32) -> [u8; N]) {
    assert_eq!(out.len(), row.len() * N, "a cache row has its format's size");
    for (o, &v) in out.as_chunks_mut::<N>().0.iter_mut().zip(row) {
        *o = put(v);
    }
}

fn get_each<const N: usize>(bytes: &[u8], out: &mut [f32], get: impl Fn([u8; N]) -> f32) {
    assert_eq!(bytes.len(), out.len() * N, "a cache row has its format's size");
    for (o, &b) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *o = get(b);
    }
}

/// Where the scales and the rope part of a row of an 8-bit format begin, in bytes.
pub const fn parts(latent: usize) -> (usize, usize) {
    let scales = latent.next_multiple_of(4);
    (scales, scales + latent.div_ceil(CACHE_RUN) * 4)
}

/// Rounds to the nearest whole number, ties to even.
fn signed_byte(v: f32) -> u8 {
    const SHIFT: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to a whole number
    let q = ((v + SHIFT).to_bits() as i32).wrapping_sub(SHIFT.to_bits() as i32);
    (q.clamp(-127, 127) as i8).cast_unsigned()
}

fn encode_runs(row: &[f32], latent: usize, out: &mut [u8], most: f32, code: impl Fn(f32) -> u8) {
    let (values, rotated) = row.split_at(latent);
    let (codes, rest) = out.split_at_mut(parts(latent).0);
    let (scales, rope) = rest.split_at_mut(parts(latent).1 - parts(latent).0);
    codes[latent..].fill(0);
    let runs = values.chunks(CACHE_RUN).zip(codes.chunks_mut(CACHE_RUN));
    for ((values, codes), scale) in runs.zip(scales.as_chunks_mut::<4>().0) {
        // As integers, magnitudes order as the numbers do, and NaN is above all.
        let largest = values.iter().fold(0, |m, v| m.max(v.to_bits() & 0x7fff_ffff));
        let largest = f32::from_bits(largest);
        let tiny = largest < LARGEST_MIN;
        *scale = (if tiny { 0.0 } else { largest / most }).to_le_bytes();
        let inverse = if tiny { 0.0 } else { most / largest };
        for (c, v) in codes.iter_mut().zip(values) {
            *c = code(v * inverse);
        }
    }
    put_each(rotated, rope, |v| f32_to_bf16(v).to_le_bytes());
}

fn decode_runs(bytes: &[u8], latent: usize, out: &mut [f32], value: impl Fn(u8) -> f32) {
    let (values, rotated) = out.split_at_mut(latent);
    let (codes, rest) = bytes.split_at(parts(latent).0);
    let (scales, rope) = rest.split_at(parts(latent).1 - parts(latent).0);
    let runs = values.chunks_mut(CACHE_RUN).zip(codes.chunks(CACHE_RUN));
    for ((values, codes), scale) in runs.zip(scales.as_chunks::<4>().0) {
        let scale = f32::from_le_bytes(*scale);
        for (v, &c) in values.iter_mut().zip(codes) {
            *v = value(c) * scale;
        }
    }
    get_each(rope, rotated, |b| bf16_to_f32(u16::from_le_bytes(b)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::Random;

    fn round_trip(format: CacheFormat, row: &[f32], latent: usize) -> Vec<f32> {
        let mut bytes = vec![0xaa; format.row_bytes(latent, row.len() - latent).unwrap()];
        format.encode_row(row, latent, &mut bytes);
        let mut back = vec![f32::NAN; row.len()];
        format.decode_row(&bytes, latent, &mut back);
        back
    }

    #[test]
    fn values_keep_what_their_bits_can() {
        for (format, part) in [
            (CacheFormat::F32, 0.0),
            (CacheFormat::Bf16, 1.0 / 256.0),
            (CacheFormat::F16, 1.0 / 2048.0),
            (CacheFormat::Q8_0, 0.0),
            (CacheFormat::Fp8, 1.0 / 16.0),
        ] {
            for (latent, rope) in [(1, 2), (9, 6), (128, 64), (300, 2), (512, 64)] {
                let mut random = Random::new(latent as u64);
                let row: Vec<f32> = random.normals(latent + rope).iter().map(|v| v * 3.0).collect();
                let back = round_trip(format, &row, latent);
                for (i, (x, y)) in row.iter().zip(&back).enumerate() {
                    let run = &row[i / CACHE_RUN * CACHE_RUN..latent.max(i + 1)];
                    let largest = run.iter().take(CACHE_RUN).fold(0.0f32, |m, v| m.max(v.abs()));
                    let step = match format {
                        CacheFormat::Q8_0 => largest / 254.0 + x.abs() / 256.0,
                        CacheFormat::Fp8 => largest / 448.0 / 512.0,
                        _ => 0.0,
                    };
                    assert!((x - y).abs() <= x.abs() * part + step * 1.001, "{format} {i}: {x} became {y}");
                }
            }
        }
    }

    #[test]
    fn zeros_and_the_tiniest_values_become_zero() {
        for format in [CacheFormat::Q8_0, CacheFormat::Fp8] {
            for v in [0.0, 1e-40, -1e-31] {
                assert!(round_trip(format, &[v; 6], 4)[..4].iter().all(|v| *v == 0.0), "{format} {v}");
            }
            let bad = round_trip(format, &[1.0, f32::INFINITY, 1.0, 0.0], 2);
            assert!(bad[0].is_nan() || bad[1].is_nan() || bad[1].is_infinite(), "{format}");
        }
    }

    #[test]
    fn a_row_has_the_bytes_that_it_says() {
        let sizes = CacheFormat::ALL.map(|f| f.row_bytes(512, 64).unwrap());
        assert_eq!(sizes, [2304, 1152, 1152, 656, 656]);
        assert_eq!(CacheFormat::Q8_0.row_bytes(9, 6).unwrap(), 12 + 4 + 12);
        assert!(CacheFormat::F32.row_bytes(usize::MAX / 2, 64).is_err());
    }
}
