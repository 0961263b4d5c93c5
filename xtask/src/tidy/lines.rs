//! How long lines may be.

use super::Violation;
use crate::tree::{File, Tree};

const COLUMNS_MAX: usize = 120;

/// Lines of code and prose fit a screen. Tables and addresses cannot be broken.
pub fn not_too_long(tree: &Tree) -> Vec<Violation> {
    let mut found = Vec::new();
    for file in tree.files.iter().filter(|f| f.is_rust() || f.has_extension("md")) {
        for (number, line) in file.lines() {
            let columns = line.chars().count();
            if columns > COLUMNS_MAX && !cannot_be_broken(file, line) {
                let message = format!("{columns} columns, at most {COLUMNS_MAX} allowed; break the line");
                found.push(Violation::new(&file.path, number, "line-length", message));
            }
        }
    }
    found
}

fn cannot_be_broken(file: &File, line: &str) -> bool {
    line.contains("://") || (file.has_extension("md") && line.trim_start().starts_with('|'))
}

#[cfg(test)]
mod tests {
    use super::super::places;
    use super::*;

    #[test]
    fn long_lines_are_found() {
        let (fits, long) = ("ä".repeat(120), "ä".repeat(121));
        let text = format!("{fits}\n{long}\n| {long} |\nsee https://{long}\n");
        assert_eq!(places(not_too_long, &[("a.md", &text)]), ["a.md:2"]);
        assert_eq!(places(not_too_long, &[("a.rs", &text)]), ["a.rs:2", "a.rs:3"]);
        assert!(places(not_too_long, &[("a.json", &text)]).is_empty());
    }
}
