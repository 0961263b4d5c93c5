//! What ends the program early, and with which exit code.

use std::{io, process::ExitCode};

use thiserror::Error;

/// What ends the program early.
#[derive(Debug, Error)]
pub enum Failure {
    /// The command line asks for something that cannot be. Exit code 2, as clap's own.
    #[error("{0}")]
    Usage(String),
    /// The model cannot be used. Exit code 3.
    #[error("cannot load the model: {0}")]
    Model(String),
    /// Something failed while running. Exit code 1.
    #[error("{0}")]
    Run(String),
    /// A self-test did not hold. Exit code 4.
    #[error("self-test: {0}")]
    Selftest(String),
    /// Whoever read our output went away.
    #[error("output closed")]
    OutputClosed,
    /// Stopped by Ctrl-C. Exit code 130, as shells have it.
    #[error("interrupted")]
    Interrupted,
}

impl Failure {
    /// The exit code.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self {
            Failure::Usage(_) => 2,
            Failure::Model(_) => 3,
            Failure::Run(_) => 1,
            Failure::Selftest(_) => 4,
            Failure::OutputClosed => 0,
            Failure::Interrupted => 130,
        })
    }
}

impl From<io::Error> for Failure {
    fn from(e: io::Error) -> Self {
        match e.kind() {
            io::ErrorKind::BrokenPipe => Failure::OutputClosed,
            _ => Failure::Run(e.to_string()),
        }
    }
}
