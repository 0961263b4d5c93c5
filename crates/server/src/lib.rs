//! The HTTP server: OpenAI's chat and text completions over an engine, a chat page, health and metrics.
//!
//! A request walks: the door (`door`: ids, origins, keys) -> limits ([`limits`]) -> JSON to fields (`openai::fields`) -> prompt and engine request
//! (`openai::chat`, `openai::completions`, off the async threads) -> ticket -> events to JSON or SSE
//! (`openai::answer`). No request blocks inference: what the engine sends goes through a bounded channel, and a client
//! that leaves drops its ticket, which cancels.
#![forbid(unsafe_code)]

mod app;
mod caller;
mod dialect;
mod door;
mod error;
mod health;
mod histogram;
mod keys;
pub mod limits;
mod logs;
mod metrics;
mod openai;
mod origin;
mod page;
mod patience;
mod quota;
mod state;
mod tls;

pub use app::serve;
pub use dialect::Dialect;
pub use keys::{KeyHash, KeyRecord, Keyring, Role, check_name, new_key};
pub use logs::{LogFormat, Logger};
pub use origin::Origins;
pub use quota::KeyLimits;
pub use state::{AppState, Model, ServerOptions};
pub use tls::Tls;
