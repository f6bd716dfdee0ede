//! `/metrics`, `/healthz` and `/readyz` over HTTP.

use std::fmt::Write;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use anyhow::{Context, Result};
use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tracing::{info, warn};

use super::Telemetry;

const CLASSIC: &str = "text/plain; version=0.0.4; charset=utf-8";
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Listens at `address` until `shutdown` turns true.
pub async fn serve(
    address: SocketAddr,
    telemetry: Arc<Telemetry>,
    shutdown: watch::Receiver<bool>,
) -> Result<()> {
    let listener = listen(address).await.with_context(|| format!("listening at {address}"))?;
    serve_on(listener, telemetry, shutdown).await
}

/// `[::]` is every address of both families; where the kernel has no IPv6, every one of IPv4.
pub async fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    match TcpListener::bind(address).await {
        Err(error) if is_without_ipv6(&error) && address.ip() == Ipv6Addr::UNSPECIFIED => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await
        }
        listener => listener,
    }
}

fn is_without_ipv6(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
}

/// As `serve`, on a socket that listens already.
pub async fn serve_on(
    listener: TcpListener,
    telemetry: Arc<Telemetry>,
    mut shutdown: watch::Receiver<bool>,
) -> Result<()> {
    let address = listener.local_addr().context("reading the address of the metrics socket")?;
    info!(%address, "serving metrics and health");
    let routes = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .with_state(telemetry);
    axum::serve(listener, routes)
        .with_graceful_shutdown(async move {
            // A sender that is gone means the same.
            let _ = shutdown.wait_for(|stop| *stop).await;
        })
        .await
        .context("serving metrics")
}

async fn metrics(State(telemetry): State<Arc<Telemetry>>, headers: HeaderMap) -> Response {
    // Reading maps takes system calls; other tasks need not wait for them.
    let text = tokio::task::spawn_blocking(move || telemetry.open_metrics()).await;
    match text {
        Ok(Ok(text)) => readable(text, &headers),
        Ok(Err(_)) | Err(_) => {
            warn!("metrics could not be written");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

/// OpenMetrics text in the form that a collector asks for.
pub fn readable(open_metrics: String, headers: &HeaderMap) -> Response {
    let accept = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
    match accept.contains("application/openmetrics-text") {
        true => ([(header::CONTENT_TYPE, OPEN_METRICS)], open_metrics).into_response(),
        false => ([(header::CONTENT_TYPE, CLASSIC)], classic(&open_metrics)).into_response(),
    }
}

async fn healthz(State(telemetry): State<Arc<Telemetry>>) -> Response {
    match telemetry.stuck_for() {
        None => "ok\n".into_response(),
        Some(silent) => {
            let text = format!("the main loop has been silent for {} s\n", silent.as_secs());
            (StatusCode::SERVICE_UNAVAILABLE, text).into_response()
        }
    }
}

async fn readyz(State(telemetry): State<Arc<Telemetry>>) -> Response {
    let pending = telemetry.pending();
    if pending.is_empty() {
        return "ok\n".into_response();
    }
    (StatusCode::SERVICE_UNAVAILABLE, format!("waiting for: {}\n", pending.join(", "))).into_response()
}

/// OpenMetrics as the classic text format, which every collector reads: there a
/// counter's family has the name of its samples, and there are no units and no end mark.
pub(super) fn classic(open: &str) -> String {
    let mut text = String::with_capacity(open.len());
    let mut help = None;
    for line in open.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            help = rest.split_once(' ');
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' '))
        {
            let (suffix, kind) = match kind {
                "counter" => ("_total", "counter"),
                "info" => ("_info", "gauge"),
                "unknown" => ("", "untyped"),
                kind => ("", kind),
            };
            if let Some((_, words)) = help.take().filter(|(of, _)| *of == name) {
                let _infallible = writeln!(text, "# HELP {name}{suffix} {words}");
            }
            let _infallible = writeln!(text, "# TYPE {name}{suffix} {kind}");
        } else if !line.starts_with('#') {
            text.push_str(line);
            text.push('\n');
        }
    }
    text
}
