//! A vocabulary of any size that can write any text: the bytes, a few control tokens, and words that fill it up.

use std::fmt::Write;

use oxseek_text::Vocabulary;
use oxseek_weights::ModelConfig;
use serde_json::{Value, json};

use crate::failure::Failure;

/// Tokens that no vocabulary can do without: bytes, control tokens and the merged pair.
const LEAST: usize = 300;
const BOS: &str = "<｜begin▁of▁sentence｜>";
const EOS: &str = "<｜end▁of▁sentence｜>";
const USER: &str = "<｜User｜>";
const ASSISTANT: &str = "<｜Assistant｜>";
/// llama.cpp wants a list of merges, and one that is not empty.
const MERGE: [&str; 2] = ["Ġ", "t"];
/// How conversations become prompts.
pub const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<｜User｜>' \
    + m['content'] }}{% elif m['role'] == 'assistant' %}{{ '<｜Assistant｜>' + m['content'] + eos_token }}\
    {% else %}{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}\
    {% endif %}";
/// How text is cut into words before pairs are merged: as DeepSeek-V3 does.
pub const PRE: &str = "deepseek-v3";

/// The tokens by id.
pub struct Words {
    /// Their texts in GPT-2's alphabet of bytes.
    pub texts: Vec<String>,
    /// Ids of the control tokens: begin, end, user, assistant.
    pub control: [u32; 4],
}

impl Words {
    /// As many as the model has logits.
    pub fn of(config: &ModelConfig) -> Result<Self, Failure> {
        let len = config.vocab_size;
        if len < LEAST {
            let why = format!("vocab_size: found {len}, a vocabulary needs {LEAST} tokens");
            return Err(Failure::Usage(why));
        }
        let mut texts = vec![String::new(); len];
        let bos = config.bos_token_id.unwrap_or(0);
        let eos = config.eos_token_ids.first().copied().unwrap_or(1);
        texts[bos as usize] = BOS.into();
        texts[eos as usize] = EOS.into();
        let bytes = byte_alphabet().map(String::from);
        let fixed = [USER.to_string(), ASSISTANT.into(), MERGE.concat()];
        let mut next = fixed.into_iter().chain(bytes).chain((0..).map(word));
        let mut control = [bos, eos, 0, 0];
        for (id, text) in texts.iter_mut().enumerate().filter(|(_, text)| text.is_empty()) {
            *text = next.next().unwrap_or_default();
            match text.as_str() {
                USER => control[2] = id as u32,
                ASSISTANT => control[3] = id as u32,
                _ => {}
            }
        }
        Ok(Self { texts, control })
    }

    /// The one merge.
    pub fn merge() -> String {
        MERGE.join(" ")
    }

    /// `tokenizer.json`
    pub fn json(&self) -> Result<Value, Failure> {
        let rules = Vocabulary::rules_json(PRE).map_err(|e| Failure::Run(e.to_string()))?;
        let is_control = |id: usize| self.control.contains(&(id as u32));
        let added: Vec<Value> = self
            .control
            .iter()
            .enumerate()
            .map(|(i, &id)| {
                json!({
                    "id": id, "content": self.texts[id as usize], "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false, "special": i < 2,
                })
            })
            .collect();
        let vocab: serde_json::Map<String, Value> = self
            .texts
            .iter()
            .enumerate()
            .filter(|(id, _)| !is_control(*id))
            .map(|(id, text)| (text.clone(), id.into()))
            .collect();
        Ok(json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
            "pre_tokenizer": rules,
            "post_processor": null,
            "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                "vocab": vocab, "merges": [Self::merge()],
            },
        }))
    }

    /// `tokenizer_config.json`
    pub fn config_json(context: usize) -> Value {
        json!({
            "add_bos_token": true, "add_eos_token": false, "bos_token": BOS, "eos_token": EOS,
            "model_max_length": context, "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE,
        })
    }
}

/// The `i`th of words that are all different: a space and syllables.
fn word(mut i: usize) -> String {
    const CONSONANTS: &[u8; 20] = b"bcdfghjklmnpqrstvwxz";
    const VOWELS: &[u8; 5] = b"aeiou";
    let mut text = "Ġ".to_string();
    loop {
        let _ = write!(text, "{}{}", char::from(CONSONANTS[i % 20]), char::from(VOWELS[i / 20 % 5]));
        i /= 100;
        if i == 0 {
            return text;
        }
        i -= 1;
    }
}

/// GPT-2's characters of the bytes 0 to 255.
fn byte_alphabet() -> impl Iterator<Item = char> {
    let printable = |b: u8| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let mut hidden = 0x100..;
    (0..=255u8).filter_map(
        move |b| if printable(b) { Some(b.into()) } else { hidden.next().and_then(char::from_u32) },
    )
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn all_tokens_differ() {
        let config = super::super::shapes::Shape::find("v2-lite", None).unwrap().config;
        let words = Words::of(&config).unwrap();
        let different: HashSet<&String> = words.texts.iter().collect();
        assert_eq!(different.len(), 102_400);
        assert_eq!(words.texts[100_000], BOS);
        assert_eq!(words.control[..2], [100_000, 100_001]);
    }
}
