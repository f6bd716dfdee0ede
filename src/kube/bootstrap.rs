//! How a pod of the node's own network finds the API server without kube-proxy, and
//! without our own translation of the `kubernetes` Service, which needs the API server first.
//!
//! ```text
//! WEIR_API_SERVERS, KUBERNETES_SERVICE_HOST ──┐
//! state directory: api-servers.json ──────────┼─> Servers ── every new connection
//! EndpointSlices of default/kubernetes ───────┘      tries them in turn
//!       (then remembered)
//! ```
//!
//! Whatever address is taken, the server has to prove that it is `kubernetes.default.svc`,
//! a name that every cluster's certificate has. Token and certificate authority are read
//! again from the service account's files by `kube`, at least once a minute.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context as TaskContext, Poll};
use std::time::Duration;
use std::{fs, io};

use anyhow::{Context, Result};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::dns::Name;
use hyper_util::rt::TokioExecutor;
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};
use kube::api::{Api, ListParams};
use kube::client::{Body, ClientBuilder, ConfigExt};
use kube::{Client, Config};
use tokio::net::lookup_host;
use tower::{BoxError, Service, ServiceExt};
use tracing::{debug, info, warn};

use super::Tables;
use crate::files::{self, Survives};
use crate::model::ObjectKey;

/// The addresses known from the API, in the state directory.
const FILE: &str = "api-servers.json";
/// For all servers together.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
/// A server that went away without a word is noticed after this long.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// Changes of the slices within this time are one.
const BATCH: Duration = Duration::from_secs(1);
/// How often a program that watches no slices asks for them.
const ASK: Duration = Duration::from_secs(60);

/// The API servers that are known, to be tried in turn.
#[derive(Clone)]
pub struct Servers(Arc<Inner>);

struct Inner {
    /// As HOST:PORT: those that somebody configured.
    configured: Vec<String>,
    /// From the API, now or before the agent was started again; they come first.
    learned: Mutex<Vec<SocketAddr>>,
    /// Where the next connection begins.
    turn: AtomicUsize,
    /// `None`: nothing is remembered.
    file: Option<PathBuf>,
}

impl Servers {
    /// Those configured, and those remembered in the state directory. `variable` reads
    /// the environment: kubelet names the `kubernetes` Service there, which is the last
    /// resort.
    pub fn new(configured: &[String], state_dir: &Path, variable: impl Fn(&str) -> Option<String>) -> Self {
        Self::with(configured, Some(state_dir.join(FILE)), variable)
    }

    /// As `new`, for a program that may start on any node: nothing is remembered.
    pub fn forgetful(configured: &[String], variable: impl Fn(&str) -> Option<String>) -> Self {
        Self::with(configured, None, variable)
    }

    fn with(configured: &[String], file: Option<PathBuf>, variable: impl Fn(&str) -> Option<String>) -> Self {
        let mut configured = configured.to_vec();
        let service = (variable("KUBERNETES_SERVICE_HOST"), variable("KUBERNETES_SERVICE_PORT"));
        if let (Some(host), Some(port)) = service {
            let is_bare_ipv6 = host.contains(':') && !host.starts_with('[');
            configured.push(if is_bare_ipv6 { format!("[{host}]:{port}") } else { format!("{host}:{port}") });
        }
        let learned = Mutex::new(file.as_deref().map(remembered).unwrap_or_default());
        Self(Arc::new(Inner { configured, learned, turn: AtomicUsize::new(0), file }))
    }

    /// Every address, in the order in which a new connection tries them.
    async fn addresses(&self) -> io::Result<Vec<SocketAddr>> {
        let mut addresses = self.learned();
        if !addresses.is_empty() {
            // Not always the first: load spreads, and a server that accepts and fails is left.
            let turn = self.0.turn.fetch_add(1, Ordering::Relaxed) % addresses.len();
            addresses.rotate_left(turn);
        }
        let mut failure = None;
        for server in &self.0.configured {
            match resolve(server).await {
                Ok(resolved) => addresses.extend(resolved),
                Err(error) => {
                    failure = Some(io::Error::new(error.kind(), format!("resolving {server}: {error}")))
                }
            }
        }
        let mut seen = std::collections::HashSet::new();
        addresses.retain(|address| seen.insert(*address));
        match failure {
            Some(failure) if addresses.is_empty() => Err(failure),
            None if addresses.is_empty() => Err(io::Error::new(
                io::ErrorKind::NotFound,
                "no API server is known: set WEIR_API_SERVERS to HOST:PORT",
            )),
            _ => Ok(addresses),
        }
    }

    fn learned(&self) -> Vec<SocketAddr> {
        self.0.learned.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes over what the API says now, and remembers it on disk.
    fn learn(&self, addresses: Vec<SocketAddr>) {
        if addresses.is_empty() || addresses == self.learned() {
            return;
        }
        info!(?addresses, "API servers");
        if let Some(file) = &self.0.file
            && let Err(error) = write(file, &addresses)
        {
            warn!(file = %file.display(), %error, "remembering the API servers");
        }
        *self.0.learned.lock().unwrap_or_else(PoisonError::into_inner) = addresses;
    }

    /// A client of the pod's service account that connects to these servers.
    pub fn client(&self) -> Result<Client> {
        let config = Config::incluster_dns().context("reading the service account of this pod")?;
        let mut connector = HttpConnector::new_with_resolver(Resolver(self.clone()));
        connector.enforce_http(false);
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(CONNECT_WITHIN));
        connector.set_keepalive(Some(SILENCE_MAX / 2));
        connector.set_keepalive_interval(Some(SILENCE_MAX / 6));
        connector.set_keepalive_retries(Some(3));
        connector.set_tcp_user_timeout(Some(SILENCE_MAX));
        let connector = config.rustls_https_connector_with_connector(connector).context("setting up TLS")?;
        let transport =
            hyper_util::client::legacy::Client::builder(TokioExecutor::new()).build::<_, Body>(connector);
        let authorization = config.auth_layer().context("reading the token of this pod")?;
        let authorization = authorization.context("the service account of this pod has no token")?;
        let builder = ClientBuilder::new(transport.map_err(BoxError::from), config.default_namespace.clone())
            .with_layer(&authorization)
            .with_layer(&config.base_uri_layer());
        Ok(builder.build())
    }

    /// Asks for the EndpointSlices of `default/kubernetes` now and then. Never returns.
    pub async fn ask(self, client: Client) {
        let slices: Api<EndpointSlice> = Api::namespaced(client, "default");
        let of_service = ListParams::default().labels("kubernetes.io/service-name=kubernetes");
        loop {
            match slices.list(&of_service).await {
                Ok(slices) => {
                    let mut addresses: Vec<_> = slices.iter().flat_map(ready_addresses).collect();
                    addresses.sort();
                    self.learn(addresses);
                }
                Err(error) => debug!(%error, "asking for the API servers"),
            }
            tokio::time::sleep(ASK).await;
        }
    }

    /// Follows the EndpointSlices of `default/kubernetes`. Never returns.
    pub async fn follow(self, tables: Arc<Tables>) {
        let service = ObjectKey { namespace: "default".into(), name: "kubernetes".into() };
        let mut state = tables.slices.subscribe();
        loop {
            let slices = tables.slices.snapshot();
            let mut addresses: Vec<SocketAddr> = slices
                .values()
                .filter(|slice| slice.service == service)
                .flat_map(|slice| {
                    let backends = slice.backends.iter().filter(|backend| backend.ready);
                    let addresses = backends.map(|backend| backend.address);
                    let port = slice.ports.first().map(|port| port.port);
                    addresses.filter_map(move |address| Some(SocketAddr::new(address, port?)))
                })
                .collect();
            addresses.sort();
            self.learn(addresses);
            if state.changed().await.is_err() {
                return std::future::pending().await;
            }
            tokio::time::sleep(BATCH).await;
            state.mark_unchanged();
        }
    }
}

fn ready_addresses(slice: &EndpointSlice) -> Vec<SocketAddr> {
    let port = slice.ports.iter().flatten().find_map(|port| u16::try_from(port.port?).ok());
    let is_ready = |endpoint: &&Endpoint| {
        endpoint.conditions.as_ref().and_then(|conditions| conditions.ready).unwrap_or(true)
    };
    let addresses = slice.endpoints.iter().filter(is_ready).flat_map(|endpoint| &endpoint.addresses);
    addresses.filter_map(|address| Some(SocketAddr::new(address.parse().ok()?, port?))).collect()
}

/// Gives a connector the addresses of the servers, whatever name it asks for.
#[derive(Clone)]
struct Resolver(Servers);

impl Service<Name> for Resolver {
    type Response = std::vec::IntoIter<SocketAddr>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Name) -> Self::Future {
        let servers = self.0.clone();
        Box::pin(async move { Ok(servers.addresses().await?.into_iter()) })
    }
}

async fn resolve(server: &str) -> io::Result<Vec<SocketAddr>> {
    Ok(lookup_host(server).await?.collect())
}

fn remembered(file: &Path) -> Vec<SocketAddr> {
    let text = match fs::read(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
        text => text,
    };
    let servers = text.and_then(|text| Ok(serde_json::from_slice(&text)?));
    servers.unwrap_or_else(|error| {
        warn!(file = %file.display(), %error, "ignoring the API servers that were remembered");
        Vec::new()
    })
}

fn write(file: &Path, servers: &[SocketAddr]) -> io::Result<()> {
    files::replace(file, &serde_json::to_vec(servers)?, 0o600, Survives::Process)
}

/// A client as a kubeconfig file says.
pub async fn client_from(file: &Path) -> Result<Client> {
    let read = kube::config::Kubeconfig::read_from(file)
        .with_context(|| format!("reading --kubeconfig {}", file.display()))?;
    let config = kube::Config::from_custom_kubeconfig(read, &Default::default()).await?;
    Client::try_from(config).context("preparing to speak to the API server")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{EndpointSlice as ModelSlice, Protocol, SliceBackend, SlicePort};

    fn servers(configured: &[&str], directory: &Path) -> Servers {
        let configured: Vec<String> = configured.iter().map(|server| (*server).to_owned()).collect();
        Servers::new(&configured, directory, |name| match name {
            "KUBERNETES_SERVICE_HOST" => Some("fd00::1".to_owned()),
            "KUBERNETES_SERVICE_PORT" => Some("443".to_owned()),
            _ => None,
        })
    }

    async fn texts(servers: &Servers) -> Vec<String> {
        let addresses = servers.addresses().await.expect("known servers");
        addresses.iter().map(ToString::to_string).collect()
    }

    fn address(text: &str) -> SocketAddr {
        text.parse().expect("an address")
    }

    #[tokio::test]
    async fn learned_servers_come_first_take_turns_and_are_remembered() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let first = servers(&["10.0.0.1:6443"], directory.path());
        assert_eq!(texts(&first).await, ["10.0.0.1:6443", "[fd00::1]:443"]);

        first.learn(vec![address("10.0.0.1:6443"), address("10.0.0.2:6443")]);
        // An empty list says that something is wrong, not that there is no server.
        first.learn(vec![]);
        let second = servers(&[], directory.path());
        assert_eq!(texts(&second).await, ["10.0.0.1:6443", "10.0.0.2:6443", "[fd00::1]:443"]);
        assert_eq!(texts(&second).await, ["10.0.0.2:6443", "10.0.0.1:6443", "[fd00::1]:443"]);
    }

    #[tokio::test]
    async fn what_is_unreadable_is_ignored() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        fs::write(directory.path().join(FILE), "{").expect("writing nonsense");
        assert_eq!(texts(&servers(&[], directory.path())).await, ["[fd00::1]:443"]);
        let nowhere = Servers::new(&[], directory.path(), |_| None);
        let error = nowhere.addresses().await.expect_err("no server").to_string();
        assert_eq!(error, "no API server is known: set WEIR_API_SERVERS to HOST:PORT");
    }

    #[tokio::test]
    async fn the_slices_of_the_kubernetes_service_are_followed() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let tables = Arc::new(Tables::new());
        let slice = |name: &str, service: &str, ip: &str| {
            let key = ObjectKey { namespace: "default".into(), name: name.into() };
            let backend = SliceBackend::ready(ip.parse().expect("an address"));
            let port = SlicePort { name: "https".into(), protocol: Protocol::Tcp, port: 6443 };
            let service = ObjectKey { namespace: "default".into(), name: service.into() };
            let slice = ModelSlice { key: key.clone(), service, ports: vec![port], backends: vec![backend] };
            (key, Arc::new(slice))
        };
        tables.slices.reset([slice("a", "kubernetes", "10.0.0.9"), slice("b", "other", "10.0.0.8")]);
        let servers = servers(&[], directory.path());
        let following = tokio::spawn(servers.clone().follow(tables));
        let deadline = tokio::time::Instant::now() + Duration::from_secs(5);
        while servers.learned().is_empty() && tokio::time::Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        following.abort();
        assert_eq!(servers.learned(), [address("10.0.0.9:6443")]);
    }
}
