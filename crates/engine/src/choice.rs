//! One answer that is being written: tokens in, text out.

use std::{collections::VecDeque, sync::Arc};

use oxseek_text::{Detokenizer, StopStrings, Tokenizer};

use crate::{
    Allowed, Event, FinishReason, Gate, Matched, Request, SampleError, Sampler, TokenInfo, masks::Guide,
    sampler::Sampled, scheduler::SequenceId,
};

/// One answer of a request.
pub struct Choice {
    pub(crate) sequence: SequenceId,
    pub(crate) index: usize,
    sampler: Sampler,
    pub(crate) tokens: Vec<u32>,
    /// What the answer may say; away while the mask of the next token is made.
    pub(crate) guide: Option<Guide>,
    text: AnswerText,
    pub(crate) done: bool,
}

/// Text of an answer and the tokens it came from, in step.
struct AnswerText {
    detokenizer: Detokenizer,
    stops: StopStrings,
    /// Tokens whose text is not certain yet.
    held: VecDeque<TokenInfo>,
    /// Bytes of text that are certain but belong to held tokens.
    certain: usize,
}

/// Text that may go out.
#[derive(Default)]
struct Released {
    text: String,
    tokens: Vec<TokenInfo>,
    stopped: Option<usize>,
}

impl Choice {
    pub(crate) fn new(
        sequence: SequenceId,
        index: usize,
        sampler: Sampler,
        guide: Option<Guide>,
        request: &Request,
        tokenizer: &Arc<Tokenizer>,
    ) -> Self {
        let text = AnswerText {
            detokenizer: Detokenizer::new(Arc::clone(tokenizer), !request.keep_special),
            stops: StopStrings::new(request.stop.clone()),
            held: VecDeque::new(),
            certain: 0,
        };
        Self { sequence, index, sampler, tokens: Vec::new(), guide, text, done: false }
    }

    /// Chooses the next token from a row of logits. None when the answer must end and there is no token to end it.
    pub(crate) fn sample(
        &mut self,
        row: &[f32],
        request: &Request,
        ends: &[u32],
    ) -> Result<Option<Sampled>, SampleError> {
        let gate = match &self.guide {
            Some(Guide { allowed: Allowed::End, .. }) if ends.is_empty() => return Ok(None),
            Some(Guide { allowed: Allowed::End, .. }) => Gate::Only(ends),
            Some(Guide { allowed: Allowed::Masked, mask, .. }) => Gate::Mask(mask),
            Some(Guide { allowed: Allowed::Any, .. }) | None => Gate::Open,
        };
        self.sampler.sample(row, &request.prompt, &self.tokens, gate, request.logprobs).map(Some)
    }

    /// The constraint lets nothing but the end follow.
    pub(crate) fn must_end(&self) -> bool {
        self.guide.as_ref().is_some_and(|g| g.allowed == Allowed::End)
    }

    /// Takes a token that does not end the answer by itself; answers the events that it leads to.
    pub(crate) fn commit(
        &mut self,
        sampled: Sampled,
        request: &Request,
        tokenizer: &Tokenizer,
        events: &mut Vec<Event>,
    ) -> Result<(), String> {
        let id = sampled.id;
        self.tokens.push(id);
        if let Some(guide) = &mut self.guide {
            guide.commit(id)?;
        }
        let early = self.tokens.len() <= request.min_tokens;
        let released = self.text.push(token_info(sampled, tokenizer), early);
        let stopped = released.stopped;
        self.send(released, events);
        if let Some(stop) = stopped {
            let matched = request.stop.get(stop).cloned().map(Matched::Text);
            self.done(FinishReason::Stop, matched, events);
        } else if Some(self.tokens.len()) == request.max_tokens {
            self.end(FinishReason::Length, None, events);
        }
        Ok(())
    }

    /// Takes the token that ends the answer; it has no text.
    pub(crate) fn commit_end(
        &mut self,
        sampled: Option<Sampled>,
        request: &Request,
        events: &mut Vec<Event>,
    ) {
        let id = sampled.map(|s| s.id);
        self.tokens.extend(id);
        let matched = id.filter(|id| request.stop_tokens.contains(id)).map(Matched::Token);
        self.end(FinishReason::Stop, matched, events);
    }

    /// Ends the answer; text that was held back comes out.
    fn end(&mut self, reason: FinishReason, matched: Option<Matched>, events: &mut Vec<Event>) {
        let rest = self.text.finish();
        self.send(rest, events);
        self.done(reason, matched, events);
    }

    fn send(&self, Released { text, tokens, .. }: Released, events: &mut Vec<Event>) {
        if !text.is_empty() || !tokens.is_empty() {
            events.push(Event::Delta { choice: self.index, text, tokens });
        }
    }

    fn done(&mut self, reason: FinishReason, matched: Option<Matched>, events: &mut Vec<Event>) {
        self.done = true;
        events.push(Event::Done { choice: self.index, reason, matched });
    }
}

impl AnswerText {
    /// Adds a token; an early one's text cannot be part of a stop string.
    fn push(&mut self, mut token: TokenInfo, early: bool) -> Released {
        token.text = self.detokenizer.push(token.id);
        if early {
            self.certain += token.text.len();
            self.held.push_back(token);
            return self.release(false);
        }
        let outcome = self.stops.push(&token.text);
        self.held.push_back(token);
        self.certain += outcome.text.len();
        let released = self.release(outcome.stopped.is_some());
        Released { stopped: outcome.stopped, ..released }
    }

    /// No token follows: text that was held back is not part of a stop string after all.
    fn finish(&mut self) -> Released {
        let rest = self.detokenizer.finish();
        let outcome = self.stops.push(&rest);
        self.certain += outcome.text.len();
        if outcome.stopped.is_some() {
            return self.release(true);
        }
        self.certain += self.stops.finish().len();
        let mut released = self.release(false);
        released.text += &rest;
        released
    }

    /// Tokens whose text is certain. `cut` when nothing follows: then also the part of a token that is.
    fn release(&mut self, cut: bool) -> Released {
        let mut out = Released::default();
        while let Some(token) = self.held.front() {
            let out_now = if cut { self.certain > 0 } else { token.text.len() <= self.certain };
            if !out_now {
                break;
            }
            let Some(mut token) = self.held.pop_front() else { break };
            // A stop string begins inside of it, at a character.
            token.text.truncate(self.certain);
            self.certain -= token.text.len();
            out.text += &token.text;
            out.tokens.push(token);
        }
        out
    }
}

/// A token with its bytes; its text is not known yet.
pub(crate) fn token_info(sampled: Sampled, tokenizer: &Tokenizer) -> TokenInfo {
    let bytes = |id| tokenizer.token_bytes(id).to_vec();
    TokenInfo {
        id: sampled.id,
        bytes: bytes(sampled.id),
        text: String::new(),
        logprob: sampled.logprob,
        top: sampled.top.into_iter().map(|(id, logprob)| (id, bytes(id), logprob)).collect(),
    }
}
