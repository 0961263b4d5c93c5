//! Log-probabilities of a prompt, in vLLM's shape.

use oxseek_engine::TokenInfo;
use serde_json::{Map, Value, json};

use super::{fields::Fields, parameters::Streaming};
use crate::error::ApiError;

/// `prompt_logprobs`: report the log-probability of every token of the prompt, and this many of the most likely ones.
pub(super) fn prompt_logprobs(fields: &mut Fields, streaming: Streaming) -> Result<Option<usize>, ApiError> {
    let count = fields.count("prompt_logprobs")?;
    if count.is_some() && streaming.stream {
        return Err(ApiError::unsupported(
            "prompt_logprobs",
            "comes with whole answers only, not with stream: true",
        ));
    }
    Ok(count)
}

/// What the engine told about the tokens of a prompt, all but the first.
#[derive(Default)]
pub(super) struct Scores {
    tokens: Vec<TokenInfo>,
    ranks: Vec<usize>,
}

impl Scores {
    pub(super) fn add(&mut self, tokens: Vec<TokenInfo>, ranks: Vec<usize>) {
        self.tokens.extend(tokens);
        self.ranks.extend(ranks);
    }

    pub(super) fn tokens(&self) -> &[TokenInfo] {
        &self.tokens
    }

    /// `prompt_logprobs` of an answer: null for the first token, which nothing comes before, then per token an object
    /// from ids to what is known of them: the token itself and the `count` most likely ones.
    pub(super) fn to_json(&self, count: usize) -> Value {
        let entries = self.tokens.iter().zip(&self.ranks).map(|(token, &rank)| {
            let mut ids = Map::new();
            ids.insert(token.id.to_string(), entry(&token.bytes, token.logprob, rank));
            for (i, (id, bytes, logprob)) in token.top.iter().take(count).enumerate() {
                ids.entry(id.to_string()).or_insert_with(|| entry(bytes, *logprob, i + 1));
            }
            Value::from(ids)
        });
        [Value::Null].into_iter().chain(entries).collect()
    }
}

fn entry(bytes: &[u8], logprob: f32, rank: usize) -> Value {
    json!({"logprob": logprob, "rank": rank, "decoded_token": String::from_utf8_lossy(bytes)})
}
