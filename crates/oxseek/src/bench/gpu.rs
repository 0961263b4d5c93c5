//! How fast a GPU prefills and decodes, and how near decoding comes to what its memory can do.

use std::{
    io::Write,
    sync::atomic::Ordering::Relaxed,
    time::{Duration, Instant},
};

use oxseek_backend_cuda::{CudaBackend, CudaOptions, Precision};
use oxseek_model::{DeepSeek, Footprint};
use oxseek_tensor::Backend as _;
use oxseek_weights::Checkpoint;
use serde_json::json;

use super::{
    START_TOKENS, Sizes, kernels,
    test::{Context, Test},
};
use crate::{
    args::{BenchArgs, BenchFormat},
    device::cuda_options,
    failure::Failure,
    open::open_checkpoint,
    synth,
};

/// Measures and prints.
pub fn bench(args: &BenchArgs, ordinal: u16, started: Instant) -> Result<(), Failure> {
    let run = |e: oxseek_tensor::Error| Failure::Run(e.to_string());
    let mut options = cuda_options(&args.model, ordinal);
    let usage = |e: oxseek_tensor::Error| Failure::Usage(format!("--device cuda:{ordinal}: {e}"));
    let mut backend = CudaBackend::new(options).map_err(usage)?;
    let copy = backend.copy_bandwidth().map_err(run)?;
    if args.limit {
        println!(
            "device     {}\nmemory     {:.0} GB/s read and written in a copy",
            backend.info().device,
            copy / 1e9
        );
        return Ok(());
    }
    if args.kernels {
        options = CudaOptions { precision: Precision::Native, random_weights: true, ..options };
        let backend = CudaBackend::new(options).map_err(usage)?;
        return kernels::bench(backend, copy, args.repeat, args.format);
    }
    if args.profile {
        return Err(Failure::Usage("--profile: a GPU runs a step as a whole, its ops are not timed".into()));
    }
    let sizes = Sizes::of(args)?;
    let (name, checkpoint) = match &args.shape {
        None => open_checkpoint(args.model.model.as_deref())?,
        Some(shape) => (format!("{shape} {}, random", args.weights), synth::hollow(shape, args.weights)?),
    };
    let most = checkpoint.config().max_position_embeddings;
    if sizes.tokens > most {
        return Err(Failure::Usage(format!("{} tokens: this model was made for {most}", sizes.tokens)));
    }
    options.random_weights = args.shape.is_some();
    backend = CudaBackend::new(options).map_err(usage)?;
    let device = backend.info().device;
    let waited = backend.waited();
    let mut model = DeepSeek::load(&checkpoint, Box::new(backend), sizes.options(), &mut |_, _| {})
        .map_err(|e| Failure::Model(e.to_string()))?;
    let load = started.elapsed();
    let mut context = Context::new(&model, sizes.batch, sizes.tokens, sizes.step_rows);
    context.prompt(&mut model, START_TOKENS)?;
    let machine = Machine { device, copy, load, first_token: started.elapsed() };
    let reads = Reads::of(&checkpoint, args);
    let mut rows = Vec::new();
    machine.begin(args.format, &name)?;
    for &depth in &sizes.depths {
        context.fill(&mut model, depth)?;
        for test in Test::all(args, depth) {
            let (began, before) = (Instant::now(), waited.load(Relaxed));
            let steps = (usize::from(args.repeat) + 1) * test.tokens;
            let seconds = test.measure(&mut model, &context, args.repeat)?.seconds;
            let on_host = began.elapsed().saturating_sub(Duration::from_nanos(waited.load(Relaxed) - before));
            let mut row = Row::new(test, &seconds, &reads, copy);
            row.host_seconds = (!test.prefill).then(|| on_host.as_secs_f64() / steps as f64);
            row.print(args.format)?;
            rows.push(row);
        }
    }
    if args.format == BenchFormat::Json {
        let tests: Vec<_> = rows.iter().map(Row::json).collect();
        let mut out = std::io::stdout().lock();
        writeln!(
            out,
            "{:#}",
            json!({
                "model": name,
                "device": machine.device,
                "copy_bytes_per_second": copy,
                "load_seconds": load.as_secs_f64(),
                "process_to_first_token_seconds": machine.first_token.as_secs_f64(),
                "tests": tests,
            })
        )?;
    }
    Ok(())
}

struct Machine {
    device: String,
    /// Bytes per second.
    copy: f64,
    /// From the start of the process until the model could run.
    load: Duration,
    /// From the start of the process to the first token.
    first_token: Duration,
}

impl Machine {
    fn begin(&self, format: BenchFormat, name: &str) -> Result<(), Failure> {
        let mut out = std::io::stdout().lock();
        match format {
            BenchFormat::Json => {}
            BenchFormat::Csv => writeln!(
                out,
                "test,batch,depth,tokens_per_second,slowest,fastest,step_seconds,host_seconds,bytes_per_step,\
                 bytes_per_second,copy_part"
            )?,
            BenchFormat::Table => {
                writeln!(out, "model      {name}")?;
                writeln!(out, "device     {}", self.device)?;
                writeln!(out, "memory     {:.0} GB/s in a copy, read and written", self.copy / 1e9)?;
                let (load, first) = (self.load.as_secs_f64(), self.first_token.as_secs_f64());
                writeln!(out, "start      loaded after {load:.2} s, first token after {first:.2} s\n")?;
                writeln!(
                    out,
                    "{:>7} {:>5} {:>6} {:>10} {:>19} {:>8} {:>8} {:>10} {:>7} {:>9}",
                    "test",
                    "batch",
                    "depth",
                    "tokens/s",
                    "slowest-fastest",
                    "ms/step",
                    "ms host",
                    "MB/step",
                    "GB/s",
                    "% of copy"
                )?;
            }
        }
        Ok(())
    }
}

/// Bytes that a step of decoding reads.
struct Reads {
    /// All weights but the routed experts.
    dense: f64,
    routed: f64,
    /// The part of the experts that a token chooses.
    chosen: f64,
    cache_per_token: f64,
}

impl Reads {
    fn of(checkpoint: &Checkpoint, args: &BenchArgs) -> Self {
        let footprint = Footprint::of(checkpoint, args.model.cache_format());
        let c = checkpoint.config();
        let chosen = c.num_experts_per_tok as f64 / c.n_routed_experts.max(1) as f64;
        let is_expert = |name: &str| name.contains(".mlp.experts.");
        let routed: usize = checkpoint.tensors().filter(|t| is_expert(&t.model_name)).map(|t| t.bytes).sum();
        let routed = routed as f64;
        Self {
            dense: footprint.bytes_per_token as f64 - routed * chosen,
            routed,
            chosen,
            cache_per_token: footprint.cache_bytes_per_token as f64,
        }
    }

    /// Bytes of a step of `batch` sequences with `depth` tokens each. Which experts several tokens share is up to the
    /// router, and that of random weights is far from even: with experts only a single token's bytes are known.
    fn step(&self, batch: usize, depth: f64) -> Option<f64> {
        let touched = if batch == 1 { self.chosen } else { 1.0 };
        let known = batch == 1 || self.routed == 0.0;
        known.then_some(self.dense + self.routed * touched + batch as f64 * depth * self.cache_per_token)
    }
}

/// A test and what came of it.
struct Row {
    test: Test,
    /// Of the median run, the slowest and the fastest.
    tokens_per_second: [f64; 3],
    /// Decoding only: seconds of a step.
    step_seconds: Option<f64>,
    /// Decoding only: seconds of a step in which the device is not waited for, in the mean.
    host_seconds: Option<f64>,
    /// If known: bytes of a step, bytes per second and their part of the copy's.
    bytes: Option<[f64; 3]>,
}

impl Row {
    /// `seconds` are those of the runs, ascending.
    fn new(test: Test, seconds: &[f64], reads: &Reads, copy: f64) -> Self {
        let picked = [seconds[seconds.len() / 2], seconds[seconds.len() - 1], seconds[0]];
        let step_seconds = (!test.prefill).then(|| picked[0] / test.tokens as f64);
        let bytes = step_seconds.and_then(|seconds| {
            let bytes = reads.step(test.batch, test.depth as f64 + test.tokens as f64 / 2.0)?;
            Some([bytes, bytes / seconds, bytes / seconds / copy])
        });
        let tokens_per_second = picked.map(|s| (test.batch * test.tokens) as f64 / s);
        Self { test, tokens_per_second, step_seconds, host_seconds: None, bytes }
    }

    fn print(&self, format: BenchFormat) -> Result<(), Failure> {
        let mut out = std::io::stdout().lock();
        let ([median, slowest, fastest], t) = (self.tokens_per_second, &self.test);
        let name = t.name();
        match format {
            BenchFormat::Json => {}
            BenchFormat::Csv => {
                let number = |n: Option<f64>| n.map_or(String::new(), |n| n.to_string());
                let (seconds, host) = (number(self.step_seconds), number(self.host_seconds));
                let bytes = self.bytes.map_or(",,".into(), |[b, r, p]| format!("{b},{r},{p}"));
                let (batch, depth) = (t.batch, t.depth);
                writeln!(
                    out,
                    "{name},{batch},{depth},{median},{slowest},{fastest},{seconds},{host},{bytes}"
                )?;
            }
            BenchFormat::Table => {
                let spread = format!("{slowest:.1}-{fastest:.1}");
                write!(out, "{name:>7} {:>5} {:>6} {median:>10.1} {spread:>19}", t.batch, t.depth)?;
                if let Some(seconds) = self.step_seconds {
                    write!(out, " {:>8.3}", seconds * 1e3)?;
                }
                if let Some(seconds) = self.host_seconds {
                    write!(out, " {:>8.3}", seconds * 1e3)?;
                }
                if let Some([bytes, rate, part]) = self.bytes {
                    write!(out, " {:>10.1} {:>7.0} {:>9.1}", bytes / 1e6, rate / 1e9, part * 100.0)?;
                }
                writeln!(out)?;
            }
        }
        Ok(())
    }

    fn json(&self) -> serde_json::Value {
        let [median, slowest, fastest] = self.tokens_per_second;
        let part = |i: usize| self.bytes.map(|b| b[i]);
        json!({
            "test": self.test.name(), "batch": self.test.batch, "depth": self.test.depth,
            "tokens_per_second": median, "slowest": slowest, "fastest": fastest, "step_seconds": self.step_seconds,
            "host_seconds": self.host_seconds, "bytes_per_step": part(0), "bytes_per_second": part(1),
            "copy_part": part(2),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READS: Reads = Reads { dense: 100.0, routed: 1000.0, chosen: 0.1, cache_per_token: 2.0 };

    #[test]
    fn a_step_reads_what_its_token_touches() {
        assert_eq!(READS.step(1, 5.0), Some(210.0));
        assert_eq!(READS.step(2, 5.0), None);
        assert_eq!(Reads { routed: 0.0, ..READS }.step(2, 5.0), Some(120.0));
    }

    #[test]
    fn rates_are_those_of_the_median_run() {
        let test = Test { prefill: false, tokens: 10, batch: 1, depth: 0 };
        let row = Row::new(test, &[1.0, 2.0, 5.0], &READS, 1e4);
        assert_eq!(row.tokens_per_second, [5.0, 2.0, 10.0]);
        let [bytes, rate, part] = row.bytes.unwrap_or_default();
        assert!((bytes - 210.0).abs() < 1e-9 && (rate - 1050.0).abs() < 1e-9 && (part - 0.105).abs() < 1e-12);
        let prefill = Row::new(Test { prefill: true, ..test }, &[1.0], &READS, 1e4);
        assert!(prefill.step_seconds.is_none() && prefill.bytes.is_none());
    }
}
