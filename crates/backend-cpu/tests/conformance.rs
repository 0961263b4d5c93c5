//! The op suite at every level that this CPU runs, on several thread counts.
#![allow(clippy::unwrap_used, reason = "tests")]

use oxseek_backend_cpu::{CpuBackend, CpuOptions, Level, Precision};
use oxseek_tensor::{
    Backend, DType, backend,
    conformance::{self, Random},
    dtype::{bf16_to_f32, f32_to_bf16},
};

fn make(level: Level, threads: usize) -> Box<dyn Backend> {
    let options = CpuOptions { threads: Some(threads), level: Some(level), ..CpuOptions::default() };
    Box::new(CpuBackend::new(options).unwrap())
}

/// Levels and numbers of threads. Emulated Arm is slow, and its scalar level is the one that runs natively elsewhere:
/// only [`every_op_on_3_threads`] looks at it there.
fn levels_and_threads() -> Vec<(Level, usize)> {
    let emulated = cfg!(target_arch = "aarch64");
    let levels = Level::available().into_iter().filter(|l| !emulated || *l != Level::Scalar);
    let threads: &[usize] = if emulated { &[3] } else { &[1, 3] };
    levels.flat_map(|level| threads.iter().map(move |t| (level, *t))).collect()
}

fn every_op_at_every_level(threads: usize, seed: u64) {
    for level in Level::available() {
        let report = conformance::check(&mut || make(level, threads), seed);
        println!("{level}, {threads} threads: {report}");
        assert_eq!(report.failures().count(), 0, "{level}, {threads} threads\n{report}");
    }
}

#[test]
fn every_op_on_1_thread() {
    every_op_at_every_level(1, 1);
}

#[test]
fn every_op_on_2_threads() {
    every_op_at_every_level(2, 2);
}

#[test]
fn every_op_on_3_threads() {
    every_op_at_every_level(3, 3);
}

#[test]
fn every_op_on_8_threads() {
    every_op_at_every_level(8, 4);
}

#[test]
fn rows_do_not_depend_on_their_neighbours() {
    for (level, threads) in levels_and_threads() {
        let report = conformance::check_row_invariance(&mut || make(level, threads), 5);
        assert_eq!(report.failures().count(), 0, "{level}, {threads} threads\n{report}");
    }
}

/// Activations as native products see them: BF16, or signed bytes with a scale per 128 columns.
fn rounded(dtype: DType, x: &[f32], cols: usize) -> Vec<f32> {
    match dtype {
        DType::F32 | DType::F16 => x.to_vec(),
        DType::BF16 | DType::F8E4M3 => x.iter().map(|v| bf16_to_f32(f32_to_bf16(*v))).collect(),
        _ => x
            .chunks(cols)
            .flat_map(|row| row.chunks(128))
            .flat_map(|run| {
                let largest = run.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
                run.iter().map(move |v| (v * inverse).round_ties_even() * (largest / 127.0))
            })
            .collect(),
    }
}

/// Packed weights times rounded activations is what plain sums in F64 give, packed in time or not.
#[test]
fn native_products_are_those_of_the_rounded_activations() {
    let shapes: [(usize, usize); 7] =
        [(1, 1), (16, 32), (17, 130), (31, 96), (33, 384), (70, 515), (160, 1408)];
    for (level, threads) in levels_and_threads().into_iter().filter(|(_, threads)| *threads == 3) {
        let mut random = Random::new(9);
        for dtype in DType::ALL {
            for (n, k) in shapes {
                let k = k.next_multiple_of(dtype.block_len());
                let w = random.matrix(dtype, n, k).unwrap();
                for (rows, settled) in [(1, true), (2, false), (3, true), (13, true), (27, true), (40, false)]
                {
                    let options = CpuOptions {
                        threads: Some(threads),
                        level: Some(level),
                        precision: Precision::Native,
                    };
                    let mut b = CpuBackend::new(options).unwrap();
                    let weight = b.load_matrix(w.clone()).unwrap();
                    let values = random.normals(rows * k);
                    let (x, y) = (b.alloc(rows, k).unwrap(), b.alloc(rows, n).unwrap());
                    if settled {
                        b.settle().unwrap();
                    }
                    b.write(&values, x).unwrap();
                    b.matmul(x, weight, y, rows).unwrap();
                    let mut found = vec![0.0; rows * n];
                    backend::read_now(&mut b, y, rows, &mut found).unwrap();
                    let values = rounded(dtype, &values, k);
                    let mut row = vec![0.0; k];
                    for j in 0..n {
                        w.decode_row(j, &mut row);
                        for (i, x) in values.chunks(k).enumerate() {
                            let want: f64 =
                                x.iter().zip(&row).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                            let size: f64 = x.iter().zip(&row).map(|(x, w)| f64::from((x * w).abs())).sum();
                            let got = f64::from(found[i * n + j]);
                            assert!(
                                (got - want).abs() <= 1e-6 * size + 1e-9,
                                "{level} {dtype} [{n}, {k}] {rows} rows: row {i} column {j}: {got}, not {want}"
                            );
                        }
                    }
                }
            }
        }
    }
}

/// Attention in BF16, and in 8 bits with parts of `kv_b` in blocks, is that of the reference, within what rounding
/// costs: at most 0.079, with parts in Q4_0 and Q4_K.
#[test]
fn native_attention_is_near_the_reference() {
    for (level, threads) in levels_and_threads() {
        let mut make = || {
            let options =
                CpuOptions { threads: Some(threads), level: Some(level), precision: Precision::Native };
            Box::new(CpuBackend::new(options).unwrap()) as Box<dyn Backend>
        };
        let report = conformance::check_rounded_attention(&mut make, 7, 0.08);
        println!("{level}, {threads} threads: {:?}", report.closest());
        assert_eq!(report.failures().count(), 0, "{level}, {threads} threads\n{report}");
    }
}

#[test]
fn native_rows_do_not_depend_on_their_neighbours() {
    for (level, threads) in levels_and_threads() {
        let mut make = || {
            let options =
                CpuOptions { threads: Some(threads), level: Some(level), precision: Precision::Native };
            Box::new(CpuBackend::new(options).unwrap()) as Box<dyn Backend>
        };
        let report = conformance::check_row_invariance(&mut make, 6);
        assert_eq!(report.failures().count(), 0, "{level}, {threads} threads\n{report}");
    }
}
