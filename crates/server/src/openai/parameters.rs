//! The parameters that chat and text completions share.

use oxseek_engine::Request;
use serde_json::{Value, json};

use super::fields::{Fields, wrong};
use crate::{error::ApiError, state::Model};

/// How an answer is to be sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Streaming {
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    /// Tell how far the prompt is, as llama.cpp does.
    pub(crate) progress: bool,
}

/// `model`: any other name than the served one is an error, so that nobody talks to a model unknowingly.
pub(crate) fn check_model(fields: &mut Fields, model: &Model) -> Result<(), ApiError> {
    match fields.string("model")? {
        Some(name) if name != model.name => Err(ApiError::model_not_found(&name)),
        _ => Ok(()),
    }
}

/// `stream`, `stream_options` and llama.cpp's `return_progress`.
pub(crate) fn streaming(fields: &mut Fields) -> Result<Streaming, ApiError> {
    let stream = fields.boolean("stream")?.unwrap_or(false);
    let progress = fields.boolean("return_progress")?.unwrap_or(false);
    if progress && !stream {
        return Err(ApiError::invalid("return_progress", "needs stream: true"));
    }
    let Some(options) = fields.take("stream_options") else {
        return Ok(Streaming { stream, include_usage: false, progress });
    };
    if !stream {
        return Err(ApiError::invalid("stream_options", "needs stream: true"));
    }
    let mut options = Fields::nested(options, "stream_options")?;
    let include_usage = options.boolean("include_usage")?.unwrap_or(false);
    options.only("include_obfuscation", &[json!(false)])?;
    options.finish()?;
    Ok(Streaming { stream, include_usage, progress })
}

/// Everything about choosing tokens and ending answers; `request` comes with the model's defaults.
pub(crate) fn generation(fields: &mut Fields, request: &mut Request) -> Result<(), ApiError> {
    let s = &mut request.sampling;
    s.temperature = fields.number("temperature")?.unwrap_or(s.temperature);
    s.top_p = fields.number("top_p")?.unwrap_or(s.top_p);
    s.top_k = fields.count("top_k")?.unwrap_or(s.top_k);
    s.min_p = fields.number("min_p")?.unwrap_or(s.min_p);
    s.typical_p = fields.number("typical_p")?.unwrap_or(s.typical_p);
    s.repetition_penalty =
        either(fields, "repetition_penalty", "repeat_penalty", Fields::number)?.unwrap_or(1.0);
    s.penalty_window = fields.count("repeat_last_n")?.unwrap_or(0);
    s.presence_penalty = fields.number("presence_penalty")?.unwrap_or(0.0);
    s.frequency_penalty = fields.number("frequency_penalty")?.unwrap_or(0.0);
    s.logit_bias = logit_bias(fields)?;
    s.seed = fields.whole("seed")?;
    request.n = fields.count("n")?.unwrap_or(1);
    request.min_tokens = fields.count("min_tokens")?.unwrap_or(0);
    request.stop = stop(fields)?;
    request.stop_tokens = token_ids(&fields.list("stop_token_ids")?.unwrap_or_default(), "stop_token_ids")?;
    request.ignore_eos = fields.boolean("ignore_eos")?.unwrap_or(false);
    request.keep_special = !fields.boolean("skip_special_tokens")?.unwrap_or(true);
    Ok(())
}

/// Fields that change nothing here, and fields of OpenAI's that are refused unless they ask for nothing.
pub(crate) fn neutral(fields: &mut Fields) -> Result<(), ApiError> {
    fields.string("user")?;
    fields.string("safety_identifier")?;
    fields.string("prompt_cache_key")?;
    fields.object("metadata")?;
    fields.only("store", &[json!(false)])?;
    fields.only("service_tier", &[json!("auto"), json!("default")])
}

/// Two names of one field; both together must agree.
pub(crate) fn either<T: PartialEq>(
    fields: &mut Fields,
    first: &str,
    second: &str,
    read: fn(&mut Fields, &str) -> Result<Option<T>, ApiError>,
) -> Result<Option<T>, ApiError> {
    match (read(fields, first)?, read(fields, second)?) {
        (Some(a), Some(b)) if a != b => Err(ApiError::invalid(first, format!("contradicts {second}"))),
        (a, b) => Ok(a.or(b)),
    }
}

/// A list of token ids.
pub(crate) fn token_ids(list: &[Value], param: &str) -> Result<Vec<u32>, ApiError> {
    list.iter()
        .map(|v| v.as_u64().and_then(|n| u32::try_from(n).ok()).ok_or_else(|| wrong(param, "token ids", v)))
        .collect()
}

fn stop(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let text = |v: Value| match v {
        Value::String(s) => Ok(s),
        other => Err(wrong("stop", "a string or a list of strings", &other)),
    };
    match fields.take("stop") {
        None => Ok(Vec::new()),
        Some(Value::Array(list)) => list.into_iter().map(text).collect(),
        Some(one) => Ok(vec![text(one)?]),
    }
}

fn logit_bias(fields: &mut Fields) -> Result<Vec<(u32, f32)>, ApiError> {
    let map = fields.object("logit_bias")?.unwrap_or_default();
    map.iter()
        .map(|(id, bias)| {
            let id = id.parse().map_err(|_| ApiError::invalid("logit_bias", "its keys must be token ids"))?;
            let bias = bias.as_f64().ok_or_else(|| wrong("logit_bias", "numbers", bias))?;
            Ok((id, bias as f32))
        })
        .collect()
}
