//! Errors as OpenAI frames them. HTTP status codes are chosen here and nowhere else.

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use oxseek_engine::{RequestError, SubmitError};
use serde_json::{Value, json};

use crate::{
    json::JsonError,
    quota::{Exceeded, Limit},
};

/// An error that a client gets. Its message never quotes a prompt.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ApiError {
    status: StatusCode,
    kind: &'static str,
    code: Option<&'static str>,
    param: Option<String>,
    message: String,
    /// Seconds.
    retry_after: Option<u64>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, code: None, param: None, message: message.into(), retry_after: None }
    }

    /// A field that is wrong.
    pub(crate) fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        let param = param.into();
        let message = format!("{param}: {}", message.into());
        let e = Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message);
        Self { code: Some("invalid_value"), param: Some(param), ..e }
    }

    /// A field or value that OpenAI has and this server has not.
    pub(crate) fn unsupported(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { code: Some("unsupported_parameter"), ..Self::invalid(param, message) }
    }

    /// What the engine refused; `param` is the field's name on this route.
    pub(crate) fn refused(param: &str, e: &RequestError) -> Self {
        let too_long = e.field == "prompt" && e.message.contains("context");
        let code = if too_long { "context_length_exceeded" } else { "invalid_value" };
        Self { code: Some(code), ..Self::invalid(param, e.message.as_str()) }
    }

    /// A body that is no JSON object.
    pub(crate) fn body(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// A body or a message (`what`) that is no JSON, or holds a key twice.
    pub(crate) fn json(what: &str, e: JsonError) -> Self {
        match e {
            JsonError::Syntax(why) => Self::body(format!("the {what} is not valid JSON: {why}")),
            JsonError::Twice(place) => Self::invalid(place, "is there twice"),
        }
    }

    pub(crate) fn content_type() -> Self {
        let message = "the body must be JSON, with the header content-type: application/json";
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "invalid_request_error", message)
    }

    pub(crate) fn content_encoding(found: &HeaderValue) -> Self {
        let message =
            format!("the header content-encoding: {found:?} is not supported; send the body as it is");
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "invalid_request_error", message)
    }

    pub(crate) fn body_too_large(bytes_max: usize) -> Self {
        let message = format!("the body is larger than {bytes_max} bytes");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", message)
    }

    pub(crate) fn body_too_slow() -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", "the body took too long to arrive")
    }

    pub(crate) fn model_not_found(name: &str) -> Self {
        let short: String = name.chars().take(100).collect();
        let message = format!("model: {short:?} is not served here; GET /v1/models lists what is");
        let e = Self::new(StatusCode::NOT_FOUND, "invalid_request_error", message);
        Self { code: Some("model_not_found"), param: Some("model".into()), ..e }
    }

    pub(crate) fn no_such_route() -> Self {
        let message = "no such path; GET /openapi.json lists all";
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", message)
    }

    pub(crate) fn wrong_method() -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", "this path has no such method")
    }

    pub(crate) fn response_not_found(id: &str) -> Self {
        let short: String = id.chars().take(100).collect();
        let message = format!("response {short:?} is not stored here, or not any more");
        let e = Self::new(StatusCode::NOT_FOUND, "invalid_request_error", message);
        Self { code: Some("response_not_found"), param: Some("response_id".into()), ..e }
    }

    pub(crate) fn previous_response_not_found(id: &str) -> Self {
        let short: String = id.chars().take(100).collect();
        let e =
            Self::invalid("previous_response_id", format!("{short:?} is not stored here, or not any more"));
        Self { code: Some("previous_response_not_found"), ..e }
    }

    /// A path that speaks WebSocket only.
    pub(crate) fn upgrade_required() -> Self {
        let message = "this path is a WebSocket: connect with ws:// or wss://";
        Self::new(StatusCode::UPGRADE_REQUIRED, "invalid_request_error", message)
    }

    /// A page of another site.
    pub(crate) fn foreign_origin() -> Self {
        let message = "the header origin names another site than this server";
        Self::new(StatusCode::FORBIDDEN, "permission_error", message)
    }

    pub(crate) fn too_many_sockets() -> Self {
        let e = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", "too many WebSockets are open");
        Self { code: Some("too_many_connections"), retry_after: Some(1), ..e }
    }

    pub(crate) fn loading() -> Self {
        let e = Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable_error", "the model is loading");
        Self { retry_after: Some(1), ..e }
    }

    pub(crate) fn stopped() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable_error", "the engine has stopped")
    }

    /// A step takes longer than it ever should.
    pub(crate) fn stuck() -> Self {
        let message = "the engine is stuck in a step";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable_error", message)
    }

    pub(crate) fn draining() -> Self {
        let message = "the server is stopping and takes no more requests";
        let e = Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable_error", message);
        Self { code: Some("draining"), retry_after: Some(1), ..e }
    }

    /// No API key, or an unknown one. The message never quotes what was presented.
    pub(crate) fn no_key() -> Self {
        let message = "a valid API key is needed: send it as `Authorization: Bearer KEY` or `x-api-key: KEY`";
        let e = Self::new(StatusCode::UNAUTHORIZED, "invalid_request_error", message);
        Self { code: Some("invalid_api_key"), ..e }
    }

    /// A key that is for something else.
    pub(crate) fn wrong_role() -> Self {
        let message = "this API key is not for this path: models need a user's key, metrics an admin's";
        let e = Self::new(StatusCode::FORBIDDEN, "invalid_request_error", message);
        Self { code: Some("wrong_key"), ..e }
    }

    /// A browser sent this for a page or a name that is not ours.
    pub(crate) fn foreign() -> Self {
        let message = "a server without keys answers local names and its own pages only; allow others with \
                       --allowed-host and --cors-origin, or set a key";
        let e = Self::new(StatusCode::FORBIDDEN, "invalid_request_error", message);
        Self { code: Some("foreign_origin"), ..e }
    }

    pub(crate) fn path_too_long(bytes_max: usize) -> Self {
        let message = format!("the path is longer than {bytes_max} bytes");
        Self::new(StatusCode::URI_TOO_LONG, "invalid_request_error", message)
    }

    /// A limit of the key.
    pub(crate) fn limit_reached(e: &Exceeded) -> Self {
        let Exceeded { limit, allowed, asked, retry_after } = *e;
        let tokens = matches!(limit, Limit::TokensPerMinute | Limit::TokensPerDay);
        let message = if retry_after.is_none() {
            format!(
                "this key's limit is {allowed} {limit}, and the request may take {asked} tokens, prompt and \
                 answer together: lower max_tokens"
            )
        } else if tokens {
            format!(
                "this key's limit of {allowed} {limit} has no room for the {asked} tokens that the request \
                 may take now"
            )
        } else {
            format!("this key's limit of {allowed} {limit} is reached")
        };
        let e = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message);
        let code = if limit == Limit::TokensPerDay { "insufficient_quota" } else { "rate_limit_exceeded" };
        let seconds = |d: std::time::Duration| d.as_secs() + u64::from(d.subsec_nanos() > 0);
        Self { code: Some(code), retry_after: retry_after.map(seconds), ..e }
    }

    pub(crate) fn internal() -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", "the server met an internal error")
    }

    /// A grammar that compiled turned out to be too much work in the middle of an answer.
    pub(crate) fn grammar(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// The engine gave up on a request.
    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    /// OpenAI's error body.
    pub(crate) fn to_json(&self) -> Value {
        json!({"error": {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }})
    }
}

impl From<RequestError> for ApiError {
    fn from(e: RequestError) -> Self {
        Self::refused(e.field, &e)
    }
}

impl From<SubmitError> for ApiError {
    fn from(e: SubmitError) -> Self {
        match e {
            SubmitError::Busy | SubmitError::TenantBusy => {
                let e = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", e.to_string());
                Self { code: Some("queue_full"), retry_after: Some(1), ..e }
            }
            SubmitError::Stopped => Self::stopped(),
        }
    }
}

impl From<oxseek_text::Error> for ApiError {
    fn from(e: oxseek_text::Error) -> Self {
        Self::invalid("messages", e.to_string())
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.to_json())).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
