//! `oxseek bench`: how fast the model starts, prefills and decodes, and how near it comes to what the machine can do.

mod cold;
mod gpu;
mod kernels;
mod report;
mod test;

use std::time::Instant;

use oxseek_backend_cpu::LimitProbe;
use oxseek_model::{DeepSeek, Footprint, LoadOptions, kv::blocks_for};
use oxseek_tensor::CacheFormat;

use self::{
    cold::Cold,
    report::{Machine, Report, Start},
    test::{Context, Test},
};
use crate::{
    args::{BenchArgs, DeviceArg},
    failure::Failure,
    open::{cpu_backend, open_checkpoint, placed_backend},
};

/// Tokens of the prompt whose first answer token is timed right after loading.
const START_TOKENS: usize = 32;

/// Measures and prints. `started` is when the process began.
pub fn bench(args: &BenchArgs, started: Instant) -> Result<(), Failure> {
    if let DeviceArg::Cuda(ordinal) = args.model.device {
        return gpu::bench(args, ordinal, started);
    }
    if args.shape.is_some() {
        return Err(Failure::Usage("--shape makes its weights on a GPU: give --device cuda".into()));
    }
    if args.kernels {
        return Err(Failure::Usage("--kernels measures a GPU's: give --device cuda".into()));
    }
    let mut report = Report::new(args.format, args.profile);
    if args.limit {
        let backend = cpu_backend(&args.model)?;
        let limits = probe(backend.level(), backend.threads())?.measure();
        return report.limits(&Machine::of(&backend), &limits);
    }
    let sizes = Sizes::of(args)?;
    let cold = args.cold.then(|| make_cold(args)).transpose()?;
    // What came before was no part of a start.
    let started = if cold.is_some() { Instant::now() } else { started };
    let (name, checkpoint) = open_checkpoint(args.model.model.as_deref())?;
    let footprint = Footprint::of(&checkpoint, args.model.cache_format());
    let most = checkpoint.config().max_position_embeddings;
    if sizes.tokens > most {
        return Err(Failure::Usage(format!("{} tokens: this model was made for {most}", sizes.tokens)));
    }
    let backend = placed_backend(&args.model, &checkpoint, &sizes.options())?;
    let machine = Machine::of(&backend);
    let (level, threads) = (backend.level(), backend.threads());
    let mut model = DeepSeek::load(&checkpoint, Box::new(backend), sizes.options(), &mut |_, _| {})
        .map_err(|e| Failure::Model(e.to_string()))?;
    let load = started.elapsed();
    let mut context = Context::new(&model, sizes.batch, sizes.tokens, sizes.step_rows);
    let first_token = context.prompt(&mut model, START_TOKENS)?;
    let first_token_at = started.elapsed();
    let since = Instant::now();
    model.settle().map_err(|e| Failure::Run(e.to_string()))?;
    let packing = since.elapsed();
    let probe = probe(level, threads)?;
    let mut limits = probe.measure();
    let start = Start { load, prompt: START_TOKENS, first_token, first_token_at, packing, cold };
    report.begin(&name, &machine, &footprint, &start, &limits)?;
    for &depth in &sizes.depths {
        context.fill(&mut model, depth)?;
        for test in Test::all(args, depth) {
            let runs = test.measure(&mut model, &context, args.repeat)?;
            let before = std::mem::replace(&mut limits, probe.measure());
            report.add(runs.measured(test, [before, limits]))?;
        }
    }
    report.end()
}

fn make_cold(args: &BenchArgs) -> Result<Cold, Failure> {
    let Some(path) = &args.model.model else {
        return Err(Failure::Usage("--cold needs --model: the built-in model is part of the program".into()));
    };
    Cold::prepare(path, cpu_backend(&args.model)?.threads())
}

fn probe(level: oxseek_backend_cpu::Level, threads: usize) -> Result<LimitProbe, Failure> {
    LimitProbe::new(level, threads).map_err(|e| Failure::Run(e.to_string()))
}

/// How large everything must be.
struct Sizes {
    /// Ascending.
    depths: Vec<usize>,
    batch: usize,
    /// Longest sequence.
    tokens: usize,
    /// Most rows of a step of a prompt.
    step_rows: usize,
    cache_format: CacheFormat,
}

impl Sizes {
    fn of(args: &BenchArgs) -> Result<Self, Failure> {
        if args.prompt == 0 && args.generate == 0 {
            return Err(Failure::Usage("--prompt 0 --generate 0: nothing to measure".into()));
        }
        let mut depths: Vec<usize> = args.depth.iter().map(|d| *d as usize).collect();
        depths.sort_unstable();
        depths.dedup();
        let deepest = depths.last().copied().unwrap_or(0);
        Ok(Self {
            batch: args.batch.iter().copied().max().map_or(1, usize::from),
            tokens: START_TOKENS.max(deepest + args.prompt.max(args.generate) as usize) + 1,
            depths,
            step_rows: args.step_rows.into(),
            cache_format: args.model.cache_format(),
        })
    }

    fn options(&self) -> LoadOptions {
        LoadOptions {
            context_tokens_max: self.tokens,
            cache_blocks: self.batch * blocks_for(self.tokens),
            step_rows_max: self.step_rows.max(self.batch),
            logit_rows_max: self.batch,
            cache_format: self.cache_format,
        }
    }
}
