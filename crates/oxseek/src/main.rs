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

use std::{process::ExitCode, time::Instant};

use clap::Parser;

use args::{Args, Command};
use failure::Failure;

fn main() -> ExitCode {
    let started = Instant::now();
    let result = match Args::parse().command {
        Command::Run(a) => run::run(&a),
        Command::Chat(a) => chat::chat(&a),
        Command::Serve(a) => serve::serve(a),
        Command::Inspect(a) => inspect::inspect(&a),
        Command::Plan(a) => plan::plan(&a),
        Command::Bench(a) => bench::bench(&a, started),
        Command::Quantize(a) => quantize::quantize(&a),
        Command::Synth(a) => synth::synth(&a),
        Command::Selftest(a) => selftest::selftest(&a),
    };
    match result {
        // A reader that left (`oxseek run ... | head -1`) is no error of ours.
        Ok(()) | Err(Failure::OutputClosed) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("oxseek: {failure}");
            failure.exit_code()
        }
    }
}
