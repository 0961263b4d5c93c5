//! `bench --device cuda --kernels`: the kernels that decide a model's speed, each alone, beside what is wanted of it.

use std::{io::Write, time::Instant};

use oxseek_backend_cuda::CudaBackend;
use oxseek_tensor::{
    Backend, CacheFormat, DType, Error, HostMatrix,
    backend::{AttendMode, BLOCK_TOKENS, Buffer, CacheShape, MlaShape, Segment, StepInput, Weight, read_now},
    matrix::ByteRegion,
};
use serde_json::json;

use crate::{args::BenchFormat, failure::Failure};

/// DeepSeek-V2-Lite's attention, which is that of a part of V3 on each of eight GPUs.
const MLA: MlaShape =
    MlaShape { heads: 16, nope: 128, rope: 64, value: 128, latent: 512, softmax_scale: 0.07 };
/// Sequences, and tokens in the cache of each.
const ATTENTION: (usize, usize) = (64, 8192);
/// Columns and rows of a product of one token whose weights are 16 MB in BF16, and how many such weights take turns, so
/// that no cache holds them.
const SKINNY: (usize, usize) = (4096, 2048);
const SKINNY_WEIGHTS: usize = 16;
/// Rows, columns and tokens of a large product.
const SQUARE: usize = 4096;
/// Times that an op is launched between two looks at the clock.
const TOGETHER: usize = 64;

/// One kernel and what came of it, the median of some runs.
struct Gate {
    name: String,
    found: f64,
    wanted: f64,
    unit: &'static str,
}

/// Measures and prints. `copy` is what the device's memory does in a copy, in bytes per second.
pub fn bench(mut backend: CudaBackend, copy: f64, repeat: u16, format: BenchFormat) -> Result<(), Failure> {
    let run = |e: Error| Failure::Run(e.to_string());
    let b = &mut backend;
    let mut gates = Vec::new();
    for (dtype, wanted) in [(DType::BF16, 550.0), (DType::F8E4M3, 900.0)] {
        let rate = skinny(b, dtype, repeat).map_err(run)?;
        let name = format!("one token by {} MiB of {}", (2 * SKINNY.0 * SKINNY.1) >> 20, dtype.name());
        gates.push(Gate { name, found: rate / copy * 100.0, wanted: 85.0, unit: "% of copy" });
        let rate = square(b, dtype, repeat).map_err(run)?;
        let name = format!("{SQUARE} tokens by {SQUARE} x {SQUARE} of {}", dtype.name());
        gates.push(Gate { name, found: rate / 1e12, wanted, unit: "TFLOP/s" });
    }
    let rate = attention(b, repeat).map_err(run)?;
    let name = format!("attention of {} x {} tokens", ATTENTION.0, ATTENTION.1);
    gates.push(Gate { name, found: rate / 1e12, wanted: 2.8, unit: "TB/s" });
    print(&gates, &backend.info().device, copy, format)
}

fn print(gates: &[Gate], device: &str, copy: f64, format: BenchFormat) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    match format {
        BenchFormat::Json => {
            let list: Vec<_> = gates
                .iter()
                .map(|g| json!({ "kernel": g.name, "found": g.found, "wanted": g.wanted, "unit": g.unit }))
                .collect();
            writeln!(
                out,
                "{:#}",
                json!({ "device": device, "copy_bytes_per_second": copy, "kernels": list })
            )?;
        }
        BenchFormat::Csv => {
            writeln!(out, "kernel,found,wanted,unit")?;
            for g in gates {
                writeln!(out, "{},{},{},{}", g.name, g.found, g.wanted, g.unit)?;
            }
        }
        BenchFormat::Table => {
            writeln!(
                out,
                "device     {device}\nmemory     {:.0} GB/s in a copy, read and written\n",
                copy / 1e9
            )?;
            writeln!(out, "{:<40} {:>8} {:>8}  unit", "kernel", "found", "wanted")?;
            for g in gates {
                writeln!(out, "{:<40} {:>8.1} {:>8.1}  {}", g.name, g.found, g.wanted, g.unit)?;
            }
        }
    }
    Ok(())
}

/// A weight whose values the backend makes.
fn weight(b: &mut CudaBackend, dtype: DType, rows: usize, cols: usize) -> Result<Weight, Error> {
    b.load_matrix(hollow(dtype, rows, cols)?)
}

fn hollow(dtype: DType, rows: usize, cols: usize) -> Result<HostMatrix, Error> {
    let scales = (dtype == DType::F8E4M3).then(|| vec![0.0; rows.div_ceil(128) * cols.div_ceil(128)].into());
    HostMatrix::new(
        dtype,
        rows,
        cols,
        ByteRegion::from_vec(vec![0; rows * cols * dtype.block_bytes()]),
        scales,
    )
}

/// Rows of one sequence.
fn step(rows: usize) -> StepInput {
    let blocks = (0..rows.div_ceil(BLOCK_TOKENS) as u32).collect();
    let segment = Segment { row: 0, rows, start: 0, first_block: 0, mode: AttendMode::Absorbed };
    StepInput { tokens: vec![0; rows], segments: vec![segment], blocks }
}

/// Seconds of one of `times` launches of an op that writes `out`, in the median of some runs.
fn seconds(
    b: &mut CudaBackend,
    out: Buffer,
    cols: usize,
    (times, repeat): (usize, u16),
    mut op: impl FnMut(&mut CudaBackend, usize) -> Result<(), Error>,
) -> Result<f64, Error> {
    let (mut row, mut runs) = (vec![0.0; cols], Vec::new());
    // Twice first: the second time makes a graph.
    for run in 0..repeat + 2 {
        let start = Instant::now();
        (0..times).try_for_each(|i| op(b, i))?;
        read_now(b, out, 1, &mut row)?;
        if run >= 2 {
            runs.push(start.elapsed().as_secs_f64() / times as f64);
        }
    }
    runs.sort_by(f64::total_cmp);
    Ok(runs[runs.len() / 2])
}

/// Bytes of weights per second of a product of one token.
fn skinny(b: &mut CudaBackend, dtype: DType, repeat: u16) -> Result<f64, Error> {
    let (cols, rows) = SKINNY;
    // FP8 weights of as many bytes.
    let rows = rows * 2 / dtype.block_bytes();
    let weights = (0..SKINNY_WEIGHTS).map(|_| weight(b, dtype, rows, cols)).collect::<Result<Vec<_>, _>>()?;
    let (x, y) = (b.alloc(1, cols)?, b.alloc(1, rows)?);
    b.begin_step(&step(1))?;
    let each =
        seconds(b, y, rows, (TOGETHER, repeat), |b, i| b.matmul(x, weights[i % SKINNY_WEIGHTS], y, 1))?;
    Ok((rows * cols * dtype.block_bytes()) as f64 / each)
}

/// Operations per second, two per multiply-add, of a large product.
fn square(b: &mut CudaBackend, dtype: DType, repeat: u16) -> Result<f64, Error> {
    let w = weight(b, dtype, SQUARE, SQUARE)?;
    let (x, y) = (b.alloc(SQUARE, SQUARE)?, b.alloc(SQUARE, SQUARE)?);
    // As random as the weights: zeros would take less power, and clocks would rise.
    let values: Vec<f32> = (0..SQUARE * SQUARE).map(scattered).collect();
    b.write(&values, x)?;
    b.begin_step(&step(SQUARE))?;
    let each = seconds(b, y, SQUARE, (TOGETHER, repeat), |b, _| b.matmul(x, w, y, SQUARE))?;
    Ok(2.0 * (SQUARE * SQUARE * SQUARE) as f64 / each)
}

/// A number between -1 and 1 for each place.
fn scattered(i: usize) -> f32 {
    let bits = (i as u32).wrapping_mul(2_654_435_761) ^ (i as u32).wrapping_mul(40_503) >> 7;
    bits as f32 / 2_147_483_648.0 - 1.0
}

/// Bytes of the cache per second of an attention step, all of its kernels together.
fn attention(b: &mut CudaBackend, repeat: u16) -> Result<f64, Error> {
    let (sequences, tokens) = ATTENTION;
    let kv_b = b.load_kv_b(&MLA, hollow(DType::BF16, MLA.heads * (MLA.nope + MLA.value), MLA.latent)?)?;
    let blocks = sequences * tokens / BLOCK_TOKENS;
    let shape =
        CacheShape { layers: 1, blocks, latent: MLA.latent, rope: MLA.rope, format: CacheFormat::Bf16 };
    let bytes = shape.bytes()?;
    let cache = b.alloc_cache(shape)?;
    let (width, values) = (MLA.heads * (MLA.nope + MLA.rope), MLA.heads * MLA.value);
    let (q, y) = (b.alloc(sequences, width)?, b.alloc(sequences, values)?);
    let queries: Vec<f32> = (0..sequences * width).map(scattered).collect();
    b.write(&queries, q)?;
    let segments = (0..sequences)
        .map(|row| Segment {
            row,
            rows: 1,
            start: tokens - 1,
            first_block: row * tokens / BLOCK_TOKENS,
            mode: AttendMode::Absorbed,
        })
        .collect();
    b.begin_step(&StepInput { tokens: vec![0; sequences], segments, blocks: (0..blocks as u32).collect() })?;
    let each = seconds(b, y, values, (TOGETHER, repeat), |b, _| b.mla_attend(&MLA, q, kv_b, cache, 0, y))?;
    Ok(bytes as f64 / each)
}
