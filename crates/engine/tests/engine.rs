//! What a request gets from an engine, alone and among others.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::time::Duration;

use common::{
    BROKEN, FAIL, PANIC, ask, assert_empty, expected, greedy, prompt, read, start, start_slow, submit, wait,
};
use oxseek_engine::{Event, FinishReason, Matched, Request, Sampling, SubmitError};

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
                        other => panic!("{other:?}"),
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
