//! The xfrm interface: a device whose packets are encrypted by the IPsec policies that have its number.

use netlink_packet_route::link::{InfoData, InfoKind, InfoXfrm, LinkAttribute, LinkInfo, LinkMessage};
use netlink_packet_route::route::{RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::connection::{Connection, Request};
use super::link::{delete_link, link};
use super::tun::raise;
use super::{Error, Result, get_sysctl};

/// The kind's name in `ip link`.
const KIND: &str = "xfrm";
/// The table and the rule by which the device itself finds an IPv6 way; IPv4 needs none.
const TABLE: u8 = 77;
const PRIORITY: u32 = 77;
const STATIC_PROTOCOL: u8 = 4;

/// Makes the device with this number, if there is none, and sets it up; its index, or `None` on a kernel
/// without such devices.
pub fn ensure_xfrm_device(name: &str, mtu: u32, number: u32) -> Result<Option<u32>> {
    if let Some(there) = link(name)?
        && there.kind != KIND
    {
        delete_link(name)?;
    }
    if link(name)?.is_none() && !make(name, number)? {
        return Ok(None);
    }
    let found = link(name)?.ok_or_else(|| Error::Different(format!("device {name} went away")))?;
    raise(name, &found, mtu)?;
    put_xfrm_ways(name, found.index)?;
    Ok(Some(found.index))
}

/// Adds the IPv6 route and rule that the device finds its way by: the kernel removes the route whenever the
/// device goes down.
pub fn put_xfrm_ways(name: &str, ifindex: u32) -> Result<()> {
    if get_sysctl("net/ipv6/conf/all/forwarding")?.is_none() {
        return Ok(());
    }
    Connection::open()?.execute(vec![ipv6_route(ifindex), ipv6_rule(name)])
}

/// Removes the rule; the route goes with the device.
pub fn remove_xfrm_ways(name: &str) -> Result<()> {
    if get_sysctl("net/ipv6/conf/all/forwarding")?.is_none() {
        return Ok(());
    }
    let message = RouteNetlinkMessage::DelRule(rule_message(name));
    let request = Request::new("removing the IPv6 rule of the IPsec device", message).tolerate(&[
        libc::ENOENT,
        libc::ESRCH,
        libc::EAFNOSUPPORT,
    ]);
    Connection::open()?.execute(vec![request])
}

/// True if there is a device of this name now; false if the kernel has no such devices.
fn make(name: &str, number: u32) -> Result<bool> {
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Xfrm),
            LinkInfo::Data(InfoData::Xfrm(vec![InfoXfrm::IfId(number)])),
        ]),
    ];
    let request =
        Request::new(format!("making IPsec device {name}"), RouteNetlinkMessage::NewLink(message)).create();
    match Connection::open()?.execute(vec![request]) {
        Ok(()) => Ok(true),
        Err(Error::Kernel { cause, .. })
            if matches!(cause.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENODEV)) =>
        {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// What the device itself looks for goes by the device.
fn ipv6_route(ifindex: u32) -> Request {
    let mut message = RouteMessage::default();
    message.header.address_family = AddressFamily::Inet6;
    message.header.table = TABLE;
    message.header.protocol = RouteProtocol::from(STATIC_PROTOCOL);
    message.header.kind = RouteType::Unicast;
    message.header.scope = RouteScope::Universe;
    message.attributes.push(RouteAttribute::Oif(ifindex));
    Request::new("adding the IPv6 route of the IPsec device", RouteNetlinkMessage::NewRoute(message))
        .replace()
}

fn rule_message(name: &str) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = AddressFamily::Inet6;
    message.header.table = TABLE;
    message.header.action = RuleAction::ToTable;
    message.attributes = vec![RuleAttribute::Oifname(name.to_owned()), RuleAttribute::Priority(PRIORITY)];
    message
}

fn ipv6_rule(name: &str) -> Request {
    Request::new("adding the IPv6 rule of the IPsec device", RouteNetlinkMessage::NewRule(rule_message(name)))
        .create()
        .tolerate(&[libc::EEXIST])
}
