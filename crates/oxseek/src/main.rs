//! `oxseek`: runs and serves models of the DeepSeek family.
#![forbid(unsafe_code)]

mod args;
mod bench;
mod chat;
mod conversation;
#[cfg(feature = "demo")]
mod demo;
mod device;
mod failure;
#[cfg(feature = "demo")]
mod format_table;
mod formats;
mod inspect;
mod key;
mod memory;
mod open;
mod pieces;
mod plan;
mod progress;
mod quantize;
mod run;
mod selftest;
mod serve;
mod synth;
mod terminal;
mod wording;

use std::{ffi::OsString, process::ExitCode, time::Instant};

use clap::{CommandFactory, FromArgMatches};

use args::{Args, Command};
use failure::Failure;

fn main() -> ExitCode {
    let started = Instant::now();
    let result = arguments().and_then(|args| match args.command {
        Command::Run(a) => run::run(&a),
        Command::Chat(a) => chat::chat(&a),
        Command::Serve(a) => serve::serve(a),
        Command::Key(a) => key::key(a),
        Command::Inspect(a) => inspect::inspect(&a),
        Command::Plan(a) => plan::plan(&a),
        Command::Bench(a) => bench::bench(&a, started),
        Command::Quantize(a) => quantize::quantize(&a),
        Command::Synth(a) => synth::synth(&a),
        Command::Selftest(a) => selftest::selftest(&a),
    });
    match result {
        // A reader that left (`oxseek run ... | head -1`) is no error of ours.
        Ok(()) | Err(Failure::OutputClosed) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("oxseek: {failure}");
            failure.exit_code()
        }
    }
}

/// The command line, the environment and the configuration file.
fn arguments() -> Result<Args, Failure> {
    let given: Vec<OsString> = std::env::args_os().collect();
    let command = serve::config::with_config(Args::command(), &given)?;
    let mut matches = command.get_matches_from(given);
    Ok(Args::from_arg_matches_mut(&mut matches).unwrap_or_else(|e| e.exit()))
}
