//! The HTTP server: OpenAI's chat and text completions over an engine, a chat page, health and metrics.
//!
//! A request walks: the door (`door`: ids, origins, keys) -> limits ([`limits`]) -> JSON to fields
//! (`openai::fields`) -> prompt and engine request (`openai::chat`, `openai::completions`, off the async threads) ->
//! ticket -> events to JSON or SSE (`openai::answer`). No request blocks inference: what the engine sends goes
//! through a bounded channel, and a client that leaves drops its ticket, which cancels.
#![forbid(unsafe_code)]

mod app;
mod caller;
mod dialect;
mod docs;
mod door;
mod doors;
mod error;
mod event_stream;
mod health;
mod histogram;
mod json;
mod keys;
pub mod limits;
mod logs;
mod messages;
mod metrics;
mod openai;
mod openapi;
mod origin;
mod page;
mod patience;
mod quota;
mod relay;
mod responses;
mod socket;
mod state;
mod tls;
mod tokens;
mod traces;

pub use app::serve;
pub use dialect::Dialect;
pub use keys::{KeyHash, KeyRecord, Keyring, Role, check_name, new_key};
pub use logs::{LogFormat, Logger};
pub use origin::Origins;
pub use quota::KeyLimits;
#[cfg(feature = "echo")]
pub use socket::echo::serve_echo;
pub use state::{AppState, Model, ServerOptions};
pub use tls::Tls;
pub use traces::Tracer;
