//! `oxseek selftest`: every kernel and the model's answers, on this machine.

use std::path::Path;

use oxseek_backend_cpu::{CpuBackend, CpuOptions, Level};
use oxseek_selftest::{MakeBackend, fixture};
use oxseek_tensor::{Backend, conformance, reference::ReferenceBackend};

use crate::{args::SelftestArgs, failure::Failure};

/// Thread counts that are tried when none is asked for: alone, as many as small machines have, and more.
const THREADS: [u16; 3] = [1, 2, 8];

/// Runs the checks and prints their figures.
pub fn selftest(args: &SelftestArgs) -> Result<(), Failure> {
    #[cfg(feature = "demo")]
    if args.formats {
        return verdict_of(crate::format_table::check()?);
    }
    let threads = if args.threads.is_empty() { THREADS.to_vec() } else { args.threads.clone() };
    let mut failed = 0;
    for level in Level::available() {
        failed += check_ops(level);
    }
    #[cfg(feature = "demo")]
    for level in Level::available() {
        for &t in &threads {
            failed += check_demo(level, usize::from(t))?;
        }
    }
    if let Some(folder) = &args.goldens {
        println!("\nscalar reference\n{}", fixture::Figures::HEADING);
        failed += check_fixtures(folder, &mut || Ok(Box::new(ReferenceBackend::new())))?;
        for level in Level::available() {
            println!("\n{level}\n{}", fixture::Figures::HEADING);
            failed += check_fixtures(folder, &mut || cpu(level, usize::from(threads[0])))?;
        }
    }
    verdict_of(failed)
}

fn verdict_of(failed: usize) -> Result<(), Failure> {
    if failed == 0 { Ok(()) } else { Err(Failure::Selftest(format!("{failed} checks failed"))) }
}

fn cpu(level: Level, threads: usize) -> Result<Box<dyn Backend>, oxseek_tensor::Error> {
    let options = CpuOptions { threads: Some(threads), level: Some(level), ..CpuOptions::default() };
    Ok(Box::new(CpuBackend::new(options)?))
}

/// Every op case and row invariance at one level; gives the number of failures.
fn check_ops(level: Level) -> usize {
    let mut make = || match cpu(level, 2) {
        Ok(backend) => backend,
        // `available()` said that the level runs here, so making it cannot fail for the level's sake.
        Err(e) => panic!("{level}: {e}"),
    };
    let mut failed = 0;
    for report in [conformance::check(&mut make, 1), conformance::check_row_invariance(&mut make, 1)] {
        println!("{level:<8} {report}");
        if let Some((closest, part)) = report.closest()
            && part > 0.0
        {
            println!("{level:<8} closest to its bound: {} at {:.0} %", closest.name, part * 100.0);
        }
        failed += report.failures().count();
    }
    failed
}

#[cfg(feature = "demo")]
fn check_demo(level: Level, threads: usize) -> Result<usize, Failure> {
    use oxseek_backend_cpu::Precision;
    use oxseek_selftest::{agreement, demo};

    let failure = |e: oxseek_selftest::Error| Failure::Selftest(e.to_string());
    let golden =
        oxseek_selftest::golden::Golden::from_bytes("demo golden", crate::demo::region(crate::demo::GOLDEN))
            .map_err(failure)?;
    let (_, checkpoint) = crate::open::open_checkpoint(None)?;
    println!("\ndemo model, {level}, {threads} threads");
    let mut failed = 0;
    for figures in demo::check(&checkpoint, &golden, &mut || cpu(level, threads)).map_err(failure)? {
        println!("{figures}{}", verdict(figures.passed()));
        failed += usize::from(!figures.passed());
    }
    let mut native = || {
        let options = CpuOptions { threads: Some(threads), level: Some(level), precision: Precision::Native };
        Ok(Box::new(CpuBackend::new(options)?) as Box<dyn Backend>)
    };
    let figures = agreement::check(&checkpoint, &golden, &mut || cpu(level, threads), &mut native);
    let figures = figures.map_err(failure)?;
    println!("{figures}{}", verdict(figures.passed()));
    Ok(failed + usize::from(!figures.passed()))
}

fn check_fixtures(folder: &Path, make: &mut MakeBackend<'_>) -> Result<usize, Failure> {
    let mut failed = 0;
    for name in fixture::NAMES {
        let figures = fixture::check(&folder.join(name), make)
            .map_err(|e| Failure::Selftest(format!("{name}: {e}")))?;
        println!("{figures}{}", verdict(figures.passed()));
        failed += usize::from(!figures.passed());
    }
    Ok(failed)
}

fn verdict(passed: bool) -> &'static str {
    if passed { "" } else { "  FAILED" }
}
