//! How fast this machine reads memory: the limit that decoding runs against.

use std::{hint::black_box, time::Instant};

/// Bytes read per thread and pass: far more than any cache holds.
const BYTES_PER_THREAD: usize = 256 << 20;
const PASSES: usize = 5;

/// Bytes per second that `threads` threads together read from memory, the best of a few passes.
pub fn read_bandwidth(threads: usize) -> f64 {
    let words = BYTES_PER_THREAD / 8;
    let buffers: Vec<Vec<u64>> = (0..threads).map(|t| vec![t as u64 + 1; words]).collect();
    let pass = || {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for buffer in &buffers {
                scope.spawn(|| black_box(sum(buffer)));
            }
        });
        (threads * BYTES_PER_THREAD) as f64 / start.elapsed().as_secs_f64()
    };
    (0..PASSES).map(|_| pass()).fold(0.0, f64::max)
}

/// Sums 16 lanes apart, so that the compiler makes wide loads and the adds never wait for each other.
fn sum(words: &[u64]) -> u64 {
    let mut lanes = [0u64; 32];
    for chunk in words.chunks_exact(32) {
        for (lane, word) in lanes.iter_mut().zip(chunk) {
            *lane = lane.wrapping_add(*word);
        }
    }
    lanes.iter().fold(0, |a, b| a.wrapping_add(*b))
}
