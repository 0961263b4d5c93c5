//! How fast a model will decode, from what a step reads and multiplies and from the limits of the machine.

use oxseek_backend_cpu::{Limits, Precision};
use oxseek_model::{Footprint, MatrixRole, StoredMatrices, stored_matrices};
use oxseek_tensor::{CacheFormat, DType, backend::MultiplyAdds};
use oxseek_weights::Checkpoint;

/// The part of the read limit that weights of a format come at while few tokens are decoded, measured on a model of
/// DeepSeek-V3's shape; bench/NOTES.md has the figures. Few bits per weight take more work per byte.
fn part_read(dtype: Option<DType>) -> f64 {
    match dtype {
        Some(DType::BF16 | DType::F16 | DType::F32) => 0.87,
        Some(DType::Q8_0) => 0.81,
        Some(DType::F8E4M3 | DType::Q6K | DType::Q5_0 | DType::Q5_1 | DType::Q5K) => 0.70,
        _ => 0.61,
    }
}

/// The part of the multiply limit that a step of decoding reaches in what it cannot do while it reads.
const PART_MULTIPLIED: f64 = 0.5;

/// What decoding costs.
pub struct Decoding {
    matrices: Vec<StoredMatrices>,
    precision: Precision,
    /// The part of the routed experts that one token meets.
    part: f64,
    cache_bytes_per_token: u64,
}

/// Bytes that one step reads, and its multiply-adds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepCost {
    pub bytes: u64,
    /// The bytes that would take as long at the limit as these take in practice.
    pub usual_bytes: f64,
    pub work: MultiplyAdds,
}

impl Decoding {
    pub fn of(checkpoint: &Checkpoint, precision: Precision, cache: CacheFormat) -> Self {
        let c = checkpoint.config();
        Self {
            matrices: stored_matrices(checkpoint),
            precision,
            part: c.num_experts_per_tok as f64 / c.n_routed_experts.max(1) as f64,
            cache_bytes_per_token: Footprint::of(checkpoint, cache).cache_bytes_per_token,
        }
    }

    /// A step of one token each of `sequences` sequences that have `depth` tokens of context. Experts are taken to be
    /// chosen evenly.
    pub fn step(&self, sequences: usize, depth: usize) -> StepCost {
        // An expert is read unless every sequence has left it out.
        let met = 1.0 - (1.0 - self.part).powi(sequences as i32);
        let cached = self.cache_bytes_per_token * (sequences * depth) as u64;
        let usual_bytes = cached as f64 / part_read(None);
        let mut step = StepCost { bytes: cached, usual_bytes, work: MultiplyAdds::default() };
        for m in self.matrices.iter().filter(|m| !m.mtp && m.role != MatrixRole::Embedding) {
            let (read, used) = match m.role {
                MatrixRole::Routed => (met, self.part * m.count as f64),
                _ => (1.0, m.count as f64),
            };
            step.bytes += (m.bytes as f64 * read) as u64;
            step.usual_bytes += m.bytes as f64 * read / part_read(m.dtype);
            let Some(dtype) = m.dtype else { continue };
            let row = self.precision.matrix_cost(dtype, m.rows, m.cols).multiply_adds;
            let times = |n: u64| (n as f64 * used * sequences as f64) as u64;
            step.work += MultiplyAdds { f32: times(row.f32), bf16: times(row.bf16), bytes: times(row.bytes) };
        }
        step
    }

    /// Tokens per second of all sequences together: at the limit of the machine, and as far as one usually comes.
    pub fn tokens_per_second(&self, limits: &Limits, sequences: usize, depth: usize) -> [f64; 2] {
        let step = self.step(sequences, depth);
        let multiply = limits.multiply_seconds(step.work);
        let limit = limits.read_seconds(step.bytes).max(multiply);
        let usual = limits.read_seconds(step.usual_bytes as u64) + multiply / PART_MULTIPLIED;
        [limit, usual].map(|seconds| sequences as f64 / seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoding() -> Decoding {
        let m = |role, count: usize| StoredMatrices {
            role,
            mtp: false,
            dtype: Some(DType::BF16),
            count,
            rows: 16,
            cols: 64,
            bytes: 2048 * count as u64,
        };
        let mtp = StoredMatrices { mtp: true, ..m(MatrixRole::Dense, 1) };
        let roles = [MatrixRole::Dense, MatrixRole::Embedding];
        let mut matrices: Vec<_> = roles.map(|role| m(role, 1)).into();
        matrices.extend([m(MatrixRole::Routed, 8), mtp]);
        Decoding { matrices, precision: Precision::Native, part: 0.25, cache_bytes_per_token: 10 }
    }

    #[test]
    fn one_sequence_reads_its_experts_and_many_read_all() {
        let d = decoding();
        // The dense matrix and 2 of 8 experts; the embedding's row and the MTP module are nothing.
        assert_eq!(d.step(1, 0).bytes, 2048 + 2 * 2048);
        assert_eq!(d.step(1, 0).work.bf16, 3 * 1024);
        assert_eq!(d.step(2, 0).bytes, 2048 + (8.0 * 0.4375 * 2048.0) as u64);
        assert_eq!(d.step(2, 100).bytes - d.step(2, 0).bytes, 2000);
        assert_eq!(d.step(100, 0).bytes / 2048, 8, "nearly all experts");
        assert_eq!(d.step(100, 0).work.bf16, 300 * 1024);
    }

    #[test]
    fn the_slower_of_reading_and_multiplying_decides() {
        let d = decoding();
        let reads = Limits { read: 6144.0, multiply: [1e9; 3] };
        assert_eq!(d.tokens_per_second(&reads, 1, 0)[0], 1.0);
        let multiplies = Limits { read: 1e9, multiply: [1.0, 2.0 * 3.0 * 1024.0, 1.0] };
        assert_eq!(d.tokens_per_second(&multiplies, 4, 0)[0], 1.0);
        let [limit, usual] = d.tokens_per_second(&reads, 1, 0);
        assert!(
            (usual - limit * part_read(Some(DType::BF16))).abs() < 0.01,
            "multiplying is next to nothing here"
        );
        assert!(d.tokens_per_second(&multiplies, 4, 0)[1] < 0.51);
    }
}
