//! What is measured: prompts and single tokens, after contexts of some depth.

use std::{
    cell::RefCell,
    time::{Duration, Instant},
};

use oxseek_backend_cpu::Limits;
use oxseek_model::{Batch, DeepSeek, LanguageModel, LogitRows, kv::blocks_for};
use oxseek_tensor::backend::{BLOCK_TOKENS, MultiplyAdds, OpCost};

use crate::{args::BenchArgs, failure::Failure};

/// `batch` sequences that go on for `tokens` tokens after `depth` tokens of context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Test {
    /// As one prompt each, one after the other; or token by token, together.
    pub prefill: bool,
    pub tokens: usize,
    pub batch: usize,
    pub depth: usize,
}

impl Test {
    /// The tests that the command line asks for at a depth.
    pub fn all(args: &BenchArgs, depth: usize) -> Vec<Self> {
        let mut tests = Vec::new();
        for batch in args.batch.iter().copied().map(usize::from) {
            for (prefill, tokens) in [(true, args.prompt as usize), (false, args.generate as usize)] {
                if tokens > 0 {
                    tests.push(Self { prefill, tokens, batch, depth });
                }
            }
        }
        tests
    }

    /// `pp512` for a prompt, `tg128` for generated tokens.
    pub fn name(&self) -> String {
        format!("{}{}", if self.prefill { "pp" } else { "tg" }, self.tokens)
    }

    /// Runs it `repeat` times, after one run that warms caches and pages.
    pub fn measure(&self, model: &mut DeepSeek, context: &Context, repeat: u16) -> Result<Runs, Failure> {
        self.once(model, context)?;
        model.take_profile();
        let mut seconds = Vec::new();
        for _ in 0..repeat {
            seconds.push(self.once(model, context)?);
        }
        seconds.sort_by(f64::total_cmp);
        Ok(Runs { seconds, costs: model.take_profile() })
    }

    /// Seconds of one run.
    fn once(&self, model: &mut DeepSeek, context: &Context) -> Result<f64, Failure> {
        let start = Instant::now();
        if self.prefill {
            for s in 0..self.batch {
                context.prefill(model, s, self.depth..self.depth + self.tokens)?;
            }
        } else {
            context.decode(model, self.batch, self.depth..self.depth + self.tokens)?;
        }
        Ok(start.elapsed().as_secs_f64())
    }
}

/// Some runs of one test.
pub struct Runs {
    /// Ascending.
    pub seconds: Vec<f64>,
    /// Of all runs together.
    pub costs: Vec<OpCost>,
}

impl Runs {
    /// Puts the runs beside the limits that were measured before and after them.
    pub fn measured(self, test: Test, limits: [Limits; 2]) -> Measured {
        Measured { test, seconds: self.seconds, costs: self.costs, limits }
    }
}

/// A test, its runs, and what the machine could do before and after them.
pub struct Measured {
    pub test: Test,
    /// Ascending; never empty.
    seconds: Vec<f64>,
    costs: Vec<OpCost>,
    pub limits: [Limits; 2],
}

impl Measured {
    /// The median of the runs, the slowest and the fastest.
    pub fn tokens_per_second(&self) -> [f64; 3] {
        let rate = |seconds: f64| (self.test.batch * self.test.tokens) as f64 / seconds;
        [self.median(), self.seconds[self.seconds.len() - 1], self.seconds[0]].map(rate)
    }

    /// What one run cost as a whole, in the time of the median run. Attention over the cache is read, but it is not
    /// part of the multiply-adds: they are those of the weights, as many at every depth.
    pub fn whole(&self) -> Cost {
        let per_run = |n: u64| n / self.seconds.len() as u64;
        let mut work = MultiplyAdds::default();
        self.costs.iter().for_each(|c| work += c.weights);
        let work =
            MultiplyAdds { f32: per_run(work.f32), bf16: per_run(work.bf16), bytes: per_run(work.bytes) };
        let bytes = per_run(self.costs.iter().map(|c| c.bytes).sum());
        Cost { op: "all", calls: 1, seconds: self.median(), bytes, work, limits: self.limits }
    }

    /// What one run cost op by op, in the mean of the runs, attention over the cache included.
    pub fn ops(&self) -> impl Iterator<Item = Cost> {
        let runs = self.seconds.len() as u64;
        self.costs.iter().map(move |c| {
            let mut work = c.weights;
            work += c.attention;
            Cost {
                op: c.op,
                calls: c.calls / runs,
                seconds: c.seconds / runs as f64,
                bytes: c.bytes / runs,
                work: MultiplyAdds { f32: work.f32 / runs, bf16: work.bf16 / runs, bytes: work.bytes / runs },
                limits: self.limits,
            }
        })
    }

    fn median(&self) -> f64 {
        self.seconds[self.seconds.len() / 2]
    }
}

/// What something cost, and what it would cost at the limits of the machine.
pub struct Cost {
    pub op: &'static str,
    pub calls: u64,
    pub seconds: f64,
    pub bytes: u64,
    pub work: MultiplyAdds,
    limits: [Limits; 2],
}

impl Cost {
    /// Bytes read per second.
    pub fn read(&self) -> f64 {
        self.bytes as f64 / self.seconds
    }

    /// Operations per second, two per multiply-add.
    pub fn multiply(&self) -> f64 {
        2.0 * self.work.total() as f64 / self.seconds
    }

    /// Operations per second that its mix of products could reach, before and after.
    pub fn multiply_limits(&self) -> [f64; 2] {
        self.limits.map(|l| 2.0 * self.work.total() as f64 / l.multiply_seconds(self.work))
    }

    /// The part of the read limit that it reached: the mean of before and after.
    pub fn read_part(&self) -> f64 {
        self.between().read_seconds(self.bytes) / self.seconds
    }

    /// The part of the multiply limit that it reached.
    pub fn multiply_part(&self) -> f64 {
        self.between().multiply_seconds(self.work) / self.seconds
    }

    fn between(&self) -> Limits {
        self.limits[0].mean(&self.limits[1])
    }
}

/// Sequences in the cache, each with blocks of its own.
pub struct Context {
    tables: Vec<Vec<u32>>,
    vocab: usize,
    /// Tokens that all sequences have in the cache.
    filled: usize,
    /// Most rows of a step of a prompt.
    step_rows: usize,
    logits: RefCell<Vec<f32>>,
}

impl Context {
    /// `sequences` empty sequences of at most `tokens` tokens.
    pub fn new(model: &DeepSeek, sequences: usize, tokens: usize, step_rows: usize) -> Self {
        let blocks = blocks_for(tokens);
        let table = |s: usize| (0..blocks).map(|b| (s * blocks + b) as u32).collect();
        Self {
            tables: (0..sequences).map(table).collect(),
            vocab: model.limits().vocab,
            filled: 0,
            step_rows,
            logits: RefCell::default(),
        }
    }

    /// Gives all sequences the first `depth` tokens: computed once, copied to the others. What the first had beyond
    /// its depth so far is written over.
    pub fn fill(&mut self, model: &mut DeepSeek, depth: usize) -> Result<(), Failure> {
        if depth <= self.filled {
            return Ok(());
        }
        self.prefill(model, 0, self.filled..depth)?;
        let (first, others) = self.tables.split_first().ok_or(Failure::Run("no sequence".into()))?;
        for other in others {
            for block in self.filled / BLOCK_TOKENS..blocks_for(depth) {
                model.copy_block(first[block], other[block]).map_err(|e| Failure::Run(e.to_string()))?;
            }
        }
        self.filled = depth;
        Ok(())
    }

    /// The time of the first answer token after a prompt of `tokens` tokens.
    pub fn prompt(&mut self, model: &mut DeepSeek, tokens: usize) -> Result<Duration, Failure> {
        let start = Instant::now();
        self.prefill(model, 0, 0..tokens)?;
        Ok(start.elapsed())
    }

    /// Computes the positions of a sequence as a part of its prompt.
    fn prefill(&self, model: &mut DeepSeek, s: usize, span: std::ops::Range<usize>) -> Result<(), Failure> {
        let mut batch = Batch::default();
        for from in span.clone().step_by(self.step_rows) {
            let to = span.end.min(from + self.step_rows);
            let tokens: Vec<u32> = (from..to).map(|p| token_at(p, self.vocab)).collect();
            let want = if to == span.end { LogitRows::Last } else { LogitRows::None };
            batch.clear();
            batch.push(&tokens, from, span.end, &self.tables[s][..blocks_for(to)], want);
            self.forward(model, &batch)?;
        }
        Ok(())
    }

    /// Computes the positions of the first `sequences` sequences one by one.
    fn decode(
        &self,
        model: &mut DeepSeek,
        sequences: usize,
        span: std::ops::Range<usize>,
    ) -> Result<(), Failure> {
        let mut batch = Batch::default();
        for position in span {
            batch.clear();
            for (s, table) in self.tables.iter().take(sequences).enumerate() {
                let token = token_at(position * sequences + s, self.vocab);
                batch.push(&[token], position, 0, &table[..=position / BLOCK_TOKENS], LogitRows::Last);
            }
            self.forward(model, &batch)?;
        }
        Ok(())
    }

    /// The logits have room of their own, as in the engine: new memory for each step would be measured too.
    fn forward(&self, model: &mut DeepSeek, batch: &Batch) -> Result<(), Failure> {
        let (mut logits, wanted) = (self.logits.borrow_mut(), batch.logit_rows() * self.vocab);
        if logits.len() < wanted {
            logits.resize(wanted, 0.0);
        }
        model.forward(batch, &mut logits[..wanted]).map_err(|e| Failure::Run(e.to_string()))
    }
}

/// Tokens that visit many experts, the same in every run.
fn token_at(i: usize, vocab: usize) -> u32 {
    ((i as u64 * 2_654_435_761 + 12_345) % vocab as u64) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { read: 100.0, multiply: [10.0, 20.0, 40.0] };

    fn cost(op: &'static str, seconds: f64, bytes: u64, weights: u64, attention: u64) -> OpCost {
        let f32s = |f32: u64| MultiplyAdds { f32, ..MultiplyAdds::default() };
        OpCost { op, calls: 4, seconds, bytes, weights: f32s(weights), attention: f32s(attention) }
    }

    fn measured() -> Measured {
        let costs = vec![cost("matmul", 2.0, 200, 10, 0), cost("mla_attend", 2.0, 100, 2, 6)];
        let test = Test { prefill: false, tokens: 8, batch: 2, depth: 64 };
        let faster = Limits { read: 300.0, ..LIMITS };
        Runs { seconds: vec![1.0, 3.0], costs }.measured(test, [LIMITS, faster])
    }

    #[test]
    fn rates_are_those_of_one_run() {
        let m = measured();
        assert_eq!(m.tokens_per_second(), [16.0 / 3.0, 16.0 / 3.0, 16.0]);
        let whole = m.whole();
        assert_eq!((whole.bytes, whole.work.total()), (150, 6));
        assert_eq!((whole.read(), whole.multiply()), (50.0, 4.0));
        // The read limit is 200 between 100 and 300.
        assert!((whole.read_part() - 0.25).abs() < 1e-12);
        assert!((whole.multiply_part() - 0.4).abs() < 1e-12);
    }

    #[test]
    fn attention_counts_for_its_op_only() {
        let m = measured();
        let ops: Vec<(u64, u64, f64)> = m.ops().map(|c| (c.calls, c.work.total(), c.seconds)).collect();
        assert_eq!(ops, [(2, 5, 1.0), (2, 4, 1.0)]);
    }
}
