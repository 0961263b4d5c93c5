//! llama.cpp's grammars as Lark: the same rules in other letters.

use std::fmt::Write;

use crate::Error;

/// Whether a grammar is llama.cpp's (or xgrammar's) rather than Lark.
pub(crate) fn is_gbnf(text: &str) -> bool {
    text.contains("::=")
}

/// The same grammar in Lark; `root` becomes `start`.
///
/// # Errors
/// [`Error::Grammar`] with the place of what is not understood.
pub(crate) fn to_lark(text: &str) -> Result<String, Error> {
    let mut lark = String::new();
    let mut rest = text;
    let at = |rest: &str| text.len() - rest.len();
    while let Some(c) = rest.chars().next() {
        let taken = match c {
            '#' => rest.find('\n').unwrap_or(rest.len()),
            '"' => {
                let end = closing(rest, '"').ok_or_else(|| bad("an open string", at(rest)))?;
                lark += &literal(&rest[1..end]);
                end + 1
            }
            '[' => {
                let end = closing(rest, ']').ok_or_else(|| bad("an open class of characters", at(rest)))?;
                let _ = write!(lark, "/{}/", rest[..=end].replace('/', "\\/"));
                end + 1
            }
            '.' => {
                lark += "/(?s:.)/";
                1
            }
            '{' => {
                let end = rest.find('}').ok_or_else(|| bad("an open repetition", at(rest)))?;
                lark += &rest[..=end];
                end + 1
            }
            c if c.is_ascii_alphabetic() => {
                let end = rest
                    .find(|c: char| !c.is_ascii_alphanumeric() && !"-_".contains(c))
                    .unwrap_or(rest.len());
                lark += &rule_name(&rest[..end]);
                end
            }
            ':' if rest.starts_with("::=") => {
                lark.push(':');
                3
            }
            '(' | ')' | '|' | '*' | '+' | '?' => {
                lark.push(c);
                1
            }
            '\n' => {
                // A rule may go on in the next line; Lark wants to see a `|` or more space there.
                let next = rest.trim_start();
                let new_rule = next.split_once("::=").is_some_and(|(name, _)| is_name(name.trim_end()));
                lark.push(if new_rule { '\n' } else { ' ' });
                1
            }
            c if c.is_whitespace() => {
                lark.push(' ');
                c.len_utf8()
            }
            _ => return Err(bad("an unknown sign", at(rest))),
        };
        rest = &rest[taken..];
    }
    Ok(lark)
}

fn bad(what: &str, at: usize) -> Error {
    Error::Grammar(format!("GBNF: {what} at byte {at}"))
}

fn is_name(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c))
}

/// Rules of Lark are in lower case; a prefix keeps them apart from our own.
fn rule_name(name: &str) -> String {
    if name == "root" {
        return "start".into();
    }
    let mut out = String::from("g_");
    for c in name.chars() {
        match c {
            '-' => out += "_m",
            '_' => out += "_u",
            c if c.is_ascii_uppercase() => {
                out += "_c";
                out.push(c.to_ascii_lowercase());
            }
            c => out.push(c),
        }
    }
    out
}

/// Where the string or class that begins `text` closes.
fn closing(text: &str, end: char) -> Option<usize> {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == end => return Some(at),
            _ => {}
        }
    }
    None
}

/// `\x41` is no escape of JSON's.
fn literal(inner: &str) -> String {
    let mut out = String::from("\"");
    let mut chars = inner.chars().peekable();
    while let Some(c) = chars.next() {
        if c == '\\' && chars.peek() == Some(&'x') {
            chars.next();
            let digits: String = chars.by_ref().take(2).collect();
            let _ = write!(out, "\\u00{digits:0>2}");
        } else if c == '\\' {
            out.push(c);
            out.extend(chars.next());
        } else {
            out.push(c);
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_keep_their_meaning() {
        let gbnf = "# yes\nroot ::= answer-one | \"no\\x21\"\nanswer-one ::=\n  [a-z/]+ (\" \" .){2}\n";
        let lark = to_lark(gbnf).expect("a grammar");
        let lines: Vec<String> = lark
            .lines()
            .map(|l| l.split_whitespace().collect::<Vec<_>>().join(" "))
            .filter(|l| !l.is_empty())
            .collect();
        assert_eq!(
            lines,
            ["start : g_answer_mone | \"no\\u0021\"", "g_answer_mone : /[a-z\\/]/+ (\" \" /(?s:.)/){2}"]
        );
        assert!(to_lark("root ::= \"open").is_err() && to_lark("root ::= %").is_err());
    }
}
