//! The container network interface: what a runtime asks through `weir-cni`.
//!
//! ```text
//! runtime --stdin, CNI_* --> weir-cni --socket--> agent (endpoint::Manager)
//!    config, environment      plugin                 does the work
//!    result, error            queue, when the agent is down
//! ```
//!
//! Everything that a runtime hands over is checked here before anything is done
//! with it, and by the agent once more; nothing of it ever becomes part of a path.

mod args;
mod config;
mod environment;
pub mod install;
mod loopback;
mod plugin;
mod queue;
mod result;

pub use args::CniArgs;
pub use plugin::{Outcome, run};
pub use queue::DeleteQueue;

use crate::model::cni::{AddResult, Attachment, Error, ErrorCode, Request, Result, is_identifier};

/// The versions of the specification that `weir-cni` answers, oldest first.
pub const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// The newest of them.
pub const NEWEST_VERSION: &str = VERSIONS[VERSIONS.len() - 1];

#[cfg(test)]
mod tests;
