//! `POST /tokenize` and `POST /detokenize`, in vLLM's shape; llama-server's names are taken too. A conversation is
//! rendered as the chat route would, with tools and thinking.

use axum::{Json, body::Body, extract::State, http::HeaderMap};
use oxseek_engine::Request;
use oxseek_text::{ControlTokens, Tokenizer};
use serde_json::{Value, json};

use crate::{
    error::ApiError,
    openai::{
        body,
        chat::Conversation,
        fields::Fields,
        parameters::{check_model, either, token_ids},
    },
    state::{AppState, Model},
};

/// The tokens of a text.
pub(crate) async fn tokenize(
    State(state): State<AppState>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    let model = state.model()?;
    let body = body::read(&headers, body).await?;
    state.prepare(move || tokens_of(&model, &body)).await.map(Json)
}

/// The text of tokens.
pub(crate) async fn detokenize(
    State(state): State<AppState>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Value>, ApiError> {
    let model = state.model()?;
    let body = body::read(&headers, body).await?;
    state.prepare(move || text_of(&model, &body)).await.map(Json)
}

/// Reads a body of `/tokenize` without answering it.
pub(crate) fn check(model: &Model, body: &[u8]) -> Result<(), ApiError> {
    tokens_of(model, body).map(drop)
}

/// Reads a body of `/detokenize` without answering it.
pub(crate) fn check_back(model: &Model, body: &[u8]) -> Result<(), ApiError> {
    text_of(model, body).map(drop)
}

fn tokens_of(model: &Model, body: &[u8]) -> Result<Value, ApiError> {
    let mut fields = Fields::from_body(body)?;
    check_model(&mut fields, model)?;
    let prompt = fields.string("prompt")?;
    let content = fields.string("content")?;
    if prompt.is_some() && content.is_some() {
        return Err(ApiError::invalid("content", "is another name of prompt: give one"));
    }
    // vLLM adds the token that begins a text unless it is told not to, llama-server adds it only when it is told to.
    let begins = either(&mut fields, "add_special_tokens", "add_special", Fields::boolean)?;
    let begins = begins.unwrap_or(prompt.is_some());
    let parses = fields.boolean("parse_special")?.unwrap_or(true);
    let strings = fields.boolean("return_token_strs")?.unwrap_or(false);
    let pieces = fields.boolean("with_pieces")?.unwrap_or(false);
    let conversation =
        if fields.has("messages") { Some(Conversation::take(&mut fields, model)?) } else { None };
    fields.finish()?;
    let tokenizer = model.engine.tokenizer();
    let ids = match (prompt.or(content), conversation) {
        (None, Some(conversation)) => {
            let mut request = Request::default();
            conversation.apply(model, &mut request)?;
            request.prompt
        }
        (Some(text), None) => {
            let control = if parses { ControlTokens::Parse } else { ControlTokens::AsText };
            let mut ids: Vec<u32> = tokenizer.token_id(&model.bos).filter(|_| begins).into_iter().collect();
            let encoded = tokenizer.encode(&text, control);
            ids.extend(encoded.map_err(|e| ApiError::invalid("prompt", e.to_string()))?);
            ids
        }
        (None, None) => return Err(ApiError::invalid("prompt", "is missing")),
        (Some(_), Some(_)) => return Err(ApiError::invalid("messages", "contradicts prompt: give one")),
    };
    let strings = strings.then(|| ids.iter().map(|&id| tokenizer.decode(&[id])).collect::<Vec<_>>());
    let tokens: Vec<Value> = ids.iter().map(|&id| token(tokenizer, id, pieces)).collect();
    Ok(json!({
        "count": ids.len(),
        "max_model_len": model.engine.limits().context_tokens_max,
        "tokens": tokens,
        "token_strs": strings,
    }))
}

/// A token's id, or with its piece: text, or bytes where it is no whole text.
fn token(tokenizer: &Tokenizer, id: u32, with_piece: bool) -> Value {
    if !with_piece {
        return id.into();
    }
    let bytes = tokenizer.token_bytes(id);
    let piece = std::str::from_utf8(bytes).map_or_else(|_| json!(bytes), Value::from);
    json!({"id": id, "piece": piece})
}

fn text_of(model: &Model, body: &[u8]) -> Result<Value, ApiError> {
    let mut fields = Fields::from_body(body)?;
    check_model(&mut fields, model)?;
    let tokens = fields.list("tokens")?.ok_or_else(|| ApiError::invalid("tokens", "is missing"))?;
    fields.finish()?;
    let ids = token_ids(&tokens, "tokens")?;
    let tokenizer = model.engine.tokenizer();
    let vocabulary = tokenizer.vocab_len();
    if let Some(id) = ids.iter().find(|&&id| id as usize >= vocabulary) {
        let message = format!("token id {id} is not in the vocabulary of {vocabulary}");
        return Err(ApiError::invalid("tokens", message));
    }
    let text = tokenizer.decode(&ids);
    Ok(json!({"prompt": text, "content": text}))
}
