//! `GET /v1/responses`, upgraded: OpenAI's WebSocket mode of the Responses API.
//!
//! The client sends `{"type": "response.create", ...}` with the fields of `POST /v1/responses` (a socket always
//! streams), and gets the same events, one JSON text each. One response runs at a time;
//! `{"type": "response.cancel"}` ends it. `previous_response_id` may name the socket's last response even when it was
//! not stored. An error is `{"type": "error", "status": 400, "error": {...}}`, and the socket stays open.

use axum::{
    extract::{
        Request, State,
        ws::{WebSocket, close_code},
    },
    response::Response,
};
use serde_json::{Value, json};

use super::{
    Place, binary,
    connection::{Incoming, Outbox, split},
    parse,
};
use crate::{
    doors::Doors,
    error::ApiError,
    openai::fields::Fields,
    relay::Refusal,
    responses::{Asked, Memory, Run},
};

/// Opens a socket.
pub(crate) async fn open(State(doors): State<Doors>, request: Request) -> Result<Response, ApiError> {
    super::open(doors, request, run).await
}

async fn run(socket: WebSocket, mut place: Place) {
    let (mut inbox, outbox, writer) = split(socket);
    let mut session = Session { outbox: outbox.clone(), memory: Memory::default(), running: None };
    let mut is_closing = *place.closing.borrow();
    loop {
        if is_closing && session.running.is_none() {
            outbox.close((close_code::AWAY, "the server is stopping")).await;
            break;
        }
        tokio::select! {
            incoming = inbox.next() => {
                let taken = match incoming {
                    Incoming::Text(_) if is_closing => Err(ApiError::stopped().into()),
                    Incoming::Text(text) => session.take(&place, &text).await,
                    Incoming::Binary(bytes) => Err(binary(bytes.len()).into()),
                    Incoming::Ended => break,
                };
                if let Err(refusal) = taken {
                    let error = json!({
                        "type": "error", "status": refusal.status.as_u16(), "error": refusal.error,
                    });
                    outbox.send(error.to_string()).await;
                }
            }
            event = next(&mut session.running) => session.pass_on(event).await,
            Ok(()) = place.closing.changed(), if !is_closing => is_closing = true,
        }
    }
    drop((session, inbox, outbox));
    let _ = writer.await;
}

struct Session {
    outbox: Outbox,
    memory: Memory,
    running: Option<Run>,
}

/// The next event of what runs; waits for ever where nothing does.
async fn next(running: &mut Option<Run>) -> Option<Value> {
    match running {
        Some(run) => run.next().await,
        None => std::future::pending().await,
    }
}

impl Session {
    /// Does what a message asks for.
    async fn take(&mut self, place: &Place, text: &str) -> Result<(), Refusal> {
        let Value::Object(mut message) = parse(text)? else {
            return Err(ApiError::body("the message must be a JSON object").into());
        };
        match message.remove("type").as_ref().and_then(Value::as_str) {
            Some("response.create") => {}
            Some("response.cancel") => {
                self.running = None;
                return Ok(());
            }
            _ => return Err(ApiError::invalid("type", "must be response.create or response.cancel").into()),
        }
        if self.running.is_some() {
            return Err(ApiError::invalid("type", "a response is running: one at a time on a socket").into());
        }
        for name in ["stream", "background"] {
            if message.remove(name).is_some() {
                return Err(ApiError::invalid(name, "a socket always streams: leave it out").into());
            }
        }
        let asked = Asked::read(Fields::from_body(Value::from(message).to_string().as_bytes())?)?;
        self.running = Some(Run::begin(&place.doors, &place.asker, asked, &self.memory).await?);
        Ok(())
    }

    /// Sends an event. After the last one the response is only remembered: the next may be asked for at once.
    async fn pass_on(&mut self, event: Option<Value>) {
        if let Some(run) = self.running.take_if(|run| run.is_over()) {
            self.memory.keep(&run);
        }
        if let Some(event) = event {
            self.outbox.send(event.to_string()).await;
        }
    }
}
