//! What this machine can do at best, measured: the limits that prefill and decoding run against.
#![allow(unsafe_code, reason = "runs the multiplying loops of a level")]

use std::{hint::black_box, path::Path, time::Instant};

use oxseek_tensor::{Error, backend::MultiplyAdds, dtype::f32_to_bf16};

use crate::{
    Level,
    bandwidth::{Memory, READ_PASSES},
    numa::{Nodes, Topology},
    simd::{
        Kernels,
        peak::{PEAK_BYTES, Peak, TOKENS_MAX, WEIGHT_BYTES},
    },
};

/// Passes of each kind of product; the best counts.
const MULTIPLY_PASSES: usize = 3;
/// Shortest pass of products, in seconds: starting threads is nothing beside it.
const MULTIPLY_SECONDS: f64 = 0.01;

/// What all threads together do at best.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Bytes per second read from memory in 2 MiB pages.
    pub read: f64,
    /// Operations per second (two per multiply-add) of products with activations of F32, BF16 and 8 bits, from the L1
    /// cache.
    pub multiply: [f64; 3],
}

impl Limits {
    /// Seconds that so many multiply-adds take at least.
    pub fn multiply_seconds(&self, work: MultiplyAdds) -> f64 {
        work.by_kind().iter().zip(self.multiply).map(|(n, rate)| 2.0 * *n as f64 / rate).sum()
    }

    /// Seconds that reading so many bytes takes at least.
    pub fn read_seconds(&self, bytes: u64) -> f64 {
        bytes as f64 / self.read
    }

    /// Between two measurements: a machine that others use too is not the same before and after.
    #[must_use]
    pub fn mean(&self, other: &Self) -> Self {
        Self {
            read: f64::midpoint(self.read, other.read),
            multiply: std::array::from_fn(|i| f64::midpoint(self.multiply[i], other.multiply[i])),
        }
    }
}

/// Measures [`Limits`] as often as one asks.
pub struct LimitProbe {
    threads: usize,
    nodes: Nodes,
    kernels: &'static Kernels,
    memory: Memory,
    /// Factors of each kind.
    data: [Vec<u8>; 3],
    /// Rounds of each kind that take long enough.
    rounds: [usize; 3],
}

impl LimitProbe {
    /// A probe on `threads` threads with the instructions of a level. It keeps at most 1 GiB of memory, or 64 MiB for
    /// each thread.
    ///
    /// # Errors
    /// [`Error::Device`] when the CPU lacks the level, [`Error::OutOfMemory`]
    pub fn new(level: Level, threads: usize) -> Result<Self, Error> {
        let (_, kernels) = Level::choose(Some(level))?;
        let data = factors();
        let rounds = std::array::from_fn(|kind| enough_rounds(kernels.peaks[kind], &data[kind]));
        let threads = threads.max(1);
        let nodes = Nodes::new(Topology::read(Path::new("/")), threads);
        let memory = Memory::new(nodes.clone(), threads)?;
        Ok(Self { threads, nodes, kernels, memory, data, rounds })
    }

    /// Takes about 0.2 seconds.
    pub fn measure(&self) -> Limits {
        let best = |kind: usize| (0..MULTIPLY_PASSES).map(|_| self.multiply(kind)).fold(0.0, f64::max);
        Limits { read: self.memory.best(READ_PASSES), multiply: std::array::from_fn(best) }
    }

    /// Operations per second of one pass.
    fn multiply(&self, kind: usize) -> f64 {
        let (peak, data, rounds) = (self.kernels.peaks[kind], &self.data[kind], self.rounds[kind]);
        let start = Instant::now();
        let multiply_adds: u64 = std::thread::scope(|scope| {
            let start = |thread| {
                scope.spawn(move || {
                    self.nodes.enter(self.nodes.of_thread(thread));
                    run(peak, data, rounds)
                })
            };
            let threads: Vec<_> = (0..self.threads).map(start).collect();
            threads.into_iter().map(|t| t.join().unwrap_or(0)).sum()
        });
        2.0 * multiply_adds as f64 / start.elapsed().as_secs_f64()
    }
}

/// Factors of each kind whose sums stay small: numbers around 1 that change their sign from round to round, and bytes
/// whose four products cancel.
fn factors() -> [Vec<u8>; 3] {
    let sign = |i: usize, round: usize| if (i / round).is_multiple_of(2) { 1.0 } else { -1.0 };
    let number = |i: usize, round: usize| sign(i, round) * (1.0 + (i % 4) as f32 / 8.0);
    let f32s = (0..PEAK_BYTES / 4).flat_map(|i| number(i, TOKENS_MAX).to_le_bytes());
    let bf16s = (0..PEAK_BYTES / 2).flat_map(|i| f32_to_bf16(number(i, 2 * TOKENS_MAX)).to_le_bytes());
    let bytes = [3i8, -3, 5, -5].map(i8::cast_unsigned).into_iter().cycle().take(PEAK_BYTES);
    let mut bytes: Vec<u8> = bytes.collect();
    bytes[..WEIGHT_BYTES].iter_mut().enumerate().for_each(|(i, w)| *w = (i / 2 * 7 % 128) as u8);
    [f32s.collect(), bf16s.collect(), bytes]
}

fn run(peak: Peak, data: &[u8], rounds: usize) -> u64 {
    assert!(data.len() >= PEAK_BYTES, "the loops read this much");
    // SAFETY: the data is long enough; the kernels are those of a backend, whose level this CPU runs.
    let (multiply_adds, sum) = unsafe { peak(black_box(data.as_ptr()), rounds) };
    black_box(sum);
    multiply_adds
}

fn enough_rounds(peak: Peak, data: &[u8]) -> usize {
    let mut rounds = 1 << 10;
    loop {
        let time = || {
            let start = Instant::now();
            run(peak, data, rounds);
            start.elapsed().as_secs_f64()
        };
        // The fastest of a few: a thread that lost its core for a while looks slow.
        let seconds = (0..MULTIPLY_PASSES).map(|_| time()).fold(f64::INFINITY, f64::min);
        if seconds >= MULTIPLY_SECONDS || rounds >= 1 << 30 {
            return rounds;
        }
        rounds *= if seconds < MULTIPLY_SECONDS / 8.0 { 4 } else { 2 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_level_counts_its_products() {
        for level in Level::available() {
            let (_, kernels) = Level::choose(Some(level)).unwrap();
            let data = factors();
            for (peak, data) in kernels.peaks.into_iter().zip(&data) {
                let (short, long) = (run(peak, data, 1), run(peak, data, 10));
                assert!(short > 0);
                assert_eq!(long, 10 * short, "{level}");
            }
        }
    }

    #[test]
    fn factors_keep_sums_finite() {
        let (_, kernels) = Level::choose(None).unwrap();
        let data = factors();
        for (peak, data) in kernels.peaks.into_iter().zip(&data) {
            // SAFETY: as in `run`; whole turns of the ring of activations.
            let (_, sum) = unsafe { peak(data.as_ptr(), 1 << 12) };
            assert!(sum.abs() < 100.0, "{sum}");
        }
    }

    #[test]
    fn the_time_of_work_adds_up_by_kind() {
        let limits = Limits { read: 50.0, multiply: [10.0, 20.0, 40.0] };
        let work = MultiplyAdds { f32: 5, bf16: 20, bytes: 80 };
        assert_eq!(limits.multiply_seconds(work), 1.0 + 2.0 + 4.0);
        assert_eq!(limits.read_seconds(100), 2.0);
        let other = Limits { read: 70.0, multiply: [20.0, 20.0, 20.0] };
        assert_eq!(limits.mean(&other), Limits { read: 60.0, multiply: [15.0, 20.0, 30.0] });
    }
}
