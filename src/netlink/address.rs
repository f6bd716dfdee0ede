//! The node's own addresses, and news of them.

use std::collections::BTreeSet;
use std::net::IpAddr;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::AddressMessage;
use netlink_sys::protocols::NETLINK_ROUTE;
use tokio::sync::watch;

use super::connection::Connection;
use super::link::address_of;
use super::listen::listen;
use super::{Error, Result};

/// RTNLGRP_LINK, RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV4_ROUTE, RTNLGRP_IPV6_IFADDR and RTNLGRP_IPV6_ROUTE of
/// linux/rtnetlink.h.
const GROUPS: [u32; 5] = [1, 5, 7, 9, 11];

/// The addresses by which others reach this node: those of all devices of the calling thread's
/// namespace but for loopback and link-local ones.
pub fn local_addresses() -> Result<BTreeSet<IpAddr>> {
    let rows = Connection::open()?
        .dump("listing addresses", RouteNetlinkMessage::GetAddress(AddressMessage::default()))?;
    let addresses = rows.iter().filter_map(|row| match row {
        RouteNetlinkMessage::NewAddress(message) => address_of(message),
        _ => None,
    });
    Ok(addresses.filter(|address| !address.is_loopback() && !is_link_local(address)).collect())
}

fn is_link_local(address: &IpAddr) -> bool {
    match address {
        // Nodes may have those of a link for good: what is at the other end is what they reach.
        IpAddr::V4(_) => false,
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

/// Changes whenever a device, an address or a route of the calling thread's namespace comes, changes or
/// goes; several changes may be one. The channel closes when the kernel can no longer be heard.
pub fn address_news() -> Result<watch::Receiver<()>> {
    listen(NETLINK_ROUTE, &GROUPS, "addresses")
        .map_err(|error| Error::kernel("listening for changes of devices and addresses", error))
}
