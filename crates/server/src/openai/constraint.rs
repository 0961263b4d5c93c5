//! What holds an answer: a budget of thinking, tool calls in the model's format, a grammar. It begins after the
//! thinking.

use std::sync::Arc;

use oxseek_constrain::{Compiled, Follower};
use oxseek_engine::{Allowed, Constraint, Grammar, TokenMask};

/// The rules for every answer to a request.
pub(crate) struct Rules {
    /// The tokens that open and close thinking, where they are tokens.
    pub(crate) think_open: Option<u32>,
    pub(crate) think_close: Option<u32>,
    /// The prompt ends inside of thinking.
    pub(crate) thinking: bool,
    /// Most tokens of thinking.
    pub(crate) thinking_tokens_max: Option<usize>,
    /// The token that ends an answer: not before the grammar says so.
    pub(crate) end: Option<u32>,
    /// The token that begins calls.
    pub(crate) calls_begin: Option<u32>,
    pub(crate) grammar: Option<Compiled>,
    /// The grammar begins behind this token; the answer may do without.
    pub(crate) behind: Option<u32>,
    /// Tokens of the vocabulary.
    pub(crate) vocab: u32,
}

impl Rules {
    /// As the engine takes them; None when there is nothing to hold.
    pub(crate) fn into_grammar(self) -> Option<Arc<dyn Grammar>> {
        if self.grammar.is_none() && self.thinking_tokens_max.is_none() {
            return None;
        }
        Some(Arc::new(Shared(Arc::new(self))))
    }
}

struct Shared(Arc<Rules>);

impl Grammar for Shared {
    fn start(&self) -> Result<Box<dyn Constraint>, String> {
        let rules = Arc::clone(&self.0);
        let stage = if rules.thinking { Stage::Thinking(0) } else { rules.after_thinking() };
        let follower = rules.grammar.as_ref().map(Compiled::follow);
        Ok(Box::new(Held { rules, stage, follower, begun: false }))
    }
}

impl Rules {
    fn after_thinking(&self) -> Stage {
        match (&self.grammar, self.behind) {
            (Some(_), None) => Stage::Grammar,
            _ => Stage::Free,
        }
    }
}

/// One answer.
struct Held {
    rules: Arc<Rules>,
    stage: Stage,
    follower: Option<Follower>,
    begun: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// With its tokens so far.
    Thinking(usize),
    Free,
    Grammar,
}

impl Constraint for Held {
    fn allowed(&mut self, mask: &mut TokenMask) -> Result<Allowed, String> {
        match (self.stage, &mut self.follower) {
            (Stage::Thinking(n), follower) => {
                let spent = self.rules.thinking_tokens_max.is_some_and(|max| n >= max);
                match (self.rules.think_close, self.rules.end) {
                    (Some(close), _) if spent => mask.allow(close),
                    // Whoever must still answer may not end here, nor call before the grammar begins.
                    (Some(_), Some(end)) if follower.is_some() && self.rules.behind.is_none() => {
                        let not_yet = |id: &u32| *id == end || Some(*id) == self.rules.calls_begin;
                        (0..self.rules.vocab).filter(|id| !not_yet(id)).for_each(|id| mask.allow(id));
                    }
                    _ => return Ok(Allowed::Any),
                }
                Ok(Allowed::Masked)
            }
            (Stage::Grammar, Some(follower)) => {
                let more = follower.mask(mask.words_mut()).map_err(|e| e.to_string())?;
                Ok(if more { Allowed::Masked } else { Allowed::End })
            }
            (Stage::Free | Stage::Grammar, _) => Ok(Allowed::Any),
        }
    }

    fn commit(&mut self, token: u32) -> Result<(), String> {
        let first = !std::mem::replace(&mut self.begun, true);
        match (self.stage, &mut self.follower) {
            (Stage::Thinking(_), _) if Some(token) == self.rules.think_close => {
                self.stage = self.rules.after_thinking();
            }
            // A call ends thinking that was not closed.
            (Stage::Thinking(_), Some(_)) if Some(token) == self.rules.behind => self.stage = Stage::Grammar,
            (Stage::Thinking(n), _) => self.stage = Stage::Thinking(n + 1),
            // Some models open their thinking themselves.
            (Stage::Free, _) if first && Some(token) == self.rules.think_open => {
                self.stage = Stage::Thinking(0);
            }
            (Stage::Free, Some(_)) if Some(token) == self.rules.behind => self.stage = Stage::Grammar,
            (Stage::Free, _) | (Stage::Grammar, None) => {}
            (Stage::Grammar, Some(follower)) => follower.commit(token).map_err(|e| e.to_string())?,
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VOCAB: u32 = 8;
    const END: u32 = 0;
    const OPEN: u32 = 1;
    const CLOSE: u32 = 2;

    fn rules(thinking: bool, tokens_max: usize) -> Box<dyn Constraint> {
        let rules = Rules {
            think_open: Some(OPEN),
            think_close: Some(CLOSE),
            thinking,
            thinking_tokens_max: Some(tokens_max),
            end: Some(END),
            calls_begin: None,
            grammar: None,
            behind: None,
            vocab: VOCAB,
        };
        rules.into_grammar().expect("a budget").start().expect("it starts")
    }

    fn look(held: &mut dyn Constraint) -> (Allowed, Vec<u32>) {
        let mut mask = TokenMask::new(VOCAB as usize);
        let allowed = held.allowed(&mut mask).expect("allowed");
        (allowed, (0..VOCAB).filter(|&id| mask.allows(id)).collect())
    }

    #[test]
    fn thinking_is_closed_when_its_budget_is_spent() {
        let mut held = rules(true, 2);
        for _ in 0..2 {
            assert_eq!(look(&mut *held).0, Allowed::Any);
            held.commit(5).expect("free");
        }
        assert_eq!(look(&mut *held), (Allowed::Masked, vec![CLOSE]));
        held.commit(CLOSE).expect("closed");
        assert_eq!(look(&mut *held).0, Allowed::Any);
        let mut held = rules(false, 0);
        assert_eq!(look(&mut *held).0, Allowed::Any);
        held.commit(OPEN).expect("opened by the model");
        assert_eq!(look(&mut *held), (Allowed::Masked, vec![CLOSE]));
        let mut held = rules(false, 0);
        held.commit(5).expect("an answer");
        held.commit(OPEN).expect("a tag in an answer");
        assert_eq!(look(&mut *held).0, Allowed::Any);
    }
}
