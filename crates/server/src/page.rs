//! The chat page at `/` and its parts under `/web/`, as they are in the folder `web`: no build makes them.

use axum::{
    extract::Path,
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};

use crate::error::ApiError;

/// A file of the page.
struct Part {
    name: &'static str,
    text: &'static str,
    /// FNV-1a of the text: another text has another tag.
    hash: u64,
}

macro_rules! part {
    ($name:literal) => {{
        const TEXT: &str = include_str!(concat!("../web/", $name));
        const HASH: u64 = fnv1a(TEXT.as_bytes());
        Part { name: $name, text: TEXT, hash: HASH }
    }};
}

const PAGE: Part = part!("index.html");
const PARTS: [Part; 19] = [
    part!("answer.js"),
    part!("app.js"),
    part!("clipboard.js"),
    part!("element.js"),
    part!("events.js"),
    part!("icon.svg"),
    part!("library.js"),
    part!("log.js"),
    part!("markdown.js"),
    part!("message.css"),
    part!("message.js"),
    part!("page.css"),
    part!("prose.js"),
    part!("server.js"),
    part!("settings.js"),
    part!("sidebar.js"),
    part!("syntax.js"),
    part!("theme.js"),
    part!("toolcall.js"),
];

/// The page loads from and talks to this server alone, runs no script of its own text, makes no HTML from strings
/// (trusted types), and nobody may frame it.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
                      require-trusted-types-for 'script'; trusted-types 'none'";
const SECURITY: [(HeaderName, &str); 6] = [
    (header::CONTENT_SECURITY_POLICY, POLICY),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::X_FRAME_OPTIONS, "DENY"),
    (header::REFERRER_POLICY, "no-referrer"),
    (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
    (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
];

/// The page; it loads while the model does.
pub(crate) async fn page(headers: HeaderMap) -> Response {
    respond(&PAGE, &headers)
}

/// A script, style or picture of the page.
pub(crate) async fn part(Path(name): Path<String>, headers: HeaderMap) -> Result<Response, ApiError> {
    let part = PARTS.iter().find(|p| p.name == name).ok_or_else(ApiError::no_such_route)?;
    Ok(respond(part, &headers))
}

/// The part, or 304 where the browser has it as it is.
fn respond(part: &Part, asked: &HeaderMap) -> Response {
    let tag = format!("\"{:016x}\"", part.hash);
    let mut response = if is_known(asked, &tag) {
        StatusCode::NOT_MODIFIED.into_response()
    } else {
        ([(header::CONTENT_TYPE, media_type(part.name))], part.text).into_response()
    };
    let headers = response.headers_mut();
    for (name, value) in SECURITY {
        headers.insert(name, HeaderValue::from_static(value));
    }
    // Kept, but asked for again each time: parts of two versions of the server must not meet in one page.
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    if let Ok(tag) = HeaderValue::try_from(tag) {
        headers.insert(header::ETAG, tag);
    }
    response
}

/// Whether `If-None-Match` names the tag (RFC 9110, 13.1.2: compared weakly).
fn is_known(asked: &HeaderMap, tag: &str) -> bool {
    let lists = asked.get_all(header::IF_NONE_MATCH).iter().filter_map(|v| v.to_str().ok());
    lists
        .flat_map(|list| list.split(','))
        .map(str::trim)
        .any(|t| t == "*" || t.trim_start_matches("W/") == tag)
}

fn media_type(name: &str) -> &'static str {
    match name.rsplit('.').next() {
        Some("html") => "text/html; charset=utf-8",
        Some("css") => "text/css; charset=utf-8",
        Some("js") => "text/javascript; charset=utf-8",
        Some("svg") => "image/svg+xml",
        _ => "application/octet-stream",
    }
}

const fn fnv1a(bytes: &[u8]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325;
    let mut at = 0;
    while at < bytes.len() {
        hash = (hash ^ bytes[at] as u64).wrapping_mul(0x0100_0000_01b3);
        at += 1;
    }
    hash
}
