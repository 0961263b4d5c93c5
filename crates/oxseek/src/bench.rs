//! `oxseek bench`: prefill and decode speed, and how near it comes to what the memory can deliver.

use std::{io::Write, time::Instant};

use oxseek_backend_cpu::read_bandwidth;
use oxseek_model::{Batch, DeepSeek, Footprint, LanguageModel, LoadOptions, LogitRows, kv::blocks_for};
use oxseek_tensor::backend::{BLOCK_TOKENS, OpCost};

use crate::{
    args::BenchArgs,
    failure::Failure,
    inspect::size,
    open::{cpu_backend, open_checkpoint},
};

/// Rows of one prefill step.
const STEP_ROWS_MAX: usize = 512;

/// One line of the table.
struct Row {
    test: String,
    batch: usize,
    tokens_per_second: f64,
    /// Slowest and fastest run.
    spread: (f64, f64),
    /// Weight bytes per second, for tests that read all active weights per step.
    bytes_per_second: Option<f64>,
}

/// Measures and prints the table.
pub fn bench(args: &BenchArgs) -> Result<(), Failure> {
    let (name, checkpoint) = open_checkpoint(args.model.model.as_deref())?;
    let footprint = Footprint::of(&checkpoint, args.model.cache_format());
    let (prompt, generate) = (args.prompt as usize, args.generate as usize);
    let batch_max = args.batch.iter().copied().max().map_or(1, usize::from);
    let tokens = prompt.max(generate) + 1;
    let most = checkpoint.config().max_position_embeddings;
    if tokens > most {
        return Err(Failure::Usage(format!("{tokens} tokens: this model was made for {most}")));
    }
    let backend = cpu_backend(&args.model)?;
    let threads = backend.threads();
    let options = LoadOptions {
        context_tokens_max: tokens,
        cache_blocks: batch_max * blocks_for(tokens),
        step_rows_max: STEP_ROWS_MAX.max(batch_max),
        logit_rows_max: batch_max,
        cache_format: args.model.cache_format(),
    };
    let mut model = DeepSeek::load(&checkpoint, Box::new(backend), options, &mut |_, _| {})
        .map_err(|e| Failure::Model(e.to_string()))?;
    model.settle().map_err(|e| Failure::Run(e.to_string()))?;
    let limit = read_bandwidth(threads).map_err(|e| Failure::Run(e.to_string()))?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "model      {name}, {} active weights per token", size(footprint.bytes_per_token))?;
    writeln!(out, "device     {}", model.device().device)?;
    writeln!(out, "memory     {:.1} GB/s read by {threads} threads in 2 MiB pages", limit / 1e9)?;
    writeln!(out, "\n| test  | batch | tokens/s | slowest-fastest | bytes/token | GB/s  | % of read |")?;
    writeln!(out, "|-------|-------|----------|-----------------|-------------|-------|-----------|")?;
    let mut profiles = Vec::new();
    for &batch in &args.batch {
        for (test, count, prefill) in [("pp", prompt, true), ("tg", generate, false)] {
            let run = Run { batch: batch.into(), count, prefill };
            let row = run.measure(&mut model, &format!("{test}{count}"), args.repeat, &footprint)?;
            print_row(&mut out, &row, &footprint, limit)?;
            profiles.push((row.test, batch, usize::from(args.repeat), model.take_profile()));
        }
    }
    if args.profile {
        for (test, batch, runs, costs) in profiles {
            writeln!(out, "\n{test}, batch {batch}, by op and run")?;
            print_profile(&mut out, runs, &costs, limit)?;
        }
    }
    Ok(())
}

/// Where the time of a test went.
fn print_profile(out: &mut impl Write, runs: usize, costs: &[OpCost], limit: f64) -> Result<(), Failure> {
    writeln!(out, "| op           |  calls | milliseconds | % of time |  GB/s | % of read |")?;
    writeln!(out, "|--------------|--------|--------------|-----------|-------|-----------|")?;
    let total: f64 = costs.iter().map(|c| c.seconds).sum();
    for c in costs {
        let rate = c.bytes as f64 / c.seconds;
        writeln!(
            out,
            "| {:<12} | {:>6} | {:>12.2} | {:>9.1} | {:>5.1} | {:>9.0} |",
            c.op,
            c.calls / runs as u64,
            c.seconds * 1e3 / runs as f64,
            c.seconds / total * 100.0,
            rate / 1e9,
            rate / limit * 100.0
        )?;
    }
    Ok(())
}

fn print_row(out: &mut impl Write, r: &Row, f: &Footprint, limit: f64) -> Result<(), Failure> {
    let spread = format!("{:.0}-{:.0}", r.spread.0, r.spread.1);
    let (bytes, rate, part) = match r.bytes_per_second {
        Some(b) => (size(f.bytes_per_token), format!("{:.2}", b / 1e9), format!("{:.0}", b / limit * 100.0)),
        None => ("-".into(), "-".into(), "-".into()),
    };
    writeln!(
        out,
        "| {:<5} | {:>5} | {:>8.1} | {spread:>15} | {bytes:>11} | {rate:>5} | {part:>9} |",
        r.test, r.batch, r.tokens_per_second
    )?;
    out.flush()?;
    Ok(())
}

/// One test: `batch` sequences of `count` tokens, as one prompt each or token by token.
struct Run {
    batch: usize,
    count: usize,
    prefill: bool,
}

impl Run {
    fn measure(&self, model: &mut DeepSeek, test: &str, repeat: u16, f: &Footprint) -> Result<Row, Failure> {
        self.once(model)?; // warms caches and pages
        model.take_profile();
        let mut rates = Vec::new();
        for _ in 0..repeat {
            rates.push((self.batch * self.count) as f64 / self.once(model)?);
        }
        rates.sort_by(f64::total_cmp);
        let rate = rates[rates.len() / 2];
        Ok(Row {
            test: test.into(),
            batch: self.batch,
            tokens_per_second: rate,
            spread: (rates[0], rates[rates.len() - 1]),
            // With one sequence each token reads all active weights; in a batch they share reads.
            bytes_per_second: (!self.prefill && self.batch == 1).then_some(rate * f.bytes_per_token as f64),
        })
    }

    /// Seconds of one run.
    fn once(&self, model: &mut DeepSeek) -> Result<f64, Failure> {
        let vocab = model.limits().vocab;
        let blocks = blocks_for(self.count + 1);
        let tables: Vec<Vec<u32>> =
            (0..self.batch).map(|s| (0..blocks).map(|b| (s * blocks + b) as u32).collect()).collect();
        let mut logits = vec![0.0; self.batch * vocab];
        let mut batch = Batch::default();
        let mut forward = |model: &mut DeepSeek, batch: &Batch| {
            let wanted = batch.logit_rows() * vocab;
            model.forward(batch, &mut logits[..wanted]).map_err(|e| Failure::Run(e.to_string()))
        };
        let start = Instant::now();
        if self.prefill {
            for table in &tables {
                for from in (0..self.count).step_by(STEP_ROWS_MAX) {
                    let to = self.count.min(from + STEP_ROWS_MAX);
                    let tokens: Vec<u32> = (from..to).map(|p| token_at(p, vocab)).collect();
                    let want = if to == self.count { LogitRows::Last } else { LogitRows::None };
                    batch.clear();
                    batch.push(&tokens, from, self.count, &table[..to.div_ceil(BLOCK_TOKENS)], want);
                    forward(model, &batch)?;
                }
            }
        } else {
            for position in 0..self.count {
                batch.clear();
                for (s, table) in tables.iter().enumerate() {
                    let token = token_at(position * self.batch + s, vocab);
                    batch.push(&[token], position, 0, &table[..=position / BLOCK_TOKENS], LogitRows::Last);
                }
                forward(model, &batch)?;
            }
        }
        Ok(start.elapsed().as_secs_f64())
    }
}

/// Tokens that visit many experts, the same in every run.
fn token_at(i: usize, vocab: usize) -> u32 {
    ((i as u64 * 2_654_435_761 + 12_345) % vocab as u64) as u32
}
