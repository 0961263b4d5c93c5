//! How fast this machine reads memory: the limit that decoding runs against.

use std::{hint::black_box, path::Path, time::Instant};

use oxseek_tensor::Error;

use crate::{
    huge::{Arena, HugeBytes},
    numa::{Nodes, Topology},
};

/// Bytes that all threads read together in a pass, and the bounds of a thread's share: more than any cache holds.
const BYTES_PER_PASS: usize = 1 << 30;
const BYTES_PER_THREAD: std::ops::RangeInclusive<usize> = 64 << 20..=256 << 20;

/// Passes of one measurement.
pub(crate) const READ_PASSES: usize = 5;

/// Memory in 2 MiB pages that is read again and again, a part for each thread, near to it.
pub(crate) struct Memory {
    nodes: Nodes,
    parts: Vec<HugeBytes>,
}

impl Memory {
    /// # Errors
    /// [`Error::OutOfMemory`]
    pub(crate) fn new(nodes: Nodes, threads: usize) -> Result<Self, Error> {
        let (least, most) = (*BYTES_PER_THREAD.start(), *BYTES_PER_THREAD.end());
        let share = (BYTES_PER_PASS / threads).clamp(least, most);
        let mut parts = Vec::new();
        for _ in 0..threads {
            parts.push(Arena::default().alloc(share)?);
        }
        std::thread::scope(|scope| {
            for (thread, part) in parts.iter_mut().enumerate() {
                let nodes = &nodes;
                scope.spawn(move || {
                    nodes.enter(nodes.of_thread(thread));
                    part.as_mut().fill(thread as u8 + 1);
                });
            }
        });
        Ok(Self { nodes, parts })
    }

    /// Bytes per second that all threads together read, in the best of some passes.
    pub(crate) fn best(&self, passes: usize) -> f64 {
        (0..passes).map(|_| self.read()).fold(0.0, f64::max)
    }

    fn read(&self) -> f64 {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for (thread, part) in self.parts.iter().enumerate() {
                scope.spawn(move || {
                    self.nodes.enter(self.nodes.of_thread(thread));
                    black_box(sum(part.as_ref()))
                });
            }
        });
        let bytes: usize = self.parts.iter().map(|part| part.as_ref().len()).sum();
        bytes as f64 / start.elapsed().as_secs_f64()
    }
}

/// Bytes per second that `threads` threads together read from memory in 2 MiB pages, the best of a few passes.
///
/// # Errors
/// [`Error::OutOfMemory`]
pub fn read_bandwidth(threads: usize) -> Result<f64, Error> {
    let threads = threads.max(1);
    Ok(Memory::new(Nodes::new(Topology::read(Path::new("/")), threads), threads)?.best(READ_PASSES))
}

/// Sums 32 lanes apart, so that the compiler makes wide loads and the adds never wait for each other.
fn sum(bytes: &[u8]) -> u64 {
    let mut lanes = [0u64; 32];
    for chunk in bytes.as_chunks::<8>().0.as_chunks::<32>().0 {
        for (lane, word) in lanes.iter_mut().zip(chunk) {
            *lane = lane.wrapping_add(u64::from_le_bytes(*word));
        }
    }
    lanes.iter().fold(0, |a, b| a.wrapping_add(*b))
}
