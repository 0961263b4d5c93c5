//! WebSockets: another way to the routes that stream.
//!
//! A message that asks for something becomes a request to the same router that HTTP requests go to, with the headers
//! that the socket was opened with. So fields, limits, keys and errors are those of the HTTP route, and this module
//! holds only what a socket adds: who may open one, how many there are, keeping alive, backpressure, the end.

mod connection;
mod events;
pub(crate) mod generation;

use std::sync::Arc;

use axum::{
    Router,
    body::{Body, to_bytes},
    extract::ws::{WebSocketUpgrade, rejection::WebSocketUpgradeRejection},
    http::{HeaderMap, Request, Response, StatusCode, header},
};
use serde_json::{Value, json};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tower::ServiceExt;

use self::events::Events;
use crate::{
    error::ApiError,
    limits::{BODY_BYTES_MAX, ERROR_BODY_BYTES_MAX, SOCKETS_MAX},
};

/// What all sockets share. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Sockets(Arc<Shared>);

struct Shared {
    router: Router,
    places: Arc<Semaphore>,
    closing: watch::Sender<bool>,
}

/// A socket's place among [`SOCKETS_MAX`], and the headers it was opened with.
pub(crate) struct Place {
    sockets: Sockets,
    headers: HeaderMap,
    _permit: OwnedSemaphorePermit,
}

/// An answer to a request of a socket.
enum Reply {
    /// A stream of events.
    Stream(Events),
    /// A status that is no success, and the error of its body.
    Refused(StatusCode, Value),
}

impl Sockets {
    /// Sockets whose requests `router` answers.
    pub(crate) fn new(router: Router) -> Self {
        let places = Arc::new(Semaphore::new(SOCKETS_MAX));
        Self(Arc::new(Shared { router, places, closing: watch::Sender::new(false) }))
    }

    /// Tells all sockets to take no more requests and to close when the running ones have ended; waits for that.
    pub(crate) async fn close(&self) {
        self.0.closing.send_replace(true);
        let _ = self.0.places.acquire_many(SOCKETS_MAX as u32).await;
    }

    /// Lets a client in, and bounds what it may send and leave unread.
    fn admit(
        &self,
        headers: &HeaderMap,
        upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
    ) -> Result<(Place, WebSocketUpgrade), ApiError> {
        let upgrade = upgrade.map_err(|_| ApiError::upgrade_required())?;
        if !is_same_origin(headers) {
            return Err(ApiError::foreign_origin());
        }
        if *self.0.closing.borrow() {
            return Err(ApiError::stopped());
        }
        let permit =
            Arc::clone(&self.0.places).try_acquire_owned().map_err(|_| ApiError::too_many_sockets())?;
        let place = Place { sockets: self.clone(), headers: request_headers(headers), _permit: permit };
        Ok((place, connection::bounded(upgrade)))
    }
}

impl Place {
    /// Asks the router. The body must ask for a stream.
    async fn post(&self, path: &str, body: &Value) -> Reply {
        let mut request = Request::new(Body::from(body.to_string()));
        *request.method_mut() = axum::http::Method::POST;
        // The paths are this crate's own.
        *request.uri_mut() = path.parse().unwrap_or_default();
        *request.headers_mut() = self.headers.clone();
        let Ok(response) = self.sockets.0.router.clone().oneshot(request).await;
        if response.status().is_success() {
            return Reply::Stream(Events::new(response.into_body()));
        }
        Reply::Refused(response.status(), error_of(response).await)
    }

    /// Whether the server is about to stop; changes when it does.
    fn closing(&self) -> watch::Receiver<bool> {
        self.sockets.0.closing.subscribe()
    }
}

/// The `error` of a response, as OpenAI frames it.
async fn error_of(response: Response<Body>) -> Value {
    let bytes = to_bytes(response.into_body(), ERROR_BODY_BYTES_MAX).await.unwrap_or_default();
    let mut body: Value = serde_json::from_slice(&bytes).unwrap_or_default();
    match body["error"].take() {
        Value::Null => ApiError::internal().to_json()["error"].take(),
        error => error,
    }
}

/// A page of another site can open a socket to a local server without asking first, so its origin is checked here.
/// Clients that are no browsers send none.
fn is_same_origin(headers: &HeaderMap) -> bool {
    let text = |name| headers.get(name).and_then(|v| v.to_str().ok());
    match headers.get(header::ORIGIN) {
        None => true,
        Some(_) => {
            let origin = text(header::ORIGIN).and_then(|o| o.split_once("://")).map(|(_, host)| host);
            origin.is_some() && origin == text(header::HOST)
        }
    }
}

/// What a request of the socket inherits: who asks, and no detail of the connection.
fn request_headers(headers: &HeaderMap) -> HeaderMap {
    let kept = ["authorization", "x-api-key", "anthropic-version", "host", "user-agent"];
    let mut out = HeaderMap::new();
    for name in kept {
        if let Some(value) = headers.get(name) {
            out.insert(name, value.clone());
        }
    }
    out.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    out
}

/// A message from the client, as the JSON that it must be.
fn parse(text: &str) -> Result<Value, ApiError> {
    serde_json::from_str(text).map_err(|e| ApiError::body(format!("the message is not valid JSON: {e}")))
}

/// The message that tells an error, without an `id` when it belongs to no request.
fn error_message(id: Option<&str>, status: Option<StatusCode>, error: &Value) -> String {
    let mut message = json!({"type": "error", "id": id, "error": error});
    if let Some(status) = status {
        message["status"] = status.as_u16().into();
    }
    message.to_string()
}

/// Largest message from a client: what a body may hold, and a frame around it.
const MESSAGE_BYTES_MAX: usize = BODY_BYTES_MAX + (1 << 10);

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|&(k, v)| (header::HeaderName::from_static(k), HeaderValue::from_static(v)))
            .collect()
    }

    #[test]
    fn only_the_own_page_and_programs_may_open_a_socket() {
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
            assert_eq!(is_same_origin(&headers(&pairs)), want, "{origin:?}");
        }
        assert!(!is_same_origin(&headers(&[("origin", "http://a")])), "no host at all");
    }

    #[test]
    fn a_request_inherits_who_asks_and_no_more() {
        let given =
            headers(&[("authorization", "Bearer k"), ("sec-websocket-key", "x"), ("connection", "upgrade")]);
        let got = request_headers(&given);
        assert_eq!(got.len(), 2, "{got:?}");
        assert_eq!(got["authorization"], "Bearer k");
        assert_eq!(got["content-type"], "application/json");
    }
}
