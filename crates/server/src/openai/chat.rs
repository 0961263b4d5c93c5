//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::{body::Body, extract::State, http::HeaderMap, response::Response};
use oxseek_engine::{Request, ValidRequest};
use oxseek_text::guard_messages;
use serde_json::{Map, Value, json};

use super::{
    answer::{Answer, Form},
    body,
    fields::{Fields, wrong},
    parameters::{Streaming, check_model, either, generation, neutral, streaming},
};
use crate::{
    caller::Caller,
    error::ApiError,
    limits::MESSAGES_MAX,
    state::{AppState, Model},
};

/// Answers a conversation.
pub(crate) async fn chat_completions(
    State(state): State<AppState>,
    caller: Caller,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let model = state.model()?;
    let body = body::read(&headers, body).await?;
    let prepared = {
        let model = Arc::clone(&model);
        state.prepare(move || prepare(&model, &body)).await?
    };
    let ticket = caller.submit(&model, prepared.request)?;
    let form = Form::Chat { thinking: prepared.thinking };
    let answer = Answer::new(form, model.name.clone(), vec![ticket], prepared.n, prepared.logprobs);
    answer.respond(prepared.streaming).await
}

struct Prepared {
    request: ValidRequest,
    n: usize,
    logprobs: bool,
    /// The prompt ends inside of the model's thinking.
    thinking: bool,
    streaming: Streaming,
}

/// From a body to a request that the engine takes.
fn prepare(model: &Model, body: &[u8]) -> Result<Prepared, ApiError> {
    let mut fields = Fields::from_body(body)?;
    check_model(&mut fields, model)?;
    let mut request = Request { sampling: model.sampling.clone(), ..Request::default() };
    generation(&mut fields, &mut request)?;
    request.max_tokens = either(&mut fields, "max_completion_tokens", "max_tokens", Fields::count)?;
    request.logprobs = logprobs(&mut fields, model)?;
    let streaming = streaming(&mut fields)?;
    let messages = messages(&mut fields)?;
    let mut extra = fields.object("chat_template_kwargs")?.unwrap_or_default();
    // DeepSeek-V3.1 asks for it by this name, others by the second one; a template takes the one that it knows.
    if let Some(thinking) = extra.get("thinking").or(extra.get("enable_thinking")).cloned() {
        extra.entry("thinking").or_insert_with(|| thinking.clone());
        extra.entry("enable_thinking").or_insert(thinking);
    }
    unsupported(&mut fields)?;
    neutral(&mut fields)?;
    fields.finish()?;
    let thinking = render(model, &messages, &extra, &mut request)?;
    let (n, logprobs) = (request.n, request.logprobs.is_some());
    let named = |field| match field {
        "prompt" => "messages",
        "logprobs" => "top_logprobs",
        other => other,
    };
    let request =
        request.validate(model.engine.limits()).map_err(|e| ApiError::refused(named(e.field), &e))?;
    Ok(Prepared { request, n, logprobs, thinking, streaming })
}

/// Renders the conversation into the request's prompt; answers whether it ends inside of thinking.
fn render(
    model: &Model,
    messages: &[Value],
    extra: &Map<String, Value>,
    request: &mut Request,
) -> Result<bool, ApiError> {
    let no_template = "this model has no chat template; use /v1/completions";
    let template = model.template.as_ref().ok_or_else(|| ApiError::unsupported("messages", no_template))?;
    let tokenizer = model.engine.tokenizer();
    let messages = guard_messages(messages, tokenizer);
    let rendered = template.render(&messages, None, true, &model.bos, &model.eos, extra)?;
    request.prompt = tokenizer.encode_rendered(&rendered)?;
    Ok(rendered.trim_end().ends_with("<think>"))
}

/// `logprobs` and `top_logprobs`.
fn logprobs(fields: &mut Fields, model: &Model) -> Result<Option<usize>, ApiError> {
    let wanted = fields.boolean("logprobs")?.unwrap_or(false);
    let top = fields.count("top_logprobs")?;
    let most = model.engine.limits().logprobs_max;
    match (wanted, top) {
        (_, Some(n)) if n > most => {
            Err(ApiError::invalid("top_logprobs", format!("{n} is more than {most}")))
        }
        (false, Some(1..)) => Err(ApiError::invalid("top_logprobs", "needs logprobs: true")),
        (true, top) => Ok(Some(top.unwrap_or(0))),
        (false, _) => Ok(None),
    }
}

/// Parts of OpenAI's chat API that this server does not have. Values that ask for nothing are fine.
fn unsupported(fields: &mut Fields) -> Result<(), ApiError> {
    fields.only("tools", &[json!([])])?;
    fields.only("tool_choice", &[json!("none"), json!("auto")])?;
    fields.boolean("parallel_tool_calls")?;
    fields.only("functions", &[json!([])])?;
    fields.only("function_call", &[json!("none"), json!("auto")])?;
    fields.only("modalities", &[json!(["text"])])?;
    fields.only("verbosity", &[json!("medium")])?;
    if let Some(format) = fields.take("response_format") {
        let mut format = Fields::nested(format, "response_format")?;
        format.only("type", &[json!("text")])?;
        format.finish()?;
    }
    Ok(())
}

/// The conversation, in the plain form that templates read: every content is one string.
fn messages(fields: &mut Fields) -> Result<Vec<Value>, ApiError> {
    let list = fields.list("messages")?.ok_or_else(|| ApiError::invalid("messages", "is missing"))?;
    if list.is_empty() {
        return Err(ApiError::invalid("messages", "must hold at least one message"));
    }
    if list.len() > MESSAGES_MAX {
        return Err(ApiError::invalid(
            "messages",
            format!("has {} messages, at most {MESSAGES_MAX}", list.len()),
        ));
    }
    list.into_iter().enumerate().map(|(i, m)| message(m, &format!("messages[{i}]"))).collect()
}

fn message(value: Value, path: &str) -> Result<Value, ApiError> {
    let mut fields = Fields::nested(value, path)?;
    let role = fields.string("role")?.ok_or_else(|| ApiError::invalid(fields.name("role"), "is missing"))?;
    let role = match role.as_str() {
        // OpenAI's newer name of the same thing.
        "system" | "developer" => "system",
        "user" => "user",
        "assistant" => "assistant",
        "tool" | "function" => {
            return Err(ApiError::unsupported(fields.name("role"), "tools are not supported"));
        }
        _ => {
            let roles = "must be system, developer, user or assistant";
            return Err(ApiError::invalid(fields.name("role"), roles));
        }
    };
    let content = content(&mut fields)?;
    let name = fields.string("name")?;
    // What comes back when an answer of ours is sent again as it was.
    fields.only("refusal", &[])?;
    fields.only("audio", &[])?;
    fields.only("function_call", &[])?;
    fields.only("tool_calls", &[json!([])])?;
    fields.list("annotations")?;
    // Earlier thinking is not part of a conversation (DeepSeek's API).
    fields.string("reasoning_content")?;
    fields.finish()?;
    let mut message = json!({"role": role, "content": content});
    if let Some(name) = name {
        message["name"] = name.into();
    }
    Ok(message)
}

/// A message's text: a string, or a list of text parts.
fn content(fields: &mut Fields) -> Result<String, ApiError> {
    let name = fields.name("content");
    match fields.take("content") {
        Some(Value::String(text)) => Ok(text),
        Some(Value::Array(parts)) => {
            parts.into_iter().enumerate().map(|(i, p)| text_part(p, &format!("{name}[{i}]"))).collect()
        }
        None => Err(ApiError::invalid(name, "is missing")),
        Some(other) => Err(wrong(&name, "a string or a list of parts", &other)),
    }
}

fn text_part(value: Value, path: &str) -> Result<String, ApiError> {
    let mut fields = Fields::nested(value, path)?;
    match fields.string("type")?.as_deref() {
        Some("text") => {}
        Some(kind @ ("image_url" | "input_audio" | "file" | "refusal" | "video_url")) => {
            return Err(ApiError::unsupported(path, format!("{kind} parts are not supported, only text")));
        }
        _ => return Err(ApiError::invalid(format!("{path}.type"), "must be \"text\"")),
    }
    let text = fields.string("text")?.ok_or_else(|| ApiError::invalid(fields.name("text"), "is missing"))?;
    fields.finish()?;
    Ok(text)
}
