//! Tokenizers of GGUF files: the same as those of `tokenizer.json`, and what is refused.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::Path;

use oxseek_text::{ControlTokens, Tokenizer, Vocabulary, WrittenVocabulary};
use proptest::prelude::*;

fn file(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/oxseek-demo").join(name)).unwrap()
}

fn demo() -> WrittenVocabulary {
    WrittenVocabulary::new(&file("tokenizer.json"), Some(&file("tokenizer_config.json")), 4096).unwrap()
}

/// The demo model's tokenizer from its folder and from its GGUF file.
fn both() -> &'static (Tokenizer, Tokenizer) {
    static ONCE: std::sync::OnceLock<(Tokenizer, Tokenizer)> = std::sync::OnceLock::new();
    ONCE.get_or_init(|| {
        let json = Tokenizer::from_bytes(&file("tokenizer.json"), Some(&file("tokenizer_config.json")));
        (json.unwrap(), Tokenizer::from_vocabulary(&demo().vocabulary(demo().pre)).unwrap())
    })
}

#[test]
fn the_rules_are_found_by_what_they_do() {
    assert_eq!(demo().pre, "deepseek-v3");
    let mut json: serde_json::Value = serde_json::from_slice(&file("tokenizer.json")).unwrap();
    json["pre_tokenizer"] = serde_json::json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true,
    });
    let other = json.to_string();
    let Err(e) = WrittenVocabulary::new(other.as_bytes(), None, 4096) else { panic!("accepted") };
    assert!(e.to_string().contains("none of the ways that GGUF files name: deepseek-v3"), "{e}");
    let Err(e) = WrittenVocabulary::new(&file("tokenizer.json"), None, 300) else { panic!("accepted") };
    assert!(e.to_string().contains("the model has 300 tokens"), "{e}");
}

#[test]
fn the_tokens_are_those_of_tokenizer_json() {
    let (json, gguf) = both();
    assert_eq!(gguf.vocab_len(), json.vocab_len());
    assert_eq!((gguf.bos_id(), gguf.eos_id()), (json.bos_id(), json.eos_id()));
    for id in 0..json.vocab_len() as u32 {
        assert_eq!(gguf.token_bytes(id), json.token_bytes(id), "token {id}");
        assert_eq!(gguf.is_special(id), json.is_special(id), "token {id}");
    }
    let added = |t: &Tokenizer| {
        let mut all: Vec<_> = t.added_tokens().map(|a| (a.to_string(), t.token_id(a))).collect();
        all.sort();
        all
    };
    assert_eq!(added(gguf), added(json));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn any_text_has_the_same_tokens(
        text in "\\PC{0,40}|[a-zA-Zé好🙂 \r\n\t0-9.,'!\u{3000}\u{301}]{0,60}|(<｜User｜>|</think>|<\\|EOT\\||[a-z ]){0,20}"
    ) {
        let (json, gguf) = both();
        for control in [ControlTokens::Parse, ControlTokens::AsText] {
            prop_assert_eq!(gguf.encode(&text, control).unwrap(), json.encode(&text, control).unwrap());
        }
    }
}

/// The pieces that `text` is cut into: of a vocabulary of bytes and of these words, the ids of the words.
fn words(pre: &str, text: &str, words: &[&str]) -> Vec<String> {
    let alphabet: Vec<String> = byte_alphabet().map(String::from).collect();
    let mut tokens: Vec<String> = alphabet.clone();
    let mut merges = Vec::new();
    for word in words {
        let spelled: Vec<String> =
            word.bytes().map(|b| byte_alphabet().nth(b.into()).unwrap().to_string()).collect();
        let mut whole = spelled[0].clone();
        for next in &spelled[1..] {
            merges.push(format!("{whole} {next}"));
            whole.push_str(next);
            if !tokens.contains(&whole) {
                tokens.push(whole.clone());
            }
        }
    }
    merges.dedup();
    let vocabulary = Vocabulary {
        model: "gpt2",
        pre,
        tokens: tokens.iter().map(String::as_str).collect(),
        merges: merges.iter().map(String::as_str).collect(),
        ..Vocabulary::default()
    };
    let tokenizer = Tokenizer::from_vocabulary(&vocabulary).unwrap();
    let ids = tokenizer.encode(text, ControlTokens::AsText).unwrap();
    assert_eq!(tokenizer.decode(&ids), text);
    ids.iter().map(|&id| String::from_utf8_lossy(tokenizer.token_bytes(id)).into_owned()).collect()
}

/// GPT-2's characters of the bytes 0 to 255.
fn byte_alphabet() -> impl Iterator<Item = char> {
    let printable = |b: u8| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let hidden = move |b: u8| (0..b).filter(|&b| !printable(b)).count() as u32;
    (0..=255u8).map(move |b| if printable(b) { b.into() } else { char::from_u32(0x100 + hidden(b)).unwrap() })
}

#[test]
fn words_end_where_the_rules_say() {
    let cut = |pre: &str, text: &str, merged: &[&str]| words(pre, text, merged).join("|");
    // Three digits at a time, and none across words.
    assert_eq!(cut("deepseek-v3", "12345", &["123", "12345", "45"]), "123|45");
    assert_eq!(cut("deepseek-v3", "don't", &["don", "'t", "don't"]), "don|'t");
    // DeepSeek-V2: single digits, a space goes with the letters, line breaks stand alone.
    assert_eq!(cut("deepseek-llm", "a 12\n\nb", &["12", " 12", "\n\n", "a"]), "a| |1|2|\n|\n|b");
    assert_eq!(cut("deepseek-llm", "an ox.", &["an", " ox", " ox.", "an ox"]), "an| ox|.");
    assert_eq!(cut("deepseek-llm", "a,b  ", &["a,b", "  ", "a,"]), "a|,|b|  ");
    assert_eq!(cut("deepseek-coder", "x1y", &["x1y", "x1"]), "x|1|y");
    // Kimi: Han apart from other letters, capitals begin a word, 's stays with its word.
    assert_eq!(cut("kimi-k2", "ab中文", &["ab中文", "中文", "ab"]), "ab|中文");
    assert_eq!(cut("kimi-k2", "AbcDef", &["Abc", "Def", "AbcDef"]), "Abc|Def");
    assert_eq!(cut("kimi-k2", "it's 1234", &["it's", "1234", "123"]), "it's| |123|4");
    // GLM: 's stands alone, a word that is a token is taken whole.
    assert_eq!(cut("glm4", "it's", &["it", "'s", "it's"]), "it|'s");
}

#[test]
fn broken_vocabularies_are_refused() {
    let base = || Vocabulary {
        model: "gpt2",
        pre: "deepseek-v3",
        tokens: vec!["a", "b", "ab"],
        types: vec![1, 1, 1],
        merges: vec!["a b"],
        ..Vocabulary::default()
    };
    assert!(Tokenizer::from_vocabulary(&base()).is_ok());
    for (vocabulary, want) in [
        (Vocabulary { model: "llama", ..base() }, "model: found \"llama\", supported is gpt2"),
        (Vocabulary { model: "", ..base() }, "model: found \"\""),
        (Vocabulary { pre: "llama-bpe", ..base() }, "pre: found \"llama-bpe\", supported are deepseek-v3"),
        (Vocabulary { pre: "", ..base() }, "pre: missing"),
        (Vocabulary { types: vec![1], ..base() }, "token_type: 1 for 3 tokens"),
        (Vocabulary { types: vec![1, 1, 6], ..base() }, "token 2 has the unsupported type 6"),
        (Vocabulary { types: vec![1, 1, -1], ..base() }, "unsupported type -1"),
        (Vocabulary { tokens: vec!["a", "b", "a"], ..base() }, "tokens: 0 and 2 are both \"a\""),
        (Vocabulary { merges: vec!["ab"], ..base() }, "merges: 0 is \"ab\", expected two tokens"),
        (Vocabulary { merges: vec!["a "], ..base() }, "merges: 0 is \"a \""),
        (Vocabulary { merges: vec!["a c"], ..base() }, "merges: "),
        (Vocabulary { merges: vec!["b a"], ..base() }, "merges: "),
    ] {
        let Err(e) = Tokenizer::from_vocabulary(&vocabulary) else { panic!("accepted: {want}") };
        let message = e.to_string();
        assert!(message.starts_with("tokenizer.ggml: ") && message.contains(want), "{message} lacks {want}");
    }
}

#[test]
fn an_empty_vocabulary_is_harmless() {
    let empty = Vocabulary { model: "gpt2", pre: "kimi-k2", ..Vocabulary::default() };
    let t = Tokenizer::from_vocabulary(&empty).unwrap();
    assert_eq!(t.encode("abc", ControlTokens::Parse).unwrap(), [0; 0]);
}
