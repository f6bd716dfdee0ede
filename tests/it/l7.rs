//! Rules of layer 7 on real nodes: agent, programs, proxy, and clients and servers that know nothing of them.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::lab::{Lab, Pod, Running, Setup, Space, noting_failure, wait_for};
use crate::require::require_lab;

pub const PORT: u16 = 18080;

/// A server of HTTP/1.1 that answers every request with its path and the client's address.
pub struct Http {
    stops: Arc<AtomicBool>,
    peers: Arc<Mutex<Vec<SocketAddr>>>,
    running: Option<Running<Result<()>>>,
}

impl Http {
    pub fn start(space: &Space) -> Result<Self> {
        let stops = Arc::new(AtomicBool::new(false));
        let listener = space.run(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, PORT)))?;
        listener.set_nonblocking(true)?;
        let peers = Arc::new(Mutex::new(Vec::new()));
        let running = space.start({
            let (stops, peers) = (stops.clone(), peers.clone());
            move || -> Result<()> {
                while !stops.load(Ordering::Relaxed) {
                    match listener.accept() {
                        Ok((stream, peer)) => {
                            peers.lock().expect("nobody panics with the lock").push(peer);
                            std::thread::spawn(move || answer(stream, peer));
                        }
                        Err(_) => std::thread::sleep(Duration::from_millis(2)),
                    }
                }
                Ok(())
            }
        });
        Ok(Self { stops, peers, running: Some(running) })
    }

    /// The clients of all connections, as the server saw them.
    pub fn peers(&self) -> Vec<SocketAddr> {
        let canonical = |peer: &SocketAddr| SocketAddr::new(peer.ip().to_canonical(), peer.port());
        self.peers.lock().expect("nobody panics with the lock").iter().map(canonical).collect()
    }
}

impl Drop for Http {
    fn drop(&mut self) {
        self.stops.store(true, Ordering::Relaxed);
        if let Some(running) = self.running.take()
            && let Err(error) = running.wait()
        {
            eprintln!("{error:#}");
        }
    }
}

fn answer(stream: TcpStream, peer: SocketAddr) -> Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut writer = stream;
    loop {
        let Some(path) =
            read_head(&mut reader)?.first().and_then(|line| Some(line.split(' ').nth(1)?.to_owned()))
        else {
            return Ok(());
        };
        let body = format!("{path} {}", peer.ip().to_canonical());
        write!(writer, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len())?;
    }
}

/// The lines of a head; none at the end of the connection.
fn read_head(reader: &mut impl BufRead) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || line == "\r\n" {
            return Ok(lines);
        }
        lines.push(line.trim_end().to_owned());
    }
}

/// A connection that stays open.
pub struct Client(BufReader<TcpStream>);

impl Client {
    pub fn connect(space: &Space, server: SocketAddr) -> Result<Self> {
        let connect = move || TcpStream::connect_timeout(&server, Duration::from_secs(3));
        let stream = space.run(connect).with_context(|| format!("connecting to {server}"))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        Ok(Self(BufReader::new(stream)))
    }

    /// As whom it speaks.
    pub fn address(&self) -> Result<SocketAddr> {
        Ok(self.0.get_ref().local_addr()?)
    }

    /// The status and body of a request.
    pub fn ask(&mut self, method: &str, path: &str) -> Result<(u16, String)> {
        write!(self.0.get_mut(), "{method} {path} HTTP/1.1\r\nHost: web\r\nContent-Length: 0\r\n\r\n")?;
        let head = read_head(&mut self.0)?;
        let status =
            head.first().context("the connection was closed")?.split(' ').nth(1).context("a status")?;
        let length = head.iter().find_map(|line| {
            line.to_ascii_lowercase().strip_prefix("content-length: ")?.parse::<usize>().ok()
        });
        let mut body = vec![0; length.unwrap_or(0)];
        self.0.read_exact(&mut body)?;
        Ok((status.parse()?, String::from_utf8(body)?))
    }
}

/// The status of one request on a connection of its own.
pub fn ask(space: &Space, server: IpAddr, method: &str, path: &str) -> Result<(u16, String)> {
    Client::connect(space, SocketAddr::new(server, PORT))?.ask(method, path)
}

/// Lets everybody send these requests to pods with the label `app: web`.
pub fn allow(lab: &Lab, http: &str) -> Result<()> {
    lab.manifests().apply(&format!(
        "apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {{name: web, namespace: shop}}
spec:
  endpointSelector: {{matchLabels: {{app: web}}}}
  ingress:
  - fromEntities: [all]
    toPorts: [{{ports: [{{port: '{PORT}', protocol: TCP}}], rules: {{http: {http}}}}}]
"
    ))
}

/// A policy is in force when what it forbids is forbidden.
pub fn wait_for_status(
    space: &Space,
    server: IpAddr,
    (method, path): (&str, &str),
    wanted: u16,
) -> Result<()> {
    let (method, path) = (method.to_owned(), path.to_owned());
    wait_for(&format!("{wanted} for {method} {path}"), || {
        Ok(ask(space, server, &method, &path).is_ok_and(|(status, _)| status == wanted))
    })
}

/// GET /health passes, as whom it was sent; all other requests get 403.
pub fn expect_health_only(space: &Space, client: Option<&Pod>, server: IpAddr) -> Result<()> {
    let (status, body) = ask(space, server, "GET", "/health")?;
    ensure!(status == 200, "GET /health: {status} {body}");
    if let Some(client) = client {
        let own = client.address(server.is_ipv4());
        ensure!(body == format!("/health {own}"), "the server saw {body:?}, not {own}");
    }
    for (method, path) in [("GET", "/admin"), ("POST", "/health"), ("GET", "/health/x")] {
        let (status, _) = ask(space, server, method, path)?;
        ensure!(status == 403, "{method} {path}: {status}");
    }
    Ok(())
}

fn only_health_passes(routing: &str) -> Result<()> {
    let lab = Lab::start(Setup { nodes: 2, routing: routing.to_owned(), ..Setup::default() })?;
    let client = lab.pod(1, "shop/client").create()?;
    let servers = [
        lab.pod(1, "shop/near").label("app", "web").create()?,
        lab.pod(2, "shop/far").label("app", "web").create()?,
    ];
    let _running = servers.iter().map(|server| Http::start(server.space())).collect::<Result<Vec<_>>>()?;
    allow(&lab, "[{method: GET, path: /health}]")?;
    for server in &servers {
        for address in server.addresses().to_vec() {
            wait_for_status(client.space(), address, ("GET", "/admin"), 403)?;
            expect_health_only(client.space(), Some(&client), address)
                .with_context(|| format!("{routing}: to {} at {address}", server.name()))?;
            expect_health_only(lab.outside(), None, address)
                .with_context(|| format!("{routing}: from outside to {} at {address}", server.name()))?;
        }
    }
    Ok(())
}

#[test]
fn only_get_health_passes_by_the_tunnel() -> Result<()> {
    require_lab!();
    only_health_passes("tunnel")
}

#[test]
fn only_get_health_passes_by_native_routing() -> Result<()> {
    require_lab!();
    only_health_passes("native")
}

#[test]
fn what_passes_the_nodes_netfilter_is_judged_too() -> Result<()> {
    require_lab!();
    // As the probes of a cloud's load balancers come.
    let guarded = format!("{},{}", crate::lab::OUTSIDE[0], crate::lab::OUTSIDE[1]);
    let guarded = guarded.replace(',', "/32,") + "/128";
    let agent_arguments = vec!["--stack-cidrs".to_owned(), guarded];
    let lab = Lab::start(Setup { agent_arguments, ..Setup::default() })?;
    let server = lab.pod(1, "shop/web").label("app", "web").create()?;
    let _running = Http::start(server.space())?;
    allow(&lab, "[{method: GET, path: /health}]")?;
    for address in server.addresses().to_vec() {
        wait_for_status(lab.outside(), address, ("GET", "/admin"), 403)?;
        expect_health_only(lab.outside(), None, address).with_context(|| format!("to {address}"))?;
    }
    Ok(())
}

#[test]
fn rules_of_the_clients_pod_hold_by_whichever_way_it_leaves() -> Result<()> {
    require_lab!();
    for routing in ["tunnel", "native"] {
        let lab = Lab::start(Setup { nodes: 2, routing: routing.to_owned(), ..Setup::default() })?;
        let client = lab.pod(1, "shop/client").create()?;
        let servers = [lab.pod(1, "shop/near").create()?, lab.pod(2, "shop/far").create()?];
        let mut running =
            servers.iter().map(|server| Http::start(server.space())).collect::<Result<Vec<_>>>()?;
        running.push(Http::start(lab.outside())?);
        running.push(Http::start(lab.node(1).space())?);
        lab.manifests().apply(
            "apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: client, namespace: shop}
spec:
  endpointSelector: {}
  egress:
  - toEntities: [all]
    toPorts: [{ports: [{port: '18080', protocol: TCP}], rules: {http: [{method: GET, path: /health}]}}]
",
        )?;
        let outside = crate::lab::OUTSIDE.map(|address| address.parse::<IpAddr>().expect("an address"));
        let nodes = lab.node(1).addresses().to_vec();
        let pods = servers.iter().flat_map(|server| server.addresses().to_vec());
        for (number, address) in pods.chain(outside).chain(nodes).enumerate() {
            wait_for_status(client.space(), address, ("GET", "/admin"), 403)?;
            // Outside of the cluster the client has its node's address.
            let seen = (number < 4).then_some(&client);
            let outcome = expect_health_only(client.space(), seen, address);
            noting_failure(outcome.with_context(|| format!("{routing}: to {address}")))?;
        }
    }
    Ok(())
}

#[test]
fn a_running_connection_follows_its_policy_and_survives_agents_but_not_its_proxy() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup::default())?;
    let client = lab.pod(1, "shop/client").create()?;
    let server = lab.pod(1, "shop/web").label("app", "web").create()?;
    let _running = Http::start(server.space())?;
    let node = lab.node(1);
    let target = SocketAddr::new(server.address(true), PORT);
    allow(&lab, "[{method: GET, path: /health}]")?;
    wait_for_status(client.space(), target.ip(), ("GET", "/admin"), 403)?;

    let mut kept = Client::connect(client.space(), target)?;
    ensure!(kept.ask("GET", "/health")?.0 == 200);
    allow(&lab, "[{method: GET, path: /status}]")?;
    wait_for("the connection to lose its right", || Ok(kept.ask("GET", "/health")?.0 == 403))?;
    wait_for_status(client.space(), target.ip(), ("GET", "/status"), 200)?;
    ensure!(kept.ask("GET", "/status")?.0 == 200, "the connection goes on");

    let proxy = node.proxy_pid().context("a proxy runs")?;
    node.kill_agent()?;
    ensure!(kept.ask("GET", "/status")?.0 == 200, "without an agent the connection goes on");
    ensure!(ask(client.space(), target.ip(), "GET", "/status")?.0 == 200, "and new ones begin");
    ensure!(ask(client.space(), target.ip(), "GET", "/health")?.0 == 403);
    node.start_agent()?;
    node.wait_ready()?;
    ensure!(kept.ask("GET", "/status")?.0 == 200, "the next agent changes nothing");
    allow(&lab, "[{method: GET, path: /health}]")?;
    wait_for_status(client.space(), target.ip(), ("GET", "/health"), 200)?;
    ensure!(kept.ask("GET", "/status")?.0 == 403 && kept.ask("GET", "/health")?.0 == 200);
    ensure!(node.proxy_pid() == Some(proxy), "the proxy is the same");

    node.kill_proxy()?;
    ensure!(kept.ask("GET", "/health").is_err(), "what the proxy had in its hands breaks");
    wait_for_status(client.space(), target.ip(), ("GET", "/health"), 200)?;
    ensure!(ask(client.space(), target.ip(), "GET", "/admin")?.0 == 403);
    Ok(())
}

/// What the flows page offers for a denied request, applied as it is, lets that request pass and no other.
#[test]
fn the_rule_that_would_allow_a_denied_request_does() -> Result<()> {
    require_lab!();
    let agent_arguments = ["--hubble-page-address", PAGE].map(str::to_owned).to_vec();
    let lab = Lab::start(Setup { agent_arguments, ..Setup::default() })?;
    let node = lab.node(1);
    let client = lab.pod(1, "shop/client").label("app", "client").create()?;
    let server = lab.pod(1, "shop/web").label("app", "web").create()?;
    let _running = Http::start(server.space())?;
    allow(&lab, "[{method: GET, path: /health}]")?;
    let address = server.address(true);
    wait_for_status(client.space(), address, ("GET", "/admin?x=1"), 403)?;
    let mut denied = serde_json::Value::Null;
    wait_for("the record of the denied request", || {
        denied = node.flows(&["--http-path", "^/admin$", "--verdict", "dropped"])?.pop().unwrap_or_default();
        Ok(!denied.is_null())
    })?;
    let body = serde_json::json!({ "flow": denied }).to_string();
    let answer: serde_json::Value = serde_json::from_str(&post(node.space(), "/api/allow", body)?)?;
    let rule = answer["yaml"].as_str().with_context(|| format!("no rule for {denied}: {answer}"))?;
    lab.manifests().apply(rule)?;
    wait_for_status(client.space(), address, ("GET", "/admin?x=2"), 200)?;
    for (method, path) in [("POST", "/admin"), ("GET", "/admin/x"), ("GET", "/")] {
        let (status, _) = ask(client.space(), address, method, path)?;
        ensure!(status == 403, "{method} {path}: {status}");
    }
    Ok(())
}

/// Where the agent serves its page, in the node's namespace.
const PAGE: &str = "127.0.0.1:4246";

/// What the page's server answers.
fn post(space: &Space, path: &str, body: String) -> Result<String> {
    let head = format!("POST {path} HTTP/1.1\r\nHost: {PAGE}\r\nContent-Length: {}\r\n\r\n", body.len());
    space.run(move || {
        let mut client = BufReader::new(TcpStream::connect(PAGE)?);
        client.get_ref().set_read_timeout(Some(Duration::from_secs(10)))?;
        client.get_mut().write_all((head + &body).as_bytes())?;
        let head = read_head(&mut client)?;
        let length = |line: &String| line.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok();
        let length: usize = head.iter().find_map(length).with_context(|| format!("no length in {head:?}"))?;
        let mut answer = vec![0; length];
        client.read_exact(&mut answer)?;
        Ok(String::from_utf8(answer)?)
    })
}
