//! A pod: a network namespace that the real `weir-cni` connects, called as a runtime calls it.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::Lab;
use super::node::{Node, program_in};
use super::probe::{Outcome, Server, Via, probe};
use super::space::{Running, Space, output_of};

/// The ports on which every pod answers, TCP and UDP, besides those that it names.
pub const PORTS: [u16; 4] = [80, 81, 8080, 9090];

/// What a pod shall be; made by `Lab::pod`.
pub struct PodSpec<'a> {
    lab: &'a Lab,
    node: &'a Node,
    namespace: String,
    name: String,
    labels: Vec<(String, String)>,
    ports: Vec<(String, String, u16)>,
    host_ports: Vec<Value>,
    is_outside_cgroup: bool,
}

/// A pod with its servers; its namespace goes when it is dropped, its endpoint only by `delete`.
#[derive(Debug)]
pub struct Pod {
    namespace: String,
    name: String,
    node: String,
    container_id: String,
    addresses: Vec<IpAddr>,
    result: Value,
    plugin: Plugin,
    add_took: Duration,
    _server: Server,
    space: Space,
}

/// How a runtime calls the plugin on one node.
#[derive(Clone, Debug)]
pub struct Plugin {
    config: Value,
    node: String,
    programs: Option<PathBuf>,
}

impl<'a> PodSpec<'a> {
    pub(super) fn new(lab: &'a Lab, node: &'a Node, key: &str) -> Self {
        let (namespace, name) = key.split_once('/').expect("a pod is named namespace/name");
        Self {
            lab,
            node,
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            labels: Vec::new(),
            ports: Vec::new(),
            host_ports: Vec::new(),
            is_outside_cgroup: false,
        }
    }

    pub(super) fn of_manifest(lab: &'a Lab, node: &'a Node, manifest: &Value) -> Result<Self> {
        let metadata = &manifest["metadata"];
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let mut spec =
            Self::new(lab, node, &format!("{}/{}", text(&metadata["namespace"]), text(&metadata["name"])));
        for (name, value) in metadata["labels"].as_object().into_iter().flatten() {
            spec = spec.label(name, &text(value));
        }
        let containers = manifest["spec"]["containers"].as_array().context("a Pod without containers")?;
        for port in
            containers.iter().flat_map(|container| container["ports"].as_array().into_iter().flatten())
        {
            let number = port["containerPort"].as_u64().context("a port without number")?;
            spec = spec.port(&text(&port["name"]), u16::try_from(number)?);
        }
        Ok(spec)
    }

    /// Adds a label.
    pub fn label(mut self, name: &str, value: &str) -> Self {
        self.labels.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Adds a named TCP port.
    pub fn port(mut self, name: &str, port: u16) -> Self {
        self.ports.push((name.to_owned(), "TCP".to_owned(), port));
        self
    }

    /// Gives it a port of its node, of `host_ip` if that is not empty, as runtimes write it.
    pub fn host_port(mut self, protocol: &str, host_ip: &str, host_port: u16, container_port: u16) -> Self {
        self.host_ports.push(json!({
            "protocol": protocol, "hostIP": host_ip, "hostPort": host_port, "containerPort": container_port,
        }));
        self
    }

    /// Its processes stay outside the node's cgroup: socket hooks do not see them.
    pub fn outside_cgroup(mut self) -> Self {
        self.is_outside_cgroup = true;
        self
    }

    /// Writes the Pod (and its Namespace, if that is new), runs CNI ADD and starts the servers.
    pub fn create(self) -> Result<Pod> {
        self.write_manifest()?;
        let (space, plugin, container_id) = self.prepare()?;
        let began = Instant::now();
        let result = self.add(&space, &plugin, &container_id)?;
        let add_took = began.elapsed();
        let addresses = addresses_of(&result)?;
        let mut ports: Vec<u16> =
            PORTS.into_iter().chain(self.ports.iter().map(|(_, _, port)| *port)).collect();
        ports.sort_unstable();
        ports.dedup();
        let server = Server::start(&space, &self.name, &[Ipv6Addr::UNSPECIFIED.into()], &ports)?;
        let Self { namespace, name, node, .. } = self;
        Ok(Pod {
            namespace,
            name,
            node: node.name().to_owned(),
            container_id,
            addresses,
            result,
            plugin,
            add_took,
            _server: server,
            space,
        })
    }

    /// Only writes the manifests of `create`.
    pub fn write_manifest(&self) -> Result<()> {
        let manifests = self.lab.manifests();
        if !manifests.has_namespace(&self.namespace) {
            manifests.namespace(&self.namespace, &[])?;
        }
        let labels: Vec<(&str, &str)> = self.labels.iter().map(|(key, value)| (&**key, &**value)).collect();
        let ports: Vec<(&str, &str, u16)> =
            self.ports.iter().map(|(name, protocol, port)| (&**name, &**protocol, *port)).collect();
        manifests.pod((&self.namespace, &self.name), self.node.name(), &labels, &ports)
    }

    fn prepare(&self) -> Result<(Space, Plugin, String)> {
        let id = self.lab.next_name();
        let cgroup = (!self.is_outside_cgroup).then(|| self.node.cgroup());
        let space = Space::create(&format!("{id}-{}", self.name), cgroup)?;
        let mut plugin = Plugin::of(self.node);
        if !self.host_ports.is_empty() {
            plugin.config["runtimeConfig"] = json!({"portMappings": self.host_ports});
        }
        Ok((space, plugin, id))
    }

    fn add(&self, space: &Space, plugin: &Plugin, container_id: &str) -> Result<Value> {
        let arguments = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={container_id}",
            self.namespace, self.name
        );
        let netns = space.path().display().to_string();
        let environment =
            [("CNI_CONTAINERID", container_id), ("CNI_NETNS", &netns), ("CNI_ARGS", &arguments)];
        plugin.call(self.node, "ADD", &environment)
    }
}

impl Plugin {
    /// As node `node`'s runtime calls it: on that node, with its agent's socket in the configuration.
    pub fn of(node: &Node) -> Self {
        let config = json!({
            "cniVersion": "1.1.0", "name": "weir", "type": "weir-cni",
            "socket": node.socket(), "stateDir": node.directory().join("state"),
        });
        Self { config, node: node.name().to_owned(), programs: node.programs() }
    }

    /// Runs the plugin; an error holds what it printed.
    pub fn call(&self, node: &Node, command: &str, environment: &[(&str, &str)]) -> Result<Value> {
        self.call_in(node.space(), command, environment)
    }

    fn call_in(&self, space: &Space, command: &str, environment: &[(&str, &str)]) -> Result<Value> {
        let mut plugin = Command::new(program_in(self.programs.as_deref(), "weir-cni")?);
        plugin.env("CNI_COMMAND", command).env("CNI_IFNAME", "eth0").env("CNI_PATH", "/opt/cni/bin");
        plugin.envs(environment.iter().copied());
        let config = self.config.to_string();
        let written = super::noting_failure(space.run(move || output_of(&mut plugin, &config)))
            .with_context(|| format!("CNI {command} on {}", self.node))?;
        if written.trim().is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_str(&written)
            .with_context(|| format!("parsing the result of CNI {command}: {written}"))
    }
}

impl Pod {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The node that it is on.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Its network namespace; what runs there is a process of the pod.
    pub fn space(&self) -> &Space {
        &self.space
    }

    /// What CNI ADD answered.
    pub fn result(&self) -> &Value {
        &self.result
    }

    /// How long CNI ADD took.
    pub fn add_took(&self) -> Duration {
        self.add_took
    }

    /// Its addresses.
    pub fn addresses(&self) -> &[IpAddr] {
        &self.addresses
    }

    /// Its address of one family.
    pub fn address(&self, is_ipv4: bool) -> IpAddr {
        *self.addresses.iter().find(|address| address.is_ipv4() == is_ipv4).expect("a pod has both families")
    }

    /// Probes `target` from inside.
    pub fn probe(&self, via: Via, target: SocketAddr) -> Outcome {
        self.start_probe(via, target).wait()
    }

    /// Starts a probe from inside.
    pub fn start_probe(&self, via: Via, target: SocketAddr) -> Running<Outcome> {
        self.space.start(move || probe(via, target))
    }

    /// CNI DEL; the namespace stays until the pod is dropped.
    pub fn delete(&self, node: &Node) -> Result<()> {
        let netns = self.space.path().display().to_string();
        let environment = [("CNI_CONTAINERID", self.container_id.as_str()), ("CNI_NETNS", &netns)];
        self.plugin.call(node, "DEL", &environment).map(drop)
    }

    /// CNI CHECK.
    pub fn check(&self, node: &Node) -> Result<()> {
        let netns = self.space.path().display().to_string();
        let environment = [("CNI_CONTAINERID", self.container_id.as_str()), ("CNI_NETNS", &netns)];
        let mut plugin = self.plugin.clone();
        plugin.config["prevResult"] = self.result.clone();
        plugin.call(node, "CHECK", &environment).map(drop)
    }
}

fn addresses_of(result: &Value) -> Result<Vec<IpAddr>> {
    let rows = result["ips"].as_array().with_context(|| format!("a CNI result without ips: {result}"))?;
    rows.iter()
        .map(|row| {
            let address = row["address"].as_str().context("an ip without address")?;
            Ok(address.split('/').next().unwrap_or_default().parse()?)
        })
        .collect()
}
