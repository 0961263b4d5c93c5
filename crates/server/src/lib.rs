//! The HTTP server: OpenAI's chat and text completions over an engine, a chat page, health and metrics.
//!
//! A request walks: limits ([`limits`]) -> JSON to fields (`openai::fields`) -> prompt and engine request
//! (`openai::chat`, `openai::completions`, off the async threads) -> ticket -> events to JSON or SSE
//! (`openai::answer`). No request blocks inference: what the engine sends goes through a bounded channel, and a client
//! that leaves drops its ticket, which cancels.
#![forbid(unsafe_code)]

mod app;
mod dialect;
mod docs;
mod doors;
mod error;
mod event_stream;
mod health;
pub mod limits;
mod messages;
mod metrics;
mod openai;
mod openapi;
mod page;
mod relay;
mod responses;
mod socket;
mod state;
mod tokens;

pub use app::serve;
pub use dialect::Dialect;
#[cfg(feature = "echo")]
pub use socket::echo::serve_echo;
pub use state::{AppState, Model};
