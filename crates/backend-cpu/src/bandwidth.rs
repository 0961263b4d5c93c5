//! How fast this machine reads memory: the limit that decoding runs against.

use std::{hint::black_box, time::Instant};

use oxseek_tensor::Error;

use crate::huge::Arena;

/// Bytes read per thread and pass: far more than any cache holds.
const BYTES_PER_THREAD: usize = 256 << 20;
const PASSES: usize = 5;

/// Bytes per second that `threads` threads together read from memory in 2 MiB pages, the best of a few passes.
///
/// # Errors
/// [`Error::OutOfMemory`]
pub fn read_bandwidth(threads: usize) -> Result<f64, Error> {
    let mut buffers = Vec::new();
    for t in 0..threads {
        let mut bytes = Arena::default().alloc(BYTES_PER_THREAD)?;
        bytes.as_mut().fill(t as u8 + 1);
        buffers.push(bytes);
    }
    let pass = || {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for buffer in &buffers {
                scope.spawn(|| black_box(sum(buffer.as_ref())));
            }
        });
        (threads * BYTES_PER_THREAD) as f64 / start.elapsed().as_secs_f64()
    };
    Ok((0..PASSES).map(|_| pass()).fold(0.0, f64::max))
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
