//! Constrained answers.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::{sync::Arc, time::Duration};

use common::{ask, assert_empty, expected, greedy, prompt, read, start, start_slow, submit};
use oxseek_engine::{Allowed, Constraint, Event, FinishReason, Grammar, Request, Sampling, TokenMask};

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
                other => panic!("{other:?}"),
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
