//! One answer that is being written: tokens in, text out.

use std::sync::Arc;

use oxseek_text::{Detokenizer, StopStrings, Tokenizer};

use crate::{Event, FinishReason, Request, Sampler, TokenInfo, sampler::Sampled, scheduler::SequenceId};

/// One answer of a request.
pub struct Choice {
    pub(crate) sequence: SequenceId,
    pub(crate) index: usize,
    pub(crate) sampler: Sampler,
    pub(crate) tokens: Vec<u32>,
    text: AnswerText,
    pub(crate) done: bool,
}

/// Text of an answer and the tokens it came from, in step.
struct AnswerText {
    detokenizer: Detokenizer,
    stops: StopStrings,
    /// Tokens whose text is not out yet, each with the byte at which it begins.
    held: Vec<(usize, TokenInfo)>,
    bytes_in: usize,
    bytes_out: usize,
}

impl Choice {
    pub(crate) fn new(
        sequence: SequenceId,
        index: usize,
        sampler: Sampler,
        request: &Request,
        tokenizer: &Arc<Tokenizer>,
    ) -> Self {
        let text = AnswerText {
            detokenizer: Detokenizer::new(Arc::clone(tokenizer), !request.keep_special),
            stops: StopStrings::new(request.stop.clone()),
            held: Vec::new(),
            bytes_in: 0,
            bytes_out: 0,
        };
        Self { sequence, index, sampler, tokens: Vec::new(), text, done: false }
    }

    /// Takes a sampled token; answers the events that it leads to. `ends` says that the token ends the answer.
    pub(crate) fn commit(
        &mut self,
        sampled: Sampled,
        ends: bool,
        request: &Request,
        tokenizer: &Tokenizer,
        events: &mut Vec<Event>,
    ) {
        self.tokens.push(sampled.id);
        let (mut text, mut reason) = (String::new(), None);
        if ends {
            reason = Some(FinishReason::Stop);
        } else {
            let outcome = self.text.push(token_info(sampled, tokenizer));
            text = outcome.text;
            reason = reason.or(outcome.stopped.map(|_| FinishReason::Stop));
            if reason.is_none() && Some(self.tokens.len()) == request.max_tokens {
                reason = Some(FinishReason::Length);
            }
            if outcome.stopped.is_some() {
                self.text.cut();
            }
        }
        if reason.is_some() {
            text += &self.text.finish();
        }
        let tokens = self.text.release(text.len(), reason.is_some());
        if !text.is_empty() || !tokens.is_empty() {
            events.push(Event::Delta { choice: self.index, text, tokens });
        }
        if let Some(reason) = reason {
            self.done = true;
            events.push(Event::Done { choice: self.index, reason });
        }
    }
}

impl AnswerText {
    fn push(&mut self, token: TokenInfo) -> oxseek_text::StopOutcome {
        let piece = self.detokenizer.push(token.id);
        let begins = self.bytes_in;
        self.bytes_in += token.bytes.len();
        self.held.push((begins, token));
        self.stops.push(&piece)
    }

    /// A stop string was found: nothing that is held comes out any more, except tokens that began before it.
    fn cut(&mut self) {
        let _ = self.detokenizer.finish();
        let _ = self.stops.finish();
        self.bytes_in = usize::MAX;
    }

    /// Text that was held back and is not part of a stop string after all.
    fn finish(&mut self) -> String {
        let rest = self.detokenizer.finish();
        let outcome = self.stops.push(&rest);
        outcome.text + &self.stops.finish()
    }

    /// The tokens that go out with `bytes` more bytes of text.
    fn release(&mut self, bytes: usize, finished: bool) -> Vec<TokenInfo> {
        self.bytes_out += bytes;
        let was_cut = self.bytes_in == usize::MAX;
        let count = if finished && !was_cut {
            self.held.len()
        } else {
            self.held.iter().take_while(|(begins, _)| *begins < self.bytes_out).count()
        };
        self.held.drain(..count).map(|(_, token)| token).collect()
    }
}

fn token_info(sampled: Sampled, tokenizer: &Tokenizer) -> TokenInfo {
    let bytes = |id| tokenizer.token_bytes(id).to_vec();
    TokenInfo {
        id: sampled.id,
        bytes: bytes(sampled.id),
        logprob: sampled.logprob,
        top: sampled.top.into_iter().map(|(id, logprob)| (id, bytes(id), logprob)).collect(),
    }
}
