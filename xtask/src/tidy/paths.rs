//! Places that exist on one machine only.

use super::Violation;
use crate::tree::Tree;

const MACHINE: [&str; 5] = ["/work/", "/home/", "/root/", "/tmp/", "/Users/"];
/// What belongs to one machine's set-up; in halves, so that this file may pass.
const OUTSIDE: [[&str; 2]; 8] = [
    ["../", "shared"],
    ["index", "-url"],
    ["replace", "-with"],
    ["pypi", ".org"],
    ["files.python", "hosted.org"],
    ["registry.", "npmjs.org"],
    ["index.", "crates.io"],
    ["proxy.", "golang.org"],
];
const PUBLIC_REGISTRY: &str = "registry+https://github.com/rust-lang/crates.io-index";

/// No string literal outside of tests holds an absolute path of somebody's machine.
pub fn no_machine_in_strings(tree: &Tree) -> Vec<Violation> {
    let mut found = Vec::new();
    // This file lists them.
    let own = "xtask/src/tidy/paths.rs";
    for file in tree.files.iter().filter(|f| f.path.contains("src/") && f.path != own) {
        let Some(source) = file.rust() else { continue };
        let tests = source.tests_begin();
        for (line, text) in source.strings.iter().filter(|(line, _)| *line < tests) {
            if let Some(path) = MACHINE.iter().find(|p| text.contains(*p)) {
                let message =
                    format!("{path} is on your machine only; take the place as an argument or from std::env");
                found.push(Violation::new(&file.path, *line, "machine-path", message));
            }
        }
    }
    found
}

/// No tracked text names a folder beside the repository or a package registry; packages come from crates.io.
pub fn no_outside_world(tree: &Tree) -> Vec<Violation> {
    const RULE: &str = "outside-world";
    let outside = OUTSIDE.map(|halves| halves.concat());
    let mut found = Vec::new();
    for file in &tree.files {
        for (number, line) in file.lines() {
            if let Some(word) = outside.iter().find(|w| line.contains(*w)) {
                let message = format!(
                    "{word} belongs to the set-up of one machine; leave it to the tool's own settings"
                );
                found.push(Violation::new(&file.path, number, RULE, message));
            }
            let source = line.strip_prefix("source = ").filter(|_| file.path == "Cargo.lock");
            if source.is_some_and(|s| s.trim_matches('"') != PUBLIC_REGISTRY) {
                let message = "this package does not come from crates.io; depend on a published version";
                found.push(Violation::new(&file.path, number, RULE, message));
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
    fn a_path_of_a_machine_is_found() {
        let code = "// see /home/me\nconst A: &str = \"/home/me/model\";\n#[cfg(test)]\nconst B: &str = \"/tmp/x\";\n";
        assert_eq!(
            places(no_machine_in_strings, &[("crates/a/src/lib.rs", code)]),
            ["crates/a/src/lib.rs:2"]
        );
        assert!(places(no_machine_in_strings, &[("crates/a/tests/t.rs", code)]).is_empty());
    }

    #[test]
    fn the_outside_world_is_found() {
        for word in OUTSIDE.map(|halves| halves.concat()) {
            assert_eq!(
                places(no_outside_world, &[("a.toml", &format!("x\ny = \"{word}\"\n"))]),
                ["a.toml:2"]
            );
        }
        let lock = format!("source = \"{PUBLIC_REGISTRY}\"\nsource = \"git+https://example.org/a\"\n");
        assert_eq!(places(no_outside_world, &[("Cargo.lock", &lock)]), ["Cargo.lock:2"]);
    }
}
