//! How far rounding moves the model: native precision against exact on the same weights, and one format of the weights
//! against another.

use std::fmt;

use oxseek_model::{DeepSeek, LanguageModel as _, LoadOptions, LogitRows};
use oxseek_tensor::CacheFormat;
use oxseek_weights::Checkpoint;

use crate::{
    Error, MakeBackend,
    demo::PROMPTS,
    golden::Golden,
    sequence::{Sequence, argmax},
};

/// Positions of a prompt that are compared: the long one repeats itself.
const TOKENS_MAX: usize = 128;

/// What native precision costs, over every position of the golden prompts and answers.
#[derive(Debug, Clone, Copy, Default)]
pub struct Figures {
    /// Positions that were compared.
    pub positions: usize,
    /// Positions whose most likely token is the same.
    pub same: usize,
    /// Mean of KL(exact || native), in nats.
    pub mean: f64,
    /// The largest of them.
    pub worst: f64,
}

impl Figures {
    /// The published tolerance of BF16 products: 99 % of the most likely tokens, a mean KL under 1e-3 nats.
    pub fn passed(&self) -> bool {
        self.positions > 0 && self.same * 100 >= self.positions * 99 && self.mean < 1e-3
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "native against exact: {}/{} most likely tokens equal, KL {:.1e} nats on average, {:.1e} at most",
            self.same, self.positions, self.mean, self.worst
        )
    }
}

/// Runs the golden prompts and answers through both.
///
/// # Errors
/// [`Error`] when the check itself cannot be made.
pub fn check(
    checkpoint: &Checkpoint,
    golden: &Golden,
    exact: &mut MakeBackend<'_>,
    native: &mut MakeBackend<'_>,
) -> Result<Figures, Error> {
    let options = LoadOptions {
        context_tokens_max: TOKENS_MAX,
        cache_blocks: TOKENS_MAX.div_ceil(64),
        step_rows_max: TOKENS_MAX,
        logit_rows_max: TOKENS_MAX,
        cache_format: CacheFormat::F32,
    };
    let mut exact = DeepSeek::load(checkpoint, exact()?, options, &mut |_, _| {})?;
    let options = LoadOptions { cache_format: CacheFormat::Bf16, ..options };
    let mut native = DeepSeek::load(checkpoint, native()?, options, &mut |_, _| {})?;
    compare(&mut exact, &mut native, golden)
}

/// Runs the golden prompts and answers through two checkpoints of one model: what the storage format of the second
/// costs.
///
/// # Errors
/// [`Error`] when the check itself cannot be made.
pub fn check_format(
    exact: &Checkpoint,
    other: &Checkpoint,
    golden: &Golden,
    make: &mut MakeBackend<'_>,
) -> Result<Figures, Error> {
    let options = LoadOptions {
        context_tokens_max: TOKENS_MAX,
        cache_blocks: TOKENS_MAX.div_ceil(64),
        step_rows_max: TOKENS_MAX,
        logit_rows_max: TOKENS_MAX,
        cache_format: CacheFormat::F32,
    };
    let mut exact = DeepSeek::load(exact, make()?, options, &mut |_, _| {})?;
    let mut other = DeepSeek::load(other, make()?, options, &mut |_, _| {})?;
    compare(&mut exact, &mut other, golden)
}

fn compare(exact: &mut DeepSeek, other: &mut DeepSeek, golden: &Golden) -> Result<Figures, Error> {
    let vocab = exact.limits().vocab;
    let mut figures = Figures::default();
    for name in PROMPTS {
        let mut tokens = golden.ids(&format!("{name}.ids"))?;
        tokens.extend(golden.ids(&format!("{name}.greedy"))?);
        tokens.truncate(TOKENS_MAX);
        let [a, b] = [&mut *exact, &mut *other]
            .map(|model| Sequence::new(tokens.len(), tokens.len(), 0).run(model, &tokens, LogitRows::All));
        for (a, b) in a?.chunks_exact(vocab).zip(b?.chunks_exact(vocab)) {
            let kl = divergence(a, b);
            figures.positions += 1;
            figures.same += usize::from(argmax(a) == argmax(b));
            figures.mean += kl;
            figures.worst = figures.worst.max(kl);
        }
    }
    figures.mean /= figures.positions.max(1) as f64;
    Ok(figures)
}

/// KL of two softmaxes; NaN, which passes no bound, when a logit is not finite.
fn divergence(a: &[f32], b: &[f32]) -> f64 {
    let log_sum = |x: &[f32]| {
        let max = f64::from(x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        max + x.iter().map(|v| (f64::from(*v) - max).exp()).sum::<f64>().ln()
    };
    let (za, zb) = (log_sum(a), log_sum(b));
    let part = |(a, b): (&f32, &f32)| {
        let (a, b) = (f64::from(*a) - za, f64::from(*b) - zb);
        a.exp() * (a - b)
    };
    a.iter().zip(b).map(part).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_is_zero_for_equals_and_grows() {
        assert!(divergence(&[1.0, 2.0, 3.0], &[2.0, 3.0, 4.0]).abs() < 1e-12);
        let ln2 = std::f32::consts::LN_2;
        // Halves against one and two thirds: 0.5 ln(0.5 / (1/3)) + 0.5 ln(0.5 / (2/3))
        let want = 0.5 * (1.5f64).ln() + 0.5 * (0.75f64).ln();
        assert!((divergence(&[0.0, 0.0], &[0.0, ln2]) - want).abs() < 1e-7);
        assert!(divergence(&[0.0, f32::NAN], &[0.0, 0.0]).is_nan());
    }
}
