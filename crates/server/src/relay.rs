//! Requests of this server to itself: how every other door reaches `/v1/chat/completions`.
//!
//! A door turns what it is asked into a body of a route that exists and turns that route's events into its own. So
//! prompts, fields, limits, keys and books are in one place, whichever door a request came through.

mod events;
mod pieces;

use axum::{
    Json, Router,
    body::{Body, to_bytes},
    http::{Extensions, HeaderMap, HeaderValue, Method, Request, StatusCode, header, request::Parts},
    response::{IntoResponse, Response},
};
use serde_json::{Map, Value, json};
use tower::ServiceExt;

pub(crate) use self::{
    events::Events,
    pieces::{Ended, Piece, Pieces},
};
use crate::{
    caller::Caller,
    error::ApiError,
    limits::{BODY_BYTES_MAX, ERROR_BODY_BYTES_MAX},
};

/// The routes that doors lead to. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Relay(Router);

/// Who asks: headers and what layers found out about the client.
#[derive(Clone)]
pub(crate) struct Asker {
    headers: HeaderMap,
    extensions: Extensions,
}

/// An answer to a relayed request.
pub(crate) enum Reply {
    /// A stream of events.
    Stream(Events),
    /// A status that is no success.
    Refused(Refusal),
}

/// What a route answered instead of a stream.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) status: StatusCode,
    headers: HeaderMap,
    /// `message`, `type`, `param` and `code`, as OpenAI frames them.
    pub(crate) error: Value,
}

impl Asker {
    /// Who sent this request.
    pub(crate) fn new(parts: &Parts) -> Self {
        let mut headers = HeaderMap::new();
        for name in ["authorization", "x-api-key", "sec-websocket-protocol", "host", "user-agent"] {
            if let Some(value) = parts.headers.get(name) {
                headers.insert(name, value.clone());
            }
        }
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        Self { headers, extensions: parts.extensions.clone() }
    }

    /// What tells one client's things from another's: the name of its key; where no keys are asked for, what it
    /// presents as one.
    pub(crate) fn credentials(&self) -> Vec<Vec<u8>> {
        if let Some(key) = self.extensions.get::<Caller>().and_then(Caller::key) {
            return vec![key.name.clone().into_bytes()];
        }
        ["authorization", "x-api-key", "sec-websocket-protocol"]
            .map(|name| self.headers.get(name).map(|v| v.as_bytes().to_vec()).unwrap_or_default())
            .to_vec()
    }
}

impl Relay {
    pub(crate) fn new(router: Router) -> Self {
        Self(router)
    }

    /// Posts a body that asks for a stream.
    pub(crate) async fn stream(&self, asker: &Asker, path: &'static str, body: &Value) -> Reply {
        let response = self.post(asker, path, body).await;
        if response.status().is_success() {
            return Reply::Stream(Events::new(response.into_body()));
        }
        Reply::Refused(Refusal::read(response).await)
    }

    /// Posts a body that asks for one JSON value.
    pub(crate) async fn ask(
        &self,
        asker: &Asker,
        path: &'static str,
        body: &Value,
    ) -> Result<Value, Refusal> {
        let response = self.post(asker, path, body).await;
        if !response.status().is_success() {
            return Err(Refusal::read(response).await);
        }
        let bytes = to_bytes(response.into_body(), BODY_BYTES_MAX).await;
        let value = bytes.ok().and_then(|b| serde_json::from_slice(&b).ok());
        value.ok_or_else(|| ApiError::internal().into())
    }

    async fn post(&self, asker: &Asker, path: &'static str, body: &Value) -> Response {
        let mut request = Request::new(Body::from(body.to_string()));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = axum::http::Uri::from_static(path);
        *request.headers_mut() = asker.headers.clone();
        *request.extensions_mut() = asker.extensions.clone();
        let Ok(response) = self.0.clone().oneshot(request).await;
        response
    }
}

/// Of a body for the chat route, what the prompt is made of: a body for `/tokenize`.
pub(crate) fn prompt(mut chat: Map<String, Value>) -> Value {
    const KEPT: [&str; 8] = [
        "model",
        "messages",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "thinking",
        "reasoning_effort",
        "chat_template_kwargs",
    ];
    chat.retain(|name, _| KEPT.contains(&name.as_str()));
    chat.into()
}

impl Refusal {
    async fn read(response: Response) -> Self {
        let (parts, body) = response.into_parts();
        let bytes = to_bytes(body, ERROR_BODY_BYTES_MAX).await.unwrap_or_default();
        let mut body: Value = serde_json::from_slice(&bytes).unwrap_or_default();
        let error = match body["error"].take() {
            Value::Null => ApiError::internal().to_json()["error"].take(),
            error => error,
        };
        Self::new(parts.status, parts.headers, error)
    }

    /// With the headers of the answer but those of its body.
    fn new(status: StatusCode, mut headers: HeaderMap, error: Value) -> Self {
        headers.remove(header::CONTENT_LENGTH);
        headers.remove(header::CONTENT_TYPE);
        Self { status, headers, error }
    }

    /// The same error with the names that this door's fields have.
    pub(crate) fn rename(mut self, names: &[(&str, &str)]) -> Self {
        let Some(param) = self.error["param"].as_str() else { return self };
        let of = |name: &str| {
            param == name || param.starts_with(&format!("{name}[")) || param.starts_with(&format!("{name}."))
        };
        let Some((from, to)) = names.iter().find(|(from, _)| of(from)) else { return self };
        let renamed = format!("{to}{}", &param[from.len()..]);
        let message = self.error["message"].as_str().unwrap_or_default();
        let message = match message.strip_prefix(param) {
            Some(rest) => format!("{renamed}{rest}"),
            None => message.to_string(),
        };
        self.error["message"] = message.into();
        self.error["param"] = renamed.into();
        self
    }

    /// With another body than OpenAI's.
    pub(crate) fn respond(self, body: Value) -> Response {
        (self.status, self.headers, Json(body)).into_response()
    }
}

impl From<ApiError> for Refusal {
    fn from(e: ApiError) -> Self {
        let error = e.to_json()["error"].take();
        let (parts, _) = e.into_response().into_parts();
        Self::new(parts.status, parts.headers, error)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let body = json!({"error": self.error});
        self.respond(body)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(param: Option<&str>, message: &str) -> Refusal {
        Refusal {
            status: StatusCode::BAD_REQUEST,
            headers: HeaderMap::new(),
            error: json!({"param": param, "message": message}),
        }
    }

    #[test]
    fn errors_name_the_fields_of_the_door() {
        let names = [("messages", "input"), ("max_completion_tokens", "max_output_tokens")];
        for (param, message, want) in [
            (Some("messages"), "messages: is empty", json!({"param": "input", "message": "input: is empty"})),
            (
                Some("messages[2].role"),
                "messages[2].role: no",
                json!({"param": "input[2].role", "message": "input[2].role: no"}),
            ),
            (
                Some("messages_of"),
                "messages_of: no",
                json!({"param": "messages_of", "message": "messages_of: no"}),
            ),
            (
                Some("max_completion_tokens"),
                "must be 1",
                json!({"param": "max_output_tokens", "message": "must be 1"}),
            ),
            (None, "no", json!({"param": null, "message": "no"})),
        ] {
            assert_eq!(refusal(param, message).rename(&names).error, want);
        }
    }

    #[test]
    fn an_asker_carries_who_asks_and_no_detail_of_the_connection() {
        let request = Request::builder()
            .header("authorization", "Bearer k")
            .header("sec-websocket-key", "x")
            .header("connection", "upgrade")
            .extension(7u8)
            .body(())
            .unwrap_or_else(|e| panic!("{e}"));
        let asker = Asker::new(&request.into_parts().0);
        assert_eq!(asker.headers.len(), 2, "{:?}", asker.headers);
        assert_eq!(asker.headers["authorization"], "Bearer k");
        assert_eq!(asker.headers["content-type"], "application/json");
        assert_eq!(asker.extensions.get::<u8>(), Some(&7));
    }
}
