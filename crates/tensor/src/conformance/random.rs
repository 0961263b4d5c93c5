//! Seeded random data.

use std::sync::Arc;

use crate::{
    ByteRegion, DType, Error, HostMatrix,
    dtype::{FP8_BLOCK, f32_to_bf16, f32_to_e4m3, f32_to_f16},
};

/// A SplitMix64 generator: small, seeded, the same everywhere.
pub struct Random(u64);

impl Random {
    /// A generator that always gives the same numbers for the same `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5851_f42d_4c95_7f2d)
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n.max(1) as u64) as usize
    }

    /// About normal, mean 0 and deviation 1.
    pub fn normal(&mut self) -> f32 {
        let sum: f64 = (0..4).map(|_| (self.bits() >> 11) as f64 / (1u64 << 53) as f64 - 0.5).sum();
        (sum * 3f64.sqrt()) as f32
    }

    /// `n` values of [`Random::normal`].
    pub fn normals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }

    /// A matrix in `dtype` whose rows have a norm of about one.
    ///
    /// # Errors
    /// None for shapes that fit in memory.
    pub fn matrix(&mut self, dtype: DType, rows: usize, cols: usize) -> Result<HostMatrix, Error> {
        let scale = 1.0 / (cols as f32).sqrt();
        if dtype == DType::INT4 {
            return self.int4(rows, cols, scale / 4.6);
        }
        let blocks = rows * cols / dtype.block_len();
        let flat = if dtype.block_len() == 1 { rows * cols } else { 0 };
        let values: Vec<f32> = (0..flat).map(|_| self.normal() * scale).collect();
        let values = values.into_iter();
        let bytes = match dtype {
            DType::F32 => values.flat_map(f32::to_le_bytes).collect(),
            DType::F16 => values.flat_map(|v| f32_to_f16(v).to_le_bytes()).collect(),
            DType::BF16 => values.flat_map(|v| f32_to_bf16(v).to_le_bytes()).collect(),
            DType::F8E4M3 => values.map(|v| f32_to_e4m3(v * 100.0)).collect(),
            _ => self.blocks(dtype, blocks, scale),
        };
        let scales = (dtype == DType::F8E4M3).then(|| {
            let grid = rows.div_ceil(FP8_BLOCK) * cols.div_ceil(FP8_BLOCK);
            (0..grid).map(|_| 0.01 * (0.5 + self.below(1000) as f32 / 1000.0)).collect::<Arc<[f32]>>()
        });
        HostMatrix::new(dtype, rows, cols, ByteRegion::from_vec(bytes), scales)
    }

    fn int4(&mut self, rows: usize, cols: usize, scale: f32) -> Result<HostMatrix, Error> {
        let codes = (0..rows * cols / 2).map(|_| self.bits() as u8).collect();
        let size = |random: &mut Self| scale * (0.5 + random.below(1000) as f32 / 1000.0);
        let scales = (0..rows * cols / 32).flat_map(|_| f32_to_bf16(size(self)).to_le_bytes()).collect();
        HostMatrix::int4(rows, cols, ByteRegion::from_vec(codes), ByteRegion::from_vec(scales))
    }

    /// `n` blocks of random codes whose values deviate by about `scale`: every code occurs, and none is searched for.
    fn blocks(&mut self, dtype: DType, n: usize, scale: f32) -> Vec<u8> {
        let len = dtype.block_bytes();
        let mut all: Vec<u8> =
            (0..(n * len).div_ceil(8)).flat_map(|_| self.bits().to_le_bytes()).take(n * len).collect();
        for block in all.chunks_exact_mut(len) {
            let size = scale * (0.5 + self.below(1000) as f32 / 1000.0);
            if dtype == DType::MXFP4 {
                block[0] = ((size / 2.9).to_bits() >> 23) as u8;
            }
            for &(at, divisor) in halves(dtype) {
                block[at..at + 2].copy_from_slice(&f32_to_f16(size / divisor).to_le_bytes());
            }
        }
        all
    }

    /// `0..n` in random order.
    pub fn permutation(&mut self, n: usize) -> Vec<u32> {
        let mut order: Vec<u32> = (0..n as u32).collect();
        for i in (1..n).rev() {
            order.swap(i, self.below(i + 1));
        }
        order
    }
}

/// Where a block has halves, and about the deviation of the whole numbers that each is multiplied with. Negative ones
/// are minima that are added, so that the mean stays near zero.
fn halves(dtype: DType) -> &'static [(usize, f32)] {
    match dtype {
        DType::Q8_0 => &[(0, 74.0)],
        DType::Q4_0 => &[(0, 4.6)],
        DType::Q4_1 => &[(0, 4.6), (2, -0.6)],
        DType::Q5_0 => &[(0, 9.2)],
        DType::Q5_1 => &[(0, 9.2), (2, -0.6)],
        DType::Q2K => &[(80, 14.0), (82, 9.0)],
        DType::Q3K => &[(108, 42.0)],
        DType::Q4K => &[(0, 330.0), (2, 44.0)],
        DType::Q5K => &[(0, 660.0), (2, 44.0)],
        DType::Q6K => &[(208, 1360.0)],
        DType::IQ4_NL => &[(0, 69.0)],
        DType::IQ4_XS => &[(0, 1270.0)],
        DType::F32 | DType::F16 | DType::BF16 | DType::F8E4M3 | DType::MXFP4 | DType::INT4 => &[],
    }
}
