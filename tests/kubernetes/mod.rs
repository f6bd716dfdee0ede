//! Real Kubernetes on the lab's wire: etcd, API server, controller manager and scheduler, and
//! on each node a containerd and a kubelet.
//!
//! ```text
//!  127.0.0.1:PORT (kubectl)
//!        | relay
//!  +-----+-------+      +-------------+      +-------------+
//!  | control     |      | node1       |      | outside     |
//!  | etcd, API.. |      | containerd  |  ... | not a node  |
//!  |             |      | kubelet     |      |             |
//!  +------+------+      +------+------+      +------+------+
//!         +------- wire -------+--------------------+
//! ```
//!
//! Nodes are the lab's, with mounts, cgroups and processes of their own besides, as a machine
//! has them (`init`). Everything is named `<cluster>-...`: a daemon is the cgroup that
//! it runs in, so that whatever it started is found there, and `tests/lab/clean` ends and
//! removes all of it by that name.

// The command and the end-to-end tests each use a part of it.
#![allow(dead_code)]

mod certificates;
mod control_plane;
mod daemon;
mod hierarchy;
pub mod init;
mod node;
pub mod platform;
pub mod prober;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

#[allow(unused_imports)]
pub use self::{
    daemon::Daemon,
    node::{Node, load},
    platform::Platform,
};
use crate::lab::{CLEAN, Wire, output_of, route_to_pods};
use certificates::Authority;
use control_plane::ControlPlane;

/// Builds the programs where they are missing, and says where they are.
const PROGRAMS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/cluster-programs");

/// CoreDNS, as pods.
const CLUSTER_DNS: &str = include_str!("cluster-dns.yaml");

/// The file with the name of the overlay that is for nodes like these.
const OVERLAY: &str = "overlay";

/// Where pods of system classes are limited, those of Kubernetes itself are not.
const QUOTA: &str = "
apiVersion: v1
kind: ResourceQuota
metadata: {name: gcp-critical-pods, namespace: kube-system}
spec:
  hard: {pods: '1000000000'}
  scopeSelector:
    matchExpressions:
    - {scopeName: PriorityClass, operator: In, values: [system-node-critical, system-cluster-critical]}
";

/// What a cluster shall be.
#[derive(Clone, Debug)]
pub struct Setup {
    /// How many nodes.
    pub nodes: usize,
    /// Whose nodes they are like.
    pub platform: Platform,
    /// False: an API server alone, where what is created stays as it is.
    pub has_controllers: bool,
}

/// A cluster; it goes when it is dropped, unless it is kept.
#[derive(Debug)]
pub struct Cluster {
    name: String,
    directory: PathBuf,
    programs: PathBuf,
    platform: Platform,
    authority: Authority,
    wire: Wire,
    control_plane: ControlPlane,
    nodes: Vec<Node>,
    is_kept: bool,
}

impl Cluster {
    /// Starts everything; returns when the API server is ready and knows every node.
    pub fn start(name: &str, setup: &Setup) -> Result<Self> {
        let programs = provide_programs()?;
        let directory = Path::new("/tmp").join(name);
        fs::create_dir(&directory)
            .with_context(|| format!("making {}: is the cluster there already?", directory.display()))?;
        let left = Leftovers(Some(name.to_owned()));
        let facts = setup.platform.facts();
        fs::write(directory.join(OVERLAY), facts.overlay)?;
        let authority = Authority::create(&directory.join("pki"))?;
        let mut wire = Wire::create(name)?;
        wire.keep();
        if !facts.is_linked {
            wire.forward()?;
        }
        let control_plane = ControlPlane::start(name, &wire, &directory, &programs, &authority, setup)?;
        left.forget();
        let mut cluster = Self {
            name: name.to_owned(),
            directory,
            programs,
            platform: setup.platform,
            authority,
            wire,
            control_plane,
            nodes: Vec::new(),
            is_kept: false,
        };
        for number in 1..=setup.nodes {
            cluster.nodes.push(cluster.start_node(number)?);
        }
        cluster.control_plane.write_kubeconfig(name, &cluster.kubeconfig(), &cluster.authority)?;
        cluster.wait_api_server()?;
        if facts.limits_critical_pods {
            cluster.apply(QUOTA)?;
        }
        if setup.has_controllers {
            cluster.apply(CLUSTER_DNS)?;
        }
        for number in 1..=setup.nodes {
            cluster.await_node(number)?;
        }
        Ok(cluster)
    }

    fn start_node(&self, number: usize) -> Result<Node> {
        Node::start(
            &self.name,
            &self.wire,
            &self.directory,
            number,
            &self.programs,
            &self.authority,
            self.platform,
        )
    }

    /// Waits until the API server knows the node, and lets the other hosts reach its pods.
    fn await_node(&self, number: usize) -> Result<()> {
        let has_pod_cidrs = self.platform.facts().gives_pod_cidrs;
        let node = self.node(number);
        let mut cidrs = Vec::new();
        self.wait(&format!("{} to register", node.name()), Duration::from_secs(60), || {
            let object = self.get(&["node", node.name()])?;
            let given = object["spec"]["podCIDRs"].as_array().map(Vec::as_slice).unwrap_or_default();
            cidrs = given.iter().filter_map(|cidr| Some(cidr.as_str()?.to_owned())).collect();
            Ok(!has_pod_cidrs || !cidrs.is_empty())
        })?;
        for space in [self.wire.outside(), self.control_plane.space()] {
            route_to_pods(space, &cidrs, node.addresses())?;
        }
        Ok(())
    }

    /// Lets everything outlive this value; `tests/lab/clean NAME` removes it.
    pub fn keep(mut self) {
        self.is_kept = true;
    }

    /// The prefix of all its names, and the name of kubectl's context.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The directory with its state and its logs.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The directory of the programs, with `bin` and `images`.
    pub fn programs(&self) -> &Path {
        &self.programs
    }

    /// An administrator's configuration for kubectl, to be used in the machine's own network.
    pub fn kubeconfig(&self) -> PathBuf {
        self.directory.join("kubeconfig")
    }

    /// The wire with the outside host.
    pub fn wire(&self) -> &Wire {
        &self.wire
    }

    /// What the nodes ask.
    pub fn control_plane(&self) -> &ControlPlane {
        &self.control_plane
    }

    /// Node `number`, from 1.
    pub fn node(&self, number: usize) -> &Node {
        &self.nodes[number - 1]
    }

    /// All nodes.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Ends node `number` as a power cut does, and puts an empty one in its place.
    pub fn replace_node(&mut self, number: usize) -> Result<()> {
        self.nodes[number - 1].destroy(&self.wire)?;
        self.nodes[number - 1] = self.start_node(number)?;
        self.await_node(number)
    }

    /// A command that talks to this cluster, with its kubectl first on PATH.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("KUBECONFIG", self.kubeconfig());
        command.env("PATH", format!("{}:{path}", self.programs.join("bin").display()));
        command
    }

    /// What `kubectl ARGUMENTS` prints.
    pub fn kubectl(&self, arguments: &[&str], input: &str) -> Result<String> {
        let mut kubectl = self.command(self.programs.join("bin/kubectl"));
        output_of(kubectl.args(arguments), input)
    }

    /// `kubectl apply` of manifests.
    pub fn apply(&self, yaml: &str) -> Result<String> {
        self.kubectl(&["apply", "--filename", "-"], yaml)
    }

    /// What `kubectl get ARGUMENTS` knows, as JSON.
    pub fn get(&self, arguments: &[&str]) -> Result<Value> {
        let written = self.kubectl(&[&["get", "--output", "json"], arguments].concat(), "")?;
        serde_json::from_str(&written).with_context(|| format!("parsing what kubectl got: {written}"))
    }

    /// Waits until the API server says that it is ready.
    pub fn wait_api_server(&self) -> Result<()> {
        self.wait("the API server", Duration::from_secs(60), || {
            Ok(self.kubectl(&["get", "--raw", "/readyz"], "")? == "ok")
        })
    }

    /// Polls until `condition` holds; the error says what was awaited, and how it last failed.
    pub fn wait(
        &self,
        what: &str,
        patience: Duration,
        mut condition: impl FnMut() -> Result<bool>,
    ) -> Result<()> {
        let deadline = Instant::now() + patience;
        loop {
            let last = condition();
            if matches!(last, Ok(true)) {
                return Ok(());
            }
            if Instant::now() > deadline {
                last.with_context(|| {
                    format!("waiting for {what}; logs are in {}", self.directory.display())
                })?;
                bail!("waited {} s in vain for {what}", patience.as_secs());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if !self.is_kept {
            remove(&self.name);
        }
    }
}

/// Builds what is missing, which is told on standard error.
fn provide_programs() -> Result<PathBuf> {
    let built = Command::new(PROGRAMS).stderr(Stdio::inherit()).output().context("building the programs")?;
    if !built.status.success() {
        bail!("{PROGRAMS}: {}", built.status);
    }
    Ok(PathBuf::from(String::from_utf8(built.stdout)?.trim()))
}

/// Ends a cluster, and removes all that is named after it.
pub fn remove(name: &str) {
    match Command::new(CLEAN).arg(name).status() {
        Ok(status) if status.success() => {}
        ended => eprintln!("{CLEAN} {name}: {ended:?}"),
    }
}

/// What a start that fails has left until then.
struct Leftovers(Option<String>);

impl Leftovers {
    fn forget(mut self) {
        self.0 = None;
    }
}

impl Drop for Leftovers {
    fn drop(&mut self) {
        if let Some(name) = &self.0 {
            remove(name);
        }
    }
}
