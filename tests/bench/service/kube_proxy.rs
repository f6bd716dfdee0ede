//! kube-proxy itself, on a node of its own, with pods as the plugin `ptp` connects them.

use std::fs::{self, File};
use std::net::IpAddr;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};

use crate::cluster::world::{Relay, World};
use crate::control_plane::find;
use crate::lab::Space;
use crate::load::{LoadServer, ready_client};
use crate::reference::{TUNNEL_MTU, plug_pod};

/// A node with kube-proxy; what goes first stands first.
pub struct KubeProxy {
    _process: Process,
    _relay: Relay,
    /// Where the client is.
    pub client: Space,
    _servers: Vec<(LoadServer, Space)>,
    /// Where kube-proxy's rules are.
    pub node: Space,
}

/// A process that ends with this.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // One that has ended by itself is no matter.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl KubeProxy {
    /// Starts one in `mode`, as the node `node` of the world; `addresses` are the client's and the servers'.
    pub fn start(world: &World, mode: &str, node: &str, addresses: &[IpAddr]) -> Result<Self> {
        let name = format!("{}-{mode}", world.lab.name());
        let space = Space::create(&name, None)?;
        space.set_sysctls(&[("ipv4/ip_forward", "1")])?;
        let mut pods = Vec::new();
        for (number, address) in addresses.iter().enumerate() {
            let pod = Space::create(&format!("{name}-{number}"), None)?;
            plug_pod(&space, &pod, &address.to_string(), TUNNEL_MTU)?;
            pods.push(pod);
        }
        let client = pods.remove(0);
        ready_client(&client)?;
        let servers = pods.into_iter().map(|pod| Ok((LoadServer::start_in(&pod)?, pod)));
        let servers = servers.collect::<Result<_>>()?;
        let relay = Relay::start(&space, world.plane.port())?;
        let process = start(world, &space, mode, node)?;
        Ok(Self { _process: process, _relay: relay, client, _servers: servers, node: space })
    }
}

fn start(world: &World, space: &Space, mode: &str, node: &str) -> Result<Process> {
    let program = find("kube-proxy").context("no kube-proxy here: make cluster builds it")?;
    let (tool, package) =
        if mode == "iptables" { ("iptables-legacy", "iptables") } else { ("nft", "nftables") };
    find(tool).with_context(|| format!("no {tool} here: apt-get install {package}"))?;
    let log = File::create(world.lab.directory().join(format!("kube-proxy-{mode}.log")))?;
    let mut command = Command::new(program);
    command.args([
        format!("--proxy-mode={mode}"),
        format!("--kubeconfig={}", world.plane.admin()?.display()),
        format!("--hostname-override={node}"),
        "--cluster-cidr=10.1.0.0/16".to_owned(),
        // These are the machine's, not the namespace's.
        "--conntrack-max-per-core=0".to_owned(),
        // No full round while something is measured.
        "--iptables-sync-period=1h".to_owned(),
    ]);
    if mode == "iptables" {
        command.env("PATH", legacy_path(world.lab.directory())?);
    }
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    Ok(Process(space.run(move || command.spawn()).context("starting kube-proxy")?))
}

/// A PATH by which kube-proxy finds the programs of the kernel's own iptables: they are the faster ones, in loading
/// rules (10,000 Services: 0.8 s, not 2.4) and in the packet's way.
fn legacy_path(directory: &Path) -> Result<std::ffi::OsString> {
    let own = directory.join("legacy");
    fs::create_dir_all(&own)?;
    for family in ["iptables", "ip6tables"] {
        for tool in ["", "-save", "-restore"] {
            let program = PathBuf::from(format!("/usr/sbin/{family}-legacy{tool}"));
            symlink(&program, own.join(format!("{family}{tool}"))).context("linking iptables-legacy")?;
        }
    }
    let others = std::env::var_os("PATH").unwrap_or_default();
    Ok(std::env::join_paths(std::iter::once(own).chain(std::env::split_paths(&others)))?)
}
