//! How a model's text is written: tokenizer, chat template, recommended sampling, from a folder's files or from the
//! metadata of a GGUF file.

use std::fmt::Display;

use oxseek_engine::Sampling;
use oxseek_text::{ChatTemplate, Tokenizer, Vocabulary};
use oxseek_weights::{
    Checkpoint, Gguf,
    gguf::{Array, Value},
};

use crate::failure::Failure;

/// What a checkpoint says of its text.
pub struct Wording {
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// How conversations become prompts; models without one only continue text.
    pub template: Option<ChatTemplate>,
    /// What the model's makers recommend.
    pub sampling: Sampling,
}

impl Wording {
    /// Reads it from the checkpoint.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self, Failure> {
        match checkpoint.gguf() {
            Some(gguf) => from_metadata(&Metadata { gguf }),
            None => from_folder(checkpoint),
        }
    }
}

fn broken(why: &dyn Display) -> Failure {
    Failure::Model(why.to_string())
}

fn from_folder(checkpoint: &Checkpoint) -> Result<Wording, Failure> {
    let file = |name: &str| checkpoint.file(name);
    let json = file("tokenizer.json").ok_or_else(|| broken(&"the folder has no tokenizer.json"))?;
    let config = file("tokenizer_config.json");
    Ok(Wording {
        tokenizer: Tokenizer::from_bytes(json, config).map_err(|e| broken(&e))?,
        template: ChatTemplate::from_files(config, file("chat_template.jinja")).map_err(|e| broken(&e))?,
        sampling: sampling_of_folder(file("generation_config.json"))?,
    })
}

/// `generation_config.json`'s temperature and `top_p`, where `do_sample` is not false.
fn sampling_of_folder(generation_config: Option<&[u8]>) -> Result<Sampling, Failure> {
    let mut sampling = Sampling::default();
    let Some(bytes) = generation_config else { return Ok(sampling) };
    let config: serde_json::Value =
        serde_json::from_slice(bytes).map_err(|e| broken(&format!("generation_config.json: {e}")))?;
    if config["do_sample"] == false {
        sampling.temperature = 0.0;
        return Ok(sampling);
    }
    if let Some(t) = config["temperature"].as_f64() {
        sampling.temperature = t as f32;
    }
    if let Some(p) = config["top_p"].as_f64() {
        sampling.top_p = p as f32;
    }
    if let Some(k) = config["top_k"].as_u64() {
        sampling.top_k = k as usize;
    }
    Ok(sampling)
}

fn from_metadata(m: &Metadata<'_>) -> Result<Wording, Failure> {
    let vocabulary = vocabulary(m)?;
    let tokenizer =
        Tokenizer::from_vocabulary(&vocabulary).map_err(|e| broken(&format!("{}: {e}", m.gguf.file())))?;
    let template = m.text("tokenizer.chat_template")?.map(ChatTemplate::new).transpose();
    let mut sampling = Sampling::default();
    if let Some(t) = m.number("general.sampling.temp")? {
        sampling.temperature = t as f32;
    }
    if let Some(p) = m.number("general.sampling.top_p")? {
        sampling.top_p = p as f32;
    }
    if let Some(k) = m.whole("general.sampling.top_k")? {
        sampling.top_k = usize::try_from(k).unwrap_or(0);
    }
    if let Some(p) = m.number("general.sampling.min_p")? {
        sampling.min_p = p as f32;
    }
    Ok(Wording { tokenizer, template: template.map_err(|e| broken(&e))?, sampling })
}

/// What the file holds under `tokenizer.ggml`.
pub fn vocabulary<'a>(m: &Metadata<'a>) -> Result<Vocabulary<'a>, Failure> {
    let texts = |key: &str| m.list(key, "texts", Array::as_texts);
    let Some(tokens) = texts("tokenizer.ggml.tokens")? else {
        return Err(m.bad("tokenizer.ggml.tokens", "missing: the file has no tokenizer"));
    };
    let types = m.list("tokenizer.ggml.token_type", "whole numbers", Array::as_i64s)?;
    let mut named = Vec::new();
    for name in ["padding", "unknown", "eot", "eom", "seperator"] {
        named.extend(m.token(&format!("tokenizer.ggml.{name}_token_id"))?);
    }
    Ok(Vocabulary {
        model: m.text("tokenizer.ggml.model")?.unwrap_or_default(),
        pre: m.text("tokenizer.ggml.pre")?.unwrap_or_default(),
        tokens: tokens.collect(),
        types: types.into_iter().flatten().collect(),
        merges: texts("tokenizer.ggml.merges")?.into_iter().flatten().collect(),
        bos: m.token("tokenizer.ggml.bos_token_id")?,
        eos: m.token("tokenizer.ggml.eos_token_id")?,
        named,
    })
}

/// The metadata of a GGUF file by type; a value of another type is an error that names its key.
pub struct Metadata<'a> {
    /// The file.
    pub gguf: &'a Gguf,
}

impl<'a> Metadata<'a> {
    fn bad(&self, key: &str, why: &str) -> Failure {
        broken(&format!("{}: key {key}: {why}", self.gguf.file()))
    }

    fn typed<T>(
        &self,
        key: &str,
        what: &str,
        of: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, Failure> {
        let Some(value) = self.gguf.get(key) else { return Ok(None) };
        let why = || format!("expected {what}, found {}", value.kind().name());
        of(value).map(Some).ok_or_else(|| self.bad(key, &why()))
    }

    fn list<T: 'a>(
        &self,
        key: &str,
        what: &str,
        of: impl Fn(&'a Array) -> Option<T>,
    ) -> Result<Option<T>, Failure> {
        self.typed(key, &format!("a list of {what}"), |v| of(v.as_array()?))
    }

    /// A text.
    pub fn text(&self, key: &str) -> Result<Option<&'a str>, Failure> {
        self.typed(key, "text", Value::as_text)
    }

    fn number(&self, key: &str) -> Result<Option<f64>, Failure> {
        self.typed(key, "a number", Value::as_f64)
    }

    fn whole(&self, key: &str) -> Result<Option<i64>, Failure> {
        self.typed(key, "a whole number", Value::as_i64)
    }

    fn token(&self, key: &str) -> Result<Option<u32>, Failure> {
        self.typed(key, "a token id", |v| u32::try_from(v.as_i64()?).ok())
    }
}
