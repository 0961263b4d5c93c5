//! One sequence driven through a model step by step.

use oxseek_model::{Batch, DeepSeek, LanguageModel, LogitRows, ModelError, kv::blocks_for};

/// One sequence and its cache blocks.
pub(crate) struct Sequence {
    pub(crate) len: usize,
    prompt_tokens: usize,
    blocks: Vec<u32>,
}

impl Sequence {
    /// A sequence that may grow to `tokens_max` tokens in blocks from `first_block`, scrambled on purpose.
    pub(crate) fn new(prompt_tokens: usize, tokens_max: usize, first_block: u32) -> Self {
        let n = blocks_for(tokens_max) as u32;
        Self { len: 0, prompt_tokens, blocks: (first_block..first_block + n).rev().collect() }
    }

    /// Adds `tokens` of this sequence to a batch.
    pub(crate) fn push(&mut self, batch: &mut Batch, tokens: &[u32], logits: LogitRows) {
        batch.push(tokens, self.len, self.prompt_tokens, &self.blocks, logits);
        self.len += tokens.len();
    }

    /// Runs `tokens` alone; gives the wanted logits.
    pub(crate) fn run(
        &mut self,
        model: &mut DeepSeek,
        tokens: &[u32],
        logits: LogitRows,
    ) -> Result<Vec<f32>, ModelError> {
        let mut batch = Batch::default();
        self.push(&mut batch, tokens, logits);
        forward(model, &batch)
    }
}

/// Runs a batch; gives its logits.
pub(crate) fn forward(model: &mut DeepSeek, batch: &Batch) -> Result<Vec<f32>, ModelError> {
    let mut logits = vec![0.0; batch.logit_rows() * model.limits().vocab];
    model.forward(batch, &mut logits)?;
    Ok(logits)
}

/// The id of the largest logit; ties go to the smaller id.
pub(crate) fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, v) in logits.iter().enumerate() {
        if *v > logits[best] {
            best = i;
        }
    }
    best as u32
}

/// Largest absolute difference; NaN when lengths or values cannot be compared.
pub(crate) fn max_abs_difference(a: &[f32], b: &[f32]) -> f64 {
    if a.len() != b.len() {
        return f64::NAN;
    }
    let mut worst = 0.0f64;
    for (a, b) in a.iter().zip(b) {
        let d = (f64::from(*a) - f64::from(*b)).abs();
        if d.is_nan() {
            return f64::NAN;
        }
        worst = worst.max(d);
    }
    worst
}
