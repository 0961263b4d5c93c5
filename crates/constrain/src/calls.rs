//! Tool calls in a model's own format, with arguments that are valid for their schemas.

use std::fmt::Write;

use llguidance::api::GrammarWithLexer;
use oxseek_text::{CallStyle, Tokenizer};
use serde_json::{Value, json};

use crate::{
    Error,
    rule::{ONE_LINE, json_grammar},
};

/// The calls that a turn may hold.
#[derive(Debug, Clone)]
pub struct CallRules {
    /// The model's format.
    pub style: CallStyle,
    /// Names and schemas of the arguments.
    pub tools: Vec<(String, Value)>,
    /// More than one call.
    pub many: bool,
    /// Calls of the conversation so far: Kimi-K2 counts on from there.
    pub earlier: usize,
}

/// Most calls of one turn that is held to a grammar.
const CALLS_MAX: usize = 32;

impl CallRules {
    /// Rules `calls` (with the token that begins them) and `rest` (behind it); the grammars of the arguments are
    /// appended to `grammars` under the names that the rules use.
    pub(crate) fn lark(
        &self,
        tokenizer: &Tokenizer,
        grammars: &mut Vec<GrammarWithLexer>,
        bytes_left: &mut usize,
    ) -> Result<String, Error> {
        let mut names = Vec::new();
        for (i, (_, schema)) in self.tools.iter().enumerate() {
            if self.style == CallStyle::Dsml {
                continue;
            }
            let name = format!("arguments_{i}");
            let grammar = json_grammar(&object_schema(schema), ONE_LINE, bytes_left)?;
            grammars.push(GrammarWithLexer { name: Some(name.clone()), ..grammar });
            names.push(format!("@{name}"));
        }
        match self.style {
            CallStyle::Plain | CallStyle::Fenced => self.deepseek(tokenizer, &names),
            CallStyle::Kimi => self.kimi(tokenizer, &names),
            CallStyle::Dsml => self.dsml(tokenizer, grammars, bytes_left),
        }
    }

    fn deepseek(&self, tokenizer: &Tokenizer, arguments: &[String]) -> Result<String, Error> {
        let token = |text| token(tokenizer, text);
        let fenced = self.style == CallStyle::Fenced;
        let separator = token("<｜tool▁sep｜>")?;
        let mut lark = String::new();
        for (i, (name, _)) in self.tools.iter().enumerate() {
            let (name, arguments) = (quoted(name), &arguments[i]);
            let call = if fenced {
                format!(r#""function" {separator} {name} "\n```json\n" {arguments} "\n```""#)
            } else {
                format!("{name} {separator} {arguments}")
            };
            let _ = writeln!(lark, "tool_{i}: {call}");
        }
        let _ = writeln!(
            lark,
            "call: {} ({}) {}",
            token("<｜tool▁call▁begin｜>")?,
            self.any(),
            token("<｜tool▁call▁end｜>")?
        );
        let between = if fenced { r#""\n" "# } else { "" };
        let _ = writeln!(lark, "rest: call{} {}", self.more(between), token("<｜tool▁calls▁end｜>")?);
        let _ = writeln!(lark, "calls: {} rest", token("<｜tool▁calls▁begin｜>")?);
        Ok(lark)
    }

    fn kimi(&self, tokenizer: &Tokenizer, arguments: &[String]) -> Result<String, Error> {
        let token = |text| token(tokenizer, text);
        let mut lark = String::new();
        let (begin, end) = (token("<|tool_call_begin|>")?, token("<|tool_call_end|>")?);
        let separator = token("<|tool_call_argument_begin|>")?;
        let most = if self.many { CALLS_MAX } else { 1 };
        // The number in a call's id is how many calls the conversation had before.
        for n in 0..most {
            let call = |(i, (name, _)): (usize, &(String, Value))| {
                let id = quoted(&format!("functions.{name}:{}", self.earlier + n));
                format!("{id} {separator} {}", arguments[i])
            };
            let calls: Vec<String> = self.tools.iter().enumerate().map(call).collect();
            let more = if n + 1 < most { format!(" (call_{})?", n + 1) } else { String::new() };
            let _ = writeln!(lark, "call_{n}: {begin} ({}) {end}{more}", calls.join(" | "));
        }
        let _ = writeln!(lark, "rest: call_0 {}", token("<|tool_calls_section_end|>")?);
        let _ = writeln!(lark, "calls: {} rest", token("<|tool_calls_section_begin|>")?);
        Ok(lark)
    }

    /// A string is written raw and ends where its element does; every other value is JSON.
    fn dsml(
        &self,
        tokenizer: &Tokenizer,
        grammars: &mut Vec<GrammarWithLexer>,
        bytes_left: &mut usize,
    ) -> Result<String, Error> {
        let bar = token(tokenizer, "｜DSML｜")?;
        let mut lark = String::new();
        for (i, (name, schema)) in self.tools.iter().enumerate() {
            let schema = object_schema(schema);
            let required: Vec<&str> =
                schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
            let mut elements = String::new();
            let fields = schema["properties"].as_object().into_iter().flatten();
            for (j, (field, value)) in fields.enumerate() {
                let head = format!("parameter name=\"{field}\" string=\"");
                let end = r#""parameter>\n""#;
                let body = if is_plain_string(value) {
                    // The bar is a token of its own, so the text before it cannot hold it.
                    format!("{} RAW {bar} {end}", quoted(&format!("{head}true\">")))
                } else {
                    let mut value = value.clone();
                    for shared in ["$defs", "definitions"] {
                        if let (Some(map), Some(defs)) = (value.as_object_mut(), schema.get(shared)) {
                            map.insert(shared.into(), defs.clone());
                        }
                    }
                    let grammar_name = format!("value_{i}_{j}");
                    let grammar = json_grammar(&value, ONE_LINE, bytes_left)?;
                    grammars.push(GrammarWithLexer { name: Some(grammar_name.clone()), ..grammar });
                    format!(r#"{} @{grammar_name} "</" {bar} {end}"#, quoted(&format!("{head}false\">")))
                };
                let _ = writeln!(lark, "field_{i}_{j}: \"<\" {bar} {body}");
                let optional = if required.contains(&field.as_str()) { "" } else { "?" };
                let _ = write!(elements, " field_{i}_{j}{optional}");
            }
            let head = quoted(&format!("invoke name=\"{name}\">\n"));
            let _ = writeln!(lark, r#"tool_{i}: {head}{elements} "</" {bar} "invoke>\n""#);
        }
        // With the beginning of the closing tag: a lexeme cannot give a byte back.
        let _ = writeln!(lark, r"RAW: /([^<]|<+[^\/<])*<+\//");
        let _ = writeln!(lark, "call: \"<\" {bar} ({})", self.any());
        let _ =
            writeln!(lark, r#"rest: "function_calls>\n" call{} "</" {bar} "function_calls>""#, self.more(""));
        let _ = writeln!(lark, r"calls: /(\n\n)?</ {bar} rest");
        Ok(lark)
    }

    fn any(&self) -> String {
        (0..self.tools.len()).map(|i| format!("tool_{i}")).collect::<Vec<_>>().join(" | ")
    }

    fn more(&self, between: &str) -> String {
        if self.many { format!(" ({between}call){{0,{}}}", CALLS_MAX - 1) } else { String::new() }
    }
}

/// Arguments are an object, also where a schema does not say so.
fn object_schema(schema: &Value) -> Value {
    let mut schema = schema.clone();
    if let Some(map) = schema.as_object_mut() {
        map.entry("type").or_insert_with(|| json!("object"));
    }
    schema
}

fn is_plain_string(schema: &Value) -> bool {
    schema.as_object().is_some_and(|map| {
        map.get("type") == Some(&json!("string"))
            && map
                .keys()
                .all(|k| matches!(k.as_str(), "type" | "description" | "title" | "default" | "examples"))
    })
}

fn token(tokenizer: &Tokenizer, text: &str) -> Result<String, Error> {
    let id = tokenizer.token_id(text).ok_or_else(|| Error::Tokenizer(format!("it has no token {text}")))?;
    Ok(format!("<[{id}]>"))
}

/// A literal as Lark writes it: JSON's escapes are the same.
fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}
