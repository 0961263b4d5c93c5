//! One socket's two halves: messages in, messages out, each with its bounds.

use axum::{
    Error,
    body::Bytes,
    extract::ws::{CloseFrame, Message, Utf8Bytes, WebSocket, WebSocketUpgrade, close_code},
};
use futures_util::{
    SinkExt, StreamExt,
    stream::{SplitSink, SplitStream},
};
use tokio::{
    sync::mpsc,
    task::JoinHandle,
    time::{Instant, MissedTickBehavior, interval_at, timeout},
};

use super::MESSAGE_BYTES_MAX;
use crate::limits::{
    SOCKET_IDLE_SECONDS_MAX, SOCKET_PING_SECONDS, SOCKET_QUEUE_MAX, SOCKET_STALL_SECONDS_MAX,
};

/// The upgrade with this server's bounds.
pub(super) fn bounded(upgrade: WebSocketUpgrade) -> WebSocketUpgrade {
    upgrade
        .max_message_size(MESSAGE_BYTES_MAX)
        .max_frame_size(MESSAGE_BYTES_MAX)
        .write_buffer_size(0)
        .max_write_buffer_size(MESSAGE_BYTES_MAX)
}

/// What came in.
pub(super) enum Incoming {
    Text(Utf8Bytes),
    Binary(Bytes),
    /// The client left, sent what is no WebSocket, or was silent for too long.
    Ended,
}

/// The half that reads.
pub(super) struct Inbox {
    stream: SplitStream<WebSocket>,
    outbox: Outbox,
}

/// The half that writes. Sending waits while the client does not read. Cheap to clone.
#[derive(Clone)]
pub(super) struct Outbox(mpsc::Sender<Message>);

/// Takes a socket apart. The task ends when all outboxes are gone or the client does not read for too long.
pub(super) fn split(socket: WebSocket) -> (Inbox, Outbox, JoinHandle<()>) {
    let (sink, stream) = socket.split();
    let (queue, messages) = mpsc::channel(SOCKET_QUEUE_MAX);
    let outbox = Outbox(queue);
    (Inbox { stream, outbox: outbox.clone() }, outbox, tokio::spawn(write(sink, messages)))
}

impl Inbox {
    /// The next message. A socket that cannot be written to any more has ended, too.
    pub(super) async fn next(&mut self) -> Incoming {
        loop {
            let message = tokio::select! {
                message = timeout(SOCKET_IDLE_SECONDS_MAX, self.stream.next()) => message,
                () = self.outbox.0.closed() => return Incoming::Ended,
            };
            match message {
                Ok(Some(Ok(Message::Text(text)))) => return Incoming::Text(text),
                Ok(Some(Ok(Message::Binary(bytes)))) => return Incoming::Binary(bytes),
                // Pings are answered by the library; a pong shows that the client lives.
                Ok(Some(Ok(Message::Ping(_) | Message::Pong(_)))) => {}
                Ok(Some(Err(e))) => {
                    self.outbox.close(broken(e)).await;
                    return Incoming::Ended;
                }
                Ok(Some(Ok(Message::Close(_))) | None) => return Incoming::Ended,
                Err(_) => {
                    self.outbox.close((close_code::POLICY, "silent for too long")).await;
                    return Incoming::Ended;
                }
            }
        }
    }
}

impl Outbox {
    /// Sends a message; false when nobody will read it.
    pub(super) async fn send(&self, text: String) -> bool {
        self.0.send(Message::Text(text.into())).await.is_ok()
    }

    /// As [`Outbox::send`], of bytes.
    #[cfg(feature = "echo")]
    pub(super) async fn send_binary(&self, bytes: Bytes) -> bool {
        self.0.send(Message::Binary(bytes)).await.is_ok()
    }

    /// Says good-bye.
    pub(super) async fn close(&self, (code, reason): (u16, &'static str)) {
        let frame = CloseFrame { code, reason: Utf8Bytes::from_static(reason) };
        let _ = self.0.send(Message::Close(Some(frame))).await;
    }
}

/// Why a message could not be read, as RFC 6455 7.4.1 numbers it.
fn broken(e: Error) -> (u16, &'static str) {
    use tungstenite::Error as E;
    match e.into_inner().downcast_ref::<E>() {
        Some(E::Capacity(_)) => (close_code::SIZE, "the message is too long"),
        Some(E::Utf8(_)) => (close_code::INVALID, "the text is not UTF-8"),
        _ => (close_code::PROTOCOL, "not a WebSocket frame"),
    }
}

async fn write(mut sink: SplitSink<WebSocket, Message>, mut messages: mpsc::Receiver<Message>) {
    let mut pings = interval_at(Instant::now() + SOCKET_PING_SECONDS, SOCKET_PING_SECONDS);
    pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let message = tokio::select! {
            biased;
            message = messages.recv() => message,
            _ = pings.tick() => Some(Message::Ping(Bytes::new())),
        };
        let Some(message) = message else { break };
        let is_last = matches!(message, Message::Close(_));
        let sent = timeout(SOCKET_STALL_SECONDS_MAX, sink.send(message)).await;
        if is_last || !matches!(sent, Ok(Ok(()))) {
            break;
        }
    }
    let _ = timeout(SOCKET_STALL_SECONDS_MAX, sink.close()).await;
}
