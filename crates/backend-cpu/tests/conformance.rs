//! The op suite at every level that this CPU runs, on several thread counts.
#![allow(clippy::unwrap_used, reason = "tests")]

use oxseek_backend_cpu::{CpuBackend, CpuOptions, Level};
use oxseek_tensor::{Backend, conformance};

fn make(level: Level, threads: usize) -> Box<dyn Backend> {
    let options = CpuOptions { threads: Some(threads), level: Some(level) };
    Box::new(CpuBackend::new(options).unwrap())
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
    for level in Level::available() {
        for threads in [1, 3] {
            let report = conformance::check_row_invariance(&mut || make(level, threads), 5);
            assert_eq!(report.failures().count(), 0, "{level}, {threads} threads\n{report}");
        }
    }
}
