//! The link between a pod and its node: a veth pair, one end born in the pod.
//!
//! ```text
//!   pod's namespace                           node
//!   eth0  10.0.1.7/32 fd00:1::7/128 NODAD     weir5a0c...  no address
//!   169.254.1.1 dev eth0                      10.0.1.7/32 and fd00:1::7/128 dev weir5a0c...
//!   default via 169.254.1.1, via fe80::1      permanent neighbours: the pod's addresses
//!   permanent neighbours: both gateways
//! ```
//!
//! Nobody ever asks by ARP or neighbour discovery. The host side stays down
//! until the pod's policy is enforced: until then no packet can pass.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::AddressMessage;
use netlink_packet_route::link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkInfo, LinkMessage};
use nix::net::if_::if_nametoindex;
use std::os::fd::AsRawFd;

use super::connection::{Connection, Request};
use super::route::{Route, new_neighbour, new_route, permanent_neighbours, routes, routes_with_protocol};
use super::{Error, Link, Result, delete_link, link, namespace, set_sysctl};
use crate::model::MacAddress;

/// Next hop of every pod's IPv4 default route.
pub const GATEWAY_IPV4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// Next hop of every pod's IPv6 default route.
pub const GATEWAY_IPV6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
/// Marks the node's routes to its own pods (`ip route show proto 88`).
pub const POD_ROUTE_PROTOCOL: u8 = 88;

const LOOPBACK_IFINDEX: u32 = 1;
/// The kernel's link watch usually needs well under a millisecond.
const OPERATIONAL_WITHIN: Duration = Duration::from_secs(5);

/// What a pod's link shall be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodLinkSpec {
    /// Path of the pod's network namespace.
    pub netns: PathBuf,
    /// Name of the device inside the pod.
    pub interface: String,
    /// Name of the device on the node.
    pub host_interface: String,
    /// Hardware address of the node's end.
    pub host_mac: MacAddress,
    /// Hardware address of the pod's end.
    pub pod_mac: MacAddress,
    /// The pod's IPv4 address.
    pub ipv4: Option<Ipv4Addr>,
    /// The pod's IPv6 address.
    pub ipv6: Option<Ipv6Addr>,
    /// MTU of both ends.
    pub mtu: u32,
}

/// A pod's link as it was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodLink {
    /// Name of the device on the node.
    pub host_interface: String,
    /// Its index.
    pub host_ifindex: u32,
    /// Hardware address of the pod's end.
    pub mac: MacAddress,
}

impl PodLinkSpec {
    fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.ipv4.map(IpAddr::V4).into_iter().chain(self.ipv6.map(IpAddr::V6))
    }

    fn gateways(&self) -> impl Iterator<Item = IpAddr> {
        let ipv4 = self.ipv4.map(|_| IpAddr::V4(GATEWAY_IPV4));
        ipv4.into_iter().chain(self.ipv6.map(|_| IpAddr::V6(GATEWAY_IPV6)))
    }

    /// What the pod's routing table holds, in the order in which the kernel accepts it.
    fn pod_routes(&self, device_ifindex: u32) -> Vec<Route> {
        let route = |prefix, gateway| Route { prefix, gateway, device_ifindex, source: None, mtu: 0 };
        let mut routes = Vec::with_capacity(3);
        for gateway in self.gateways() {
            let everything = if gateway.is_ipv4() {
                routes.push(route(IpNet::from(gateway), None));
                IpNet::new_assert(Ipv4Addr::UNSPECIFIED.into(), 0)
            } else {
                IpNet::new_assert(Ipv6Addr::UNSPECIFIED.into(), 0)
            };
            routes.push(route(everything, Some(gateway)));
        }
        routes
    }

    fn host_routes(&self, device_ifindex: u32) -> Vec<Route> {
        let route = |address| Route {
            prefix: IpNet::from(address),
            gateway: None,
            device_ifindex,
            source: None,
            mtu: 0,
        };
        self.addresses().map(route).collect()
    }
}

/// Makes the pair and all that is inside the pod; the host side stays down. On failure nothing is left.
pub fn create_pod_link(spec: &PodLinkSpec) -> Result<PodLink> {
    let namespace = namespace::open_namespace(&spec.netns)?;
    let mut peer = LinkMessage::default();
    peer.attributes = vec![
        LinkAttribute::IfName(spec.interface.clone()),
        LinkAttribute::Mtu(spec.mtu),
        LinkAttribute::Address(spec.pod_mac.0.to_vec()),
        LinkAttribute::NetNsFd(namespace.as_raw_fd()),
    ];
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(spec.host_interface.clone()),
        LinkAttribute::Mtu(spec.mtu),
        LinkAttribute::Address(spec.host_mac.0.to_vec()),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
        ]),
    ];
    let action = format!("making {} for {} of the pod", spec.host_interface, spec.interface);
    let request = Request::new(action, RouteNetlinkMessage::NewLink(message)).create();
    if let Err(error) = Connection::open()?.execute(vec![request]) {
        let is_taken =
            namespace::within(&namespace, || link(&spec.interface)).is_ok_and(|there| there.is_some());
        return Err(if is_taken { Error::Taken(spec.interface.clone()) } else { error });
    }
    let configure = || {
        let host_ifindex = index_of(&spec.host_interface)?;
        configure_host_side(&spec.host_interface)?;
        namespace::within(&namespace, || configure_pod_side(spec))?;
        Ok(host_ifindex)
    };
    match configure() {
        Ok(host_ifindex) => {
            Ok(PodLink { host_interface: spec.host_interface.clone(), host_ifindex, mac: spec.pod_mac })
        }
        Err(error) => {
            // The first error says more than a second one could.
            let _ = delete_link(&spec.host_interface);
            Err(error)
        }
    }
}

/// Sets the host side up, with its routes and neighbours, and waits until the pod's end can send.
pub fn raise_pod_link(spec: &PodLinkSpec, host_ifindex: u32) -> Result<()> {
    let namespace = namespace::open_namespace(&spec.netns)?;
    let mut requests = vec![super::link::raise(host_ifindex)];
    requests.extend(spec.addresses().map(|address| new_neighbour(host_ifindex, address, spec.pod_mac)));
    for route in spec.host_routes(host_ifindex) {
        requests.push(new_route(&route, POD_ROUTE_PROTOCOL).replace());
    }
    Connection::open()?.execute(requests)?;
    namespace::within(&namespace, || wait_until_operational(spec))
}

/// The host side, or an error that names the first thing that is not as `create_pod_link` and
/// `raise_pod_link` made it. The MTU may have been changed since: it is not compared.
pub fn verify_pod_link(spec: &PodLinkSpec, host_ifindex: u32) -> Result<Link> {
    let namespace = namespace::open_namespace(&spec.netns)?;
    let host = link(&spec.host_interface)?;
    let host = host.ok_or_else(|| different(&spec.host_interface, "is gone"))?;
    if host.index != host_ifindex || host.mac != spec.host_mac || !host.is_up {
        return Err(different(&spec.host_interface, "is another device, or down"));
    }
    let mut connection = Connection::open()?;
    verify_neighbours(&mut connection, host_ifindex, spec.addresses(), spec.pod_mac)?;
    let present = routes_with_protocol(&mut connection, POD_ROUTE_PROTOCOL)?;
    for route in spec.host_routes(host_ifindex) {
        if !present.contains(&route) {
            return Err(Error::Different(format!("the node's route to {} is gone", route.prefix)));
        }
    }
    namespace::within(&namespace, || verify_pod_side(spec))?;
    Ok(host)
}

fn configure_host_side(host_interface: &str) -> Result<()> {
    set_sysctl(&format!("net/ipv4/conf/{host_interface}/rp_filter"), "0")?;
    set_sysctl(&format!("net/ipv4/conf/{host_interface}/forwarding"), "1")?;
    // 1: no link-local address; the pod's gateway is a neighbour entry, not an address.
    set_ipv6(host_interface, "addr_gen_mode", "1")?;
    set_ipv6(host_interface, "accept_ra", "0")
}

fn configure_pod_side(spec: &PodLinkSpec) -> Result<()> {
    let ifindex = index_of(&spec.interface)?;
    if spec.ipv6.is_some() {
        // Runtimes may hand over a namespace in which IPv6 is off.
        set_sysctl(&format!("net/ipv6/conf/{}/disable_ipv6", spec.interface), "0")?;
    }
    set_ipv6(&spec.interface, "accept_ra", "0")?;
    set_ipv6(&spec.interface, "router_solicitations", "0")?;
    set_ipv6(&spec.interface, "accept_dad", "0")?;
    let mut requests = vec![super::link::raise(LOOPBACK_IFINDEX), super::link::raise(ifindex)];
    requests.extend(
        spec.addresses().map(|address| super::link::new_address(ifindex, IpNet::from(address)).create()),
    );
    requests.extend(spec.gateways().map(|gateway| new_neighbour(ifindex, gateway, spec.host_mac)));
    requests.extend(spec.pod_routes(ifindex).iter().map(|route| new_route(route, BOOT_PROTOCOL).create()));
    Connection::open()?.execute(requests)
}

/// What a pod's own administrator would see for routes of an interface script.
const BOOT_PROTOCOL: u8 = 3;

fn set_ipv6(interface: &str, name: &str, value: &str) -> Result<()> {
    match set_sysctl(&format!("net/ipv6/conf/{interface}/{name}"), value) {
        // A kernel booted without IPv6 has none of these.
        Err(Error::Kernel { cause, .. }) if cause.kind() == std::io::ErrorKind::NotFound => Ok(()),
        outcome => outcome,
    }
}

/// Two things the kernel does in its own time, and what is sent before them is lost: it activates the
/// queue of the pod's end after the other end came up (asking for the link makes kernels from 6.8 on
/// do it at once), and it inserts the local route of an IPv6 address, without detection too.
fn wait_until_operational(spec: &PodLinkSpec) -> Result<()> {
    let mut connection = Connection::open()?;
    let deadline = Instant::now() + OPERATIONAL_WITHIN;
    loop {
        let link = super::link::get(&mut connection, &spec.interface)?;
        let link = link.ok_or_else(|| different(&spec.interface, "is gone from the pod"))?;
        let is_local = match spec.ipv6 {
            Some(ipv6) => super::route::is_local(&mut connection, ipv6)?,
            None => true,
        };
        if link.is_operational && is_local {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(different(&spec.interface, "does not come up"));
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn verify_pod_side(spec: &PodLinkSpec) -> Result<()> {
    let device = link(&spec.interface)?;
    let device = device.ok_or_else(|| different(&spec.interface, "is gone from the pod"))?;
    if device.mac != spec.pod_mac || !device.is_up {
        return Err(different(&spec.interface, "is another device in the pod, or down"));
    }
    let mut connection = Connection::open()?;
    let rows =
        connection.dump("listing addresses", RouteNetlinkMessage::GetAddress(AddressMessage::default()))?;
    for address in spec.addresses() {
        let is_there = rows.iter().any(|row| {
            matches!(row, RouteNetlinkMessage::NewAddress(message)
                if message.header.index == device.index && super::link::address_of(message) == Some(address))
        });
        if !is_there {
            return Err(Error::Different(format!("address {address} is gone from the pod")));
        }
    }
    verify_neighbours(&mut connection, device.index, spec.gateways(), spec.host_mac)?;
    let present = routes(&mut connection, None)?;
    for wanted in spec.pod_routes(device.index) {
        if !present.iter().any(|(_, route)| *route == wanted) {
            return Err(Error::Different(format!("route {} is gone from the pod", wanted.prefix)));
        }
    }
    Ok(())
}

fn verify_neighbours(
    connection: &mut Connection,
    ifindex: u32,
    addresses: impl Iterator<Item = IpAddr>,
    mac: MacAddress,
) -> Result<()> {
    let present = permanent_neighbours(connection, ifindex)?;
    for address in addresses {
        if present.get(&address) != Some(&mac) {
            return Err(Error::Different(format!("the neighbour entry of {address} is gone")));
        }
    }
    Ok(())
}

fn index_of(interface: &str) -> Result<u32> {
    if_nametoindex(interface).map_err(|error| Error::kernel(format!("looking for {interface}"), error))
}

fn different(interface: &str, what: &str) -> Error {
    Error::Different(format!("device {interface} {what}"))
}
