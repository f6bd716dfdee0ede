//! Reaching an observer: at a Unix socket, in plain text, or with mutual TLS.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint, Uri};
use tower::service_fn;

use super::serve::Connection;
use super::tls::Identity;

/// A node that does not answer within this time is unavailable.
pub const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// A silent connection is probed so often: a node that is gone is noticed.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// Larger answers are refused.
pub const ANSWER_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Connects to `host:port`, or to `unix:path`; with `identity` by TLS, to a server of that name.
pub async fn connect(
    address: &str,
    identity: Option<&Identity>,
    server_name: Option<&str>,
) -> Result<Channel> {
    connect_by(endpoint()?, address, identity, server_name).await
}

/// As `connect`, without probes: servers of others take frequent ones for an attack.
pub async fn connect_quietly(
    address: &str,
    identity: Option<&Identity>,
    server_name: Option<&str>,
) -> Result<Channel> {
    let endpoint = Endpoint::try_from("http://collector").context("naming the server")?;
    connect_by(endpoint.connect_timeout(CONNECT_WITHIN), address, identity, server_name).await
}

async fn connect_by(
    endpoint: Endpoint,
    address: &str,
    identity: Option<&Identity>,
    server_name: Option<&str>,
) -> Result<Channel> {
    if let Some(path) = address.strip_prefix("unix:") {
        return connect_socket(Path::new(path)).await;
    }
    let tls = match identity {
        None => None,
        Some(identity) => {
            let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
            let name = server_name.unwrap_or_else(|| host.trim_matches(['[', ']'])).to_owned();
            let name = ServerName::try_from(name).context("the server's name")?;
            Some((TlsConnector::from(identity.client()?), name))
        }
    };
    let target: Arc<str> = address.into();
    let connector = service_fn(move |_: Uri| {
        let (target, tls) = (target.clone(), tls.clone());
        async move {
            let stream = TcpStream::connect(&*target).await?;
            stream.set_nodelay(true)?;
            let connection = match tls {
                None => Connection::new(stream),
                Some((connector, name)) => Connection::new(connector.connect(name, stream).await?),
            };
            Ok::<_, std::io::Error>(TokioIo::new(connection))
        }
    });
    endpoint.connect_with_connector(connector).await.with_context(|| format!("connecting to {address}"))
}

/// Connects to an agent's socket.
pub async fn connect_socket(path: &Path) -> Result<Channel> {
    let target: Arc<Path> = path.into();
    let connector = service_fn(move |_: Uri| {
        let target = target.clone();
        async move { Ok::<_, std::io::Error>(TokioIo::new(tokio::net::UnixStream::connect(&*target).await?)) }
    });
    endpoint()?
        .connect_with_connector(connector)
        .await
        .with_context(|| format!("connecting to {}", path.display()))
}

fn endpoint() -> Result<Endpoint> {
    // The connector decides where to; the name is what the server sees as :authority.
    let endpoint = Endpoint::try_from("http://hubble").context("naming the server")?;
    Ok(endpoint
        .connect_timeout(CONNECT_WITHIN)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(CONNECT_WITHIN)
        .keep_alive_while_idle(true))
}
