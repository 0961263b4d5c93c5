//! A request's body, bounded in size and time.

use axum::{
    body::{Body, to_bytes},
    http::{HeaderMap, header},
};
use bytes::Bytes;

use super::depth;
use crate::{
    error::ApiError,
    limits::{BODY_BYTES_MAX, BODY_SECONDS_MAX, JSON_DEPTH_MAX},
};

/// Reads the body of a JSON request.
pub(crate) async fn read(headers: &HeaderMap, body: Body) -> Result<Bytes, ApiError> {
    let value = |name| headers.get(name).and_then(|v: &axum::http::HeaderValue| v.to_str().ok());
    // A page of another site may post plain text and forms to a local server, but not JSON without asking first.
    let is_json = value(header::CONTENT_TYPE).is_some_and(|v| {
        let kind = v.split(';').next().unwrap_or_default().trim();
        kind.eq_ignore_ascii_case("application/json")
    });
    if !is_json {
        return Err(ApiError::content_type());
    }
    if let Some(encoding) = headers.get(header::CONTENT_ENCODING).filter(|v| *v != "identity") {
        return Err(ApiError::content_encoding(encoding));
    }
    let announced = value(header::CONTENT_LENGTH).and_then(|v| v.parse::<u64>().ok());
    if announced.is_some_and(|n| n > BODY_BYTES_MAX as u64) {
        return Err(ApiError::body_too_large(BODY_BYTES_MAX));
    }
    match tokio::time::timeout(BODY_SECONDS_MAX, to_bytes(body, BODY_BYTES_MAX)).await {
        Err(_) => Err(ApiError::body_too_slow()),
        // A client that broke off does not read the answer, so every error may mean the size.
        Ok(Err(_)) => Err(ApiError::body_too_large(BODY_BYTES_MAX)),
        Ok(Ok(bytes)) if depth::is_within(&bytes, JSON_DEPTH_MAX) => Ok(bytes),
        Ok(Ok(_)) => Err(ApiError::body(format!(
            "the body has more than {JSON_DEPTH_MAX} objects and lists inside of each other"
        ))),
    }
}
