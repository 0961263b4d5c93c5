//! Every fixture and every golden prompt on the first CUDA device, where there is one.
//!
//! `OXSEEK_ROOT` names the repository for a test program that was carried to another machine.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::{Path, PathBuf};

use oxseek_backend_cuda::{CudaBackend, CudaOptions, Precision};
use oxseek_selftest::{agreement, demo, fixture, golden::Golden};
use oxseek_tensor::Backend;
use oxseek_weights::Checkpoint;

fn root() -> PathBuf {
    let built = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    std::env::var_os("OXSEEK_ROOT").map_or_else(built, PathBuf::from)
}

fn has_device() -> bool {
    CudaBackend::new(CudaOptions::default()).inspect_err(|e| println!("not run: {e}")).is_ok()
}

fn make() -> Result<Box<dyn Backend>, oxseek_tensor::Error> {
    Ok(Box::new(CudaBackend::new(CudaOptions::default())?))
}

#[test]
fn fixtures() {
    if !has_device() {
        return;
    }
    println!("{}", fixture::Figures::HEADING);
    for name in fixture::NAMES {
        let figures = fixture::check(&root().join("goldens").join(name), &mut make).unwrap();
        println!("{figures}");
        assert!(figures.passed(), "{}\n{figures}\n{figures:?}", fixture::Figures::HEADING);
    }
}

#[test]
fn the_demo_model() {
    if !has_device() {
        return;
    }
    let checkpoint = Checkpoint::open(&root().join("models/oxseek-demo")).unwrap();
    let golden = Golden::open(&root().join("goldens/oxseek-demo.safetensors.gz")).unwrap();
    for figures in demo::check(&checkpoint, &golden, &mut make).unwrap() {
        println!("{figures}");
        assert!(figures.passed(), "{figures}");
    }
}

#[test]
fn native_precision_stays_close() {
    if !has_device() {
        return;
    }
    let checkpoint = Checkpoint::open(&root().join("models/oxseek-demo")).unwrap();
    let golden = Golden::open(&root().join("goldens/oxseek-demo.safetensors.gz")).unwrap();
    let mut native = || {
        let options = CudaOptions { precision: Precision::Native, ..CudaOptions::default() };
        Ok(Box::new(CudaBackend::new(options)?) as Box<dyn Backend>)
    };
    let figures = agreement::check(&checkpoint, &golden, &mut make, &mut native).unwrap();
    println!("{figures}");
    assert!(figures.passed(), "{figures}");
}
