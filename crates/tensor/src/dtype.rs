//! Storage formats and their scalar codecs of single numbers; `blocks.rs` has those of blocks.

use std::fmt;

/// How the numbers of a matrix are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types, reason = "the names that users of GGUF know")]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16: the upper half of an F32.
    BF16,
    /// FP8 E4M3 "fn" codes with one F32 scale (a multiplier) per 128x128 block; edge blocks are partial.
    F8E4M3,
    /// GGUF: blocks of 32, a half as scale and signed bytes.
    Q8_0,
    /// GGUF: blocks of 32, a half as scale and nibbles around 8.
    Q4_0,
    /// GGUF: blocks of 32, two halves as scale and minimum, nibbles.
    Q4_1,
    /// GGUF: blocks of 32, a half as scale, a word of fifth bits and nibbles, around 16.
    Q5_0,
    /// GGUF: blocks of 32, two halves as scale and minimum, a word of fifth bits and nibbles.
    Q5_1,
    /// GGUF: super-blocks of 256, two halves, sixteen 4-bit scales and minima, 2-bit codes.
    Q2K,
    /// GGUF: super-blocks of 256, a half, sixteen 6-bit scales, 3-bit codes around 4.
    Q3K,
    /// GGUF: super-blocks of 256, two halves, eight 6-bit scales and minima, nibbles.
    Q4K,
    /// GGUF: super-blocks of 256, as Q4_K with 5-bit codes.
    Q5K,
    /// GGUF: super-blocks of 256, a half, sixteen signed bytes as scales, 6-bit codes around 32.
    Q6K,
    /// GGUF: blocks of 32, a half as scale, nibbles into a table of sixteen values.
    IQ4_NL,
    /// GGUF: super-blocks of 256, a half, eight 6-bit scales, nibbles into the table of IQ4_NL.
    IQ4_XS,
    /// OCP MX FP4: blocks of 32, a power of two as scale, E2M1 nibbles.
    MXFP4,
    /// compressed-tensors "pack-quantized": blocks of 32, nibbles around 8; a BF16 scale per block lies beside them.
    INT4,
}

/// Edge of an FP8 scale block, in elements.
pub const FP8_BLOCK: usize = 128;

impl DType {
    /// Every format, for tests that walk them all.
    pub const ALL: [DType; 18] = [
        DType::F32,
        DType::F16,
        DType::BF16,
        DType::F8E4M3,
        DType::Q8_0,
        DType::Q4_0,
        DType::Q4_1,
        DType::Q5_0,
        DType::Q5_1,
        DType::Q2K,
        DType::Q3K,
        DType::Q4K,
        DType::Q5K,
        DType::Q6K,
        DType::IQ4_NL,
        DType::IQ4_XS,
        DType::MXFP4,
        DType::INT4,
    ];

    /// Elements of one block: what a row is a whole number of.
    pub const fn block_len(self) -> usize {
        self.block().0
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        self.block().1
    }

    /// Elements and bytes of one block.
    const fn block(self) -> (usize, usize) {
        match self {
            DType::F32 => (1, 4),
            DType::F16 | DType::BF16 => (1, 2),
            DType::F8E4M3 => (1, 1),
            DType::Q8_0 => (32, 34),
            DType::Q4_0 | DType::IQ4_NL => (32, 18),
            DType::Q4_1 => (32, 20),
            DType::Q5_0 => (32, 22),
            DType::Q5_1 => (32, 24),
            DType::Q2K => (256, 84),
            DType::Q3K => (256, 110),
            DType::Q4K => (256, 144),
            DType::Q5K => (256, 176),
            DType::Q6K => (256, 210),
            DType::IQ4_XS => (256, 136),
            DType::MXFP4 => (32, 17),
            DType::INT4 => (32, 16),
        }
    }

    /// Bytes of a row; `None` when `cols` is no whole number of blocks, or the size overflows.
    pub const fn row_bytes(self, cols: usize) -> Option<usize> {
        if !cols.is_multiple_of(self.block_len()) {
            return None;
        }
        (cols / self.block_len()).checked_mul(self.block_bytes())
    }

    /// The name that users see.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "F32",
            DType::F16 => "F16",
            DType::BF16 => "BF16",
            DType::F8E4M3 => "F8_E4M3",
            DType::Q8_0 => "Q8_0",
            DType::Q4_0 => "Q4_0",
            DType::Q4_1 => "Q4_1",
            DType::Q5_0 => "Q5_0",
            DType::Q5_1 => "Q5_1",
            DType::Q2K => "Q2_K",
            DType::Q3K => "Q3_K",
            DType::Q4K => "Q4_K",
            DType::Q5K => "Q5_K",
            DType::Q6K => "Q6_K",
            DType::IQ4_NL => "IQ4_NL",
            DType::IQ4_XS => "IQ4_XS",
            DType::MXFP4 => "MXFP4",
            DType::INT4 => "INT4",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// bfloat16 bits to F32; exact.
pub const fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits((bits as u32) << 16)
}

/// F32 to bfloat16 bits, rounded to nearest even; NaN stays NaN.
pub const fn f32_to_bf16(x: f32) -> u16 {
    let u = x.to_bits();
    if x.is_nan() {
        return ((u >> 16) | 0x40) as u16;
    }
    ((u + 0x7fff + ((u >> 16) & 1)) >> 16) as u16
}

/// IEEE half bits to F32; exact.
pub fn f16_to_f32(bits: u16) -> f32 {
    let sign = (u32::from(bits) & 0x8000) << 16;
    let exp = (bits >> 10) & 31;
    let man = u32::from(bits & 0x3ff);
    match exp {
        0 => {
            let v = man as f32 * (1.0 / 16_777_216.0); // subnormal: man * 2^-24
            if sign == 0 { v } else { -v }
        }
        31 => f32::from_bits(sign | 0x7f80_0000 | (man << 13)),
        _ => f32::from_bits(sign | ((u32::from(exp) + 112) << 23) | (man << 13)),
    }
}

/// F32 to IEEE half bits, rounded to nearest even; overflow becomes infinity.
pub fn f32_to_f16(x: f32) -> u16 {
    let u = x.to_bits();
    let sign = ((u >> 16) & 0x8000) as u16;
    let a = u & 0x7fff_ffff;
    if a > 0x7f80_0000 {
        return sign | 0x7e00;
    }
    if a >= 0x477f_f000 {
        return sign | 0x7c00; // rounds past the largest finite half
    }
    if a < 0x3880_0000 {
        // Subnormal half: let the F32 adder round at 2^-24.
        let v = f32::from_bits(a) + 0.5;
        return sign | (v.to_bits() - 0.5f32.to_bits()) as u16;
    }
    let r = a + 0xfff + ((a >> 13) & 1);
    sign | ((r - (112 << 23)) >> 13) as u16
}

/// FP8 E4M3 "fn" code to F32: no infinity, NaN at 0x7f and 0xff, largest 448.
pub const fn e4m3_to_f32(code: u8) -> f32 {
    let sign = ((code as u32) & 0x80) << 24;
    let exp = ((code >> 3) & 15) as u32;
    let man = (code & 7) as u32;
    if code & 0x7f == 0x7f {
        return f32::NAN;
    }
    if exp == 0 {
        let v = man as f32 * (1.0 / 512.0);
        return f32::from_bits(v.to_bits() | sign);
    }
    f32::from_bits(sign | ((exp + 120) << 23) | (man << 20))
}

/// All 256 E4M3 values, for scalar kernels.
pub static E4M3_TABLE: [f32; 256] = {
    let mut table = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        table[code] = e4m3_to_f32(code as u8);
        code += 1;
    }
    table
};

/// F32 to FP8 E4M3, rounded to nearest even and saturated to 448; NaN becomes 0x7f.
pub fn f32_to_e4m3(x: f32) -> u8 {
    if x.is_nan() {
        return 0x7f;
    }
    let sign = ((x.to_bits() >> 24) & 0x80) as u8;
    let a = x.abs().min(448.0);
    if a < 1.0 / 64.0 {
        // Subnormal: quantum 2^-9; 8 quanta is the smallest normal, whose code is 8 as well.
        return sign | (a * 512.0).round_ties_even() as u8;
    }
    let u = a.to_bits();
    let r = u + 0x7_ffff + ((u >> 20) & 1);
    sign | ((r >> 20) - (120 << 3)) as u8
}

/// UE8M0 scale byte to F32: `2^(b-127)`; 255 is NaN, 0 is 2^-127.
pub fn ue8m0_to_f32(b: u8) -> f32 {
    match b {
        255 => f32::NAN,
        0 => f32::from_bits(0x0040_0000),
        _ => f32::from_bits(u32::from(b) << 23),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::float_cmp, reason = "the codecs are exact")]
    use super::*;

    #[test]
    fn e4m3_encodes_the_published_vector() {
        let x = [
            0.0,
            -0.0,
            448.0,
            449.0,
            1e9,
            2f32.powi(-9),
            2f32.powi(-10),
            2f32.powi(-10) * 1.0001,
            1.0625,
            1.1875,
            0.0176,
            17.0,
            -17.5,
        ];
        let want = [0, 128, 126, 126, 126, 1, 0, 1, 56, 58, 9, 88, 217];
        assert_eq!(x.map(f32_to_e4m3), want);
    }

    #[test]
    fn every_code_survives_a_round_trip() {
        for code in 0..=255u8 {
            let x = e4m3_to_f32(code);
            if x.is_nan() {
                assert_eq!(code & 0x7f, 0x7f);
            } else {
                assert_eq!(f32_to_e4m3(x), code, "{x}");
            }
        }
        for bits in 0..=u16::MAX {
            let h = f16_to_f32(bits);
            if !h.is_nan() {
                assert_eq!(f32_to_f16(h), bits, "half {h}");
            }
            let b = bf16_to_f32(bits);
            if !b.is_nan() {
                assert_eq!(f32_to_bf16(b), bits, "bf16 {b}");
            }
        }
    }

    #[test]
    fn ties_go_to_even() {
        assert_eq!(f32_to_bf16(f32::from_bits(0x3f80_8000)), 0x3f80);
        assert_eq!(f32_to_bf16(f32::from_bits(0x3f81_8000)), 0x3f82);
        assert_eq!(f32_to_f16(f32::from_bits(0x3f80_1000)), 0x3c00);
        assert_eq!(f32_to_f16(f32::from_bits(0x3f80_3000)), 0x3c02);
        assert_eq!(f32_to_f16(65520.0), 0x7c00);
        assert_eq!(f32_to_f16(2f32.powi(-25)), 0);
        assert_eq!(f32_to_f16(2f32.powi(-25) * 1.5), 1);
    }

    #[test]
    fn ue8m0_is_a_power_of_two() {
        assert_eq!(ue8m0_to_f32(127), 1.0);
        assert_eq!(ue8m0_to_f32(0), 2f32.powi(-127));
        assert_eq!(ue8m0_to_f32(254), 2f32.powi(127));
        assert!(ue8m0_to_f32(255).is_nan());
    }
}
