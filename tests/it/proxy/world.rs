//! A client, a server, and the proxy between them: three namespaces.
//!
//! ```text
//! client 10.77.0.2 ---- p0 proxy s0 ---- 10.78.0.2 server
//! ```
//!
//! What reaches the proxy's namespace is local there, whatever its address, as in the agent's namespace.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tokio::sync::watch;
use weir::model::l7::{
    Descriptor, FromProxy, Hello, HttpRule, Judges, L7Rules, Lookup, Names, Record, RuleSet, RuleSetId,
    ToProxy,
};
use weir::model::{EndpointId, IdentityId, Protocol};
use weir::netlink::send_with_descriptors;
use weir::proxy::{Limits, ProxyArgs, ProxyConfig};
use weir::settings::{LogArgs, LogFormat};

use crate::lab::{Running, Space, cgroup};

/// Where clients are.
pub const CLIENT: [&str; 2] = ["10.77.0.2", "fd77::2"];
/// Where servers are.
pub const SERVER: [&str; 2] = ["10.78.0.2", "fd78::2"];
/// The ports that the proxy listens on.
const PORTS: [u16; 6] = [53, 80, 443, 5353, 8080, 9092];
const PATIENCE: Duration = Duration::from_secs(20);

type Judge = dyn Fn(SocketAddr, SocketAddr, Protocol) -> Option<Judges> + Send + Sync;

/// The proxy at work.
pub struct World {
    pub client: Space,
    pub server: Space,
    pub agent: Agent,
    stop: watch::Sender<bool>,
    running: Option<Running<Result<()>>>,
    _proxy: Space,
}

/// The agent's side of the control connection.
#[derive(Clone)]
pub struct Agent {
    records: Arc<Mutex<Vec<Record>>>,
    names: Arc<Mutex<Vec<Names>>>,
    /// Names are acknowledged.
    pub acknowledges: Arc<std::sync::atomic::AtomicBool>,
    acknowledged: Arc<AtomicU64>,
    stream: Arc<Mutex<Option<UnixStream>>>,
    next: Arc<AtomicU64>,
}

struct ByFunction(Arc<Judge>);

impl Lookup for ByFunction {
    fn of(&self, client: SocketAddr, server: SocketAddr, protocol: Protocol) -> Option<Judges> {
        (self.0)(client, server, protocol)
    }
}

/// Rule set 1 judges every flow at its client.
pub fn by_one(_: SocketAddr, _: SocketAddr, _: Protocol) -> Option<Judges> {
    Some(Judges {
        egress: Some(RuleSetId(1)),
        source: IdentityId(300),
        destination: IdentityId(400),
        source_endpoint: Some(EndpointId(7)),
        ..Judges::default()
    })
}

/// A rule set of these rules.
pub fn set(id: u16, rules: L7Rules) -> RuleSet {
    RuleSet { id: RuleSetId(id), rules, origins: Vec::new().into(), visibility_only: false, by_envoy: false }
}

/// HTTP rules of methods and paths.
pub fn http(rules: &[(&str, &str)]) -> L7Rules {
    let rule = |(method, path): &(&str, &str)| HttpRule {
        method: Some((*method).to_owned()),
        path: Some((*path).to_owned()),
        ..HttpRule::default()
    };
    L7Rules::Http(rules.iter().map(rule).collect())
}

impl World {
    /// Makes the namespaces, and runs the proxy with these rule sets.
    pub fn start(
        sets: &[RuleSet],
        judge: impl Fn(SocketAddr, SocketAddr, Protocol) -> Option<Judges> + Send + Sync + 'static,
    ) -> Result<Self> {
        Self::with_limits(sets, judge, Limits::default())
    }

    /// The same, with bounds of the test's own.
    pub fn with_limits(
        sets: &[RuleSet],
        judge: impl Fn(SocketAddr, SocketAddr, Protocol) -> Option<Judges> + Send + Sync + 'static,
        limits: Limits,
    ) -> Result<Self> {
        static WORLDS: AtomicUsize = AtomicUsize::new(1);
        // With the lab's cleaner behind them, which removes what a killed test leaves.
        cgroup::of_process()?;
        let name = format!("weirlab-{}-l7-{}", std::process::id(), WORLDS.fetch_add(1, Ordering::Relaxed));
        let [client, proxy, server] =
            ["client", "proxy", "server"].map(|part| Space::create(&format!("{name}-{part}"), None));
        let (client, proxy, server) = (client?, proxy?, server?);
        connect(&proxy, &client, "p0", 77)?;
        connect(&proxy, &server, "s0", 78)?;
        let agent = Agent::new();
        let path = std::env::temp_dir().join(format!("{name}.sock"));
        // A file that an earlier process of this number left.
        let _ = std::fs::remove_file(&path);
        let socket = UnixListener::bind(&path)?;
        let listeners = proxy.run(listeners)?;
        let config = ProxyConfig {
            args: ProxyArgs {
                control: path.clone(),
                threads: 1,
                connections_per_endpoint: limits.connections_per_endpoint,
                log: LogArgs { log_format: LogFormat::Text },
            },
            limits,
        };
        let (stop, _) = watch::channel(false);
        let judge: Arc<Judge> = Arc::new(judge);
        let stops = stop.clone();
        let running = proxy.start(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let open = move |_: OwnedFd| Ok(Box::new(ByFunction(judge.clone())) as Box<dyn Lookup>);
            runtime.block_on(weir::proxy::run(config, Box::new(open), stops))
        });
        let world = Self { client, server, agent, stop, running: Some(running), _proxy: proxy };
        let (stream, _) = socket.accept()?;
        std::fs::remove_file(&path)?;
        world.agent.serve(stream, &listeners)?;
        world.agent.change(sets, &[], true)?;
        Ok(world)
    }

    /// Runs curl in the client's namespace; gives what it wrote, and `-w '%{http_code}'` where that is asked for.
    pub fn curl(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new("curl");
        command.args(["--silent", "--show-error", "--max-time", "10", "--noproxy", "*"]).args(arguments);
        self.client.command(command, "")
    }

    /// The status of a request by curl.
    pub fn status(&self, arguments: &[&str]) -> Result<String> {
        let format = ["--output", "/dev/null", "--write-out", "%{http_code}"];
        self.curl(&[&format[..], arguments].concat())
    }

    /// Sends bytes from the client's namespace, and gives all that comes back until the end. With `is_ended` the
    /// server hears that the client has sent everything.
    pub fn send(&self, to: SocketAddr, bytes: &[u8]) -> Result<Vec<u8>> {
        let bytes = bytes.to_vec();
        self.client.run(move || {
            let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.write_all(&bytes)?;
            let mut answer = Vec::new();
            match stream.read_to_end(&mut answer) {
                Err(error) if error.kind() != std::io::ErrorKind::ConnectionReset => Err(error)?,
                _ => Ok(answer),
            }
        })
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // Connections that a failed test has left open are cut off.
        if self.agent.say(&ToProxy::Drain { within_s: 0 }).is_err() {
            self.stop.send_replace(true);
        }
        if let Some(running) = self.running.take()
            && let Err(error) = running.wait()
        {
            eprintln!("{error:#}");
        }
    }
}

/// A pair of devices between the proxy and another namespace, with addresses on both ends.
fn connect(proxy: &Space, other: &Space, device: &str, net: u8) -> Result<()> {
    let quiet: &'static [(&str, &str)] = &[
        ("ipv6/conf/all/accept_dad", "0"),
        ("ipv6/conf/default/accept_dad", "0"),
        ("ipv4/conf/all/rp_filter", "0"),
        ("ipv4/conf/default/rp_filter", "0"),
        ("ipv4/tcp_tw_reuse", "1"),
    ];
    proxy.set_sysctls(quiet)?;
    other.set_sysctls(quiet)?;
    proxy.configure(&[
        &format!("link add {device} type veth peer name eth0 netns {}", other.name()),
        &format!("addr add 10.{net}.0.1/24 dev {device}"),
        &format!("addr add fd{net}::1/64 dev {device} nodad"),
        &format!("link set {device} up"),
    ])?;
    other.configure(&[
        &format!("addr add 10.{net}.0.2/24 dev eth0"),
        &format!("addr add fd{net}::2/64 dev eth0 nodad"),
        "link set eth0 up",
        &format!("route add default via 10.{net}.0.1"),
        &format!("route add default via fd{net}::1"),
    ])?;
    for family in ["-4", "-6"] {
        proxy.ip(&format!("{family} rule add iif {device} lookup 100"))?;
        proxy.ip(&format!("{family} route replace local default dev lo table 100"))?;
    }
    Ok(())
}

/// The sockets that the agent would have made.
fn listeners() -> Result<Vec<(Descriptor, OwnedFd)>> {
    use socket2::{Domain, Socket, Type};
    let mut sockets = Vec::new();
    for port in PORTS {
        for address in [format!("0.0.0.0:{port}"), format!("[::]:{port}")] {
            let address: SocketAddr = address.parse()?;
            let is_dns = [53, 5353].contains(&port);
            for (kind, what) in
                [(Type::STREAM, Descriptor::TcpListener), (Type::DGRAM, Descriptor::UdpSocket)]
            {
                if what == Descriptor::UdpSocket && !is_dns {
                    continue;
                }
                let socket = Socket::new(Domain::for_address(address), kind, None)?;
                nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::IpTransparent, &true)?;
                if address.is_ipv6() {
                    socket.set_only_v6(true)?;
                }
                socket.set_reuse_address(true)?;
                socket.bind(&address.into())?;
                if what == Descriptor::TcpListener {
                    socket.listen(1024)?;
                }
                sockets.push((what, socket.into()));
            }
        }
    }
    Ok(sockets)
}

impl Agent {
    fn new() -> Self {
        Self {
            records: Arc::default(),
            names: Arc::default(),
            acknowledges: Arc::new(true.into()),
            acknowledged: Arc::default(),
            stream: Arc::default(),
            next: Arc::new(1.into()),
        }
    }

    /// Hands the sockets over, and reads what the proxy says.
    fn serve(&self, stream: UnixStream, sockets: &[(Descriptor, OwnedFd)]) -> Result<()> {
        let map: OwnedFd = std::fs::File::open("/dev/null")?.into();
        let first = [(Descriptor::FlowsMap, &map)];
        let all = || first.into_iter().chain(sockets.iter().map(|(what, socket)| (*what, socket)));
        let hello = Hello { descriptors: all().map(|(what, _)| what).collect(), deny_with_nxdomain: false };
        let line = serde_json::to_string(&hello)? + "\n";
        let descriptors: Vec<_> = all().map(|(_, socket)| socket.as_fd()).collect();
        send_with_descriptors(&stream, line.as_bytes(), &descriptors)?;
        *self.stream.lock().expect("no test panics inside") = Some(stream.try_clone()?);
        let agent = self.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(stream).lines() {
                let Ok(line) = line else { return };
                match serde_json::from_str(&line).expect("the proxy speaks the contract's language") {
                    FromProxy::Ack(seq) => agent.acknowledged.store(seq, Ordering::SeqCst),
                    FromProxy::Refused { id, why } => panic!("rule set {id}: {why}"),
                    FromProxy::Records { records, .. } => {
                        agent.records.lock().expect("no test panics inside").extend(records);
                    }
                    FromProxy::State(_) => {}
                    FromProxy::Names(names) => {
                        let seq = names.seq;
                        agent.names.lock().expect("no test panics inside").push(names);
                        if agent.acknowledges.load(Ordering::SeqCst) {
                            agent.say(&ToProxy::NamesAck(seq)).expect("the proxy hears");
                        }
                    }
                }
            }
        });
        Ok(())
    }

    fn say(&self, message: &ToProxy) -> Result<()> {
        let line = serde_json::to_string(message)? + "\n";
        let mut stream = self.stream.lock().expect("no test panics inside");
        Ok(stream.as_mut().context("no proxy is connected")?.write_all(line.as_bytes())?)
    }

    /// Sends rule sets, and waits until they are in force.
    pub fn change(&self, set: &[RuleSet], remove: &[u16], replace: bool) -> Result<()> {
        let seq = self.next.fetch_add(1, Ordering::SeqCst);
        let remove = remove.iter().map(|id| RuleSetId(*id)).collect();
        self.say(&ToProxy::RuleSets { set: set.to_vec(), remove, replace, seq })?;
        wait("an acknowledgement", || (self.acknowledged.load(Ordering::SeqCst) >= seq).then_some(()))
    }

    /// Waits for a record that `is_it`.
    pub fn record(&self, what: &str, is_it: impl Fn(&Record) -> bool) -> Result<Record> {
        let found =
            || self.records.lock().expect("no test panics inside").iter().find(|one| is_it(one)).cloned();
        wait(what, found).with_context(|| format!("there are {:#?}", self.records()))
    }

    /// All records so far.
    pub fn records(&self) -> Vec<Record> {
        self.records.lock().expect("no test panics inside").clone()
    }

    /// All names so far.
    pub fn names(&self) -> Vec<Names> {
        self.names.lock().expect("no test panics inside").clone()
    }
}

/// Waits until there is a value.
pub fn wait<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return Ok(found);
        }
        if Instant::now() > deadline {
            bail!("waited in vain for {what}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A server that keeps all that it has received, and gives the same answer to each connection as soon as it has
/// received `after`; then it reads on until the end.
pub struct Recorded {
    received: Arc<Mutex<Vec<u8>>>,
    peers: Arc<Mutex<Vec<SocketAddr>>>,
}

impl Recorded {
    pub fn start(space: &Space, port: u16, after: &'static [u8], answer: &'static [u8]) -> Result<Self> {
        let received: Arc<Mutex<Vec<u8>>> = Arc::default();
        let peers: Arc<Mutex<Vec<SocketAddr>>> = Arc::default();
        let listener = space.run(move || TcpListener::bind((SERVER[0], port)))?;
        let server = Self { received: received.clone(), peers: peers.clone() };
        space.start(move || {
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { return };
                peers.lock().expect("no panic inside").extend(stream.peer_addr());
                let received = received.clone();
                std::thread::spawn(move || {
                    let mut buffer = vec![0; 1 << 16];
                    let (mut seen, mut is_answered) = (Vec::new(), false);
                    while let Ok(count @ 1..) = stream.read(&mut buffer) {
                        seen.extend_from_slice(&buffer[..count]);
                        received.lock().expect("no panic inside").extend_from_slice(&buffer[..count]);
                        if !is_answered && seen.ends_with(after) {
                            is_answered = true;
                            if stream.write_all(answer).is_err() {
                                return;
                            }
                        }
                    }
                });
            }
        });
        Ok(server)
    }

    /// All bytes so far, of all connections.
    pub fn received(&self) -> Vec<u8> {
        self.received.lock().expect("no panic inside").clone()
    }

    /// The clients so far.
    pub fn peers(&self) -> Vec<SocketAddr> {
        self.peers.lock().expect("no panic inside").clone()
    }
}
