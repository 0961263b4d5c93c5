//! DeepSeek-V3's own tokenizer against the Python `tokenizers` package.
//!
//! Its files are not in the repository: `scripts/fetch-tokenizer.sh` fetches them and writes the strings to compare.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::{
    path::{Path, PathBuf},
    sync::{Arc, LazyLock},
};

use oxseek_text::{ControlTokens, Detokenizer, Tokenizer, WrittenVocabulary};
use serde::Deserialize;

#[derive(Deserialize)]
struct Vector {
    text: String,
    ids: Vec<u32>,
}

static TOKENIZER: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| {
    let file = |name: &str| fetched(&format!("tokenizer-deepseek_v3/{name}"));
    Arc::new(Tokenizer::from_bytes(&file("tokenizer.json"), Some(&file("tokenizer_config.json"))).unwrap())
});

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn fetched(name: &str) -> Vec<u8> {
    std::fs::read(root().join(".cache").join(name))
        .unwrap_or_else(|e| panic!(".cache/{name}: {e}; run scripts/fetch-tokenizer.sh"))
}

/// What differs between a vector and this crate, if anything.
fn difference(Vector { text, ids }: &Vector) -> Option<String> {
    let got = TOKENIZER.encode(text, ControlTokens::Parse).unwrap();
    if got != *ids || FROM_GGUF.encode(text, ControlTokens::Parse).unwrap() != *ids {
        return Some(format!("encode {text:?}\n got {got:?}\nwant {ids:?}"));
    }
    let decoded = TOKENIZER.decode(ids);
    if decoded != *text {
        return Some(format!("decode {ids:?}\n got {decoded:?}\nwant {text:?}"));
    }
    let mut stream = Detokenizer::new(Arc::clone(&TOKENIZER), false);
    let mut streamed: String = ids.iter().map(|&id| stream.push(id)).collect();
    streamed.push_str(&stream.finish());
    (streamed != *text).then(|| format!("stream {ids:?}\n got {streamed:?}\nwant {text:?}"))
}

/// The same as a GGUF file has it.
static FROM_GGUF: LazyLock<Tokenizer> = LazyLock::new(|| {
    let json = fetched("tokenizer-deepseek_v3/tokenizer.json");
    let config = fetched("tokenizer-deepseek_v3/tokenizer_config.json");
    let written = WrittenVocabulary::new(&json, Some(&config), 129_280).unwrap();
    assert_eq!(written.pre, "deepseek-v3");
    Tokenizer::from_vocabulary(&written.vocabulary(written.pre)).unwrap()
});

fn check(vectors: &[Vector]) {
    let wrong: Vec<String> = vectors.iter().filter_map(difference).collect();
    let shown = wrong.iter().take(10).map(String::as_str).collect::<Vec<_>>().join("\n\n");
    assert!(wrong.is_empty(), "{} of {} differ:\n\n{shown}", wrong.len(), vectors.len());
}

#[test]
fn the_committed_vectors() {
    let vectors: Vec<Vector> =
        serde_json::from_slice(&std::fs::read(root().join("goldens/tokenizer_vectors.json")).unwrap())
            .unwrap();
    assert_eq!(vectors.len(), 20);
    check(&vectors);
}

#[test]
fn ten_thousand_random_strings() {
    let lines = String::from_utf8(fetched("tokenizer-oracle.jsonl")).unwrap();
    let vectors: Vec<Vector> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(vectors.len(), 10_000);
    check(&vectors);
}

#[test]
fn a_gguf_file_has_the_same_tokens() {
    assert_eq!(FROM_GGUF.vocab_len(), TOKENIZER.vocab_len());
    for id in 0..TOKENIZER.vocab_len() as u32 {
        assert_eq!(FROM_GGUF.token_bytes(id), TOKENIZER.token_bytes(id), "token {id}");
        assert_eq!(FROM_GGUF.is_special(id), TOKENIZER.is_special(id), "token {id}");
    }
}

#[test]
fn the_tokens_that_turns_are_made_of() {
    assert_eq!(TOKENIZER.bos_id(), Some(0));
    assert_eq!(TOKENIZER.eos_id(), Some(1));
    assert_eq!(TOKENIZER.token_id("<｜User｜>"), Some(128_803));
    assert_eq!(TOKENIZER.token_id("<｜Assistant｜>"), Some(128_804));
    assert_eq!(TOKENIZER.vocab_len(), 128_815);
    assert!(TOKENIZER.is_special(0) && !TOKENIZER.is_special(128_803));
    // As text, a control token is spelled out.
    let spelled = TOKENIZER.encode("<｜User｜>", ControlTokens::AsText).unwrap();
    assert!(spelled.len() > 1 && !spelled.contains(&128_803), "{spelled:?}");
    assert_eq!(TOKENIZER.decode(&spelled), "<｜User｜>");
}
