//! The demo model's answers with and without beginnings from the cache, bit for bit.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::{path::Path, sync::Arc};

use oxseek_backend_cpu::{CpuBackend, CpuOptions};
use oxseek_engine::{Engine, EngineHandle, EngineOptions, Event, Request, Sampling, Ticket};
use oxseek_model::{DeepSeek, LoadOptions};
use oxseek_tensor::CacheFormat;
use oxseek_text::Tokenizer;
use oxseek_weights::Checkpoint;

fn start(prefix_cache: bool, step_tokens_max: usize) -> EngineHandle {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/oxseek-demo");
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let tokenizer = Tokenizer::from_bytes(checkpoint.file("tokenizer.json").unwrap(), None).unwrap();
    let backend = CpuBackend::new(CpuOptions { threads: Some(2), ..CpuOptions::default() }).unwrap();
    let options = LoadOptions {
        context_tokens_max: 700,
        cache_blocks: 60,
        step_rows_max: step_tokens_max,
        logit_rows_max: 4,
        cache_format: CacheFormat::F32,
    };
    let model = DeepSeek::load(&checkpoint, Box::new(backend), options, &mut |_, _| {}).unwrap();
    let engine_options =
        EngineOptions { sequences_max: 4, step_tokens_max, prefix_cache, ..EngineOptions::default() };
    Engine::start(Box::new(model), Arc::new(tokenizer), engine_options)
}

/// Tokens with the bits of their log-probabilities, and how many tokens of the prompt were in the cache.
fn read(mut ticket: Ticket) -> (Vec<(u32, u32)>, usize) {
    let mut tokens = Vec::new();
    while let Some(event) = ticket.next_blocking() {
        match event {
            Event::Delta { tokens: t, .. } => tokens.extend(t.iter().map(|t| (t.id, t.logprob.to_bits()))),
            Event::Done { .. } => {}
            Event::Finished { usage } => return (tokens, usage.cached_tokens),
            other => panic!("{other:?}"),
        }
    }
    panic!("the answer was cut");
}

fn prompt(own: u32, tokens: usize) -> Vec<u32> {
    (0..tokens as u32).map(|p| 20 + if p < 400 { p * 7 % 500 } else { (p + own) * 11 % 400 }).collect()
}

#[test]
fn a_cached_beginning_leaves_every_bit_as_it_is() {
    // Ends in the same cell, in others, inside and at the end of blocks: forms of attention differ between some.
    let lengths = [520, 448, 449, 460, 512, 576, 640, 420, 330, 256];
    let request = |(i, &length): (usize, &usize)| Request {
        max_tokens: Some(12),
        logprobs: Some(0),
        ignore_eos: true,
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        ..Request { prompt: prompt(i as u32 % 3, length), ..Request::default() }
    };
    let submit = |engine: &EngineHandle, r: Request| {
        engine.submit(r.validate(engine.limits()).unwrap_or_else(|e| panic!("{e}"))).unwrap()
    };
    let plain = start(false, 64);
    let expected: Vec<_> = lengths.iter().enumerate().map(|r| read(submit(&plain, request(r)))).collect();
    assert!(expected.iter().all(|(tokens, cached)| tokens.len() == 12 && *cached == 0));
    for step_tokens_max in [64, 200] {
        let engine = start(true, step_tokens_max);
        // One after the other, then all at once.
        let mut found = 0;
        for (i, length) in lengths.iter().enumerate() {
            let (tokens, cached) = read(submit(&engine, request((i, length))));
            assert_eq!(tokens, expected[i].0, "prompt of {length}, {cached} cached");
            found += cached;
        }
        assert!(found >= 256 * 8, "{found} tokens were found");
        let engine = start(true, step_tokens_max);
        let tickets: Vec<_> = lengths.iter().enumerate().map(|r| submit(&engine, request(r))).collect();
        for (i, ticket) in tickets.into_iter().enumerate() {
            assert_eq!(read(ticket).0, expected[i].0, "prompt of {}", lengths[i]);
        }
    }
}
