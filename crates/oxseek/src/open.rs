//! From the command line to a checkpoint, a backend, an engine.

use std::{path::Path, sync::Arc, time::Duration};

use indicatif::{ProgressBar, ProgressStyle};
use oxseek_backend_cpu::{CpuBackend, CpuOptions};
use oxseek_engine::{Engine, EngineHandle, EngineOptions, Sampling};
use oxseek_model::{DeepSeek, LoadOptions, kv::blocks_for};
use oxseek_tensor::CacheFormat;
use oxseek_text::ChatTemplate;
use oxseek_weights::{Checkpoint, Gguf, gguf::Value};

use crate::{
    args::ModelArgs,
    device::chosen_backend,
    failure::Failure,
    plan::{need::Experts, place_experts},
    wording::Wording,
};

/// Context of a conversation when nobody asks for another, in tokens.
pub const CONTEXT_TOKENS_DEFAULT: usize = 4096;
/// Rows of one step: the most prompt tokens that are computed between two tokens of the other sequences.
const STEP_ROWS_MAX: usize = 512;
/// Rows of one step where there are no other sequences: fewer steps read the experts' weights fewer times.
pub const STEP_ROWS_ALONE: u16 = 2048;
/// Rows of one step that prompts may be scored with (`prompt_logprobs`), beside one per request.
const SCORE_ROWS_MAX: usize = 32;

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

/// Longest name of a model that is taken from its file.
const NAME_CHARS_MAX: usize = 200;

/// Opens a checkpoint folder, a GGUF file or the built-in demo model; says on standard error what had to be guessed.
pub fn open_checkpoint(path: Option<&Path>) -> Result<(String, Checkpoint), Failure> {
    let Some(path) = path else { return open_demo() };
    let checkpoint = Checkpoint::open(path).map_err(|e| Failure::Model(e.to_string()))?;
    for warning in checkpoint.warnings() {
        eprintln!("oxseek: warning: {warning}");
    }
    let full = path.canonicalize().unwrap_or_else(|_| path.into());
    let last = if full.is_dir() { full.file_name() } else { full.file_stem() };
    let of_path = || last.map_or_else(|| "model".into(), |n| n.to_string_lossy().into_owned());
    let name = checkpoint.gguf().and_then(name_in).unwrap_or_else(of_path);
    Ok((name, checkpoint))
}

/// The name that the metadata gives, if it is fit for a terminal and an API.
fn name_in(gguf: &Gguf) -> Option<String> {
    let name = gguf.get("general.name").and_then(Value::as_text)?.trim();
    let fit = !name.is_empty() && name.chars().count() <= NAME_CHARS_MAX && !name.contains(char::is_control);
    fit.then(|| name.to_string())
}

#[cfg(feature = "demo")]
fn open_demo() -> Result<(String, Checkpoint), Failure> {
    let checkpoint =
        Checkpoint::from_files(crate::demo::files()).map_err(|e| Failure::Model(e.to_string()))?;
    Ok((crate::demo::NAME.into(), checkpoint))
}

#[cfg(not(feature = "demo"))]
fn open_demo() -> Result<(String, Checkpoint), Failure> {
    Err(Failure::Usage("this build has no built-in model: give one with --model PATH".into()))
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
pub fn load_options(context: usize, parallel: usize, cache_format: CacheFormat) -> LoadOptions {
    let step_rows = if parallel == 1 { context.min(STEP_ROWS_ALONE.into()) } else { STEP_ROWS_MAX };
    LoadOptions {
        context_tokens_max: context,
        cache_blocks: parallel * blocks_for(context),
        step_rows_max: step_rows.max(parallel),
        logit_rows_max: parallel + SCORE_ROWS_MAX,
        cache_format,
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
    let context = context_tokens(args, checkpoint)?;
    let options = load_options(context, parallel, args.cache_format());
    // Reading the vocabulary takes about as long as loading the weights, so a thread of its own does it.
    let (wording, model) = std::thread::scope(|scope| {
        let wording = scope.spawn(|| Wording::of(checkpoint));
        let model = load_model(checkpoint, args, options);
        let died = || Failure::Run("reading the vocabulary failed".into());
        (wording.join().unwrap_or_else(|_| Err(died())), model)
    });
    let Wording { tokenizer, template, sampling } = wording?;
    let (model, c) = (model?, checkpoint.config());
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
        sampling,
    })
}

fn load_model(checkpoint: &Checkpoint, args: &ModelArgs, options: LoadOptions) -> Result<DeepSeek, Failure> {
    let backend = chosen_backend(args, checkpoint, &options)?;
    let bar = LoadBar::new();
    let model = DeepSeek::load(checkpoint, backend, options, &mut |done, of| bar.show(done, of))
        .map_err(|e| Failure::Model(e.to_string()))?;
    bar.finish();
    Ok(model)
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
