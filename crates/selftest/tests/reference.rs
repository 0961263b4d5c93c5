//! Every fixture on the scalar reference: the model's formulas, apart from any kernel.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::Path;

use oxseek_selftest::fixture;
use oxseek_tensor::reference::ReferenceBackend;

#[test]
fn fixtures_on_the_reference() {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../goldens");
    println!("{}", fixture::Figures::HEADING);
    for name in fixture::NAMES {
        let figures =
            fixture::check(&goldens.join(name), &mut || Ok(Box::new(ReferenceBackend::new()))).unwrap();
        println!("{figures}");
        assert!(figures.passed(), "{}\n{figures}", fixture::Figures::HEADING);
    }
}
