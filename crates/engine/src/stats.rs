//! What an engine did and does, readable from anywhere without a lock.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {
        /// A snapshot of an engine's counters and gauges.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        pub struct Stats { $($(#[$doc])* pub $name: u64),+ }

        /// The live counters. The engine thread writes most of them.
        #[derive(Debug, Default)]
        pub(crate) struct Counters { $(pub(crate) $name: AtomicU64),+ }

        impl Counters {
            pub(crate) fn snapshot(&self) -> Stats {
                Stats { $($name: self.$name.load(Relaxed)),+ }
            }
        }
    };
}

counters! {
    /// Sequences that hold cache blocks now.
    sequences_running,
    /// Sequences that wait for a place now.
    sequences_waiting,
    /// Requests that are submitted and not ended now.
    requests_open,
    /// Requests of which an answer holds cache blocks now.
    requests_running,
    /// Cache blocks that sequences hold now.
    blocks_used,
    /// Cache blocks that no sequence holds and whose rows are kept for later, now.
    blocks_kept,
    /// Cache blocks in all.
    blocks_total,
    /// Steps that ran.
    steps,
    /// Microseconds spent in steps.
    step_micros,
    /// Steps whose forward failed.
    steps_failed,
    /// Sequences that lost their cache blocks to others and are or were computed again.
    preempted,
    /// Requests that were accepted.
    submitted,
    /// Requests that ended with all answers.
    finished,
    /// Answers that ended by themselves, a stop string or a stop token.
    answers_stopped,
    /// Answers that were as long as they may be.
    answers_cut,
    /// Requests whose reader left.
    cancelled,
    /// Requests that failed.
    failed,
    /// Requests that were refused because the queue was full.
    rejected,
    /// Prompt tokens of accepted requests.
    prompt_tokens,
    /// Prompt tokens that were looked for in the cache.
    prefix_tokens_asked,
    /// Prompt tokens that were in the cache already.
    prefix_tokens_found,
    /// Tokens that were generated.
    generated_tokens,
    /// Sum of times to first token, in microseconds.
    ttft_micros,
    /// Requests that have their first token.
    first_tokens,
}

pub(crate) fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Relaxed);
}

pub(crate) fn set(gauge: &AtomicU64, value: u64) {
    gauge.store(value, Relaxed);
}

/// Whether an engine does what it should.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineState {
    /// It takes requests.
    Ready,
    /// It takes no more requests and lets the accepted ones end.
    Draining,
    /// A step takes longer than it ever should ([`crate::EngineOptions::step_stall_max`]).
    Stuck,
    /// The model cannot be trusted any more, or the thread broke. Only a new start helps.
    Dead,
    /// It was told to stop, and has.
    Stopped,
}

/// Signs of life of the engine thread.
#[derive(Debug)]
pub(crate) struct Pulse {
    epoch: Instant,
    /// Microseconds from `epoch` to the begin of the step that runs, plus one; 0 between steps.
    step_began: AtomicU64,
    pub(crate) dead: AtomicBool,
    pub(crate) ended: AtomicBool,
}

impl Pulse {
    pub(crate) fn new() -> Self {
        Self {
            epoch: Instant::now(),
            step_began: AtomicU64::new(0),
            dead: AtomicBool::new(false),
            ended: AtomicBool::new(false),
        }
    }

    pub(crate) fn step_begins(&self, now: Instant) {
        set(&self.step_began, (now - self.epoch).as_micros() as u64 + 1);
    }

    pub(crate) fn step_ends(&self) {
        set(&self.step_began, 0);
    }

    /// How long the step that runs has been running.
    pub(crate) fn step_age(&self) -> Option<Duration> {
        let began = self.step_began.load(Relaxed).checked_sub(1)?;
        Some(self.epoch.elapsed().saturating_sub(Duration::from_micros(began)))
    }
}
