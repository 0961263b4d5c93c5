//! The metadata of the file: that of a GGUF file as it is, that of a folder as llama.cpp's converter writes it.

use std::io;

use oxseek_text::WrittenVocabulary;
use oxseek_weights::{
    Checkpoint, Gguf,
    gguf::{Array, GgufWriter, describe},
};

use crate::{
    failure::Failure,
    formats::{FILE_TYPE_KEY, QUANTIZATION_VERSION, QUANTIZATION_VERSION_KEY},
};

/// Keys that say how the file at hand is stored, not what the model is.
fn is_of_file(key: &str) -> bool {
    [FILE_TYPE_KEY, QUANTIZATION_VERSION_KEY].contains(&key) || key.starts_with("split.")
}

/// Writes all of it.
pub fn write(
    checkpoint: &Checkpoint,
    name: &str,
    file_type: u32,
    to: &mut GgufWriter,
) -> Result<(), Failure> {
    match checkpoint.gguf() {
        Some(gguf) => copy(gguf, to)?,
        None => make(checkpoint, name, to)?,
    }
    to.set(FILE_TYPE_KEY, file_type)?;
    to.set(QUANTIZATION_VERSION_KEY, QUANTIZATION_VERSION)?;
    Ok(())
}

fn copy(gguf: &Gguf, to: &mut GgufWriter) -> io::Result<()> {
    for (key, value) in gguf.metadata().filter(|(key, _)| !is_of_file(key)) {
        to.set(key, value.clone())?;
    }
    Ok(())
}

fn make(checkpoint: &Checkpoint, name: &str, to: &mut GgufWriter) -> Result<(), Failure> {
    let broken = |e: &dyn std::fmt::Display| Failure::Model(e.to_string());
    let config = checkpoint.config();
    describe(config, to).map_err(|e| broken(&e))?;
    to.set("general.name", name)?;
    let json =
        checkpoint.file("tokenizer.json").ok_or_else(|| broken(&"the folder has no tokenizer.json"))?;
    let tokenizer_config = checkpoint.file("tokenizer_config.json");
    let words = WrittenVocabulary::new(json, tokenizer_config, config.vocab_size).map_err(|e| broken(&e))?;
    to.set("tokenizer.ggml.model", "gpt2")?;
    to.set("tokenizer.ggml.pre", words.pre)?;
    to.set("tokenizer.ggml.tokens", Array::texts(words.tokens.iter().map(String::as_str)))?;
    to.set("tokenizer.ggml.token_type", Array::i32s(&words.types))?;
    to.set("tokenizer.ggml.merges", Array::texts(words.merges.iter().map(String::as_str)))?;
    let bos = words.bos.or(config.bos_token_id);
    let eos = words.eos.or(config.eos_token_ids.first().copied());
    // A second token that ends answers is what llama.cpp calls the end of a turn.
    let eot = config.eos_token_ids.iter().copied().find(|id| Some(*id) != eos);
    for (key, id) in [("bos", bos), ("eos", eos), ("eot", eot), ("padding", words.padding)] {
        if let Some(id) = id {
            to.set(&format!("tokenizer.ggml.{key}_token_id"), id)?;
        }
    }
    let tokenizer_config = object(tokenizer_config)?;
    for key in ["add_bos_token", "add_eos_token"] {
        if let Some(flag) = tokenizer_config[key].as_bool() {
            to.set(&format!("tokenizer.ggml.{key}"), flag)?;
        }
    }
    let of_file = checkpoint.file("chat_template.jinja").map(String::from_utf8_lossy);
    let template = of_file.as_deref().or(tokenizer_config["chat_template"].as_str());
    if let Some(template) = template {
        to.set("tokenizer.chat_template", template)?;
    }
    sampling(&object(checkpoint.file("generation_config.json"))?, to)?;
    Ok(())
}

fn object(json: Option<&[u8]>) -> Result<serde_json::Value, Failure> {
    let Some(json) = json else { return Ok(serde_json::Value::Null) };
    serde_json::from_slice(json).map_err(|e| Failure::Model(format!("not JSON: {e}")))
}

/// What the model's makers recommend.
fn sampling(generation: &serde_json::Value, to: &mut GgufWriter) -> io::Result<()> {
    if generation["do_sample"] == false {
        return to.set("general.sampling.temp", 0.0f32);
    }
    for (key, field) in [("temp", "temperature"), ("top_p", "top_p"), ("min_p", "min_p")] {
        if let Some(v) = generation[field].as_f64() {
            to.set(&format!("general.sampling.{key}"), v as f32)?;
        }
    }
    match generation["top_k"].as_u64().and_then(|k| i32::try_from(k).ok()) {
        Some(k) => to.set("general.sampling.top_k", k),
        None => Ok(()),
    }
}
