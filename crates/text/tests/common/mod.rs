//! A vocabulary as llama.cpp's converter writes it, made from a `tokenizer.json`.
#![allow(clippy::unwrap_used, dead_code, reason = "tests")]

use oxseek_text::Vocabulary;
use serde_json::Value;

/// What a [`Vocabulary`] borrows.
pub struct Written {
    tokens: Vec<String>,
    types: Vec<i64>,
    merges: Vec<String>,
}

impl Written {
    /// `len` tokens; those that `tokenizer.json` has not are unused.
    pub fn from_json(json: &[u8], len: usize) -> Self {
        let json: Value = serde_json::from_slice(json).unwrap();
        let mut tokens: Vec<String> = (0..len).map(|i| format!("[PAD{i}]")).collect();
        let mut types = vec![5; len];
        for (text, id) in json["model"]["vocab"].as_object().unwrap() {
            let id = id.as_u64().unwrap() as usize;
            tokens[id].clone_from(text);
            types[id] = 1;
        }
        for a in json["added_tokens"].as_array().unwrap() {
            let (id, text) = (a["id"].as_u64().unwrap() as usize, a["content"].as_str().unwrap());
            let looks_special = text.starts_with("<｜") || text.starts_with("<|");
            tokens[id] = text.into();
            types[id] = if a["special"] == true || looks_special { 3 } else { 4 };
        }
        let text = |v: &Value| match v {
            Value::String(pair) => pair.clone(),
            pair => format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()),
        };
        let merges = json["model"]["merges"].as_array().unwrap().iter().map(text).collect();
        Self { tokens, types, merges }
    }

    /// As a GGUF file has it.
    pub fn vocabulary<'a>(&'a self, pre: &'a str) -> Vocabulary<'a> {
        Vocabulary {
            model: "gpt2",
            pre,
            tokens: self.tokens.iter().map(String::as_str).collect(),
            types: self.types.clone(),
            merges: self.merges.iter().map(String::as_str).collect(),
            bos: Some(0),
            eos: Some(1),
            named: vec![2],
        }
    }
}
