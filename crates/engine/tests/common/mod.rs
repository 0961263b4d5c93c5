//! A fake model whose every logit depends on the whole history as the cache holds it: a wrong block table, a missed
//! copy or a lost preemption changes the text.
#![allow(dead_code, clippy::unwrap_used, reason = "tests; each file uses a part")]

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use oxseek_engine::{
    Engine, EngineHandle, EngineOptions, Event, FinishReason, Request, Sampling, Stats, Ticket, Usage,
};
use oxseek_model::{Batch, LanguageModel, LogitRows, ModelError, ModelLimits, kv::BLOCK_TOKENS};
use oxseek_text::Tokenizer;

pub const VOCAB: usize = 300;
/// The fake hidden state is the beginning of the row of logits.
pub const HIDDEN: usize = 8;
/// A token on which the fake model fails, one on which it panics, one on which one of its logits is NaN.
pub const FAIL: u32 = 297;
pub const PANIC: u32 = 298;
pub const BROKEN: u32 = 299;
/// A token after which the fake model panics in every step.
pub const FATAL: u32 = 296;

pub struct Fake {
    limits: ModelLimits,
    cache: Vec<[u32; BLOCK_TOKENS]>,
    step: Duration,
    /// Rows that were computed.
    rows: Arc<AtomicU64>,
    hidden: Vec<f32>,
    fatal: bool,
}

impl Fake {
    pub fn new(cache_blocks: usize, step: Duration) -> Self {
        let limits = ModelLimits {
            vocab: VOCAB,
            context_tokens_max: 1000,
            cache_blocks,
            step_rows_max: 64,
            logit_rows_max: 8 + 4,
            hidden: HIDDEN,
        };
        Self {
            limits,
            cache: vec![[0; BLOCK_TOKENS]; cache_blocks],
            step,
            rows: Arc::default(),
            hidden: Vec::new(),
            fatal: false,
        }
    }

    fn row(&self, blocks: &[u32], length: usize, out: &mut [f32]) {
        let history = (0..length).map(|p| self.cache[blocks[p / BLOCK_TOKENS] as usize][p % BLOCK_TOKENS]);
        let state = history
            .fold(17u64, |h, t| h.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(u64::from(t) + 1));
        for (i, logit) in out.iter_mut().enumerate() {
            let x = (state ^ (i as u64).wrapping_mul(0x9E37_79B9)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            *logit = (x >> 40) as f32 / (1 << 22) as f32;
        }
        // The special ones are never chosen.
        out[FATAL as usize..].fill(-100.0);
    }
}

impl LanguageModel for Fake {
    fn limits(&self) -> ModelLimits {
        self.limits
    }

    fn forward(&mut self, batch: &Batch, logits: &mut [f32]) -> Result<(), ModelError> {
        assert!(
            batch.tokens.len() <= self.limits.step_rows_max
                && batch.logit_rows() <= self.limits.logit_rows_max
        );
        std::thread::sleep(self.step);
        self.rows.fetch_add(batch.tokens.len() as u64, Relaxed);
        if batch.tokens.contains(&FAIL) {
            return Err(ModelError::Batch("asked to fail".into()));
        }
        self.fatal |= batch.tokens.contains(&FATAL);
        assert!(!self.fatal && !batch.tokens.contains(&PANIC), "asked to panic");
        let mut rows = logits.chunks_exact_mut(VOCAB);
        for s in &batch.sequences {
            let blocks = &batch.blocks[s.blocks.clone()];
            for (i, &token) in batch.tokens[s.tokens.clone()].iter().enumerate() {
                let p = s.start + i;
                self.cache[blocks[p / BLOCK_TOKENS] as usize][p % BLOCK_TOKENS] = token;
            }
            let end = s.start + s.tokens.len();
            let from = match s.logits {
                LogitRows::None => end,
                LogitRows::Last => end - 1,
                LogitRows::All => s.start,
            };
            for length in from + 1..=end {
                let out = rows.next().unwrap();
                self.row(blocks, length, out);
                if batch.tokens[s.tokens.clone()].contains(&BROKEN) {
                    out[5] = f32::NAN;
                }
            }
        }
        self.hidden = logits.chunks_exact(VOCAB).flat_map(|row| row[..HIDDEN].to_vec()).collect();
        Ok(())
    }

    fn read_hidden(&mut self, rows: usize, out: &mut [f32]) -> Result<(), ModelError> {
        out.copy_from_slice(&self.hidden[..rows * HIDDEN]);
        Ok(())
    }

    fn copy_block(&mut self, from: u32, to: u32) -> Result<(), ModelError> {
        self.cache[to as usize] = self.cache[from as usize];
        Ok(())
    }

    fn block_form(&self, _block: usize, _prompt_tokens: usize) -> u8 {
        0
    }
}

pub fn tokenizer() -> Arc<Tokenizer> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/oxseek-demo/tokenizer.json");
    Arc::new(Tokenizer::from_bytes(&std::fs::read(file).unwrap(), None).unwrap())
}

pub fn start(cache_blocks: usize, change: impl FnOnce(&mut EngineOptions)) -> EngineHandle {
    start_slow(cache_blocks, Duration::ZERO, change)
}

pub fn start_slow(
    cache_blocks: usize,
    step: Duration,
    change: impl FnOnce(&mut EngineOptions),
) -> EngineHandle {
    start_counted(cache_blocks, step, change).0
}

/// An engine and the number of rows that its model has computed.
pub fn start_counted(
    cache_blocks: usize,
    step: Duration,
    change: impl FnOnce(&mut EngineOptions),
) -> (EngineHandle, Arc<AtomicU64>) {
    // Tests read one answer after the other, however slow the machine is.
    let patience = Duration::from_secs(600);
    let mut options =
        EngineOptions { eos_tokens: vec![3], reader_stall_max: patience, ..EngineOptions::default() };
    change(&mut options);
    let fake = Fake::new(cache_blocks, step);
    let rows = Arc::clone(&fake.rows);
    (Engine::start(Box::new(fake), tokenizer(), options), rows)
}

pub fn greedy(prompt: Vec<u32>, max_tokens: usize) -> Request {
    Request {
        prompt,
        max_tokens: Some(max_tokens),
        ignore_eos: true,
        keep_special: true,
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        ..Request::default()
    }
}

pub fn submit(engine: &EngineHandle, request: Request) -> Ticket {
    engine.submit(request.validate(engine.limits()).unwrap_or_else(|e| panic!("{e}"))).unwrap()
}

/// Token ids and reasons of every choice, and the usage.
#[derive(Debug, PartialEq)]
pub struct Answer {
    pub texts: Vec<String>,
    pub ids: Vec<Vec<u32>>,
    pub reasons: Vec<Option<FinishReason>>,
    pub usage: Usage,
}

pub fn read(mut ticket: Ticket, n: usize) -> Result<Answer, String> {
    let mut answer = Answer {
        texts: vec![String::new(); n],
        ids: vec![Vec::new(); n],
        reasons: vec![None; n],
        usage: Usage::default(),
    };
    while let Some(event) = ticket.next_blocking() {
        match event {
            Event::Delta { choice, text, tokens } => {
                assert!(answer.reasons[choice].is_none(), "nothing follows the end");
                answer.texts[choice] += &text;
                answer.ids[choice].extend(tokens.iter().map(|t| t.id));
            }
            Event::Done { choice, reason, .. } => answer.reasons[choice] = Some(reason),
            Event::Finished { usage } => {
                answer.usage = usage;
                return Ok(answer);
            }
            Event::Failed { message, .. } => return Err(message),
            Event::Progress { .. } | Event::PromptLogprobs { .. } | Event::Embedding { .. } => {}
        }
    }
    Err("ended without the last event".into())
}

pub fn ask(engine: &EngineHandle, request: Request) -> Result<Answer, String> {
    let n = request.n;
    read(submit(engine, request), n)
}

/// What the model says when it is asked directly, one token at a time.
pub fn expected(prompt: &[u32], count: usize) -> Vec<u32> {
    let mut fake = Fake::new(16, Duration::ZERO);
    let mut tokens = prompt.to_vec();
    let mut logits = vec![0.0; VOCAB];
    for _ in 0..count {
        for (p, &t) in tokens.iter().enumerate() {
            fake.cache[p / BLOCK_TOKENS][p % BLOCK_TOKENS] = t;
        }
        let blocks: Vec<u32> = (0..16).collect();
        fake.row(&blocks, tokens.len(), &mut logits);
        logits[3] = f32::NEG_INFINITY;
        let best = (0..VOCAB).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
        tokens.push(best as u32);
    }
    tokens.split_off(prompt.len())
}

/// The hidden state of a prompt's last token when the model is asked directly.
pub fn expected_hidden(prompt: &[u32]) -> Vec<f32> {
    let mut fake = Fake::new(16, Duration::ZERO);
    let mut logits = vec![0.0; VOCAB];
    for (p, &t) in prompt.iter().enumerate() {
        fake.cache[p / BLOCK_TOKENS][p % BLOCK_TOKENS] = t;
    }
    let blocks: Vec<u32> = (0..16).collect();
    fake.row(&blocks, prompt.len(), &mut logits);
    logits[..HIDDEN].to_vec()
}

pub fn wait(engine: &EngineHandle, what: &str, until: impl Fn(&Stats) -> bool) {
    let began = Instant::now();
    while !until(&engine.stats()) {
        assert!(began.elapsed() < Duration::from_secs(20), "{what}: {:?}", engine.stats());
        std::thread::sleep(Duration::from_millis(1));
    }
}

pub fn assert_empty(engine: &EngineHandle) {
    wait(engine, "everything is free", |s| {
        s.blocks_used + s.sequences_running + s.sequences_waiting + s.requests_open == 0
    });
}

pub fn prompt(seed: u32, length: usize) -> Vec<u32> {
    (0..length as u32).map(|i| (seed * 31 + i * 7) % 290).collect()
}
