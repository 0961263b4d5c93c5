//! Every bound of the server. Bounds of a single request (context, stop strings, choices) are the engine's.

use std::time::Duration;

/// Largest request body.
pub const BODY_BYTES_MAX: usize = 16 << 20;
/// Longest that a client may take to send a body.
pub const BODY_SECONDS_MAX: Duration = Duration::from_secs(30);
/// Longest that a client may take to send a request's head; it also ends idle connections.
pub const HEADER_SECONDS_MAX: Duration = Duration::from_secs(15);
/// Largest request head.
pub const HEADER_BYTES_MAX: usize = 64 << 10;
/// Most open connections; more wait in the kernel's queue.
pub const CONNECTIONS_MAX: usize = 1024;
/// Requests whose prompts are rendered and tokenised at the same time.
pub const PREPARE_TASKS_MAX: usize = 4;
/// How long running answers may take after the server was told to stop.
pub const DRAIN_SECONDS_MAX: Duration = Duration::from_secs(30);
/// Most messages of a conversation.
pub const MESSAGES_MAX: usize = 4096;
/// Most prompts of one completions request.
pub const PROMPTS_MAX: usize = 64;
