//! The op suite at every level that this CPU runs, on several thread counts.
#![allow(clippy::unwrap_used, reason = "tests")]

use oxseek_backend_cpu::{CpuBackend, CpuOptions, Level};
use oxseek_tensor::{Backend, conformance};

fn make(level: Level, threads: usize) -> Box<dyn Backend> {
    let options = CpuOptions { threads: Some(threads), level: Some(level) };
    Box::new(CpuBackend::new(options).unwrap())
}

#[test]
fn every_op_at_every_level() {
    for level in Level::available() {
        for (threads, seed) in [(1, 1), (2, 2), (3, 3), (8, 4)] {
            let report = conformance::check(&mut || make(level, threads), seed);
            assert_eq!(report.failures().count(), 0, "{level}, {threads} threads\n{report}");
        }
    }
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
