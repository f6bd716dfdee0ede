//! The flows page and the HTTP API behind it: `GET /api/flows` as server-sent events, `GET /api/status`, and
//! `POST /api/allow`, which answers a denied flow with the rule that would allow it.
//!
//! The relay serves it for the cluster, an agent for its own node where it is asked to.

mod assets;
mod events;
mod guard;

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, Result};
use axum::Router;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{StatusCode, header};
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};

use super::json::{from_str, to_value};
use super::proto::observer::get_flows_response::ResponseTypes;
use super::proto::observer::{GetFlowsRequest, GetFlowsResponse, GetNodesResponse, ServerStatusResponse};
use super::proto::relay::NodeState;
use super::service::Answers;
pub use events::moment;
pub use guard::Hosts;

/// Pages that may follow flows at once.
const STREAMS_MAX: usize = 64;
/// The longest flow that a page may send.
const FLOW_MAX: usize = 256 << 10;

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
        .route("/api/allow", post(allow).layer(DefaultBodyLimit::max(FLOW_MAX)))
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

/// The rule that would allow the flow of one message of the stream: its YAML and notes, or why there is none.
async fn allow(message: String) -> Response {
    let flow = match from_str::<GetFlowsResponse>(&message).map(|message| message.response_types) {
        Ok(Some(ResponseTypes::Flow(flow))) => flow,
        Ok(_) => return refuse(StatusCode::BAD_REQUEST, "the message has no flow"),
        Err(error) => return refuse(StatusCode::BAD_REQUEST, format!("this is no flow: {error}")),
    };
    let answer = match super::suggest::rule_for(&flow) {
        Ok(rule) => json!({"yaml": rule.yaml, "notes": rule.notes}),
        Err(why) => json!({"none": why}),
    };
    ([(header::CONTENT_TYPE, "application/json"), (header::CACHE_CONTROL, "no-store")], answer.to_string())
        .into_response()
}

/// A refusal in words.
fn refuse(status: StatusCode, words: impl Into<String>) -> Response {
    (status, [(header::CONTENT_TYPE, "text/plain; charset=utf-8")], words.into() + "\n").into_response()
}

#[cfg(test)]
mod tests;
