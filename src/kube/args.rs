//! Settings of the sources: where objects come from, and the times that agents and operator agree on.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;

use crate::settings::{SettingError, within};

/// How to reach the Kubernetes API.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Kubernetes API")]
pub struct ApiArgs {
    /// Reach the Kubernetes API with this file; without it, as a pod does.
    #[arg(long, env = "WEIR_KUBECONFIG", value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,

    /// API servers to begin with, as HOST:PORT; later those of the `kubernetes` Service's
    /// EndpointSlice, which agents remember in the state directory.
    #[arg(
        long,
        env = "WEIR_API_SERVERS",
        value_name = "HOST:PORT",
        value_delimiter = ',',
        conflicts_with = "kubeconfig"
    )]
    pub api_servers: Vec<String>,
}

impl ApiArgs {
    /// Refuses what is no address of a server.
    pub fn check(&self) -> Result<(), SettingError> {
        match self.api_servers.iter().find(|server| !is_server(server)) {
            None => Ok(()),
            Some(server) => Err(SettingError::new(
                "api-servers",
                server,
                "must be HOST:PORT, an IPv6 address in brackets",
            )),
        }
    }
}

/// Times that agents and operator must agree on.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Cluster")]
pub struct TimingArgs {
    /// Time without a heartbeat after which the operator taints a node. Agents send four heartbeats in
    /// this time.
    #[arg(long, env = "WEIR_NODE_STALE_SECONDS", value_name = "SECONDS", default_value_t = 60)]
    pub node_stale_seconds: u32,

    /// Time without a pod after which an identity is deleted: by the operator, with --manifests by the
    /// agents.
    #[arg(long, env = "WEIR_IDENTITY_GRACE_SECONDS", value_name = "SECONDS", default_value_t = 900)]
    pub identity_grace_seconds: u32,
}

impl TimingArgs {
    /// Refuses times that are too short or too long.
    pub fn check(&self) -> Result<(), SettingError> {
        within("node-stale-seconds", self.node_stale_seconds, 4..=3600)?;
        within("identity-grace-seconds", self.identity_grace_seconds, 1..=604_800)
    }
}

/// HOST:PORT, where HOST is a name, an IPv4 address or a bracketed IPv6 address.
fn is_server(text: &str) -> bool {
    if let Ok(address) = text.parse::<SocketAddr>() {
        return address.port() != 0;
    }
    text.rsplit_once(':').is_some_and(|(host, port)| {
        let is_host = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.';
        !host.is_empty() && host.bytes().all(is_host) && port.parse::<u16>().is_ok_and(|port| port != 0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn api_servers_are_hosts_and_ports() {
        for good in ["10.0.0.1:6443", "[fd00::1]:6443", "api.example.org:443"] {
            assert!(is_server(good), "{good}");
        }
        for nonsense in ["10.0.0.1", "https://10.0.0.1:6443", "fd00::1", ":6443", "host:0", "host:70000"] {
            assert!(!is_server(nonsense), "{nonsense}");
        }
    }
}
