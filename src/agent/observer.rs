//! Hubble's API of this node: from what the agent knows to its sockets.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, Result};
use tokio::sync::watch;

use super::answers::Known;
use super::args::{Config, Routing};
use crate::encryption::Mode;
use crate::flow::Names;
use crate::flow::disk::{self, History, Segments};
use crate::hubble::convert::Converter;
use crate::hubble::events::AgentEvents;
use crate::hubble::export;
use crate::hubble::metrics::FlowMetrics;
use crate::hubble::page;
use crate::hubble::serve::{agent_routes, serve_socket, serve_tcp};
use crate::hubble::service::{NodeObserver, PEERS_WITHIN, PeerNode, Peers, node_name, server_name};
use crate::hubble::stream::Source;
use crate::hubble::tls::Identity;
use crate::kube::Tables;

/// Serves flows until `stopping` turns true.
pub async fn serve(
    known: Arc<Known>,
    names: Arc<Names>,
    history: Option<History>,
    stopping: watch::Receiver<bool>,
) -> Result<()> {
    let args = &known.config.args;
    let hubble = &args.hubble;
    let mut converter = Converter::new(
        &hubble.cluster_name,
        &args.node_name,
        Vec::new(),
        args.network.routing == Routing::Tunnel,
    );
    // Only then a flow that passed was encrypted whatever the other node has published.
    converter.is_encrypted = args.encryption.encryption != Mode::Off && args.encryption.encryption_strict;
    let metrics = FlowMetrics::new(hubble.hubble_metrics_context);
    known.telemetry.register_as("hubble", |registry| registry.register_collector(Box::new(metrics.clone())));
    tokio::spawn(metrics.follow(known.recorder.clone(), names.clone()));
    let recorder = known.recorder.clone();
    let source = Source { recorder, names, converter: Arc::new(converter), history };
    if let Some(path) = hubble.hubble_exporters.clone() {
        let counts = export::Counts::default();
        known.telemetry.register_with(|registry| counts.register(registry));
        tokio::spawn(export::run(path, source.clone(), counts, known.telemetry.parts().clone()));
    }
    let events = Arc::new(AgentEvents::default());
    events.started();
    tokio::spawn(events.clone().follow(known.tables.clone(), known.endpoints.clone()));
    let (told, peers) = watch::channel(Peers::new());
    tokio::spawn(follow_peers(known.config.clone(), known.tables.clone(), told));
    let observer = NodeObserver::new(source, events, peers);
    if let Some(address) = hubble.hubble_page_address {
        let routes = page::routes(Arc::new(observer.clone()), page::Hosts::default());
        let serving = page::serve(address, routes, stopping.clone());
        tokio::spawn(async move {
            if let Err(error) = serving.await {
                tracing::error!(error = crate::error::chain(&error), "the flows page is not served");
            }
        });
    }
    let routes = agent_routes(observer).await?;
    let path = hubble.socket(&args.socket);
    let socket = serve_socket(&path, routes.clone(), stopping.clone());
    let Some(address) = hubble.hubble_listen else { return socket.await };
    let identity = hubble.hubble_tls_dir.as_deref().filter(|_| !hubble.hubble_plain_text);
    let identity = identity.map(|directory| Arc::new(Identity::new(directory)));
    tokio::select! {
        served = socket => served,
        served = serve_tcp(address, identity, routes, stopping) => served.context("serving the relay"),
    }
}

/// Reads back what the agent before has left, and goes on writing. What is on disk, for readers.
pub fn keep_on_disk(known: &Known) -> Option<History> {
    let args = &known.config.args;
    let bytes_max = args.flows.flow_history_disk.0;
    if bytes_max == 0 {
        return None;
    }
    let directory = args.state_dir.join("flows");
    let opened = Segments::open(&directory, bytes_max)
        .and_then(|segments| Ok((segments.restore(&known.recorder)?, segments)));
    match opened {
        Ok((restored, segments)) => {
            tracing::info!(restored, "the history of flows is kept on disk");
            let history = segments.history();
            tokio::spawn(disk::keep(segments, known.recorder.clone()));
            Some(history)
        }
        Err(error) => {
            tracing::warn!(
                error = crate::error::chain(&error),
                "the history of flows is not kept on disk; see --flow-history-disk"
            );
            None
        }
    }
}

/// Every node's observer listens where this one does.
async fn follow_peers(config: Config, tables: Arc<Tables>, told: watch::Sender<Peers>) {
    let Some(listen) = config.args.hubble.hubble_listen else { return };
    let hubble = &config.args.hubble;
    let mut news = tables.nodes.subscribe();
    loop {
        let nodes = tables.nodes.snapshot();
        let peer = |(name, node): (&Arc<str>, &Arc<crate::model::Node>)| {
            let address = SocketAddr::new(*node.addresses.first()?, listen.port()).to_string();
            let server_name = (!hubble.hubble_plain_text).then(|| server_name(name, &hubble.cluster_name));
            Some((node_name(name, &hubble.cluster_name), PeerNode { address, server_name }))
        };
        let peers: Peers = nodes.iter().filter_map(peer).collect();
        told.send_if_modified(|current| {
            let is_new = *current != peers;
            *current = peers;
            is_new
        });
        if news.changed().await.is_err() {
            return;
        }
        // Nodes come in crowds.
        tokio::time::sleep(PEERS_WITHIN / 4).await;
    }
}
