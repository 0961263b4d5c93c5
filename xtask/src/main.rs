//! Chores of this repository: `cargo xtask tidy` checks the rules that a compiler cannot.
#![forbid(unsafe_code)]

mod rust_source;
mod tidy;
mod tree;

use std::process::ExitCode;

const USAGE: &str = "usage: cargo xtask tidy    checks the rules of this repository that a compiler cannot";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments != ["tidy"] {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    }
    match tree::Tree::of_repository() {
        Ok(tree) => tidy::report(&tree),
        Err(why) => {
            eprintln!("tidy: {why}");
            ExitCode::from(2)
        }
    }
}
