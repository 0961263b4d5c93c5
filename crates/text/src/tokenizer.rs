//! Text to tokens and back, by a checkpoint's own `tokenizer.json`.
//!
//! The `tokenizers` crate does the pre-tokenisation and the byte pair encoding. Finding the added tokens is
//! done here, because what counts as one depends on where the text comes from: the chat template may write
//! control tokens, the people whose words it quotes may not.

use std::collections::{HashMap, HashSet};

use aho_corasick::{AhoCorasick, MatchKind};
use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::error::{Error, file_error};
use crate::messages::{GUARD, unguard};

/// Highest number of token ids that a tokenizer may have.
pub const TOKEN_IDS_MAX: usize = 1 << 22;

const FILE: &str = "tokenizer.json";
const CONFIG_FILE: &str = "tokenizer_config.json";

/// What the text of an added token means in the text to encode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ControlTokens {
    /// It is the token: for text that the operator or the client wrote as a raw prompt.
    Parse,
    /// It is plain text, and gives the tokens that its characters give.
    AsText,
}

/// A checkpoint's tokenizer: byte-level byte pair encoding with added tokens.
#[derive(Debug)]
pub struct Tokenizer {
    /// Knows no added tokens.
    bpe: tokenizers::Tokenizer,
    added: AddedTokens,
    ids: HashMap<String, u32>,
    /// By id: the bytes that the token stands for.
    bytes: Vec<Option<Box<[u8]>>>,
    bos_id: Option<u32>,
    eos_id: Option<u32>,
    add_bos: bool,
}

impl Tokenizer {
    /// Reads a `tokenizer.json` and, for the bos and eos tokens, a `tokenizer_config.json`.
    ///
    /// # Errors
    /// [`Error::File`] if a file does not parse or contradicts itself; [`Error::Unsupported`] for anything
    /// but byte-level byte pair encoding without a normalizer; [`Error::AddedToken`] for an added token
    /// that strips its surroundings or that the content guard could not make inert.
    pub fn from_bytes(tokenizer_json: &[u8], tokenizer_config_json: Option<&[u8]>) -> Result<Self, Error> {
        let file: File = serde_json::from_slice(tokenizer_json).map_err(|error| file_error(FILE, &error))?;
        file.check()?;
        let mut bpe =
            tokenizers::Tokenizer::from_bytes(tokenizer_json).map_err(|error| file_error(FILE, &error))?;
        bpe.with_added_vocabulary(tokenizers::AddedVocabulary::new());
        // Both are options of batch work; the length of a prompt is bounded elsewhere, with an error.
        bpe.with_truncation(None).map_err(|error| file_error(FILE, &error))?;
        bpe.with_padding(None);

        let mut ids = bpe.get_vocab(false);
        let mut bytes = token_bytes(&ids)?;
        for token in &file.added_tokens {
            token.check()?;
            token.place(&mut ids, &mut bytes)?;
        }
        let added = AddedTokens::new(&file.added_tokens)?;
        let config = Config::read(tokenizer_config_json)?;
        Ok(Self {
            bos_id: config.id_of(config.bos_token.as_ref(), "bos_token", &ids)?,
            eos_id: config.id_of(config.eos_token.as_ref(), "eos_token", &ids)?,
            add_bos: config.add_bos_token.unwrap_or(false),
            bpe,
            added,
            ids,
            bytes,
        })
    }

    /// The tokens of `text`. No bos token is added: see [`add_bos`](Self::add_bos).
    ///
    /// # Errors
    /// [`Error::Encode`]
    pub fn encode(&self, text: &str, control: ControlTokens) -> Result<Vec<u32>, Error> {
        let mut tokens = Vec::new();
        match control {
            ControlTokens::AsText => self.encode_text(text, &mut tokens)?,
            ControlTokens::Parse => {
                for piece in self.added.split(text) {
                    match piece {
                        Piece::Token(id) => tokens.push(id),
                        Piece::Text(text) => self.encode_text(text, &mut tokens)?,
                    }
                }
            }
        }
        Ok(tokens)
    }

    /// The tokens of a prompt that a chat template wrote over guarded messages
    /// ([`guard_messages`](crate::guard_messages)): the control tokens are those of the template, and the
    /// guards are gone.
    ///
    /// # Errors
    /// [`Error::Encode`]
    pub fn encode_rendered(&self, rendered: &str) -> Result<Vec<u32>, Error> {
        let mut tokens = Vec::new();
        for piece in self.added.split(rendered) {
            match piece {
                Piece::Token(id) => tokens.push(id),
                Piece::Text(text) => self.encode_text(&unguard(text), &mut tokens)?,
            }
        }
        Ok(tokens)
    }

    /// The text of `ids`, control tokens included; bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| self.bytes(id)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The bytes that a token stands for, which need not be whole characters. `None` for an unknown id.
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        self.bytes.get(id as usize)?.as_deref().map(<[u8]>::to_vec)
    }

    /// The id of a token by its spelling in `tokenizer.json`; of an added token, by its text.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.ids.get(token).copied()
    }

    /// The token that begins a text.
    pub fn bos_id(&self) -> Option<u32> {
        self.bos_id
    }

    /// The token that ends a text.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos_id
    }

    /// The text of the bos token, empty where there is none; for [`ChatTemplate`](crate::ChatTemplate).
    pub fn bos(&self) -> String {
        self.bos_id.map(|id| self.decode(&[id])).unwrap_or_default()
    }

    /// The text of the eos token, empty where there is none; for [`ChatTemplate`](crate::ChatTemplate).
    pub fn eos(&self) -> String {
        self.eos_id.map(|id| self.decode(&[id])).unwrap_or_default()
    }

    /// Whether a raw prompt begins with [`bos_id`](Self::bos_id) (`add_bos_token`). A chat template writes
    /// its own.
    pub fn add_bos(&self) -> bool {
        self.add_bos
    }

    /// One more than the highest id that has a text. A model may score more ids: those mean nothing.
    pub fn vocab_len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether the token is left out of shown text: an added token marked `special`. Other added tokens,
    /// such as `<think>` or those of tool calls, are structure that a reader of the text needs.
    pub fn is_control(&self, id: u32) -> bool {
        self.added.special.contains(&id)
    }

    /// The bytes of a token; none for an unknown id.
    pub(crate) fn bytes(&self, id: u32) -> &[u8] {
        self.bytes.get(id as usize).and_then(Option::as_deref).unwrap_or_default()
    }

    pub(crate) fn added(&self) -> &AddedTokens {
        &self.added
    }

    fn encode_text(&self, text: &str, tokens: &mut Vec<u32>) -> Result<(), Error> {
        if text.is_empty() {
            return Ok(());
        }
        let encoding =
            self.bpe.encode_fast(text, false).map_err(|error| Error::Encode(error.to_string()))?;
        tokens.extend_from_slice(encoding.get_ids());
        Ok(())
    }
}

/// The added tokens of a tokenizer, as patterns.
#[derive(Debug)]
pub(crate) struct AddedTokens {
    pub(crate) contents: Vec<String>,
    ids: Vec<u32>,
    special: HashSet<u32>,
    /// Leftmost, then longest, as the `tokenizers` crate finds them.
    finder: AhoCorasick,
}

pub(crate) enum Piece<'text> {
    Token(u32),
    Text(&'text str),
}

impl AddedTokens {
    fn new(tokens: &[AddedToken]) -> Result<Self, Error> {
        let contents: Vec<String> = tokens.iter().map(|token| token.content.clone()).collect();
        let finder = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(&contents)
            .map_err(|error| file_error(FILE, &error))?;
        let special = tokens.iter().filter(|token| token.special).map(|token| token.id).collect();
        Ok(Self { contents, ids: tokens.iter().map(|token| token.id).collect(), special, finder })
    }

    /// Cuts `text` at the added tokens in it.
    fn split<'text>(&self, text: &'text str) -> Vec<Piece<'text>> {
        let mut pieces = Vec::new();
        let mut start = 0;
        for found in self.finder.find_iter(text) {
            if start < found.start() {
                pieces.push(Piece::Text(&text[start..found.start()]));
            }
            pieces.push(Piece::Token(self.ids[found.pattern().as_usize()]));
            start = found.end();
        }
        if start < text.len() {
            pieces.push(Piece::Text(&text[start..]));
        }
        pieces
    }
}

/// The bytes of every entry of a byte-level vocabulary, by id.
fn token_bytes(vocabulary: &HashMap<String, u32>) -> Result<Vec<Option<Box<[u8]>>>, Error> {
    let alphabet = byte_alphabet();
    let mut bytes = Vec::new();
    for (token, &id) in vocabulary {
        // A token outside the alphabet stands for its own characters, as in the crate's decoder.
        let decoded: Option<Vec<u8>> = token.chars().map(|char| alphabet.get(&char).copied()).collect();
        place(&mut bytes, id, decoded.unwrap_or_else(|| token.as_bytes().to_vec()))?;
    }
    Ok(bytes)
}

fn place(bytes: &mut Vec<Option<Box<[u8]>>>, id: u32, token: Vec<u8>) -> Result<(), Error> {
    let index = id as usize;
    if index >= TOKEN_IDS_MAX {
        return Err(file_error(FILE, &format_args!("token id {id} is over the limit of {TOKEN_IDS_MAX}")));
    }
    if bytes.len() <= index {
        bytes.resize(index + 1, None);
    }
    bytes[index] = Some(token.into_boxed_slice());
    Ok(())
}

/// GPT-2's alphabet: the printable bytes of Latin-1 are themselves, the other 68 are U+0100 and up in order.
fn byte_alphabet() -> HashMap<char, u8> {
    let mut others = 0x100..;
    (0..=u8::MAX)
        .filter_map(|byte| {
            let own = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
            let code = if own { Some(u32::from(byte)) } else { others.next() };
            Some((char::from_u32(code?)?, byte))
        })
        .collect()
}

/// What is read of `tokenizer.json` here; the `tokenizers` crate reads the rest.
#[derive(Deserialize)]
struct File {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    normalizer: Option<Part>,
    pre_tokenizer: Option<Part>,
    decoder: Option<Part>,
    model: Model,
}

#[derive(Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: String,
    normalizers: Option<Vec<IgnoredAny>>,
    pretokenizers: Option<Vec<Part>>,
}

#[derive(Deserialize)]
struct Model {
    #[serde(rename = "type")]
    kind: Option<String>,
    dropout: Option<f64>,
    #[serde(default)]
    byte_fallback: bool,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    special: bool,
}

impl File {
    fn check(&self) -> Result<(), Error> {
        let unsupported = |field, value: String| Err(Error::Unsupported { file: FILE, field, value });
        // Old files leave the model's type out; the crate then tells it from the other fields.
        if let Some(kind) = self.model.kind.as_ref().filter(|kind| *kind != "BPE") {
            return unsupported("model.type", kind.clone());
        }
        if let Some(dropout) = self.model.dropout.filter(|dropout| *dropout != 0.0) {
            return unsupported("model.dropout", dropout.to_string());
        }
        if self.model.byte_fallback {
            return unsupported("model.byte_fallback", "true".into());
        }
        for (field, affix) in [
            ("model.continuing_subword_prefix", &self.model.continuing_subword_prefix),
            ("model.end_of_word_suffix", &self.model.end_of_word_suffix),
        ] {
            if let Some(affix) = affix.as_ref().filter(|affix| !affix.is_empty()) {
                return unsupported(field, affix.clone());
            }
        }
        if let Some(normalizer) = self.normalizer.as_ref().filter(|part| !part.is_empty_sequence()) {
            return unsupported("normalizer", normalizer.kind.clone());
        }
        if !self.pre_tokenizer.as_ref().is_some_and(Part::ends_byte_level) {
            let kind = self.pre_tokenizer.as_ref().map_or("null", |part| &part.kind);
            return unsupported("pre_tokenizer", format!("{kind} that does not end in ByteLevel"));
        }
        match &self.decoder {
            Some(decoder) if decoder.kind == "ByteLevel" => Ok(()),
            decoder => unsupported("decoder", decoder.as_ref().map_or("null", |part| &part.kind).into()),
        }
    }
}

impl Part {
    fn is_empty_sequence(&self) -> bool {
        self.kind == "Sequence" && self.normalizers.as_ref().is_none_or(Vec::is_empty)
    }

    fn ends_byte_level(&self) -> bool {
        match &self.pretokenizers {
            Some(parts) => parts.last().is_some_and(Part::ends_byte_level),
            None => self.kind == "ByteLevel",
        }
    }
}

impl AddedToken {
    fn check(&self) -> Result<(), Error> {
        let problem = if self.lstrip || self.rstrip || self.single_word {
            "lstrip, rstrip and single_word are unsupported"
        } else if self.content.chars().nth(1).is_none() {
            "a token of less than two characters cannot be told from message content"
        } else if self.content.contains(GUARD) {
            "it contains the noncharacter U+FDD0, which guards message content"
        } else {
            return Ok(());
        };
        Err(Error::AddedToken { content: self.content.clone(), problem })
    }

    /// Adds the token to the tables; its id must be free or its own.
    fn place(
        &self,
        ids: &mut HashMap<String, u32>,
        bytes: &mut Vec<Option<Box<[u8]>>>,
    ) -> Result<(), Error> {
        let conflict = |problem| Err(Error::AddedToken { content: self.content.clone(), problem });
        match ids.insert(self.content.clone(), self.id) {
            Some(id) if id != self.id => return conflict("it has two ids"),
            None if bytes.get(self.id as usize).is_some_and(Option::is_some) => {
                return conflict("its id belongs to another token");
            }
            _ => {}
        }
        place(bytes, self.id, self.content.as_bytes().to_vec())
    }
}

/// What is read of `tokenizer_config.json` here.
#[derive(Deserialize, Default)]
struct Config {
    bos_token: Option<TokenName>,
    eos_token: Option<TokenName>,
    add_bos_token: Option<bool>,
}

/// A token is written as its text or as an object around it.
#[derive(Deserialize)]
#[serde(untagged)]
enum TokenName {
    Text(String),
    Object { content: String },
}

impl Config {
    fn read(json: Option<&[u8]>) -> Result<Self, Error> {
        json.map_or_else(
            || Ok(Self::default()),
            |json| serde_json::from_slice(json).map_err(|error| file_error(CONFIG_FILE, &error)),
        )
    }

    fn id_of(
        &self,
        token: Option<&TokenName>,
        field: &'static str,
        ids: &HashMap<String, u32>,
    ) -> Result<Option<u32>, Error> {
        let Some(TokenName::Text(name) | TokenName::Object { content: name }) = token else {
            return Ok(None);
        };
        match ids.get(name) {
            Some(&id) => Ok(Some(id)),
            None => Err(Error::Unsupported {
                file: CONFIG_FILE,
                field,
                value: format!("{name:?} is not a token of {FILE}"),
            }),
        }
    }
}
