//! The relay's settings: `RelayArgs` is what was typed, `RelayConfig` is what the code uses.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;

use super::Target;
use crate::settings::{LogArgs, SettingError};

/// Flags of `weir relay`; each can also be set by its environment variable.
#[derive(Args, Clone, Debug)]
pub struct RelayArgs {
    /// Where the nodes are learned: any node's observer, as HOST:PORT or unix:PATH.
    #[arg(
        long,
        env = "WEIR_RELAY_PEERS",
        value_name = "TARGET",
        default_value = "hubble-peer.weir-system.svc:4244"
    )]
    pub relay_peers: String,

    /// The name that the certificate of --relay-peers must have.
    #[arg(
        long,
        env = "WEIR_RELAY_PEERS_NAME",
        value_name = "NAME",
        default_value = "peer.default.hubble-grpc.cilium.io"
    )]
    pub relay_peers_name: String,

    /// A node to ask, as NAME=HOST:PORT or NAME=unix:PATH, in plain text; where one is given, no others are learned.
    #[arg(long, env = "WEIR_RELAY_NODES", value_name = "NAME=TARGET", value_delimiter = ',', value_parser = node)]
    pub relay_node: Vec<(String, String)>,

    /// A directory with ca.crt, tls.crt and tls.key to reach the nodes with; by default in plain text.
    #[arg(long, env = "WEIR_RELAY_TLS_DIR", value_name = "DIR")]
    pub relay_tls_dir: Option<PathBuf>,

    /// Where clients read flows by Hubble's API.
    #[arg(long, env = "WEIR_RELAY_LISTEN", value_name = "ADDRESS:PORT", default_value = "127.0.0.1:4245")]
    pub relay_listen: SocketAddr,

    /// A directory with ca.crt, tls.crt and tls.key: clients must then have a certificate that ca.crt signed.
    #[arg(long, env = "WEIR_RELAY_SERVER_TLS_DIR", value_name = "DIR")]
    pub relay_server_tls_dir: Option<PathBuf>,

    /// Where the flows page is served over HTTP.
    #[arg(
        long,
        env = "WEIR_RELAY_PAGE_ADDRESS",
        value_name = "ADDRESS:PORT",
        default_value = "127.0.0.1:4246"
    )]
    pub relay_page_address: SocketAddr,

    /// Where metrics are served over HTTP.
    #[arg(
        long,
        env = "WEIR_RELAY_METRICS_ADDRESS",
        value_name = "ADDRESS:PORT",
        default_value = "127.0.0.1:9966"
    )]
    pub relay_metrics_address: SocketAddr,

    /// A name by which browsers reach the page, beside addresses, localhost and names of Services.
    #[arg(long, env = "WEIR_RELAY_PAGE_HOST", value_name = "NAME", value_delimiter = ',')]
    pub relay_page_host: Vec<String>,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub log: LogArgs,
}

impl RelayArgs {
    /// Where the nodes are learned.
    pub fn target(&self) -> Target {
        match self.relay_peers.strip_prefix("unix:") {
            Some(path) => Target::Socket(path.into()),
            None => Target::Address(self.relay_peers.clone(), self.relay_peers_name.clone()),
        }
    }
}

fn node(text: &str) -> Result<(String, String), String> {
    let (name, target) = text.split_once('=').ok_or("must be NAME=HOST:PORT or NAME=unix:PATH")?;
    Ok((name.to_owned(), target.to_owned()))
}

/// Validated settings.
#[derive(Clone, Debug)]
pub struct RelayConfig {
    /// As typed, checked.
    pub args: RelayArgs,
}

impl TryFrom<RelayArgs> for RelayConfig {
    type Error = SettingError;

    fn try_from(args: RelayArgs) -> Result<Self, SettingError> {
        let port = args.relay_peers.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
        if !args.relay_peers.starts_with("unix:") && port.is_none() {
            return Err(SettingError::new("relay-peers", args.relay_peers, "must be HOST:PORT or unix:PATH"));
        }
        Ok(Self { args })
    }
}
