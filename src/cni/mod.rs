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

mod config;
mod environment;
mod error;
pub mod install;
mod loopback;
mod plugin;
mod queue;
mod request;
mod result;

pub use error::{Error, ErrorCode};
pub use plugin::{Outcome, run};
pub use queue::DeleteQueue;
pub use request::{AddResult, Attachment, Request};

/// The versions of the specification that `weir-cni` answers, oldest first.
pub const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// The newest of them.
pub const NEWEST_VERSION: &str = VERSIONS[VERSIONS.len() - 1];

/// The result of everything here that can refuse.
pub type Result<T> = std::result::Result<T, Error>;

#[cfg(test)]
mod tests;
