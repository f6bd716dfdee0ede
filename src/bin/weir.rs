//! The `weir` program: the agent, and the command line for people.

use std::process::ExitCode;

use clap::Parser;
use weir::cli::{self, Cli, Failure};

/// 0: done; 1: it did not work; 2: wrong usage (clap's), or nothing could be tried; 3: not ready.
fn main() -> ExitCode {
    match cli::run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) if failure.is_broken_pipe() => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("weir: {failure}");
            match failure {
                Failure::NotReady(_) => ExitCode::from(3),
                Failure::NotTried(_) => ExitCode::from(2),
                _ => ExitCode::FAILURE,
            }
        }
    }
}
