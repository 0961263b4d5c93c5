//! Every fixture and every golden prompt on every CPU level and thread count.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::{Path, PathBuf};

use oxseek_backend_cpu::{CpuBackend, CpuOptions, Level, Precision};
use oxseek_selftest::{MakeBackend, agreement, demo, fixture, golden::Golden};
use oxseek_tensor::Backend;
use oxseek_weights::Checkpoint;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn cpu(level: Level, threads: usize) -> impl FnMut() -> Result<Box<dyn Backend>, oxseek_tensor::Error> {
    move || {
        let options = CpuOptions { threads: Some(threads), level: Some(level), ..CpuOptions::default() };
        Ok(Box::new(CpuBackend::new(options)?) as Box<dyn Backend>)
    }
}

fn check_fixtures(make: &mut MakeBackend<'_>) {
    for name in fixture::NAMES {
        let figures = fixture::check(&root().join("goldens").join(name), make).unwrap();
        assert!(figures.passed(), "{}\n{figures}\n{figures:?}", fixture::Figures::HEADING);
    }
}

fn check_demo(make: &mut MakeBackend<'_>) {
    let checkpoint = Checkpoint::open(&root().join("models/oxseek-demo")).unwrap();
    let golden = Golden::open(&root().join("goldens/oxseek-demo.safetensors.gz")).unwrap();
    for figures in demo::check(&checkpoint, &golden, make).unwrap() {
        assert!(figures.passed(), "{figures}");
    }
}

#[test]
fn fixtures_at_every_level() {
    for level in Level::available() {
        check_fixtures(&mut cpu(level, 2));
    }
}

#[test]
fn native_precision_stays_close_at_every_level() {
    let checkpoint = Checkpoint::open(&root().join("models/oxseek-demo")).unwrap();
    let golden = Golden::open(&root().join("goldens/oxseek-demo.safetensors.gz")).unwrap();
    for level in Level::available() {
        let mut native = || {
            let options = CpuOptions { threads: Some(2), level: Some(level), precision: Precision::Native };
            Ok(Box::new(CpuBackend::new(options)?) as Box<dyn Backend>)
        };
        let figures = agreement::check(&checkpoint, &golden, &mut cpu(level, 2), &mut native).unwrap();
        println!("{level}: {figures}");
        assert!(figures.passed(), "{level}: {figures}");
    }
}

#[test]
fn demo_at_every_level_and_thread_count() {
    for level in Level::available() {
        for threads in [1, 2, 8] {
            check_demo(&mut cpu(level, threads));
        }
    }
}
