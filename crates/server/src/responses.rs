//! `/v1/responses`: OpenAI's stateful API, over HTTP here and over a WebSocket in `socket::responses`.

mod items;
mod output;
mod request;
mod run;
mod store;

use axum::{
    Json,
    extract::{Path, Request, State},
    response::{IntoResponse, Response},
};
use serde_json::{Map, Value, json};

pub(crate) use self::{
    output::new_id,
    request::Asked,
    run::{Memory, Run},
    store::Store,
};
use crate::{
    doors::Doors,
    error::ApiError,
    event_stream,
    openai::{body, fields::Fields},
    relay::{Asker, Refusal, prompt},
};

/// Most items of one page of input items, and how many there are by default.
const PAGE_MAX: usize = 100;
const PAGE_DEFAULT: usize = 20;

/// Makes a response: in one piece, as a stream, or in the background.
pub(crate) async fn create(State(doors): State<Doors>, request: Request) -> Result<Response, Refusal> {
    let (parts, body) = request.into_parts();
    let asker = Asker::new(&parts);
    let body = body::read(&parts.headers, body).await?;
    let asked = doors.state.prepare(move || Asked::read(Fields::from_body(&body)?)).await?;
    let (stream, background) = (asked.stream, asked.background);
    let run = Run::begin(&doors, &asker, asked, &Memory::default()).await?;
    if background {
        let response = run.response();
        tokio::spawn(run.finish());
        return Ok(Json(response).into_response());
    }
    if stream {
        let events =
            futures_util::stream::unfold(run, |mut run| async move { run.next().await.map(|e| (e, run)) });
        return Ok(event_stream::respond(events));
    }
    let response = run.finish().await;
    if response["status"] == "failed" {
        let message = response["error"]["message"].as_str().unwrap_or_default();
        return Err(ApiError::failed(message).into());
    }
    Ok(Json(response).into_response())
}

/// Reads a body without answering it.
pub(crate) fn check(body: &[u8]) -> Result<(), ApiError> {
    Asked::read(Fields::from_body(body)?).map(drop)
}

/// As [`check`], of a body that only asks how long its prompt is.
pub(crate) fn check_prompt(body: &[u8]) -> Result<(), ApiError> {
    Asked::read_prompt(Fields::from_body(body)?).map(drop)
}

/// How many tokens a request's prompt has.
pub(crate) async fn input_tokens(
    State(doors): State<Doors>,
    request: Request,
) -> Result<Json<Value>, Refusal> {
    let (parts, body) = request.into_parts();
    let asker = Asker::new(&parts);
    let body = body::read(&parts.headers, body).await?;
    let asked = doors.state.prepare(move || Asked::read_prompt(Fields::from_body(&body)?)).await?;
    let chat = match run::with_history(&doors, &asker, asked, &Memory::default()).await? {
        (_, _, Value::Object(chat)) => chat,
        _ => Map::new(),
    };
    let counted = doors.relay.ask(&asker, "/tokenize", &prompt(chat)).await;
    let counted = counted.map_err(|refusal| refusal.rename(&request::NAMES))?;
    Ok(Json(json!({"object": "response.input_tokens", "input_tokens": counted["count"]})))
}

/// A response that was stored.
pub(crate) async fn retrieve(
    State(doors): State<Doors>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let mut query = query(&request)?;
    query.only("stream", &[json!("false")])?;
    query.finish()?;
    let asker = Asker::new(&request.into_parts().0);
    doors.store.get(&asker, &id).map(|s| Json(s.response))
}

/// Forgets a response.
pub(crate) async fn delete(
    State(doors): State<Doors>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let asker = Asker::new(&request.into_parts().0);
    doors.store.delete(&asker, &id)?;
    Ok(Json(json!({"id": id, "object": "response", "deleted": true})))
}

/// Ends a response that runs, whoever reads it; of one that has ended nothing changes.
pub(crate) async fn cancel(
    State(doors): State<Doors>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let asker = Asker::new(&request.into_parts().0);
    let stored = doors.store.get(&asker, &id)?;
    let mut response = stored.response;
    if response["status"] == "in_progress" {
        stored.cancel.send_replace(true);
        response["status"] = "cancelled".into();
    }
    Ok(Json(response))
}

/// The items that a response was made from, the newest first unless told otherwise.
pub(crate) async fn input_items(
    State(doors): State<Doors>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let mut query = query(&request)?;
    let limit = query.string("limit")?.map_or(Ok(PAGE_DEFAULT), |n| n.parse());
    let limit = limit.ok().filter(|n| (1..=PAGE_MAX).contains(n));
    let limit = limit.ok_or_else(|| ApiError::invalid("limit", format!("must be 1 to {PAGE_MAX}")))?;
    let newest_first = match query.string("order")?.as_deref() {
        None | Some("desc") => true,
        Some("asc") => false,
        Some(_) => return Err(ApiError::invalid("order", "must be asc or desc")),
    };
    let after = query.string("after")?;
    query.finish()?;
    let asker = Asker::new(&request.into_parts().0);
    let stored = doors.store.get(&asker, &id)?;
    let mut items: Vec<Value> =
        stored.input.iter().enumerate().map(|(i, item)| listed(item, &id, i)).collect();
    if newest_first {
        items.reverse();
    }
    if let Some(after) = after {
        let at = items.iter().position(|i| i["id"] == after.as_str());
        let at = at.ok_or_else(|| ApiError::invalid("after", "is the id of no item of this response"))?;
        items.drain(..=at);
    }
    let has_more = items.len() > limit;
    items.truncate(limit);
    let name = |item: Option<&Value>| item.map_or("".into(), |i| i["id"].clone());
    let (first, last) = (name(items.first()), name(items.last()));
    Ok(Json(json!({
        "object": "list", "data": items, "first_id": first, "last_id": last, "has_more": has_more,
    })))
}

/// An item as it is listed: with an id, and complete.
fn listed(item: &Value, response: &str, index: usize) -> Value {
    let mut listed = item.clone();
    if listed["id"].is_null() {
        listed["id"] = format!("item_{index}_{response}").into();
    }
    if item["type"] != "reasoning" {
        listed["status"] = "completed".into();
    }
    for part in listed["content"].as_array_mut().into_iter().flatten() {
        if part["type"] == "output_text" && part["annotations"].is_null() {
            part["annotations"] = json!([]);
        }
    }
    listed
}

/// The parameters of a query; each may come once.
fn query(request: &Request) -> Result<Fields, ApiError> {
    let mut map = Map::new();
    for pair in request.uri().query().unwrap_or_default().split('&').filter(|p| !p.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        // Names and values of ours need no escapes, but clients write `name[]` where they have a list.
        let name = name.replace("%5B%5D", "[]");
        if map.insert(name.clone(), value.into()).is_some() {
            return Err(ApiError::invalid(name, "is there twice"));
        }
    }
    Fields::from_body(Value::from(map).to_string().as_bytes())
}
