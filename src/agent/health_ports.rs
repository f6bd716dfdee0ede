//! What load balancers ask a node, in the words of kube-proxy: whether it serves at all, and whether it has
//! backends of a Service whose traffic stays on the node.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use ipnet::IpNet;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::kube::Tables;
use crate::model::ObjectKey;
use crate::service::Health;
use crate::telemetry::{self, Telemetry};

/// A port that somebody else has is tried again after this long: kube-proxy may still be there.
const RETRY: Duration = Duration::from_secs(10);
/// Health check ports that are served at once, at most: each takes a socket.
const PORTS_MAX: usize = 4096;
/// What upstream's tests read where kube-proxy says iptables or nftables.
const MODE: &str = "weir";
const HEADERS: [(HeaderName, &str); 2] =
    [(header::CONTENT_TYPE, "application/json"), (header::X_CONTENT_TYPE_OPTIONS, "nosniff")];
/// The part of the agent that serves these ports.
const PART: &str = "health check ports";

/// By Service.
pub type HealthOf = Arc<BTreeMap<ObjectKey, Health>>;

/// What the answers are made of.
#[derive(Clone)]
pub struct NodeHealth {
    /// Whether this agent is well.
    pub telemetry: Arc<Telemetry>,
    /// Whether this node is about to go.
    pub tables: Arc<Tables>,
    /// Its name.
    pub node: Arc<str>,
}

impl NodeHealth {
    fn is_well(&self) -> bool {
        self.telemetry.stuck_for().is_none() && self.telemetry.ready().is_ready()
    }

    /// A node that is being taken away gets no new connections.
    fn is_eligible(&self) -> bool {
        self.tables.nodes.get(&self.node).is_none_or(|node| !node.is_leaving)
    }
}

/// Serves `/healthz`, `/livez` and `/proxyMode` for ever, from when the address is free.
pub async fn serve_proxy(address: SocketAddr, health: NodeHealth) {
    let routes = Router::new()
        .route("/healthz", get(async |State(health): State<NodeHealth>| proxy(&health, health.is_eligible())))
        .route("/livez", get(async |State(health): State<NodeHealth>| proxy(&health, true)))
        .route("/proxyMode", get(async || MODE))
        .with_state(health);
    let mut is_said = false;
    loop {
        match telemetry::listen(address).await {
            Ok(listener) => {
                tracing::info!(%address, "load balancers may ask here whether this node serves");
                if let Err(error) = axum::serve(listener, routes.clone()).await {
                    tracing::warn!(%error, %address, "answering load balancers");
                }
            }
            Err(error) if !std::mem::replace(&mut is_said, true) => {
                tracing::warn!(%error, %address, retry = ?RETRY, "load balancers cannot ask here yet: is kube-proxy there?");
            }
            Err(_) => {}
        }
        tokio::time::sleep(RETRY).await;
    }
}

fn proxy(health: &NodeHealth, is_eligible: bool) -> Response {
    let now = jiff::Timestamp::now();
    let silent = health.telemetry.stuck_for().unwrap_or_default();
    let is_well = health.is_well() && is_eligible;
    let body = json!({
        "lastUpdated": (now - jiff::SignedDuration::from_secs(silent.as_secs() as i64)).to_string(),
        "currentTime": now.to_string(),
        "nodeEligible": is_eligible,
    });
    let status = if is_well { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, HEADERS, body.to_string()).into_response()
}

/// Serves the health check ports of Services for ever, as they come and go.
pub async fn serve_services(cidrs: Vec<IpNet>, health: NodeHealth, mut services: watch::Receiver<HealthOf>) {
    let parts = health.telemetry.parts().clone();
    parts.add(PART);
    let mut open: HashMap<(ObjectKey, u16), Vec<AbortHandle>> = HashMap::new();
    loop {
        let wanted = services.borrow_and_update().clone();
        open.retain(|(service, port), tasks| {
            let is_wanted = wanted.get(service).is_some_and(|health| health.port == *port);
            if !is_wanted {
                tasks.iter().for_each(AbortHandle::abort);
            }
            is_wanted
        });
        let mut faults = Vec::new();
        for (service, Health { port, .. }) in wanted.iter() {
            let key = (service.clone(), *port);
            if open.contains_key(&key) {
                continue;
            }
            if open.len() >= PORTS_MAX {
                faults.push(format!("more than {PORTS_MAX} are asked for"));
                break;
            }
            let at = addresses(&health, &cidrs);
            if at.is_empty() && !cidrs.is_empty() {
                faults.push("the node has no address within --node-port-addresses".to_owned());
                break;
            }
            let answer =
                ServiceHealth { service: service.clone(), node: health.clone(), services: services.clone() };
            match open_port(&at, *port, answer).await {
                Ok(tasks) => drop(open.insert(key, tasks)),
                Err(error) => faults.push(format!("port {port} of Service {service}: {error}")),
            }
        }
        let is_failing = !faults.is_empty();
        match is_failing {
            true => drop(parts.fails(PART, faults, false, true)),
            false => parts.works(PART),
        }
        tokio::select! {
            changed = services.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(RETRY), if is_failing => {}
        }
    }
}

/// The node's addresses within these; none stands for all.
fn addresses(health: &NodeHealth, cidrs: &[IpNet]) -> Vec<IpAddr> {
    let node = health.tables.nodes.get(&health.node);
    let own = node.iter().flat_map(|node| node.addresses.iter().copied());
    own.filter(|address| cidrs.iter().any(|cidr| cidr.contains(address))).collect()
}

#[derive(Clone)]
struct ServiceHealth {
    service: ObjectKey,
    node: NodeHealth,
    services: watch::Receiver<HealthOf>,
}

/// At each of these addresses; at all of the node's where there is none.
async fn open_port(addresses: &[IpAddr], port: u16, answer: ServiceHealth) -> io::Result<Vec<AbortHandle>> {
    let mut listeners: Vec<TcpListener> = Vec::new();
    if addresses.is_empty() {
        listeners.push(telemetry::listen((Ipv6Addr::UNSPECIFIED, port).into()).await?);
    }
    for address in addresses {
        listeners.push(TcpListener::bind((*address, port)).await?);
    }
    let routes = Router::new().fallback(get(service)).with_state(answer);
    let serve = |listener| tokio::spawn(axum::serve(listener, routes.clone()).into_future()).abort_handle();
    Ok(listeners.into_iter().map(serve).collect())
}

async fn service(State(asked): State<ServiceHealth>) -> Response {
    let endpoints = asked.services.borrow().get(&asked.service).map_or(0, |health| health.local_endpoints);
    let is_well = asked.node.is_well();
    let body = json!({
        "service": { "namespace": asked.service.namespace, "name": asked.service.name },
        "localEndpoints": endpoints,
        "serviceProxyHealthy": is_well,
    });
    let status = if endpoints > 0 && is_well { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let weight = [("x-load-balancing-endpoint-weight", endpoints.to_string())];
    (status, HEADERS, weight, body.to_string()).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Node;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    /// Status and body.
    async fn ask(port: u16, path: &str) -> Option<(u16, String)> {
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.ok()?;
        let request = format!("GET {path} HTTP/1.0\r\n\r\n");
        stream.write_all(request.as_bytes()).await.ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await.ok()?;
        let status = text.split_whitespace().nth(1)?.parse().ok()?;
        Some((status, text.split_once("\r\n\r\n")?.1.to_owned()))
    }

    async fn wait_for(
        port: u16,
        path: &str,
        done: impl Fn(&Option<(u16, String)>) -> bool,
    ) -> Option<(u16, String)> {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
        loop {
            let answer = ask(port, path).await;
            if done(&answer) || tokio::time::Instant::now() > deadline {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// A port that was free just now.
    async fn free_port() -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        listener.local_addr().expect("its address").port()
    }

    fn health() -> NodeHealth {
        let telemetry = Arc::new(Telemetry::new());
        telemetry.main_loop_alive();
        NodeHealth { telemetry, tables: Arc::new(Tables::new()), node: "a".into() }
    }

    #[tokio::test]
    async fn a_health_check_port_says_whether_there_are_backends_here() {
        let port = free_port().await;
        let service = ObjectKey::new("shop", "web");
        let of =
            |local_endpoints| Arc::new(BTreeMap::from([(service.clone(), Health { port, local_endpoints })]));
        let (say, services) = watch::channel(of(2));
        let serving = tokio::spawn(serve_services(vec![], health(), services));
        let answer = wait_for(port, "/", Option::is_some).await.expect("an answer");
        let body: serde_json::Value = serde_json::from_str(&answer.1).expect("JSON");
        let expected = json!({ "service": { "namespace": "shop", "name": "web" }, "localEndpoints": 2,
                               "serviceProxyHealthy": true });
        assert_eq!((answer.0, body), (200, expected));
        say.send_replace(of(0));
        assert_eq!(
            wait_for(port, "/x", |answer| answer.as_ref().is_some_and(|it| it.0 == 503)).await.map(|it| it.0),
            Some(503)
        );
        say.send_replace(Arc::default());
        assert_eq!(wait_for(port, "/", Option::is_none).await, None, "a port of nobody is closed");
        serving.abort();
    }

    #[tokio::test]
    async fn a_node_that_is_taken_away_lives_but_gets_nothing_new() {
        let (port, health) = (free_port().await, health());
        let tables = health.tables.clone();
        let serving = tokio::spawn(serve_proxy(([127, 0, 0, 1], port).into(), health));
        assert_eq!(wait_for(port, "/healthz", Option::is_some).await.map(|it| it.0), Some(200));
        assert_eq!(ask(port, "/proxyMode").await, Some((200, "weir".to_owned())));
        let node = Node {
            name: "a".to_owned(),
            labels: Default::default(),
            addresses: vec![],
            pod_cidrs: vec![],
            is_leaving: true,
            is_unready: false,
        };
        tables.nodes.apply("a".into(), Arc::new(node));
        let answer = ask(port, "/healthz").await.expect("an answer");
        assert!(answer.0 == 503 && answer.1.contains("\"nodeEligible\":false"), "{answer:?}");
        assert_eq!(ask(port, "/livez").await.map(|it| it.0), Some(200));
        serving.abort();
    }
}
