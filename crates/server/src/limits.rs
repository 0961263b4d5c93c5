//! Every bound of the server. Bounds of a single request (context, stop strings, choices) are the engine's.

use std::time::Duration;

/// Largest request body.
pub const BODY_BYTES_MAX: usize = 16 << 20;
/// Longest that a client may take to send a body.
pub const BODY_SECONDS_MAX: Duration = Duration::from_secs(30);
/// Longest that a client may take to send a request's head; it also ends idle connections and TLS handshakes.
pub const HEADER_SECONDS_MAX: Duration = Duration::from_secs(15);
/// Largest request head.
pub const HEADER_BYTES_MAX: usize = 64 << 10;
/// Most headers of a request.
pub const HEADERS_MAX: usize = 100;
/// Longest path and query.
pub const PATH_BYTES_MAX: usize = 8 << 10;
/// Longest that a client may leave what was sent to it unread.
pub const WRITE_SECONDS_MAX: Duration = Duration::from_secs(30);
/// Most open connections; more wait in the kernel's queue.
pub const CONNECTIONS_MAX: usize = 1024;
/// Requests whose prompts are rendered and tokenised at the same time.
pub const PREPARE_TASKS_MAX: usize = 4;
/// How long running answers may take after the server was told to stop, unless it is told otherwise.
pub const DRAIN_SECONDS_MAX: Duration = Duration::from_secs(30);
/// How long an answer that has ended may take to reach its client while the server stops.
pub const FLUSH_SECONDS_MAX: Duration = Duration::from_secs(5);
/// Objects and lists inside of each other in a body.
pub const JSON_DEPTH_MAX: usize = 64;
/// Most messages of a conversation.
pub const MESSAGES_MAX: usize = 4096;
/// Most prompts of one completions request.
pub const PROMPTS_MAX: usize = 64;
/// Most inputs of one embeddings request, OpenAI's bound.
pub const EMBEDDING_INPUTS_MAX: usize = 2048;
/// Longest request id that is taken over from a client.
pub const REQUEST_ID_BYTES_MAX: usize = 128;
/// Longest API key that is looked at.
pub const KEY_BYTES_MAX: usize = 512;
/// Lines of the log that may wait to be written; more are counted and dropped.
pub const LOG_LINES_MAX: usize = 4096;
/// Spans that may wait to be sent to a collector; more are counted and dropped.
pub const SPANS_MAX: usize = 2048;
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
