//! The cluster with Weir on it and the pods of `fixtures.yaml`, and what steps do with them.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::unistd::Pid;
use serde_json::Value;

use crate::kubernetes::prober::{Count, Outcome, Via};
use crate::kubernetes::{Cluster, Daemon, Platform, Setup};
use crate::lab::{self, OUTSIDE, output_of};

const FIXTURES: &str = include_str!("fixtures.yaml");
const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// The ports of pods' servers, and those of pods on the host's network.
pub const PORT: u16 = 8080;
pub const UDP_PORT: u16 = 8081;
pub const HOST_PORT: u16 = 18080;

/// How long what Kubernetes does in its own time may take.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The cluster under test.
pub struct World {
    pub cluster: Cluster,
}

/// A running pod.
#[derive(Clone, Debug)]
pub struct Pod {
    pub name: String,
    pub node: String,
    pub addresses: Vec<IpAddr>,
    /// Its container's cgroup (v2).
    group: PathBuf,
}

/// An attempt, and whether it must be answered.
#[derive(Clone, Debug)]
pub struct Row {
    pub from: Pod,
    pub via: Via,
    pub to: SocketAddr,
    pub is_allowed: bool,
}

/// Requests that go on until they are stopped.
pub struct Requests {
    pub name: String,
    process: Child,
}

impl Pod {
    /// Its address of one family with a port.
    pub fn at(&self, is_ipv4: bool, port: u16) -> SocketAddr {
        let address = self.addresses.iter().find(|address| address.is_ipv4() == is_ipv4);
        SocketAddr::new(*address.expect("pods have both families"), port)
    }

    /// Its container's first process.
    pub fn process(&self) -> Result<Pid> {
        let processes = fs::read_to_string(self.group.join("cgroup.procs"))?;
        Ok(Pid::from_raw(processes.lines().next().context("a container without processes")?.parse()?))
    }
}

/// Kubernetes itself did not come up: nothing was tried yet.
#[derive(Debug, thiserror::Error)]
#[error("Kubernetes does not start on this machine")]
pub struct NoCluster;

impl World {
    /// Starts the cluster, deploys Weir, and waits for the fixtures.
    pub fn start() -> Result<Self> {
        // From here on a process of its own removes everything, however this one ends.
        lab::cgroup::of_process()?;
        let name = format!("weirlab-{}-1", std::process::id());
        let setup = Setup { nodes: 3, platform: Platform::Kubeadm, has_controllers: true };
        let world = Self { cluster: Cluster::start(&name, &setup).context(NoCluster)? };
        world.script("scripts/deploy", &["up"])?;
        world.start_outside()?;
        world.cluster.apply(FIXTURES)?;
        for daemon_set in ["server", "client", "host"] {
            world.rollout("e2e", &format!("daemonset/{daemon_set}"))?;
        }
        world.rollout("kube-system", "deployment/coredns")?;
        Ok(world)
    }

    /// Starts a server on the outside host.
    pub fn start_outside(&self) -> Result<()> {
        let mut server = Command::new(self.cluster.programs().join("bin/agnhost"));
        server.args(["netexec", "--http-port=8080", "--udp-port=8081"]).stdin(Stdio::null());
        let log = self.cluster.directory().join("outside.log");
        Daemon::start(self.cluster.wire().outside(), self.cluster.name(), "agnhost", server, &log).map(drop)
    }

    /// Runs one of the repository's scripts against the cluster.
    pub fn script(&self, path: &str, arguments: &[&str]) -> Result<String> {
        let mut script = self.cluster.command(Path::new(ROOT).join(path));
        output_of(script.args(arguments).current_dir(ROOT), "")
    }

    /// Waits for `kubectl rollout status`.
    pub fn rollout(&self, namespace: &str, what: &str) -> Result<()> {
        let arguments = ["--namespace", namespace, "rollout", "status", what, "--timeout=180s"];
        self.cluster.kubectl(&arguments, "").map(drop)
    }

    /// Kubernetes' and Weir's versions.
    pub fn version(&self) -> Result<String> {
        let version: Value =
            serde_json::from_str(&self.cluster.kubectl(&["version", "--output", "json"], "")?)?;
        let weir =
            self.weir(&self.pods("weir-system", "app.kubernetes.io/name=weir-agent")?[0], &["--version"])?;
        Ok(format!("Kubernetes {}, {}", version["serverVersion"]["gitVersion"], weir.trim()))
    }

    /// The ready pods with a label, by node.
    pub fn pods(&self, namespace: &str, label: &str) -> Result<Vec<Pod>> {
        let list = self.cluster.get(&["pods", "--namespace", namespace, "--selector", label])?;
        let mut pods = Vec::new();
        for pod in list["items"].as_array().into_iter().flatten() {
            let status = &pod["status"]["containerStatuses"][0];
            if pod["metadata"]["deletionTimestamp"].is_null() && status["ready"] == true {
                pods.push(self.pod(pod, status)?);
            }
        }
        pods.sort_by(|one, other| one.node.cmp(&other.node));
        if pods.is_empty() {
            bail!("no ready pod in {namespace} with {label}");
        }
        Ok(pods)
    }

    fn pod(&self, pod: &Value, status: &Value) -> Result<Pod> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (node, container) = (text(&pod["spec"]["nodeName"]), text(&status["containerID"]));
        let container = container.rsplit('/').next().context("a container without ID")?;
        let groups = lab::cgroup::unified_root().context("no cgroup v2")?;
        let node_group = groups.join(format!("{}-{node}", self.cluster.name()));
        let addresses = pod["status"]["podIPs"].as_array().into_iter().flatten();
        Ok(Pod {
            name: text(&pod["metadata"]["name"]),
            addresses: addresses.map(|row| Ok(text(&row["ip"]).parse()?)).collect::<Result<_>>()?,
            group: find(&node_group, container).with_context(|| {
                format!("no cgroup of {} below {}", pod["metadata"]["name"], node_group.display())
            })?,
            node,
        })
    }

    /// The servers of the fixtures.
    pub fn servers(&self) -> Result<Vec<Pod>> {
        self.pods("e2e", "app=server")
    }

    /// The clients of the fixtures.
    pub fn clients(&self) -> Result<Vec<Pod>> {
        self.pods("e2e", "app=client")
    }

    /// The pods on the hosts' networks.
    pub fn hosts(&self) -> Result<Vec<Pod>> {
        self.pods("e2e", "app=host")
    }

    /// What `weir ARGUMENTS` prints in an agent's pod.
    pub fn weir(&self, agent: &Pod, arguments: &[&str]) -> Result<String> {
        let exec = ["--namespace", "weir-system", "exec", &agent.name, "--container", "agent", "--", "/weir"];
        self.cluster.kubectl(&[&exec, arguments].concat(), "")
    }

    /// The addresses of a Service.
    pub fn service(&self, namespace: &str, name: &str) -> Result<Vec<IpAddr>> {
        let service = self.cluster.get(&["service", "--namespace", namespace, name])?;
        let addresses = service["spec"]["clusterIPs"].as_array().context("a Service without addresses")?;
        addresses.iter().map(|address| Ok(address.as_str().unwrap_or_default().parse()?)).collect()
    }

    /// Probes from a pod, all at once.
    pub fn probe(&self, from: &Pod, probes: &[(Via, SocketAddr)]) -> Result<Vec<Outcome>> {
        let mut prober = prober("probe", from)?;
        let written = output_of(prober.arg(serde_json::to_string(probes)?), "")?;
        serde_json::from_str(&written).with_context(|| format!("parsing what the prober said: {written}"))
    }

    /// Starts requests from a pod.
    pub fn request(&self, name: &str, from: &Pod, via: Via, to: SocketAddr) -> Result<Requests> {
        let mut prober = prober("request", from)?;
        prober.arg(serde_json::to_string(&(via, to))?).stdin(Stdio::piped()).stdout(Stdio::piped());
        let log = fs::File::create(
            self.cluster.directory().join(format!("requests-{}.log", name.replace(' ', "-"))),
        )?;
        Ok(Requests { name: name.to_owned(), process: prober.stderr(log).spawn()? })
    }

    /// Waits until every attempt ends as it must, and then tries all of them once more.
    pub fn expect(&self, rows: &[Row]) -> Result<()> {
        let mut wrong = Vec::new();
        let settled = self.cluster.wait("the expected verdicts", PATIENCE, || {
            wrong = self.wrong(rows)?;
            Ok(wrong.is_empty())
        });
        settled.with_context(|| wrong.join("\n        "))?;
        let wrong = self.wrong(rows)?;
        if !wrong.is_empty() {
            bail!("right once, then no more:\n        {}", wrong.join("\n        "));
        }
        Ok(())
    }

    /// The attempts that do not end as they must.
    fn wrong(&self, rows: &[Row]) -> Result<Vec<String>> {
        let mut wrong = Vec::new();
        let mut rest: Vec<&Row> = rows.iter().collect();
        while let Some(first) = rest.first() {
            let (own, others) = rest.iter().partition::<Vec<&Row>, _>(|row| row.from.name == first.from.name);
            let probes: Vec<_> = own.iter().map(|row| (row.via, row.to)).collect();
            for (row, outcome) in own.iter().zip(self.probe(&own[0].from, &probes)?) {
                if outcome.is_answered() != row.is_allowed {
                    let wanted = if row.is_allowed { "an answer" } else { "none" };
                    wrong.push(format!(
                        "{} ({}) {:?} {}: {outcome:?}, not {wanted}",
                        row.from.name, row.from.node, row.via, row.to
                    ));
                }
            }
            rest = others;
        }
        Ok(wrong)
    }

    /// Says what may explain a failure.
    pub fn explain(&self) {
        let pods = self.cluster.kubectl(&["get", "pods", "--all-namespaces", "--output", "wide"], "");
        println!("{}", pods.unwrap_or_else(|error| format!("{error:#}")));
        let logs = [
            "--namespace",
            "weir-system",
            "logs",
            "--selector",
            "app.kubernetes.io/name=weir-agent",
            "--tail",
            "30",
            "--prefix",
        ];
        println!("{}", self.cluster.kubectl(&logs, "").unwrap_or_else(|error| format!("{error:#}")));
        for agent in self.pods("weir-system", "app.kubernetes.io/name=weir-agent").into_iter().flatten() {
            let drops = self.weir(&agent, &["observe", "--verdict", "dropped", "--last", "20"]);
            println!("dropped on {}:\n{}", agent.node, drops.unwrap_or_else(|error| format!("{error:#}")));
        }
    }
}

impl Requests {
    /// Ends them and says what came of them.
    pub fn stop(mut self) -> Result<Count> {
        drop(self.process.stdin.take());
        let output = self.process.wait_with_output()?;
        serde_json::from_slice(&output.stdout)
            .with_context(|| format!("the requests of {} ended early", self.name))
    }
}

/// Both families of an attempt.
pub fn both(from: &Pod, via: Via, to: &Pod, port: u16, is_allowed: bool) -> Vec<Row> {
    [true, false].map(|is_ipv4| Row { from: from.clone(), via, to: to.at(is_ipv4, port), is_allowed }).into()
}

/// The outside host's addresses.
pub fn outside(port: u16) -> [SocketAddr; 2] {
    [OUTSIDE[2], OUTSIDE[3]].map(|address| lab::socket_address(address, port))
}

fn prober(verb: &str, from: &Pod) -> Result<Command> {
    let mut prober = Command::new(lab::binary("examples/cluster")?);
    prober.arg(verb).arg(&from.group);
    Ok(prober)
}

fn find(directory: &Path, name: &str) -> Option<PathBuf> {
    for entry in fs::read_dir(directory).ok()?.flatten().filter(|entry| entry.path().is_dir()) {
        let found = if entry.file_name() == name { Some(entry.path()) } else { find(&entry.path(), name) };
        if found.is_some() {
            return found;
        }
    }
    None
}

/// For steps that only wait for a moment in which something must not happen.
pub fn pause(duration: Duration) {
    thread::sleep(duration);
}

/// Brings Weir's image to nodes that are new.
pub fn load_weir(world: &World) -> Result<()> {
    let image = Path::new(ROOT).join("target/image/weir.tar");
    world.cluster.nodes().iter().try_for_each(|node| node.load(&image))
}
