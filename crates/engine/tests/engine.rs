//! The engine over a model whose every logit depends on the whole history as the cache holds it: a wrong block table,
//! a missed copy or a lost preemption changes the text.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use oxseek_engine::{
    Allowed, Constraint, Engine, EngineHandle, EngineOptions, Event, FinishReason, Grammar, Matched, Request,
    Sampling, Stats, SubmitError, Ticket, TokenMask, Usage,
};
use oxseek_model::{Batch, LanguageModel, LogitRows, ModelError, ModelLimits, kv::BLOCK_TOKENS};
use oxseek_text::Tokenizer;

const VOCAB: usize = 300;
/// A token on which the fake model fails, one on which it panics, one on which its logits are NaN.
const FAIL: u32 = 297;
const PANIC: u32 = 298;
const BROKEN: u32 = 299;

struct Fake {
    limits: ModelLimits,
    cache: Vec<[u32; BLOCK_TOKENS]>,
    step: Duration,
    rows: Arc<AtomicU64>,
}

impl Fake {
    fn new(cache_blocks: usize, step: Duration) -> Self {
        let limits = ModelLimits {
            vocab: VOCAB,
            context_tokens_max: 1000,
            cache_blocks,
            step_rows_max: 64,
            logit_rows_max: 8,
        };
        Self { limits, cache: vec![[0; BLOCK_TOKENS]; cache_blocks], step, rows: Arc::default() }
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
        out[FAIL as usize..].fill(-100.0);
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
        assert!(!batch.tokens.contains(&PANIC), "asked to panic");
        let mut rows = logits.chunks_exact_mut(VOCAB);
        for s in &batch.sequences {
            let blocks = &batch.blocks[s.blocks.clone()];
            for (i, &token) in batch.tokens[s.tokens.clone()].iter().enumerate() {
                let p = s.start + i;
                self.cache[blocks[p / BLOCK_TOKENS] as usize][p % BLOCK_TOKENS] = token;
            }
            if s.logits == LogitRows::Last {
                let out = rows.next().unwrap();
                self.row(blocks, s.start + s.tokens.len(), out);
                if batch.tokens[s.tokens.clone()].contains(&BROKEN) {
                    out.fill(f32::NAN);
                }
            }
        }
        Ok(())
    }

    fn copy_block(&mut self, from: u32, to: u32) -> Result<(), ModelError> {
        self.cache[to as usize] = self.cache[from as usize];
        Ok(())
    }
}

fn tokenizer() -> Arc<Tokenizer> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/oxseek-demo/tokenizer.json");
    Arc::new(Tokenizer::from_bytes(&std::fs::read(file).unwrap(), None).unwrap())
}

fn start(cache_blocks: usize, change: impl FnOnce(&mut EngineOptions)) -> EngineHandle {
    start_slow(cache_blocks, Duration::ZERO, change)
}

fn start_slow(cache_blocks: usize, step: Duration, change: impl FnOnce(&mut EngineOptions)) -> EngineHandle {
    let mut options = EngineOptions { eos_tokens: vec![3], ..EngineOptions::default() };
    change(&mut options);
    Engine::start(Box::new(Fake::new(cache_blocks, step)), tokenizer(), options)
}

fn greedy(prompt: Vec<u32>, max_tokens: usize) -> Request {
    Request {
        prompt,
        max_tokens: Some(max_tokens),
        ignore_eos: true,
        keep_special: true,
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        ..Request::default()
    }
}

fn submit(engine: &EngineHandle, request: Request) -> Ticket {
    engine.submit(request.validate(engine.limits()).unwrap_or_else(|e| panic!("{e}"))).unwrap()
}

/// Token ids and reasons of every choice, and the usage.
#[derive(Debug, PartialEq)]
struct Answer {
    texts: Vec<String>,
    ids: Vec<Vec<u32>>,
    reasons: Vec<Option<FinishReason>>,
    usage: Usage,
}

fn read(mut ticket: Ticket, n: usize) -> Result<Answer, String> {
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
            Event::Failed { message } => return Err(message),
        }
    }
    Err("ended without the last event".into())
}

fn ask(engine: &EngineHandle, request: Request) -> Result<Answer, String> {
    let n = request.n;
    read(submit(engine, request), n)
}

/// What the model says when it is asked directly, one token at a time.
fn expected(prompt: &[u32], count: usize) -> Vec<u32> {
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

fn wait(engine: &EngineHandle, what: &str, until: impl Fn(&Stats) -> bool) {
    let began = Instant::now();
    while !until(&engine.stats()) {
        assert!(began.elapsed() < Duration::from_secs(20), "{what}: {:?}", engine.stats());
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn assert_empty(engine: &EngineHandle) {
    wait(engine, "everything is free", |s| {
        s.blocks_used + s.sequences_running + s.sequences_waiting + s.requests_open == 0
    });
}

fn prompt(seed: u32, length: usize) -> Vec<u32> {
    (0..length as u32).map(|i| (seed * 31 + i * 7) % 290).collect()
}

#[test]
fn many_requests_at_once_answer_as_each_alone() {
    let engine = start(200, |_| {});
    let requests: Vec<_> =
        (0..30).map(|i| (prompt(i, 1 + 17 * i as usize % 150), 1 + 13 * i as usize % 90)).collect();
    let tickets: Vec<_> = requests.iter().map(|(p, n)| submit(&engine, greedy(p.clone(), *n))).collect();
    for ((p, n), ticket) in requests.iter().zip(tickets) {
        let answer = read(ticket, 1).unwrap();
        assert_eq!(answer.ids[0], expected(p, *n));
        assert_eq!(answer.reasons, [Some(FinishReason::Length)]);
        assert_eq!((answer.usage.prompt_tokens, answer.usage.completion_tokens), (p.len(), *n));
        assert_eq!(answer.texts[0], engine.tokenizer().decode(&answer.ids[0]));
    }
    assert_empty(&engine);
}

#[test]
fn a_cache_too_small_for_all_changes_no_answer() {
    // Eight sequences that grow to five blocks each share nine.
    let engine = start(9, |_| {});
    let tickets: Vec<_> = (0..8).map(|i| (i, submit(&engine, greedy(prompt(i, 40), 250)))).collect();
    for (i, ticket) in tickets {
        assert_eq!(read(ticket, 1).unwrap().ids[0], expected(&prompt(i, 40), 250), "request {i}");
    }
    assert_empty(&engine);
}

#[test]
fn forked_answers_continue_the_same_prompt() {
    for length in [64, 65, 100, 128] {
        let engine = start(16, |_| {});
        let answer = ask(&engine, Request { n: 3, ..greedy(prompt(1, length), 100) }).unwrap();
        for ids in &answer.ids {
            assert_eq!(ids, &expected(&prompt(1, length), 100), "prompt of {length}");
        }
        assert_eq!(answer.usage.completion_tokens, 300);
        assert_empty(&engine);
    }
}

#[test]
fn a_seed_fixes_the_text_also_after_preemption_and_in_a_batch() {
    let drawn = |seed: u64| Request {
        n: 2,
        sampling: Sampling { seed: Some(seed), temperature: 1.5, ..Sampling::default() },
        ..greedy(prompt(1, 50), 120)
    };
    let roomy = start(100, |_| {});
    let alone: Vec<_> = (0..4).map(|s| ask(&roomy, drawn(s)).unwrap().ids).collect();
    assert_ne!(alone[0][0], alone[0][1]);
    assert_ne!(alone[0][0], alone[1][0]);
    let tight = start(6, |_| {});
    let tickets: Vec<_> = (0..4).map(|s| submit(&tight, drawn(s))).collect();
    for (ticket, alone) in tickets.into_iter().zip(alone) {
        assert_eq!(read(ticket, 2).unwrap().ids, alone);
    }
}

#[test]
fn a_reader_that_leaves_frees_everything_within_two_steps() {
    for (what, length) in [("while decoding", 10), ("in a long prompt", 900)] {
        let engine = start_slow(100, Duration::from_millis(5), |_| {});
        let ticket = submit(&engine, greedy(prompt(1, length), 1000 - length));
        wait(&engine, what, |s| s.blocks_used > 0 && s.steps >= 2);
        let before = engine.stats().steps;
        drop(ticket);
        assert_empty(&engine);
        let s = engine.stats();
        assert!(s.steps - before <= 2, "{what}: {} steps", s.steps - before);
        assert_eq!((s.cancelled, s.finished), (1, 0));
    }
}

#[test]
fn a_reader_that_stands_still_stops_only_itself_and_is_cut() {
    let engine = start(100, |o| {
        o.event_channel_max = 4;
        o.reader_stall_max = Duration::from_millis(300);
    });
    let mut still = submit(&engine, greedy(prompt(1, 10), 900));
    assert!(still.next_blocking().is_some());
    let mut slow = submit(&engine, greedy(prompt(2, 10), 60));
    let mut ids = Vec::new();
    while let Some(event) = slow.next_blocking() {
        std::thread::sleep(Duration::from_millis(2));
        if let Event::Delta { tokens, .. } = event {
            ids.extend(tokens.iter().map(|t| t.id));
        }
    }
    assert_eq!(ids, expected(&prompt(2, 10), 60), "a slow reader gets everything");
    assert_eq!(ask(&engine, greedy(prompt(3, 10), 30)).unwrap().ids[0], expected(&prompt(3, 10), 30));
    wait(&engine, "the one that stands still is cut", |s| s.failed == 1);
    assert_empty(&engine);
    assert_eq!(read(still, 1), Err("ended without the last event".into()));
}

#[test]
fn a_failing_step_costs_its_requests_and_nothing_else() {
    let engine = start(100, |_| {});
    for (token, message) in [(FAIL, "asked to fail"), (PANIC, "internal error"), (BROKEN, "finite")] {
        let e = ask(&engine, greedy(vec![1, token], 5)).unwrap_err();
        assert!(e.contains(message), "{e}");
        assert_eq!(ask(&engine, greedy(prompt(3, 10), 30)).unwrap().ids[0], expected(&prompt(3, 10), 30));
    }
    assert_empty(&engine);
    assert_eq!(engine.stats().failed, 3);
}

#[test]
fn broken_logits_of_one_request_leave_the_others_in_its_batch_alone() {
    let engine = start_slow(100, Duration::from_millis(2), |_| {});
    let good = submit(&engine, greedy(prompt(3, 10), 60));
    wait(&engine, "it runs", |s| s.steps > 3);
    assert!(ask(&engine, greedy(vec![BROKEN], 5)).unwrap_err().contains("finite"));
    assert_eq!(read(good, 1).unwrap().ids[0], expected(&prompt(3, 10), 60));
}

#[test]
fn the_queue_is_bounded_and_a_stopped_engine_says_so() {
    let engine = start_slow(100, Duration::from_millis(2), |o| {
        o.sequences_max = 2;
        o.queue_requests_max = 3;
    });
    let tickets: Vec<_> = (0..5).map(|i| submit(&engine, greedy(prompt(i, 5), 20))).collect();
    let sixth = greedy(prompt(6, 5), 20).validate(engine.limits()).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(engine.submit(sixth).err(), Some(SubmitError::Busy));
    assert_eq!(engine.stats().rejected, 1);
    // Stopping lets the accepted ones end.
    engine.shutdown();
    for (i, ticket) in tickets.into_iter().enumerate() {
        assert_eq!(read(ticket, 1).unwrap().ids[0], expected(&prompt(i as u32, 5), 20));
    }
    let late = greedy(prompt(6, 5), 20).validate(engine.limits()).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(engine.submit(late).err(), Some(SubmitError::Stopped));
    assert!(!engine.is_alive());
}

#[test]
fn an_answer_ends_at_its_stop_string_stop_token_and_eos() {
    let engine = start(100, |_| {});
    let p = prompt(5, 10);
    let ids = expected(&p, 40);
    let text = engine.tokenizer().decode(&ids);
    let chars: Vec<char> = text.chars().collect();
    let stop: String = chars[10..14].iter().collect();
    let answer = ask(&engine, Request { stop: vec![stop.clone()], ..greedy(p.clone(), 40) }).unwrap();
    assert_eq!(answer.texts[0], text[..text.find(&stop).unwrap()]);
    assert_eq!(answer.reasons, [Some(FinishReason::Stop)]);
    // Tokens that lie wholly behind the stop are not shown.
    let shown: usize = answer.ids[0].iter().map(|&id| engine.tokenizer().token_bytes(id).len()).sum();
    assert!(shown < answer.texts[0].len() + 32 && answer.ids[0] == ids[..answer.ids[0].len()]);

    let at = (1..40).find(|&i| !ids[..i].contains(&ids[i])).unwrap();
    let answer = ask(&engine, Request { stop_tokens: vec![ids[at]], ..greedy(p.clone(), 40) }).unwrap();
    assert_eq!((answer.ids[0].as_slice(), answer.reasons[0]), (&ids[..at], Some(FinishReason::Stop)));
    assert_eq!(answer.usage.completion_tokens, at + 1);

    let eos = start(100, |o| o.eos_tokens = vec![ids[at]]);
    let answer = ask(&eos, Request { ignore_eos: false, ..greedy(p, 40) }).unwrap();
    assert_eq!((answer.ids[0].as_slice(), answer.reasons[0]), (&ids[..at], Some(FinishReason::Stop)));
}

#[test]
fn a_long_prompt_does_not_stop_a_running_answer() {
    let engine = start_slow(100, Duration::from_millis(3), |o| o.step_tokens_max = 32);
    let mut running = submit(&engine, greedy(prompt(1, 5), 200));
    assert!(running.next_blocking().is_some());
    let before = engine.stats();
    let long = submit(&engine, greedy(prompt(2, 900), 2));
    // 900 tokens take about 30 steps; the running answer gets a token in each.
    let mut deltas = 0;
    while engine.stats().first_tokens < 2 {
        assert!(running.next_blocking().is_some());
        deltas += 1;
    }
    let steps = engine.stats().steps - before.steps;
    assert!(steps >= 28 && deltas + 4 >= steps, "{deltas} tokens in {steps} steps");
    assert_eq!(read(long, 1).unwrap().ids[0], expected(&prompt(2, 900), 2));
}

#[test]
fn logprobs_come_with_their_tokens() {
    let engine = start(100, |_| {});
    let mut ticket = submit(&engine, Request { logprobs: Some(3), ..greedy(prompt(1, 5), 20) });
    let mut tokens = Vec::new();
    while let Some(event) = ticket.next_blocking() {
        if let Event::Delta { tokens: t, .. } = event {
            tokens.extend(t);
        }
    }
    assert_eq!(tokens.len(), 20);
    for t in tokens {
        assert_eq!(t.top.len(), 3);
        assert!(t.logprob <= 0.0 && t.top.is_sorted_by(|a, b| a.2 >= b.2));
        assert_eq!(t.bytes, engine.tokenizer().token_bytes(t.id));
    }
}

/// Lets an answer consist of the tokens of a list, in order, and then end; the list says what goes wrong where.
#[derive(Clone)]
struct List(Vec<Place>);

#[derive(Debug, Clone, Copy, PartialEq)]
enum Place {
    Any,
    /// This one or the one after it.
    Token(u32),
    Nothing,
    Broken,
    Panics,
    CommitPanics,
}

struct Following {
    list: Vec<Place>,
    at: usize,
}

impl Grammar for List {
    fn start(&self) -> Result<Box<dyn Constraint>, String> {
        if self.0.is_empty() {
            return Err("the list is empty".into());
        }
        Ok(Box::new(Following { list: self.0.clone(), at: 0 }))
    }
}

impl Constraint for Following {
    fn allowed(&mut self, mask: &mut TokenMask) -> Result<Allowed, String> {
        match self.list.get(self.at) {
            None => return Ok(Allowed::End),
            Some(Place::Any) => return Ok(Allowed::Any),
            Some(Place::Token(id)) => [*id, id + 1].into_iter().for_each(|id| mask.allow(id)),
            Some(Place::Nothing) => {}
            Some(Place::Broken) => return Err("the list is broken".into()),
            Some(Place::Panics) => panic!("asked to panic"),
            Some(Place::CommitPanics) => mask.allow(7),
        }
        Ok(Allowed::Masked)
    }

    fn commit(&mut self, token: u32) -> Result<(), String> {
        match self.list.get(self.at) {
            Some(Place::Token(id)) if !(*id..=id + 1).contains(&token) => {
                return Err("not in the list".into());
            }
            Some(Place::CommitPanics) => panic!("asked to panic"),
            _ => {}
        }
        self.at += 1;
        Ok(())
    }
}

fn listed(list: &[Place], request: Request) -> Request {
    Request { grammar: Some(Arc::new(List(list.to_vec()))), ..request }
}

#[test]
fn a_constraint_decides_what_is_said_and_when_it_ends() {
    let engine = start(100, |_| {});
    let list: Vec<Place> = (0..40).map(|i| Place::Token(40 + 5 * i)).collect();
    let free = submit(&engine, greedy(prompt(1, 70), 60));
    for temperature in [0.0, 1.5] {
        let drawn = Sampling { temperature, seed: Some(3), ..Sampling::default() };
        let request =
            Request { n: 3, sampling: drawn, logprobs: Some(4), min_tokens: 60, ..greedy(prompt(2, 70), 90) };
        let mut ticket = submit(&engine, listed(&list, request));
        let mut ids = vec![Vec::new(); 3];
        while let Some(event) = ticket.next_blocking() {
            match event {
                Event::Delta { choice, tokens, .. } => {
                    for t in tokens {
                        let sum: f32 = t.top.iter().map(|t| t.2.exp()).sum();
                        assert!(
                            t.top.len() == 2 && (sum - 1.0).abs() < 1e-5,
                            "among the allowed ones: {sum}"
                        );
                        ids[choice].push(t.id);
                    }
                }
                Event::Done { reason, .. } => assert_eq!(reason, FinishReason::Stop),
                Event::Finished { usage } => assert_eq!(usage.completion_tokens, 3 * 41),
                Event::Failed { message } => panic!("{message}"),
            }
        }
        for ids in &ids {
            assert_eq!(ids.len(), 40);
            assert!(ids.iter().enumerate().all(|(i, &t)| t / 5 == 8 + i as u32 && t % 5 < 2), "{ids:?}");
        }
        assert_eq!(ids[0] == ids[1], temperature == 0.0);
    }
    // Constrained later on, as after thinking.
    let list: Vec<Place> = [vec![Place::Any; 5], list].concat();
    let answer = ask(&engine, listed(&list, greedy(prompt(3, 10), 90))).unwrap();
    assert_eq!(answer.ids[0][..5], expected(&prompt(3, 10), 5));
    assert_eq!((answer.ids[0][5] / 5, answer.ids[0].len()), (8, 45));
    assert_eq!(read(free, 1).unwrap().ids[0], expected(&prompt(1, 70), 60));
    assert_empty(&engine);
}

#[test]
fn a_constraint_that_fails_costs_its_request_and_nothing_else() {
    let engine = start_slow(100, Duration::from_millis(1), |_| {});
    let good = submit(&engine, greedy(prompt(3, 10), 100));
    let cases = [
        (Place::Nothing, "leave no token"),
        (Place::Broken, "the list is broken"),
        (Place::Panics, "internal error"),
        (Place::CommitPanics, "internal error"),
    ];
    for (place, message) in cases {
        for at in [0, 3] {
            let list = [vec![Place::Any; at], vec![place]].concat();
            let e = ask(&engine, listed(&list, Request { n: 2, ..greedy(prompt(4, 10), 20) })).unwrap_err();
            assert!(e.contains(message), "{place:?} at {at}: {e}");
        }
    }
    assert!(ask(&engine, listed(&[], greedy(prompt(4, 10), 20))).unwrap_err().contains("list is empty"));
    let bias = Sampling { logit_bias: vec![(60, -100.0), (61, -100.0)], ..Sampling::default() };
    let banned = Request { sampling: bias, ..greedy(prompt(4, 10), 20) };
    assert!(ask(&engine, listed(&[Place::Token(60)], banned)).unwrap_err().contains("logit bias"));
    assert_eq!(read(good, 1).unwrap().ids[0], expected(&prompt(3, 10), 100));
    assert_eq!(engine.stats().failed, 10);
    assert_empty(&engine);
}

#[test]
fn an_answer_that_must_end_without_an_end_token_ends() {
    let engine = start(100, |o| o.eos_tokens.clear());
    let answer = ask(&engine, listed(&[Place::Token(50)], greedy(prompt(1, 5), 20))).unwrap();
    assert_eq!((answer.ids[0].len(), answer.reasons[0]), (1, Some(FinishReason::Stop)));
    assert_eq!(answer.usage.completion_tokens, 1);
}

#[test]
fn min_tokens_keeps_every_end_away() {
    let p = prompt(5, 10);
    let ids = expected(&p, 60);
    let end = ids[4];
    let engine = start(100, |o| o.eos_tokens = vec![end]);
    let text = engine.tokenizer().decode(&ids[2..4]);
    for request in [
        Request { ignore_eos: false, ..greedy(p.clone(), 60) },
        Request { stop_tokens: vec![ids[3]], ..greedy(p.clone(), 60) },
        Request { stop: vec![text.clone()], ..greedy(p.clone(), 60) },
    ] {
        let early = ask(&engine, request.clone()).unwrap();
        assert!(early.usage.completion_tokens <= 5, "{}", early.usage.completion_tokens);
        let late = ask(&engine, Request { min_tokens: 20, ..request }).unwrap();
        assert!(late.usage.completion_tokens >= 20, "{}", late.usage.completion_tokens);
    }
}

#[test]
fn the_text_of_a_delta_is_that_of_its_tokens() {
    let engine = start(100, |_| {});
    let tokenizer = engine.tokenizer();
    for seed in 0..6 {
        let ids = expected(&prompt(seed, 10), 200);
        let whole = tokenizer.decode(&ids);
        let chars: Vec<char> = whole.chars().collect();
        let stop: String = chars[chars.len() / 2..][..5].iter().collect();
        for keep_special in [false, true] {
            let base = Request { keep_special, ..greedy(prompt(seed, 10), 200) };
            for request in [base.clone(), Request { stop: vec![stop.clone()], ..base }] {
                let mut ticket = submit(&engine, request);
                let (mut text, mut seen) = (String::new(), Vec::new());
                let mut stopped = None;
                while let Some(event) = ticket.next_blocking() {
                    match event {
                        Event::Delta { text: t, tokens, .. } => {
                            let own: String = tokens.iter().map(|t| t.text.as_str()).collect();
                            assert!(t.starts_with(&own) && (t == own || t[own.len()..].chars().count() == 1));
                            for token in &tokens {
                                let hidden = !keep_special && tokenizer.is_special(token.id);
                                assert!(!hidden || token.text.is_empty(), "special tokens come as ids");
                            }
                            text += &t;
                            seen.extend(tokens.iter().map(|t| t.id));
                        }
                        Event::Done { matched, .. } => stopped = matched,
                        Event::Finished { .. } => {}
                        Event::Failed { message } => panic!("{message}"),
                    }
                }
                assert_eq!(seen, ids[..seen.len()]);
                match stopped {
                    None => assert_eq!(seen.len(), ids.len()),
                    Some(matched) => assert_eq!(matched, Matched::Text(stop.clone())),
                }
                if keep_special {
                    assert!(whole.starts_with(&text), "{text}");
                }
            }
        }
    }
}
