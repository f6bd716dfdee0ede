//! This node: what the cluster says of it, its devices, its kernel settings.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use ipnet::IpNet;

use super::args::{Config, Routing};
use super::mtu::{Ground, Mtus};
use crate::encryption::{self, Device};
use crate::files::{self, Survives};
use crate::kube::Tables;
use crate::model::Node;
use crate::netlink;

/// The device of VXLAN tunnels.
pub const OVERLAY_DEVICE: &str = "weir_vxlan";

/// Where fragments wait for the first one of their packet: what the first one sends the second one receives.
const WAIT_DEVICES: [&str; 2] = ["weir_wait", "weir_waited"];
/// The queue of pods with a limit on what they receive.
const LIMIT_DEVICES: [&str; 2] = ["weir_limit", "weir_limited"];
/// A fragment goes round until its time is over. At most 33,000 times a second for all of them, which is a
/// tenth of a processor; a full queue is gone through in 0.3 s.
const WAIT_QUEUE: netlink::TokenBucket = netlink::TokenBucket {
    rate: 50_000_000,
    smallest_packet: 1500,
    burst: 16 * 1024,
    limit: 16 * 1024 * 1024,
};

/// Where the last known facts of this node are kept, for a start without the API.
const FACTS_FILE: &str = "node.json";

/// The devices of this node, as the datapath needs them.
#[derive(Clone, Debug)]
pub struct Devices {
    /// The device of the tunnels between pods; `None` with native routing.
    pub overlay: Option<u32>,
    /// The same, also with native routing where it leads to egress gateways alone.
    pub vxlan: Option<u32>,
    /// What encrypts; `None`: nothing does.
    pub encryption: Option<Arc<Device>>,
    /// Fragments are given to the first one, and come out of the second one when they have waited a little;
    /// `None` on a kernel that has no way.
    pub wait: Option<[u32; 2]>,
    /// Packets for pods with a limit are given to the first one, and come out of the second one when their time
    /// has come; `None` on a kernel that has no way.
    pub limit: Option<[u32; 2]>,
    /// MTU of the pods' devices, bytes.
    pub mtu: u32,
    /// The node's own addresses in the pod network: the first of each pod CIDR.
    pub internal_addresses: Vec<IpAddr>,
    /// Kernel settings that pods' packets need, below /proc/sys, with their values.
    pub settings: Vec<(String, String)>,
}

impl Devices {
    /// The addresses that the tunnel's device has: with native routing none.
    pub fn addresses_of_tunnel(&self) -> &[IpAddr] {
        if self.overlay.is_some() { &self.internal_addresses } else { &[] }
    }

    /// Pods have IPv6 addresses.
    pub fn has_ipv6(&self) -> bool {
        self.internal_addresses.iter().any(IpAddr::is_ipv6)
    }
}

/// The Node object of this node: from the tables once they have it, or as it was
/// known when the agent ran last, when the source is away.
pub async fn discover(config: &Config, tables: &Tables) -> Result<Arc<Node>> {
    let name = config.args.node_name.as_str();
    let facts = config.args.state_dir.join(FACTS_FILE);
    let mut state = tables.nodes.subscribe();
    if let Some(node) = remembered(&facts, name)
        && !state.borrow_and_update().is_synced
    {
        let patience = std::time::Duration::from_secs(1);
        let synced = tokio::time::timeout(patience, state.wait_for(|state| state.is_synced)).await;
        if synced.is_err() {
            tracing::warn!(
                node = name,
                "the source of objects is away: starting with what was known of this node"
            );
            return Ok(Arc::new(node));
        }
    }
    loop {
        if let Some(node) = tables.nodes.get(&name.into()) {
            match missing(&node) {
                None => {
                    write_facts(&facts, &node)?;
                    return Ok(node);
                }
                Some(what) => tracing::warn!(node = name, missing = what, "waiting for the Node object"),
            }
        } else if tables.nodes.is_synced() {
            tracing::warn!(node = name, "waiting: there is no Node object of this name");
        }
        state.changed().await.context("watching nodes")?;
    }
}

/// What the Node lacks that an agent cannot do without.
pub fn missing(node: &Node) -> Option<&'static str> {
    if node.addresses.is_empty() {
        Some("status.addresses has no InternalIP")
    } else if node.pod_cidrs.is_empty() {
        Some(
            "spec.podCIDRs is empty, of the Node and of the WeirNode: the operator gives them from WEIR_POD_CIDR_POOLS",
        )
    } else {
        None
    }
}

/// Keeps what is known of this node now for a start without the API.
pub fn remember(state_directory: &Path, node: &Node) -> Result<()> {
    write_facts(&state_directory.join(FACTS_FILE), node)
}

fn remembered(facts: &Path, name: &str) -> Option<Node> {
    let text = std::fs::read(facts).ok()?;
    match serde_json::from_slice::<Node>(&text) {
        Ok(node) if node.name == name => Some(node),
        Ok(_) => None,
        Err(error) => {
            tracing::warn!(file = %facts.display(), %error, "ignoring what was remembered of this node");
            None
        }
    }
}

fn write_facts(facts: &Path, node: &Node) -> Result<()> {
    let text = serde_json::to_vec(node).context("encoding this node's facts")?;
    files::replace(facts, &text, 0o600, Survives::Process)
        .with_context(|| format!("writing {}", facts.display()))
}

/// Makes and sets up what is to be attached to: forwarding, the tunnel device,
/// the node's address inside the pod network.
pub fn prepare(config: &Config, node: &Node) -> Result<Devices> {
    let network = network_devices(config, node)?;
    let device_mtu =
        network.iter().map(|device| device.mtu).min().context("finding the MTU of the node's devices")?;
    let mut settings = forwarding(node, &network)?;
    if config.args.encryption.encryption != encryption::Mode::Off {
        // Decrypted packets come from nodes that other devices lead to. The loose filter, too, drops them where
        // the device has no address; who sent them the encryption has proved.
        for device in config.args.encryption.encryption.devices() {
            settings.push((format!("net/ipv4/conf/{device}/rp_filter"), "0".to_owned()));
        }
        if netlink::get_sysctl("net/ipv4/conf/all/rp_filter")?.is_some_and(|value| value != "0") {
            tracing::warn!(
                "net.ipv4.conf.all.rp_filter is not 0: the node's stack drops what was decrypted; set it to 0, and \
                 that of each device to what all had"
            );
        }
    }
    let mtus = Mtus::of(Ground {
        underlay: device_mtu,
        has_tunnel: config.args.network.routing == Routing::Tunnel || config.args.network.egress_gateway,
        is_ipv6: node.addresses.iter().all(IpAddr::is_ipv6),
        is_encrypted: config.args.encryption.encryption != encryption::Mode::Off,
        given: config.args.network.mtu,
    });
    let encryption = prepare_encryption(config, node, &mtus)?;
    let mtu = mtus.pod;
    for (name, value) in &settings {
        netlink::set_sysctl(name, value)?;
    }
    let internal_addresses = node.pod_cidrs.iter().filter_map(internal_address).collect::<Vec<_>>();
    let routing = config.args.network.routing;
    let vxlan = match routing == Routing::Tunnel || config.args.network.egress_gateway {
        false => None,
        true => {
            let ifindex = netlink::ensure_vxlan(OVERLAY_DEVICE, config.args.network.tunnel_port, mtu, None)
                .context("making the tunnel device")?;
            let addresses = if routing == Routing::Tunnel { internal_addresses.as_slice() } else { &[] };
            give_addresses(ifindex, addresses)?;
            Some(ifindex)
        }
    };
    let overlay = vxlan.filter(|_| routing == Routing::Tunnel);
    Ok(Devices {
        overlay,
        vxlan,
        encryption,
        wait: prepare_wait(),
        limit: prepare_limit(),
        mtu,
        internal_addresses,
        settings,
    })
}

/// The device that encrypts, where there is to be one; else one that was there goes.
fn prepare_encryption(config: &Config, node: &Node, mtus: &Mtus) -> Result<Option<Arc<Device>>> {
    let args = &config.args;
    let Some(mtu) = mtus.encrypted else {
        if encryption::remove_devices(&args.socket).context("removing the devices that encrypted")? {
            tracing::info!(devices = ?encryption::DEVICES, "removed the devices: nothing is encrypted now");
        }
        return Ok(None);
    };
    let plan = encryption::Plan {
        mode: args.encryption.encryption,
        choice: args.encryption.wireguard_device,
        mtu,
        port: args.encryption.wireguard_port,
        addresses: node.addresses.clone(),
        state_directory: args.state_dir.clone(),
        socket: args.socket.clone(),
        key_age: args.encryption.key_age(),
    };
    let device = Device::prepare(plan).context("making the device that encrypts")?;
    tracing::info!(device = device.name(), mtu, by = %device.kind(), "encrypting between nodes");
    Ok(Some(Arc::new(device)))
}

/// Those of former pod CIDRs go: they are other nodes' now.
fn give_addresses(overlay: u32, addresses: &[IpAddr]) -> Result<()> {
    for address in addresses {
        netlink::add_address(overlay, IpNet::from(*address))
            .with_context(|| format!("giving {address} to {OVERLAY_DEVICE}"))?;
    }
    for stale in netlink::addresses_of(overlay)? {
        let is_ours = stale.prefix_len() == stale.max_prefix_len();
        if is_ours && !addresses.contains(&stale.addr()) {
            netlink::delete_address(overlay, stale)
                .with_context(|| format!("taking {stale} from {OVERLAY_DEVICE}"))?;
        }
    }
    Ok(())
}

/// Where fragments wait for the first one of their packet. A kernel without `tbf` is no reason to stop.
fn prepare_wait() -> Option<[u32; 2]> {
    match netlink::ensure_queue(WAIT_DEVICES, WAIT_QUEUE) {
        Ok(devices) => Some(devices),
        Err(error) => {
            tracing::warn!(%error, "fragments that come before the first one of their packet are dropped");
            None
        }
    }
}

/// The queue of pods with a limit on what they receive. A kernel without `htb` is no reason to stop.
fn prepare_limit() -> Option<[u32; 2]> {
    match netlink::ensure_classes(LIMIT_DEVICES) {
        Ok(devices) => Some(devices),
        Err(error) => {
            tracing::warn!(%error, "kubernetes.io/ingress-bandwidth limits nothing on this node");
            None
        }
    }
}

fn network_devices(config: &Config, node: &Node) -> Result<Vec<netlink::Link>> {
    if config.args.network.device.is_empty() {
        let devices = netlink::devices_with(&node.addresses).context("looking for the node's devices")?;
        if devices.is_empty() {
            bail!(
                "no device has an address of the Node object ({:?}): name it with --device",
                node.addresses
            );
        }
        return Ok(devices);
    }
    let find = |name: &String| {
        netlink::link(name)?.with_context(|| format!("--device {name}: there is no such device on this node"))
    };
    config.args.network.device.iter().map(find).collect()
}

/// Pods' packets pass the stack on their way out.
fn forwarding(node: &Node, network: &[netlink::Link]) -> Result<Vec<(String, String)>> {
    let mut settings = Vec::new();
    if node.pod_cidrs.iter().any(|prefix| prefix.addr().is_ipv4()) {
        settings.push(("net/ipv4/ip_forward".to_owned(), "1".to_owned()));
        // Without it the kernel does not tell BPF programs the MTU that a route has.
        settings.push(("net/ipv4/ip_forward_use_pmtu".to_owned(), "1".to_owned()));
    }
    if node.pod_cidrs.iter().any(|prefix| prefix.addr().is_ipv6()) {
        for device in network {
            settings.extend(router_advertisements(&device.name)?);
        }
        settings.push(("net/ipv6/conf/all/forwarding".to_owned(), "1".to_owned()));
    }
    Ok(settings)
}

/// The setting with which a device that takes its IPv6 routes from router advertisements keeps doing so
/// although the node forwards.
pub fn router_advertisements(device: &str) -> Result<Option<(String, String)>> {
    let accept = format!("net/ipv6/conf/{device}/accept_ra");
    let is_on = netlink::get_sysctl(&accept)?.is_some_and(|value| value == "1" || value == "2");
    Ok(is_on.then(|| (accept, "2".to_owned())))
}

/// The first address of a pod CIDR; address allocation leaves it to the node.
pub fn internal_address(prefix: &IpNet) -> Option<IpAddr> {
    prefix.hosts().next().map(|first| match (first, prefix) {
        // The IPv6 iterator begins with the subnet-router anycast address.
        (IpAddr::V6(first), IpNet::V6(prefix)) if first == prefix.network() => {
            IpAddr::V6((u128::from(first) + 1).into())
        }
        (first, _) => first,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_address_of_each_family_is_the_nodes() {
        let first =
            |prefix: &str| internal_address(&prefix.parse().expect("a prefix")).map(|ip| ip.to_string());
        assert_eq!(first("10.1.2.0/24").as_deref(), Some("10.1.2.1"));
        assert_eq!(first("fd00:1::/64").as_deref(), Some("fd00:1::1"));
    }
}
