//! What the engine asks of a model: one batched step over a paged cache.

use std::ops::Range;

use thiserror::Error;

/// A forward that failed. The rows of this step are lost; the model stays usable.
#[derive(Debug, Error)]
pub enum ModelError {
    /// The backend refused or failed.
    #[error(transparent)]
    Backend(#[from] oxseek_tensor::Error),
    /// A batch that breaks the model's limits: a caller's mistake, found before anything ran.
    #[error("batch: {0}")]
    Batch(String),
}

/// Which logits of a sequence's rows are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogitRows {
    /// None: a prompt chunk that is not the last.
    None,
    /// Those of the last row.
    Last,
    /// Those of every row.
    All,
}

/// Consecutive tokens of one sequence in a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SequenceRows {
    /// Where its tokens lie in [`Batch::tokens`]. Sequences follow each other without gaps.
    pub tokens: Range<usize>,
    /// Position of the first token: how many of this sequence are in the cache already.
    pub start: usize,
    /// Tokens of the prompt: positions below it are prefill, the rest decode. It decides how a row attends, so
    /// it must not change during a sequence's life; then a row's result does not depend on how the prompt was
    /// cut into chunks.
    pub prompt_tokens: usize,
    /// Where its block table lies in [`Batch::blocks`]; at least `ceil((start + rows) / 64)` block ids.
    pub blocks: Range<usize>,
    /// Which logits are wanted.
    pub logits: LogitRows,
}

/// One step over several sequences.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// Tokens of all sequences.
    pub tokens: Vec<u32>,
    /// Block tables of all sequences.
    pub blocks: Vec<u32>,
    /// The sequences.
    pub sequences: Vec<SequenceRows>,
}

impl Batch {
    /// Forgets all rows and keeps the memory.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.blocks.clear();
        self.sequences.clear();
    }

    /// Adds consecutive tokens of a sequence.
    pub fn push(
        &mut self,
        tokens: &[u32],
        start: usize,
        prompt_tokens: usize,
        blocks: &[u32],
        logits: LogitRows,
    ) {
        let (t, b) = (self.tokens.len(), self.blocks.len());
        self.tokens.extend_from_slice(tokens);
        self.blocks.extend_from_slice(blocks);
        self.sequences.push(SequenceRows {
            tokens: t..self.tokens.len(),
            start,
            prompt_tokens,
            blocks: b..self.blocks.len(),
            logits,
        });
    }

    /// How many rows of logits the step gives.
    pub fn logit_rows(&self) -> usize {
        let rows = |s: &SequenceRows| match s.logits {
            LogitRows::None => 0,
            LogitRows::Last => 1,
            LogitRows::All => s.tokens.len(),
        };
        self.sequences.iter().map(rows).sum()
    }
}

/// Sizes a model was made with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelLimits {
    /// Width of a row of logits.
    pub vocab: usize,
    /// Longest sequence, prompt and answer together, in tokens.
    pub context_tokens_max: usize,
    /// Blocks of 64 tokens in the cache.
    pub cache_blocks: usize,
    /// Most rows in one step.
    pub step_rows_max: usize,
    /// Most rows of logits in one step.
    pub logit_rows_max: usize,
    /// Width of a hidden state.
    pub hidden: usize,
}

/// A causal language model with a paged cache. The engine thread is its only user.
pub trait LanguageModel: Send {
    /// Sizes it was made with.
    fn limits(&self) -> ModelLimits;

    /// Runs one step: appends every row to the cache and writes the wanted logits, `[batch.logit_rows(), vocab]`
    /// in the order of the sequences, into `logits`.
    ///
    /// # Errors
    /// [`ModelError`]; the cache rows of this step are then undefined, everything else is as before.
    fn forward(&mut self, batch: &Batch, logits: &mut [f32]) -> Result<(), ModelError>;

    /// Reads the hidden states that the last forward's rows of logits were made of: after the final norm,
    /// `[rows, hidden]`, the first `rows` of them in the same order.
    ///
    /// # Errors
    /// [`ModelError`] when the step had fewer rows of logits.
    fn read_hidden(&mut self, rows: usize, out: &mut [f32]) -> Result<(), ModelError>;

    /// Copies cache block `from` to `to` (a sequence is forked in the middle of a block).
    ///
    /// # Errors
    /// [`ModelError`] when a block does not exist.
    fn copy_block(&mut self, from: u32, to: u32) -> Result<(), ModelError>;

    /// How many rows of block `block` of a sequence with a prompt of `prompt_tokens` tokens are computed in another
    /// form than the rows of an answer are; they are its first ones. Two sequences whose tokens are equal up to and
    /// including a row, and computed in the same form, have the same bits in it.
    fn block_form(&self, block: usize, prompt_tokens: usize) -> u8;
}
