//! `weir relay`: the flows of every node in one stream, by Hubble's API and on the page.
//!
//! ```text
//! peer.Peer of any node -> nodes: a connection each, tried again -> fan: a request to every node -> merge by time -> client
//! ```
//!
//! A node that does not answer is named in the answer, and the others' flows are shown all the same.

mod args;
mod fan;
pub(crate) mod metrics;
mod nodes;
mod server;

use std::sync::Arc;

use anyhow::{Context, Result};
use tokio::sync::watch;

pub use args::{RelayArgs, RelayConfig};
pub use nodes::{Link, Nodes, Target};
pub use server::Relay;

use crate::hubble::page;
use crate::hubble::serve::serve_tcp;
use crate::hubble::tls::Identity;
use crate::signals::stop_at_signal;

/// Runs until SIGTERM or SIGINT.
pub async fn run(config: RelayConfig) -> Result<()> {
    let args = config.args;
    let (stop, stopping) = watch::channel(false);
    tokio::spawn(stop_at_signal(stop, "nodes keep their flows"));
    let identity = args.relay_tls_dir.as_deref().map(|directory| Arc::new(Identity::new(directory)));
    let nodes = Nodes::new(identity);
    for (name, target) in &args.relay_node {
        nodes.add(name, target);
    }
    if args.relay_node.is_empty() {
        tokio::spawn(nodes.clone().follow(args.target()));
    }
    let relay = Relay::new(nodes.clone());
    let metrics = metrics::serve(args.relay_metrics_address, relay.counts(), nodes, stopping.clone());
    let server_identity =
        args.relay_server_tls_dir.as_deref().map(|directory| Arc::new(Identity::new(directory)));
    let routes = relay.routes().await?;
    let grpc = serve_tcp(args.relay_listen, server_identity, routes, stopping.clone());
    let pages = page::routes(Arc::new(relay.clone()), page::Hosts(args.relay_page_host.clone()));
    let page = page::serve(args.relay_page_address, pages, stopping);
    tokio::select! {
        served = grpc => served.context("serving clients"),
        served = page => served.context("serving the page"),
        served = metrics => served.context("serving metrics"),
    }
}

#[cfg(test)]
mod tests;
