//! The node's own addresses, and news of them.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::thread;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::AddressMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use tokio::sync::watch;

use super::connection::Connection;
use super::link::address_of;
use super::{Error, Result};

/// RTNLGRP_IPV4_IFADDR and RTNLGRP_IPV6_IFADDR of linux/rtnetlink.h.
const GROUPS: [u32; 2] = [5, 9];

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

/// Changes whenever a device of the calling thread's namespace gets or loses an address; several changes
/// may be one. The channel closes when the kernel can no longer be heard.
pub fn address_news() -> Result<watch::Receiver<()>> {
    let open = || {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        for group in GROUPS {
            socket.add_membership(group)?;
        }
        let (news, heard) = watch::channel(());
        let listen = move || {
            while hear(&socket).is_ok() {
                if news.send(()).is_err() {
                    return;
                }
            }
        };
        thread::Builder::new().name("addresses".to_owned()).spawn(listen)?;
        io::Result::Ok(heard)
    };
    open().map_err(|error| Error::kernel("listening for changes of addresses", error))
}

/// Waits for a message; what it says does not matter, since everything is listed anew.
fn hear(socket: &Socket) -> io::Result<()> {
    match socket.recv_from_full() {
        Ok(_) => Ok(()),
        // More came than the kernel kept.
        Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
        Err(error) => Err(error),
    }
}
