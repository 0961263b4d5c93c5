//! Same op, same file name: the reference, every backend and the conformance suite have the same files.

use std::collections::BTreeSet;

use super::Violation;
use crate::tree::Tree;

const REFERENCE: &str = "crates/tensor/src/reference/";
const CONFORMANCE: &str = "crates/tensor/src/conformance/";
const BACKENDS: [&str; 2] = ["crates/backend-cpu/src/ops/", "crates/backend-cuda/src/ops/"];
/// What the conformance suite has besides the ops.
const CONFORMANCE_OWN: [&str; 2] = ["random.rs", "refusals.rs"];

/// Every op file of the reference is in every backend and in the suite, and the other way round.
pub fn same_files_everywhere(tree: &Tree) -> Vec<Violation> {
    const RULE: &str = "op-files";
    let names = |folder| -> BTreeSet<&str> {
        tree.below(folder)
            .map(|(_, rest)| rest)
            .filter(|r| !r.contains('/') && !CONFORMANCE_OWN.contains(r))
            .collect()
    };
    let reference = names(REFERENCE);
    let mut found = Vec::new();
    for folder in BACKENDS.into_iter().chain([CONFORMANCE]) {
        let there = names(folder);
        for name in reference.difference(&there) {
            let message = format!("{folder}{name} is missing; an op has the same file name everywhere");
            found.push(Violation::new(&format!("{REFERENCE}{name}"), 1, RULE, message));
        }
        for name in there.difference(&reference) {
            let message = format!(
                "{REFERENCE}{name} is missing; an op has its scalar truth in a file of the same name"
            );
            found.push(Violation::new(&format!("{folder}{name}"), 1, RULE, message));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::super::places;
    use super::*;

    #[test]
    fn a_missing_twin_is_found() {
        let files = |cpu: &'static str| {
            [
                ("crates/tensor/src/reference/moe.rs", ""),
                ("crates/tensor/src/conformance/moe.rs", ""),
                ("crates/tensor/src/conformance/random.rs", ""),
                (cpu, ""),
                ("crates/backend-cuda/src/ops/moe.rs", ""),
            ]
        };
        assert!(places(same_files_everywhere, &files("crates/backend-cpu/src/ops/moe.rs")).is_empty());
        let want = ["crates/tensor/src/reference/moe.rs:1", "crates/backend-cpu/src/ops/experts.rs:1"];
        assert_eq!(places(same_files_everywhere, &files("crates/backend-cpu/src/ops/experts.rs")), want);
    }
}
