//! The proxy's network namespace: a veth pair leads there, and nothing of it is in the node's.
//!
//! ```text
//!   node                       the proxy's namespace
//!   weir_proxy  no address     p0  no address
//!                              rule: what comes by p0 is this namespace's own, whoever it is for
//!                              169.254.1.1 dev p0; default via 169.254.1.1, via fe80::1
//!                              permanent neighbours: both gateways
//! ```

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};

use ipnet::IpNet;
use netlink_packet_route::link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkInfo, LinkMessage};
use netlink_packet_route::route::{
    RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{
    AddressFamily as Family, Backlog, SockFlag, SockType, SockaddrStorage, bind, listen, setsockopt, socket,
    sockopt,
};

use super::connection::{Connection, Request};
use super::route::{Route, new_neighbour, new_route};
use super::{
    Error, GATEWAY_IPV4, GATEWAY_IPV6, Link, Result, delete_link, get_sysctl, link, namespace, set_sysctl,
};
use crate::model::MacAddress;

/// The device inside.
const INSIDE: &str = "p0";
/// The node's end, and the end inside: not an endpoint's.
const HOST_MAC: MacAddress = MacAddress([0x02, 0x57, 0x65, 0x70, 0, 1]);
const INSIDE_MAC: MacAddress = MacAddress([0x02, 0x57, 0x65, 0x70, 0, 2]);
/// Of the rule and the routes by which everything is local.
const TABLE: u8 = 100;
const LOOPBACK_IFINDEX: u32 = 1;
/// As the routes of a static configuration.
const STATIC_PROTOCOL: u8 = 4;
/// Connections that wait for the proxy, of each family. The kernel allows no more than somaxconn.
const BACKLOG: i32 = 4096;

/// The pair that leads to the proxy's namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProxyLink {
    /// The node's end.
    pub host_ifindex: u32,
    /// The other end, as the proxy's namespace numbers it.
    pub inside_ifindex: u32,
    /// Hardware address of the other end.
    pub inside_mac: MacAddress,
}

/// Makes a network namespace that nobody is in.
pub fn new_namespace() -> Result<File> {
    let make = || {
        unshare(CloneFlags::CLONE_NEWNET)
            .map_err(|error| Error::kernel("making a network namespace", error))?;
        File::open("/proc/thread-self/ns/net")
            .map_err(|error| Error::kernel("opening the new network namespace", error))
    };
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("weir-netns".to_owned())
            .spawn_scoped(scope, make)
            .map_err(|error| Error::kernel("starting a thread", error))?
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// The pair, if the node has its end and the namespace the other one.
pub fn find_proxy_link(namespace: &File, name: &str) -> Result<Option<ProxyLink>> {
    let Some(host) = link(name)?.filter(|host| host.mac == HOST_MAC && host.is_up) else { return Ok(None) };
    let is_inside = |there: &Link| there.mac == INSIDE_MAC && there.is_up && there.is_operational;
    let inside = namespace::within(namespace, || link(INSIDE))?.filter(is_inside);
    let link = |inside: Link| ProxyLink {
        host_ifindex: host.index,
        inside_ifindex: inside.index,
        inside_mac: INSIDE_MAC,
    };
    Ok(inside.map(link))
}

/// Makes the pair and all that is inside, instead of one that there may be.
pub fn create_proxy_link(namespace: &File, name: &str, mtu: u32) -> Result<ProxyLink> {
    delete_link(name)?;
    let end = |name: &str, mac: MacAddress| {
        let mut message = LinkMessage::default();
        message.attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::Mtu(mtu),
            LinkAttribute::Address(mac.0.to_vec()),
        ];
        message
    };
    let mut inside = end(INSIDE, INSIDE_MAC);
    inside.attributes.push(LinkAttribute::NetNsFd(namespace.as_raw_fd()));
    let mut message = end(name, HOST_MAC);
    message.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Veth),
        LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(inside))),
    ]));
    let request =
        Request::new(format!("making device {name}"), RouteNetlinkMessage::NewLink(message)).create();
    Connection::open()?.execute(vec![request])?;
    // What pods send comes by this device, too, and the way back to them is another one. The kernel's loose
    // filter takes nothing by a device without an address.
    set_if_there(&format!("net/ipv4/conf/{name}/rp_filter"), "0")?;
    set_if_there(&format!("net/ipv6/conf/{name}/addr_gen_mode"), "1")?;
    let host = link(name)?.ok_or_else(|| Error::Different(format!("device {name} went away")))?;
    Connection::open()?.execute(vec![super::link::raise(host.index)])?;
    let inside_ifindex = namespace::within(namespace, configure_inside)?;
    Ok(ProxyLink { host_ifindex: host.index, inside_ifindex, inside_mac: INSIDE_MAC })
}

/// Gives the number of the device inside.
fn configure_inside() -> Result<u32> {
    let ifindex =
        if_nametoindex(INSIDE).map_err(|error| Error::kernel(format!("looking for {INSIDE}"), error))?;
    for conf in ["all", "default", INSIDE] {
        set_if_there(&format!("net/ipv4/conf/{conf}/rp_filter"), "0")?;
        set_if_there(&format!("net/ipv6/conf/{conf}/accept_ra"), "0")?;
    }
    set_if_there(&format!("net/ipv6/conf/{INSIDE}/addr_gen_mode"), "1")?;
    // A client may use its port again while our end of its last connection to the server still waits.
    set_if_there("net/ipv4/tcp_tw_reuse", "1")?;
    set_if_there("net/core/somaxconn", &BACKLOG.to_string())?;
    let mut requests = vec![super::link::raise(LOOPBACK_IFINDEX), super::link::raise(ifindex)];
    let gateways = [IpAddr::V4(GATEWAY_IPV4), IpAddr::V6(GATEWAY_IPV6)];
    let has_ipv6 = get_sysctl("net/ipv6/conf/all/forwarding")?.is_some();
    for gateway in gateways.into_iter().filter(|gateway| gateway.is_ipv4() || has_ipv6) {
        requests.push(new_neighbour(ifindex, gateway, HOST_MAC));
        let everything: IpNet = match gateway {
            IpAddr::V4(_) => IpNet::new_assert(Ipv4Addr::UNSPECIFIED.into(), 0),
            IpAddr::V6(_) => IpNet::new_assert(Ipv6Addr::UNSPECIFIED.into(), 0),
        };
        let route =
            |prefix, gateway| Route { prefix, gateway, device_ifindex: ifindex, source: None, mtu: 0 };
        if gateway.is_ipv4() {
            requests.push(new_route(&route(IpNet::from(gateway), None), STATIC_PROTOCOL).replace());
        }
        requests.push(new_route(&route(everything, Some(gateway)), STATIC_PROTOCOL).replace());
        requests.push(all_local(gateway.is_ipv4()));
        requests.push(rule(gateway.is_ipv4()));
    }
    Connection::open()?.execute(requests)?;
    Ok(ifindex)
}

fn set_if_there(name: &str, value: &str) -> Result<()> {
    match get_sysctl(name)? {
        Some(_) => set_sysctl(name, value),
        None => Ok(()),
    }
}

fn family(is_ipv4: bool) -> AddressFamily {
    if is_ipv4 { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

/// Whatever is looked for in the table is this namespace's own.
fn all_local(is_ipv4: bool) -> Request {
    let mut message = RouteMessage::default();
    message.header.address_family = family(is_ipv4);
    message.header.table = TABLE;
    message.header.protocol = RouteProtocol::from(STATIC_PROTOCOL);
    message.header.kind = RouteType::Local;
    message.header.scope = if is_ipv4 { RouteScope::Host } else { RouteScope::Universe };
    message.attributes.push(RouteAttribute::Oif(LOOPBACK_IFINDEX));
    debug_assert_ne!(TABLE, RouteHeader::RT_TABLE_MAIN);
    Request::new("making everything local to the proxy", RouteNetlinkMessage::NewRoute(message)).replace()
}

/// What comes by the device is looked for in the table.
fn rule(is_ipv4: bool) -> Request {
    let mut message = RuleMessage::default();
    message.header.family = family(is_ipv4);
    message.header.table = TABLE;
    message.header.action = RuleAction::ToTable;
    message.attributes = vec![RuleAttribute::Iifname(INSIDE.to_owned()), RuleAttribute::Priority(100)];
    Request::new("adding the proxy's rule", RouteNetlinkMessage::NewRule(message))
        .create()
        .tolerate(&[libc::EEXIST])
}

/// The sockets where new flows arrive, made in the calling thread's namespace: TCP of both families, then UDP.
/// Their port says nothing: a program chooses them. `None`: the node has no IPv6.
pub fn proxy_listeners() -> Result<[Option<OwnedFd>; 4]> {
    let mut made = [None, None, None, None];
    let kinds = [SockType::Stream, SockType::Datagram];
    for (number, kind) in kinds.into_iter().enumerate() {
        made[number * 2] = Some(listener(Ipv4Addr::UNSPECIFIED.into(), kind)?);
        made[number * 2 + 1] = match listener(Ipv6Addr::UNSPECIFIED.into(), kind) {
            Ok(socket) => Some(socket),
            Err(Error::Kernel { cause, .. })
                if matches!(cause.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)) =>
            {
                None
            }
            Err(error) => return Err(error),
        };
    }
    Ok(made)
}

fn listener(address: IpAddr, kind: SockType) -> Result<OwnedFd> {
    let failed = |error| Error::kernel(format!("making a listener of the proxy at {address}"), error);
    let family = if address.is_ipv4() { Family::Inet } else { Family::Inet6 };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let made = socket(family, kind, flags, None).map_err(failed)?;
    setsockopt(&made, sockopt::IpTransparent, &true).map_err(failed)?;
    if address.is_ipv6() {
        setsockopt(&made, sockopt::Ipv6V6Only, &true).map_err(failed)?;
    }
    if kind == SockType::Datagram {
        match address {
            IpAddr::V4(_) => setsockopt(&made, sockopt::Ipv4OrigDstAddr, &true).map_err(failed)?,
            IpAddr::V6(_) => setsockopt(&made, sockopt::Ipv6OrigDstAddr, &true).map_err(failed)?,
        }
    }
    bind(made.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(address, 0))).map_err(failed)?;
    if kind == SockType::Stream {
        listen(&made, Backlog::new(BACKLOG).map_err(failed)?).map_err(failed)?;
    }
    Ok(made)
}
