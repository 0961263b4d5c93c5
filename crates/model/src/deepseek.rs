//! The DeepSeek family: V2, V3 and what shares their shape (DeepSeek-V3 paper, figure 2).

mod attention;
pub mod config;
mod experts;
mod layer;
mod load;
mod mtp;
mod router;
mod scratch;
mod segments;

use oxseek_tensor::{
    Backend, CacheFormat,
    backend::{BLOCK_TOKENS, Cache, DeviceInfo, MlaShape, OpCost, StepInput, Vector, Weight, read_now},
};
use oxseek_weights::{Checkpoint, ModelConfig};
use thiserror::Error;

use self::{
    config::{mla_shape, rope_frequencies},
    layer::Layer,
    load::Loader,
    mtp::Mtp,
    scratch::Scratch,
};
use crate::{Batch, LanguageModel, LogitRows, ModelError, ModelLimits, kv::cache_shape};

/// Why a model could not be made.
#[derive(Debug, Error)]
pub enum LoadError {
    /// The checkpoint is not what its configuration says.
    #[error(transparent)]
    Checkpoint(#[from] oxseek_weights::Error),
    /// The backend refused.
    #[error(transparent)]
    Backend(#[from] oxseek_tensor::Error),
    /// The model does something that is not supported.
    #[error("{0}")]
    Unsupported(String),
}

/// Sizes to make a model with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadOptions {
    /// Longest sequence, in tokens; at most the model's `max_position_embeddings`.
    pub context_tokens_max: usize,
    /// Blocks of 64 tokens in the latent cache.
    pub cache_blocks: usize,
    /// Most rows in one step.
    pub step_rows_max: usize,
    /// Most rows of logits in one step.
    pub logit_rows_max: usize,
    /// How the latent cache is stored.
    pub cache_format: CacheFormat,
}

impl LoadOptions {
    /// Bytes of the activations that a model made with these sizes keeps, beside weights and cache.
    pub fn scratch_bytes(&self, config: &ModelConfig) -> u64 {
        Scratch::bytes(config, self)
    }
}

/// A model of the DeepSeek family on a backend.
pub struct DeepSeek {
    backend: Box<dyn Backend>,
    config: ModelConfig,
    options: LoadOptions,
    shape: MlaShape,
    /// `[V, D]`
    embed: Weight,
    layers: Vec<Layer>,
    mtp: Vec<Mtp>,
    final_norm: Vector,
    /// `[V, D]`
    head: Weight,
    cache: Cache,
    scratch: Scratch,
    step: StepInput,
    logit_rows: Vec<u32>,
    /// Rows of `scratch.last` that the last step left: what an MTP step may start from.
    hidden_rows: usize,
}

impl DeepSeek {
    /// Loads a checkpoint into a backend. `progress` is told after each layer how many of how many are there.
    ///
    /// # Errors
    /// [`LoadError`]
    pub fn load(
        checkpoint: &Checkpoint,
        mut backend: Box<dyn Backend>,
        options: LoadOptions,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self, LoadError> {
        let config = checkpoint.config().clone();
        check_options(&config, &options)?;
        let b = &mut *backend;
        let (frequencies, magnitude) = rope_frequencies(&config);
        let rope = b.load_rope(&frequencies, magnitude)?;
        let mut l = Loader { checkpoint, backend: b };
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let embed = l.host_matrix("model.embed_tokens.weight", vocab, hidden)?;
        let embed = if config.tie_word_embeddings {
            l.backend().load_matrix(embed)?
        } else {
            l.backend().load_table(embed)?
        };
        let (main, extra) = (config.num_hidden_layers, config.num_nextn_predict_layers);
        let mut layers = Vec::with_capacity(main);
        for i in 0..main {
            layers.push(Layer::load(&mut l, rope, i, config.is_moe_layer(i))?);
            progress(i + 1, main + extra);
        }
        let mut mtp = Vec::with_capacity(extra);
        for i in main..main + extra {
            mtp.push(Mtp::load(&mut l, rope, i)?);
            progress(i + 1, main + extra);
        }
        let final_norm = l.vector("model.norm.weight", hidden)?;
        let head =
            if config.tie_word_embeddings { embed } else { l.matrix("lm_head.weight", vocab, hidden)? };
        let cache = b.alloc_cache(cache_shape(&config, options.cache_blocks, options.cache_format))?;
        let scratch = Scratch::new(b, &config, &options)?;
        Ok(Self {
            shape: mla_shape(&config),
            backend,
            config,
            options,
            embed,
            layers,
            mtp,
            final_norm,
            head,
            cache,
            scratch,
            step: StepInput::default(),
            logit_rows: Vec::new(),
            hidden_rows: 0,
        })
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What it runs on.
    /// What each op of the backend has cost since the last call.
    pub fn take_profile(&mut self) -> Vec<OpCost> {
        self.backend.take_profile()
    }

    /// Waits for work that the backend still does in the background after loading.
    ///
    /// # Errors
    /// What the backend answers.
    pub fn settle(&mut self) -> Result<(), oxseek_tensor::Error> {
        self.backend.settle()
    }

    /// What the model runs on.
    pub fn device(&self) -> DeviceInfo {
        self.backend.info()
    }

    /// One step of the main model: the paper's figure from the bottom up.
    fn run(&mut self, rows: usize) -> Result<(), oxseek_tensor::Error> {
        let (b, s) = (&mut *self.backend, &self.scratch);
        b.embed(self.embed, s.x)?;
        for (i, layer) in self.layers.iter().enumerate() {
            layer.forward(b, s, self.cache, i, rows)?;
        }
        b.gather_rows(s.x, &self.logit_rows, s.last)?;
        b.rms_norm(s.last, self.final_norm, self.config.rms_norm_eps, s.last, self.logit_rows.len())?;
        b.matmul(s.last, self.head, s.logits, self.logit_rows.len())
    }

    /// One step of MTP module `module`: `batch` holds, for each row of logits of the step before (main or MTP, in
    /// the same order), the token that follows it; the logits are those of the token after that. The module's own
    /// cache rows are appended at the batch's positions.
    ///
    /// # Errors
    /// [`ModelError::Batch`] when there is no such module or the rows are not those of the step before.
    pub fn forward_mtp(
        &mut self,
        module: usize,
        batch: &Batch,
        logits: &mut [f32],
    ) -> Result<(), ModelError> {
        self.check(batch, logits)?;
        let rows = batch.tokens.len();
        let Some(mtp) = self.mtp.get(module) else {
            return Err(ModelError::Batch(format!("the model has {} MTP modules", self.mtp.len())));
        };
        if rows > self.hidden_rows || batch.logit_rows() != rows {
            let left = self.hidden_rows;
            return Err(ModelError::Batch(format!("{rows} MTP rows after a step that left {left}")));
        }
        segments::step_input(&self.shape, batch, &mut self.step);
        let (b, s) = (&mut *self.backend, &self.scratch);
        b.begin_step(&self.step)?;
        mtp.forward(b, s, self.embed, self.cache, rows)?;
        b.matmul(s.last, self.head, s.logits, rows)?;
        self.hidden_rows = rows;
        Ok(read_now(b, s.logits, rows, logits)?)
    }

    /// The experts that the last MoE layer of the last step chose, `[rows, top_k]`; for tests and inspection.
    ///
    /// # Errors
    /// [`ModelError::Backend`] when the step had fewer rows.
    pub fn read_routing(&mut self, rows: usize) -> Result<(Vec<u32>, Vec<f32>), ModelError> {
        Ok(self.backend.read_routing(self.scratch.routing, rows)?)
    }

    /// Runs one step layer by layer and hands each layer's routing (`None` for dense layers) to `seen`: how the
    /// golden router sets are checked.
    ///
    /// # Errors
    /// As [`LanguageModel::forward`].
    pub fn trace_routing(
        &mut self,
        batch: &Batch,
        seen: &mut dyn FnMut(usize, Vec<u32>, Vec<f32>),
    ) -> Result<(), ModelError> {
        let rows = batch.tokens.len();
        self.check(batch, &vec![0.0; batch.logit_rows() * self.config.vocab_size])?;
        segments::step_input(&self.shape, batch, &mut self.step);
        let (b, s) = (&mut *self.backend, &self.scratch);
        b.begin_step(&self.step)?;
        b.embed(self.embed, s.x)?;
        for (i, layer) in self.layers.iter().enumerate() {
            layer.forward(b, s, self.cache, i, rows)?;
            if self.config.is_moe_layer(i) {
                let (ids, weights) = b.read_routing(s.routing, rows)?;
                seen(i, ids, weights);
            }
        }
        Ok(())
    }

    fn check(&self, batch: &Batch, logits: &[f32]) -> Result<(), ModelError> {
        let refuse = |why: String| Err(ModelError::Batch(why));
        let (rows, wanted) = (batch.tokens.len(), batch.logit_rows());
        if rows == 0 || rows > self.options.step_rows_max {
            return refuse(format!("{rows} rows, 1 to {} allowed", self.options.step_rows_max));
        }
        if wanted > self.options.logit_rows_max {
            return refuse(format!("{wanted} rows of logits, {} allowed", self.options.logit_rows_max));
        }
        if logits.len() != wanted * self.config.vocab_size {
            return refuse(format!("room for {} logits, {wanted} rows wanted", logits.len()));
        }
        let mut row = 0;
        for s in &batch.sequences {
            if s.tokens.start != row || s.tokens.is_empty() {
                return refuse(format!("a sequence's tokens begin at {}, expected {row}", s.tokens.start));
            }
            row = s.tokens.end;
            let end = s.start + s.tokens.len();
            if end > self.options.context_tokens_max {
                return refuse(format!("position {end} of {}", self.options.context_tokens_max));
            }
            if s.blocks.end > batch.blocks.len() || s.blocks.len() < end.div_ceil(BLOCK_TOKENS) {
                return refuse(format!("{} cache blocks for {end} tokens", s.blocks.len()));
            }
        }
        if row == rows { Ok(()) } else { refuse(format!("{rows} tokens, sequences hold {row}")) }
    }

    fn collect_logit_rows(&mut self, batch: &Batch) {
        self.logit_rows.clear();
        for s in &batch.sequences {
            let rows = match s.logits {
                LogitRows::None => continue,
                LogitRows::Last => s.tokens.end - 1..s.tokens.end,
                LogitRows::All => s.tokens.clone(),
            };
            self.logit_rows.extend(rows.map(|r| r as u32));
        }
    }
}

fn check_options(c: &ModelConfig, o: &LoadOptions) -> Result<(), LoadError> {
    let unsupported = |why: String| Err(LoadError::Unsupported(why));
    if !c.rope_interleave {
        return unsupported(
            "config.json: rope_interleave=false is not supported (no released model has it)".into(),
        );
    }
    if o.context_tokens_max > c.max_position_embeddings {
        return unsupported(format!(
            "a context of {} tokens: the model was made for {} (max_position_embeddings)",
            o.context_tokens_max, c.max_position_embeddings
        ));
    }
    for (name, n) in [
        ("context_tokens_max", o.context_tokens_max),
        ("cache_blocks", o.cache_blocks),
        ("step_rows_max", o.step_rows_max),
        ("logit_rows_max", o.logit_rows_max),
    ] {
        if n == 0 {
            return unsupported(format!("{name} must be at least 1"));
        }
    }
    Ok(())
}

impl LanguageModel for DeepSeek {
    fn limits(&self) -> ModelLimits {
        ModelLimits {
            vocab: self.config.vocab_size,
            context_tokens_max: self.options.context_tokens_max,
            cache_blocks: self.options.cache_blocks,
            step_rows_max: self.options.step_rows_max,
            logit_rows_max: self.options.logit_rows_max,
            hidden: self.config.hidden_size,
        }
    }

    fn forward(&mut self, batch: &Batch, logits: &mut [f32]) -> Result<(), ModelError> {
        self.check(batch, logits)?;
        segments::step_input(&self.shape, batch, &mut self.step);
        self.collect_logit_rows(batch);
        self.backend.begin_step(&self.step)?;
        self.run(batch.tokens.len())?;
        self.hidden_rows = self.logit_rows.len();
        Ok(read_now(&mut *self.backend, self.scratch.logits, self.logit_rows.len(), logits)?)
    }

    fn read_hidden(&mut self, rows: usize, out: &mut [f32]) -> Result<(), ModelError> {
        if rows > self.hidden_rows || out.len() != rows * self.config.hidden_size {
            let (left, room) = (self.hidden_rows, out.len());
            let why =
                format!("{rows} hidden states into room for {room} values after a step that left {left}");
            return Err(ModelError::Batch(why));
        }
        Ok(read_now(&mut *self.backend, self.scratch.last, rows, out)?)
    }

    fn copy_block(&mut self, from: u32, to: u32) -> Result<(), ModelError> {
        Ok(self.backend.copy_block(self.cache, from, to)?)
    }

    fn block_form(&self, block: usize, prompt_tokens: usize) -> u8 {
        segments::expanded_rows(&self.shape, block, prompt_tokens)
    }
}
