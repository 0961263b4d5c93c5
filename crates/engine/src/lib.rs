//! The engine: one thread owns the model, its cache and every sequence.
//!
//! A step is `plan -> run -> commit`. [`scheduler`] plans which sequences advance by how many tokens (pure: no clock,
//! no channel), the model runs them as one batch, and the sampled tokens are committed as events. The world outside
//! sees an [`EngineHandle`] to submit to and a [`Ticket`] per request to read from; dropping the ticket cancels.
#![forbid(unsafe_code)]

mod blocks;
mod choice;
mod constraint;
mod handle;
mod masks;
mod observer;
mod open;
mod request;
mod sampler;
pub mod scheduler;
mod stats;
mod step;
mod tenants;

pub use blocks::BlockPool;
pub use constraint::{Allowed, Constraint, Grammar, TokenMask};
pub use handle::{Engine, EngineHandle, EngineOptions, SubmitError, Ticket};
pub use observer::{Ended, Ending, Observer};
pub use oxseek_model::kv::BLOCK_TOKENS;
pub use request::{
    EngineLimits, Event, FinishReason, Matched, Request, RequestError, Sampling, Task, TokenInfo, Usage,
    ValidRequest,
};
pub use sampler::{Bans, Gate, SampleError, Sampled, Sampler};
pub use stats::{EngineState, Stats};
