//! Which devices lead out of the node, and which addresses the node gives to what leaves by them.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::node::OVERLAY_DEVICE;
use crate::model::{AddressPair, EndpointId, MacAddress, NetworkDevice};
use crate::netlink::{self, Link, OutwardDevice};

/// Kinds of devices that join machines and containers of this node, and lead out only where a route does.
const INNER_KINDS: [&str; 2] = ["bridge", "dummy"];

/// The devices that lead out now: those that are named, or, where none is, those that have an address of the
/// Node object, a way by a router, or neighbours.
pub fn list(names: &[String], node: &[IpAddr]) -> netlink::Result<BTreeMap<u32, NetworkDevice>> {
    let devices = netlink::outward_devices(|link| !is_ours(link))?;
    let chosen = devices.iter().filter(|device| match names {
        [] => leads_out(device, node),
        names => names.contains(&device.link.name),
    });
    Ok(chosen.map(|device| (device.link.index, network_device(device, node))).collect())
}

/// The tunnel's device, or the host side of a pod's link.
fn is_ours(link: &Link) -> bool {
    let prefix = MacAddress::of_host_side(EndpointId(0)).0;
    link.name == OVERLAY_DEVICE || link.mac.0[..4] == prefix[..4]
}

fn leads_out(device: &OutwardDevice, node: &[IpAddr]) -> bool {
    let has_neighbours =
        |(address, length): &(IpAddr, u8)| *length < if address.is_ipv4() { 32 } else { 128 };
    device.addresses.iter().any(|(address, _)| node.contains(address))
        || device.ways.iter().any(|way| way.has_gateway)
        || (!INNER_KINDS.contains(&device.link.kind.as_str()) && device.addresses.iter().any(has_neighbours))
}

/// The source that the node's own packets would have; where there is no way by this device, the Node
/// object's address that it has, or any.
fn network_device(device: &OutwardDevice, node: &[IpAddr]) -> NetworkDevice {
    let is_shared = |address: &IpAddr| match address {
        IpAddr::V4(address) => !address.is_loopback(),
        IpAddr::V6(address) => !address.is_loopback() && !address.is_unicast_link_local(),
    };
    let ways = device.ways.iter().map(|way| way.source).filter(is_shared);
    let addresses: Vec<IpAddr> = device.addresses.iter().map(|(address, _)| *address).collect();
    let of_node = addresses.iter().copied().filter(|address| node.contains(address));
    let sources = ways.chain(of_node).chain(addresses.iter().copied());
    NetworkDevice { name: device.link.name.clone(), sources: AddressPair::first_of(sources), addresses }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::Way;

    fn device(kind: &str, addresses: &[(&str, u8)], way: Option<(&str, bool)>) -> OutwardDevice {
        let link = Link {
            name: "eth1".to_owned(),
            index: 7,
            mac: MacAddress([2, 0, 0, 0, 0, 1]),
            mtu: 1500,
            is_up: true,
            is_operational: true,
            kind: kind.to_owned(),
            lower: 0,
        };
        let ip = |text: &str| text.parse().expect("an address");
        OutwardDevice {
            link,
            addresses: addresses.iter().map(|(address, length)| (ip(address), *length)).collect(),
            ways: way
                .iter()
                .map(|(source, has_gateway)| Way { source: ip(source), has_gateway: *has_gateway })
                .collect(),
        }
    }

    #[test]
    fn what_has_a_router_or_neighbours_or_the_nodes_address_leads_out() {
        let node: [IpAddr; 1] = ["192.0.2.1".parse().expect("an address")];
        for (device, expected) in [
            (device("", &[("192.0.2.1", 32)], None), true),
            (device("", &[], Some(("192.0.2.1", true))), true),
            (device("", &[("10.9.0.1", 24)], None), true),
            (device("veth", &[("10.9.0.1", 32)], None), false),
            (device("bridge", &[("172.17.0.1", 16)], None), false),
            (device("bridge", &[("172.17.0.1", 16)], Some(("172.17.0.1", false))), false),
            (device("bridge", &[("172.17.0.1", 16)], Some(("172.17.0.1", true))), true),
            (device("dummy", &[("10.96.0.1", 24)], None), false),
            (device("", &[], None), false),
        ] {
            assert_eq!(leads_out(&device, &node), expected, "{device:?}");
        }
    }

    #[test]
    fn what_leaves_bears_what_the_route_would_give_it() {
        let node: [IpAddr; 1] = ["10.9.0.2".parse().expect("an address")];
        let addresses = [("10.9.0.1", 24), ("10.9.0.2", 24), ("fd09::1", 64)];
        let sources = |way| network_device(&device("", &addresses, way), &node).sources;
        let pair = |ipv4: &str| AddressPair { ipv4: ipv4.parse().ok(), ipv6: "fd09::1".parse().ok() };
        assert_eq!(sources(Some(("10.9.0.3", true))), pair("10.9.0.3"));
        assert_eq!(sources(None), pair("10.9.0.2"));
        assert_eq!(sources(Some(("fe80::1", true))), pair("10.9.0.2"));
    }
}
