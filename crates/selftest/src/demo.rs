//! The demo model against its golden greedy text.

use std::fmt;

use oxseek_model::{DeepSeek, LoadOptions, LogitRows};
use oxseek_tensor::CacheFormat;
use oxseek_weights::Checkpoint;

use crate::{
    Error, MakeBackend,
    golden::Golden,
    sequence::{Sequence, argmax, max_abs_difference},
};

/// The golden prompts.
pub const PROMPTS: [&str; 6] = ["story", "chat", "think", "tool", "unicode", "long"];

/// Golden steps whose two best logits are closer than this may go either way.
pub const MARGIN_MIN: f32 = 1e-3;

/// Rows of one prefill step: less than the long prompt, so that it is chunked.
const CHUNK_TOKENS: usize = 512;

/// What one golden prompt gave.
#[derive(Debug, Clone)]
pub struct Figures {
    /// The prompt.
    pub name: &'static str,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Golden ids reproduced before the first difference.
    pub same: usize,
    /// Golden ids that must be reproduced: all, or those before the first close call.
    pub required: usize,
    /// Golden ids.
    pub of: usize,
    /// Largest absolute difference of the prompt's last logits.
    pub logits: f64,
}

impl Figures {
    /// Whether every required id was reproduced.
    pub fn passed(&self) -> bool {
        self.same >= self.required && self.required > 0 && self.logits < 1e-2
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:<8} {:>5} prompt tokens, {:>3}/{:<3} greedy ids equal ({} required), last logits within {:.1e}",
            self.name, self.prompt_tokens, self.same, self.of, self.required, self.logits
        )
    }
}

/// Runs every golden prompt of the demo model on one backend.
///
/// # Errors
/// [`Error`] when the check itself cannot be made.
pub fn check(
    checkpoint: &Checkpoint,
    golden: &Golden,
    make: &mut MakeBackend<'_>,
) -> Result<Vec<Figures>, Error> {
    let options = LoadOptions {
        context_tokens_max: 1536,
        cache_blocks: 24,
        step_rows_max: CHUNK_TOKENS,
        logit_rows_max: 1,
        cache_format: CacheFormat::F32,
    };
    let mut model = DeepSeek::load(checkpoint, make()?, options, &mut |_, _| {})?;
    PROMPTS.iter().map(|name| prompt(&mut model, golden, name)).collect()
}

fn prompt(model: &mut DeepSeek, golden: &Golden, name: &'static str) -> Result<Figures, Error> {
    let ids = golden.ids(&format!("{name}.ids"))?;
    let greedy = golden.ids(&format!("{name}.greedy"))?;
    let margins = golden.floats(&format!("{name}.margin"))?;
    let required = margins.iter().position(|m| *m < MARGIN_MIN).unwrap_or(greedy.len()).min(greedy.len());
    let mut sequence = Sequence::new(ids.len(), ids.len() + greedy.len(), 0);
    let mut logits = Vec::new();
    for (i, chunk) in ids.chunks(CHUNK_TOKENS).enumerate() {
        let last = (i + 1) * CHUNK_TOKENS >= ids.len();
        let want = if last { LogitRows::Last } else { LogitRows::None };
        logits = sequence.run(model, chunk, want)?;
    }
    let difference = max_abs_difference(&logits, &golden.floats(&format!("{name}.logits_last"))?);
    let mut same = 0;
    for expected in &greedy {
        let token = argmax(&logits);
        if token != *expected {
            break;
        }
        same += 1;
        logits = sequence.run(model, &[token], LogitRows::Last)?;
    }
    Ok(Figures { name, prompt_tokens: ids.len(), same, required, of: greedy.len(), logits: difference })
}
