//! `cargo xtask tidy`: rules that are worth having, each a small function with a test that proves it can fire.

mod arrows;
mod budgets;
mod lines;
mod names;
mod ops;
mod orphans;
mod paths;
mod unsafety;
mod words;

use std::{fmt, process::ExitCode};

use crate::tree::Tree;

/// One place that breaks a rule.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Violation {
    pub path: String,
    pub line: usize,
    pub rule: &'static str,
    /// What is wrong and what to do.
    pub message: String,
}

impl Violation {
    fn new(path: &str, line: usize, rule: &'static str, message: impl Into<String>) -> Self {
        Self { path: path.into(), line, rule, message: message.into() }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}: {}", self.path, self.line, self.rule, self.message)
    }
}

type Rule = fn(&Tree) -> Vec<Violation>;

const RULES: [Rule; 13] = [
    arrows::only_downward,
    unsafety::only_where_allowed,
    unsafety::every_block_says_why,
    orphans::every_module_is_reached,
    orphans::every_test_file_tests,
    names::files_are_nouns,
    words::nothing_unfinished,
    paths::no_machine_in_strings,
    paths::no_outside_world,
    budgets::size,
    budgets::packages,
    lines::not_too_long,
    ops::same_files_everywhere,
];

/// Checks everything and prints what was found.
pub fn report(tree: &Tree) -> ExitCode {
    let mut violations: Vec<Violation> = RULES.iter().flat_map(|rule| rule(tree)).collect();
    violations.sort();
    for v in &violations {
        println!("{v}");
    }
    println!("tidy: {}; {}", budgets::summary(tree), count(violations.len()));
    if violations.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn count(violations: usize) -> String {
    match violations {
        0 => "no violations".into(),
        1 => "1 violation".into(),
        n => format!("{n} violations"),
    }
}

/// What `rule` finds in files made up for a test, as `path:line`.
#[cfg(test)]
fn places(rule: Rule, files: &[(&str, &str)]) -> Vec<String> {
    rule(&crate::tree::tree(files)).into_iter().map(|v| format!("{}:{}", v.path, v.line)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_violation_reads_as_editors_expect() {
        let v = Violation::new("a/b.rs", 7, "rule", "do this");
        assert_eq!(v.to_string(), "a/b.rs:7: rule: do this");
    }
}
