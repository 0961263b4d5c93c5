//! What a fault costs, and what an engine says about itself.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::time::Duration;

use common::{
    FATAL, PANIC, ask, assert_empty, expected, greedy, prompt, read, start, start_slow, submit, wait,
};
use oxseek_engine::{EngineState, Request, SubmitError};

#[test]
fn a_model_that_works_again_after_a_panic_goes_on() {
    let engine = start(100, |_| {});
    assert_eq!((engine.state(), engine.step_age()), (EngineState::Ready, None));
    for _ in 0..5 {
        assert!(ask(&engine, greedy(vec![1, PANIC], 5)).unwrap_err().contains("internal error"));
        assert_eq!(ask(&engine, greedy(prompt(3, 100), 30)).unwrap().ids[0], expected(&prompt(3, 100), 30));
    }
    assert_eq!((engine.state(), engine.stats().steps_failed), (EngineState::Ready, 5));
    assert_empty(&engine);
    engine.shutdown();
    assert_eq!(engine.state(), EngineState::Stopped);
}

#[test]
fn a_model_that_does_not_is_given_up_and_nobody_waits_for_it() {
    let engine = start_slow(100, Duration::from_millis(2), |o| o.sequences_max = 2);
    let open: Vec<_> = (0..6).map(|i| submit(&engine, greedy(prompt(i, 10), 40))).collect();
    let fatal = submit(&engine, Request { priority: -1, ..greedy(vec![FATAL], 5) });
    for (i, ticket) in open.into_iter().enumerate() {
        // It goes before those that still wait; everybody is told.
        match read(ticket, 1) {
            Ok(answer) => assert_eq!(answer.ids[0], expected(&prompt(i as u32, 10), 40)),
            Err(e) => assert!(e.contains("failed") || e.contains("internal error"), "{i}: {e}"),
        }
    }
    assert!(read(fatal, 1).unwrap_err().contains("internal error"));
    wait(&engine, "it is given up", |_| engine.state() == EngineState::Dead);
    let late = greedy(prompt(6, 5), 20).validate(engine.limits()).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(engine.submit(late).err(), Some(SubmitError::Stopped));
    assert_empty(&engine);
    engine.shutdown();
    assert_eq!(engine.state(), EngineState::Dead);
}

#[test]
fn a_step_that_takes_too_long_shows() {
    let engine =
        start_slow(100, Duration::from_millis(400), |o| o.step_stall_max = Duration::from_millis(20));
    let ticket = submit(&engine, greedy(prompt(1, 10), 3));
    let mut seen = false;
    while engine.stats().finished == 0 && !seen {
        seen = engine.state() == EngineState::Stuck && engine.step_age().is_some();
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(seen);
    assert_eq!(read(ticket, 1).unwrap().ids[0], expected(&prompt(1, 10), 3));
    wait(&engine, "the last step ends", |_| engine.state() == EngineState::Ready);
    engine.shutdown();
}
