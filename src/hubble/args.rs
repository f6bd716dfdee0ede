//! Settings of the agent's observer.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use clap::{ArgAction, Args};

use super::convert::DEFAULT_CLUSTER;
use super::metrics::Context;
use crate::settings::SettingError;

/// Flags of `weir agent` for Hubble's API.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Hubble's API")]
pub struct HubbleArgs {
    /// The socket that flows are read from by Hubble's API; by default hubble.sock beside --socket.
    #[arg(long, env = "WEIR_HUBBLE_SOCKET", value_name = "PATH")]
    pub hubble_socket: Option<PathBuf>,

    /// Where the relay reads flows by Hubble's API, as [::]:4244; by default nowhere. Needs --hubble-tls-dir.
    #[arg(long, env = "WEIR_HUBBLE_LISTEN", value_name = "ADDRESS:PORT")]
    pub hubble_listen: Option<SocketAddr>,

    /// A directory with ca.crt, tls.crt and tls.key: the server shows tls.crt and believes clients whose
    /// certificate ca.crt has signed. Files that change are read again.
    #[arg(long, env = "WEIR_HUBBLE_TLS_DIR", value_name = "DIR")]
    pub hubble_tls_dir: Option<PathBuf>,

    /// Serve --hubble-listen to everybody who reaches it, without TLS. For tests.
    #[arg(long, env = "WEIR_HUBBLE_PLAIN_TEXT", action = ArgAction::Set, default_value_t = false)]
    pub hubble_plain_text: bool,

    /// Where the flows page of this node is served over HTTP, as 127.0.0.1:4246; by default nowhere.
    #[arg(long, env = "WEIR_HUBBLE_PAGE_ADDRESS", value_name = "ADDRESS:PORT")]
    pub hubble_page_address: Option<SocketAddr>,

    /// A file that names exporters of flows, as docs/flows.md has it; its changes are followed.
    #[arg(long, env = "WEIR_HUBBLE_EXPORTERS", value_name = "FILE")]
    pub hubble_exporters: Option<PathBuf>,

    /// Which labels of the hubble_* metrics say who the two sides are. Pods are many: each is a series.
    #[arg(long, env = "WEIR_HUBBLE_METRICS_CONTEXT", value_enum, default_value = "none")]
    pub hubble_metrics_context: Context,

    /// Name of the cluster in flows.
    #[arg(long, env = "WEIR_CLUSTER_NAME", value_name = "NAME", default_value = DEFAULT_CLUSTER)]
    pub cluster_name: String,
}

impl HubbleArgs {
    /// The Unix socket of an agent that has its own at `agent`.
    pub fn socket(&self, agent: &Path) -> PathBuf {
        self.hubble_socket.clone().unwrap_or_else(|| socket_beside(agent))
    }

    /// Refuses what cannot be served.
    pub fn check(&self) -> Result<(), SettingError> {
        if let Some(address) = self.hubble_listen
            && self.hubble_tls_dir.is_none()
            && !self.hubble_plain_text
        {
            let allowed = "needs --hubble-tls-dir, or --hubble-plain-text true";
            return Err(SettingError::new("hubble-listen", address, allowed));
        }
        let is_right = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        let name = &self.cluster_name;
        if name.is_empty() || name.len() > 32 || !name.bytes().all(is_right) {
            let allowed = "must be at most 32 lower case letters, digits and dashes";
            return Err(SettingError::new("cluster-name", name, allowed));
        }
        Ok(())
    }
}

/// The observer's socket beside the agent's own.
pub fn socket_beside(agent: &Path) -> PathBuf {
    match agent.file_name().and_then(|name| name.to_str()) {
        Some("agent.sock") | None => agent.with_file_name("hubble.sock"),
        Some(other) => agent.with_file_name(format!("hubble-{other}")),
    }
}
