//! Files that are there and never compiled or never run.

use std::collections::HashSet;

use super::Violation;
use crate::{
    rust_source::RustSource,
    tree::{File, Tree},
};

/// Every file below a crate's `src` is reached by `mod` lines from a root.
pub fn every_module_is_reached(tree: &Tree) -> Vec<Violation> {
    let mut found = Vec::new();
    for folder in tree.crates() {
        let src = format!("{folder}/src/");
        let is_root = |rest: &str| rest == "lib.rs" || rest == "main.rs" || rest.starts_with("bin/");
        let mut reached: HashSet<String> =
            tree.below(&src).filter(|(_, rest)| is_root(rest)).map(|(f, _)| f.path.clone()).collect();
        let mut open: Vec<String> = reached.iter().cloned().collect();
        while let Some(path) = open.pop() {
            let Some(source) = tree.get(&path).and_then(File::rust) else { continue };
            for name in modules(&source) {
                for child in
                    [format!("{}{name}.rs", children(&path)), format!("{}{name}/mod.rs", children(&path))]
                {
                    if tree.get(&child).is_some() && reached.insert(child.clone()) {
                        open.push(child);
                    }
                }
            }
        }
        for (file, _) in tree.below(&src).filter(|(f, _)| f.is_rust() && !reached.contains(&f.path)) {
            let message = "no `mod` line leads here, so nobody compiles it; add the line or delete the file";
            found.push(Violation::new(&file.path, 1, "orphan", message));
        }
    }
    found
}

/// Every file directly in a crate's `tests` has a test.
pub fn every_test_file_tests(tree: &Tree) -> Vec<Violation> {
    let mut found = Vec::new();
    for folder in tree.crates() {
        // With `[[test]]` a manifest may name files that bring their own harness.
        let manifest =
            tree.get(&format!("{folder}/Cargo.toml")).and_then(|f| f.text.as_deref()).unwrap_or("");
        let tests = format!("{folder}/tests/");
        for (file, rest) in tree.below(&tests).filter(|(f, rest)| f.is_rust() && !rest.contains('/')) {
            let listed = manifest.contains("[[test]]") && manifest.contains(&format!("tests/{rest}"));
            if !listed && file.rust().is_some_and(|s| !s.code.contains("#[test]")) {
                let message =
                    "this test file has no #[test]; add one, or move it into a folder that tests share";
                found.push(Violation::new(&file.path, 1, "no-test", message));
            }
        }
    }
    found
}

/// Names of the `mod name;` lines.
fn modules(source: &RustSource) -> Vec<&str> {
    let tokens: Vec<&str> = source.code.split_whitespace().collect();
    let pairs = tokens.windows(2).filter(|w| w[0] == "mod");
    pairs.filter_map(|w| w[1].strip_suffix(';')).collect()
}

/// The folder in which a file's modules lie.
fn children(path: &str) -> String {
    let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
    match name {
        "lib.rs" | "main.rs" | "mod.rs" => format!("{folder}/"),
        _ => format!("{}/", path.trim_end_matches(".rs")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::places;
    use super::*;

    const MANIFEST: (&str, &str) = ("crates/a/Cargo.toml", "");

    #[test]
    fn a_file_that_nobody_names_is_found() {
        let files = [
            MANIFEST,
            ("crates/a/src/lib.rs", "// mod ghost;\npub(crate) mod b;\nmod d;\n"),
            ("crates/a/src/b.rs", "mod c;\n"),
            ("crates/a/src/b/c.rs", ""),
            ("crates/a/src/d/mod.rs", "mod e;"),
            ("crates/a/src/d/e.rs", ""),
            ("crates/a/src/ghost.rs", "mod own;"),
            ("crates/a/src/ghost/own.rs", ""),
        ];
        let want = ["crates/a/src/ghost.rs:1", "crates/a/src/ghost/own.rs:1"];
        assert_eq!(places(every_module_is_reached, &files), want);
    }

    #[test]
    fn a_test_file_without_a_test_is_found() {
        let files = [
            MANIFEST,
            ("crates/a/tests/full.rs", "#[test]\nfn t() {}\n"),
            ("crates/a/tests/empty.rs", "// #[test]\nfn t() {}\n"),
            ("crates/a/tests/shared/mod.rs", "pub fn f() {}\n"),
        ];
        assert_eq!(places(every_test_file_tests, &files), ["crates/a/tests/empty.rs:1"]);
        let listed = ("crates/a/Cargo.toml", "[[test]]\npath = \"tests/empty.rs\"\nharness = false\n");
        assert!(places(every_test_file_tests, &[listed, files[2]]).is_empty());
    }
}
