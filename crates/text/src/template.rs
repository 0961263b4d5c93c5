//! Chat templates: Jinja as Hugging Face models ship it, in bounded time and size.

mod guards;
mod program;

use std::{
    fmt,
    io::{self, Write},
};

use minijinja::{
    AutoEscape, Environment, ErrorKind, State, UndefinedBehavior, Value, machinery,
    syntax::SyntaxConfig,
    value::{Kwargs, Rest, Serde},
};
use serde::Serialize;
use serde_json::{Map, ser::Formatter};

use self::guards::Paid;
use crate::Error;

/// Largest template that is compiled.
pub const SOURCE_BYTES_MAX: usize = 256 << 10;
/// Instructions that one rendering may take. Each 64 bytes that it makes count as one, what it writes included, so that
/// this bounds memory, too: 26 MB, twice while a text is copied into its place.
const FUEL_MAX: u64 = 400_000;
const RECURSION_MAX: usize = 100;
/// Longest `range()`.
const RANGE_MAX: i128 = 100_000;
/// Longest message of `raise_exception`.
const MESSAGE_BYTES_MAX: usize = 4096;
/// Longest pattern of `strftime_now`.
const PATTERN_BYTES_MAX: usize = 256;
/// Marks errors of `raise_exception` among those of the engine.
const RAISED: &str = "raised: ";

/// A compiled chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ChatTemplate")
    }
}

impl ChatTemplate {
    /// Compiles a template.
    ///
    /// # Errors
    /// [`Error::Template`] with the line of a syntax error, [`Error::Limit`] when it is too long.
    pub fn new(source: &str) -> Result<Self, Error> {
        if source.len() > SOURCE_BYTES_MAX {
            return Err(Error::Limit("source bytes"));
        }
        program::compile(source, syntax()?).map_err(|e| Error::Template(e.to_string()))?;
        Ok(Self { environment: environment(), source: source.to_string() })
    }

    /// The template of a checkpoint: `chat_template.jinja`, or `chat_template` in `tokenizer_config.json` (of several
    /// named ones the one called `default`).
    ///
    /// # Errors
    /// As [`ChatTemplate::new`].
    pub fn from_files(tokenizer_config: Option<&[u8]>, jinja: Option<&[u8]>) -> Result<Option<Self>, Error> {
        if let Some(source) = jinja {
            let source = std::str::from_utf8(source).map_err(|e| Error::Template(e.to_string()))?;
            return Self::new(source).map(Some);
        }
        let Some(config) = tokenizer_config else { return Ok(None) };
        let config: serde_json::Value = serde_json::from_slice(config)
            .map_err(|e| Error::Template(format!("tokenizer_config.json: {e}")))?;
        match &config["chat_template"] {
            serde_json::Value::Null => Ok(None),
            serde_json::Value::String(source) => Self::new(source).map(Some),
            serde_json::Value::Array(list) => {
                let default =
                    list.iter().find(|t| t["name"] == "default").and_then(|t| t["template"].as_str());
                let none = || Error::Template("chat_template lists no template called default".into());
                Self::new(default.ok_or_else(none)?).map(Some)
            }
            _ => Err(Error::Template("chat_template is neither text nor a list".into())),
        }
    }

    /// The template's text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The prompt text of a conversation. `extra` are the template's own variables (`thinking`, ...); they cannot
    /// replace the ones that are given here.
    ///
    /// # Errors
    /// [`Error::Refused`] when the template raises, [`Error::Limit`] when it does too much, else [`Error::Template`].
    pub fn render(
        &self,
        messages: &[serde_json::Value],
        tools: Option<&serde_json::Value>,
        add_generation_prompt: bool,
        bos: &str,
        eos: &str,
        extra: &Map<String, serde_json::Value>,
    ) -> Result<String, Error> {
        let mut context = extra.clone();
        context.insert("messages".into(), messages.to_vec().into());
        context.insert("tools".into(), tools.cloned().unwrap_or_default());
        context.insert("add_generation_prompt".into(), add_generation_prompt.into());
        context.insert("bos_token".into(), bos.into());
        context.insert("eos_token".into(), eos.into());
        // Instructions borrow their source. To compile them again takes less than the messages do.
        let (instructions, blocks) =
            program::compile(&self.source, syntax()?).map_err(|e| render_error(&e))?;
        let mut text = String::new();
        let mut out = machinery::make_string_output(&mut text);
        let root = Value::from(Serde(&context));
        machinery::eval(&self.environment, &instructions, root, &blocks, &mut out, AutoEscape::None)
            .map_err(|e| render_error(&e))?;
        Ok(text)
    }
}

fn syntax() -> Result<SyntaxConfig, Error> {
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    syntax.map_err(|e| Error::Template(e.to_string()))
}

fn environment() -> Environment<'static> {
    let mut e = Environment::new();
    e.set_undefined_behavior(UndefinedBehavior::Lenient);
    e.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    e.set_fuel(Some(FUEL_MAX));
    e.set_recursion_limit(RECURSION_MAX);
    guards::install(&mut e);
    // In messages an absent field and null are the same thing.
    e.add_test("none", |v: &Value| v.is_none() || v.is_undefined());
    e.add_filter("tojson", to_json);
    e.add_function("raise_exception", |message: &str| -> Result<Value, minijinja::Error> {
        let message: String = message.chars().take(MESSAGE_BYTES_MAX).collect();
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, format!("{RAISED}{message}")))
    });
    e.add_function("strftime_now", strftime_now);
    e.add_function("range", range);
    e
}

fn render_error(e: &minijinja::Error) -> Error {
    if e.kind() == ErrorKind::OutOfFuel {
        return Error::Limit("instructions");
    }
    if let Some(message) = e.detail().and_then(|d| d.strip_prefix(RAISED)) {
        return Error::Refused(message.to_string());
    }
    // Only the kind and the line: the detail may quote a message's content.
    let line = e.line().map_or(String::new(), |l| format!(" (line {l})"));
    Error::Template(format!("{}{line}", e.kind()))
}

/// Python's `range`, with a bound on its length.
#[allow(clippy::needless_pass_by_value, reason = "the engine's signature")]
fn range(arguments: Rest<i64>) -> Result<Vec<i64>, minijinja::Error> {
    let refuse = |why: &'static str| Err(minijinja::Error::new(ErrorKind::InvalidOperation, why));
    let (from, to, step) = match arguments[..] {
        [to] => (0, to, 1),
        [from, to] => (from, to, 1),
        [from, to, step] if step != 0 => (from, to, step),
        _ => return refuse("range takes one to three whole numbers, the third not 0"),
    };
    if (i128::from(to) - i128::from(from)) / i128::from(step) > RANGE_MAX {
        return refuse("range is too long");
    }
    let mut values = Vec::new();
    let mut at = from;
    while (step > 0 && at < to) || (step < 0 && at > to) {
        values.push(at);
        match at.checked_add(step) {
            Some(next) => at = next,
            None => break,
        }
    }
    Ok(values)
}

/// Hugging Face's `tojson`: `json.dumps(x, ensure_ascii=False)`, with an optional indent.
#[allow(clippy::needless_pass_by_value, reason = "the engine's signature")]
fn to_json(state: &State, value: &Value, options: Kwargs) -> Result<Value, minijinja::Error> {
    let failed = |e: serde_json::Error| {
        if e.is_io() {
            return guards::out_of_fuel();
        }
        minijinja::Error::new(ErrorKind::BadSerialization, e.to_string())
    };
    let indent: Option<usize> = options.get("indent")?;
    // Templates pass these two at their Hugging Face defaults.
    let (_ascii, _separators): (Option<bool>, Option<Value>) =
        (options.get("ensure_ascii")?, options.get("separators")?);
    options.assert_all_used()?;
    let mut out = Paid::new(state);
    match indent {
        Some(n) => {
            let indent = " ".repeat(n.min(16));
            let pretty = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, pretty)).map_err(failed)?;
        }
        None => {
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, Spaced)).map_err(failed)?;
        }
    }
    out.into_value()
}

/// Python's separators: `", "` and `": "`.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }
    fn begin_object_key<W: ?Sized + Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }
    fn begin_object_value<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        w.write_all(b": ")
    }
}

/// The date in UTC by a `strftime` pattern; the directives that templates use.
fn strftime_now(pattern: &str) -> Result<String, minijinja::Error> {
    if pattern.len() > PATTERN_BYTES_MAX {
        return Err(minijinja::Error::new(
            ErrorKind::InvalidOperation,
            "strftime_now: the pattern is too long",
        ));
    }
    let now = time::OffsetDateTime::now_utc();
    let mut out = String::new();
    let mut chars = pattern.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let part = match chars.next() {
            Some('Y') => now.year().to_string(),
            Some('m') => format!("{:02}", u8::from(now.month())),
            Some('d') => format!("{:02}", now.day()),
            Some('H') => format!("{:02}", now.hour()),
            Some('M') => format!("{:02}", now.minute()),
            Some('S') => format!("{:02}", now.second()),
            Some('B') => now.month().to_string(),
            Some('b') => now.month().to_string()[..3].to_string(),
            Some('A') => now.weekday().to_string(),
            Some('a') => now.weekday().to_string()[..3].to_string(),
            Some('%') => "%".into(),
            other => {
                let why = format!("strftime_now: directive %{} is not supported", other.unwrap_or(' '));
                return Err(minijinja::Error::new(ErrorKind::InvalidOperation, why));
            }
        };
        out.push_str(&part);
    }
    Ok(out)
}
