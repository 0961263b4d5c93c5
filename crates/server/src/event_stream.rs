//! Server-sent events that have names, as `/v1/responses` and `/v1/messages` send them.

use std::convert::Infallible;

use axum::{
    body::Body,
    http::header,
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use serde_json::Value;

/// A response that streams events, each under the name that its `type` is.
pub(crate) fn respond(events: impl Stream<Item = Value> + Send + 'static) -> Response {
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
        (header::CACHE_CONTROL, "no-cache"),
        // nginx would hold the stream back.
        (header::HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    let frames = events.map(|event| Ok::<_, Infallible>(frame(&event)));
    (headers, Body::from_stream(frames)).into_response()
}

fn frame(event: &Value) -> Bytes {
    let name = event["type"].as_str().unwrap_or("message");
    Bytes::from(format!("event: {name}\ndata: {event}\n\n"))
}
