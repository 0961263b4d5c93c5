//! Random weights at the speed of a copy: a pool of blocks that were encoded once, from which any amount is drawn.

use oxseek_tensor::{
    DType, Error,
    blocks::encode_row,
    conformance::Random,
    dtype::{FP8_BLOCK, f32_to_e4m3},
};

/// Values of a pool: their blocks stay in a core's own cache.
const POOL_VALUES: usize = 1 << 17;
/// Values that are drawn together of formats that have no blocks.
const RUN_VALUES: usize = 32;
/// FP8: the deviation of the codes. Their largest, 448, is then 4.5 deviations from 0.
const FP8_DEVIATION: f32 = 100.0;

/// Blocks of normal values.
pub struct Pool {
    blocks: Vec<u8>,
    block_bytes: usize,
    /// FP8: the multiplier that makes the codes have the deviation that was asked for.
    pub scale: f32,
}

impl Pool {
    /// Values of mean 0 and this deviation.
    pub fn new(dtype: DType, deviation: f32, seed: u64) -> Result<Self, Error> {
        let mut random = Random::new(seed);
        let fp8 = dtype == DType::F8E4M3;
        let (factor, scale) = if fp8 { (FP8_DEVIATION, deviation / FP8_DEVIATION) } else { (deviation, 1.0) };
        let values: Vec<f32> = (0..POOL_VALUES).map(|_| random.normal() * factor).collect();
        let block = dtype.block_len().max(RUN_VALUES);
        let block_bytes = block / dtype.block_len() * dtype.block_bytes();
        let mut blocks = vec![0; POOL_VALUES / block * block_bytes];
        if fp8 {
            blocks = values.into_iter().map(f32_to_e4m3).collect();
        } else {
            encode_row(dtype, &values, &mut blocks)?;
        }
        Ok(Self { blocks, block_bytes, scale })
    }

    /// Bytes of which a whole number should be filled at a time.
    pub fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    /// Fills `out` with blocks in random order.
    pub fn fill(&self, random: &mut Random, out: &mut [u8]) {
        let count = self.blocks.len() / self.block_bytes;
        for out in out.chunks_mut(self.block_bytes) {
            let at = random.below(count) * self.block_bytes;
            out.copy_from_slice(&self.blocks[at..at + out.len()]);
        }
    }

    /// FP8: multipliers of the blocks of a matrix, around [`Pool::scale`].
    pub fn scales(&self, random: &mut Random, rows: usize, cols: usize) -> Vec<f32> {
        let grid = rows.div_ceil(FP8_BLOCK) * cols.div_ceil(FP8_BLOCK);
        (0..grid).map(|_| self.scale * (0.75 + 0.5 * random.below(1024) as f32 / 1024.0)).collect()
    }
}
