//! Random walks through grammars: whatever a model would choose, what comes out is valid. And grammars that mean harm.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::sync::Arc;

use oxseek_constrain::{AnswerRule, CallRules, Compiled, Error, Grammars};
use oxseek_text::{CallStyle, Tokenizer, Turn, TurnFormat, TurnPart, TurnStart};
use serde_json::{Value, json};

const END: u32 = 256;

/// Bytes as tokens, an end, and the marks of every style.
fn tokenizer() -> Arc<Tokenizer> {
    let printable = |b: u32| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let mut next = 255;
    let alphabet = (0..256u32).map(|b| {
        next += u32::from(!printable(b));
        (char::from_u32(if printable(b) { b } else { next }).unwrap().to_string(), b)
    });
    let vocab: serde_json::Map<String, Value> = alphabet.map(|(c, b)| (c, b.into())).collect();
    let marks = [
        "<end>",
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
        "｜DSML｜",
    ];
    let added: Vec<_> = marks
        .iter()
        .zip(END..)
        .map(|(m, id)| json!({"id": id, "content": m, "special": *m == "<end>"}))
        .collect();
    let level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    let file = json!({
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
        "pre_tokenizer": level, "decoder": level, "added_tokens": added,
    });
    Arc::new(Tokenizer::from_bytes(file.to_string().as_bytes(), None).unwrap())
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n
    }
}

/// Tokens of an answer: a random one of those allowed each time, printable ones before others.
fn walk(compiled: &Compiled, tokenizer: &Tokenizer, seed: u64) -> Vec<u32> {
    let mut random = Random(seed);
    let mut follower = compiled.follow();
    let mut ids = Vec::new();
    for _ in 0..4000 {
        let mut words = vec![0u32; tokenizer.vocab_len().div_ceil(32)];
        if !follower.mask(&mut words).unwrap() {
            return ids;
        }
        let allowed: Vec<u32> = (0..tokenizer.vocab_len() as u32)
            .filter(|id| words[*id as usize / 32] >> (id % 32) & 1 == 1)
            .collect();
        assert!(!allowed.is_empty(), "nothing may follow {:?}", tokenizer.decode(&ids));
        // Strings of random bytes are long: close what can be closed every few tokens.
        let closers: Vec<u32> =
            allowed.iter().copied().filter(|&id| id >= END || b"\"}]</".contains(&(id as u8))).collect();
        let from = if !closers.is_empty() && random.below(4) == 0 { &closers } else { &allowed };
        let id = from[random.below(from.len())];
        if id == END {
            return ids;
        }
        follower.commit(id).unwrap();
        ids.push(id);
    }
    panic!("no end: {:?}", tokenizer.decode(&ids));
}

fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "count": {"type": "integer", "minimum": 0, "maximum": 9},
            "kind": {"enum": ["a", "b"]},
            "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        },
        "required": ["name", "count"],
        "additionalProperties": false,
    })
}

/// The same rules, by hand.
fn check(value: &Value) {
    let map = value.as_object().unwrap();
    assert!(map["name"].is_string() && (0..=9).contains(&map["count"].as_i64().unwrap()), "{value}");
    for (key, field) in map {
        match key.as_str() {
            "name" | "count" => {}
            "kind" => assert!(["a", "b"].contains(&field.as_str().unwrap()), "{value}"),
            "tags" => {
                let tags = field.as_array().unwrap();
                assert!(tags.len() <= 3 && tags.iter().all(Value::is_boolean), "{value}");
            }
            other => panic!("{other} in {value}"),
        }
    }
}

#[test]
fn answers_keep_to_their_rules() {
    let tokenizer = tokenizer();
    let grammars = Grammars::new(&tokenizer, END).unwrap();
    let compile = |rule| grammars.compile(Some(&rule), None).unwrap();
    let schema = compile(AnswerRule::JsonSchema(schema()));
    let object = compile(AnswerRule::JsonObject);
    let regex = compile(AnswerRule::Regex("[a-c]{2,4}(x|y)".into()));
    let choice = compile(AnswerRule::Choice(vec!["yes \"sir\"".into(), "no\n".into()]));
    let lark = compile(AnswerRule::Grammar("start: \"a\" word+\nword: /[0-9]/ | \"z\"".into()));
    let gbnf = compile(AnswerRule::Grammar("root ::= \"a\" w-x+ \".\"\nw-x ::= [0-9] | \"z\"\n".into()));
    for seed in 0..25 {
        let text = |compiled| tokenizer.decode(&walk(compiled, &tokenizer, seed));
        check(&serde_json::from_str(&text(&schema)).unwrap());
        match serde_json::from_str::<Value>(&text(&object)) {
            Ok(value) => assert!(value.is_object(), "{value}"),
            // 1e999 is JSON, but no F64.
            Err(e) => assert!(e.to_string().contains("out of range"), "{e}"),
        }
        let found = text(&regex);
        assert!((3..=5).contains(&found.len()) && found.ends_with(['x', 'y']), "{found}");
        assert!(["yes \"sir\"", "no\n"].contains(&text(&choice).as_str()));
        for grammar in [&lark, &gbnf] {
            let found = text(grammar);
            assert!(found.len() > 1 && found.starts_with('a'), "{found}");
            assert!(found[1..].chars().all(|c| c.is_ascii_digit() || c == 'z' || c == '.'), "{found}");
        }
    }
}

const STYLES: [(CallStyle, &str); 4] = [
    (CallStyle::Fenced, "<｜tool▁call▁begin｜>...```json"),
    (CallStyle::Plain, "<｜tool▁call▁begin｜>"),
    (CallStyle::Dsml, "<｜DSML｜invoke"),
    (CallStyle::Kimi, "<|tool_call_begin|>"),
];

/// Names and arguments of a turn's calls.
fn calls(tokenizer: &Tokenizer, template: &str, ids: &[u32]) -> Vec<(String, Value)> {
    let format = Arc::new(TurnFormat::detect(Some(template), tokenizer));
    let mut turn = Turn::new(format, TurnStart { calls: true, ..TurnStart::default() });
    let (mut parts, mut bytes) = (Vec::new(), Vec::new());
    // Bytes are tokens here: whole texts between the marks.
    for &id in ids {
        if id < END {
            bytes.push(id);
            continue;
        }
        turn.push_text(&tokenizer.decode(&bytes), &mut parts);
        bytes.clear();
        turn.push(id, &tokenizer.decode(&[id]), &mut parts);
    }
    turn.push_text(&tokenizer.decode(&bytes), &mut parts);
    turn.finish(&mut parts);
    let mut calls: Vec<(String, String)> = Vec::new();
    for part in parts {
        match part {
            TurnPart::CallBegin { name, .. } => calls.push((name, String::new())),
            TurnPart::Arguments { text, .. } => calls.last_mut().unwrap().1 += &text,
            TurnPart::CallEnd { whole, .. } => assert!(whole),
            TurnPart::Content(text) => assert!(text.trim().is_empty(), "{text:?}"),
            TurnPart::Reasoning(_) => panic!("no thinking"),
        }
    }
    calls.into_iter().map(|(name, json)| (name, serde_json::from_str(&json).unwrap())).collect()
}

#[test]
fn calls_in_every_style_are_read_as_they_were_meant() {
    let tokenizer = tokenizer();
    let grammars = Grammars::new(&tokenizer, END).unwrap();
    for (style, template) in STYLES {
        let tools = vec![
            ("store".to_string(), schema()),
            ("now-1".to_string(), json!({"type": "object", "properties": {}, "additionalProperties": false})),
        ];
        for many in [true, false] {
            let rules = CallRules { style, tools: tools.clone(), many, earlier: 2 };
            let compiled = grammars.compile(None, Some(&rules)).unwrap();
            for seed in 0..8 {
                let ids = walk(&compiled, &tokenizer, seed);
                let found = calls(&tokenizer, template, &ids);
                assert!(!found.is_empty() && (many || found.len() == 1), "{style:?}: {found:?}");
                for (name, arguments) in &found {
                    match name.as_str() {
                        "store" => check(arguments),
                        "now-1" => assert_eq!(*arguments, json!({})),
                        other => panic!("{other}"),
                    }
                }
            }
            let bare = CallRules { tools: tools[1..].to_vec(), ..rules.clone() };
            let ids = walk(&grammars.compile(None, Some(&bare)).unwrap(), &tokenizer, 3);
            assert_eq!(calls(&tokenizer, template, &ids)[0], ("now-1".into(), json!({})));
            // Behind the token that begins calls the same follows.
            let rest = grammars.compile_rest(&rules).unwrap();
            assert!(!walk(&rest, &tokenizer, 1).is_empty());
        }
    }
}

#[test]
fn an_answer_or_calls() {
    let tokenizer = tokenizer();
    let grammars = Grammars::new(&tokenizer, END).unwrap();
    let rules = CallRules {
        style: CallStyle::Plain,
        tools: vec![("store".into(), schema())],
        many: false,
        earlier: 0,
    };
    let compiled = grammars.compile(Some(&AnswerRule::JsonSchema(schema())), Some(&rules)).unwrap();
    let mut seen = [false, false];
    for seed in 0..30 {
        let ids = walk(&compiled, &tokenizer, seed);
        let called = ids.iter().any(|id| *id >= END);
        seen[usize::from(called)] = true;
        if called {
            check(&calls(&tokenizer, STYLES[1].1, &ids)[0].1);
        } else {
            check(&serde_json::from_str(&tokenizer.decode(&ids)).unwrap());
        }
    }
    assert_eq!(seen, [true, true]);
}

fn nested(open: &str, close: &str, inner: &str, n: usize) -> String {
    open.repeat(n) + inner + &close.repeat(n)
}

fn nested_schema(n: usize) -> Value {
    (0..n).fold(json!({"type": "string"}), |inner, _| json!({"type": "array", "items": inner}))
}

fn pattern(text: &str) -> AnswerRule {
    AnswerRule::JsonSchema(json!({"type": "string", "pattern": text}))
}

fn wide(n: usize) -> Value {
    let properties: serde_json::Map<String, Value> =
        (0..n).map(|i| (format!("field_{i}"), json!({"type": "string", "minLength": i % 50}))).collect();
    json!({"type": "object", "properties": properties})
}

/// The names of those that must be refused begin with `!`; the others may be refused or followed.
#[allow(clippy::too_many_lines, reason = "a table")]
pub fn hostile() -> Vec<(&'static str, AnswerRule)> {
    let schema = AnswerRule::JsonSchema;
    let regex = |text: &str| AnswerRule::Regex(text.into());
    let grammar = |text: &str| AnswerRule::Grammar(text.into());
    vec![
        ("!60,000 groups", regex(&nested("(", ")", "a", 60_000))),
        ("!5,000 groups", regex(&nested("(", ")", "a", 5_000))),
        ("!60,000 groups in a grammar", grammar(&format!("start: {}", nested("(", ")", "\"a\"", 30_000)))),
        ("!60,000 groups in GBNF", grammar(&format!("root ::= {}", nested("(", ")", "\"a\"", 30_000)))),
        ("!3,000 arrays", schema(nested_schema(100))),
        ("!a pattern of 5,000 groups", pattern(&nested("(", ")", "a", 5_000))),
        ("!an open group", regex("(((")),
        ("!an open class", regex("[a-")),
        ("!a star of nothing", regex("**")),
        ("two stars", regex("foo**")),
        ("nested stars", regex("((a*)*)*b")),
        ("nested plusses", regex("(a+)+(b+)+(c+)+$")),
        ("a hundred thousand", regex("a{1,100000}")),
        ("powers of repeats", regex("((((a{1,100}){1,100}){1,100}){1,100}){1,100}")),
        ("many alternatives", regex(&(0..3000).map(|i| i.to_string()).collect::<Vec<_>>().join("|"))),
        ("classes of Unicode", regex("[\\p{L}\\p{N}]{1,2000}[^\\p{L}]{1,2000}")),
        ("!back references", regex("(a)\\1")),
        ("!looking behind", regex("(?<=a)b")),
        ("intersecting dots", pattern("^(.*a.{20}.*b.{20}.*)+$")),
        ("a pattern that repeats", pattern("^(a|aa|aaa){1,5000}$")),
        ("a long string", schema(json!({"type": "string", "minLength": 1_000_000, "maxLength": 2_000_000}))),
        ("a long array", schema(json!({"type": "array", "minItems": 100_000, "items": {"type": "integer"}}))),
        ("!a reference to nothing", schema(json!({"$ref": "#/$defs/none"}))),
        ("!a reference to the outside", schema(json!({"$ref": "http://10.0.0.1/schema.json"}))),
        ("a reference to itself", schema(json!({"$ref": "#"}))),
        (
            "a ring of references",
            schema(json!({
            "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"})),
        ),
        (
            "a tree that never ends",
            schema(json!({
            "$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"]}},
            "$ref": "#/$defs/n"})),
        ),
        (
            "an enum of ten thousand",
            schema(json!({"enum": (0..9_000).map(|i| i.to_string()).collect::<Vec<_>>()})),
        ),
        ("a thousand fields", schema(wide(1_000))),
        ("!a schema over the limit", schema(json!({"const": "x".repeat(200_000)}))),
        ("ambiguous choices", schema(json!({"anyOf": vec![json!({"type": "object"}); 500]}))),
        ("all of many", schema(json!({"allOf": vec![json!({"type": "string", "pattern": "a.*b"}); 60]}))),
        (
            "one of overlapping",
            schema(json!({"oneOf": [{"type": "string"}, {"type": "string", "minLength": 2}]})),
        ),
        ("!nothing at all", schema(json!(false))),
        ("!an impossible number", schema(json!({"type": "integer", "minimum": 5, "maximum": 1}))),
        ("!an unknown type", schema(json!({"type": "flower"}))),
        ("!a number for a schema", schema(json!(7))),
        ("!options of the engine's", schema(json!({"type": "object", "x-guidance": {"lenient": true}}))),
        ("!left recursion without end", grammar("start: start")),
        ("!a rule that is not there", grammar("start: other")),
        ("!tokens by number", grammar("start: <[0-4000]>")),
        ("an ambiguous grammar", grammar("start: a\na: a a | \"x\" | \"xx\" | ")),
        (
            "many rules",
            grammar(
                &(0..1500)
                    .fold("start: r0\n".to_string(), |s, i| s + &format!("r{i}: \"a\" r{}\n", i + 1))
                    .replace("r1500\n", "\"z\"\n"),
            ),
        ),
        ("!no text", grammar("")),
        ("!no choices", AnswerRule::Choice(Vec::new())),
        ("!an empty choice", AnswerRule::Choice(vec![String::new()])),
        ("!choices over the limit", AnswerRule::Choice(vec!["x".repeat(100); 1_000])),
    ]
}

/// Memory of this process in KiB, as Linux counts it: `VmRSS:`, or `VmHWM:` for the most that it was.
fn memory_kib(line: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let found = status.lines().find_map(|l| l.strip_prefix(line)).unwrap_or("0 kB");
    found.trim().trim_end_matches(" kB").parse().unwrap()
}

/// To see each one's time and memory (reliability.md, R10):
/// `cargo test --release -p oxseek-constrain --test grammars hostile -- --nocapture`.
#[test]
fn hostile_grammars_are_refused_or_followed() {
    let tokenizer = tokenizer();
    let grammars = Grammars::new(&tokenizer, END).unwrap();
    let table = hostile();
    assert!(table.len() >= 40);
    let (mut wrong, mut slowest, mut largest) = (Vec::new(), (0.0, ""), (0, ""));
    for (name, rule) in table {
        // The most memory begins to count anew.
        let _ = std::fs::write("/proc/self/clear_refs", "5");
        let (began, before) = (std::time::Instant::now(), memory_kib("VmRSS:"));
        let outcome = grammars.compile(Some(&rule), None);
        let took = began.elapsed().as_secs_f64() * 1e3;
        let refusal = outcome.as_ref().err().map(ToString::to_string);
        match outcome {
            Ok(_) if name.starts_with('!') => wrong.push(name),
            Ok(compiled) => {
                // A few steps: an error is an answer too, a panic is none.
                let (mut follower, mut random) = (compiled.follow(), Random(1));
                for _ in 0..20 {
                    let mut words = vec![0u32; tokenizer.vocab_len().div_ceil(32)];
                    let Ok(true) = follower.mask(&mut words) else { break };
                    let allowed: Vec<u32> =
                        (0..END).filter(|id| words[*id as usize / 32] >> (id % 32) & 1 == 1).collect();
                    if allowed.is_empty() || follower.commit(allowed[random.below(allowed.len())]).is_err() {
                        break;
                    }
                }
            }
            Err(e) => assert!(!matches!(e, Error::Tokenizer(_)), "{name}: {e}"),
        }
        let grown = memory_kib("VmHWM:").saturating_sub(before);
        println!("{took:>6.1} ms {grown:>6} KiB  {name}: {}", refusal.as_deref().unwrap_or("followed"));
        if took > slowest.0 {
            slowest = (took, name);
        }
        if grown > largest.0 {
            largest = (grown, name);
        }
    }
    println!("slowest: {:.1} ms, {}; most memory: {} KiB, {}", slowest.0, slowest.1, largest.0, largest.1);
    assert!(wrong.is_empty(), "not refused: {wrong:?}");
    assert!(largest.0 <= 64 << 10, "{largest:?}");
}
