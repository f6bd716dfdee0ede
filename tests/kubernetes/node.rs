//! A node of the cluster, as the machine beside it sees it: its namespace, its files, its daemon.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use serde_json::json;

use super::certificates::Authority;
use super::control_plane::api_server;
use super::daemon::Daemon;
use super::init::Machine;
use super::platform::{Facts, Platform};
use crate::lab::{OUTSIDE, Space, Wire, binary, node_addresses, output_of};

/// The address of cluster DNS.
const CLUSTER_DNS: &str = "10.96.0.10";

/// What the wire carries.
const WIRE_MTU: u32 = 1500;

/// A node.
#[derive(Debug)]
pub struct Node {
    name: String,
    addresses: Vec<IpAddr>,
    directory: PathBuf,
    daemon: Daemon,
    space: Space,
}

impl Node {
    /// Makes node `number` (from 1), and starts what runs on it.
    pub(super) fn start(
        cluster: &str,
        wire: &Wire,
        directory: &Path,
        number: usize,
        programs: &Path,
        authority: &Authority,
        platform: Platform,
    ) -> Result<Self> {
        let name = format!("node{number}");
        let facts = platform.facts();
        let mut addresses = node_addresses(number)?;
        let mut space = wire.host(&name, &addresses, None)?;
        space.keep();
        lay_out_network(wire, &space, &name, &addresses, facts)?;
        if !facts.has_ipv6 {
            addresses.retain(IpAddr::is_ipv4);
        }
        let own = directory.join(&name);
        fs::create_dir(&own)?;
        write_files(&own, &name, &addresses, authority, facts)?;
        let machine = Machine {
            name: name.clone(),
            zone: format!("zone-{}", (number - 1) % 3 + 1),
            addresses: addresses.clone(),
            directory: own.clone(),
            programs: programs.to_owned(),
            cgroup: format!("{cluster}-{name}"),
            platform,
            api_server: api_server_of(facts),
        };
        let mut command = Command::new(binary("examples/cluster")?);
        command.arg("machine").arg(serde_json::to_string(&machine)?).stdin(Stdio::null());
        let daemon = Daemon::start(&space, cluster, &name, command, &own.join("init.log"))?;
        Ok(Self { name, addresses, directory: own, daemon, space })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its addresses on the wire, IPv4 first.
    pub fn addresses(&self) -> &[IpAddr] {
        &self.addresses
    }

    /// Its network namespace.
    pub fn space(&self) -> &Space {
        &self.space
    }

    /// All that runs on it.
    pub fn daemon(&self) -> &Daemon {
        &self.daemon
    }

    /// The directory with its logs and what is its own of the file system.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Imports an archive of images into its container runtime.
    pub fn load(&self, archive: &Path) -> Result<()> {
        load(&self.directory, archive)
    }

    /// Ends all that runs on it, and removes all that is its own.
    pub(super) fn destroy(&mut self, wire: &Wire) -> Result<()> {
        self.daemon.kill()?;
        wire.unplug(&self.name)?;
        output_of(Command::new("ip").args(["netns", "delete", self.space.name()]), "")?;
        fs::remove_dir_all(&self.directory).with_context(|| format!("removing {}", self.directory.display()))
    }
}

/// Imports an archive into the runtime of the node with `directory`.
pub fn load(directory: &Path, archive: &Path) -> Result<()> {
    let pid =
        fs::read_to_string(directory.join(super::init::PID)).context("reading the node's first process")?;
    let mut import = Command::new("nsenter");
    import.args([
        "--target",
        pid.trim(),
        "--mount",
        "--pid",
        "ctr",
        "--namespace",
        "k8s.io",
        "images",
        "import",
    ]);
    output_of(import.arg(archive), "").map(drop)
}

/// What the wire gave it, changed to what the platform gives.
fn lay_out_network(
    wire: &Wire,
    space: &Space,
    name: &str,
    addresses: &[IpAddr],
    facts: &Facts,
) -> Result<()> {
    let (ipv4, ipv6) = (addresses[0], addresses[1]);
    if facts.mtu != WIRE_MTU {
        wire.set_port(name, &format!("mtu {}", facts.mtu))?;
        space.configure(&[&format!("link set eth0 mtu {}", facts.mtu)])?;
    }
    if !facts.has_ipv6 {
        space.configure(&[&format!("addr del {ipv6}/64 dev eth0")])?;
    }
    if !facts.is_linked {
        let gateway = OUTSIDE[0];
        wire.set_port(name, "type bridge_slave isolated on")?;
        space.configure(&[
            &format!("addr del {ipv4}/24 dev eth0"),
            &format!("addr add {ipv4}/32 dev eth0"),
            &format!("route add {gateway} dev eth0 scope link"),
            &format!("route add default via {gateway}"),
        ])?;
    }
    if facts.balancer.is_some() {
        let direct = api_server();
        let rule = format!("rule add iif lo to {} ipproto tcp dport {} prohibit", direct.ip(), direct.port());
        space.configure(&[&rule])?;
    }
    Ok(())
}

/// Where what runs on the node finds the API server.
fn api_server_of(facts: &Facts) -> SocketAddr {
    facts.balancer.map_or_else(api_server, |balancer| balancer.parse().expect("this is an address"))
}

fn write_files(
    directory: &Path,
    name: &str,
    addresses: &[IpAddr],
    authority: &Authority,
    facts: &Facts,
) -> Result<()> {
    let names: Vec<String> = addresses.iter().map(|address| format!("IP:{address}")).collect();
    let subject = format!("/O=system:nodes/CN=system:node:{name}");
    let served = authority.sign(&format!("server-{name}"), &subject, &names)?;
    let server = format!("https://{}", api_server_of(facts));
    let kubeconfig = directory.join(format!("{name}.kubeconfig"));
    authority.write_kubeconfig(&kubeconfig, "node", &server, &subject)?;
    if facts.has_kube_proxy {
        let kubeconfig = directory.join(format!("{name}-proxy.kubeconfig"));
        authority.write_kubeconfig(&kubeconfig, "node", &server, "/CN=system:kube-proxy")?;
    }
    let kubelet = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
        "authentication": {"anonymous": {"enabled": false}, "webhook": {"enabled": true},
            "x509": {"clientCAFile": authority.certificate()}},
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": served.certificate, "tlsPrivateKeyFile": served.key,
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "clusterDNS": [CLUSTER_DNS], "clusterDomain": "cluster.local", "resolvConf": "/etc/resolv.conf",
        "cgroupDriver": "cgroupfs", "enforceNodeAllocatable": [], "failCgroupV1": false, "failSwapOn": false,
        "localStorageCapacityIsolation": false, "makeIPTablesUtilChains": false, "oomScoreAdj": 0,
        // The disk is the machine's: how full it is is not the node's to mend.
        "evictionHard": {"memory.available": "1Mi", "nodefs.available": "0%", "nodefs.inodesFree": "0%",
            "imagefs.available": "0%"},
        "imageGCHighThresholdPercent": 100, "imageGCLowThresholdPercent": 99,
        // A program that is killed again and again is started again at once.
        "featureGates": {"KubeletCrashLoopBackOffMax": true}, "crashLoopBackOff": {"maxContainerRestartPeriod": "1s"},
    });
    fs::write(directory.join("kubelet.yaml"), weir::yaml::write(&kubelet)?)?;
    let mut containerd = include_str!("containerd.toml").to_owned();
    containerd.push_str(&format!(
        "\n[plugins.\"io.containerd.grpc.v1.cri\".cni]\n  bin_dir = \"{}\"\n  conf_dir = \"/etc/cni/net.d\"\n",
        facts.plugin_directory
    ));
    if let Some(template) = facts.configuration_template {
        let path = directory.join("cni.template");
        fs::write(&path, template)?;
        containerd.push_str(&format!("  conf_template = \"{}\"\n", path.display()));
    }
    fs::write(directory.join("containerd.toml"), containerd)?;
    Ok(())
}
