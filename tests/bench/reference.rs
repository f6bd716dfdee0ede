//! What Weir is compared with: the kernel's own ways, and the CNI plugins of the distribution.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use libbpf_rs::Link;
use serde_json::{Value, json};

use crate::lab::Space;
use crate::world::load_test_program;

/// Where Debian and Ubuntu put the plugins of `containernetworking-plugins`.
const PLUGINS: &str = "/usr/lib/cni";

/// Of Weir's pods in tunnel mode, and of every pod that these are compared with: a smaller one costs a
/// stream about one per cent.
pub const TUNNEL_MTU: u32 = 1450;
const WIRE_MTU: u32 = 1500;

/// Two namespaces, and what lies between them.
pub struct Reference {
    /// Where the client is.
    pub client: Space,
    /// Where the server is.
    pub server: Space,
    /// The server's IPv4 address.
    pub address: std::net::IpAddr,
    _links: Vec<Link>,
    _between: Vec<Space>,
}

impl Reference {
    /// One veth pair: the floor.
    pub fn direct(name: &str) -> Result<Self> {
        let (client, server) = ends(name)?;
        client.configure(&[
            &format!(
                "link add eth0 mtu {TUNNEL_MTU} type veth peer name eth0 mtu {TUNNEL_MTU} netns {}",
                server.name()
            ),
            "addr add 10.3.0.1/24 dev eth0",
            "link set eth0 up",
        ])?;
        server.configure(&["addr add 10.3.0.2/24 dev eth0", "link set eth0 up"])?;
        Ok(Self { client, server, address: [10, 3, 0, 2].into(), _links: Vec::new(), _between: Vec::new() })
    }

    /// Two veth pairs, and on the node's side of each a program that redirects into the other pod: the
    /// floor of everything that hangs on tcx.
    pub fn redirecting(name: &str, directory: &Path) -> Result<Self> {
        let (client, server) = ends(name)?;
        let node = Space::create(&format!("{name}-node"), None)?;
        for (number, pod) in [(1, &client), (2, &server)] {
            let (other, mac) = (3 - number, format!("02:00:00:00:00:0{number}"));
            node.configure(&[
                &format!(
                    "link add pod{number} mtu {TUNNEL_MTU} address {mac} type veth peer name eth0 mtu {TUNNEL_MTU} \
                     netns {}",
                    pod.name()
                ),
                &format!("link set pod{number} up"),
            ])?;
            pod.configure(&[
                &format!("addr add 10.3.0.{number}/24 dev eth0"),
                "link set eth0 up",
                // The node's own address, so that the frame is for whoever receives it.
                &format!("neigh replace 10.3.0.{other} lladdr {mac} dev eth0 nud permanent"),
            ])?;
        }
        fs::create_dir_all(directory)?;
        let directory = directory.to_owned();
        let links = node.run(move || {
            let index = |number: u32| nix::net::if_::if_nametoindex(&*format!("pod{number}"));
            let link = |number: u32| {
                let object = directory.join(format!("redirect{number}.bpf.o"));
                let peer = format!("-DPEER={}", index(3 - number)?);
                let loaded = load_test_program("tests/bench/redirect.bpf.c", &object, &[&peer])?;
                let program = loaded.progs_mut().next().context("no program")?;
                weir::datapath::attach_tcx(&program, index(number)?)
            };
            Ok::<_, anyhow::Error>(vec![link(1)?, link(2)?])
        })?;
        Ok(Self { client, server, address: [10, 3, 0, 2].into(), _links: links, _between: vec![node] })
    }

    /// Two veth pairs, and a node that forwards between them.
    pub fn routed(name: &str) -> Result<Self> {
        let (client, server) = ends(name)?;
        let node = Space::create(&format!("{name}-node"), None)?;
        node.set_sysctls(&[("ipv4/ip_forward", "1")])?;
        plug_pod(&node, &client, "10.3.1.1", TUNNEL_MTU)?;
        plug_pod(&node, &server, "10.3.1.2", TUNNEL_MTU)?;
        Ok(Self { client, server, address: [10, 3, 1, 2].into(), _links: Vec::new(), _between: vec![node] })
    }

    /// Two nodes on a wire that route to each other's pods, through VXLAN if asked for.
    pub fn two_nodes(name: &str, is_vxlan: bool) -> Result<Self> {
        let (client, server) = ends(name)?;
        let wire = Space::create(&format!("{name}-wire"), None)?;
        wire.configure(&["link add wire type bridge", "link set wire up"])?;
        let mut between = Vec::new();
        for (number, pod) in [(1u8, &client), (2, &server)] {
            let other = 3 - number;
            let node = Space::create(&format!("{name}-node{number}"), None)?;
            node.set_sysctls(&[("ipv4/ip_forward", "1")])?;
            wire.configure(&[
                &format!("link add node{number} type veth peer name eth0 netns {}", node.name()),
                &format!("link set node{number} master wire up"),
            ])?;
            node.configure(&[&format!("addr add 10.201.0.{number}/24 dev eth0"), "link set eth0 up"])?;
            if is_vxlan {
                node.configure(&[
                    &format!("link add vxlan0 type vxlan id 1 remote 10.201.0.{other} dev eth0 dstport 8472"),
                    &format!("addr add 10.202.0.{number}/24 dev vxlan0"),
                    &format!("link set vxlan0 mtu {TUNNEL_MTU} up"),
                    &format!("route add 10.3.{other}.0/24 via 10.202.0.{other}"),
                ])?;
            } else {
                node.configure(&[&format!("route add 10.3.{other}.0/24 via 10.201.0.{other}")])?;
            }
            plug_pod(&node, pod, &format!("10.3.{number}.1"), if is_vxlan { TUNNEL_MTU } else { WIRE_MTU })?;
            between.push(node);
        }
        between.push(wire);
        Ok(Self { client, server, address: [10, 3, 2, 1].into(), _links: Vec::new(), _between: between })
    }

    /// Two pods of one node, connected by the CNI bridge plugin.
    pub fn bridge(name: &str, directory: &Path) -> Result<Self> {
        let (client, server) = ends(name)?;
        let node = Space::create(&format!("{name}-node"), None)?;
        let plugin = OtherPlugin::bridge(directory);
        plugin.add(&node, &client)?;
        let address = plugin.add(&node, &server)?.0;
        Ok(Self { client, server, address, _links: Vec::new(), _between: vec![node] })
    }
}

/// A plugin of the distribution, with host-local addresses, IPv4 only: with IPv6 it would wait for
/// duplicate-address detection.
pub struct OtherPlugin {
    program: PathBuf,
    config: Value,
}

impl OtherPlugin {
    /// How the addresses that it gives begin.
    pub const ADDRESSES: &str = "10.4.";

    /// The bridge plugin.
    pub fn bridge(directory: &Path) -> Self {
        Self::new("bridge", directory, json!({"bridge": "cni0", "isGateway": true, "mtu": TUNNEL_MTU}))
    }

    /// The plugin that makes a veth pair and routes, as Weir does.
    pub fn ptp(directory: &Path) -> Self {
        Self::new("ptp", directory, json!({}))
    }

    fn new(name: &str, directory: &Path, mut config: Value) -> Self {
        config["cniVersion"] = json!("1.0.0");
        config["name"] = json!("reference");
        config["type"] = json!(name);
        config["ipam"] = json!({
            "type": "host-local", "dataDir": directory.join(name),
            "ranges": [[{"subnet": "10.4.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}],
        });
        Self { program: Path::new(PLUGINS).join(name), config }
    }

    /// What a container runtime reads to use it.
    pub fn list(&self) -> Value {
        let mut plugin = self.config.clone();
        let mut list = json!({});
        for key in ["cniVersion", "name"] {
            list[key] = plugin[key].take();
        }
        list["plugins"] = json!([plugin]);
        list
    }

    /// Copies it, and what gives it addresses, to `directory`.
    pub fn install(&self, directory: &Path) -> Result<()> {
        self.check()?;
        for program in [&self.program, &self.program.with_file_name("host-local")] {
            let name = program.file_name().context("a program has a name")?;
            fs::copy(program, directory.join(name))
                .with_context(|| format!("copying {} to {}", program.display(), directory.display()))?;
        }
        Ok(())
    }

    fn check(&self) -> Result<()> {
        if !self.program.exists() {
            bail!("{} is not installed (containernetworking-plugins)", self.program.display());
        }
        Ok(())
    }

    /// Connects `pod` to `node`: its address, and how long that took.
    pub fn add(&self, node: &Space, pod: &Space) -> Result<(std::net::IpAddr, Duration)> {
        self.check()?;
        let mut command = Command::new(&self.program);
        command.env("CNI_COMMAND", "ADD").env("CNI_CONTAINERID", pod.name()).env("CNI_IFNAME", "eth0");
        command.env("CNI_NETNS", pod.path()).env("CNI_PATH", PLUGINS);
        let began = Instant::now();
        let written = node.command(command, &self.config.to_string())?;
        let took = began.elapsed();
        let result: Value = serde_json::from_str(&written).context("parsing its result")?;
        let address = result["ips"][0]["address"].as_str().context("a result without address")?;
        Ok((address.split('/').next().unwrap_or_default().parse()?, took))
    }
}

fn ends(name: &str) -> Result<(Space, Space)> {
    Ok((Space::create(&format!("{name}-client"), None)?, Space::create(&format!("{name}-server"), None)?))
}

/// A pod as `ptp` makes it: a veth pair, a /32 and a gateway that is on-link.
pub fn plug_pod(node: &Space, pod: &Space, address: &str, mtu: u32) -> Result<()> {
    let device = format!("pod{}", address.replace('.', ""));
    node.configure(&[
        &format!("link add {device} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {}", pod.name()),
        &format!("addr add 169.254.1.1/32 dev {device}"),
        &format!("link set {device} up"),
        &format!("route add {address}/32 dev {device}"),
    ])?;
    pod.configure(&[
        &format!("addr add {address}/32 dev eth0"),
        "link set eth0 up",
        "route add 169.254.1.1/32 dev eth0",
        "route add default via 169.254.1.1",
    ])
}
