//! `oxseek selftest`: every kernel and the model's answers, on this machine.

use std::path::Path;

use oxseek_backend_cpu::{CpuBackend, CpuOptions, Level};
use oxseek_backend_cuda::{CudaBackend, CudaOptions};
use oxseek_selftest::{MakeBackend, fixture};
use oxseek_tensor::{Backend, conformance, reference::ReferenceBackend};

use crate::{
    args::{DeviceArg, SelftestArgs},
    failure::Failure,
};

/// Thread counts that are tried when none is asked for: alone, as many as small machines have, and more.
const THREADS: [u16; 3] = [1, 2, 8];

/// Runs the checks and prints their figures.
pub fn selftest(args: &SelftestArgs) -> Result<(), Failure> {
    #[cfg(feature = "demo")]
    if args.formats {
        return verdict_of(crate::format_table::check()?);
    }
    if let DeviceArg::Cuda(ordinal) = args.device {
        return verdict_of(check_cuda(ordinal, args.goldens.as_deref())?);
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
    check_ops_of(&level.to_string(), &mut make)
}

fn check_ops_of(name: &str, make: &mut dyn FnMut() -> Box<dyn Backend>) -> usize {
    let mut failed = 0;
    for report in [conformance::check(make, 1), conformance::check_row_invariance(make, 1)] {
        println!("{name:<8} {report}");
        if let Some((closest, part)) = report.closest()
            && part > 0.0
        {
            println!("{name:<8} closest to its bound: {} at {:.0} %", closest.name, part * 100.0);
        }
        failed += report.failures().count();
    }
    failed
}

/// Ops, the demo model and fixtures on a GPU; gives the number of failures.
fn check_cuda(ordinal: u16, goldens: Option<&Path>) -> Result<usize, Failure> {
    let options = CudaOptions { ordinal: usize::from(ordinal), ..CudaOptions::default() };
    let first =
        CudaBackend::new(options).map_err(|e| Failure::Usage(format!("--device cuda:{ordinal}: {e}")))?;
    println!("{}", first.info().device);
    let mut make = || Ok(Box::new(CudaBackend::new(options)?) as Box<dyn Backend>);
    let mut made = || match make() {
        Ok(backend) => backend,
        // The first one could be made: the device was lost since.
        Err(e) => panic!("cuda:{ordinal}: {e}"),
    };
    let mut failed = check_ops_of("cuda", &mut made);
    #[cfg(feature = "demo")]
    {
        failed += check_demo_texts("cuda", &mut make)?;
    }
    if let Some(folder) = goldens {
        println!("\n{}", fixture::Figures::HEADING);
        failed += check_fixtures(folder, &mut make)?;
    }
    Ok(failed)
}

#[cfg(feature = "demo")]
fn check_demo(level: Level, threads: usize) -> Result<usize, Failure> {
    use oxseek_backend_cpu::Precision;
    use oxseek_selftest::agreement;

    let failure = |e: oxseek_selftest::Error| Failure::Selftest(e.to_string());
    let golden =
        oxseek_selftest::golden::Golden::from_bytes("demo golden", crate::demo::region(crate::demo::GOLDEN))
            .map_err(failure)?;
    let (_, checkpoint) = crate::open::open_checkpoint(None)?;
    let failed = check_demo_texts(&format!("{level}, {threads} threads"), &mut || cpu(level, threads))?;
    let mut native = || {
        let options = CpuOptions { threads: Some(threads), level: Some(level), precision: Precision::Native };
        Ok(Box::new(CpuBackend::new(options)?) as Box<dyn Backend>)
    };
    let figures = agreement::check(&checkpoint, &golden, &mut || cpu(level, threads), &mut native);
    let figures = figures.map_err(failure)?;
    println!("{figures}{}", verdict(figures.passed()));
    Ok(failed + usize::from(!figures.passed()))
}

/// The demo model's golden texts; gives the number of failures.
#[cfg(feature = "demo")]
fn check_demo_texts(name: &str, make: &mut MakeBackend<'_>) -> Result<usize, Failure> {
    use oxseek_selftest::{demo, golden::Golden};

    let failure = |e: oxseek_selftest::Error| Failure::Selftest(e.to_string());
    let golden =
        Golden::from_bytes("demo golden", crate::demo::region(crate::demo::GOLDEN)).map_err(failure)?;
    let (_, checkpoint) = crate::open::open_checkpoint(None)?;
    println!("\ndemo model, {name}");
    let mut failed = 0;
    for figures in demo::check(&checkpoint, &golden, make).map_err(failure)? {
        println!("{figures}{}", verdict(figures.passed()));
        failed += usize::from(!figures.passed());
    }
    Ok(failed)
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
