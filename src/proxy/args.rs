//! The proxy's arguments. The agent starts the proxy and knows them; they are no settings of a cluster.

use std::path::PathBuf;

use clap::Args;

use crate::settings::{LogArgs, SettingError, within};

use super::limits::Limits;

/// Flags of `weir proxy`.
#[derive(Args, Clone, Debug)]
pub struct ProxyArgs {
    /// The agent's socket, which brings listeners and rules.
    #[arg(long, value_name = "PATH")]
    pub control: PathBuf,

    /// Threads that carry connections; 0: one for two processors.
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    pub threads: usize,

    /// The most connections at the expense of one pod.
    #[arg(long, value_name = "NUMBER", default_value_t = Limits::default().connections_per_endpoint)]
    pub connections_per_endpoint: usize,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub log: LogArgs,
}

/// Validated arguments.
#[derive(Clone, Debug)]
pub struct ProxyConfig {
    /// As typed, checked.
    pub args: ProxyArgs,
    /// The bounds.
    pub limits: Limits,
}

impl TryFrom<ProxyArgs> for ProxyConfig {
    type Error = SettingError;

    fn try_from(args: ProxyArgs) -> Result<Self, SettingError> {
        within("threads", args.threads, 0..=256)?;
        within("connections-per-endpoint", args.connections_per_endpoint, 1..=1_000_000)?;
        let limits = Limits { connections_per_endpoint: args.connections_per_endpoint, ..Limits::default() };
        Ok(Self { args, limits })
    }
}

impl ProxyConfig {
    /// How many threads carry connections.
    pub fn threads(&self) -> usize {
        match self.args.threads {
            0 => std::thread::available_parallelism().map_or(1, |count| count.get().div_ceil(2)),
            threads => threads,
        }
    }
}
