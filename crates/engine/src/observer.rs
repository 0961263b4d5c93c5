//! Who keeps books about requests: told on the engine's thread, while it happens.

use std::time::Duration;

use crate::{FinishReason, Usage};

/// Told what becomes of one request. It runs on the engine's thread and must not wait: atomics, or a lock that
/// others hold for a few instructions.
pub trait Observer: Send {
    /// A step gave the request a token, `gap` after the step that gave the one before.
    fn token(&mut self, gap: Duration);
    /// One of its answers ended.
    fn done(&mut self, reason: FinishReason);
    /// The request ended: exactly once, and before its reader sees the last event.
    fn ended(&mut self, ending: &Ending);
}

/// How a request ended and what it took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ending {
    /// How.
    pub how: Ended,
    /// Tokens that were computed, and times. A request that was never admitted has no prompt tokens.
    pub usage: Usage,
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// With all answers.
    Finished,
    /// Its reader left.
    Cancelled,
    /// Its reader stood still for too long.
    Cut,
    /// The engine gave up on it.
    Failed,
}
