//! The vocabulary of a GGUF file: tokens and merges, and the name of the rules that cut text into words.

use std::collections::HashMap;

use tokenizers::{
    models::bpe::{BPE, Vocab},
    pre_tokenizers::{
        byte_level::ByteLevel,
        digits::Digits,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
    tokenizer::SplitDelimiterBehavior,
};

use crate::{Error, tokenizer::Added};

/// What a GGUF file holds under `tokenizer.ggml`.
#[derive(Debug, Clone, Default)]
pub struct Vocabulary<'a> {
    /// `model`: the kind of tokenizer.
    pub model: &'a str,
    /// `pre`: the rules that cut text into words.
    pub pre: &'a str,
    /// `tokens`: their texts by id, in the byte alphabet of GPT-2.
    pub tokens: Vec<&'a str>,
    /// `token_type`: their types by id.
    pub types: Vec<i64>,
    /// `merges`: pairs of tokens, the first to be merged first.
    pub merges: Vec<&'a str>,
    /// `bos_token_id`: begins a text.
    pub bos: Option<u32>,
    /// `eos_token_id`: ends a text.
    pub eos: Option<u32>,
    /// Other tokens that the file names: padding, unknown, end of a turn.
    pub named: Vec<u32>,
}

/// Token types.
pub(crate) const NORMAL: i64 = 1;
const UNKNOWN: i64 = 2;
pub(crate) const CONTROL: i64 = 3;
pub(crate) const USER_DEFINED: i64 = 4;
pub(crate) const UNUSED: i64 = 5;

/// The names of the rules that are known.
pub(crate) const PRE_NAMES: [&str; 5] = ["deepseek-v3", "deepseek-llm", "deepseek-coder", "kimi-k2", "glm4"];

impl Vocabulary<'_> {
    /// The rules called `pre` as `tokenizer.json` has them.
    ///
    /// # Errors
    /// [`Error::Vocabulary`] when there are none of this name.
    pub fn rules_json(pre: &str) -> Result<serde_json::Value, Error> {
        let rules = Rules::of(pre).and_then(|r| r.pre_tokenizer()).map_err(Error::Vocabulary)?;
        serde_json::to_value(rules).map_err(|e| Error::Vocabulary(e.to_string()))
    }

    pub(crate) fn build(&self) -> Result<(tokenizers::Tokenizer, Vec<Added>), String> {
        if self.model != "gpt2" {
            return Err(format!("model: found {:?}, supported is gpt2, byte-level BPE", self.model));
        }
        let rules = Rules::of(self.pre)?;
        let (vocabulary, added) = self.tokens()?;
        let mut bpe = tokenizers::Tokenizer::new(
            BPE::builder()
                .vocab_and_merges(vocabulary, self.merges()?)
                .ignore_merges(rules.whole_words)
                .build()
                .map_err(|e| format!("merges: {e}"))?,
        );
        bpe.with_pre_tokenizer(Some(rules.pre_tokenizer()?)).with_decoder(Some(ByteLevel::default()));
        Ok((bpe, added))
    }

    /// Tokens that merging makes, and those that are found as they are.
    fn tokens(&self) -> Result<(Vocab, Vec<Added>), String> {
        if !self.types.is_empty() && self.types.len() != self.tokens.len() {
            return Err(format!("token_type: {} for {} tokens", self.types.len(), self.tokens.len()));
        }
        let mut ids: HashMap<&str, u32> = HashMap::with_capacity(self.tokens.len());
        let (mut normal, mut added) = (Vec::new(), Vec::new());
        for (id, &text) in (0u32..).zip(&self.tokens) {
            let kind = self.types.get(id as usize).copied().unwrap_or(NORMAL);
            // Unused ones fill the vocabulary up to the size of the embedding.
            if kind == UNUSED || text.is_empty() {
                continue;
            }
            if let Some(other) = ids.insert(text, id) {
                return Err(format!("tokens: {other} and {id} are both {text:?}"));
            }
            match kind {
                UNKNOWN | CONTROL | USER_DEFINED => {
                    let special = kind != USER_DEFINED && self.is_special(id, text);
                    added.push(Added::new(id, text, special));
                }
                NORMAL => normal.push((text.to_string(), id)),
                other => return Err(format!("token_type: token {id} has the unsupported type {other}")),
            }
        }
        Ok((normal.into_iter().collect(), added))
    }

    /// Whether an answer's text leaves a control token out. The converter makes every token that looks like one a
    /// control token; `tokenizer.json` marks fewer as special, so that what parses an answer sees its tool calls: of
    /// DeepSeek's tokens between bars only those that begin, end, pad and hold places, and not Kimi's for tools.
    fn is_special(&self, id: u32, text: &str) -> bool {
        let named = [self.bos, self.eos].contains(&Some(id)) || self.named.contains(&id);
        // DeepSeek-V3 names another token as its padding, and files then do not name this one.
        let silent = ["<｜place▁holder", "<｜▁pad▁｜>"].iter().any(|s| text.starts_with(s));
        let marker = text.starts_with("<｜") && !silent || text.contains("tool");
        named || !marker
    }

    fn merges(&self) -> Result<Vec<(String, String)>, String> {
        let pair = |(i, merge): (usize, &&str)| {
            // A token may begin with a space, but not one that is merged: the byte alphabet has none.
            let pair = merge.split_once(' ').filter(|(a, b)| !a.is_empty() && !b.is_empty());
            let (a, b) = pair.ok_or_else(|| format!("merges: {i} is {merge:?}, expected two tokens"))?;
            Ok((a.to_string(), b.to_string()))
        };
        self.merges.iter().enumerate().map(pair).collect()
    }
}

/// How text is cut into words, within which tokens are merged. Each pattern cuts the pieces of the one before.
#[derive(Default)]
struct Rules {
    patterns: Vec<String>,
    /// Digits stand alone.
    digits: bool,
    /// A word that is a token is not merged from smaller ones.
    whole_words: bool,
}

/// DeepSeek-V3, R1.
const DEEPSEEK_V3: [&str; 3] = [
    r"\p{N}{1,3}",
    "[\u{4E00}-\u{9FA5}\u{3040}-\u{309F}\u{30A0}-\u{30FF}]+",
    concat!(
        r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"##,
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
];

/// DeepSeek-V2: letters of scripts with two cases, as of an old version of Unicode.
const DEEPSEEK_LLM_LETTERS: &str = "A-Za-z\
    \u{B5}\u{C0}-\u{D6}\u{D8}-\u{F6}\u{F8}-\u{1BA}\u{1BC}-\u{1BF}\u{1C4}-\u{293}\u{295}-\u{2AF}\
    \u{370}-\u{373}\u{376}\u{377}\u{37B}-\u{37D}\u{37F}\u{386}\u{388}-\u{38A}\u{38C}\u{38E}-\u{3A1}\
    \u{3A3}-\u{3F5}\u{3F7}-\u{481}\u{48A}-\u{52F}\u{531}-\u{556}\u{10A0}-\u{10C5}\u{13A0}-\u{13F5}\
    \u{13F8}-\u{13FD}\u{1C90}-\u{1CBA}\u{1CBD}-\u{1CBF}\u{1D00}-\u{1D2B}\u{1D6B}-\u{1D77}\
    \u{1D79}-\u{1D9A}\u{1E00}-\u{1F15}\u{1F18}-\u{1F1D}\u{1F20}-\u{1F45}\u{1F48}-\u{1F4D}\
    \u{1F50}-\u{1F57}\u{1F59}\u{1F5B}\u{1F5D}\u{1F5F}-\u{1F7D}\u{1F80}-\u{1FB4}\u{1FB6}-\u{1FBC}\u{1FBE}\
    \u{1FC2}-\u{1FC4}\u{1FC6}-\u{1FCC}\u{1FD0}-\u{1FD3}\u{1FD6}-\u{1FDB}\u{1FE0}-\u{1FEC}\
    \u{1FF2}-\u{1FF4}\u{1FF6}-\u{1FFC}\u{2102}\u{2107}\u{210A}-\u{2113}\u{2115}\u{2119}-\u{211D}\u{2124}\
    \u{2126}\u{2128}\u{212A}-\u{212D}\u{212F}-\u{2134}\u{2139}\u{213C}-\u{213F}\u{2145}-\u{2149}\u{214E}\
    \u{2183}\u{2184}\u{2C00}-\u{2C7B}\u{2C7E}-\u{2CE4}\u{2CEB}-\u{2CEE}\u{2CF2}\u{2CF3}\u{A640}-\u{A66D}\
    \u{A680}-\u{A69B}\u{A722}-\u{A76F}\u{A771}-\u{A787}\u{A78B}-\u{A78E}\u{AB70}-\u{ABBF}\
    \u{FB00}-\u{FB06}\u{FB13}-\u{FB17}\u{FF21}-\u{FF3A}\u{FF41}-\u{FF5A}\u{10400}-\u{1044F}\
    \u{104B0}-\u{104D3}\u{104D8}-\u{104FB}\u{10C80}-\u{10CB2}\u{10CC0}-\u{10CF2}\u{118A0}-\u{118DF}\
    \u{1E900}-\u{1E943}";
/// ASCII punctuation (and what lies between it), its full-width forms, quotes and CJK stops.
const DEEPSEEK_LLM_PUNCTUATION: &str =
    "!-/:-~\u{FF01}-\u{FF0F}\u{FF1A}-\u{FF5E}\u{2018}-\u{201F}\u{3000}-\u{3002}";
const DEEPSEEK_LLM_CJK: &str = "\u{4E00}-\u{9FA5}\u{800}-\u{4E00}\u{AC00}-\u{D7FF}";

/// Kimi-K2, Moonlight. Letters apart from Han, in words that begin with capitals or have none, and what English hangs
/// on them.
const KIMI_UPPER: &str = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]";
const KIMI_LOWER: &str = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]";
const KIMI_SUFFIX: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?";

/// GLM-4.
const GLM4: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
);

impl Rules {
    fn of(pre: &str) -> Result<Self, String> {
        let patterns = |patterns: &[&str]| patterns.iter().map(|p| (*p).to_string()).collect();
        match pre {
            "deepseek-v3" => Ok(Self { patterns: patterns(&DEEPSEEK_V3), ..Self::default() }),
            "deepseek-llm" => Ok(Self {
                patterns: vec![
                    r"[\r\n]".into(),
                    format!(r"\s?[{DEEPSEEK_LLM_LETTERS}]+"),
                    format!(r"\s?[{DEEPSEEK_LLM_PUNCTUATION}]+"),
                    r"\s+$".into(),
                    format!("[{DEEPSEEK_LLM_CJK}]+"),
                ],
                digits: true,
                whole_words: false,
            }),
            "deepseek-coder" => Ok(Self {
                patterns: vec![
                    r"[\r\n]".into(),
                    r"\s?\p{L}+".into(),
                    r"\s?\p{P}+".into(),
                    format!("[{DEEPSEEK_LLM_CJK}]+"),
                ],
                digits: true,
                whole_words: false,
            }),
            "kimi-k2" => Ok(Self { patterns: vec![kimi()], ..Self::default() }),
            "glm4" => Ok(Self { patterns: patterns(&[GLM4]), whole_words: true, ..Self::default() }),
            "" => {
                Err("pre: missing, so how text is cut into words is unknown: convert the model anew".into())
            }
            other => Err(format!(
                "pre: found {other:?}, supported are deepseek-v3, deepseek-llm, deepseek-coder, kimi-k2 and glm4"
            )),
        }
    }

    fn pre_tokenizer(&self) -> Result<Sequence, String> {
        let mut steps = Vec::new();
        for pattern in &self.patterns {
            let pattern = SplitPattern::Regex(pattern.clone());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false);
            steps.push(split.map_err(|e| format!("pre: {e}"))?.into());
        }
        if self.digits {
            steps.push(Digits::new(true).into());
        }
        steps.push(ByteLevel::new(false, true, false).into());
        Ok(Sequence::new(steps))
    }
}

fn kimi() -> String {
    let word = |upper: &str, lower: &str| {
        format!(r"[^\r\n\p{{L}}\p{{N}}]?{KIMI_UPPER}{upper}{KIMI_LOWER}{lower}{KIMI_SUFFIX}")
    };
    [
        r"[\p{Han}]+",
        &word("*", "+"),
        &word("+", "*"),
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
    .join("|")
}
