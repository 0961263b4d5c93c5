//! Beginnings that requests share, and what is said about prompts.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::{sync::atomic::Ordering::Relaxed, time::Duration};

use common::{
    BROKEN, ask, assert_empty, expected, expected_hidden, greedy, prompt, read, start, start_counted,
    start_slow, submit,
};
use oxseek_engine::{Event, Request, SubmitError, Task};

/// A system prompt and a question.
fn shared(question: u32) -> Vec<u32> {
    [prompt(1, 700), prompt(question + 2, 20)].concat()
}

#[test]
fn requests_that_come_together_compute_their_common_beginning_once() {
    for n in [1, 2] {
        let (engine, rows) = start_counted(200, Duration::ZERO, |_| {});
        let request = |q| Request { n, ..greedy(shared(q), 5) };
        let tickets: Vec<_> = (0..32).map(|q| submit(&engine, request(q))).collect();
        let mut cached = Vec::new();
        for (q, ticket) in tickets.into_iter().enumerate() {
            let answer = read(ticket, n).unwrap();
            assert!(answer.ids.iter().all(|ids| *ids == expected(&shared(q as u32), 5)), "question {q}");
            cached.push(answer.usage.cached_tokens);
        }
        // 700 tokens are ten whole blocks, which are shared, and a part, which is copied.
        assert_eq!(cached.iter().filter(|&&c| c == 0).count(), 1, "{cached:?}");
        assert_eq!(cached.iter().filter(|&&c| c == 700).count(), 31, "{cached:?}");
        assert_eq!(rows.load(Relaxed), (720 + 31 * 20 + 32 * n * 4) as u64);
        let s = engine.stats();
        assert_eq!((s.prefix_tokens_asked, s.prefix_tokens_found), (32 * 720, 31 * 700));
        assert_empty(&engine);
        assert!(engine.stats().blocks_kept >= 10);
        // Nothing is left of it when others need the place.
        ask(&engine, greedy(prompt(50, 900), 1)).unwrap();
        assert_empty(&engine);
    }
}

#[test]
fn the_cache_changes_no_answer() {
    let requests: Vec<Request> = (0..40)
        .map(|i| Request { n: 1 + i % 3, ..greedy(prompt(1, 60 + i * 37 % 300), 1 + i * 29 % 150) })
        .collect();
    // Too small for all, so that blocks are taken away from the cache and from sequences.
    for cache_blocks in [16, 40, 400] {
        for prefix_cache in [false, true] {
            let engine = start(cache_blocks, |o| o.prefix_cache = prefix_cache);
            let tickets: Vec<_> = requests.iter().map(|r| (r, submit(&engine, r.clone()))).collect();
            for (r, ticket) in tickets {
                let answer = read(ticket, r.n).unwrap();
                let right = expected(&r.prompt, r.max_tokens.unwrap());
                assert!(answer.ids.iter().all(|ids| *ids == right), "{cache_blocks} blocks, {prefix_cache}");
                assert!(prefix_cache || answer.usage.cached_tokens == 0);
            }
            assert_empty(&engine);
            assert_eq!(engine.stats().prefix_tokens_found > 0, prefix_cache);
        }
    }
}

#[test]
fn an_answer_is_part_of_the_next_prompt() {
    let engine = start(100, |_| {});
    let first = prompt(4, 100);
    let answer = ask(&engine, greedy(first.clone(), 200)).unwrap().ids.remove(0);
    let second = [first, answer, prompt(5, 30)].concat();
    let next = ask(&engine, greedy(second.clone(), 10)).unwrap();
    assert_eq!(next.ids[0], expected(&second, 10));
    // The last token of an answer is never computed: 299 are, four whole blocks and a part.
    assert_eq!(next.usage.cached_tokens, 299);
}

#[test]
fn what_one_salt_left_another_does_not_find() {
    let engine = start(100, |_| {});
    let salted =
        |salt: Option<&str>| Request { cache_salt: salt.map(Into::into), ..greedy(prompt(1, 200), 2) };
    let cached = [None, Some("a"), Some("b"), Some("a"), Some("b"), None]
        .map(|salt| ask(&engine, salted(salt)).unwrap().usage.cached_tokens);
    assert_eq!(cached, [0, 0, 0, 192, 192, 192]);
}

#[test]
fn what_a_broken_request_left_nobody_finds() {
    let engine = start(100, |_| {});
    let broken = [prompt(1, 128), vec![BROKEN]].concat();
    for _ in 0..2 {
        assert!(ask(&engine, greedy(broken.clone(), 5)).unwrap_err().contains("finite"));
        assert_eq!(engine.stats().blocks_kept, 0);
    }
    assert_eq!(ask(&engine, greedy(prompt(1, 130), 5)).unwrap().usage.cached_tokens, 0);
    assert_empty(&engine);
}

#[test]
fn a_prompt_is_scored_token_by_token() {
    let engine = start(100, |_| {});
    // What is in the cache does not keep it from being scored, and others go on meanwhile.
    ask(&engine, greedy(prompt(1, 150), 1)).unwrap();
    let other = submit(&engine, greedy(prompt(2, 20), 60));
    let request = Request { prompt_logprobs: Some(2), n: 2, ..greedy(prompt(1, 150), 3) };
    let mut ticket = submit(&engine, request);
    let (mut scored, mut deltas) = (Vec::new(), 0);
    while let Some(event) = ticket.next_blocking() {
        match event {
            Event::PromptLogprobs { start, tokens, ranks } => {
                assert_eq!((start, deltas), (1 + scored.len(), 0), "in order and before the answer");
                for (token, rank) in tokens.iter().zip(&ranks) {
                    let place = token.top.iter().position(|t| t.0 == token.id);
                    assert!(place.map_or(*rank > 2, |place| place + 1 == *rank), "{rank} {token:?}");
                }
                scored.extend(tokens);
            }
            Event::Delta { .. } => deltas += 1,
            Event::Done { .. } => {}
            Event::Finished { usage } => assert_eq!(usage.cached_tokens, 0),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(scored.iter().map(|t| t.id).collect::<Vec<_>>(), prompt(1, 150)[1..]);
    for (at, token) in scored.iter().enumerate() {
        let best = &token.top[0];
        assert!(token.top.len() == 2 && token.logprob <= best.2 && best.2 < 0.0);
        // The model's own choice after these tokens, unless that is the banned one.
        let next = expected(&prompt(1, 150)[..=at], 1)[0];
        assert!(best.0 == next || (best.0 == 3 && token.top[1].0 == next), "token {at}");
    }
    assert_eq!(read(other, 1).unwrap().ids[0], expected(&prompt(2, 20), 60));
    assert_empty(&engine);
}

#[test]
fn prompts_are_embedded_beside_answers_that_go_on() {
    let engine = start(100, |_| {});
    let embed = |prompt: Vec<u32>| Request { prompt, task: Task::Embed, ..Request::default() };
    let other = submit(&engine, greedy(prompt(2, 20), 60));
    // The longest fills the context: nothing follows that would need room. The last two have the same beginning.
    let prompts: Vec<_> =
        [1, 64, 65, 1000, 130, 7, 128, 300, 299].iter().map(|&n| prompt(n as u32 / 300, n)).collect();
    let tickets: Vec<_> = prompts.iter().map(|p| submit(&engine, embed(p.clone()))).collect();
    for (prompt, mut ticket) in prompts.iter().zip(tickets) {
        let events: Vec<Event> = std::iter::from_fn(|| ticket.next_blocking()).collect();
        let [Event::Embedding { values }, Event::Done { .. }, Event::Finished { usage }] = &events[..] else {
            panic!("{events:?}");
        };
        assert_eq!(values, &expected_hidden(prompt), "prompt of {}", prompt.len());
        assert_eq!((usage.prompt_tokens, usage.completion_tokens), (prompt.len(), 0));
    }
    assert_eq!(read(other, 1).unwrap().ids[0], expected(&prompt(2, 20), 60));
    // One that cannot be computed, and one whose reader leaves, cost nobody else anything.
    let mut broken = submit(&engine, embed(vec![1, BROKEN]));
    assert!(matches!(broken.next_blocking(), Some(Event::Failed { .. })));
    drop(submit(&engine, embed(prompt(3, 900))));
    assert_empty(&engine);
    for (request, field) in [
        (embed(vec![]), "prompt"),
        (embed(prompt(1, 1001)), "prompt"),
        (Request { n: 2, ..embed(vec![1]) }, "n"),
    ] {
        assert_eq!(request.validate(engine.limits()).map(drop).unwrap_err().field, field);
    }
}

#[test]
fn a_long_prompt_says_how_far_it_is() {
    let engine = start_slow(100, Duration::from_millis(1), |o| o.step_tokens_max = 64);
    ask(&engine, greedy(prompt(1, 129), 1)).unwrap();
    let mut ticket = submit(&engine, Request { progress: true, ..greedy(prompt(1, 900), 2) });
    let mut seen = Vec::new();
    while let Some(event) = ticket.next_blocking() {
        match event {
            Event::Progress { done, total, cached } => {
                assert_eq!((total, cached), (900, 128));
                seen.push(done);
            }
            Event::Delta { .. } => break,
            _ => {}
        }
    }
    assert!(!seen.is_empty() && seen.is_sorted_by(|a, b| a < b) && seen[0] > 128, "{seen:?}");
    drop(ticket);
    // Nobody who does not ask is told.
    let mut ticket = submit(&engine, greedy(prompt(2, 900), 2));
    assert!(matches!(ticket.next_blocking(), Some(Event::Delta { .. })));
}

#[test]
fn a_busy_tenant_is_refused_and_does_not_hold_up_another() {
    let engine = start(100, |o| {
        o.sequences_max = 2;
        o.tenant_requests_max = 6;
        // Nothing ends before it is read.
        o.event_channel_max = 4;
    });
    let of = |tenant, seed| Request { tenant, ..greedy(prompt(seed, 30), 40) };
    let many: Vec<_> = (0..6).map(|i| submit(&engine, of(1, i))).collect();
    let more = of(1, 9).validate(engine.limits()).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(engine.submit(more).err(), Some(SubmitError::TenantBusy));
    let one = submit(&engine, of(2, 20));
    let one = std::thread::spawn(|| read(one, 1).unwrap());
    let many: Vec<_> = many.into_iter().map(|ticket| read(ticket, 1).unwrap()).collect();
    let one = one.join().unwrap();
    for (i, answer) in many.iter().enumerate() {
        assert_eq!(answer.ids[0], expected(&prompt(i as u32, 30), 40));
        // Asked for last and begun before those of the busy one that still waited.
        assert!(i < 3 || answer.usage.queue > one.usage.queue, "{i}");
    }
    assert_eq!(engine.stats().rejected, 1);
    assert_empty(&engine);
    let again = of(1, 9).validate(engine.limits()).unwrap_or_else(|e| panic!("{e}"));
    assert!(engine.submit(again).is_ok());
}
