//! Routes and neighbours of ours: kept equal to what is wanted, nobody else's touched.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol,
    RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::Result;
use super::connection::{Connection, Request};
use super::link::family_of;
use crate::model::MacAddress;

/// Marks the routes that `sync_routes` owns (`ip route show proto 87`).
pub const NODE_ROUTE_PROTOCOL: u8 = 87;

/// A route of the main table.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    /// Where to.
    pub prefix: IpNet,
    /// The next hop; `None`: on the link itself.
    pub gateway: Option<IpAddr>,
    /// Index of the device.
    pub device_ifindex: u32,
    /// The source address that the node's own packets take.
    pub source: Option<IpAddr>,
    /// 0: the device's.
    pub mtu: u32,
}

/// Makes the routes with our protocol number be exactly these: adds what is missing, then removes what is
/// stale. Returns the prefixes whose route could not be made or removed; they cost no other one.
pub fn sync_routes(wanted: &[Route]) -> Result<Vec<(IpNet, io::Error)>> {
    let mut connection = Connection::open()?;
    let present = routes_with_protocol(&mut connection, NODE_ROUTE_PROTOCOL)?;
    let wanted: BTreeSet<&Route> = wanted.iter().collect();
    let ours: BTreeSet<IpNet> = present.iter().map(|route| route.prefix).collect();
    let kept: BTreeSet<IpNet> = wanted.iter().map(|route| route.prefix.trunc()).collect();
    let (mut prefixes, mut requests) = (Vec::new(), Vec::new());
    for route in &wanted {
        if !present.contains(route) {
            let request = new_route(route, NODE_ROUTE_PROTOCOL);
            // Replacing takes whatever route has that prefix: only where that is ours.
            requests.push(if ours.contains(&route.prefix.trunc()) {
                request.replace()
            } else {
                request.create()
            });
            prefixes.push(route.prefix.trunc());
        }
    }
    for route in &present {
        // IPv4 replaces in place; what still stands with another next hop was not replaced.
        if !kept.contains(&route.prefix) {
            requests.push(delete_route(route, NODE_ROUTE_PROTOCOL));
            prefixes.push(route.prefix);
        }
    }
    let outcomes = connection.execute_each(requests)?;
    Ok(prefixes
        .into_iter()
        .zip(outcomes)
        .filter_map(|(prefix, outcome)| Some((prefix, outcome.err()?)))
        .collect())
}

/// The routes with our protocol number, IPv4 first.
pub fn node_routes() -> Result<Vec<Route>> {
    routes_with_protocol(&mut Connection::open()?, NODE_ROUTE_PROTOCOL)
}

/// The permanent neighbours of a device.
pub fn neighbours(device_ifindex: u32) -> Result<BTreeMap<IpAddr, MacAddress>> {
    permanent_neighbours(&mut Connection::open()?, device_ifindex)
}

/// Makes the permanent neighbours of a device be exactly these.
pub fn sync_neighbours(device_ifindex: u32, wanted: &BTreeMap<IpAddr, MacAddress>) -> Result<()> {
    let mut connection = Connection::open()?;
    let present = permanent_neighbours(&mut connection, device_ifindex)?;
    let mut requests = Vec::new();
    for (&address, &mac) in wanted {
        if present.get(&address) != Some(&mac) {
            requests.push(new_neighbour(device_ifindex, address, mac));
        }
    }
    for &address in present.keys().filter(|address| !wanted.contains_key(address)) {
        let message = neighbour(device_ifindex, address);
        let action = format!("removing neighbour {address}");
        requests
            .push(Request::new(action, RouteNetlinkMessage::DelNeighbour(message)).tolerate(&[libc::ENOENT]));
    }
    connection.execute(requests)
}

pub(super) fn routes_with_protocol(connection: &mut Connection, protocol: u8) -> Result<Vec<Route>> {
    let mut routes = routes(connection, Some(protocol))?;
    routes.retain(|(message, _)| u8::from(message.header.protocol) == protocol);
    Ok(routes.into_iter().map(|(_, route)| route).collect())
}

/// The unicast routes of the main table, of one protocol where the kernel can filter.
pub(super) fn routes(
    connection: &mut Connection,
    protocol: Option<u8>,
) -> Result<Vec<(RouteMessage, Route)>> {
    connection.filter_dumps();
    let mut found = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut request = RouteMessage::default();
        request.header.address_family = family;
        request.header.table = RouteHeader::RT_TABLE_MAIN;
        request.header.protocol = RouteProtocol::from(protocol.unwrap_or(0));
        for row in connection.dump("listing routes", RouteNetlinkMessage::GetRoute(request))? {
            let RouteNetlinkMessage::NewRoute(message) = row else { continue };
            let is_ours = message.header.table == RouteHeader::RT_TABLE_MAIN
                && message.header.kind == RouteType::Unicast
                && !message.header.flags.contains(RouteFlags::Cloned);
            if is_ours && let Some(route) = route_of(&message) {
                found.push((message, route));
            }
        }
    }
    Ok(found)
}

/// True if packets to the address are this namespace's own.
pub(super) fn is_local(connection: &mut Connection, address: Ipv6Addr) -> Result<bool> {
    let mut request = RouteMessage::default();
    request.header.address_family = AddressFamily::Inet6;
    request.header.destination_prefix_length = 128;
    request.attributes.push(RouteAttribute::Destination(RouteAddress::Inet6(address)));
    let answer = connection.get("looking for a route", RouteNetlinkMessage::GetRoute(request))?;
    Ok(matches!(answer, Some(RouteNetlinkMessage::NewRoute(route)) if route.header.kind == RouteType::Local))
}

fn route_of(message: &RouteMessage) -> Option<Route> {
    let unspecified: IpAddr = match message.header.address_family {
        AddressFamily::Inet => Ipv4Addr::UNSPECIFIED.into(),
        _ => Ipv6Addr::UNSPECIFIED.into(),
    };
    let mut destination = unspecified;
    let mut route =
        Route { prefix: IpNet::from(unspecified), gateway: None, device_ifindex: 0, source: None, mtu: 0 };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => destination = ip_of(address)?,
            RouteAttribute::Gateway(address) => route.gateway = ip_of(address),
            RouteAttribute::PrefSource(address) => route.source = ip_of(address),
            RouteAttribute::Oif(index) => route.device_ifindex = *index,
            RouteAttribute::Metrics(metrics) => {
                for metric in metrics {
                    if let RouteMetric::Mtu(mtu) = metric {
                        route.mtu = *mtu;
                    }
                }
            }
            _ => {}
        }
    }
    route.prefix = IpNet::new(destination, message.header.destination_prefix_length).ok()?;
    Some(route)
}

pub(super) fn ip_of(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    }
}

fn message_of(route: &Route, protocol: u8) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family_of(route.prefix.addr());
    message.header.destination_prefix_length = route.prefix.prefix_len();
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::from(protocol);
    message.header.kind = RouteType::Unicast;
    let is_link_scope = route.prefix.addr().is_ipv4() && route.gateway.is_none();
    message.header.scope = if is_link_scope { RouteScope::Link } else { RouteScope::Universe };
    message.attributes.push(RouteAttribute::Oif(route.device_ifindex));
    if route.prefix.prefix_len() > 0 {
        message.attributes.push(RouteAttribute::Destination(route.prefix.network().into()));
    }
    if let Some(gateway) = route.gateway {
        message.attributes.push(RouteAttribute::Gateway(gateway.into()));
    }
    if let Some(source) = route.source {
        message.attributes.push(RouteAttribute::PrefSource(source.into()));
    }
    if route.mtu > 0 {
        message.attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(route.mtu)]));
    }
    message
}

pub(super) fn new_route(route: &Route, protocol: u8) -> Request {
    let message = RouteNetlinkMessage::NewRoute(message_of(route, protocol));
    Request::new(format!("adding route {}", route.prefix), message)
}

fn delete_route(route: &Route, protocol: u8) -> Request {
    let message = RouteNetlinkMessage::DelRoute(message_of(route, protocol));
    Request::new(format!("removing route {}", route.prefix), message).tolerate(&[libc::ESRCH])
}

pub(super) fn new_neighbour(device_ifindex: u32, address: IpAddr, mac: MacAddress) -> Request {
    let mut message = neighbour(device_ifindex, address);
    message.header.state = NeighbourState::Permanent;
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
    Request::new(format!("adding neighbour {address}"), RouteNetlinkMessage::NewNeighbour(message)).replace()
}

pub(super) fn permanent_neighbours(
    connection: &mut Connection,
    device_ifindex: u32,
) -> Result<BTreeMap<IpAddr, MacAddress>> {
    let request = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
    let mut found = BTreeMap::new();
    for row in connection.dump("listing neighbours", request)? {
        let RouteNetlinkMessage::NewNeighbour(message) = row else { continue };
        if message.header.ifindex != device_ifindex
            || message.header.state != NeighbourState::Permanent
            || message.header.flags.contains(NeighbourFlags::Own)
        {
            continue;
        }
        let mut address = None;
        let mut mac = None;
        for attribute in &message.attributes {
            match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => {
                    address = Some(IpAddr::V4(*ip))
                }
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => {
                    address = Some(IpAddr::V6(*ip));
                }
                NeighbourAttribute::LinkLayerAddress(bytes) => {
                    mac = <[u8; 6]>::try_from(bytes.as_slice()).ok().map(MacAddress);
                }
                _ => {}
            }
        }
        if let (Some(address), Some(mac)) = (address, mac) {
            found.insert(address, mac);
        }
    }
    Ok(found)
}

fn neighbour(device_ifindex: u32, address: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family_of(address);
    message.header.ifindex = device_ifindex;
    message.header.kind = RouteType::Unicast;
    message.attributes.push(NeighbourAttribute::Destination(match address {
        IpAddr::V4(address) => NeighbourAddress::Inet(address),
        IpAddr::V6(address) => NeighbourAddress::Inet6(address),
    }));
    message
}
