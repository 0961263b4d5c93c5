//! The door that every request comes through: ids, origins, keys, and what is counted and logged on the way out.

use std::{
    hash::{BuildHasher, RandomState},
    panic::AssertUnwindSafe,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use axum::{
    extract::{MatchedPath, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use futures_util::FutureExt;

use crate::{
    caller::{Caller, millis},
    error::ApiError,
    keys::{Key, Role},
    limits::{KEY_BYTES_MAX, PATH_BYTES_MAX, REQUEST_ID_BYTES_MAX},
    logs::Line,
    metrics::Refusal,
    quota::{Moment, Room},
    state::AppState,
};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const API_KEY: HeaderName = HeaderName::from_static("x-api-key");
/// How a browser, which cannot set headers on a socket, sends a key: as a protocol that it offers.
const PROTOCOL_KEY: &str = "openai-insecure-api-key.";
/// What pages of other origins may read of an answer.
const EXPOSED: &str = "x-request-id, retry-after, x-ratelimit-limit-requests, x-ratelimit-remaining-requests, \
                       x-ratelimit-reset-requests, x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, \
                       x-ratelimit-reset-tokens";

/// Who may use a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Access {
    /// Everybody: pages and health, which tell nothing that is secret.
    Open,
    /// Whoever has an admin's key; while there is none, any key.
    Admin,
    /// Whoever has a user's key.
    User,
}

/// Routes that need no key. Whatever is not in this list needs one.
const OPEN: [&str; 6] = ["/", "/docs", "/openapi.json", "/health", "/health/live", "/health/ready"];
/// Files of the chat page.
const PAGE_FILES: &str = "/web/";
const ADMIN: [&str; 1] = ["/metrics"];

/// Lets a request in, or answers it at once.
pub(crate) async fn door(State(state): State<AppState>, mut request: Request, next: Next) -> Response {
    let began = Instant::now();
    let id = request_id(request.headers());
    let route = request.extensions().get::<MatchedPath>().map(|p| p.as_str().to_string());
    let (method, origin) = (method(request.method()), state.origins().allow(request.headers()));
    let mut key = None;
    let mut response = if let Some(response) = preflight(&request, origin.as_ref()) {
        response
    } else {
        match admit(&state, &request, route.as_deref()) {
            Ok(found) => {
                key = found;
                let caller = Caller::new(id.clone(), key.clone(), &state, request.headers());
                request.extensions_mut().insert(caller);
                run(&state, request, next).await
            }
            Err(e) => e.into_response(),
        }
    };
    finish(&mut response, &id, key.as_deref(), origin);
    let (route, status, took) = (route.unwrap_or_else(|| "other".into()), response.status(), began.elapsed());
    state.metrics().answered(method, &route, status.as_u16(), took);
    state.logger().write(|| {
        let line = if status.is_server_error() { Line::error("request") } else { Line::info("request") };
        line.text("request_id", &id)
            .optional("key", key.as_ref().map(|k| k.name.as_str()))
            .text("method", method)
            .text("route", &route)
            .number("status", status.as_u16())
            .number("ms", millis(took))
    });
    response
}

/// A panic in a handler costs its request, and the client is told.
async fn run(state: &AppState, request: Request, next: Next) -> Response {
    AssertUnwindSafe(next.run(request)).catch_unwind().await.unwrap_or_else(|_| {
        state.metrics().panicked();
        ApiError::internal().into_response()
    })
}

/// Checks everything that needs no body; answers the key that was presented.
fn admit(state: &AppState, request: &Request, route: Option<&str>) -> Result<Option<Arc<Key>>, ApiError> {
    let refuse = |why, e| {
        state.metrics().refused(why);
        Err(e)
    };
    if request.uri().path_and_query().is_some_and(|p| p.as_str().len() > PATH_BYTES_MAX) {
        return Err(ApiError::path_too_long(PATH_BYTES_MAX));
    }
    let keyring = state.keyring();
    let headers = request.headers();
    if keyring.is_empty() && state.is_local() && state.origins().is_foreign(request.method(), headers) {
        return refuse(Refusal::Foreign, ApiError::foreign());
    }
    let access = access(route);
    if access == Access::User && state.is_draining() {
        return refuse(Refusal::Draining, ApiError::draining());
    }
    if access == Access::Open || keyring.is_empty() {
        return Ok(None);
    }
    let Some(key) = presented(headers).and_then(|k| keyring.find(k)) else {
        return refuse(Refusal::Key, ApiError::no_key());
    };
    let may = match access {
        Access::Admin => key.role == Role::Admin || !keyring.has_admin(),
        _ => key.role == Role::User,
    };
    if may { Ok(Some(key)) } else { refuse(Refusal::Key, ApiError::wrong_role()) }
}

fn access(route: Option<&str>) -> Access {
    match route {
        Some(route) if OPEN.contains(&route) || route.starts_with(PAGE_FILES) => Access::Open,
        Some(route) if ADMIN.contains(&route) => Access::Admin,
        _ => Access::User,
    }
}

/// The key that a request carries, however it carries it.
fn presented(headers: &HeaderMap) -> Option<&str> {
    let text = |name: &HeaderName| headers.get(name).and_then(|v| v.to_str().ok());
    let bearer = text(&header::AUTHORIZATION).and_then(|v| {
        let (scheme, key) = v.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
    });
    let offered = || {
        text(&header::SEC_WEBSOCKET_PROTOCOL)?.split(',').find_map(|p| p.trim().strip_prefix(PROTOCOL_KEY))
    };
    bearer.or_else(|| text(&API_KEY)).or_else(offered).filter(|k| k.len() <= KEY_BYTES_MAX)
}

/// The client's own id, if it is short and plain, else a new one.
fn request_id(headers: &HeaderMap) -> String {
    let own = headers.get(&REQUEST_ID).and_then(|v| v.to_str().ok());
    let plain =
        |v: &&str| (1..=REQUEST_ID_BYTES_MAX).contains(&v.len()) && v.bytes().all(|b| b.is_ascii_graphic());
    own.filter(plain).map_or_else(new_request_id, str::to_string)
}

fn new_request_id() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    // The standard library's hash keys are random.
    format!("req_{:016x}", RandomState::new().hash_one(NEXT.fetch_add(1, Relaxed)))
}

/// The method as metrics and logs show it: clients may make up others.
fn method(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::DELETE => "DELETE",
        Method::PUT => "PUT",
        Method::HEAD => "HEAD",
        Method::OPTIONS => "OPTIONS",
        Method::PATCH => "PATCH",
        _ => "other",
    }
}

/// The answer to a browser that asks before it sends, for a page that may.
fn preflight(request: &Request, origin: Option<&HeaderValue>) -> Option<Response> {
    let headers = request.headers();
    let asks =
        request.method() == Method::OPTIONS && headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    if !asks || origin.is_none() {
        return None;
    }
    let mut response = StatusCode::NO_CONTENT.into_response();
    let out = response.headers_mut();
    out.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST, DELETE, OPTIONS"));
    // Clients add headers of their own by the dozen; none of them means anything unless a handler reads it.
    if let Some(wanted) = headers.get(header::ACCESS_CONTROL_REQUEST_HEADERS) {
        out.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, wanted.clone());
    }
    out.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600"));
    Some(response)
}

/// Headers of every answer.
fn finish(response: &mut Response, id: &str, key: Option<&Key>, origin: Option<HeaderValue>) {
    let headers = response.headers_mut();
    if let Ok(id) = HeaderValue::from_str(id) {
        headers.insert(REQUEST_ID, id);
    }
    if let Some(origin) = origin {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static(EXPOSED));
        headers.append(header::VARY, HeaderValue::from_static("origin"));
    }
    if let Some(key) = key {
        let (requests, tokens) = key.book.room(Moment::now());
        for (kind, room) in [("requests", requests), ("tokens", tokens)] {
            if let Some(room) = room {
                rate_limit_headers(kind, room, headers);
            }
        }
    }
}

fn rate_limit_headers(kind: &str, room: Room, headers: &mut HeaderMap) {
    let rows = [
        ("limit", room.limit.to_string()),
        ("remaining", room.remaining.to_string()),
        ("reset", duration_text(room.reset)),
    ];
    for (what, value) in rows {
        let name = HeaderName::try_from(format!("x-ratelimit-{what}-{kind}"));
        if let (Ok(name), Ok(value)) = (name, HeaderValue::try_from(value)) {
            headers.insert(name, value);
        }
    }
}

/// As OpenAI writes it: `340ms`, `12s`, `6m0s`, `2h3m4s`.
fn duration_text(d: Duration) -> String {
    if d < Duration::from_secs(1) {
        return format!("{}ms", d.as_micros().div_ceil(1000));
    }
    let s = d.as_secs() + u64::from(d.subsec_nanos() > 0);
    match (s / 3600, s / 60 % 60, s % 60) {
        (0, 0, s) => format!("{s}s"),
        (0, m, s) => format!("{m}m{s}s"),
        (h, m, s) => format!("{h}h{m}m{s}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_written_as_openai_writes_them() {
        for (millis, text) in [
            (0, "0ms"),
            (339, "339ms"),
            (12_000, "12s"),
            (12_001, "13s"),
            (360_000, "6m0s"),
            (7_384_000, "2h3m4s"),
        ] {
            assert_eq!(duration_text(Duration::from_millis(millis)), text);
        }
    }

    #[test]
    fn keys_are_found_wherever_clients_put_them() {
        for (name, value, key) in [
            ("authorization", "Bearer abc", Some("abc")),
            ("authorization", "bearer  abc ", Some("abc")),
            ("authorization", "Basic abc", None),
            ("authorization", "abc", None),
            ("x-api-key", "abc", Some("abc")),
            ("sec-websocket-protocol", "realtime, openai-insecure-api-key.abc", Some("abc")),
            ("sec-websocket-protocol", "realtime", None),
        ] {
            let headers =
                HeaderMap::from_iter([(HeaderName::from_static(name), HeaderValue::from_static(value))]);
            assert_eq!(presented(&headers), key, "{name}: {value}");
        }
        let long = HeaderValue::from_str(&"k".repeat(KEY_BYTES_MAX + 1)).unwrap();
        assert_eq!(presented(&HeaderMap::from_iter([(API_KEY, long)])), None);
    }

    #[test]
    fn ids_of_clients_are_kept_if_they_are_plain() {
        let id = |value: &str| {
            request_id(&HeaderMap::from_iter([(REQUEST_ID, HeaderValue::from_str(value).unwrap())]))
        };
        assert_eq!(id("abc-1"), "abc-1");
        for made_up in ["", "a b", &"x".repeat(REQUEST_ID_BYTES_MAX + 1)] {
            assert!(id(made_up).starts_with("req_"), "{made_up}");
        }
        assert_ne!(request_id(&HeaderMap::new()), request_id(&HeaderMap::new()));
    }
}
