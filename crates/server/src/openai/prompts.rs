//! Prompts that are texts or token ids.

use oxseek_text::ControlTokens;
use serde_json::Value;

use super::{
    fields::{Fields, wrong},
    parameters::token_ids,
};
use crate::{error::ApiError, state::Model};

/// One prompt.
pub(crate) enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
}

impl Prompt {
    /// The token that begins a text, where it is put before the prompt.
    pub(crate) fn begin(&self, model: &Model, has_suffix: bool) -> Option<u32> {
        match self {
            Self::Tokens(_) if !has_suffix => None,
            Self::Text(text) if text.starts_with(&model.bos) => None,
            _ => model.engine.tokenizer().token_id(&model.bos),
        }
    }

    /// Who sends a text prompt writes the control tokens that it needs; only the one that begins a text is added, and
    /// those around a hole that is to be filled before `suffix`. `name` is the field that it came from.
    pub(crate) fn tokens(
        self,
        model: &Model,
        name: &str,
        suffix: Option<&str>,
    ) -> Result<Vec<u32>, ApiError> {
        let tokenizer = model.engine.tokenizer();
        let encode = |text: &str| {
            let encoded = tokenizer.encode(text, ControlTokens::Parse);
            encoded.map_err(|e| ApiError::invalid(name, e.to_string()))
        };
        let mut ids: Vec<u32> = self.begin(model, suffix.is_some()).into_iter().collect();
        let prompt = match self {
            Self::Tokens(ids) => ids,
            Self::Text(text) => encode(&text)?,
        };
        let Some(suffix) = suffix else {
            ids.extend(prompt);
            return Ok(ids);
        };
        let [before, hole, after] = fill_tokens(model)?;
        ids.push(before);
        ids.extend(prompt);
        ids.push(hole);
        ids.extend(encode(suffix)?);
        ids.push(after);
        Ok(ids)
    }

    pub(crate) fn is_empty(&self) -> bool {
        match self {
            Self::Text(text) => text.is_empty(),
            Self::Tokens(ids) => ids.is_empty(),
        }
    }

    /// As it was written.
    pub(crate) fn text(&self, model: &Model) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Tokens(ids) => model.engine.tokenizer().decode(ids),
        }
    }
}

/// DeepSeek's tokens around a hole in a text: before the text, at the hole, at the end.
fn fill_tokens(model: &Model) -> Result<[u32; 3], ApiError> {
    let names = ["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"];
    let ids = names.map(|name| model.engine.tokenizer().token_id(name));
    match ids {
        [Some(before), Some(hole), Some(after)] => Ok([before, hole, after]),
        _ => Err(ApiError::unsupported("suffix", "this model has no tokens to fill a hole in a text")),
    }
}

/// The field `name`: a string, token ids, or a list of at most `most` of either.
pub(crate) fn prompts(fields: &mut Fields, name: &str, most: usize) -> Result<Vec<Prompt>, ApiError> {
    let want = "a string, a list of strings, token ids or a list of lists of token ids";
    let value = fields.take(name).ok_or_else(|| ApiError::invalid(name, "is missing"))?;
    let list = match value {
        Value::String(text) => return Ok(vec![Prompt::Text(text)]),
        Value::Array(list) => list,
        other => return Err(wrong(name, want, &other)),
    };
    if list.is_empty() {
        return Err(ApiError::invalid(name, "is empty"));
    }
    if list[0].is_number() {
        return Ok(vec![Prompt::Tokens(token_ids(&list, name)?)]);
    }
    if list.len() > most {
        return Err(ApiError::invalid(name, format!("has {} entries, at most {most}", list.len())));
    }
    list.into_iter()
        .map(|v| match v {
            Value::String(text) => Ok(Prompt::Text(text)),
            Value::Array(ids) => Ok(Prompt::Tokens(token_ids(&ids, name)?)),
            other => Err(wrong(name, want, &other)),
        })
        .collect()
}
