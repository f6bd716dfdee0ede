//! Weir on the cluster of the end-to-end tests: how soon pods start, beside those of `ptp` on the same
//! node, and what the agents need.
//!
//! kubelet times every call of the container runtime: the sums of its histograms are exact where one pod
//! starts between two readings. That a pod is ready it sees when it next lists containers, once a
//! second: pods are created at moments that are spread evenly over that second.

use std::fs;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use futures::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::Client;
use kube::api::{Api, WatchEvent, WatchParams};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{Pid, SysconfVar, sysconf};
use serde_json::json;
use tokio::runtime::Runtime;

use super::quantile;
use super::world::memory;
use crate::control_plane;
use crate::end_to_end::{self, World};
use crate::kubernetes::{Node, init};
use crate::lab::METRICS;
use crate::load::median;
use crate::reference::OtherPlugin;
use crate::row::Row;

const AGENTS: &str = "app.kubernetes.io/name=weir-agent";
const NAMESPACE: &str = "starts";
/// The node whose agent is started again and again.
const AGENT_NODE: usize = 1;
const AGENT_STARTS: usize = 5;
/// The node where pods start.
const POD_NODE: usize = 2;
const ROUNDS: usize = 20;
/// The node that is replaced by an empty one.
const NEW_NODE: usize = 3;
const PATIENCE: Duration = Duration::from_secs(60);
/// Within this a runtime has taken a new network configuration; the pod's address tells whether it had.
const NOTICED: Duration = Duration::from_millis(300);

/// Measures the agents, then starts of pods.
pub fn rows() -> Result<Vec<Row>> {
    let mut world = World::start()?;
    let mut rows = agents(&mut world)?;
    let row = "pod/start_p50/vs_ptp";
    rows.extend(
        pod_starts(&world).unwrap_or_else(|error| vec![Row::skipped(row, "ms", format!("{error:#}"))]),
    );
    Ok(rows)
}

/// Memory while the fixtures run, and the time from the container's start to readiness.
fn agents(world: &mut World) -> Result<Vec<Row>> {
    let mut resident = 0.0_f64;
    for agent in world.pods("weir-system", AGENTS)? {
        resident = resident.max(memory(agent.process()?, "VmRSS:")?);
    }
    let mut again = Vec::new();
    for _ in 0..AGENT_STARTS {
        let node = world.cluster.node(AGENT_NODE);
        let before = agent_of(node).context("an agent runs")?;
        let agents = ["--selector", AGENTS, "--field-selector", &format!("spec.nodeName={}", node.name())];
        let delete = ["--namespace", "weir-system", "delete", "pods", "--wait=false"];
        world.cluster.kubectl(&[&delete[..], &agents[..]].concat(), "")?;
        again.push(ready_after(node, Some(before))?);
        world.rollout("weir-system", "daemonset/weir-agent")?;
    }
    world.cluster.replace_node(NEW_NODE)?;
    let first = thread::scope(|scope| {
        let node = world.cluster.node(NEW_NODE);
        let ready = scope.spawn(move || ready_after(node, None));
        end_to_end::load_weir(world)?;
        ready.join().expect("a panic is the bench's end")
    })?;
    Ok(vec![
        Row::new("agent/rss_mib/three_nodes", "MiB", resident),
        Row::new("agent/pod_start_to_ready_seconds", "s", median(again)).at_most(1.0),
        Row::new("agent/pod_start_to_ready_seconds/new_node", "s", first).at_most(1.0),
    ])
}

/// The process of the agent on a node.
fn agent_of(node: &Node) -> Option<Pid> {
    let is_agent = |pid: &Pid| {
        let arguments = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        arguments.trim_end_matches('\0') == "/weir\0agent"
    };
    node.daemon().processes().into_iter().find(is_agent)
}

/// From the start of another agent than `before` until it says that it is ready, in seconds.
fn ready_after(node: &Node, before: Option<Pid>) -> Result<f64> {
    let deadline = Instant::now() + PATIENCE;
    let address = METRICS.parse()?;
    let mut agent = None;
    loop {
        if agent.is_none() {
            agent = agent_of(node).filter(|agent| Some(*agent) != before);
        }
        if let Some(agent) = agent
            && let Ok((200, _)) = node.space().http_get(address, "/readyz")
        {
            return since_start(agent);
        }
        ensure!(Instant::now() < deadline, "no agent is ready on {} after {PATIENCE:?}", node.name());
        thread::sleep(Duration::from_millis(5));
    }
}

/// How long a process has run, in seconds; the kernel counts in ticks of 10 ms.
fn since_start(process: Pid) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat"))?;
    // After the name, which may hold spaces, it is the 20th.
    let rest = stat.rsplit(") ").next().context("a name in parentheses")?;
    let ticks: f64 = rest.split(' ').nth(19).context("a start time")?.parse()?;
    let per_second = sysconf(SysconfVar::CLK_TCK)?.context("clock ticks")?;
    let now = Duration::from(clock_gettime(ClockId::CLOCK_BOOTTIME)?);
    Ok(now.as_secs_f64() - ticks / per_second as f64)
}

/// The plugin that connects the next pods of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Plugin {
    Weir,
    Ptp,
}

/// What a pod's start took.
struct Start {
    /// RunPodSandbox, as kubelet timed it; the plugin's ADD is a part of it.
    sandbox: Duration,
    /// That, and the container made and started.
    running: Duration,
    /// From the answer to its creation until a watch shows it ready.
    ready: Duration,
}

/// Pods one after the other, in rounds: Weir's, ptp's, and ptp's again for the noise.
fn pod_starts(world: &World) -> Result<Vec<Row>> {
    let starter = Starter::new(world)?;
    let [mut weir, mut ptp, mut ptp_again] = [const { Vec::<Start>::new() }; 3];
    // The first of each claims an identity, or makes its files.
    starter.start(Plugin::Weir, 0)?;
    starter.start(Plugin::Ptp, 0)?;
    for round in 1..=ROUNDS {
        // Neighbours take turns in being first.
        let mut order = [(Plugin::Weir, &mut weir), (Plugin::Ptp, &mut ptp), (Plugin::Ptp, &mut ptp_again)];
        order.rotate_left(round % 3);
        for (plugin, samples) in order {
            samples.push(starter.start(plugin, round)?);
        }
    }
    let row = |name: &str, of: fn(&Start) -> Duration| {
        let p50 = |samples: &[Start]| {
            let samples: Vec<Duration> = samples.iter().map(of).collect();
            quantile(&samples, 0.5).as_secs_f64() * 1e3
        };
        let ratio = |these: &[Start], those: &[Start]| {
            let ratios = these.iter().zip(those).map(|(one, other)| of(one).div_duration_f64(of(other)));
            median(ratios.collect())
        };
        Row::new(format!("pod/{name}_p50/vs_ptp"), "ms", p50(&weir))
            .against(p50(&ptp), Some(ratio(&weir, &ptp)))
            .noise((ratio(&ptp_again, &ptp) - 1.0).abs())
    };
    Ok(vec![
        row("sandbox", |start| start.sandbox),
        row("start", |start| start.running).at_most(1.1),
        row("ready", |start| start.ready).at_most(1.1),
    ])
}

/// Starts pods on one node.
struct Starter<'a> {
    world: &'a World,
    runtime: Runtime,
    pods: Api<Pod>,
    /// The node's own /etc/cni/net.d.
    configurations: PathBuf,
}

impl<'a> Starter<'a> {
    fn new(world: &'a World) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let client: Client = runtime.block_on(control_plane::client(&world.cluster.kubeconfig()))?;
        world.cluster.kubectl(&["create", "namespace", NAMESPACE], "")?;
        let node = world.cluster.node(POD_NODE);
        let first =
            fs::read_to_string(node.directory().join(init::PID)).context("reading the first process")?;
        let root = PathBuf::from(format!("/proc/{}/root", first.trim()));
        OtherPlugin::ptp(Path::new("/var/lib/cni")).install(&root.join("opt/cni/bin"))?;
        Ok(Self {
            world,
            runtime,
            pods: Api::namespaced(client, NAMESPACE),
            configurations: root.join("etc/cni/net.d"),
        })
    }

    /// Lets `plugin` connect the next pods: runtimes take the first configuration by name.
    fn choose(&self, plugin: Plugin) -> Result<()> {
        let configuration = self.configurations.join("00-ptp.conflist");
        match (plugin, configuration.exists()) {
            (Plugin::Weir, true) => fs::remove_file(&configuration)?,
            (Plugin::Ptp, false) => {
                let draft = self.configurations.join(".00-ptp.new");
                fs::write(&draft, OtherPlugin::ptp(Path::new("/var/lib/cni")).list().to_string())?;
                fs::rename(&draft, &configuration)?;
            }
            _ => {}
        }
        thread::sleep(NOTICED);
        Ok(())
    }

    /// Starts a pod, which stays.
    fn start(&self, plugin: Plugin, round: usize) -> Result<Start> {
        self.choose(plugin)?;
        thread::sleep(Duration::from_secs(1).mul_f64(round as f64 / ROUNDS as f64));
        let before = self.calls()?;
        let (pod, ready) = self.runtime.block_on(self.create(plugin))?;
        let after = self.calls()?;
        let address = pod.status.and_then(|status| status.pod_ip).context("a ready pod without address")?;
        let is_ptp = address.starts_with(OtherPlugin::ADDRESSES);
        ensure!(is_ptp == (plugin == Plugin::Ptp), "{address} is no address of {plugin:?}");
        let mut took = [Duration::ZERO; 3];
        for (took, (before, after)) in took.iter_mut().zip(before.iter().zip(&after)) {
            ensure!(after.count == before.count + 1, "another pod starts on the node");
            *took = Duration::from_secs_f64(after.seconds - before.seconds);
        }
        Ok(Start { sandbox: took[0], running: took.iter().sum(), ready })
    }

    /// Creates a pod; it, and when it was ready.
    async fn create(&self, plugin: Plugin) -> Result<(Pod, Duration)> {
        let version = self.pods.list(&Default::default()).await?.metadata.resource_version;
        let mut events =
            pin!(self.pods.watch(&WatchParams::default(), &version.context("a list has a version")?).await?);
        let pod = serde_json::from_value(json!({
            "metadata": {"generateName": format!("{plugin:?}-").to_lowercase(), "labels": {"app": "starts"}},
            "spec": {"nodeName": self.world.cluster.node(POD_NODE).name(), "terminationGracePeriodSeconds": 0,
                "automountServiceAccountToken": false, "enableServiceLinks": false,
                "containers": [{"name": "pause", "image": "registry.k8s.io/pause:3.10",
                    "imagePullPolicy": "IfNotPresent"}]},
        }))?;
        let created = self.pods.create(&Default::default(), &pod).await?;
        let began = Instant::now();
        let ready = async {
            while let Some(event) = events.next().await {
                if let WatchEvent::Modified(pod) = event?
                    && pod.metadata.name == created.metadata.name
                    && is_ready(&pod)
                {
                    return Ok((pod, began.elapsed()));
                }
            }
            bail!("the watch ended")
        };
        tokio::time::timeout(PATIENCE, ready).await.context("the pod is not ready")?
    }

    /// kubelet's calls that start a pod, in their order.
    fn calls(&self) -> Result<[Calls; 3]> {
        let path = format!("/api/v1/nodes/{}/proxy/metrics", self.world.cluster.node(POD_NODE).name());
        let metrics = self.world.cluster.kubectl(&["get", "--raw", &path], "")?;
        let value = |what: &str, operation: &str| -> Result<f64> {
            let name = format!(
                "kubelet_runtime_operations_duration_seconds_{what}{{operation_type=\"{operation}\"}} "
            );
            let value = metrics.lines().find_map(|line| line.strip_prefix(&name));
            Ok(value.with_context(|| format!("kubelet does not tell {name}"))?.parse()?)
        };
        let calls = |operation| -> Result<Calls> {
            Ok(Calls { count: value("count", operation)? as u64, seconds: value("sum", operation)? })
        };
        Ok([calls("run_podsandbox")?, calls("create_container")?, calls("start_container")?])
    }
}

/// How often kubelet has called the runtime, and how long that took in all.
struct Calls {
    count: u64,
    seconds: f64,
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.into_iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}
