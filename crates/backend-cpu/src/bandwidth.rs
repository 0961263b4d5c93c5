//! How fast this machine reads memory: the limit that decoding runs against.

use std::{hint::black_box, time::Instant};

use oxseek_tensor::Error;

use crate::huge::{Arena, HugeBytes};

/// Bytes that all threads read together in a pass, and the bounds of a thread's share: more than any cache holds.
const BYTES_PER_PASS: usize = 1 << 30;
const BYTES_PER_THREAD: std::ops::RangeInclusive<usize> = 64 << 20..=256 << 20;

/// Passes of one measurement.
pub(crate) const READ_PASSES: usize = 5;

/// Memory in 2 MiB pages that is read again and again, a part for each thread.
pub(crate) struct Memory(Vec<HugeBytes>);

impl Memory {
    /// # Errors
    /// [`Error::OutOfMemory`]
    pub(crate) fn new(threads: usize) -> Result<Self, Error> {
        let (least, most) = (*BYTES_PER_THREAD.start(), *BYTES_PER_THREAD.end());
        let share = (BYTES_PER_PASS / threads.max(1)).clamp(least, most);
        let mut parts = Vec::new();
        for t in 0..threads.max(1) {
            let mut bytes = Arena::default().alloc(share)?;
            bytes.as_mut().fill(t as u8 + 1);
            parts.push(bytes);
        }
        Ok(Self(parts))
    }

    /// Bytes per second that all threads together read, in the best of some passes.
    pub(crate) fn best(&self, passes: usize) -> f64 {
        (0..passes).map(|_| self.read()).fold(0.0, f64::max)
    }

    fn read(&self) -> f64 {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for part in &self.0 {
                scope.spawn(|| black_box(sum(part.as_ref())));
            }
        });
        let bytes: usize = self.0.iter().map(|part| part.as_ref().len()).sum();
        bytes as f64 / start.elapsed().as_secs_f64()
    }
}

/// Bytes per second that `threads` threads together read from memory in 2 MiB pages, the best of a few passes.
///
/// # Errors
/// [`Error::OutOfMemory`]
pub fn read_bandwidth(threads: usize) -> Result<f64, Error> {
    Ok(Memory::new(threads)?.best(READ_PASSES))
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
