//! Scalar codecs of GGUF's block formats (llama.cpp, ggml-common.h names the layouts).

use crate::{
    DType,
    dtype::{f16_to_f32, f32_to_f16},
};

/// A row of `dtype`'s blocks; `out` has the elements of `bytes`' blocks. Formats without blocks are left alone.
pub fn decode_row(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        DType::Q8_0 => each_block(bytes, out, decode_q8_0),
        DType::Q4_0 => each_block(bytes, out, decode_q4_0),
        DType::Q4K => each_block(bytes, out, decode_q4_k),
        DType::F32 | DType::F16 | DType::BF16 | DType::F8E4M3 => {}
    }
}

fn each_block<const B: usize, const N: usize>(
    bytes: &[u8],
    out: &mut [f32],
    decode: fn(&[u8; B], &mut [f32; N]),
) {
    let (blocks, _) = bytes.as_chunks::<B>();
    let (out, _) = out.as_chunks_mut::<N>();
    for (block, out) in blocks.iter().zip(out) {
        decode(block, out);
    }
}

fn half(bytes: &[u8], at: usize) -> f32 {
    f16_to_f32(u16::from_le_bytes([bytes[at], bytes[at + 1]]))
}

fn put_half(bytes: &mut [u8], at: usize, x: f32) -> f32 {
    let bits = f32_to_f16(x);
    bytes[at..at + 2].copy_from_slice(&bits.to_le_bytes());
    f16_to_f32(bits)
}

/// `d: f16, q: [i8; 32]`; `w = d * q`.
pub fn decode_q8_0(b: &[u8; 34], out: &mut [f32; 32]) {
    let d = half(b, 0);
    for (o, &q) in out.iter_mut().zip(&b[2..]) {
        *o = d * f32::from(q.cast_signed());
    }
}

/// The largest magnitude becomes 127.
pub fn encode_q8_0(x: &[f32; 32], b: &mut [u8; 34]) {
    let d = x.iter().fold(0.0f32, |m, v| m.max(v.abs())) / 127.0;
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    put_half(b, 0, d);
    for (q, &v) in b[2..].iter_mut().zip(x) {
        *q = ((v * inverse).round() as i8).cast_unsigned();
    }
}

/// `d: f16, q: [u8; 16]`, low nibbles are elements 0..16, high nibbles 16..32; `w = d * (q - 8)`.
pub fn decode_q4_0(b: &[u8; 18], out: &mut [f32; 32]) {
    let d = half(b, 0);
    for (i, &q) in b[2..].iter().enumerate() {
        out[i] = d * (f32::from(q & 15) - 8.0);
        out[i + 16] = d * (f32::from(q >> 4) - 8.0);
    }
}

/// The value of the largest magnitude becomes -8.
pub fn encode_q4_0(x: &[f32; 32], b: &mut [u8; 18]) {
    let extreme = x.iter().fold(0.0f32, |m, &v| if v.abs() > m.abs() { v } else { m });
    let d = extreme / -8.0;
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    put_half(b, 0, d);
    let code = |v: f32| ((v * inverse + 8.5) as u8).min(15);
    for i in 0..16 {
        b[2 + i] = code(x[i]) | code(x[i + 16]) << 4;
    }
}

/// Scale and minimum factors (6 bits each) of sub-block `j` out of the 12 bytes that hold eight of each.
fn factors_q4_k(s: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (s[j] & 63, s[j + 4] & 63)
    } else {
        ((s[j + 4] & 15) | (s[j - 4] >> 6) << 4, (s[j + 4] >> 4) | (s[j] >> 6) << 4)
    }
}

/// `d: f16, dmin: f16, factors: [u8; 12], q: [u8; 128]`: eight sub-blocks of 32, two to each 32 bytes, the even one in
/// the low nibbles; `w = d * scale * q - dmin * min`.
pub fn decode_q4_k(b: &[u8; 144], out: &mut [f32; 256]) {
    let (d, dmin) = (half(b, 0), half(b, 2));
    for (j, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, min) = factors_q4_k(&b[4..16], j);
        let (d, min) = (d * f32::from(scale), dmin * f32::from(min));
        for (o, &q) in out.iter_mut().zip(&b[16 + j / 2 * 32..]) {
            *o = d * f32::from((q >> (j % 2 * 4)) & 15) - min;
        }
    }
}

/// Each sub-block gets the scale and the minimum with the smallest squared error of a few candidates.
pub fn encode_q4_k(x: &[f32; 256], b: &mut [u8; 144]) {
    let fits: [Fit; 8] = std::array::from_fn(|j| Fit::best(&x[j * 32..][..32], 15.0));
    let largest = |of: fn(&Fit) -> f32| fits.iter().map(of).fold(0.0, f32::max);
    b.fill(0);
    let d = put_half(b, 0, largest(|f| f.scale) / 63.0);
    let dmin = put_half(b, 2, largest(|f| f.min) / 63.0);
    let factor = |v: f32, d: f32| if d == 0.0 { 0 } else { (v / d).round().clamp(0.0, 63.0) as u8 };
    for (j, fit) in fits.iter().enumerate() {
        let (scale, min) = (factor(fit.scale, d), factor(fit.min, dmin));
        let s = &mut b[4..16];
        if j < 4 {
            s[j] |= scale;
            s[j + 4] |= min;
        } else {
            s[j + 4] |= (scale & 15) | min << 4;
            s[j - 4] |= scale >> 4 << 6;
            s[j] |= min >> 4 << 6;
        }
        let (step, min) = (d * f32::from(scale), dmin * f32::from(min));
        for (i, &v) in x[j * 32..][..32].iter().enumerate() {
            let q = if step == 0.0 { 0.0 } else { ((v + min) / step).round().clamp(0.0, 15.0) };
            b[16 + j / 2 * 32 + i] |= (q as u8) << (j % 2 * 4);
        }
    }
}

/// `x = scale * q - min` for whole q from 0 on; neither is negative.
#[derive(Clone, Copy)]
struct Fit {
    scale: f32,
    min: f32,
    error: f32,
}

impl Fit {
    fn best(x: &[f32], q_max: f32) -> Self {
        let low = x.iter().copied().fold(0.0, f32::min);
        let high = x.iter().copied().fold(low, f32::max);
        let plain = Self { scale: (high - low) / q_max, min: -low, error: f32::INFINITY }.measured(x, q_max);
        if plain.scale == 0.0 {
            return plain;
        }
        let mut best = plain;
        // Trial scales around the one that spans the range; each is refined by least squares for its own codes.
        for i in -8i8..=12 {
            let scale = (high - low) / (q_max + 0.1 * f32::from(i));
            let trial = Self { scale, min: -low, error: 0.0 }.refined(x, q_max).measured(x, q_max);
            if trial.error < best.error {
                best = trial;
            }
        }
        best
    }

    fn code(&self, v: f32, q_max: f32) -> f32 {
        ((v + self.min) / self.scale).round().clamp(0.0, q_max)
    }

    /// The least-squares line through (code, value).
    fn refined(self, x: &[f32], q_max: f32) -> Self {
        let n = x.len() as f32;
        let (mut q1, mut q2, mut v1, mut qv) = (0.0, 0.0, 0.0, 0.0);
        for &v in x {
            let q = self.code(v, q_max);
            q1 += q;
            q2 += q * q;
            v1 += v;
            qv += q * v;
        }
        let det = n * q2 - q1 * q1;
        if det <= 0.0 {
            return self;
        }
        let scale = (n * qv - q1 * v1) / det;
        let min = -(v1 - scale * q1) / n;
        if scale <= 0.0 {
            return self;
        }
        if min < 0.0 {
            return Self { scale: qv / q2, min: 0.0, ..self };
        }
        Self { scale, min, ..self }
    }

    fn measured(self, x: &[f32], q_max: f32) -> Self {
        let error = |&v: &f32| {
            let q = if self.scale == 0.0 { 0.0 } else { self.code(v, q_max) };
            let e = self.scale * q - self.min - v;
            e * e
        };
        Self { error: x.iter().map(error).sum(), ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::Random;

    fn relative_error<const N: usize, const B: usize>(
        encode: fn(&[f32; N], &mut [u8; B]),
        decode: fn(&[u8; B], &mut [f32; N]),
    ) -> f64 {
        let mut random = Random::new(7);
        let (mut error, mut norm) = (0.0, 0.0);
        for _ in 0..200 {
            let x: [f32; N] = std::array::from_fn(|_| random.normal());
            let (mut block, mut y) = ([0; B], [0.0; N]);
            encode(&x, &mut block);
            decode(&block, &mut y);
            for (x, y) in x.iter().zip(y) {
                error += f64::from(x - y).powi(2);
                norm += f64::from(*x).powi(2);
            }
        }
        (error / norm).sqrt()
    }

    #[test]
    fn blocks_keep_what_their_bits_can() {
        assert!(relative_error(encode_q8_0, decode_q8_0) < 0.006);
        assert!(relative_error(encode_q4_0, decode_q4_0) < 0.095);
        assert!(relative_error(encode_q4_k, decode_q4_k) < 0.080);
    }

    #[test]
    fn zeros_stay_zero() {
        let mut block = [1; 144];
        encode_q4_k(&[0.0; 256], &mut block);
        let mut y = [1.0; 256];
        decode_q4_k(&block, &mut y);
        assert!(y.iter().all(|y| *y == 0.0));
    }

    #[test]
    fn factors_come_back_as_they_were_put() {
        let mut x = [0.0; 256];
        for (i, v) in x.iter_mut().enumerate() {
            *v = (i / 32 + 1) as f32 * ((i % 16) as f32 - 5.0);
        }
        let (mut block, mut y) = ([0; 144], [0.0; 256]);
        encode_q4_k(&x, &mut block);
        decode_q4_k(&block, &mut y);
        for (x, y) in x.iter().zip(y) {
            assert!((x - y).abs() < 0.7, "{x} {y}");
        }
    }
}
