//! From the command line to a checkpoint, a backend, an engine.

use std::{path::Path, sync::Arc, time::Duration};

use indicatif::{ProgressBar, ProgressStyle};
use oxseek_backend_cpu::{CpuBackend, CpuOptions};
use oxseek_engine::{Engine, EngineHandle, EngineOptions, Sampling};
use oxseek_model::{DeepSeek, LoadOptions, kv::blocks_for};
use oxseek_text::{ChatTemplate, Tokenizer};
use oxseek_weights::Checkpoint;

use crate::{
    args::ModelArgs,
    failure::Failure,
    plan::{need::Experts, place_experts},
};

/// Context of a conversation when nobody asks for another, in tokens.
pub const CONTEXT_TOKENS_DEFAULT: usize = 4096;
/// Rows of one step: the most prompt tokens that are computed between two tokens of the other sequences.
const STEP_ROWS_MAX: usize = 512;

/// A model that is ready to be asked.
pub struct Opened {
    /// Name for people and for the API.
    pub name: String,
    /// Where requests go.
    pub engine: EngineHandle,
    /// How conversations become prompts; models without one only continue text.
    pub template: Option<ChatTemplate>,
    /// Text of the token that begins a prompt.
    pub bos: String,
    /// Text of the token that ends an answer.
    pub eos: String,
    /// What the model's makers recommend.
    pub sampling: Sampling,
}

/// Opens a checkpoint folder, or the built-in demo model.
pub fn open_checkpoint(folder: Option<&Path>) -> Result<(String, Checkpoint), Failure> {
    let Some(folder) = folder else { return open_demo() };
    let checkpoint = Checkpoint::open(folder).map_err(|e| Failure::Model(e.to_string()))?;
    let full = folder.canonicalize().unwrap_or_else(|_| folder.into());
    let name = full.file_name().map_or_else(|| "model".into(), |n| n.to_string_lossy().into_owned());
    Ok((name, checkpoint))
}

#[cfg(feature = "demo")]
fn open_demo() -> Result<(String, Checkpoint), Failure> {
    let checkpoint =
        Checkpoint::from_files(crate::demo::files()).map_err(|e| Failure::Model(e.to_string()))?;
    Ok((crate::demo::NAME.into(), checkpoint))
}

#[cfg(not(feature = "demo"))]
fn open_demo() -> Result<(String, Checkpoint), Failure> {
    Err(Failure::Usage("this build has no built-in model: give one with --model FOLDER".into()))
}

/// The CPU backend that the command line asks for.
pub fn cpu_backend(args: &ModelArgs) -> Result<CpuBackend, Failure> {
    let options = CpuOptions {
        threads: args.threads.map(usize::from),
        level: args.cpu_level,
        precision: args.precision.into(),
    };
    CpuBackend::new(options).map_err(|e| Failure::Usage(e.to_string()))
}

/// The same, with the experts of a model that is about to be loaded in memory or on disk.
pub fn placed_backend(
    args: &ModelArgs,
    checkpoint: &Checkpoint,
    options: &LoadOptions,
) -> Result<CpuBackend, Failure> {
    let mut backend = cpu_backend(args)?;
    if place_experts(args, checkpoint, options, backend.threads()) == Experts::Disk {
        backend.leave_experts_on_disk();
    }
    Ok(backend)
}

/// Sizes of a model that answers `parallel` requests of at most `context` tokens at a time.
pub fn load_options(context: usize, parallel: usize) -> LoadOptions {
    LoadOptions {
        context_tokens_max: context,
        cache_blocks: parallel * blocks_for(context),
        step_rows_max: STEP_ROWS_MAX.max(parallel),
        logit_rows_max: parallel,
    }
}

/// The context that the command line asks for, in tokens.
pub fn context_tokens(args: &ModelArgs, checkpoint: &Checkpoint) -> Result<usize, Failure> {
    let most = checkpoint.config().max_position_embeddings;
    match args.ctx {
        None => Ok(most.min(CONTEXT_TOKENS_DEFAULT)),
        Some(0) => Err(Failure::Usage("--ctx must be at least 1".into())),
        Some(n) if n > most => {
            Err(Failure::Usage(format!("--ctx {n}: this model was made for {most} tokens")))
        }
        Some(n) => Ok(n),
    }
}

/// Opens the model and starts its engine for `parallel` sequences at a time.
pub fn open_engine(args: &ModelArgs, parallel: usize, queue: usize) -> Result<Opened, Failure> {
    let (name, checkpoint) = open_checkpoint(args.model.as_deref())?;
    start_engine(name, &checkpoint, args, parallel, queue)
}

/// Starts the engine of a checkpoint.
pub fn start_engine(
    name: String,
    checkpoint: &Checkpoint,
    args: &ModelArgs,
    parallel: usize,
    queue: usize,
) -> Result<Opened, Failure> {
    let broken = |e: &dyn std::fmt::Display| Failure::Model(e.to_string());
    let file = |name: &str| checkpoint.file(name);
    let tokenizer_json = file("tokenizer.json").ok_or_else(|| broken(&"the folder has no tokenizer.json"))?;
    let tokenizer = Tokenizer::from_bytes(tokenizer_json, file("tokenizer_config.json"))
        .map_err(|e| broken(&format!("tokenizer.json: {e}")))?;
    let template = ChatTemplate::from_files(file("tokenizer_config.json"), file("chat_template.jinja"))
        .map_err(|e| broken(&format!("chat template: {e}")))?;
    let c = checkpoint.config();
    let context = context_tokens(args, checkpoint)?;
    let options = load_options(context, parallel);
    let backend = placed_backend(args, checkpoint, &options)?;
    let bar = LoadBar::new();
    let model = DeepSeek::load(checkpoint, Box::new(backend), options, &mut |done, of| bar.show(done, of))
        .map_err(|e| broken(&e))?;
    bar.finish();
    let text_of = |id: Option<u32>| id.map(|id| tokenizer.decode(&[id])).unwrap_or_default();
    let bos = text_of(c.bos_token_id.or(tokenizer.bos_id()));
    let eos = text_of(c.eos_token_ids.first().copied().or(tokenizer.eos_id()));
    let tokenizer = Arc::new(tokenizer);
    let engine_options = EngineOptions {
        sequences_max: parallel,
        queue_requests_max: queue,
        step_tokens_max: options.step_rows_max,
        eos_tokens: c.eos_token_ids.clone(),
        vocab_text: tokenizer.vocab_len(),
        ..EngineOptions::default()
    };
    Ok(Opened {
        name,
        engine: Engine::start(Box::new(model), tokenizer, engine_options),
        template,
        bos,
        eos,
        sampling: recommended_sampling(file("generation_config.json"))?,
    })
}

/// `generation_config.json`'s temperature and `top_p`, where `do_sample` is not false.
fn recommended_sampling(generation_config: Option<&[u8]>) -> Result<Sampling, Failure> {
    let mut sampling = Sampling::default();
    let Some(bytes) = generation_config else { return Ok(sampling) };
    let config: serde_json::Value =
        serde_json::from_slice(bytes).map_err(|e| Failure::Model(format!("generation_config.json: {e}")))?;
    if config["do_sample"] == false {
        sampling.temperature = 0.0;
        return Ok(sampling);
    }
    if let Some(t) = config["temperature"].as_f64() {
        sampling.temperature = t as f32;
    }
    if let Some(p) = config["top_p"].as_f64() {
        sampling.top_p = p as f32;
    }
    if let Some(k) = config["top_k"].as_u64() {
        sampling.top_k = k as usize;
    }
    Ok(sampling)
}

/// A progress bar that appears only when loading takes long enough to wonder.
struct LoadBar {
    bar: ProgressBar,
    started: std::time::Instant,
}

impl LoadBar {
    fn new() -> Self {
        Self { bar: ProgressBar::hidden(), started: std::time::Instant::now() }
    }

    fn show(&self, done: usize, of: usize) {
        if self.bar.is_hidden() && self.started.elapsed() > Duration::from_millis(500) {
            self.bar.set_draw_target(indicatif::ProgressDrawTarget::stderr());
            if let Ok(style) = ProgressStyle::with_template("loading {bar:40} {pos}/{len} layers {elapsed}") {
                self.bar.set_style(style);
            }
        }
        self.bar.set_length(of as u64);
        self.bar.set_position(done as u64);
    }

    fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
