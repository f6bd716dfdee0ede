//! A real API server, and nodes of the lab whose agents ask it.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use anyhow::{Context, Result};
use futures::StreamExt;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod as PodObject};
use kube::Client;
use kube::api::{Api, DeleteParams, WatchEvent, WatchParams};
use libbpf_rs::{MapCore, MapFlags, MapHandle};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use weir::kube::crd::NodeEndpoints;

use crate::control_plane::{self, ControlPlane};
use crate::lab::{self, Lab, Pod, Setup, Space, relay};

/// The ABI directory of the pinned maps is the only one there.
const PINS: &str = "bpf/weir";

/// The world of a section. What goes first stands first.
pub struct World {
    pub lab: Lab,
    _relays: Vec<Relay>,
    pub plane: ControlPlane,
    pub client: Client,
    pub runtime: Runtime,
}

impl World {
    /// Starts the API server and makes the nodes, which it knows; agents are started by `start_agent`.
    pub fn start(section: &str, nodes: usize) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let plane = control_plane::start(section)?
            .context("no etcd or kube-apiserver here: make cluster builds them")?;
        let client = runtime.block_on(async {
            plane.apply(&definitions()?).await?;
            plane.apply_base().await?;
            plane.client().await
        })?;
        let lab =
            Lab::start(Setup { nodes, starts_agents: false, has_manifests: false, ..Setup::default() })?;
        let mut relays = Vec::new();
        for (number, node) in (1..).zip(lab.nodes()) {
            relays.push(Relay::start(node.space(), plane.port())?);
            let object = node_object(node.name(), node.addresses(), &lab::pod_cidrs(number));
            let nodes: Api<Node> = Api::all(client.clone());
            runtime.block_on(nodes.create(&Default::default(), &serde_json::from_value(object)?))?;
        }
        Ok(Self { lab, _relays: relays, plane, client, runtime })
    }

    /// Starts the agent of node `number` with the rights of deploy/base; `wait_ready` waits for it.
    pub fn start_agent(&self, number: usize) -> Result<()> {
        let node = self.lab.node(number);
        let kubeconfig = self.runtime.block_on(self.plane.as_account("weir-agent", node.name()))?;
        node.start_agent_with(&["--kubeconfig", &kubeconfig.display().to_string()])
    }

    /// Makes a namespace.
    pub fn namespace(&self, name: &str) -> Result<()> {
        let object: Namespace = serde_json::from_value(json!({"metadata": {"name": name}}))?;
        let api: Api<Namespace> = Api::all(self.client.clone());
        self.runtime.block_on(api.create(&Default::default(), &object))?;
        Ok(())
    }

    /// Makes a pod `namespace/name` on node `number`: the object, then the attachment.
    pub fn pod(&self, number: usize, namespace: &str, name: &str, labels: &Value) -> Result<Pod> {
        let object: PodObject = serde_json::from_value(json!({
            "metadata": {"name": name, "labels": labels},
            "spec": {"nodeName": self.lab.node(number).name(), "serviceAccountName": "default",
                "containers": [{"name": "a", "image": "a"}]},
        }))?;
        let api: Api<PodObject> = Api::namespaced(self.client.clone(), namespace);
        self.runtime.block_on(api.create(&Default::default(), &object))?;
        self.lab.pod(number, &format!("{namespace}/{name}")).create()
    }

    /// Ends a pod of node `number`: its attachment, then the object.
    pub fn end_pod(&self, number: usize, pod: Pod) -> Result<()> {
        pod.delete(self.lab.node(number))?;
        let api: Api<PodObject> = Api::namespaced(self.client.clone(), pod.namespace());
        self.runtime.block_on(api.delete(pod.name(), &DeleteParams::default().grace_period(0)))?;
        Ok(())
    }

    /// Opens a pinned map of node `number`.
    pub fn map(&self, number: usize, name: &str) -> Result<PinnedMap> {
        let directory = self.lab.node(number).directory().join(PINS);
        let versions = fs::read_dir(&directory)?.flatten().map(|entry| entry.path().join("maps").join(name));
        let path = versions.into_iter().find(|path| path.exists()).context("no such map is pinned")?;
        Ok(PinnedMap(MapHandle::from_pinned_path(path)?))
    }
}

/// How often a node's agent has written its endpoints, as a watch shows it: an event a write.
pub struct Writes {
    count: Arc<AtomicUsize>,
    watching: tokio::task::JoinHandle<kube::Result<()>>,
}

impl Writes {
    /// Counts from now on.
    pub fn count(world: &World, node: &str) -> Result<Self> {
        let api: Api<NodeEndpoints> = Api::all(world.client.clone());
        let version = world.runtime.block_on(api.list(&Default::default()))?.metadata.resource_version;
        let version = version.context("a list has a version")?;
        let count = Arc::new(AtomicUsize::new(0));
        let (counted, node) = (count.clone(), node.to_owned());
        let watching = world.runtime.spawn(async move {
            let mut events = pin!(api.watch(&WatchParams::default(), &version).await?);
            while let Some(event) = events.next().await {
                if let WatchEvent::Added(object) | WatchEvent::Modified(object) = event?
                    && object.spec.node == node
                {
                    counted.fetch_add(1, Ordering::Relaxed);
                }
            }
            Ok(())
        });
        Ok(Self { count, watching })
    }

    /// How many there have been.
    pub fn so_far(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }
}

impl Drop for Writes {
    fn drop(&mut self) {
        self.watching.abort();
    }
}

/// A map as a program beside the agent sees it.
pub struct PinnedMap(MapHandle);

impl PinnedMap {
    /// The bytes of a row.
    pub fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        Ok(self.0.lookup(key, MapFlags::ANY)?)
    }
}

/// A line of the memory of a process, in MiB.
pub fn memory(process: Pid, line: &str) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let value = status.lines().find_map(|text| text.strip_prefix(line)).context("a line of status")?;
    Ok(value.trim().trim_end_matches(" kB").parse::<f64>()? / 1024.0)
}

/// The process of a node's agent.
pub fn agent(node: &lab::Node) -> Result<Pid> {
    Ok(Pid::from_raw(i32::try_from(node.agent_pid().context("the agent runs")?)?))
}

/// A Node as a kubelet registers it.
pub fn node_object(name: &str, addresses: &[std::net::IpAddr], pod_cidrs: &[String]) -> Value {
    let addresses: Vec<_> =
        addresses.iter().map(|address| json!({"type": "InternalIP", "address": address})).collect();
    json!({
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux"}},
        "spec": {"podCIDR": pod_cidrs.first(), "podCIDRs": pod_cidrs},
        "status": {"addresses": addresses},
    })
}

fn definitions() -> Result<String> {
    weir::kube::crd::crds().iter().map(|crd| Ok(format!("---\n{}", weir::yaml::write(crd)?))).collect()
}

/// A node's way to the API server on the machine's own loopback: the same port on the node's.
pub struct Relay(TcpListener);

impl Relay {
    /// Takes connections to `port` in `space`.
    pub fn start(space: &Space, port: u16) -> Result<Self> {
        let listener = space.run(move || TcpListener::bind(("127.0.0.1", port)))?;
        let accepting = listener.try_clone()?;
        thread::spawn(move || {
            for client in accepting.incoming() {
                let Ok(client) = client else { return };
                thread::spawn(move || relay(client, TcpStream::connect(("127.0.0.1", port))?));
            }
        });
        Ok(Self(listener))
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        // Ends the thread that accepts, which holds the node's namespace.
        let _ = nix::sys::socket::shutdown(self.0.as_raw_fd(), nix::sys::socket::Shutdown::Both);
    }
}
