//! Bounds of grammars: a hostile one must be refused quickly.

use llguidance::api::ParserLimits;
use serde_json::Value;

use crate::Error;

/// Largest schemas of a request, all together, as JSON.
pub const SCHEMA_BYTES_MAX: usize = 128 << 10;
/// Largest grammar as text.
pub const GRAMMAR_BYTES_MAX: usize = 64 << 10;
/// Largest regular expression, lists of choices too.
pub const REGEX_BYTES_MAX: usize = 16 << 10;
/// Deepest nesting of a schema, of a grammar's or an expression's brackets.
pub const DEPTH_MAX: usize = 48;

/// What llguidance may spend. Its fuel is 50,000 to the millisecond when it begins and 14,000 while it runs.
pub(crate) fn parser_limits() -> ParserLimits {
    ParserLimits {
        max_items_in_row: 1_000,
        initial_lexer_fuel: 1_000_000,
        step_lexer_fuel: 200_000,
        step_max_items: 50_000,
        max_lexer_states: 20_000,
        max_grammar_size: 100_000,
        precompute_large_lexemes: false,
        verbose_errors: false,
    }
}

/// Refuses schemas that are too large or too deep, and llguidance's own options in them.
pub(crate) fn check_schema(schema: &Value, bytes_left: &mut usize) -> Result<(), Error> {
    // Depth first: writing a schema as text recurses.
    let mut open = vec![(schema, 1)];
    while let Some((value, depth)) = open.pop() {
        if depth > DEPTH_MAX {
            return Err(Error::Limit(format!("a schema is nested deeper than {DEPTH_MAX}")));
        }
        match value {
            Value::Object(map) => {
                if map.contains_key("x-guidance") {
                    return Err(Error::Grammar("x-guidance is no part of JSON Schema".into()));
                }
                open.extend(map.values().map(|v| (v, depth + 1)));
            }
            Value::Array(list) => open.extend(list.iter().map(|v| (v, depth + 1))),
            Value::String(text) => check_depth(text)?,
            _ => {}
        }
    }
    let bytes = schema.to_string().len();
    *bytes_left = bytes_left
        .checked_sub(bytes)
        .ok_or_else(|| Error::Limit(format!("schemas of more than {SCHEMA_BYTES_MAX} bytes")))?;
    Ok(())
}

/// Refuses a text of more than `bytes_max`, or with brackets that are nested too deep.
pub(crate) fn check_text(text: &str, bytes_max: usize) -> Result<(), Error> {
    if text.len() > bytes_max {
        return Err(Error::Limit(format!("{} bytes, at most {bytes_max}", text.len())));
    }
    check_depth(text)
}

/// Brackets in quotes count too: that refuses a little more than is needed.
fn check_depth(text: &str) -> Result<(), Error> {
    let mut depth = 0usize;
    for c in text.bytes() {
        match c {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > DEPTH_MAX {
            return Err(Error::Limit(format!("brackets are nested deeper than {DEPTH_MAX}")));
        }
    }
    Ok(())
}
