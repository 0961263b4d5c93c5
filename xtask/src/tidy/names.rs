//! What files are called.

use super::Violation;
use crate::tree::Tree;

/// Names under which anything may hide.
const VAGUE: [&str; 9] =
    ["common", "helper", "helpers", "manager", "managers", "misc", "util", "utils", "utilities"];

/// No file and no folder of modules has a name that says nothing.
pub fn files_are_nouns(tree: &Tree) -> Vec<Violation> {
    let mut found = Vec::new();
    for file in &tree.files {
        let (folders, name) = file.path.rsplit_once('/').unwrap_or(("", &file.path));
        let stem = name.split('.').next().unwrap_or(name);
        // In `tests` a shared module must be a folder, and cargo's book calls it `common`.
        let source = folders.split_once("src/").map_or("", |(_, below)| below);
        if let Some(vague) = source.split('/').chain([stem]).find(|part| VAGUE.contains(part)) {
            let message = format!("{vague:?} says nothing; name it after the thing that it holds");
            found.push(Violation::new(&file.path, 1, "vague-name", message));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::super::places;
    use super::*;

    #[test]
    fn vague_names_are_found() {
        for path in ["crates/a/src/utils.rs", "crates/a/src/helpers/x.rs", "scripts/misc.sh"] {
            assert_eq!(places(files_are_nouns, &[(path, "")]), [format!("{path}:1")]);
        }
        for path in ["crates/a/src/sampler.rs", "crates/a/tests/common/mod.rs", "utils/README.md"] {
            assert!(places(files_are_nouns, &[(path, "")]).is_empty(), "{path}");
        }
    }
}
