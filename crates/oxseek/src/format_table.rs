//! What each storage format costs the demo model: `oxseek selftest --formats`.

use std::{fs, path::PathBuf};

use oxseek_backend_cpu::{CpuBackend, CpuOptions, Precision};
use oxseek_selftest::{agreement, agreement::Figures, golden::Golden};
use oxseek_tensor::{Backend, DType};
use oxseek_weights::Checkpoint;

use crate::{
    demo,
    failure::Failure,
    open::open_checkpoint,
    quantize::{Scheme, Target, write},
};

/// Format, most nats of KL(exact || format) on average, least percent of most likely tokens that stay. The demo model's
/// rows (384, 192, 128) are no multiple of 256: formats with blocks of 256 are measured on blocks that run across the
/// ends of rows.
const TOLERANCES: [(DType, f64, f64); 16] = [
    (DType::F32, 1e-9, 100.0),
    (DType::BF16, 1e-3, 99.0),
    (DType::F16, 1e-5, 99.5),
    (DType::Q8_0, 3e-3, 96.5),
    (DType::Q6K, 2e-2, 95.0),
    (DType::Q5_1, 5e-2, 91.0),
    (DType::Q5_0, 5e-2, 90.0),
    (DType::Q5K, 5e-2, 91.5),
    (DType::Q4_1, 1.2e-1, 86.0),
    (DType::Q4_0, 1.4e-1, 85.0),
    (DType::Q4K, 1.2e-1, 86.0),
    (DType::IQ4_NL, 1.3e-1, 86.0),
    (DType::IQ4_XS, 1.4e-1, 85.0),
    (DType::MXFP4, 2.8e-1, 82.0),
    (DType::Q3K, 4.5e-1, 75.0),
    (DType::Q2K, 1.3, 57.0),
];

/// Prints the table; gives the number of formats that are out of tolerance.
pub fn check() -> Result<usize, Failure> {
    println!("\ndemo model, every weight in one format, against exact weights");
    println!("| format | same top-1 | at least | KL, nats | at most | worst KL | blocks         |");
    println!("|--------|------------|----------|----------|---------|----------|----------------|");
    let mut failed = 0;
    for (dtype, kl, top) in TOLERANCES {
        let (figures, across) = measure(dtype)?;
        let passed = holds(&figures, kl, top);
        failed += usize::from(!passed);
        println!(
            "| {:<6} | {:>8.2} % | {top:>6} % | {:>8.1e} | {kl:>7.1e} | {:>8.1e} | {:<14} |{}",
            dtype.name(),
            percent(&figures),
            figures.mean,
            figures.worst,
            if across { "across rows" } else { "as stored" },
            if passed { "" } else { "  FAILED" }
        );
    }
    Ok(failed)
}

fn percent(figures: &Figures) -> f64 {
    figures.same as f64 * 100.0 / figures.positions.max(1) as f64
}

fn holds(figures: &Figures, kl: f64, top: f64) -> bool {
    figures.positions > 0 && figures.mean <= kl && percent(figures) >= top
}

/// What a format costs, and whether its blocks ran across the ends of rows.
fn measure(dtype: DType) -> Result<(Figures, bool), Failure> {
    let failure = |e: oxseek_selftest::Error| Failure::Selftest(e.to_string());
    let (name, exact) = open_checkpoint(None)?;
    let across = dtype.block_len() > 32;
    let scheme = Scheme {
        target: Target::plain(if across { DType::F32 } else { dtype }),
        pure: true,
        output: None,
        embedding: None,
        tied: false,
        layers: exact.config().num_hidden_layers,
        through: across.then_some(dtype),
    };
    let file = Temporary::new(&format!("format-{}", dtype.name()));
    write(&exact, &name, &scheme, 2, &file.0)?;
    let other = Checkpoint::open(&file.0).map_err(|e| Failure::Model(e.to_string()))?;
    let golden = Golden::from_bytes("demo golden", demo::region(demo::GOLDEN)).map_err(failure)?;
    let mut make = || {
        let options = CpuOptions { precision: Precision::Exact, ..CpuOptions::default() };
        Ok(Box::new(CpuBackend::new(options)?) as Box<dyn Backend>)
    };
    Ok((agreement::check_format(&exact, &other, &golden, &mut make).map_err(failure)?, across))
}

/// A file that goes when it is no longer needed.
pub struct Temporary(pub PathBuf);

impl Temporary {
    /// A `.gguf` file of this process.
    pub fn new(name: &str) -> Self {
        Self(std::env::temp_dir().join(format!("oxseek-{}-{name}.gguf", std::process::id())))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // It may not have been written.
        let _ = fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_cost_what_the_table_says() {
        for dtype in [DType::F32, DType::Q8_0, DType::Q6K, DType::Q4_0] {
            let (_, kl, top) = TOLERANCES.into_iter().find(|(d, ..)| *d == dtype).unwrap();
            let (figures, _) = measure(dtype).unwrap();
            assert!(holds(&figures, kl, top), "{dtype}: {figures:?}");
        }
    }
}
