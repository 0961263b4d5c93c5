//! What an engine did and does, readable from anywhere without a lock.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

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
    /// Cache blocks in use now.
    blocks_used,
    /// Cache blocks in all.
    blocks_total,
    /// Steps that ran.
    steps,
    /// Microseconds spent in steps.
    step_micros,
    /// Requests that were accepted.
    submitted,
    /// Requests that ended with all answers.
    finished,
    /// Requests whose reader left.
    cancelled,
    /// Requests that failed.
    failed,
    /// Requests that were refused because the queue was full.
    rejected,
    /// Prompt tokens of accepted requests.
    prompt_tokens,
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
