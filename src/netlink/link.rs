//! Devices of the calling thread's namespace, and their addresses.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, State,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::connection::{Connection, Request};
use super::{Error, Result, get_sysctl, set_sysctl};
use crate::model::MacAddress;

/// A device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its name.
    pub name: String,
    /// Its index.
    pub index: u32,
    /// Its hardware address; zero where it has none of six bytes.
    pub mac: MacAddress,
    /// Its MTU.
    pub mtu: u32,
    /// It was set up.
    pub is_up: bool,
    /// It can carry packets now.
    pub is_operational: bool,
    /// `veth`, `vxlan`, ...; empty for hardware.
    pub kind: String,
    /// The device that it is on, as of a VLAN; 0: none.
    pub lower: u32,
}

/// The device of that name.
pub fn link(name: &str) -> Result<Option<Link>> {
    get(&mut Connection::open()?, name)
}

/// The index of the device of that name.
pub fn link_index(name: &str) -> Result<Option<u32>> {
    Ok(link(name)?.map(|link| link.index))
}

/// All devices.
pub fn links() -> Result<Vec<Link>> {
    let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
    let rows = Connection::open()?.dump("listing devices", request)?;
    Ok(rows
        .iter()
        .filter_map(|row| match row {
            RouteNetlinkMessage::NewLink(message) => Some(Link::from(message)),
            _ => None,
        })
        .collect())
}

/// Deletes the device of that name, and the other end if it is a pair; false if there was none.
pub fn delete_link(name: &str) -> Result<bool> {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    let request = Request::new(format!("deleting device {name}"), RouteNetlinkMessage::DelLink(message));
    match Connection::open()?.execute(vec![request]) {
        Ok(()) => Ok(true),
        Err(Error::Kernel { cause, .. }) if cause.raw_os_error() == Some(libc::ENODEV) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Sets the device up.
pub fn raise_link(index: u32) -> Result<()> {
    Connection::open()?.execute(vec![raise(index)])
}

/// Gives the device the address, if it does not have it yet; without duplicate-address detection.
pub fn add_address(device_ifindex: u32, address: IpNet) -> Result<()> {
    Connection::open()?.execute(vec![new_address(device_ifindex, address).replace()])
}

/// The devices that have at least one of the addresses, by index, without doubles.
pub fn devices_with(addresses: &[IpAddr]) -> Result<Vec<Link>> {
    let rows = Connection::open()?
        .dump("listing addresses", RouteNetlinkMessage::GetAddress(AddressMessage::default()))?;
    let mut found = BTreeSet::new();
    for row in &rows {
        if let RouteNetlinkMessage::NewAddress(message) = row
            && address_of(message).is_some_and(|address| addresses.contains(&address))
        {
            found.insert(message.header.index);
        }
    }
    let mut devices: Vec<Link> = links()?.into_iter().filter(|link| found.contains(&link.index)).collect();
    devices.sort_by_key(|link| link.index);
    Ok(devices)
}

/// Takes the address from the device; one that is not there is no error.
pub fn delete_address(device_ifindex: u32, address: IpNet) -> Result<()> {
    let mut message = AddressMessage::default();
    message.header.index = device_ifindex;
    message.header.prefix_len = address.prefix_len();
    message.header.family = family_of(address.addr());
    message.attributes =
        vec![AddressAttribute::Local(address.addr()), AddressAttribute::Address(address.addr())];
    let request =
        Request::new(format!("removing address {address}"), RouteNetlinkMessage::DelAddress(message));
    Connection::open()?.execute(vec![request.tolerate(&[libc::EADDRNOTAVAIL])])
}

/// The addresses of one device, with the lengths of their prefixes.
pub fn addresses_of(device_ifindex: u32) -> Result<BTreeSet<IpNet>> {
    let rows = Connection::open()?
        .dump("listing addresses", RouteNetlinkMessage::GetAddress(AddressMessage::default()))?;
    let addresses = rows.iter().filter_map(|row| match row {
        RouteNetlinkMessage::NewAddress(message) if message.header.index == device_ifindex => {
            IpNet::new(address_of(message)?, message.header.prefix_len).ok()
        }
        _ => None,
    });
    Ok(addresses.collect())
}

/// Makes the VXLAN device whose tunnel keys BPF programs set per packet, and sets it up; its index.
/// One that exists with the same port is kept, so that a restart interrupts nothing. A new one gets the
/// index `wanted`, where that is given: loaded programs know the device by it.
pub fn ensure_vxlan(name: &str, port: u16, mtu: u32, wanted: Option<u32>) -> Result<u32> {
    // Nobody answers ARP in a tunnel: the inner frame's address means nothing.
    let up = LinkFlags::Up | LinkFlags::Noarp;
    let mut connection = Connection::open()?;
    if let Some((link, message)) = get_with_message(&mut connection, name)? {
        if is_our_vxlan(&message, port) {
            let mut change = LinkMessage::default();
            change.header.index = link.index;
            change.header.flags = up;
            change.header.change_mask = up;
            if link.mtu != mtu {
                change.attributes.push(LinkAttribute::Mtu(mtu));
            }
            let action = format!("raising device {name}");
            connection.execute(vec![Request::new(action, RouteNetlinkMessage::SetLink(change))])?;
            return Ok(link.index);
        }
        delete_link(name)?;
    }
    let mut message = LinkMessage::default();
    message.header.index = wanted.unwrap_or(0);
    message.header.flags = LinkFlags::Noarp;
    message.header.change_mask = LinkFlags::Noarp;
    message.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::Mtu(mtu),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Vxlan),
            LinkInfo::Data(InfoData::Vxlan(vec![
                InfoVxlan::CollectMetadata(true),
                InfoVxlan::Learning(false),
                InfoVxlan::Port(port),
                InfoVxlan::UDPZeroCsumRX(true),
            ])),
        ]),
    ];
    let action = format!("making VXLAN device {name} on port {port}");
    connection.execute(vec![Request::new(action, RouteNetlinkMessage::NewLink(message)).create()])?;
    let index = get(&mut connection, name)?
        .map(|link| link.index)
        .ok_or_else(|| Error::Different(format!("device {name} went away")))?;
    // Before it is up: a link-local address would be tested and announced to nobody.
    let generation = format!("net/ipv6/conf/{name}/addr_gen_mode");
    if get_sysctl(&generation)?.is_some() {
        set_sysctl(&generation, "1")?;
    }
    connection.execute(vec![raise(index)])?;
    Ok(index)
}

fn is_our_vxlan(message: &LinkMessage, port: u16) -> bool {
    let infos = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => Some(infos),
        _ => None,
    });
    let data = infos.into_iter().flatten().find_map(|info| match info {
        LinkInfo::Data(InfoData::Vxlan(data)) => Some(data),
        _ => None,
    });
    let Some(data) = data else { return false };
    [InfoVxlan::CollectMetadata(true), InfoVxlan::Learning(false), InfoVxlan::Port(port)]
        .iter()
        .all(|wanted| data.contains(wanted))
}

pub(super) fn get(connection: &mut Connection, name: &str) -> Result<Option<Link>> {
    Ok(get_with_message(connection, name)?.map(|(link, _)| link))
}

fn get_with_message(connection: &mut Connection, name: &str) -> Result<Option<(Link, LinkMessage)>> {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    match connection.get("looking for a device", RouteNetlinkMessage::GetLink(message))? {
        Some(RouteNetlinkMessage::NewLink(message)) => Ok(Some((Link::from(&message), message))),
        _ => Ok(None),
    }
}

pub(super) fn raise(index: u32) -> Request {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    Request::new("raising a device", RouteNetlinkMessage::SetLink(message))
}

pub(super) fn new_address(device_ifindex: u32, address: IpNet) -> Request {
    let mut message = AddressMessage::default();
    message.header.index = device_ifindex;
    message.header.prefix_len = address.prefix_len();
    message.header.family = family_of(address.addr());
    message.attributes =
        vec![AddressAttribute::Local(address.addr()), AddressAttribute::Address(address.addr())];
    if address.addr().is_ipv6() {
        // Without a route to itself: it would only shadow what is meant.
        let own_route =
            if address.prefix_len() == 128 { AddressFlags::Noprefixroute } else { AddressFlags::empty() };
        message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad | own_route));
    }
    Request::new(format!("adding address {address}"), RouteNetlinkMessage::NewAddress(message))
}

pub(super) fn address_of(message: &AddressMessage) -> Option<IpAddr> {
    // IPv4 has the own address in Local; IPv6 has it in Address alone.
    let local = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    local.or_else(|| {
        message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        })
    })
}

pub(super) fn family_of(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

impl From<&LinkMessage> for Link {
    fn from(message: &LinkMessage) -> Self {
        let mut link = Self {
            name: String::new(),
            index: message.header.index,
            mac: MacAddress::default(),
            mtu: 0,
            is_up: message.header.flags.contains(LinkFlags::Up),
            is_operational: false,
            kind: String::new(),
            lower: 0,
        };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::Link(lower) => link.lower = *lower,
                LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
                LinkAttribute::OperState(state) => link.is_operational = *state == State::Up,
                LinkAttribute::Address(bytes) => {
                    if let Ok(bytes) = <[u8; 6]>::try_from(bytes.as_slice()) {
                        link.mac = MacAddress(bytes);
                    }
                }
                LinkAttribute::LinkInfo(infos) => {
                    for info in infos {
                        if let LinkInfo::Kind(kind) = info {
                            link.kind = kind.to_string();
                        }
                    }
                }
                _ => {}
            }
        }
        link
    }
}
