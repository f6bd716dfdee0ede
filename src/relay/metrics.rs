//! What the relay counts, and where a collector reads it.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, Result};
use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use tokio::sync::watch;

use super::nodes::{Link, Nodes};
use crate::hubble::proto::observer::GetFlowsResponse;
use crate::hubble::proto::observer::get_flows_response::ResponseTypes;

/// Counts of what clients were told, all from zero.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// Requests for flows.
    pub requests: Counter,
    /// Requests that there was no room for, or that are wrong.
    pub refused: Counter,
    flows: Counter,
    lost: Counter,
}

impl Counts {
    /// Counts an answer that goes to a client.
    pub fn answer(&self, answer: &GetFlowsResponse) {
        match &answer.response_types {
            Some(ResponseTypes::Flow(_)) => self.flows.inc(),
            Some(ResponseTypes::LostEvents(lost)) => self.lost.inc_by(lost.num_events_lost),
            Some(ResponseTypes::NodeStatus(_)) | None => 0,
        };
    }

    /// Registers all of them, with the state of `nodes`.
    pub fn register(&self, nodes: Nodes, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("relay");
        registry.register("requests", "Requests for flows", self.requests.clone());
        registry.register("requests_refused", "Requests for flows that were refused", self.refused.clone());
        registry.register("flows", "Flows sent to clients", self.flows.clone());
        registry.register("lost_events", "Records that clients were told are missing", self.lost.clone());
        registry.register_collector(Box::new(NodeStates(nodes)));
    }
}

/// The nodes by how they can be asked.
struct NodeStates(Nodes);

impl fmt::Debug for NodeStates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("NodeStates").finish()
    }
}

impl Collector for NodeStates {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let view = self.0.subscribe().borrow().clone();
        let count = |is_it: fn(&Link) -> bool| view.values().filter(|node| is_it(&node.link)).count() as i64;
        let states = [
            ("connected", count(|link| matches!(link, Link::Up(_)))),
            ("connecting", count(|link| matches!(link, Link::Connecting))),
            ("unavailable", count(|link| matches!(link, Link::Down(_)))),
        ];
        let mut metric =
            encoder.encode_descriptor("nodes", "Nodes by their connection", None, MetricType::Gauge)?;
        for (state, nodes) in states {
            ConstGauge::new(nodes).encode(metric.encode_family(&[("state", state)])?)?;
        }
        Ok(())
    }
}

/// Serves metrics until `shutdown` turns true.
pub async fn serve(
    address: SocketAddr,
    counts: &Counts,
    nodes: Nodes,
    mut shutdown: watch::Receiver<bool>,
) -> Result<()> {
    let mut registry = Registry::default();
    counts.register(nodes, registry.sub_registry_with_prefix("weir"));
    let listener =
        crate::telemetry::listen(address).await.with_context(|| format!("listening at {address}"))?;
    let routes = Router::new().route("/metrics", get(metrics)).with_state(Arc::new(registry));
    tokio::select! {
        served = axum::serve(listener, routes) => served.context("serving metrics"),
        _ = shutdown.wait_for(|stop| *stop) => Ok(()),
    }
}

async fn metrics(State(registry): State<Arc<Registry>>, headers: HeaderMap) -> Response {
    let mut text = String::new();
    match prometheus_client::encoding::text::encode(&mut text, &registry) {
        Ok(()) => crate::telemetry::readable(text, &headers),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}
