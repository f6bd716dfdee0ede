//! Devices that may lead out of the node, and what the kernel would do with packets there.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{LinkLayerType, LinkMessage};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};

use super::Result;
use super::connection::Connection;
use super::link::{Link, address_of, family_of};
use super::route::ip_of;

/// Somewhere outside that is nobody's: RFC 7600's dummy address, and RFC 3849's prefix.
const OUTSIDE: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(192, 0, 0, 8)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1))];

/// An Ethernet device with its addresses and its ways out.
#[derive(Clone, Debug)]
pub struct OutwardDevice {
    /// The device.
    pub link: Link,
    /// Its addresses that packets may come from, with the lengths of their prefixes.
    pub addresses: Vec<(IpAddr, u8)>,
    /// How packets to the outside leave by it: of each family that has a way.
    pub ways: Vec<Way>,
}

/// How the node's own packets to the outside would leave by a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way {
    /// Their source.
    pub source: IpAddr,
    /// By a router: not only to neighbours.
    pub has_gateway: bool,
}

/// The Ethernet devices of the calling thread's namespace that `is_wanted` says yes to.
pub fn outward_devices(is_wanted: impl Fn(&Link) -> bool) -> Result<Vec<OutwardDevice>> {
    let mut connection = Connection::open()?;
    let mut addresses = usable_addresses(&mut connection)?;
    let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
    let mut devices = Vec::new();
    for row in connection.dump("listing devices", request)? {
        let RouteNetlinkMessage::NewLink(message) = row else { continue };
        let link = Link::from(&message);
        if message.header.link_layer_type != LinkLayerType::Ether || !is_wanted(&link) {
            continue;
        }
        let addresses = addresses.remove(&link.index).unwrap_or_default();
        let ways = OUTSIDE.iter().filter_map(|to| way_out(&mut connection, link.index, *to)).collect();
        devices.push(OutwardDevice { link, addresses, ways });
    }
    Ok(devices)
}

fn usable_addresses(connection: &mut Connection) -> Result<BTreeMap<u32, Vec<(IpAddr, u8)>>> {
    let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    let mut addresses: BTreeMap<u32, Vec<(IpAddr, u8)>> = BTreeMap::new();
    for row in connection.dump("listing addresses", request)? {
        let RouteNetlinkMessage::NewAddress(message) = row else { continue };
        if let Some(address) = address_of(&message).filter(|_| is_usable(&message)) {
            addresses.entry(message.header.index).or_default().push((address, message.header.prefix_len));
        }
    }
    Ok(addresses)
}

/// The kernel would let packets come from it.
fn is_usable(message: &AddressMessage) -> bool {
    let unusable = AddressFlags::Tentative | AddressFlags::Dadfailed | AddressFlags::Deprecated;
    let flags = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Flags(flags) => Some(*flags),
        _ => None,
    });
    message.header.scope == AddressScope::Universe
        && !flags.unwrap_or(AddressFlags::empty()).intersects(unusable)
}

/// `None`: the kernel has no way there, whatever the reason.
fn way_out(connection: &mut Connection, device_ifindex: u32, to: IpAddr) -> Option<Way> {
    let mut request = RouteMessage::default();
    request.header.address_family = family_of(to);
    request.header.destination_prefix_length = if to.is_ipv4() { 32 } else { 128 };
    request.attributes.push(RouteAttribute::Destination(RouteAddress::from(to)));
    request.attributes.push(RouteAttribute::Oif(device_ifindex));
    let answer = connection.get("looking for a way out", RouteNetlinkMessage::GetRoute(request));
    let Ok(Some(RouteNetlinkMessage::NewRoute(route))) = answer else { return None };
    let source = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::PrefSource(source) => ip_of(source),
        _ => None,
    });
    let by =
        |attribute: &RouteAttribute| matches!(attribute, RouteAttribute::Gateway(_) | RouteAttribute::Via(_));
    let has_gateway = route.attributes.iter().any(by);
    (route.header.kind == RouteType::Unicast).then_some(Way { source: source?, has_gateway })
}
