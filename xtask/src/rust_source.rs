//! Rust source taken apart into code, comments and strings: enough of a lexer to look for words in the right place.

/// A source file. `code` and `comments` have the lines of the file; what does not belong to them is blank.
pub struct RustSource {
    pub code: String,
    pub comments: String,
    /// Contents of string literals as they are written, with the line on which each begins.
    pub strings: Vec<(usize, String)>,
}

impl RustSource {
    pub fn new(text: &str) -> Self {
        let mut lexer = Lexer {
            rest: text,
            line: 1,
            before: ' ',
            out: Self { code: String::new(), comments: String::new(), strings: Vec::new() },
        };
        while !lexer.rest.is_empty() {
            lexer.next();
        }
        lexer.out
    }

    /// Lines of the code on which `word` stands between characters that are not part of a name.
    pub fn lines_with_word<'a>(&'a self, word: &'a str) -> impl Iterator<Item = usize> + 'a {
        self.code.lines().enumerate().filter(move |(_, line)| has_word(line, word)).map(|(i, _)| i + 1)
    }

    /// The line of the first `#[cfg(test)]`: from there on a file is tests.
    pub fn tests_begin(&self) -> usize {
        self.code.lines().position(|l| l.contains("#[cfg(test)]")).map_or(usize::MAX, |i| i + 1)
    }
}

/// Whether `word` stands in `line` between characters that are not part of a name.
pub fn has_word(line: &str, word: &str) -> bool {
    let part_of_name = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word).any(|(at, _)| {
        !line[..at].chars().next_back().is_some_and(part_of_name)
            && !line[at + word.len()..].chars().next().is_some_and(part_of_name)
    })
}

struct Lexer<'a> {
    rest: &'a str,
    line: usize,
    /// The last character of code.
    before: char,
    out: RustSource,
}

/// What a piece of source is.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Code,
    Comment,
    Literal,
}

impl Lexer<'_> {
    fn next(&mut self) {
        let s = self.rest;
        if s.starts_with("//") {
            return self.take(s.find('\n').unwrap_or(s.len()), Kind::Comment);
        }
        if s.starts_with("/*") {
            return self.take(block_comment_len(s), Kind::Comment);
        }
        if s.starts_with('"') {
            return self.take_string(0, 0);
        }
        let in_name = self.before.is_alphanumeric() || self.before == '_';
        if !in_name && let Some((prefix, hashes)) = raw_string(s) {
            return self.take_string(prefix, hashes);
        }
        if s.starts_with('\'')
            && let Some(len) = char_literal_len(s)
        {
            return self.take(len, Kind::Literal);
        }
        self.take(s.chars().next().map_or(0, char::len_utf8), Kind::Code);
    }

    /// A string that begins after `prefix` bytes with its quote and ends at a quote and `hashes` hashes.
    fn take_string(&mut self, prefix: usize, hashes: usize) {
        let s = self.rest;
        let begin = prefix + 1;
        let raw = prefix > 0;
        let end = if raw {
            let close = format!("\"{}", "#".repeat(hashes));
            s[begin..].find(&close).map_or(s.len(), |at| begin + at)
        } else {
            let mut escaped = false;
            let close = s[begin..].find(|c| {
                let ends = c == '"' && !escaped;
                escaped = c == '\\' && !escaped;
                ends
            });
            close.map_or(s.len(), |at| begin + at)
        };
        self.out.strings.push((self.line, s[begin..end].to_string()));
        self.take(s.len().min(end + 1 + hashes), Kind::Literal);
    }

    /// Moves `len` bytes to where they belong and blanks everywhere else.
    fn take(&mut self, len: usize, kind: Kind) {
        let (piece, rest) = self.rest.split_at(len);
        for c in piece.chars() {
            let blank = if c == '\n' { '\n' } else { ' ' };
            self.out.code.push(if kind == Kind::Code { c } else { blank });
            self.out.comments.push(if kind == Kind::Comment { c } else { blank });
            self.line += usize::from(c == '\n');
            self.before = if kind == Kind::Code { c } else { ' ' };
        }
        self.rest = rest;
    }
}

fn block_comment_len(s: &str) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < s.len() {
        if s[at..].starts_with("/*") {
            depth += 1;
            at += 2;
        } else if s[at..].starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += s[at..].chars().next().map_or(1, char::len_utf8);
        }
    }
    s.len()
}

/// Where the quote of a raw string stands, and its hashes.
fn raw_string(s: &str) -> Option<(usize, usize)> {
    let prefix = ["br", "cr", "r"].into_iter().find(|p| s.starts_with(p))?;
    let hashes = s[prefix.len()..].bytes().take_while(|b| *b == b'#').count();
    let quote = prefix.len() + hashes;
    s[quote..].starts_with('"').then_some((quote, hashes))
}

/// The length of a character literal; None for a lifetime.
fn char_literal_len(s: &str) -> Option<usize> {
    let mut chars = s.char_indices().skip(1);
    let (_, first) = chars.next()?;
    if first == '\\' {
        chars.next()?;
        return chars.find(|(_, c)| *c == '\'').map(|(at, _)| at + 1);
    }
    chars.next().filter(|(_, c)| *c == '\'').map(|(at, _)| at + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_comments_and_strings_come_apart() {
        let text = concat!(
            "let a = \"one // \\\" two\"; // three 'x\n",
            "let b = r#\"four \"five\"#; /* six /* seven */ */ let c = '\"';\n",
            "fn f<'a>(r#type: &'a str) -> char { '\\'' } b\"eight\"\n",
        );
        let source = RustSource::new(text);
        let strings: Vec<(usize, &str)> = source.strings.iter().map(|(l, s)| (*l, s.as_str())).collect();
        assert_eq!(strings, [(1, "one // \\\" two"), (2, "four \"five"), (3, "eight")]);
        assert_eq!(source.code.lines().count(), 3);
        assert_eq!(source.code.chars().count(), text.chars().count());
        assert_eq!(source.comments.chars().count(), text.chars().count());
        assert!(source.comments.contains("// three 'x"));
        assert!(source.comments.contains("/* six /* seven */ */"));
        for (word, line) in
            [("let", [1, 2].as_slice()), ("type", &[3]), ("three", &[]), ("five", &[]), ("c", &[2])]
        {
            assert_eq!(source.lines_with_word(word).collect::<Vec<_>>(), line, "{word}");
        }
    }

    #[test]
    fn words_are_whole() {
        assert!(has_word("an unsafe { }", "unsafe"));
        assert!(!has_word("#![forbid(unsafe_code)]", "unsafe"));
        assert!(!has_word("very_unsafe", "unsafe"));
    }

    #[test]
    fn an_unfinished_file_ends() {
        for text in ["\"", "r#\"", "/* /*", "'", "'\\", "// x"] {
            RustSource::new(text);
        }
    }
}
