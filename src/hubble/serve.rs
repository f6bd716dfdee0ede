//! Where the services are reached: a Unix socket, and TCP with mutual TLS.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use anyhow::{Context, Result};
use futures::Stream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::Connected;

use super::proto::DESCRIPTORS;
use super::proto::observer::observer_server::ObserverServer;
use super::proto::peer::peer_server::PeerServer;
use super::service::NodeObserver;
use super::tls::Identity;

/// The name under which clients ask for the observer's health.
pub const HEALTH_SERVICE: &str = "hubble.server.Observer";
/// Larger requests are refused.
pub const REQUEST_BYTES_MAX: usize = 1024 * 1024;
/// Connections that are made ready at once; others wait.
const HANDSHAKES_MAX: usize = 64;
/// A client that has not finished its handshake by then is cut off.
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(10);
/// Answers in progress have so long at shutdown.
const LAST_WORDS: Duration = Duration::from_millis(200);
/// A client that is silent for so long is asked whether it is there.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// A connection of any kind; it ends when its server stops, whatever is being answered on it.
pub struct Connection {
    stream: Box<dyn Io>,
    stopped: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

impl Connection {
    /// A connection that is ready for HTTP/2.
    pub fn new(stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> Self {
        Self { stream: Box::new(stream), stopped: None }
    }

    fn until(mut self, mut shutdown: watch::Receiver<bool>) -> Self {
        self.stopped = Some(Box::pin(async move {
            let _ = shutdown.wait_for(|stop| *stop).await;
            tokio::time::sleep(LAST_WORDS).await;
        }));
        self
    }
}

trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// Every service of an agent.
pub async fn agent_routes(observer: NodeObserver) -> Result<Routes> {
    Ok(common_routes()
        .await?
        .add_service(ObserverServer::new(observer.clone()).max_decoding_message_size(REQUEST_BYTES_MAX))
        .add_service(PeerServer::new(observer).max_decoding_message_size(REQUEST_BYTES_MAX)))
}

/// Health and reflection.
pub async fn common_routes() -> Result<Routes> {
    let (reporter, health) = tonic_health::server::health_reporter();
    for name in [HEALTH_SERVICE, "observer.Observer", ""] {
        reporter.set_service_status(name, tonic_health::ServingStatus::Serving).await;
    }
    let reflection =
        || tonic_reflection::server::Builder::configure().register_encoded_file_descriptor_set(DESCRIPTORS);
    let v1 = reflection().build_v1().context("describing the services")?;
    let v1alpha = reflection().build_v1alpha().context("describing the services")?;
    Ok(Routes::new(health).add_service(v1).add_service(v1alpha))
}

/// Serves at a Unix socket of root's until `shutdown` turns true.
pub async fn serve_socket(path: &Path, routes: Routes, shutdown: watch::Receiver<bool>) -> Result<()> {
    let listener = crate::api::bind(path)?;
    let served = serve_connections(UnixListenerStream::new(listener), routes, shutdown).await;
    let _ = std::fs::remove_file(path);
    served.with_context(|| format!("serving flows at {}", path.display()))
}

/// Serves at a TCP address until `shutdown` turns true: with mutual TLS, or in plain text where there is no identity.
pub async fn serve_tcp(
    address: SocketAddr,
    identity: Option<Arc<Identity>>,
    routes: Routes,
    shutdown: watch::Receiver<bool>,
) -> Result<()> {
    let listener =
        crate::telemetry::listen(address).await.with_context(|| format!("listening at {address}"))?;
    serve_listener(listener, identity, routes, shutdown).await
}

/// As `serve_tcp`, on a socket that listens already.
pub async fn serve_listener(
    listener: TcpListener,
    identity: Option<Arc<Identity>>,
    routes: Routes,
    shutdown: watch::Receiver<bool>,
) -> Result<()> {
    let address = listener.local_addr().context("reading the address of the flows socket")?;
    tracing::info!(%address, tls = identity.is_some(), "serving flows");
    let (ready, connections) = mpsc::channel(1);
    let accepting = tokio::spawn(accept(listener, identity, ready, shutdown.clone()));
    let served = serve_connections(ReceiverStream::new(connections), routes, shutdown).await;
    accepting.abort();
    served.with_context(|| format!("serving flows at {address}"))
}

async fn serve_connections<S, C>(
    connections: S,
    routes: Routes,
    mut shutdown: watch::Receiver<bool>,
) -> Result<(), tonic::transport::Error>
where
    S: Stream<Item = io::Result<C>>,
    C: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
{
    // Followers never end by themselves: the streams of those are cut at the end.
    let mut stopping = shutdown.clone();
    let stopped = async move {
        let _ = stopping.wait_for(|stop| *stop).await;
    };
    let serving = Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .add_routes(routes)
        .serve_with_incoming_shutdown(connections, stopped);
    let cut = async move {
        let _ = shutdown.wait_for(|stop| *stop).await;
        tokio::time::sleep(2 * LAST_WORDS).await;
    };
    tokio::select! {
        served = serving => served,
        () = cut => Ok(()),
    }
}

/// Accepts for ever. Handshakes happen beside one another: a slow client keeps nobody waiting.
async fn accept(
    listener: TcpListener,
    identity: Option<Arc<Identity>>,
    ready: mpsc::Sender<io::Result<Connection>>,
    shutdown: watch::Receiver<bool>,
) {
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    loop {
        let Ok(slot) = handshakes.clone().acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "accepting a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let (identity, ready, shutdown) = (identity.clone(), ready.clone(), shutdown.clone());
        tokio::spawn(async move {
            match timeout(HANDSHAKE_WITHIN, prepare(stream, identity)).await {
                Ok(Ok(connection)) => drop(ready.send(Ok(connection.until(shutdown))).await),
                Ok(Err(error)) => {
                    tracing::debug!(error = crate::error::chain(&error), "refused a client of flows");
                }
                Err(_) => tracing::debug!("a client of flows did not finish its handshake"),
            }
            drop(slot);
        });
    }
}

async fn prepare(stream: TcpStream, identity: Option<Arc<Identity>>) -> Result<Connection> {
    stream.set_nodelay(true).context("setting TCP_NODELAY")?;
    let Some(identity) = identity else { return Ok(Connection::new(stream)) };
    let config =
        tokio::task::spawn_blocking(move || identity.server()).await.context("reading certificates")??;
    Ok(Connection::new(TlsAcceptor::from(config).accept(stream).await.context("the TLS handshake")?))
}

impl Connected for Connection {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.stopped.as_mut().is_some_and(|stopped| stopped.as_mut().poll(context).is_ready()) {
            this.stopped = Some(Box::pin(std::future::ready(())));
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut *this.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut std::task::Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut std::task::Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.stream).poll_shutdown(context)
    }
}
