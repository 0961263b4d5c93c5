//! Anthropic's `/v1/messages`.

mod output;
mod request;

use std::collections::VecDeque;

use axum::{
    Json,
    extract::{Request, State},
    http::StatusCode,
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use self::{
    output::Output,
    request::{Asked, NAMES, conversation},
};
use crate::{
    doors::Doors,
    error::ApiError,
    event_stream,
    openai::{body, fields::Fields},
    relay::{Asker, Piece, Pieces, Refusal, Reply, prompt},
};

/// An error in Anthropic's frame.
pub(crate) struct Failure(Refusal);

/// Answers a conversation.
pub(crate) async fn create(State(doors): State<Doors>, request: Request) -> Result<Response, Failure> {
    let (parts, body) = request.into_parts();
    let asker = Asker::new(&parts);
    let body = body::read(&parts.headers, body).await?;
    let asked = doors.state.prepare(move || Asked::read(Fields::from_body(&body)?)).await?;
    let model = doors.state.model()?;
    let events = match doors.relay.stream(&asker, "/v1/chat/completions", &asked.chat).await {
        Reply::Stream(events) => events,
        Reply::Refused(refusal) => return Err(Failure(refusal.rename(&NAMES))),
    };
    let mut output = Output::new(&model.name);
    output.begin();
    let mut run = Run { pieces: Pieces::new(events), ready: output.take_events().into(), output };
    if asked.stream {
        let events =
            futures_util::stream::unfold(run, |mut run| async move { run.next().await.map(|e| (e, run)) });
        return Ok(event_stream::respond(events));
    }
    while let Some(event) = run.next().await {
        if event["type"] == "error" {
            let message = event["error"]["message"].as_str().unwrap_or_default();
            return Err(ApiError::failed(message).into());
        }
    }
    Ok(Json(run.output.message()).into_response())
}

/// Reads a body without answering it.
pub(crate) fn check(body: &[u8]) -> Result<(), ApiError> {
    Asked::read(Fields::from_body(body)?).map(drop)
}

/// Reads a body of `count_tokens`; answers the chat body that it makes.
fn read_count(body: &[u8]) -> Result<Value, ApiError> {
    let mut fields = Fields::from_body(body)?;
    let conversation = conversation(&mut fields)?;
    fields.finish()?;
    Ok(prompt(conversation))
}

/// Reads a body of `count_tokens` without answering it.
pub(crate) fn check_count(body: &[u8]) -> Result<(), ApiError> {
    read_count(body).map(drop)
}

/// How many tokens a conversation's prompt has.
pub(crate) async fn count_tokens(
    State(doors): State<Doors>,
    request: Request,
) -> Result<Json<Value>, Failure> {
    let (parts, body) = request.into_parts();
    let asker = Asker::new(&parts);
    let body = body::read(&parts.headers, body).await?;
    let body = doors.state.prepare(move || read_count(&body)).await?;
    let counted = doors.relay.ask(&asker, "/tokenize", &body).await;
    let counted = counted.map_err(|refusal| Failure(refusal.rename(&NAMES)))?;
    Ok(Json(json!({"input_tokens": counted["count"]})))
}

/// A message that is being made. Dropping it ends it.
struct Run {
    pieces: Pieces,
    output: Output,
    ready: VecDeque<Value>,
}

impl Run {
    /// The next event; None at the end.
    async fn next(&mut self) -> Option<Value> {
        while self.ready.is_empty() {
            let piece: Piece = self.pieces.next().await?;
            self.output.push(piece);
            self.ready.extend(self.output.take_events());
        }
        self.ready.pop_front()
    }
}

impl From<ApiError> for Failure {
    fn from(e: ApiError) -> Self {
        Self(e.into())
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let kind = match self.0.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::FORBIDDEN => "permission_error",
            StatusCode::NOT_FOUND => "not_found_error",
            StatusCode::PAYLOAD_TOO_LARGE => "request_too_large",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            StatusCode::SERVICE_UNAVAILABLE => "overloaded_error",
            status if status.is_client_error() => "invalid_request_error",
            _ => "api_error",
        };
        let error = json!({"type": "error", "error": {"type": kind, "message": self.0.error["message"]}});
        self.0.respond(error)
    }
}
