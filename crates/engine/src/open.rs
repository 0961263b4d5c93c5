//! A request that is not ended, and its events on their way.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    time::Instant,
};

use async_channel::TrySendError;

use crate::{Ended, Ending, Event, Observer, Request, Usage, choice::Choice, handle::Place};

/// A request that is not ended.
pub(crate) struct Open {
    pub(crate) request: Request,
    pub(crate) prompt_tokens: usize,
    pub(crate) cached_tokens: usize,
    pub(crate) choices: Vec<Choice>,
    pub(crate) outbox: Outbox,
    pub(crate) place: Place,
    pub(crate) submitted: Instant,
    pub(crate) admitted: Option<Instant>,
    pub(crate) first_token: Option<Instant>,
    /// The last step that gave it a token.
    pub(crate) last_token: Option<Instant>,
    pub(crate) observer: Option<Box<dyn Observer>>,
}

impl Open {
    pub(crate) fn usage(&self, now: Instant) -> Usage {
        let admitted = self.admitted.unwrap_or(now);
        let first = self.first_token.unwrap_or(now);
        Usage {
            prompt_tokens: self.prompt_tokens,
            completion_tokens: self.choices.iter().map(|c| c.tokens.len()).sum(),
            cached_tokens: self.cached_tokens,
            queue: admitted - self.submitted,
            prefill: first - admitted,
            decode: now - first,
            ttft: first - self.submitted,
        }
    }

    /// A step gave it a token.
    pub(crate) fn note_token(&mut self, now: Instant) {
        let last = self.last_token.replace(now);
        if let (Some(observer), Some(last)) = (&mut self.observer, last.filter(|&last| last < now)) {
            observer.token(now - last);
        }
    }

    /// Some of its answers may have ended.
    pub(crate) fn note_done(&mut self, events: &[Event]) {
        let Some(observer) = &mut self.observer else { return };
        for event in events {
            if let Event::Done { reason, .. } = event {
                observer.done(*reason);
            }
        }
    }

    /// Tells the observer how it ended; only the first time counts.
    pub(crate) fn end(&mut self, how: Ended, now: Instant) {
        let Some(mut observer) = self.observer.take() else { return };
        let mut usage = self.usage(now);
        if self.admitted.is_none() {
            usage.prompt_tokens = 0;
        }
        // The books are not the engine's: what goes wrong in them must not end it.
        let _ = catch_unwind(AssertUnwindSafe(|| observer.ended(&Ending { how, usage })));
    }
}

/// Events on their way to a reader that may be slow.
pub(crate) struct Outbox {
    pub(crate) channel: async_channel::Sender<Event>,
    pub(crate) backlog: VecDeque<Event>,
    pub(crate) blocked_since: Option<Instant>,
}

impl Outbox {
    pub(crate) fn new(channel: async_channel::Sender<Event>) -> Self {
        Self { channel, backlog: VecDeque::new(), blocked_since: None }
    }

    /// Whether the reader takes all of it now.
    pub(crate) fn fits(&self) -> bool {
        self.channel.capacity().is_none_or(|most| most - self.channel.len() >= self.backlog.len())
    }

    /// Sends as much as the reader takes.
    pub(crate) fn flush(&mut self, now: Instant) {
        while let Some(event) = self.backlog.pop_front() {
            match self.channel.try_send(event) {
                Ok(()) => {}
                Err(TrySendError::Full(event)) => {
                    self.backlog.push_front(event);
                    self.blocked_since.get_or_insert(now);
                    return;
                }
                // The reader left; the next look at abandoned requests ends it.
                Err(TrySendError::Closed(_)) => self.backlog.clear(),
            }
        }
        self.blocked_since = None;
    }

    /// Sends an event that may be left out: only when the reader is not behind.
    pub(crate) fn offer(&self, event: Event) {
        if self.backlog.is_empty() && self.channel.is_empty() {
            // It fits, or the reader has left.
            let _ = self.channel.try_send(event);
        }
    }
}
