//! The proxy's side of the datapath: the device that leads to its namespace, the sockets where flows arrive
//! there, and the map that says whose a flow is.

use std::fs::File;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result};
use libbpf_rs::libbpf_sys;
use libbpf_rs::query::LinkTypeInfo;

use super::Datapath;
use super::abi::{
    Addr, Connection, ConnectionKey, L7Flow, L7FlowKey, ProxyDevice, RuleListenerKey, addr_of, ip_of,
};
use super::map::Bytes;
use super::messages::with_messages;
use super::types::{connection_flags, l7_listener};
use crate::model::l7::{Judges, Lookup, RuleSetId};
use crate::model::{EndpointId, IdentityId, MacAddress, Protocol};

/// Programs of the device that leads to the proxy.
const PROXY_PROGRAMS: [&str; 1] = ["from_proxy"];
/// The program at the pair's other end, in the proxy's namespace.
const INSIDE_PROGRAM: &str = "before_proxy";

/// The part of an alias that is its number (ALIAS_IPV4_MASK of alias.bpf.c).
const ALIAS_NUMBER: u32 = 0x07ff_ffff;

/// The sockets where the proxy's new flows arrive, as `bpf/abi.h` numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listener {
    /// TCP over IPv4.
    TcpIpv4 = l7_listener::L7_LISTENER_TCP_IPV4.0 as isize,
    /// TCP over IPv6.
    TcpIpv6 = l7_listener::L7_LISTENER_TCP_IPV6.0 as isize,
    /// UDP over IPv4.
    UdpIpv4 = l7_listener::L7_LISTENER_UDP_IPV4.0 as isize,
    /// UDP over IPv6.
    UdpIpv6 = l7_listener::L7_LISTENER_UDP_IPV6.0 as isize,
}

impl Listener {
    /// In the order of their numbers.
    pub const ALL: [Self; 4] = [Self::TcpIpv4, Self::TcpIpv6, Self::UdpIpv4, Self::UdpIpv6];
}

impl Datapath {
    /// Puts the device that leads to the proxy's namespace, and the namespace, under their programs.
    pub fn attach_proxy(&self, ifindex: u32, namespace: &File) -> Result<()> {
        self.attach_device(ifindex, &PROXY_PROGRAMS).context("attaching to the proxy's device")?;
        let program = self.program("proxy_listen")?;
        let inode = namespace.metadata().context("identifying the proxy's namespace")?.ino();
        let is_ours =
            |info: &LinkTypeInfo| matches!(info, LinkTypeInfo::NetNs(found) if u64::from(found.ino) == inode);
        self.attach_link(self.link_pin("netns-proxy_listen"), &program, is_ours, || {
            program.attach_netns(namespace.as_raw_fd()).map_err(with_messages)
        })
        .context("attaching proxy_listen to the proxy's namespace")?;
        Ok(())
    }

    /// Puts the device at which the proxy's namespace begins under its program. To be called within that namespace.
    pub fn attach_before_proxy(&self, ifindex: u32) -> Result<()> {
        self.attach_device(ifindex, &[INSIDE_PROGRAM]).context("attaching where the proxy's namespace begins")
    }

    /// Verifies that the device at which the proxy's namespace begins is under its program. To be called within that
    /// namespace.
    pub fn verify_before_proxy(&self, ifindex: u32) -> Result<()> {
        self.verify_device(ifindex, &[INSIDE_PROGRAM])
    }

    /// Verifies that the proxy's device is under its programs; the error names what is not.
    pub fn verify_proxy(&self, ifindex: u32) -> Result<()> {
        self.verify_device(ifindex, &PROXY_PROGRAMS)
    }

    /// From now on flows arrive at this socket.
    pub fn set_listener(&self, listener: Listener, socket: BorrowedFd<'_>) -> Result<()> {
        let descriptor = u64::try_from(socket.as_raw_fd()).context("a socket's descriptor")?;
        self.typed::<u32, u64>("l7_listeners")?
            .insert(&(listener as u32), &descriptor)
            .with_context(|| format!("giving the programs the proxy's listener {listener:?}"))
    }

    /// From now on flows that this rule set judges alone arrive at this socket, for as long as it is open.
    pub fn set_rule_listener(&self, set: RuleSetId, is_ipv6: bool, socket: BorrowedFd<'_>) -> Result<()> {
        let descriptor = u64::try_from(socket.as_raw_fd()).context("a socket's descriptor")?;
        let key = RuleListenerKey { set: set.0, is_ipv6: is_ipv6.into(), pad: 0 };
        self.typed::<RuleListenerKey, u64>("l7_rule_listeners")?
            .insert(&key, &descriptor)
            .with_context(|| format!("giving the programs the listener of rule set {set}"))
    }

    /// The client that has an alias; the address itself where it is none.
    pub fn client_of(&self, alias: SocketAddr) -> Result<SocketAddr> {
        let aliases = self.typed::<Addr, L7FlowKey>("l7_aliases")?;
        let key = aliases.get(&addr_of(alias.ip()))?;
        Ok(key.map_or(alias, |key| SocketAddr::new(ip_of(key.client), u16::from_be(key.client_port))))
    }

    /// Deletes the aliases whose flow is gone, or has another one. A row of `l7_flows` that was just written anew may
    /// say none.
    pub(super) fn collect_aliases(&self) -> Result<()> {
        let aliases = self.typed::<Addr, L7FlowKey>("l7_aliases")?;
        let flows = self.typed::<L7FlowKey, L7Flow>("l7_flows")?;
        let mut rows = Vec::new();
        aliases.for_each(|alias, key| rows.push((alias, key)))?;
        for (alias, key) in rows {
            let number = u32::from_be(alias.w[3]) & ALIAS_NUMBER;
            if flows.get(&key)?.is_none_or(|flow| flow.alias != 0 && flow.alias != number) {
                aliases.remove(&alias)?;
            }
        }
        Ok(())
    }

    /// Client and server of the flows whose listener is another rule set's than the one that judges them alone now.
    pub fn flows_of_other_rules(&self) -> Result<Vec<(SocketAddr, SocketAddr)>> {
        let mut flows = Vec::new();
        self.typed::<L7FlowKey, L7Flow>("l7_flows")?.for_each(|key, row| {
            let is_other = match (row.egress_set, row.ingress_set) {
                (0, set) | (set, 0) => set != row.listener_set,
                (egress, ingress) => egress != ingress || egress != row.listener_set,
            };
            if row.listener_set != 0 && is_other {
                let end = |addr, port: u16| SocketAddr::new(ip_of(addr), u16::from_be(port));
                flows.push((end(key.client, key.client_port), end(key.server, key.server_port)));
            }
        })?;
        Ok(flows)
    }

    /// From now on flows that policy leaves to the proxy go by this device; `None`: they are dropped.
    pub fn set_proxy(&self, device: Option<(u32, MacAddress)>, netns_cookie: Option<u64>) -> Result<()> {
        let row = device.map_or(ProxyDevice::default(), |(ifindex, mac)| ProxyDevice {
            netns_cookie: netns_cookie.unwrap_or_default(),
            ifindex,
            mac: mac.0,
            pad: [0; 6],
        });
        self.typed::<u32, ProxyDevice>("proxy")?.insert(&0, &row).context("naming the proxy's device")
    }

    /// The map that says whose a flow is, for `FlowsMap` in another process.
    pub fn flows_map(&self) -> Result<OwnedFd> {
        self.map("l7_flows")?.as_fd().try_clone_to_owned().context("opening l7_flows once more")
    }

    /// Deletes the rows of `l7_flows` whose connection is gone: of these, those that were without one before,
    /// too, since a new flow may just be getting its rows. Returns those to give at the next call.
    pub(super) fn collect_l7_flows(&self, before: &[Bytes<L7FlowKey>]) -> Result<Vec<Bytes<L7FlowKey>>> {
        let flows = self.typed::<L7FlowKey, L7Flow>("l7_flows")?;
        let connections = self.typed::<ConnectionKey, Connection>("connections")?;
        let mut keys = Vec::new();
        flows.for_each(|key, _| keys.push(key))?;
        let mut without = Vec::new();
        for key in keys {
            let connection = connections.get(&connection_key(&key))?;
            let is_proxied =
                |row: &Connection| u32::from(row.flags) & connection_flags::CONNECTION_PROXY.0 != 0;
            if connection.as_ref().is_some_and(is_proxied) {
                continue;
            }
            if before.binary_search(&Bytes(key)).is_ok() {
                flows.remove(&key)?;
            } else {
                without.push(Bytes(key));
            }
        }
        without.sort_unstable();
        Ok(without)
    }
}

/// The key of the flow's connection: the lower end first, as memory compares.
fn connection_key(flow: &L7FlowKey) -> ConnectionKey {
    use super::abi::Plain;
    let ends = [(flow.client, flow.client_port), (flow.server, flow.server_port)];
    let bytes = |(addr, port): &(super::abi::Addr, u16)| [addr.as_bytes(), &port.to_ne_bytes()].concat();
    let [low, high] = if bytes(&ends[0]) <= bytes(&ends[1]) { ends } else { [ends[1], ends[0]] };
    ConnectionKey {
        addr: [low.0, high.0],
        port: [low.1, high.1],
        protocol: flow.protocol,
        ..ConnectionKey::default()
    }
}

/// Says whose a flow is, from the map that the agent has handed over.
#[derive(Debug)]
pub struct FlowsMap(OwnedFd);

impl FlowsMap {
    /// The map behind this descriptor; an error if it is another one.
    pub fn new(descriptor: OwnedFd) -> Result<Self> {
        let mut info = libbpf_sys::bpf_map_info::default();
        let mut length = size_of::<libbpf_sys::bpf_map_info>() as u32;
        // SAFETY: info is as long as the length says.
        let result = unsafe {
            libbpf_sys::bpf_obj_get_info_by_fd(descriptor.as_raw_fd(), (&raw mut info).cast(), &mut length)
        };
        let sizes = (info.key_size as usize, info.value_size as usize);
        anyhow::ensure!(
            result == 0 && sizes == (size_of::<L7FlowKey>(), size_of::<L7Flow>()),
            "the descriptor is not the map of flows of this version"
        );
        Ok(Self(descriptor))
    }

    fn row(&self, key: &L7FlowKey) -> Option<L7Flow> {
        let mut row = L7Flow::default();
        // SAFETY: `new` checked that the map's keys and values have the sizes of these.
        let result = unsafe {
            libbpf_sys::bpf_map_lookup_elem(
                self.0.as_raw_fd(),
                std::ptr::from_ref(key).cast(),
                std::ptr::from_mut(&mut row).cast(),
            )
        };
        (result == 0).then_some(row)
    }
}

impl Lookup for FlowsMap {
    fn of(&self, client: SocketAddr, server: SocketAddr, protocol: Protocol) -> Option<Judges> {
        let key = L7FlowKey {
            client: addr_of(client.ip().to_canonical()),
            server: addr_of(server.ip().to_canonical()),
            client_port: client.port().to_be(),
            server_port: server.port().to_be(),
            protocol: protocol.number(),
            pad: [0; 3],
        };
        let row = self.row(&key)?;
        let set = |id: u16| (id != 0).then_some(RuleSetId(id));
        let endpoint = |id: u16| (id != 0).then_some(EndpointId(id));
        Some(Judges {
            egress: set(row.egress_set),
            ingress: set(row.ingress_set),
            source: IdentityId(row.client_identity),
            destination: IdentityId(row.server_identity),
            source_endpoint: endpoint(row.client_endpoint),
            destination_endpoint: endpoint(row.server_endpoint),
        })
    }
}
