//! WebSockets: another way to the routes that stream.
//!
//! A message that asks for something is relayed to the HTTP route, with the headers that the socket was opened with.
//! This module holds only what a socket adds: who may open one, how many there are, keeping alive, backpressure, the
//! end.

mod connection;
#[cfg(feature = "echo")]
pub(crate) mod echo;
pub(crate) mod generation;
pub(crate) mod responses;

use std::sync::Arc;

use axum::{
    extract::{
        FromRequestParts, Request,
        ws::{WebSocket, WebSocketUpgrade},
    },
    http::{HeaderMap, StatusCode, header},
    response::Response,
};
use serde_json::{Value, json};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use crate::{
    doors::Doors,
    error::ApiError,
    json,
    limits::{BODY_BYTES_MAX, SOCKETS_MAX},
    relay::Asker,
};

/// Largest message from a client: what a body may hold, and a frame around it.
const MESSAGE_BYTES_MAX: usize = BODY_BYTES_MAX + (1 << 10);

/// The protocol that clients offer beside their key.
const PROTOCOL: &str = "realtime";

/// How many sockets there are, and whether they are to close. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Sockets {
    places: Arc<Semaphore>,
    closing: Arc<watch::Sender<bool>>,
}

/// A socket's place among [`SOCKETS_MAX`], and who opened it.
pub(crate) struct Place {
    doors: Doors,
    asker: Asker,
    closing: watch::Receiver<bool>,
    _permit: OwnedSemaphorePermit,
}

impl Sockets {
    pub(crate) fn new() -> Self {
        let closing = Arc::new(watch::Sender::new(false));
        Self { places: Arc::new(Semaphore::new(SOCKETS_MAX)), closing }
    }

    /// Tells all sockets to take no more requests and to close when the running ones have ended; waits for that.
    pub(crate) async fn close(&self) {
        self.closing.send_replace(true);
        let _ = self.places.acquire_many(SOCKETS_MAX as u32).await;
    }
}

/// Opens a socket for a client that may have one, and lets `run` serve it.
async fn open<F>(
    doors: Doors,
    request: Request,
    run: impl FnOnce(WebSocket, Place) -> F + Send + 'static,
) -> Result<Response, ApiError>
where
    F: Future<Output = ()> + Send + 'static,
{
    let (mut parts, _) = request.into_parts();
    let upgrade = WebSocketUpgrade::from_request_parts(&mut parts, &()).await;
    let upgrade = upgrade.map_err(|_| ApiError::upgrade_required())?;
    let is_allowed = doors.state.origins().allow(&parts.headers).is_some();
    if !is_allowed && !is_same_origin(&parts.headers) {
        return Err(ApiError::foreign_origin());
    }
    let closing = doors.sockets.closing.subscribe();
    if *closing.borrow() {
        return Err(ApiError::stopped());
    }
    let permit = Arc::clone(&doors.sockets.places).try_acquire_owned();
    let permit = permit.map_err(|_| ApiError::too_many_sockets())?;
    let place = Place { doors, asker: Asker::new(&parts), closing, _permit: permit };
    // A browser that offers its key as a protocol gives up unless one that it offers is chosen.
    let upgrade = connection::bounded(upgrade).protocols([PROTOCOL]);
    Ok(upgrade.on_upgrade(|socket| run(socket, place)))
}

/// A page of another site can open a socket to a local server without asking first, so its origin is checked here.
/// Clients that are no browsers send none.
fn is_same_origin(headers: &HeaderMap) -> bool {
    let text = |name| headers.get(name).and_then(|v| v.to_str().ok());
    if !headers.contains_key(header::ORIGIN) {
        return true;
    }
    let origin = text(header::ORIGIN).and_then(|o| o.split_once("://")).map(|(_, host)| host);
    origin.is_some() && origin == text(header::HOST)
}

/// A message from the client, as the JSON that it must be.
fn parse(text: &str) -> Result<Value, ApiError> {
    json::parse(text.as_bytes()).map_err(|e| ApiError::json("message", e))
}

/// The error of a message that is no text.
fn binary(bytes: usize) -> ApiError {
    ApiError::body(format!("messages are JSON texts; this one has {bytes} bytes of binary"))
}

/// The message that tells an error; `id` is null when it belongs to no request.
fn error_message(id: Option<&str>, status: Option<StatusCode>, error: &Value) -> String {
    let mut message = json!({"type": "error", "id": id, "error": error});
    if let Some(status) = status {
        message["status"] = status.as_u16().into();
    }
    message.to_string()
}

#[cfg(test)]
mod tests {
    use axum::http::{HeaderName, HeaderValue};

    use super::*;

    #[test]
    fn only_the_own_page_and_programs_may_open_a_socket() {
        let of = |pairs: &[(&'static str, &'static str)]| -> HeaderMap {
            let pair = |&(k, v)| (HeaderName::from_static(k), HeaderValue::from_static(v));
            pairs.iter().map(pair).collect()
        };
        for (origin, want) in [
            (None, true),
            (Some("http://127.0.0.1:8080"), true),
            (Some("https://127.0.0.1:8080"), true),
            (Some("http://127.0.0.1:8081"), false),
            (Some("http://127.0.0.1:8080.evil.example"), false),
            (Some("null"), false),
            (Some(""), false),
        ] {
            let mut pairs = vec![("host", "127.0.0.1:8080")];
            pairs.extend(origin.map(|o| ("origin", o)));
            assert_eq!(is_same_origin(&of(&pairs)), want, "{origin:?}");
        }
        assert!(!is_same_origin(&of(&[("origin", "http://a")])), "no host at all");
    }
}
