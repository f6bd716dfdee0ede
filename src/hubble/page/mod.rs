//! The flows page and the HTTP API behind it: `GET /api/flows` as server-sent events, `GET /api/status`.
//!
//! The relay serves it for the cluster, an agent for its own node where it is asked to.

mod assets;
mod events;
mod guard;

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, Result};
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};

use super::json::to_value;
use super::proto::observer::{GetFlowsRequest, GetFlowsResponse, GetNodesResponse, ServerStatusResponse};
use super::proto::relay::NodeState;
use super::service::Answers;
pub use events::moment;
pub use guard::Hosts;

/// Pages that may follow flows at once.
const STREAMS_MAX: usize = 64;

/// Where a page's flows come from: an agent's own, or those of all nodes.
#[tonic::async_trait]
pub trait Flows: Send + Sync + 'static {
    /// The answers to a request.
    fn flows(&self, request: GetFlowsRequest) -> Result<Answers<GetFlowsResponse>, tonic::Status>;
    /// How the observers are.
    async fn status(&self) -> ServerStatusResponse;
    /// Each of them.
    async fn nodes(&self) -> GetNodesResponse;
}

/// What every request needs.
#[derive(Clone)]
struct Page {
    flows: Arc<dyn Flows>,
    streams: Arc<Semaphore>,
}

/// The routes of the page.
pub fn routes(flows: Arc<dyn Flows>, hosts: Hosts) -> Router {
    let page = Page { flows, streams: Arc::new(Semaphore::new(STREAMS_MAX)) };
    Router::new()
        .route("/api/flows", get(events::flows))
        .route("/api/status", get(status))
        .route("/healthz", get(async || "ok\n"))
        .fallback(get(assets::asset))
        .with_state(page)
        .layer(middleware::from_fn_with_state(Arc::new(hosts), guard::guard))
}

/// Serves the page until `shutdown` turns true.
pub async fn serve(address: SocketAddr, routes: Router, shutdown: watch::Receiver<bool>) -> Result<()> {
    let listener =
        crate::telemetry::listen(address).await.with_context(|| format!("listening at {address}"))?;
    serve_on(listener, routes, shutdown).await
}

/// As `serve`, on a socket that listens already.
pub async fn serve_on(
    listener: TcpListener,
    routes: Router,
    mut shutdown: watch::Receiver<bool>,
) -> Result<()> {
    let address = listener.local_addr().context("reading the address of the page's socket")?;
    tracing::info!(%address, "serving the flows page");
    tokio::select! {
        served = axum::serve(listener, routes) => served.context("serving the flows page"),
        _ = shutdown.wait_for(|stop| *stop) => Ok(()),
    }
}

async fn status(State(page): State<Page>) -> Response {
    let (status, nodes) = (page.flows.status().await, page.flows.nodes().await);
    let mut value = to_value(&status);
    let mut nodes = to_value(&nodes).get_mut("nodes").map(Value::take).unwrap_or_else(|| json!([]));
    for node in nodes.as_array_mut().into_iter().flatten() {
        // A state that is the default has no field.
        if node.get("state").is_none() {
            node["state"] = NodeState::UnknownNodeState.as_str_name().into();
        }
    }
    value["nodes"] = nodes;
    ([(header::CONTENT_TYPE, "application/json"), (header::CACHE_CONTROL, "no-store")], value.to_string())
        .into_response()
}

/// A refusal in words.
fn refuse(status: StatusCode, words: impl Into<String>) -> Response {
    (status, [(header::CONTENT_TYPE, "text/plain; charset=utf-8")], words.into() + "\n").into_response()
}

#[cfg(test)]
mod tests;
