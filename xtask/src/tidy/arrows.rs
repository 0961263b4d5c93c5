//! Which crate may depend on which.

use super::Violation;
use crate::tree::{File, Tree};

/// Crates of the workspace and what each may depend on. A missing arrow is a rule: `model` sees no backend, `engine`
/// no HTTP, `server` no tensor, `text` no model. Tests (`dev-dependencies`) may put a whole engine together.
const ARROWS: [(&str, &[&str]); 12] = [
    ("tensor", &[]),
    ("backend-cpu", &["tensor"]),
    ("backend-cuda", &["tensor"]),
    ("weights", &["tensor"]),
    ("text", &[]),
    ("constrain", &["text"]),
    ("model", &["tensor", "weights"]),
    ("selftest", &["tensor", "weights", "model"]),
    ("engine", &["model", "text"]),
    ("server", &["constrain", "engine", "text"]),
    (
        "oxseek",
        &[
            "tensor",
            "backend-cpu",
            "backend-cuda",
            "weights",
            "text",
            "model",
            "selftest",
            "engine",
            "server",
        ],
    ),
    ("xtask", &[]),
];

const RULE: &str = "arrows";

/// Every dependency between crates of the workspace is one of [`ARROWS`].
pub fn only_downward(tree: &Tree) -> Vec<Violation> {
    let mut found = Vec::new();
    for folder in tree.crates() {
        let Some(manifest) = tree.get(&format!("{folder}/Cargo.toml")) else { continue };
        let name = folder.rsplit('/').next().unwrap_or(folder);
        let Some((_, allowed)) = ARROWS.iter().find(|(n, _)| *n == name) else {
            let message =
                format!("crate {name} is not in ARROWS of xtask/src/tidy/arrows.rs; say what it may see");
            found.push(Violation::new(&manifest.path, 1, RULE, message));
            continue;
        };
        for (line, dependency) in workspace_dependencies(manifest) {
            if !allowed.contains(&dependency.as_str()) {
                let message = format!(
                    "{name} must not depend on {dependency}; turn the arrow round, hand the thing down as a value, or \
                     change ARROWS of xtask/src/tidy/arrows.rs and ARCHITECTURE.md"
                );
                found.push(Violation::new(&manifest.path, line, RULE, message));
            }
        }
    }
    found
}

/// Crates of the workspace that a manifest depends on outside of its tests, without their `oxseek-`.
fn workspace_dependencies(manifest: &File) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut in_dependencies = false;
    for (number, line) in manifest.lines() {
        let line = line.trim();
        if let Some(section) = line.strip_prefix('[') {
            let section = section.trim_end_matches(']');
            let last = section.rsplit('.').next().unwrap_or(section);
            // Both `[dependencies]` and `[dependencies.oxseek-tensor]`, for a target or not.
            in_dependencies = !section.contains("dev-dependencies") && section.contains("dependencies");
            if in_dependencies {
                found.extend(last.strip_prefix("oxseek-").map(|d| (number, d.to_string())));
            }
        } else if in_dependencies && !line.starts_with('#') {
            let names = line.split(|c: char| !(c.is_alphanumeric() || c == '-' || c == '_'));
            found.extend(names.filter_map(|n| n.strip_prefix("oxseek-")).map(|d| (number, d.to_string())));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::super::places;
    use super::*;

    #[test]
    fn an_arrow_upward_is_found_however_it_is_written() {
        for manifest in [
            "[dependencies]\noxseek-server.workspace = true\n",
            "[dependencies.oxseek-server]\nworkspace = true\n",
            "[dependencies]\nother = { package = \"oxseek-server\" }\n",
            "[target.'cfg(unix)'.dependencies]\noxseek-server = { path = \"../server\" }\n",
            "[build-dependencies]\noxseek-server.workspace = true\n",
        ] {
            assert_eq!(
                places(only_downward, &[("crates/model/Cargo.toml", manifest)]).len(),
                1,
                "{manifest}"
            );
        }
    }

    #[test]
    fn arrows_downward_and_of_tests_are_free() {
        let manifest = "[package]\nname = \"oxseek-model\"\n[dependencies]\noxseek-tensor.workspace = true\n\
                        [dev-dependencies]\noxseek-backend-cpu.workspace = true\n";
        assert!(places(only_downward, &[("crates/model/Cargo.toml", manifest)]).is_empty());
    }

    #[test]
    fn an_unknown_crate_is_found() {
        assert_eq!(places(only_downward, &[("crates/wasm/Cargo.toml", "")]), ["crates/wasm/Cargo.toml:1"]);
    }
}
