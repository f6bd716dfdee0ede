//! What the raw record can tell of a filter: nothing is named for what does not pass.

use std::net::IpAddr;

use ipnet::IpNet;

use super::any;
use crate::datapath::types::event_flags;
use crate::flow::{Direction, Event, L4Protocol};
use crate::hubble::proto::flow::{IpVersion, Verdict};

/// The conditions of one filter that a record decides.
#[derive(Default)]
pub struct Raw {
    pub(super) source_ip: Vec<IpNet>,
    pub(super) destination_ip: Vec<IpNet>,
    pub(super) source_port: Vec<u16>,
    pub(super) destination_port: Vec<u16>,
    pub(super) source_identity: Vec<u32>,
    pub(super) destination_identity: Vec<u32>,
    pub(super) verdict: Vec<i32>,
    pub(super) drop_reason: Vec<i32>,
    pub(super) direction: Vec<i32>,
    pub(super) reply: Vec<bool>,
    pub(super) protocol: Vec<Protocol>,
    pub(super) ip_version: Vec<i32>,
    pub(super) weir_event: Vec<i32>,
    /// No record matches: it asks for what records of packets do not have.
    pub(super) is_never: bool,
}

/// What `protocol` may name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    Icmp,
    IcmpV4,
    IcmpV6,
    Tcp,
    Udp,
    Sctp,
    Vrrp,
    Igmp,
    Dns,
    Http,
}

/// One side of a packet.
struct Side {
    ip: IpAddr,
    port: u16,
    identity: u32,
}

impl Raw {
    /// False if no flow of this record can match.
    pub fn may_match(&self, event: &Event) -> bool {
        !self.is_never && self.matches_facts(event) && self.may_match_sides(event)
    }

    /// False if no flow between these two can match.
    pub fn may_match_sides(&self, event: &Event) -> bool {
        let [from, to] = sides(event);
        let has_ports = L4Protocol::from(event.protocol).has_ports();
        let ip = |wanted: &[IpNet], side: &Side| any(wanted, |net| net.contains(&side.ip));
        let port = |wanted: &[u16], side: &Side| any(wanted, |port| has_ports && *port == side.port);
        let identity = |wanted: &[u32], side: &Side| any(wanted, |id| *id == side.identity);
        ip(&self.source_ip, &from)
            && ip(&self.destination_ip, &to)
            && port(&self.source_port, &from)
            && port(&self.destination_port, &to)
            && identity(&self.source_identity, &from)
            && identity(&self.destination_identity, &to)
    }

    fn matches_facts(&self, event: &Event) -> bool {
        let is_dropped = event.reason != 0;
        let direction = match Direction::from(event.direction) {
            Direction::Unknown => 0,
            Direction::Ingress => 1,
            Direction::Egress => 2,
        };
        let is_v4 = crate::flow::ip_of(event.source).is_ipv4();
        let version: i32 = if is_v4 { IpVersion::IPv4 } else { IpVersion::IPv6 }.into();
        // Whether what is let through is audited its rule's names say.
        any(&self.verdict, |wanted| (*wanted == i32::from(Verdict::Dropped)) == is_dropped)
            && any(&self.weir_event, |wanted| *wanted == i32::from(event.r#type))
            && any(&self.drop_reason, |wanted| *wanted == i32::from(event.reason))
            && any(&self.direction, |wanted| *wanted == direction)
            && any(&self.reply, |wanted| *wanted == is_reply(event))
            && any(&self.ip_version, |wanted| *wanted == version)
            && any(&self.protocol, |wanted| wanted.is_of(L4Protocol::from(event.protocol)))
    }
}

impl Protocol {
    fn is_of(self, protocol: L4Protocol) -> bool {
        match self {
            Self::Icmp => matches!(protocol, L4Protocol::IcmpV4 | L4Protocol::IcmpV6),
            Self::IcmpV4 => protocol == L4Protocol::IcmpV4,
            Self::IcmpV6 => protocol == L4Protocol::IcmpV6,
            Self::Tcp => protocol == L4Protocol::Tcp,
            Self::Udp => protocol == L4Protocol::Udp,
            Self::Sctp => protocol == L4Protocol::Sctp,
            Self::Vrrp | Self::Igmp | Self::Dns | Self::Http => false,
        }
    }
}

/// A dropped packet is no reply: its flow does not say, and then a filter takes it for none.
fn is_reply(event: &Event) -> bool {
    event.reason == 0 && u32::from(event.flags) & event_flags::EVENT_REPLY.0 != 0
}

/// The packet's sides; a record has the connection's.
fn sides(event: &Event) -> [Side; 2] {
    let side =
        |addr, port: u16, identity| Side { ip: crate::flow::ip_of(addr), port: u16::from_be(port), identity };
    let from = side(event.source, event.source_port, event.source_identity);
    let to = side(event.destination, event.destination_port, event.destination_identity);
    let is_turned = u32::from(event.flags) & event_flags::EVENT_REPLY.0 != 0;
    if is_turned { [to, from] } else { [from, to] }
}
