//! `GET /openapi.json`: the routes, and what their bodies hold.
//!
//! The bodies are not written down a second time: the parsers read an example of everything while they are watched
//! ([`watch`]), and what they take is what the document says.

mod examples;
mod notes;
mod schema;

use axum::{Json, extract::State};
use serde_json::{Map, Value, json};

use self::examples::EXAMPLES;
use crate::{
    error::ApiError,
    messages, openai,
    openai::fields::{Taken, watch},
    responses,
    state::{AppState, Model},
    tokens,
};

/// A route that takes JSON: its path, what it is for, and whether it can stream.
struct Operation {
    path: &'static str,
    about: &'static str,
    streams: bool,
    parse: fn(&Model, &[u8]) -> Result<(), ApiError>,
}

const POSTS: [Operation; 9] = [
    Operation {
        path: "/v1/chat/completions",
        about: "Answers a conversation",
        streams: true,
        parse: openai::chat::check,
    },
    Operation {
        path: "/v1/completions",
        about: "Continues texts",
        streams: true,
        parse: openai::completions::check,
    },
    Operation {
        path: "/v1/embeddings",
        about: "Embeds texts: the final hidden state of the last token, after the final norm, scaled to length 1",
        streams: false,
        parse: openai::embeddings::check,
    },
    Operation {
        path: "/v1/responses",
        about: "Makes a response; as a WebSocket the same with messages of the type response.create",
        streams: true,
        parse: |_, body| responses::check(body),
    },
    Operation {
        path: "/v1/responses/input_tokens",
        about: "Counts the tokens of a response's prompt",
        streams: false,
        parse: |_, body| responses::check_prompt(body),
    },
    Operation {
        path: "/v1/messages",
        about: "Answers a conversation, as Anthropic's API does",
        streams: true,
        parse: |_, body| messages::check(body),
    },
    Operation {
        path: "/v1/messages/count_tokens",
        about: "Counts the tokens of a conversation's prompt",
        streams: false,
        parse: |_, body| messages::check_count(body),
    },
    Operation {
        path: "/tokenize",
        about: "The tokens of a text or of a conversation's prompt",
        streams: false,
        parse: tokens::check,
    },
    Operation { path: "/detokenize", about: "The text of tokens", streams: false, parse: tokens::check_back },
];

/// Routes without a body: method, path, what for, query parameters, media type.
const OTHERS: [(&str, &str, &str, &[&str], &str); 10] = [
    ("get", "/v1/models", "The model that is served", &[], "application/json"),
    ("get", "/v1/models/{id}", "One model by its name", &[], "application/json"),
    ("get", "/v1/responses/{id}", "A response that was stored", &["stream"], "application/json"),
    ("delete", "/v1/responses/{id}", "Forgets a response", &[], "application/json"),
    ("post", "/v1/responses/{id}/cancel", "Ends a response that runs", &[], "application/json"),
    (
        "get",
        "/v1/responses/{id}/input_items",
        "The items that a response was made from",
        &["limit", "order", "after"],
        "application/json",
    ),
    ("get", "/health", "Whether requests are answered", &[], "application/json"),
    ("get", "/metrics", "Counters in Prometheus' text format", &[], "text/plain"),
    ("get", "/openapi.json", "This document", &[], "application/json"),
    ("get", "/ws", "A WebSocket for several answers at a time", &[], "application/json"),
];

/// The document; it is made of the parsers that serve, so it comes when the model is there.
pub(crate) async fn openapi(State(state): State<AppState>) -> Result<Json<Value>, ApiError> {
    let model = state.model()?;
    state.prepare(move || Ok(document(&model))).await.map(Json)
}

fn document(model: &Model) -> Value {
    let mut paths = Map::new();
    let mut schemas = json!({"Error": schema::error()});
    for operation in &POSTS {
        let name = operation.path.trim_start_matches("/v1").trim_matches('/').replace('/', "_");
        schemas[&name] = body_of(operation, model);
        paths.insert(operation.path.into(), json!({"post": posted(operation, &name)}));
    }
    for (method, path, about, query, media) in OTHERS {
        let entry = paths.entry(path).or_insert_with(|| json!({}));
        entry[method] = plain(path, about, query, media);
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "oxseek",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "OpenAI's and Anthropic's APIs over a model of the DeepSeek family. A field that is not \
                listed here is refused with 400 and its name; null is the same as leaving a field out.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    })
}

/// What a route's parser takes, as a schema.
fn body_of(operation: &Operation, model: &Model) -> Value {
    let mut all: Vec<Taken> = Vec::new();
    let mut example = None;
    for (_, text) in EXAMPLES.iter().filter(|(path, _)| *path == operation.path) {
        // A model without a template or tools refuses some, after it was read: what was taken counts.
        let (_, taken) = watch(|| (operation.parse)(model, text.as_bytes()));
        all.extend(taken);
        example = example.or(serde_json::from_str::<Value>(text).ok());
    }
    if let Some(named) = example.as_mut().and_then(|e| e.get_mut("model")) {
        *named = model.name.as_str().into();
    }
    let mut schema = schema::object(&all);
    notes::add(&mut schema, model.engine.limits());
    schema["examples"] = json!([example]);
    schema
}

fn posted(operation: &Operation, name: &str) -> Value {
    let mut content = json!({"application/json": {"schema": {"type": "object"}}});
    if operation.streams {
        content["text/event-stream"] = json!({"schema": {"type": "string"}});
    }
    json!({
        "summary": operation.about,
        "operationId": name,
        "requestBody": {
            "required": true,
            "content": {"application/json": {"schema": {"$ref": format!("#/components/schemas/{name}")}}},
        },
        "responses": with_errors(&json!({"description": "The answer", "content": content})),
    })
}

fn plain(path: &str, about: &str, query: &[&str], media: &str) -> Value {
    let parameter = |place: &str, name: &str| {
        let required = place == "path";
        json!({"name": name, "in": place, "required": required, "schema": {"type": "string"}})
    };
    let mut parameters: Vec<Value> = query.iter().map(|name| parameter("query", name)).collect();
    parameters.extend(path.contains("{id}").then(|| parameter("path", "id")));
    let ok = json!({"description": about, "content": {media: {"schema": {}}}});
    json!({"summary": about, "parameters": parameters, "responses": with_errors(&ok)})
}

fn with_errors(ok: &Value) -> Value {
    let error = |description: &str| {
        let content = json!({"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}});
        json!({"description": description, "content": content})
    };
    json!({
        "200": ok,
        "4XX": error("The request is wrong, or may not be answered now; the field is named"),
        "5XX": error("The server cannot answer"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pages for people, and probes.
    const UNLISTED: [&str; 5] = ["/", "/docs", "/health/live", "/health/ready", "/v1/capabilities"];

    #[test]
    fn the_document_has_every_route_and_no_other() {
        let routed: Vec<&str> = include_str!("app.rs")
            .split(".route(")
            .skip(1)
            .filter_map(|rest| rest.split('"').nth(1))
            .filter(|path| !path.starts_with("/web"))
            .collect();
        let listed: Vec<&str> = POSTS.iter().map(|o| o.path).chain(OTHERS.iter().map(|o| o.1)).collect();
        for path in &listed {
            assert!(routed.contains(path), "{path} is listed and has no route");
        }
        for path in routed {
            assert!(listed.contains(&path) || UNLISTED.contains(&path), "{path} is not listed");
        }
    }
}
