//! A node of the cluster, as the machine beside it sees it: its namespace, its files, its daemon.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use serde_json::json;

use super::certificates::Authority;
use super::control_plane::api_server;
use super::daemon::Daemon;
use super::init::Machine;
use crate::lab::{Space, Wire, binary, node_addresses, output_of};

/// The address of cluster DNS.
const CLUSTER_DNS: &str = "10.96.0.10";

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
    ) -> Result<Self> {
        let name = format!("node{number}");
        let addresses = node_addresses(number)?;
        let mut space = wire.host(&name, &addresses, None)?;
        space.keep();
        let own = directory.join(&name);
        fs::create_dir(&own)?;
        write_files(&own, &name, &addresses, authority)?;
        let machine = Machine {
            name: name.clone(),
            zone: format!("zone-{}", (number - 1) % 3 + 1),
            addresses: addresses.clone(),
            directory: own.clone(),
            programs: programs.to_owned(),
            cgroup: format!("{cluster}-{name}"),
            api_server: api_server(),
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

fn write_files(directory: &Path, name: &str, addresses: &[IpAddr], authority: &Authority) -> Result<()> {
    let names: Vec<String> = addresses.iter().map(|address| format!("IP:{address}")).collect();
    let subject = format!("/O=system:nodes/CN=system:node:{name}");
    let served = authority.sign(&format!("server-{name}"), &subject, &names)?;
    let (address, port) = api_server();
    let kubeconfig = directory.join(format!("{name}.kubeconfig"));
    authority.write_kubeconfig(&kubeconfig, "node", &format!("https://{address}:{port}"), &subject)?;
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
    fs::write(directory.join("kubelet.yaml"), serde_yaml::to_string(&kubelet)?)?;
    fs::write(directory.join("containerd.toml"), include_str!("containerd.toml"))?;
    Ok(())
}
