//! Turns in every format: a stream is the same turn as a whole answer, nothing panics and no text is lost.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::sync::Arc;

use oxseek_text::{CallStyle, ControlTokens, Detokenizer, Tokenizer, Turn, TurnFormat, TurnPart, TurnStart};
use proptest::prelude::*;
use serde_json::json;

/// A template of each style, as far as it is looked at.
const TEMPLATES: [(CallStyle, &str); 4] = [
    (CallStyle::Fenced, "<｜tool▁call▁begin｜>...```json"),
    (CallStyle::Plain, "<｜tool▁call▁begin｜>"),
    (CallStyle::Dsml, "<｜DSML｜invoke"),
    (CallStyle::Kimi, "<|tool_call_begin|>"),
];

/// Bytes as tokens, and every mark that is one token in some model.
fn tokenizer(with_think_tags: bool) -> Arc<Tokenizer> {
    let printable = |b: u32| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let mut next = 255;
    let alphabet = (0..256u32).map(|b| {
        next += u32::from(!printable(b));
        (char::from_u32(if printable(b) { b } else { next }).unwrap().to_string(), b)
    });
    let vocab: serde_json::Map<String, serde_json::Value> = alphabet.map(|(c, b)| (c, b.into())).collect();
    let mut marks = vec![
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>",
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
        "<|tool_call_begin|>",
        "<|tool_call_end|>",
        "<|tool_call_argument_begin|>",
        "｜DSML｜",
    ];
    if with_think_tags {
        marks.extend(["<think>", "</think>"]);
    }
    let added: Vec<_> =
        marks.iter().zip(256..).map(|(m, id)| json!({"id": id, "content": m, "special": false})).collect();
    let file = json!({
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
        "added_tokens": added,
    });
    Arc::new(Tokenizer::from_bytes(file.to_string().as_bytes(), None).unwrap())
}

fn format(style: CallStyle, tokenizer: &Tokenizer) -> Arc<TurnFormat> {
    let template = TEMPLATES.iter().find(|(s, _)| *s == style).unwrap().1;
    let format = TurnFormat::detect(Some(template), tokenizer);
    assert_eq!(format.calls(), Some(style));
    Arc::new(format)
}

/// What a turn came to.
#[derive(Debug, Default, PartialEq, Clone)]
struct Seen {
    reasoning: String,
    content: String,
    /// Names, arguments, whether they ended.
    calls: Vec<(String, String, bool)>,
    ids: Vec<String>,
    /// All text in the order in which it came.
    order: String,
}

impl Seen {
    fn take(&mut self, parts: Vec<TurnPart>) {
        for part in parts {
            match part {
                TurnPart::Reasoning(text) => {
                    self.reasoning += &text;
                    self.order += &text;
                }
                TurnPart::Content(text) => {
                    self.content += &text;
                    self.order += &text;
                }
                TurnPart::CallBegin { index, id, name } => {
                    assert_eq!(index, self.calls.len());
                    assert!(self.calls.last().is_none_or(|c| c.2), "the last call has not ended");
                    self.order += &name;
                    self.calls.push((name, String::new(), false));
                    self.ids.push(id);
                }
                TurnPart::Arguments { index, text } => {
                    assert_eq!(index + 1, self.calls.len());
                    assert!(!text.is_empty() && !self.calls[index].2);
                    self.order += &text;
                    self.calls[index].1 += &text;
                }
                TurnPart::CallEnd { index, .. } => self.calls[index].2 = true,
            }
        }
    }
}

fn start(thinking: bool) -> TurnStart {
    TurnStart { thinking, calls: true, ids: 7 }
}

/// Tokens as the engine hands them on.
fn run(tokenizer: &Arc<Tokenizer>, format: &Arc<TurnFormat>, start: TurnStart, ids: &[u32]) -> Seen {
    let mut turn = Turn::new(Arc::clone(format), start);
    let mut detokenizer = Detokenizer::new(Arc::clone(tokenizer), true);
    let mut seen = Seen::default();
    let mut step = |turn: &mut Turn, work: &mut dyn FnMut(&mut Turn, &mut Vec<TurnPart>)| {
        let mut parts = Vec::new();
        work(turn, &mut parts);
        seen.take(parts);
    };
    for &id in ids {
        let text = detokenizer.push(id);
        step(&mut turn, &mut |turn, parts| turn.push(id, &text, parts));
    }
    let rest = detokenizer.finish();
    step(&mut turn, &mut |turn, parts| turn.push_text(&rest, parts));
    step(&mut turn, &mut |turn, parts| turn.finish(parts));
    seen
}

/// Text in pieces: marks are found in it as tokens are, ordinary text comes in pieces of any length.
fn run_pieces(
    tokenizer: &Arc<Tokenizer>,
    format: &Arc<TurnFormat>,
    s: TurnStart,
    text: &str,
    cuts: &[usize],
) -> Seen {
    let ids = tokenizer.encode(text, ControlTokens::Parse).unwrap();
    let mut turn = Turn::new(Arc::clone(format), s);
    let mut parts = Vec::new();
    let mut cut = cuts.iter().cycle();
    let mut held: Vec<u32> = Vec::new();
    let mut wanted = *cut.next().unwrap();
    for id in ids {
        let is_mark = id >= 256;
        if !is_mark {
            held.push(id);
        }
        let whole = std::str::from_utf8(&held.iter().map(|&b| b as u8).collect::<Vec<_>>()).is_ok();
        if !held.is_empty() && (is_mark || held.len() >= wanted && whole) {
            turn.push(held[0], &tokenizer.decode(&held), &mut parts);
            held.clear();
            wanted = *cut.next().unwrap();
        }
        if is_mark {
            turn.push(id, &tokenizer.decode(&[id]), &mut parts);
        }
    }
    turn.push_text(&tokenizer.decode(&held), &mut parts);
    turn.finish(&mut parts);
    let mut seen = Seen::default();
    seen.take(parts);
    seen
}

/// A turn that is well-formed, as its model would write it.
fn written(style: CallStyle, content: &str, calls: &[(String, String)]) -> String {
    let mut text = content.to_string();
    if calls.is_empty() {
        return text;
    }
    text += match style {
        CallStyle::Fenced | CallStyle::Plain => "<｜tool▁calls▁begin｜>",
        CallStyle::Kimi => "<|tool_calls_section_begin|>",
        CallStyle::Dsml => "\n\n<｜DSML｜function_calls>\n",
    };
    for (i, (name, value)) in calls.iter().enumerate() {
        let json = json!({"k": value}).to_string();
        text += &match style {
            CallStyle::Fenced => {
                let line = if i > 0 { "\n" } else { "" };
                format!(
                    "{line}<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{json}\n```<｜tool▁call▁end｜>"
                )
            }
            CallStyle::Plain => format!("<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{json}<｜tool▁call▁end｜>"),
            CallStyle::Kimi => format!(
                "<|tool_call_begin|>functions.{name}:{i}<|tool_call_argument_begin|>{json}<|tool_call_end|>"
            ),
            CallStyle::Dsml => format!(
                "<｜DSML｜invoke name=\"{name}\">\n<｜DSML｜parameter name=\"k\" string=\"true\">{value}\
                 </｜DSML｜parameter>\n</｜DSML｜invoke>\n"
            ),
        };
    }
    text += match style {
        CallStyle::Fenced | CallStyle::Plain => "<｜tool▁calls▁end｜>",
        CallStyle::Kimi => "<|tool_calls_section_end|>",
        CallStyle::Dsml => "</｜DSML｜function_calls>",
    };
    text
}

#[test]
fn each_style_is_read() {
    let tokenizer = tokenizer(true);
    for (style, _) in TEMPLATES {
        let format = format(style, &tokenizer);
        let calls = [("get_weather".to_string(), "Oslo \"x\"\n".to_string()), ("now".into(), "é".into())];
        let text = format!("I look.</think>{}", written(style, "Moment.", &calls));
        let ids = tokenizer.encode(&text, ControlTokens::Parse).unwrap();
        let seen = run(&tokenizer, &format, start(true), &ids);
        assert_eq!((seen.reasoning.as_str(), seen.content.as_str()), ("I look.", "Moment."), "{style:?}");
        let found: Vec<(&str, serde_json::Value)> =
            seen.calls.iter().map(|c| (c.0.as_str(), serde_json::from_str(&c.1).unwrap())).collect();
        assert_eq!(
            found,
            [("get_weather", json!({"k": "Oslo \"x\"\n"})), ("now", json!({"k": "é"}))],
            "{style:?}"
        );
        if style == CallStyle::Kimi {
            assert_eq!(seen.ids, ["functions.get_weather:0", "functions.now:1"]);
        } else {
            assert!(seen.ids[0].starts_with("call_") && seen.ids[0] != seen.ids[1], "{:?}", seen.ids);
        }
    }
}

#[test]
fn what_is_no_call_comes_back_as_content() {
    let tokenizer = tokenizer(true);
    let cases = [
        (
            CallStyle::Plain,
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>no separator<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            "<｜tool▁call▁begin｜>no separator<｜tool▁call▁end｜>",
        ),
        (CallStyle::Plain, "<｜tool▁calls▁begin｜>what? <｜tool▁calls▁end｜>", "what? "),
        (CallStyle::Plain, "a<｜tool▁sep｜>b", "a<｜tool▁sep｜>b"),
        (CallStyle::Plain, "<｜tool▁call▁begin｜>cut", "<｜tool▁call▁begin｜>cut"),
        (
            CallStyle::Fenced,
            "<｜tool▁call▁begin｜>code<｜tool▁sep｜>f\n```json\n{}\n```<｜tool▁call▁end｜>",
            "<｜tool▁call▁begin｜>code<｜tool▁sep｜>f\n```json\n{}\n```<｜tool▁call▁end｜>",
        ),
        (
            CallStyle::Kimi,
            "<|tool_call_begin|>f<|tool_call_argument_begin|>{}<|tool_call_end|>",
            "<|tool_call_begin|>f<|tool_call_argument_begin|>{}<|tool_call_end|>",
        ),
    ];
    for (style, text, content) in cases {
        let ids = tokenizer.encode(text, ControlTokens::Parse).unwrap();
        let seen = run(&tokenizer, &format(style, &tokenizer), start(false), &ids);
        assert_eq!((seen.content.as_str(), seen.calls.len()), (content, 0), "{text}");
    }
}

#[test]
fn a_call_that_is_cut_keeps_what_it_has() {
    let tokenizer = tokenizer(true);
    let ids = |text: &str| tokenizer.encode(text, ControlTokens::Parse).unwrap();
    let plain = format(CallStyle::Plain, &tokenizer);
    let seen = run(&tokenizer, &plain, start(false), &ids("<｜tool▁call▁begin｜>f<｜tool▁sep｜>{\"a\": 1"));
    assert_eq!(seen.calls, [("f".into(), "{\"a\": 1".into(), true)]);
    let undeclared = TurnStart { calls: false, ..start(false) };
    let seen = run(&tokenizer, &plain, undeclared, &ids("<｜tool▁call▁begin｜>f<｜tool▁sep｜>{}"));
    assert_eq!(seen.content, "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{}");
}

#[test]
fn thinking_is_told_apart_by_token_or_by_text() {
    let cases = [
        (true, "a plan</think>an answer", "a plan", "an answer"),
        (true, "cut whi", "cut whi", ""),
        (true, "a < b </thin", "a < b </thin", ""),
        (false, "an answer", "", "an answer"),
        (false, " <think>plan</think>\nanswer", "plan", "\nanswer"),
        (false, "write <think> and </think>", "", "write <think> and </think>"),
        (false, "  <thin", "", "  <thin"),
    ];
    for with_tags in [true, false] {
        let tokenizer = tokenizer(with_tags);
        let format = Arc::new(TurnFormat::detect(None, &tokenizer));
        for (thinking, text, reasoning, content) in cases {
            let ids = tokenizer.encode(text, ControlTokens::Parse).unwrap();
            let seen = run(&tokenizer, &format, start(thinking), &ids);
            assert_eq!((seen.reasoning.as_str(), seen.content.as_str()), (reasoning, content), "{text}");
        }
    }
}

/// Pieces that make calls, broken calls, and anything between.
fn soup() -> impl Strategy<Value = String> {
    let piece = prop::sample::select(vec![
        "<think>",
        "</think>",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>",
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
        "<|tool_call_begin|>",
        "<|tool_call_end|>",
        "<|tool_call_argument_begin|>",
        "\n\n<｜DSML｜function_calls>\n",
        "<｜DSML｜invoke name=\"",
        "\">",
        "<｜DSML｜parameter name=\"",
        "\" string=\"true\">",
        "</｜DSML｜parameter>",
        "</｜DSML｜invoke>",
        "</｜DSML｜function_calls>",
        "function",
        "f",
        "functions.f:0",
        "\n```json\n",
        "\n```",
        "{\"a\": 1}",
        " ",
        "\n",
        "é🙂",
        "<",
        "x < y",
    ]);
    prop::collection::vec(piece, 0..24).prop_map(|pieces| pieces.concat())
}

/// What the marks and fences are made of is not text, nor is white space between calls.
fn bare(text: &str) -> String {
    let mut text = text.to_string();
    for mark in [
        "<think>",
        "</think>",
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>",
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
        "<|tool_call_begin|>",
        "<|tool_call_end|>",
        "<|tool_call_argument_begin|>",
        "functions.f:0",
        "f",
    ] {
        text = text.replace(mark, "");
    }
    text.retain(|c| !c.is_whitespace());
    text
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_turn_is_the_same_however_it_is_cut(
        text in soup(), cuts in prop::collection::vec(1usize..9, 1..6), thinking: bool, style in 0usize..4, tags: bool,
    ) {
        let tokenizer = tokenizer(tags);
        let format = format(TEMPLATES[style].0, &tokenizer);
        let ids = tokenizer.encode(&text, ControlTokens::Parse).unwrap();
        let whole = run_pieces(&tokenizer, &format, start(thinking), &text, &[usize::MAX]);
        let by_bytes = run(&tokenizer, &format, start(thinking), &ids);
        let by_cuts = run_pieces(&tokenizer, &format, start(thinking), &text, &cuts);
        for other in [by_bytes, by_cuts] {
            prop_assert_eq!((&whole.reasoning, &whole.content), (&other.reasoning, &other.content));
            prop_assert_eq!((&whole.calls, &whole.ids), (&other.calls, &other.ids));
        }
    }

    #[test]
    fn no_text_is_lost(text in soup(), thinking: bool, kimi: bool) {
        let tokenizer = tokenizer(true);
        let style = if kimi { CallStyle::Kimi } else { CallStyle::Plain };
        let ids = tokenizer.encode(&text, ControlTokens::Parse).unwrap();
        let seen = run(&tokenizer, &format(style, &tokenizer), start(thinking), &ids);
        prop_assert_eq!(bare(&seen.order), bare(&text));
    }

    #[test]
    fn tokens_of_any_kind_never_panic(ids in prop::collection::vec(0u32..280, 0..60), style in 0usize..4) {
        let tokenizer = tokenizer(true);
        let seen = run(&tokenizer, &format(TEMPLATES[style].0, &tokenizer), start(false), &ids);
        prop_assert!(seen.calls.iter().all(|c| c.2), "every call ends");
    }

    #[test]
    fn what_a_model_writes_is_what_is_read(
        content in "[a-z .<é\n]{0,12}", style in 0usize..4,
        calls in prop::collection::vec(("[a-z_]{1,8}", "[a-z\"\\\\\n{}é ]{0,12}"), 0..3),
    ) {
        let (style, tokenizer) = (TEMPLATES[style].0, tokenizer(true));
        let text = written(style, &content, &calls);
        let ids = tokenizer.encode(&text, ControlTokens::Parse).unwrap();
        let seen = run(&tokenizer, &format(style, &tokenizer), start(false), &ids);
        prop_assert_eq!(seen.content, content);
        prop_assert_eq!(seen.calls.len(), calls.len());
        for ((name, arguments, _), (called, value)) in seen.calls.iter().zip(&calls) {
            prop_assert_eq!(name, called);
            let arguments: serde_json::Value = serde_json::from_str(arguments).unwrap();
            prop_assert_eq!(arguments, json!({"k": value}));
        }
    }
}
