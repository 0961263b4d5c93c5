//! `GET /ws`: several answers at a time over one socket.
//!
//! The client sends JSON texts:
//! * `{"type": "chat", "id": "a", "body": {...}}` asks for an answer. `body` is that of `/v1/chat/completions`; with
//!   `"type": "completion"` that of `/v1/completions`. `stream` is implied. `id` is the client's name for the answer,
//!   1 to 64 bytes. `"credit": 16` is optional: then at most 16 chunks come until more credit is given.
//! * `{"type": "credit", "id": "a", "chunks": 16}` allows more chunks.
//! * `{"type": "cancel", "id": "a"}` ends an answer: it costs nothing more within one step.
//!
//! The server sends, for each `id` in this order:
//! * `{"type": "chunk", "id": "a", "data": {...}}`: `data` is one event of the HTTP route's stream.
//! * one last message: `{"type": "done", "id": "a"}`, `{"type": "cancelled", "id": "a"}` or
//!   `{"type": "error", "id": "a", "status": 400, "error": {...}}` with the error of the HTTP route. The `id` is free
//!   again.
//!
//! A message that belongs to no answer is answered by an error whose `id` is null, and the socket stays open.
//!
//! Backpressure: a client that does not read, or that gives no credit, stops the tokens of its answers and nobody
//! else's. It is cut when it stands still for too long (`SOCKET_STALL_SECONDS_MAX`, `EngineOptions::reader_stall_max`).

use std::{collections::HashMap, sync::Arc};

use axum::{
    extract::{
        Request, State,
        ws::{WebSocket, close_code},
    },
    response::Response,
};
use serde_json::{Value, json};
use tokio::{
    sync::{Semaphore, oneshot},
    task::{Id, JoinError, JoinSet},
};

use super::{
    Place, binary,
    connection::{Incoming, Outbox, split},
    error_message, parse,
};
use crate::{
    doors::Doors,
    error::ApiError,
    limits::{SOCKET_CREDIT_MAX, SOCKET_ID_BYTES_MAX, SOCKET_REQUESTS_MAX},
    openai::fields::Fields,
    relay::Reply,
};

/// Opens a socket.
pub(crate) async fn open(State(doors): State<Doors>, request: Request) -> Result<Response, ApiError> {
    super::open(doors, request, run).await
}

async fn run(socket: WebSocket, place: Place) {
    let (mut inbox, outbox, writer) = split(socket);
    let mut closing = place.closing.clone();
    let mut session = Session {
        place: Arc::new(place),
        outbox: outbox.clone(),
        answers: HashMap::new(),
        tasks: JoinSet::new(),
    };
    let mut is_closing = *closing.borrow();
    loop {
        if is_closing && session.tasks.is_empty() {
            outbox.close((close_code::AWAY, "the server is stopping")).await;
            break;
        }
        tokio::select! {
            incoming = inbox.next() => match incoming {
                Incoming::Text(text) => {
                    let taken = if is_closing { Err(ApiError::stopped()) } else { session.take(&text) };
                    if let Err(e) = taken {
                        outbox.send(error_message(None, None, &e.to_json()["error"])).await;
                    }
                }
                Incoming::Binary(bytes) => {
                    let e = binary(bytes.len());
                    outbox.send(error_message(None, None, &e.to_json()["error"])).await;
                }
                Incoming::Ended => break,
            },
            Some(ended) = session.tasks.join_next_with_id() => session.forget(ended).await,
            Ok(()) = closing.changed(), if !is_closing => is_closing = true,
        }
    }
    // Dropping the tasks drops the answers, which cancels them.
    drop(session);
    drop((inbox, outbox));
    let _ = writer.await;
}

struct Session {
    place: Arc<Place>,
    outbox: Outbox,
    answers: HashMap<String, Answer>,
    /// Each ends with the last message of its answer.
    tasks: JoinSet<String>,
}

/// An answer that runs.
struct Answer {
    task: Id,
    credit: Option<Arc<Semaphore>>,
    cancel: Option<oneshot::Sender<()>>,
}

/// What a client may say.
enum Ask {
    Generate { path: &'static str, body: Value, credit: Option<usize> },
    Credit(usize),
    Cancel,
}

impl Session {
    /// Does what a message asks for. The error is of the message, not of an answer.
    fn take(&mut self, text: &str) -> Result<(), ApiError> {
        let (id, ask) = read(text)?;
        match ask {
            Ask::Generate { path, body, credit } => self.begin(id, path, body, credit),
            Ask::Credit(chunks) => {
                let answer = self.answer(&id)?;
                let credit = answer.credit.as_ref().ok_or_else(|| {
                    ApiError::invalid("id", "that answer was asked for without credit, it needs none")
                })?;
                if credit.available_permits() + chunks > SOCKET_CREDIT_MAX {
                    return Err(ApiError::invalid(
                        "chunks",
                        format!("makes a credit of more than {SOCKET_CREDIT_MAX}"),
                    ));
                }
                credit.add_permits(chunks);
                Ok(())
            }
            Ask::Cancel => {
                if let Some(cancel) = self.answer(&id)?.cancel.take() {
                    let _ = cancel.send(());
                }
                Ok(())
            }
        }
    }

    fn begin(
        &mut self,
        id: String,
        path: &'static str,
        body: Value,
        credit: Option<usize>,
    ) -> Result<(), ApiError> {
        if self.answers.contains_key(&id) {
            return Err(ApiError::invalid("id", "an answer of that name is running"));
        }
        if self.answers.len() >= SOCKET_REQUESTS_MAX {
            let message = format!("{SOCKET_REQUESTS_MAX} answers run on this socket, and no more may");
            return Err(ApiError::invalid("id", message));
        }
        let credit = credit.map(|n| Arc::new(Semaphore::new(n)));
        let (cancel, cancelled) = oneshot::channel();
        let (place, outbox) = (Arc::clone(&self.place), self.outbox.clone());
        let task = self.tasks.spawn(answer(place, outbox, id.clone(), path, body, credit.clone(), cancelled));
        self.answers.insert(id, Answer { task: task.id(), credit, cancel: Some(cancel) });
        Ok(())
    }

    fn answer(&mut self, id: &str) -> Result<&mut Answer, ApiError> {
        self.answers.get_mut(id).ok_or_else(|| ApiError::invalid("id", "no answer of that name is running"))
    }

    /// An answer has ended. Whoever reads its last message may use its name again, so it is forgotten before.
    async fn forget(&mut self, ended: Result<(Id, String), JoinError>) {
        let task = ended.as_ref().map_or_else(JoinError::id, |(id, _)| *id);
        let Some(id) = self.answers.iter().find(|(_, a)| a.task == task).map(|(id, _)| id.clone()) else {
            return;
        };
        self.answers.remove(&id);
        let failed = |_| error_message(Some(&id), None, &ApiError::internal().to_json()["error"]);
        self.outbox.send(ended.map_or_else(failed, |(_, last)| last)).await;
    }
}

/// A message's `id` and what it asks for.
fn read(text: &str) -> Result<(String, Ask), ApiError> {
    let mut fields = Fields::nested(parse(text)?, "message")?;
    let missing = |name: String| ApiError::invalid(name, "is missing");
    let kind = fields.string("type")?.ok_or_else(|| missing(fields.name("type")))?;
    let id = fields.string("id")?.ok_or_else(|| missing(fields.name("id")))?;
    if id.is_empty() || id.len() > SOCKET_ID_BYTES_MAX {
        return Err(ApiError::invalid("message.id", format!("must have 1 to {SOCKET_ID_BYTES_MAX} bytes")));
    }
    let ask = match kind.as_str() {
        "chat" => generate(&mut fields, "/v1/chat/completions")?,
        "completion" => generate(&mut fields, "/v1/completions")?,
        "credit" => {
            Ask::Credit(chunks(&mut fields, "chunks")?.ok_or_else(|| missing(fields.name("chunks")))?)
        }
        "cancel" => Ask::Cancel,
        _ => return Err(ApiError::invalid("message.type", "must be chat, completion, credit or cancel")),
    };
    fields.finish()?;
    Ok((id, ask))
}

fn generate(fields: &mut Fields, path: &'static str) -> Result<Ask, ApiError> {
    let mut body = fields.object("body")?.ok_or_else(|| ApiError::invalid("message.body", "is missing"))?;
    if body.get("stream").is_some_and(|stream| *stream != Value::Bool(true)) {
        return Err(ApiError::invalid("message.body.stream", "a socket always streams: leave it out"));
    }
    body.insert("stream".into(), true.into());
    Ok(Ask::Generate { path, body: body.into(), credit: chunks(fields, "credit")? })
}

fn chunks(fields: &mut Fields, name: &str) -> Result<Option<usize>, ApiError> {
    match fields.count(name)? {
        Some(n) if n > SOCKET_CREDIT_MAX => {
            Err(ApiError::invalid(fields.name(name), format!("{n} is more than {SOCKET_CREDIT_MAX}")))
        }
        n => Ok(n),
    }
}

/// Runs one answer; answers its last message, which is sent when the answer is forgotten.
async fn answer(
    place: Arc<Place>,
    outbox: Outbox,
    id: String,
    path: &'static str,
    body: Value,
    credit: Option<Arc<Semaphore>>,
    cancelled: oneshot::Receiver<()>,
) -> String {
    tokio::select! {
        biased;
        Ok(()) = cancelled => json!({"type": "cancelled", "id": id}).to_string(),
        last = stream(&place, &outbox, &id, path, &body, credit.as_deref()) => last,
    }
}

/// Sends the chunks of an answer; answers its last message.
async fn stream(
    place: &Place,
    outbox: &Outbox,
    id: &str,
    path: &'static str,
    body: &Value,
    credit: Option<&Semaphore>,
) -> String {
    let mut events = match place.doors.relay.stream(&place.asker, path, body).await {
        Reply::Stream(events) => events,
        Reply::Refused(refusal) => return error_message(Some(id), Some(refusal.status), &refusal.error),
    };
    let name = Value::from(id).to_string();
    loop {
        // Without credit nothing is taken, so that the engine pauses this answer.
        if let Some(credit) = credit
            && let Ok(permit) = credit.acquire().await
        {
            permit.forget();
        }
        let Some(data) = events.next().await else {
            return error_message(Some(id), None, &ApiError::internal().to_json()["error"]);
        };
        if data == "[DONE]" {
            return json!({"type": "done", "id": id}).to_string();
        }
        if data.starts_with("{\"error\":") {
            let mut body: Value = serde_json::from_str(&data).unwrap_or_default();
            return error_message(Some(id), None, &body["error"].take());
        }
        outbox.send(format!(r#"{{"type":"chunk","id":{name},"data":{data}}}"#)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_that_are_wrong_name_what_is_wrong() {
        for (text, want) in [
            ("{", "not valid JSON"),
            ("[]", "must be an object"),
            ("{}", "message.type: is missing"),
            (r#"{"type":"chat"}"#, "message.id: is missing"),
            (r#"{"type":"chat","id":7}"#, "message.id: must be a string"),
            (r#"{"type":"chat","id":""}"#, "message.id: must have 1 to 64 bytes"),
            (r#"{"type":"chat","id":"a"}"#, "message.body: is missing"),
            (r#"{"type":"chat","id":"a","body":[]}"#, "message.body: must be an object"),
            (r#"{"type":"chat","id":"a","body":{"stream":false}}"#, "message.body.stream"),
            (r#"{"type":"chat","id":"a","body":{},"credit":-1}"#, "message.credit"),
            (r#"{"type":"chat","id":"a","body":{},"credit":1000001}"#, "message.credit"),
            (r#"{"type":"chat","id":"a","body":{},"more":1}"#, "message.more"),
            (r#"{"type":"credit","id":"a"}"#, "message.chunks: is missing"),
            (r#"{"type":"cancel","id":"a","body":{}}"#, "message.body"),
            (r#"{"type":"sing","id":"a"}"#, "message.type: must be"),
        ] {
            let Err(e) = read(text) else { panic!("{text} was accepted") };
            let message = e.to_json()["error"]["message"].to_string();
            assert!(message.contains(want), "{text}: {message}");
        }
        assert!(read(&format!(r#"{{"type":"cancel","id":"{}"}}"#, "é".repeat(32))).is_ok());
        assert!(read(&format!(r#"{{"type":"cancel","id":"{}"}}"#, "é".repeat(33))).is_err());
    }
}
