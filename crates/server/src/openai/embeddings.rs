//! `POST /v1/embeddings`: OpenAI's shape over the model's final hidden state.
//!
//! The embedding of an input is the hidden state of its last token after the final norm, scaled to length 1. Each input
//! is a request of its own to the engine, so a large one is computed in chunks beside everybody else's.

use std::sync::Arc;

use axum::{Json, body::Body, extract::State, http::HeaderMap};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use futures_util::{StreamExt, stream::FuturesUnordered};
use oxseek_engine::{Event, Request, SubmitError, Task, Ticket, ValidRequest};
use serde::Serialize;
use serde_json::json;

use super::{
    body,
    fields::Fields,
    parameters::check_model,
    prompts::{Prompt, prompts},
};
use crate::{
    caller::Caller,
    error::ApiError,
    limits::EMBEDDING_INPUTS_MAX,
    state::{AppState, Model},
    traces::Operation,
};

/// Embeds texts.
pub(crate) async fn embeddings(
    State(state): State<AppState>,
    caller: Caller,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Embeddings>, ApiError> {
    let model = state.model()?;
    let body = body::read(&headers, body).await?;
    let Prepared { requests, encoding } = {
        let model = Arc::clone(&model);
        state.prepare(move || prepare(&model, &body)).await?
    };
    let (vectors, tokens) = embed(&caller, &model, requests).await?;
    let encode = move || Ok(vectors.into_iter().map(|v| encoding.encode(normalised(v))).collect());
    let data: Vec<Encoded> = state.prepare(encode).await?;
    Ok(Json(Embeddings {
        object: "list",
        data: data
            .into_iter()
            .enumerate()
            .map(|(index, embedding)| Entry { object: "embedding", index, embedding })
            .collect(),
        model: model.name.clone(),
        usage: Usage { prompt_tokens: tokens, total_tokens: tokens },
    }))
}

/// The answer.
#[derive(Serialize)]
pub(crate) struct Embeddings {
    object: &'static str,
    data: Vec<Entry>,
    model: String,
    usage: Usage,
}

#[derive(Serialize)]
struct Entry {
    object: &'static str,
    index: usize,
    embedding: Encoded,
}

#[derive(Serialize)]
struct Usage {
    prompt_tokens: usize,
    total_tokens: usize,
}

/// A vector on the wire.
#[derive(Serialize)]
#[serde(untagged)]
enum Encoded {
    Floats(Vec<f32>),
    Base64(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encoding {
    Float,
    Base64,
}

impl Encoding {
    fn take(fields: &mut Fields) -> Result<Self, ApiError> {
        match fields.string("encoding_format")?.as_deref() {
            None | Some("float") => Ok(Self::Float),
            Some("base64") => Ok(Self::Base64),
            Some(_) => Err(ApiError::unsupported("encoding_format", "must be float or base64")),
        }
    }

    fn encode(self, vector: Vec<f32>) -> Encoded {
        match self {
            Self::Float => Encoded::Floats(vector),
            Self::Base64 => {
                let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
                Encoded::Base64(STANDARD.encode(bytes))
            }
        }
    }
}

struct Prepared {
    requests: Vec<ValidRequest>,
    encoding: Encoding,
}

/// Reads a body without asking the engine.
pub(crate) fn check(model: &Model, body: &[u8]) -> Result<(), ApiError> {
    prepare(model, body).map(drop)
}

/// From a body to requests that the engine takes, one per input.
fn prepare(model: &Model, body: &[u8]) -> Result<Prepared, ApiError> {
    let mut fields = Fields::from_body(body)?;
    check_model(&mut fields, model)?;
    let encoding = Encoding::take(&mut fields)?;
    fields.only("dimensions", &[json!(model.engine.limits().embedding_width)])?;
    fields.string("user")?;
    let inputs = prompts(&mut fields, "input", EMBEDDING_INPUTS_MAX)?;
    fields.finish()?;
    let requests = inputs.into_iter().map(|input| request(model, input)).collect::<Result<_, _>>()?;
    Ok(Prepared { requests, encoding })
}

fn request(model: &Model, input: Prompt) -> Result<ValidRequest, ApiError> {
    if input.is_empty() {
        return Err(ApiError::invalid("input", "an input is empty"));
    }
    let request =
        Request { prompt: input.tokens(model, "input", None)?, task: Task::Embed, ..Request::default() };
    request.validate(model.engine.limits()).map_err(|e| ApiError::refused("input", &e))
}

/// The hidden states of all inputs in their order, and how many tokens they have. At most half of the
/// engine's places are taken at a time: many inputs must neither fill the queue nor hold up an answer.
async fn embed(
    caller: &Caller,
    model: &Model,
    requests: Vec<ValidRequest>,
) -> Result<(Vec<Vec<f32>>, usize), ApiError> {
    let tab = caller.open_tab(
        model,
        Operation::Embeddings,
        requests.iter().map(|r| r.tokens_max() as u64).sum(),
    )?;
    let at_a_time = model.engine.limits().n_max.div_ceil(2);
    let mut vectors = vec![Vec::new(); requests.len()];
    let mut tokens = 0;
    let mut running = FuturesUnordered::new();
    let mut waiting = requests.into_iter().enumerate().peekable();
    loop {
        while let Some((index, request)) = waiting.peek().filter(|_| running.len() < at_a_time) {
            match caller.submit_on(&tab, model, request.clone()) {
                Ok(ticket) => running.push(read(*index, ticket)),
                // The queue is full of others; a place of our own will be free again.
                Err(SubmitError::Busy | SubmitError::TenantBusy) if !running.is_empty() => break,
                Err(e) => return Err(caller.refuse(e)),
            }
            waiting.next();
        }
        let Some(embedded) = running.next().await else { break };
        let (index, vector, used) = embedded?;
        vectors[index] = vector;
        tokens += used;
    }
    Ok((vectors, tokens))
}

/// What the engine answers for one input: its place, its hidden state and how many tokens it has.
async fn read(index: usize, mut ticket: Ticket) -> Result<(usize, Vec<f32>, usize), ApiError> {
    let mut vector = Vec::new();
    loop {
        match ticket.next().await {
            Some(Event::Embedding { values }) => vector = values,
            Some(Event::Finished { usage }) => return Ok((index, vector, usage.prompt_tokens)),
            Some(Event::Failed { message, .. }) => return Err(ApiError::failed(message)),
            Some(_) => {}
            None => return Err(ApiError::failed("the engine cut the request")),
        }
    }
}

/// A vector scaled to length 1.
fn normalised(mut vector: Vec<f32>) -> Vec<f32> {
    let length = vector.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
    if length > 0.0 {
        vector.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
    }
    vector
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_have_length_one_and_both_encodings_hold_the_same() {
        let vector = normalised(vec![3.0, 0.0, -4.0]);
        assert_eq!(vector, [0.6, 0.0, -0.8]);
        assert_eq!(normalised(vec![0.0; 2]), [0.0; 2]);
        let json = |e: Encoding| serde_json::to_string(&e.encode(vector.clone())).unwrap_or_default();
        assert_eq!(json(Encoding::Float), "[0.6,0.0,-0.8]");
        assert_eq!(json(Encoding::Base64), "\"mpkZPwAAAADNzEy/\"");
    }
}
