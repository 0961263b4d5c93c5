//! The model's tokenizer: byte-level BPE through the `tokenizers` crate, added tokens through our own matcher.
//!
//! Added tokens are control tokens: they begin turns and end answers. Whether their text in an input means them is
//! the caller's decision, so the BPE is loaded without them and the text is split here.

use std::collections::HashMap;

use aho_corasick::{AhoCorasick, MatchKind};
use serde::Deserialize;
use serde_json::Value;
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _};

use crate::{Error, messages::unguard, vocabulary::Vocabulary};

/// What text that spells a control token means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ControlTokens {
    /// The control token: for text that a chat template wrote.
    Parse,
    /// Just that text: for text that a user wrote.
    AsText,
}

/// A model's tokenizer.
pub struct Tokenizer {
    bpe: tokenizers::Tokenizer,
    added: Vec<Added>,
    by_text: HashMap<String, u32>,
    matcher: Option<AhoCorasick>,
    /// Bytes of every token, one after the other; token `i` is at `starts[i]..starts[i + 1]`.
    bytes: Vec<u8>,
    starts: Vec<u32>,
    /// Ids that no token has, and ids of special tokens.
    kinds: Vec<Kind>,
    bos: Option<u32>,
    eos: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Absent,
    Text,
    Special,
}

/// An entry of `added_tokens`.
#[allow(clippy::struct_excessive_bools, reason = "the file's format")]
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Added {
    id: u32,
    content: String,
    #[serde(default)]
    special: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    single_word: bool,
}

impl Added {
    pub(crate) fn new(id: u32, content: &str, special: bool) -> Self {
        Self { id, content: content.into(), special, lstrip: false, rstrip: false, single_word: false }
    }
}

/// Largest token id that is accepted: far above every vocabulary.
const ID_MAX: u32 = 1 << 22;

impl Tokenizer {
    /// Reads `tokenizer.json`, and from `tokenizer_config.json` which tokens begin and end a text.
    ///
    /// # Errors
    /// [`Error::Tokenizer`], naming what is broken or unsupported.
    pub fn from_bytes(tokenizer_json: &[u8], tokenizer_config: Option<&[u8]>) -> Result<Self, Error> {
        let bad = |why: String| Error::Tokenizer(why);
        let mut json: Value = serde_json::from_slice(tokenizer_json).map_err(|e| bad(e.to_string()))?;
        check_kind(&json)?;
        let added = take_added_tokens(&mut json)?;
        // The crate prints a warning for each added token; without them there is nothing to warn of.
        let bpe: tokenizers::Tokenizer = serde_json::from_value(json).map_err(|e| bad(e.to_string()))?;
        let mut tokenizer = Self::assemble(bpe, added).map_err(bad)?;
        if let Some(config) = tokenizer_config {
            let config: Value =
                serde_json::from_slice(config).map_err(|e| bad(format!("tokenizer_config.json: {e}")))?;
            tokenizer.bos = tokenizer.named(&config["bos_token"]);
            tokenizer.eos = tokenizer.named(&config["eos_token"]);
        }
        Ok(tokenizer)
    }

    /// Reads the vocabulary of a GGUF file.
    ///
    /// # Errors
    /// [`Error::Vocabulary`], naming what is broken or unsupported.
    pub fn from_vocabulary(vocabulary: &Vocabulary<'_>) -> Result<Self, Error> {
        let (bpe, added) = vocabulary.build().map_err(Error::Vocabulary)?;
        let mut tokenizer = Self::assemble(bpe, added).map_err(Error::Vocabulary)?;
        (tokenizer.bos, tokenizer.eos) = (vocabulary.bos, vocabulary.eos);
        Ok(tokenizer)
    }

    fn assemble(bpe: tokenizers::Tokenizer, added: Vec<Added>) -> Result<Self, String> {
        let by_text: HashMap<String, u32> = added.iter().map(|a| (a.content.clone(), a.id)).collect();
        let matcher = if added.is_empty() {
            None
        } else {
            Some(
                AhoCorasick::builder()
                    .match_kind(MatchKind::LeftmostLongest)
                    .build(added.iter().map(|a| &a.content))
                    .map_err(|e| e.to_string())?,
            )
        };
        let mut tokenizer = Self {
            bpe,
            added,
            by_text,
            matcher,
            bytes: Vec::new(),
            starts: vec![0],
            kinds: Vec::new(),
            bos: None,
            eos: None,
        };
        tokenizer.spell_tokens()?;
        Ok(tokenizer)
    }

    /// Tokens of `text`; no token is added at its ends.
    ///
    /// # Errors
    /// [`Error::Encode`]
    pub fn encode(&self, text: &str, control: ControlTokens) -> Result<Vec<u32>, Error> {
        let mut ids = Vec::new();
        match control {
            ControlTokens::AsText => self.encode_text(text, &mut ids)?,
            ControlTokens::Parse => self.encode_pieces(text, &mut ids, std::string::ToString::to_string)?,
        }
        Ok(ids)
    }

    /// Tokens of a rendered chat template: its control tokens count, guarded text from messages is text.
    ///
    /// # Errors
    /// [`Error::Encode`]
    pub fn encode_rendered(&self, rendered: &str) -> Result<Vec<u32>, Error> {
        let mut ids = Vec::new();
        self.encode_pieces(rendered, &mut ids, unguard)?;
        Ok(ids)
    }

    /// The text of `ids`; bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| self.token_bytes(id)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The bytes of a token; empty for an id that no token has.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        match self.starts.get(id as usize..id as usize + 2) {
            Some(range) => &self.bytes[range[0] as usize..range[1] as usize],
            None => &[],
        }
    }

    /// The id of an added token by its text.
    pub fn token_id(&self, text: &str) -> Option<u32> {
        self.by_text.get(text).copied()
    }

    /// Whether the tokenizer marks a token as special: begin and end of text, padding. Think and tool tokens are not.
    pub fn is_special(&self, id: u32) -> bool {
        self.kinds.get(id as usize) == Some(&Kind::Special)
    }

    /// The token that begins a text.
    pub fn bos_id(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a text.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos
    }

    /// One more than the highest id; models may have more logits than that.
    pub fn vocab_len(&self) -> usize {
        self.kinds.len()
    }

    /// Texts of all added tokens.
    pub fn added_tokens(&self) -> impl Iterator<Item = &str> {
        self.added.iter().map(|a| a.content.as_str())
    }

    /// The words that a text is cut into before tokens are merged.
    pub(crate) fn words(&self, text: &str) -> Result<Vec<String>, Error> {
        let mut cut = PreTokenizedString::from(text);
        if let Some(rules) = self.bpe.get_pre_tokenizer() {
            rules.pre_tokenize(&mut cut).map_err(|e| Error::Encode(e.to_string()))?;
        }
        let words = cut.get_splits(OffsetReferential::Original, OffsetType::Byte);
        Ok(words.into_iter().map(|(word, ..)| word.to_string()).collect())
    }

    pub(crate) fn matcher(&self) -> Option<&AhoCorasick> {
        self.matcher.as_ref()
    }

    /// Splits at added tokens and encodes what is between them after `restore`.
    fn encode_pieces(
        &self,
        text: &str,
        ids: &mut Vec<u32>,
        restore: impl Fn(&str) -> String,
    ) -> Result<(), Error> {
        let mut end = 0;
        for m in self.matcher.iter().flat_map(|matcher| matcher.find_iter(text)) {
            self.encode_text(&restore(&text[end..m.start()]), ids)?;
            ids.push(self.added[m.pattern().as_usize()].id);
            end = m.end();
        }
        self.encode_text(&restore(&text[end..]), ids)
    }

    fn encode_text(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), Error> {
        if text.is_empty() {
            return Ok(());
        }
        // The crate's message is about its regex, never about the text.
        let encoding = self.bpe.encode_fast(text, false).map_err(|e| Error::Encode(e.to_string()))?;
        ids.extend_from_slice(encoding.get_ids());
        Ok(())
    }

    /// Fills the table of token bytes.
    fn spell_tokens(&mut self) -> Result<(), String> {
        let vocabulary = self.bpe.get_vocab(false);
        let highest = vocabulary.values().copied().chain(self.added.iter().map(|a| a.id)).max().unwrap_or(0);
        if highest > ID_MAX {
            return Err(format!("token id {highest}, at most {ID_MAX} allowed"));
        }
        let mut spelled: Vec<Option<(Vec<u8>, Kind)>> = vec![None; highest as usize + 1];
        let alphabet = byte_alphabet();
        for (text, id) in vocabulary {
            let bytes: Option<Vec<u8>> = text.chars().map(|c| alphabet.get(&c).copied()).collect();
            // Entries that are not in the byte alphabet are added tokens that the vocabulary lists too.
            spelled[id as usize] = Some((bytes.unwrap_or_else(|| text.into_bytes()), Kind::Text));
        }
        for a in &self.added {
            let kind = if a.special { Kind::Special } else { Kind::Text };
            spelled[a.id as usize] = Some((a.content.clone().into_bytes(), kind));
        }
        for token in spelled {
            let (bytes, kind) = token.unwrap_or((Vec::new(), Kind::Absent));
            self.bytes.extend_from_slice(&bytes);
            self.starts.push(self.bytes.len() as u32);
            self.kinds.push(kind);
        }
        Ok(())
    }

    /// A token named in `tokenizer_config.json`, as text or as an object with `content`.
    fn named(&self, value: &Value) -> Option<u32> {
        self.token_id(value.as_str().or(value["content"].as_str())?)
    }
}

/// Byte-level BPE is what the family uses; anything else would be decoded wrongly.
fn check_kind(json: &Value) -> Result<(), Error> {
    let found = |part: &str| json[part]["type"].as_str().unwrap_or("none").to_string();
    for (part, supported) in [("model", "BPE"), ("decoder", "ByteLevel")] {
        if found(part) != supported {
            return Err(Error::Tokenizer(format!("{part} is {}, supported is {supported}", found(part))));
        }
    }
    Ok(())
}

fn take_added_tokens(json: &mut Value) -> Result<Vec<Added>, Error> {
    let bad = |why: String| Error::Tokenizer(format!("added_tokens: {why}"));
    let list = json["added_tokens"].take();
    json["added_tokens"] = Value::Array(Vec::new());
    let added: Vec<Added> = match list {
        Value::Null => Vec::new(),
        list => serde_json::from_value(list).map_err(|e| bad(e.to_string()))?,
    };
    for a in &added {
        if a.lstrip || a.rstrip || a.single_word {
            return Err(bad(format!("{:?}: lstrip, rstrip and single_word are not supported", a.content)));
        }
        if a.content.is_empty() || a.id > ID_MAX {
            return Err(bad(format!("token {} is empty or past id {ID_MAX}", a.id)));
        }
    }
    Ok(added)
}

/// GPT-2's alphabet of bytes: printable ones are themselves, the others follow from U+0100 on in order.
fn byte_alphabet() -> HashMap<char, u8> {
    let printable = |b: u8| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let mut next = 0x100;
    let mut alphabet = HashMap::new();
    for b in 0..=255u8 {
        let c = if printable(b) {
            char::from(b)
        } else {
            next += 1;
            char::from_u32(next - 1).unwrap_or(char::REPLACEMENT_CHARACTER)
        };
        alphabet.insert(c, b);
    }
    alphabet
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_alphabet_has_every_byte_once() {
        let alphabet = byte_alphabet();
        assert_eq!(alphabet.len(), 256);
        assert_eq!(alphabet[&'Ġ'], b' ');
        assert_eq!(alphabet[&'Ċ'], b'\n');
        assert_eq!(alphabet[&'A'], b'A');
    }

    #[test]
    fn unsupported_tokenizers_are_named() {
        for (json, want) in [
            ("{", "EOF"),
            (r#"{"model":{"type":"Unigram"}}"#, "model is Unigram, supported is BPE"),
            (r#"{"model":{"type":"BPE"}}"#, "decoder is none, supported is ByteLevel"),
            (
                r#"{"model":{"type":"BPE"},"decoder":{"type":"ByteLevel"},
                    "added_tokens":[{"id":1,"content":"x","lstrip":true}]}"#,
                "lstrip",
            ),
            (r#"{"model":{"type":"BPE"},"decoder":{"type":"ByteLevel"},"added_tokens":7}"#, "added_tokens"),
        ] {
            let Err(e) = Tokenizer::from_bytes(json.as_bytes(), None) else { panic!("accepted {json}") };
            assert!(e.to_string().contains(want), "{e}");
        }
    }
}
