//! A `tokenizer.json` as a GGUF file holds it: the reverse of `vocabulary.rs`, as llama.cpp's converter writes it.

use serde_json::Value;

use crate::{
    Error, Tokenizer, Vocabulary,
    vocabulary::{CONTROL, NORMAL, PRE_NAMES, UNUSED, USER_DEFINED},
};

/// What stands under `tokenizer.ggml`.
#[derive(Debug, Clone)]
pub struct WrittenVocabulary {
    /// `pre`: the rules that cut text into words.
    pub pre: &'static str,
    /// `tokens`: their texts by id.
    pub tokens: Vec<String>,
    /// `token_type`: their types by id.
    pub types: Vec<i32>,
    /// `merges`: pairs of tokens, the first to be merged first.
    pub merges: Vec<String>,
    /// `bos_token_id`
    pub bos: Option<u32>,
    /// `eos_token_id`
    pub eos: Option<u32>,
    /// `padding_token_id`
    pub padding: Option<u32>,
}

/// Text that the rules cut differently: digits, scripts, spaces, line breaks, what English hangs on its words.
const PROBE: &str = "Hello, world! don't I'VE We'll 1234567 3.14 a1b2 \n\n  x\r\n\t\ty   z  (normal) ...!!!??? \
    \u{6211}\u{60f3}\u{5728}apple\u{5de5}\u{4f5c}123\u{5929}\u{ff5e} \u{3042}\u{30a2}\u{3002} \
    \u{43d}\u{435}\u{449}\u{43e} caf\u{e9} \u{2460}\u{2461} ------==== ``\"\" camelCaseXYZ \u{1f680}\u{d55c}\u{ad6d} \
    if (x>=0){y[i]=\"z\";}  ";

impl WrittenVocabulary {
    /// `len` tokens, as many as the model has logits; those that the file has not are unused.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the file has more, or cuts text in a way that GGUF has no name for.
    pub fn new(tokenizer_json: &[u8], tokenizer_config: Option<&[u8]>, len: usize) -> Result<Self, Error> {
        let tokenizer = Tokenizer::from_bytes(tokenizer_json, tokenizer_config)?;
        let json: Value =
            serde_json::from_slice(tokenizer_json).map_err(|e| Error::Tokenizer(e.to_string()))?;
        let mut written = Self {
            pre: PRE_NAMES[0],
            tokens: (0..len).map(|i| format!("[PAD{i}]")).collect(),
            types: vec![UNUSED as i32; len],
            merges: merges(&json)?,
            bos: tokenizer.bos_id(),
            eos: tokenizer.eos_id(),
            padding: padding(tokenizer_config).and_then(|text| tokenizer.token_id(&text)),
        };
        for (text, id) in json["model"]["vocab"].as_object().into_iter().flatten() {
            written.put(text, id, NORMAL)?;
        }
        for added in json["added_tokens"].as_array().into_iter().flatten() {
            let text = added["content"].as_str().unwrap_or_default();
            let control = added["special"] == true || looks_special(text);
            written.put(text, &added["id"], if control { CONTROL } else { USER_DEFINED })?;
        }
        written.pre = written.rules(&tokenizer)?;
        Ok(written)
    }

    fn put(&mut self, text: &str, id: &Value, kind: i64) -> Result<(), Error> {
        let at = id.as_u64().and_then(|id| usize::try_from(id).ok()).filter(|id| *id < self.tokens.len());
        let Some(at) = at else {
            let why = format!("token {text:?} has the id {id}, the model has {} tokens", self.tokens.len());
            return Err(Error::Tokenizer(why));
        };
        self.tokens[at] = text.into();
        self.types[at] = kind as i32;
        Ok(())
    }

    /// The name of the rules by which a text is cut into the same words.
    fn rules(&self, tokenizer: &Tokenizer) -> Result<&'static str, Error> {
        let expected = tokenizer.words(PROBE)?;
        for pre in PRE_NAMES {
            let found = Tokenizer::from_vocabulary(&self.vocabulary(pre))?;
            if found.words(PROBE)? == expected {
                return Ok(pre);
            }
        }
        let why = format!(
            "pre_tokenizer: cuts text in none of the ways that GGUF files name: {}",
            PRE_NAMES.join(", ")
        );
        Err(Error::Tokenizer(why))
    }

    /// What a reader of the file takes it for.
    pub fn vocabulary<'a>(&'a self, pre: &'a str) -> Vocabulary<'a> {
        Vocabulary {
            model: "gpt2",
            pre,
            tokens: self.tokens.iter().map(String::as_str).collect(),
            types: self.types.iter().map(|t| i64::from(*t)).collect(),
            merges: self.merges.iter().map(String::as_str).collect(),
            bos: self.bos,
            eos: self.eos,
            named: self.padding.into_iter().collect(),
        }
    }
}

/// `pad_token`, as text or as an object with `content`.
fn padding(tokenizer_config: Option<&[u8]>) -> Option<String> {
    let config: Value = serde_json::from_slice(tokenizer_config?).ok()?;
    let token = &config["pad_token"];
    Some(token.as_str().or(token["content"].as_str())?.to_string())
}

/// Whether the converter makes it a control token, marked as special or not.
fn looks_special(text: &str) -> bool {
    [("<|", "|>"), ("<｜", "｜>")].iter().any(|(begin, end)| text.starts_with(begin) && text.ends_with(end))
}

/// Merges are pairs, in older files texts.
fn merges(json: &Value) -> Result<Vec<String>, Error> {
    let text = |v: &Value| match v {
        Value::String(pair) => Some(pair.clone()),
        pair => Some(format!("{} {}", pair[0].as_str()?, pair[1].as_str()?)),
    };
    let bad = || Error::Tokenizer("merges: expected pairs of tokens".into());
    json["model"]["merges"].as_array().into_iter().flatten().map(|v| text(v).ok_or_else(bad)).collect()
}
