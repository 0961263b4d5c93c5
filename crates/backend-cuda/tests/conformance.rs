//! The op suite on the first CUDA device, where there is one; where there is none, that this is said in words.
#![allow(clippy::unwrap_used, reason = "tests")]

use oxseek_backend_cuda::{CudaBackend, CudaOptions, device_count};
use oxseek_tensor::{Backend, conformance};

/// Whether there is a device; a machine without one must say why.
fn has_device() -> bool {
    match CudaBackend::new(CudaOptions::default()) {
        Ok(backend) => {
            println!("{}", backend.info().device);
            true
        }
        Err(e) => {
            assert!(e.to_string().starts_with("device: "), "{e}");
            println!("not run: {e}");
            false
        }
    }
}

fn make() -> Box<dyn Backend> {
    Box::new(CudaBackend::new(CudaOptions::default()).unwrap())
}

#[test]
fn every_op() {
    if has_device() {
        let report = conformance::check(&mut make, 1);
        println!("{report}\nclosest: {:?}", report.closest());
        assert_eq!(report.failures().count(), 0, "{report}");
    }
}

#[test]
fn rows_do_not_depend_on_their_neighbours() {
    if has_device() {
        let report = conformance::check_row_invariance(&mut make, 5);
        assert_eq!(report.failures().count(), 0, "{report}");
    }
}

#[test]
fn a_device_that_is_not_there_is_named() {
    let ordinal = device_count().unwrap_or(0);
    let e = CudaBackend::new(CudaOptions { ordinal, ..CudaOptions::default() }).err().unwrap().to_string();
    assert!(e.contains("NVIDIA driver") || e.contains(&format!("no CUDA device {ordinal}")), "{e}");
}
