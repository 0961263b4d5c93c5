//! The op tests that any backend runs: odd shapes, every storage format, random data, stated bounds.
//!
//! A [`Case`] is a small program over a backend that ends in a row of numbers. [`check`] runs each on the
//! [`ReferenceBackend`] and on the candidate with the same random data and compares. [`check_row_invariance`]
//! asks the candidate alone whether a row's result depends on its neighbours.

mod matmul;
mod mla;
mod moe;
mod norm;
mod random;
mod refusals;
mod rope;

use std::fmt;

use crate::{
    Backend, Error,
    backend::{AttendMode, BLOCK_TOKENS, Buffer, Segment, StepInput, read_now},
    reference::ReferenceBackend,
};

pub use random::Random;

/// A small program over a backend.
pub struct Case {
    /// The op and its shape, for people.
    pub name: String,
    /// Largest allowed `max |candidate - reference| / rms(reference)`.
    pub bound: f64,
    run: Box<Program>,
}

type Program = dyn Fn(&mut dyn Backend, &mut Random) -> Result<Vec<f32>, Error>;

impl Case {
    fn new(
        name: impl Into<String>,
        bound: f64,
        run: impl Fn(&mut dyn Backend, &mut Random) -> Result<Vec<f32>, Error> + 'static,
    ) -> Self {
        Self { name: name.into(), bound, run: Box::new(run) }
    }
}

/// What one case gave.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// The case.
    pub name: String,
    /// `max |candidate - reference| / rms(reference)`, or why there is none.
    pub error: Result<f64, String>,
    /// What was allowed.
    pub bound: f64,
}

impl Outcome {
    /// Whether the case held.
    pub fn passed(&self) -> bool {
        self.error.as_ref().is_ok_and(|e| *e <= self.bound)
    }
}

/// What all cases gave.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// One entry per case.
    pub outcomes: Vec<Outcome>,
}

impl Report {
    /// Cases that did not hold.
    pub fn failures(&self) -> impl Iterator<Item = &Outcome> {
        self.outcomes.iter().filter(|o| !o.passed())
    }

    /// The largest error as a part of its bound, with its case.
    pub fn closest(&self) -> Option<(&Outcome, f64)> {
        let part =
            |o: &Outcome| o.error.as_ref().map_or(f64::INFINITY, |e| e / o.bound.max(f64::MIN_POSITIVE));
        self.outcomes.iter().map(|o| (o, part(o))).max_by(|a, b| a.1.total_cmp(&b.1))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for o in self.failures() {
            match &o.error {
                Ok(e) => writeln!(f, "FAILED {}: error {e:.2e}, bound {:.0e}", o.name, o.bound)?,
                Err(why) => writeln!(f, "FAILED {}: {why}", o.name)?,
            }
        }
        let failed = self.failures().count();
        write!(f, "{} op cases passed, {failed} failed", self.outcomes.len() - failed)
    }
}

/// Every case of every op.
pub fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    matmul::add_cases(&mut all);
    norm::add_cases(&mut all);
    rope::add_cases(&mut all);
    mla::add_cases(&mut all);
    moe::add_cases(&mut all);
    all
}

/// Runs every case on the reference and on fresh backends from `make`.
pub fn check(make: &mut dyn FnMut() -> Box<dyn Backend>, seed: u64) -> Report {
    let mut report = compare(cases(), make, seed);
    for (name, run) in refusals::cases() {
        let error = match run(&mut *make()) {
            Err(_) => Ok(0.0),
            Ok(()) => Err("accepted what cannot be".to_string()),
        };
        report.outcomes.push(Outcome { name: format!("refuses {name}"), error, bound: 0.0 });
    }
    report
}

/// Runs the cases of attention on a backend that multiplies rounded numbers: each within `bound`, or within its own
/// bound where that is larger.
pub fn check_rounded_attention(make: &mut dyn FnMut() -> Box<dyn Backend>, seed: u64, bound: f64) -> Report {
    let mut cases = Vec::new();
    mla::add_cases(&mut cases);
    // Rounding moves scores in proportion to their size: large ones say nothing about a kernel.
    cases.retain(|c| !c.name.contains("large scores"));
    cases.iter_mut().for_each(|c| c.bound = c.bound.max(bound));
    compare(cases, make, seed)
}

fn compare(cases: Vec<Case>, make: &mut dyn FnMut() -> Box<dyn Backend>, seed: u64) -> Report {
    let mut report = Report::default();
    for (i, case) in cases.into_iter().enumerate() {
        let seed = seed.wrapping_add(i as u64);
        let expected = (case.run)(&mut ReferenceBackend::new(), &mut Random::new(seed));
        let found = (case.run)(&mut *make(), &mut Random::new(seed));
        let error = match (expected, found) {
            (Ok(expected), Ok(found)) => distance(&expected, &found),
            (Err(e), _) => Err(format!("the case itself is wrong: {e}")),
            (_, Err(e)) => Err(e.to_string()),
        };
        report.outcomes.push(Outcome { name: case.name, error, bound: case.bound });
    }
    report
}

/// Runs every row-wise op on a batch and on each row alone; the bits must be equal.
pub fn check_row_invariance(make: &mut dyn FnMut() -> Box<dyn Backend>, seed: u64) -> Report {
    let mut report = Report::default();
    for (name, run) in matmul::invariance().into_iter().chain(mla::invariance()).chain(moe::invariance()) {
        let mut one = |pick| run(&mut *make(), &mut Random::new(seed), pick);
        let error = match (one(Rows::Together), one(Rows::Apart)) {
            (Ok(together), Ok(apart)) => {
                let differ = together.iter().zip(&apart).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
                if differ == 0 && together.len() == apart.len() {
                    Ok(0.0)
                } else {
                    Err(format!("{differ} of {} values depend on the batch", together.len()))
                }
            }
            (Err(e), _) | (_, Err(e)) => Err(e.to_string()),
        };
        report.outcomes.push(Outcome { name: format!("row invariance of {name}"), error, bound: 0.0 });
    }
    report
}

/// How an invariance case runs its rows.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Rows {
    /// All in one step.
    Together,
    /// One step each.
    Apart,
}

type Invariance = (String, Box<dyn Fn(&mut dyn Backend, &mut Random, Rows) -> Result<Vec<f32>, Error>>);

fn distance(expected: &[f32], found: &[f32]) -> Result<f64, String> {
    if expected.len() != found.len() {
        return Err(format!("{} values instead of {}", found.len(), expected.len()));
    }
    let square: f64 = expected.iter().map(|&v| f64::from(v).powi(2)).sum();
    let rms = (square / expected.len().max(1) as f64).sqrt().max(1e-30);
    let mut worst = 0.0f64;
    for (&e, &f) in expected.iter().zip(found) {
        let d = (f64::from(e) - f64::from(f)).abs();
        if d.is_nan() {
            return Err("NaN".into());
        }
        worst = worst.max(d);
    }
    Ok(worst / rms)
}

/// A step of one sequence from position 0 whose rows nobody attends with: for row-wise ops.
fn plain_step(rows: usize) -> StepInput {
    let blocks = (0..rows.div_ceil(BLOCK_TOKENS) as u32).collect();
    StepInput {
        tokens: vec![0; rows],
        segments: vec![Segment { row: 0, rows, start: 0, first_block: 0, mode: AttendMode::Absorbed }],
        blocks,
    }
}

/// A buffer that holds `values`.
fn buffer_of(b: &mut dyn Backend, values: &[f32], cols: usize) -> Result<Buffer, Error> {
    let buffer = b.alloc(values.len() / cols, cols)?;
    b.write(values, buffer)?;
    Ok(buffer)
}

fn read_rows(b: &mut dyn Backend, x: Buffer, rows: usize, cols: usize) -> Result<Vec<f32>, Error> {
    let mut out = vec![0.0; rows * cols];
    read_now(b, x, rows, &mut out)?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_passes_its_own_suite() {
        let report = check(&mut || Box::new(ReferenceBackend::new()), 1);
        assert_eq!(report.failures().count(), 0, "{report}");
        let report = check_row_invariance(&mut || Box::new(ReferenceBackend::new()), 1);
        assert_eq!(report.failures().count(), 0, "{report}");
    }

    /// A suite that cannot fail proves nothing: absorbed and expanded attention are different programs that
    /// must agree, and a wrong answer must be seen.
    #[test]
    fn a_wrong_value_is_seen() {
        assert!(distance(&[1.0, -1.0], &[1.0, -1.01]).unwrap() > 5e-3);
        assert!(distance(&[1.0], &[f32::NAN]).is_err());
        assert!(distance(&[1.0], &[1.0, 2.0]).is_err());
    }
}
