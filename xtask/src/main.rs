//! Chores of this repository: `cargo xtask tidy` checks the rules that a compiler cannot, `cargo xtask cuda` builds the
//! kernels of `backend-cuda`.
#![forbid(unsafe_code)]

mod cuda;
mod rust_source;
mod tidy;
mod tree;

use std::process::ExitCode;

const USAGE: &str = "usage: cargo xtask tidy    checks the rules of this repository that a compiler cannot
       cargo xtask cuda    builds the kernels of backend-cuda with nvcc";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments == ["cuda"] {
        return match cuda::build(&tree::root()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(why) => {
                eprintln!("cuda: {why}");
                ExitCode::FAILURE
            }
        };
    }
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
