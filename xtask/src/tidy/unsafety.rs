//! Where `unsafe` may stand, and what stands beside it.

use super::Violation;
use crate::{rust_source::RustSource, tree::Tree};

/// Crates that hold `unsafe`: the root denies it, so that each file that has it says so.
const DENYING: [&str; 3] = ["crates/backend-cpu", "crates/backend-cuda", "crates/weights"];
const ALLOWED_FOLDERS: [&str; 2] = ["crates/backend-cpu/src/", "crates/backend-cuda/src/"];
const ALLOWED_FILE: &str = "crates/weights/src/mmap.rs";
/// A block's reason stands on its line or so many lines above it, or in the comment that ends there.
const LINES_ABOVE_MAX: usize = 3;

/// Every crate root forbids `unsafe`, and it stands nowhere but in the backends and in the file that maps files.
pub fn only_where_allowed(tree: &Tree) -> Vec<Violation> {
    const RULE: &str = "unsafe-place";
    let mut found = Vec::new();
    for folder in tree.crates() {
        let level = if DENYING.contains(&folder) { "deny" } else { "forbid" };
        let attribute = format!("#![{level}(unsafe_code)]");
        for root in ["src/lib.rs", "src/main.rs"] {
            let Some(file) = tree.get(&format!("{folder}/{root}")) else { continue };
            if file.rust().is_some_and(|s| !s.code.contains(&attribute)) {
                found.push(Violation::new(
                    &file.path,
                    1,
                    RULE,
                    format!("this crate root lacks {attribute}; add it"),
                ));
            }
        }
    }
    for file in &tree.files {
        if ALLOWED_FOLDERS.iter().any(|f| file.path.starts_with(f)) || file.path == ALLOWED_FILE {
            continue;
        }
        let Some(source) = file.rust() else { continue };
        for line in source.lines_with_word("unsafe") {
            let folders = ALLOWED_FOLDERS.join(", ");
            let message = format!("unsafe belongs into {folders} or {ALLOWED_FILE}; write it safely here");
            found.push(Violation::new(&file.path, line, RULE, message));
        }
    }
    found
}

/// Every `unsafe` block and impl has a `SAFETY:` comment. Functions state theirs under `# Safety`, which clippy checks.
pub fn every_block_says_why(tree: &Tree) -> Vec<Violation> {
    let mut found = Vec::new();
    for file in &tree.files {
        let Some(source) = file.rust() else { continue };
        let comments: Vec<&str> = source.comments.lines().collect();
        for line in unsafe_blocks(&source) {
            if !is_explained(&comments, line) {
                let message = "unsafe without its reason; put a `// SAFETY:` comment right above it";
                found.push(Violation::new(&file.path, line, "safety-comment", message));
            }
        }
    }
    found
}

/// Lines of `unsafe {` and `unsafe impl`.
fn unsafe_blocks(source: &RustSource) -> Vec<usize> {
    let lines: Vec<&str> = source.code.lines().collect();
    let opens = |line: &usize| {
        // What follows the word may stand on the next line.
        let mut after = lines[*line - 1].split("unsafe").nth(1).unwrap_or("").trim();
        if after.is_empty() {
            after = lines.get(*line).map_or("", |l| l.trim());
        }
        after.starts_with('{') || after.starts_with("impl")
    };
    source.lines_with_word("unsafe").filter(opens).collect()
}

fn is_explained(comments: &[&str], line: usize) -> bool {
    let mut first = line.saturating_sub(LINES_ABOVE_MAX).max(1);
    while first > 1 && !comments[first - 1].trim().is_empty() {
        first -= 1;
    }
    comments[first - 1..line].iter().any(|l| l.contains("SAFETY:"))
}

#[cfg(test)]
mod tests {
    use super::super::places;
    use super::*;

    const MANIFEST: (&str, &str) = ("crates/model/Cargo.toml", "");

    #[test]
    fn a_root_without_the_attribute_is_found() {
        let root = |text| [MANIFEST, ("crates/model/src/lib.rs", text)];
        assert_eq!(
            places(only_where_allowed, &root("//! #![forbid(unsafe_code)]")),
            ["crates/model/src/lib.rs:1"]
        );
        assert_eq!(places(only_where_allowed, &root("#![deny(unsafe_code)]")), ["crates/model/src/lib.rs:1"]);
        assert!(places(only_where_allowed, &root("//! Doc.\n#![forbid(unsafe_code)]")).is_empty());
    }

    #[test]
    fn unsafe_outside_its_places_is_found() {
        let code = "// unsafe in a comment\nfn f() { unsafe { g() } }\nconst S: &str = \"unsafe\";\n";
        for path in ["crates/weights/src/json.rs", "crates/backend-cpu/tests/t.rs", "xtask/src/a.rs"] {
            assert_eq!(places(only_where_allowed, &[(path, code)]), [format!("{path}:2")]);
        }
        for path in ["crates/weights/src/mmap.rs", "crates/backend-cpu/src/simd/a.rs"] {
            assert!(places(only_where_allowed, &[(path, code)]).is_empty());
        }
    }

    #[test]
    fn a_block_without_a_reason_is_found() {
        let at = |text| places(every_block_says_why, &[("a.rs", text)]);
        assert_eq!(at("fn f() {\n    unsafe { g() }\n}\n"), ["a.rs:2"]);
        assert_eq!(at("// Not a reason.\nunsafe impl Send for A {}\n"), ["a.rs:2"]);
        assert_eq!(at("// SAFETY: too far.\n\n\n\n\nunsafe impl Send for A {}\n"), ["a.rs:6"]);
        assert_eq!(at("let s = \"SAFETY:\"; unsafe { g() }\n"), ["a.rs:1"]);
    }

    #[test]
    fn a_reason_may_be_long_and_functions_have_their_own() {
        let at = |text| places(every_block_says_why, &[("a.rs", text)]);
        assert!(at("// SAFETY: it is.\nunsafe impl Send for A {}\n").is_empty());
        assert!(at("// SAFETY: a\n// b\n// c\n// d\n// e\nlet y =\n    unsafe { g() };\n").is_empty());
        assert!(at("unsafe { g() } // SAFETY: it is.\n").is_empty());
        assert!(at("unsafe fn f();\ntype F = unsafe fn();\n").is_empty());
    }
}
