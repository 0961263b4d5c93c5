//! A response that is being made.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use serde_json::Value;
use tokio::sync::watch;

use super::{
    output::{Output, new_id},
    request::{Asked, NAMES},
    store::{Store, Stored},
};
use crate::{
    doors::Doors,
    error::ApiError,
    relay::{Asker, Piece, Pieces, Refusal, Reply},
};

/// What a socket remembers: its last response, stored or not.
#[derive(Default)]
pub(crate) struct Memory(Option<(String, Vec<Arc<Value>>)>);

/// A response that is being made. Dropping it ends it.
pub(crate) struct Run {
    pieces: Option<Pieces>,
    output: Output,
    ready: VecDeque<Value>,
    id: String,
    input: Vec<Arc<Value>>,
    own: usize,
    /// None when it is not stored.
    store: Option<Store>,
    asker: Asker,
    cancel: watch::Sender<bool>,
    cancelled: watch::Receiver<bool>,
}

impl Memory {
    /// Remembers a response instead of the one before.
    pub(crate) fn keep(&mut self, run: &Run) {
        self.0 = Some((run.id.clone(), run.stored().history()));
    }
}

impl Run {
    /// Asks the chat route for what a response needs.
    pub(crate) async fn begin(
        doors: &Doors,
        asker: &Asker,
        asked: Asked,
        memory: &Memory,
    ) -> Result<Self, Refusal> {
        let model = doors.state.model()?;
        let (asked, history, body) = with_history(doors, asker, asked, memory).await?;
        let events = match doors.relay.stream(asker, "/v1/chat/completions", &body).await {
            Reply::Stream(events) => events,
            Reply::Refused(refusal) => return Err(refusal.rename(&NAMES)),
        };
        let id = new_id("resp");
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let mut output = Output::new(&id, created, &model.name, asked.echo);
        output.begin();
        let own = asked.input.len();
        let mut input = history;
        input.extend(asked.input);
        let cancel = watch::Sender::new(false);
        let run = Self {
            pieces: Some(Pieces::new(events)),
            ready: output.take_events().into(),
            output,
            id,
            input,
            own,
            store: asked.store.then(|| doors.store.clone()),
            asker: asker.clone(),
            cancelled: cancel.subscribe(),
            cancel,
        };
        if let Some(store) = &run.store {
            store.put(asker, &run.id, run.stored());
        }
        Ok(run)
    }

    /// The next event; None at the end.
    pub(crate) async fn next(&mut self) -> Option<Value> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            let piece = tokio::select! {
                biased;
                Ok(()) = self.cancelled.changed() => None,
                piece = self.pieces.as_mut()?.next() => piece,
            };
            let is_last = piece.as_ref().is_none_or(|p| matches!(p, Piece::Ended(_) | Piece::Failed(_)));
            match piece {
                Some(piece) => self.output.push(piece),
                None => self.output.cancel(),
            }
            // Whoever reads the last event may ask for the response at once.
            if is_last {
                self.end();
            }
            self.ready.extend(self.output.take_events());
        }
    }

    /// Makes it to its end; answers the response.
    pub(crate) async fn finish(mut self) -> Value {
        while self.next().await.is_some() {}
        self.output.response()
    }

    /// Whether its last event was given out.
    pub(crate) fn is_over(&self) -> bool {
        self.pieces.is_none() && self.ready.is_empty()
    }

    /// The response as it stands.
    pub(crate) fn response(&self) -> Value {
        self.output.response()
    }

    fn stored(&self) -> Stored {
        Stored {
            response: self.output.response(),
            input: self.input.clone(),
            own: self.own,
            cancel: self.cancel.clone(),
        }
    }

    fn end(&mut self) {
        self.pieces = None;
        if let Some(store) = &self.store {
            store.update(&self.asker, &self.id, self.stored());
        }
    }
}

impl Drop for Run {
    /// Its client has left.
    fn drop(&mut self) {
        if self.pieces.is_some() {
            self.output.cancel();
            self.end();
        }
    }
}

/// A request, the items that it continues, and the chat body that both make.
pub(super) async fn with_history(
    doors: &Doors,
    asker: &Asker,
    asked: Asked,
    memory: &Memory,
) -> Result<(Asked, Vec<Arc<Value>>, Value), ApiError> {
    let history = match &asked.previous {
        None => Vec::new(),
        Some(id) => history(doors, asker, id, memory)?,
    };
    let work = move || {
        let body = asked.chat_body(&history);
        Ok((asked, history, body))
    };
    doors.state.prepare(work).await
}

/// The items that a response continues.
fn history(doors: &Doors, asker: &Asker, id: &str, memory: &Memory) -> Result<Vec<Arc<Value>>, ApiError> {
    if let Some((_, items)) = memory.0.as_ref().filter(|(known, _)| known == id) {
        return Ok(items.clone());
    }
    let stored = doors.store.get(asker, id).map_err(|_| ApiError::previous_response_not_found(id))?;
    if stored.response["status"] == "in_progress" {
        return Err(ApiError::invalid("previous_response_id", "that response is not done yet"));
    }
    Ok(stored.history())
}
