//! How fast packed weights are multiplied, format by format, for few and for many tokens:
//! `cargo run --release -p oxseek-backend-cpu --example products [THREADS] [FORMAT,FORMAT...]`.
//!
//! Matrices are as wide as those of a 16B-class model and together larger than every cache, so that one token reads
//! from memory. The probes run between the measurements: this machine may be shared.
#![allow(clippy::unwrap_used, reason = "a benchmark")]

use std::time::Instant;

use oxseek_backend_cpu::{CpuBackend, CpuOptions, Level, Precision, read_bandwidth};
use oxseek_tensor::{Backend, DType, backend::Weight, conformance::Random};

const ROWS: usize = 1408;
const COLS: usize = 2048;
/// Bytes of all matrices of a format.
const BYTES: usize = 384 << 20;
const TOKENS: [usize; 10] = [1, 2, 4, 6, 8, 16, 32, 48, 128, 512];

fn main() {
    let mut args = std::env::args().skip(1);
    let threads = args.next().map_or(2, |t| t.parse().unwrap());
    let asked = args.next();
    let level: Option<Level> = args.next().map(|l| l.parse().unwrap());
    let formats = DType::ALL.into_iter().filter(|d| match &asked {
        Some(names) => names.split(',').any(|n| n.eq_ignore_ascii_case(d.name())),
        None => *d != DType::F32 && *d != DType::F16,
    });
    println!("| format  | tokens | GB/s  | of read | Gop/s  |");
    println!("|---------|--------|-------|---------|--------|");
    for dtype in formats {
        measure(dtype, threads, level);
    }
}

fn measure(dtype: DType, threads: usize, level: Option<Level>) {
    let options = CpuOptions { threads: Some(threads), level, precision: Precision::Native };
    let mut backend = CpuBackend::new(options).unwrap();
    let mut random = Random::new(1);
    let matrix = random.matrix(dtype, ROWS, COLS).unwrap();
    let bytes = std::env::var("BYTES").map_or(BYTES, |b| b.parse().unwrap());
    let count = (bytes / matrix.total_bytes()).max(1);
    let weights: Vec<Weight> = (0..count).map(|_| backend.load_matrix(matrix.clone()).unwrap()).collect();
    let most = TOKENS[TOKENS.len() - 1];
    let (x, y) = (backend.alloc(most, COLS).unwrap(), backend.alloc(most, ROWS).unwrap());
    backend.write(&random.normals(most * COLS), x).unwrap();
    backend.settle().unwrap();
    for tokens in TOKENS {
        // About as much work for each line.
        let passes = weights.iter().cycle().take((count * 4 / tokens.div_ceil(8)).max(16));
        let mut run = |weights: &mut dyn Iterator<Item = &Weight>| {
            let (since, mut n) = (Instant::now(), 0);
            for &w in weights {
                backend.matmul(x, w, y, tokens).unwrap();
                n += 1;
            }
            since.elapsed().as_secs_f64() / f64::from(n)
        };
        run(&mut weights.iter().take(8));
        let limit = read_bandwidth(threads).unwrap();
        let seconds = (0..3).map(|_| run(&mut passes.clone())).fold(f64::INFINITY, f64::min);
        let limit = limit.max(read_bandwidth(threads).unwrap());
        let rate = matrix.total_bytes() as f64 / seconds;
        let work = 2.0 * (ROWS * COLS * tokens) as f64 / seconds;
        println!(
            "| {:<7} | {tokens:>6} | {:>5.1} | {:>5.0} % | {:>6.0} |",
            dtype.name(),
            rate / 1e9,
            rate / limit * 100.0,
            work / 1e9
        );
    }
}
