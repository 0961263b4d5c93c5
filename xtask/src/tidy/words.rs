//! Words that say "not finished".

use super::Violation;
use crate::{rust_source::has_word, tree::Tree};

/// In comments and texts; here in halves, so that this file may pass.
const MARKS: [[&str; 2]; 3] = [["TO", "DO"], ["FIX", "ME"], ["XX", "X"]];
/// In code.
const STUBS: [&str; 4] = ["todo!", "unimplemented!", "dbg!", "#[ignore"];
const TEXTS: [&str; 9] = ["rs", "md", "toml", "sh", "py", "html", "js", "css", "yml"];

/// Nothing tracked is a stub, a skipped test or a note to oneself.
pub fn nothing_unfinished(tree: &Tree) -> Vec<Violation> {
    const RULE: &str = "unfinished";
    let mut found = Vec::new();
    for file in tree.files.iter().filter(|f| TEXTS.iter().any(|e| f.has_extension(e))) {
        for (number, line) in file.lines() {
            for mark in MARKS.map(|halves| halves.concat()).iter().filter(|mark| has_word(line, mark)) {
                let message = format!("{mark}: do it, or write an issue and remove the note");
                found.push(Violation::new(&file.path, number, RULE, message));
            }
        }
        let Some(source) = file.rust() else { continue };
        for (i, line) in source.code.lines().enumerate() {
            for stub in STUBS.iter().filter(|stub| line.contains(*stub)) {
                let message = format!("{stub} stays out of the repository; finish it or remove it");
                found.push(Violation::new(&file.path, i + 1, RULE, message));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::super::places;
    use super::*;

    #[test]
    fn notes_are_found_in_every_text() {
        for mark in MARKS.map(|halves| halves.concat()) {
            for path in ["a.rs", "README.md", "x.sh"] {
                let text = format!("fine\n# {mark}: later\n");
                assert_eq!(places(nothing_unfinished, &[(path, &text)]), [format!("{path}:2")]);
            }
            assert!(places(nothing_unfinished, &[("x.sh", &format!("mktemp a.{mark}{mark}"))]).is_empty());
        }
    }

    #[test]
    fn stubs_are_found_in_code_only() {
        for stub in STUBS {
            let code = format!("// {stub}\nfn f() {{ let s = \"{stub}\"; }}\n{stub}\n");
            assert_eq!(places(nothing_unfinished, &[("a.rs", &code)]), ["a.rs:3"]);
        }
    }
}
