//! The lab: real nodes and pods out of network namespaces, on one machine.
//!
//! ```text
//!              wire (a bridge in a namespace of its own)
//!      eth0 |            eth0 |                 eth0 |
//!    +------+-----+    +------+-----+         +------+------+
//!    | node1      |    | node2      |         | outside     |
//!    | weir agent |    | weir agent |         | not a node  |
//!    +--+------+--+    +--+------+--+         +-------------+
//!      pod    pod        pod    pod
//! ```
//!
//! A node has its own bpffs, cgroup, state directory and agent process; a pod is a
//! namespace that the real `weir-cni` connects. Everything is named
//! `weirlab-<pid>-<number>-...`, goes when the lab is dropped, and is removed by
//! `tests/lab/clean` when the process ends in any other way.

// The tests, the demo and the benchmarks each use a part of it.
#![allow(dead_code)]

pub mod cgroup;
mod manifests;
mod node;
mod pod;
mod probe;
mod relay;
mod space;
mod streams;
mod traffic;
mod wall;
mod wire;

use std::cell::Cell;
use std::env;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

#[allow(unused_imports)]
pub use self::{
    manifests::{Backend, Manifests, ServicePort},
    node::{METRICS, Node},
    pod::{PORTS, Plugin, Pod, PodSpec},
    probe::{Outcome, PATIENCE, Server, Via, ping, probe, probe_udp},
    relay::relay,
    space::{Running, Space, output_of},
    streams::{Streams, round_trip},
    traffic::{Report, Traffic},
    wall::{MARKER, Wall},
    wire::{OUTSIDE, Wire, node_addresses, route_to_pods},
};

/// The program that removes what labs leave behind.
pub const CLEAN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/lab/clean");

/// At most this many labs at once: each has agents that compete for the processor.
const LABS_AT_ONCE: usize = 3;

/// What a lab shall be.
#[derive(Clone, Debug)]
pub struct Setup {
    /// How many nodes.
    pub nodes: usize,
    /// `tunnel` or `native`.
    pub routing: String,
    /// More arguments for every agent.
    pub agent_arguments: Vec<String>,
    /// Whether agents are started and awaited.
    pub starts_agents: bool,
    /// Whether agents take their objects from the lab's manifests; else their own arguments say from where.
    pub has_manifests: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            nodes: 1,
            routing: "tunnel".to_owned(),
            agent_arguments: Vec::new(),
            starts_agents: true,
            has_manifests: true,
        }
    }
}

/// A wire with nodes and an outside host.
#[derive(Debug)]
pub struct Lab {
    name: String,
    pods: AtomicUsize,
    nodes: Vec<Node>,
    _outside_server: Server,
    wire: Wire,
    manifests: Manifests,
    directory: PathBuf,
    _permit: Permit,
}

impl Lab {
    /// Builds the nodes, and starts their agents if `setup` says so.
    pub fn start(setup: Setup) -> Result<Self> {
        let permit = Permit::take();
        cgroup::of_process()?;
        static LABS: AtomicUsize = AtomicUsize::new(1);
        let name = format!("weirlab-{}-{}", std::process::id(), LABS.fetch_add(1, Ordering::Relaxed));
        let directory = Path::new("/tmp").join(&name);
        let manifests = Manifests::create(&directory)?;
        let wire = Wire::create(&name)?;
        let addresses = OUTSIDE.map(|address| address.parse().expect("OUTSIDE holds addresses"));
        let outside_server = Server::start(wire.outside(), "outside", &addresses, &PORTS)?;
        let mut nodes = Vec::new();
        for number in 1..=setup.nodes {
            let node = Node::create(&name, &wire, &directory, number, &setup)?;
            let cidrs = pod_cidrs(number);
            route_to_pods(wire.outside(), &cidrs, node.addresses())?;
            manifests.node(node.name(), node.addresses(), &cidrs)?;
            nodes.push(node);
        }
        let lab = Self {
            name,
            pods: AtomicUsize::new(0),
            nodes,
            _outside_server: outside_server,
            wire,
            manifests,
            directory,
            _permit: permit,
        };
        if setup.starts_agents {
            lab.start_agents()?;
        }
        Ok(lab)
    }

    /// Starts every agent and waits until all are ready.
    pub fn start_agents(&self) -> Result<()> {
        self.nodes.iter().try_for_each(Node::start_agent)?;
        self.nodes.iter().try_for_each(|node| node.wait_ready().map(drop))
    }

    /// The prefix of all its names.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its directory, with `manifests` and one directory a node.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Node `number`, from 1.
    pub fn node(&self, number: usize) -> &Node {
        &self.nodes[number - 1]
    }

    /// All nodes.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The node that a pod is on.
    pub fn node_of(&self, pod: &Pod) -> &Node {
        self.nodes.iter().find(|node| node.name() == pod.node()).expect("a pod is on a node of its lab")
    }

    /// Deletes the device of node `number` and makes another one under its name.
    pub fn renew_wire(&self, number: usize) -> Result<()> {
        let node = self.node(number);
        self.wire.renew(node.space(), node.name(), node.addresses())
    }

    /// The namespace that joins the hosts; a host's port has the host's name.
    pub fn wire(&self) -> &Space {
        self.wire.space()
    }

    /// Looks at what passes on the wire.
    pub fn look_at_wire(&self) -> Result<Wall> {
        Wall::start(self.wire.space())
    }

    /// The host on the wire that is not a node.
    pub fn outside(&self) -> &Space {
        self.wire.outside()
    }

    /// The cluster's objects.
    pub fn manifests(&self) -> &Manifests {
        &self.manifests
    }

    /// Begins a pod `namespace/name` on node `number`.
    pub fn pod(&self, number: usize, key: &str) -> PodSpec<'_> {
        PodSpec::new(self, self.node(number), key)
    }

    /// Begins the pod that `manifest` describes, on the node that it names.
    pub fn pod_of(&self, manifest: &serde_json::Value) -> Result<PodSpec<'_>> {
        let name = manifest["spec"]["nodeName"].as_str().context("a Pod without nodeName")?;
        let node =
            self.nodes.iter().find(|node| node.name() == name).with_context(|| format!("no node {name}"))?;
        PodSpec::of_manifest(self, node, manifest)
    }

    /// Writes a Service whose ready backends are `pods`.
    pub fn service(
        &self,
        key: &str,
        cluster_ips: &[&str],
        ports: &[ServicePort],
        pods: &[&Pod],
    ) -> Result<()> {
        let backends: Vec<Backend> = pods.iter().map(|pod| backend(pod, true)).collect();
        self.manifests.service(key.split_once('/').context("namespace/name")?, cluster_ips, ports, &backends)
    }

    fn next_name(&self) -> String {
        format!("{}-{}", self.name, self.pods.fetch_add(1, Ordering::Relaxed))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // Nodes and spaces go by themselves; the cgroups only when their last thread has left.
        let directory = self.directory.clone();
        self.nodes.clear();
        if let Err(error) = fs::remove_dir_all(&directory) {
            eprintln!("removing {}: {error}", directory.display());
        }
    }
}

/// A pod as a backend.
pub fn backend(pod: &Pod, is_ready: bool) -> Backend {
    Backend { addresses: pod.addresses().to_vec(), is_ready, node: pod.node().to_owned() }
}

/// The pod CIDRs of node `number`.
pub fn pod_cidrs(number: usize) -> Vec<String> {
    vec![format!("10.1.{number}.0/24"), format!("fd00:1:0:{number:x}::/64")]
}

/// The path of one of the crate's programs, built beside the one that runs.
pub fn binary(name: &str) -> Result<PathBuf> {
    let own = env::current_exe()?;
    let path = own.ancestors().nth(2).context("a program without directory")?.join(name);
    if !path.exists() {
        bail!("{} is missing: run `cargo build --bins`", path.display());
    }
    Ok(path)
}

/// Why no lab can be built here, if it cannot.
pub fn machine_lacks() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("needs root".to_owned());
    }
    if Command::new("ip").arg("-V").output().is_err() {
        return Some("needs the ip command (iproute2)".to_owned());
    }
    if let Err(error) = cgroup::of_process() {
        return Some(format!("needs a writable cgroup v2: {error:#}"));
    }
    static BPFFS: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    let has_bpffs = *BPFFS.get_or_init(|| {
        let directory = PathBuf::from(format!("/tmp/weirlab-{}-0-bpffs", std::process::id()));
        let can = fs::create_dir_all(&directory).is_ok() && node::can_mount_bpffs(&directory);
        can && fs::remove_dir(&directory).is_ok()
    });
    (!has_bpffs).then(|| "needs bpffs (CONFIG_BPF_SYSCALL and leave to mount)".to_owned())
}

thread_local! {
    static HAS_FAILED: Cell<bool> = const { Cell::new(false) };
}

/// Lets the labs of this thread say what their agents saw when they are dropped: a test that
/// returns an error does not panic.
pub fn noting_failure<T>(result: Result<T>) -> Result<T> {
    if result.is_err() {
        HAS_FAILED.set(true);
    }
    result
}

fn has_failed() -> bool {
    std::thread::panicking() || HAS_FAILED.get()
}

/// How long a test waits for what comes at once: 10 s, and on slow (emulated) machines as many
/// times longer as WEIR_TEST_PATIENCE says.
pub fn patience() -> Duration {
    let factor = std::env::var("WEIR_TEST_PATIENCE").ok().and_then(|factor| factor.parse().ok());
    Duration::from_secs(10) * factor.unwrap_or(1)
}

/// Polls until `condition` holds; the error says what was awaited.
pub fn wait_for(what: &str, condition: impl FnMut() -> Result<bool>) -> Result<()> {
    noting_failure(poll_for(what, condition))
}

fn poll_for(what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let patience = patience();
    let deadline = Instant::now() + patience;
    loop {
        let last = condition();
        if matches!(last, Ok(true)) {
            return Ok(());
        }
        if Instant::now() > deadline {
            last.with_context(|| format!("waiting for {what}"))?;
            bail!("waited {patience:?} in vain for {what}");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// `address:port`.
pub fn socket_address(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address.parse().expect("tests write addresses that parse"), port)
}

/// A place among the labs that may be there at once.
#[derive(Debug)]
struct Permit;

static RUNNING: Mutex<usize> = Mutex::new(0);
static ENDED: Condvar = Condvar::new();

impl Permit {
    fn take() -> Self {
        let running = RUNNING.lock().expect("nothing panics while it holds this lock");
        let mut running = ENDED
            .wait_while(running, |running| *running >= LABS_AT_ONCE)
            .expect("nothing panics with this lock");
        *running += 1;
        Self
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        *RUNNING.lock().expect("nothing panics while it holds this lock") -= 1;
        ENDED.notify_one();
    }
}
