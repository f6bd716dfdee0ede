//! `weir wireguard`: the process that encrypts where the kernel has no WireGuard.

use std::path::PathBuf;

use clap::Args;

use super::Failure;
use super::agent::log;
use crate::encryption::{protocol, side};
use crate::settings::LogArgs;

#[derive(Args)]
pub struct WireguardArgs {
    /// Where it listens for the agent.
    #[arg(long, value_name = "PATH", default_value = protocol::DEFAULT_SOCKET)]
    socket: PathBuf,
    #[command(flatten)]
    log: LogArgs,
}

/// Runs until its device is gone.
pub fn run(args: &WireguardArgs) -> Result<(), Failure> {
    log(args.log.log_format);
    Ok(side::run(&args.socket)?)
}
