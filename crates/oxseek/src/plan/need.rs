//! What a model needs in memory, and where its routed experts go.

use oxseek_backend_cpu::Precision;
use oxseek_model::{Footprint, LoadOptions, MatrixRole, StoredMatrices, kv::BLOCK_TOKENS, stored_matrices};
use oxseek_weights::Checkpoint;

use crate::args::ExpertsArg;

/// Left to the system and to what nobody counted.
const RESERVE_BYTES: u64 = 256 << 20;
/// The program itself, its tokenizer and what the allocator holds back.
const PROGRAM_BYTES: u64 = 128 << 20;
/// Each thread's own scratch: decoded or packed rows, scores, parts of outputs.
const THREAD_BYTES: u64 = 4 << 20;

/// Bytes that a model needs, by what they are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Need {
    /// All weights as the files have them. They are mapped, and the system may drop their pages at any time.
    pub files: u64,
    /// Weights but routed experts: packed copies, and what is used as the files have it.
    pub packed: u64,
    pub as_stored: u64,
    /// Weights that are made at load, because no kernel takes what the files have.
    pub made: u64,
    /// Routed experts: packed copies, and what is used as the files have it.
    pub experts_packed: u64,
    pub experts_as_stored: u64,
    /// The largest weight: for a moment it is there twice, as stored and packed.
    pub largest: u64,
    /// The latent cache when it is full.
    pub cache: u64,
    /// Activations, threads and the program.
    pub scratch: u64,
}

/// Where routed experts are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Experts {
    /// In memory, packed like all weights.
    Ram,
    /// In the mapped files: read when they are chosen, kept as long as there is memory.
    Disk,
}

impl Need {
    /// What a checkpoint needs with these sizes, from its headers alone.
    pub fn of(checkpoint: &Checkpoint, options: &LoadOptions, precision: Precision, threads: usize) -> Self {
        let (footprint, c) = (Footprint::of(checkpoint, options.cache_format), checkpoint.config());
        let mut need = Self {
            files: footprint.bytes_by_format.values().sum(),
            made: footprint.made_bytes,
            cache: footprint.cache_bytes_per_token * (options.cache_blocks * BLOCK_TOKENS) as u64,
            scratch: PROGRAM_BYTES + THREAD_BYTES * threads as u64 + options.scratch_bytes(c),
            ..Self::default()
        };
        // The inner activations of a feed-forward op, of all chosen experts and exact.
        let inner =
            c.intermediate_size.max((c.num_experts_per_tok + c.n_shared_experts) * c.moe_intermediate_size);
        need.scratch += (options.step_rows_max * inner * 4) as u64;
        stored_matrices(checkpoint).iter().for_each(|m| need.add(m, precision));
        need
    }

    fn add(&mut self, m: &StoredMatrices, precision: Precision) {
        let packed = m.dtype.and_then(|d| precision.matrix_cost(d, m.rows, m.cols).packed_bytes);
        let packed = packed.map(|bytes| bytes * m.count as u64);
        self.largest = self.largest.max(m.bytes / m.count.max(1) as u64);
        match (m.role, packed) {
            (MatrixRole::Routed, Some(bytes)) => self.experts_packed += bytes,
            (MatrixRole::Routed, None) => self.experts_as_stored += m.bytes,
            (MatrixRole::Embedding, _) | (_, None) => self.as_stored += m.bytes,
            (_, Some(bytes)) => self.packed += bytes,
        }
    }

    /// Bytes that stay in use when everything is loaded and packed. Experts on disk use what is left.
    pub fn resident(&self, experts: Experts) -> u64 {
        let rest = self.packed + self.as_stored + self.made + self.cache + self.scratch;
        match experts {
            Experts::Ram => rest + self.experts_packed + self.experts_as_stored,
            Experts::Disk => rest,
        }
    }

    /// The most that is in use on the way there.
    pub fn peak(&self, experts: Experts) -> u64 {
        self.resident(experts) + self.largest
    }

    /// Whether the peak fits into the memory that is available, with a reserve for others.
    pub fn fits(&self, experts: Experts, available: u64) -> bool {
        self.peak(experts).saturating_add(RESERVE_BYTES) <= available
    }

    /// Whether there are routed experts that could stay on disk.
    pub fn has_experts(&self) -> bool {
        self.experts_packed + self.experts_as_stored > 0
    }

    /// Tokens of context per sequence that would fit, in whole blocks; `None` when not even one block would.
    pub fn largest_context(
        &self,
        experts: Experts,
        available: u64,
        cache_per_token: u64,
        parallel: usize,
    ) -> Option<usize> {
        let rest = self.peak(experts) - self.cache + RESERVE_BYTES;
        let block = (cache_per_token * (parallel.max(1) * BLOCK_TOKENS) as u64).max(1);
        let blocks = available.checked_sub(rest)? / block;
        (blocks > 0).then(|| (blocks as usize).saturating_mul(BLOCK_TOKENS))
    }
}

/// Where routed experts go. Unknown memory (`None`) is taken to be enough.
pub fn place(asked: ExpertsArg, need: &Need, available: Option<u64>) -> Experts {
    let short = || available.is_some_and(|available| !need.fits(Experts::Ram, available));
    match asked {
        ExpertsArg::Disk => Experts::Disk,
        ExpertsArg::Auto if need.has_experts() && short() => Experts::Disk,
        ExpertsArg::Auto | ExpertsArg::Ram => Experts::Ram,
    }
}

#[cfg(test)]
mod tests {
    use oxseek_tensor::DType;

    use super::*;

    const GB: u64 = 1_000_000_000;

    fn need() -> Need {
        Need {
            files: 20 * GB,
            packed: 3 * GB,
            as_stored: GB,
            experts_packed: 16 * GB,
            largest: GB / 2,
            cache: 2 * GB,
            scratch: GB,
            ..Need::default()
        }
    }

    #[test]
    fn experts_go_to_disk_only_when_memory_is_short() {
        let n = need();
        assert_eq!((n.resident(Experts::Ram), n.resident(Experts::Disk)), (23 * GB, 7 * GB));
        let enough = n.peak(Experts::Ram) + RESERVE_BYTES;
        for (asked, available, want) in [
            (ExpertsArg::Auto, Some(enough), Experts::Ram),
            (ExpertsArg::Auto, Some(enough - 1), Experts::Disk),
            (ExpertsArg::Auto, None, Experts::Ram),
            (ExpertsArg::Ram, Some(GB), Experts::Ram),
            (ExpertsArg::Disk, Some(100 * GB), Experts::Disk),
        ] {
            assert_eq!(place(asked, &n, available), want, "{asked:?} {available:?}");
        }
        let dense = Need { experts_packed: 0, ..n };
        assert_eq!(
            place(ExpertsArg::Auto, &dense, Some(GB)),
            Experts::Ram,
            "there is nothing to leave on disk"
        );
    }

    #[test]
    fn the_largest_context_just_fits() {
        let (n, per_token, parallel) = (need(), 1_000_000, 4);
        let available = 24 * GB;
        let tokens = n.largest_context(Experts::Ram, available, per_token, parallel).unwrap();
        let with = |tokens: usize| Need { cache: per_token * (parallel * tokens) as u64, ..n.clone() };
        assert!(with(tokens).fits(Experts::Ram, available));
        assert!(!with(tokens + BLOCK_TOKENS).fits(Experts::Ram, available));
        assert_eq!(n.largest_context(Experts::Ram, 21 * GB, per_token, parallel), None);
        assert!(n.largest_context(Experts::Disk, 21 * GB, per_token, parallel).is_some());
    }

    #[test]
    fn weights_are_counted_by_what_becomes_of_them() {
        let m = |role, dtype, bytes| StoredMatrices {
            role,
            mtp: false,
            dtype,
            count: if role == MatrixRole::Routed { 4 } else { 1 },
            rows: 16,
            cols: 256,
            bytes,
        };
        let mut n = Need::default();
        n.add(&m(MatrixRole::Dense, Some(DType::BF16), 8192), Precision::Native);
        n.add(&m(MatrixRole::Routed, Some(DType::BF16), 4 * 8192), Precision::Native);
        n.add(&m(MatrixRole::Routed, Some(DType::F32), 4 * 16384), Precision::Native);
        n.add(&m(MatrixRole::Embedding, Some(DType::BF16), 77), Precision::Native);
        let want = Need {
            packed: 8192,
            as_stored: 77,
            experts_packed: 4 * 8192,
            experts_as_stored: 4 * 16384,
            largest: 16384,
            ..Need::default()
        };
        assert_eq!(n, want);
    }
}
