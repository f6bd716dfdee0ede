//! What the settings of all programs have in common: how one is refused, and the form of the log.
//!
//! Each module that reads settings declares them itself, as a group of arguments
//! (`datapath::MapArgs`, `flow::FlowArgs`); a program's settings are a struct of groups.
//! `cli::settings` has the list of the programs.

use std::fmt::Display;
use std::ops::RangeInclusive;

use clap::{Args, ValueEnum};
use thiserror::Error;

/// Why a setting was refused.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("--{setting} {given}: {allowed}")]
pub struct SettingError {
    setting: &'static str,
    given: String,
    allowed: String,
}

impl SettingError {
    /// `setting` was `given`, and `allowed` says what it may be.
    pub fn new(setting: &'static str, given: impl Display, allowed: impl Into<String>) -> Self {
        Self { setting, given: given.to_string(), allowed: allowed.into() }
    }
}

/// Refuses a number outside of a range.
pub fn within<N: PartialOrd + Display>(
    setting: &'static str,
    given: N,
    allowed: RangeInclusive<N>,
) -> Result<(), SettingError> {
    if allowed.contains(&given) {
        return Ok(());
    }
    Err(SettingError::new(setting, given, format!("must be {} to {}", allowed.start(), allowed.end())))
}

/// Settings of the log; `WEIR_LOG` says what is logged, and is read before all others.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Log")]
pub struct LogArgs {
    /// Form of the log.
    #[arg(long, env = "WEIR_LOG_FORMAT", value_enum, default_value = "text")]
    pub log_format: LogFormat,
}

/// Form of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// One JSON object a line.
    Json,
}
