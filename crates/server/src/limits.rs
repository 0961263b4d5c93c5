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
/// Most open WebSockets; they do not count as connections.
pub const SOCKETS_MAX: usize = 256;
/// Answers that run at the same time on one WebSocket.
pub const SOCKET_REQUESTS_MAX: usize = 16;
/// Longest name of an answer on a WebSocket.
pub const SOCKET_ID_BYTES_MAX: usize = 64;
/// Most chunks that a client may allow ahead on a WebSocket.
pub const SOCKET_CREDIT_MAX: usize = 1_000_000;
/// Messages that wait to be written to a WebSocket.
pub const SOCKET_QUEUE_MAX: usize = 16;
/// How often a WebSocket's client is asked whether it lives.
pub const SOCKET_PING_SECONDS: Duration = Duration::from_secs(20);
/// Longest silence of a WebSocket's client, answers to pings included.
pub const SOCKET_IDLE_SECONDS_MAX: Duration = Duration::from_secs(60);
/// Longest that one message may wait for a WebSocket's client to read.
pub const SOCKET_STALL_SECONDS_MAX: Duration = Duration::from_secs(30);
/// Most that is read of an error's body.
pub const ERROR_BODY_BYTES_MAX: usize = 64 << 10;
/// Most responses of `/v1/responses` that are kept.
pub const RESPONSES_MAX: usize = 1024;
/// Most memory that kept responses take, roughly.
pub const RESPONSES_BYTES_MAX: usize = 64 << 20;
