//! A record with its names: what `hubble::convert` makes the flow of Hubble's API from.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;

use crate::datapath::types::direction;
use crate::model::{EndpointId, IdentityId, MatchType, Origins, Workload};

use super::DropReason;

/// One record: a connection that began, changed, went on or ended, or a dropped packet.
///
/// Source is who began the connection, whoever sent the packet that caused the
/// record; for a dropped packet without a connection it is the packet's sender.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    /// When.
    pub time: Timestamp,
    /// The node that saw it.
    pub node_name: Arc<str>,
    /// What happened.
    pub event_type: EventType,
    /// What became of it.
    pub verdict: Verdict,
    /// Why it was dropped.
    pub drop_reason_desc: Option<DropReason>,
    /// Seen from the pod whose policy judged.
    pub traffic_direction: Direction,
    /// The packet that caused the record came from the destination.
    pub is_reply: bool,
    /// L4 protocol.
    pub protocol: L4Protocol,
    /// Who began it.
    pub source: Party,
    /// Whom it reached: the backend, where a service was used.
    pub destination: Party,
    /// The service address that the source used.
    pub service: Option<FlowService>,
    /// Of the dropped packet; else every flag that the connection had so far.
    pub tcp_flags: TcpFlags,
    /// Of the packet.
    pub icmp: Option<Icmp>,
    /// The policies whose rules decided: in the direction of the flow, or at its destination. Empty: no rule did.
    pub policies: Origins,
    /// What the rule looked at that decided.
    pub policy_match: MatchType,
    /// The policies whose rules let it out at its source.
    pub egress_allowed_by: Origins,
    /// The policies whose rules let it in at its destination.
    pub ingress_allowed_by: Origins,
    /// The policies at its source that would have denied it, and only report that.
    pub egress_audited_by: Origins,
    /// The policies at its destination that would have denied it, and only report that.
    pub ingress_audited_by: Origins,
    /// Packets so far.
    pub packets: Counts,
    /// Bytes so far.
    pub bytes: Counts,
    /// The interface where it was seen; 0: not known.
    pub ifindex: u32,
    /// From the SYN of a TCP connection to its answer, seen here.
    pub round_trip: Option<Duration>,
}

/// One side of a flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Party {
    /// Its address.
    pub ip: IpAddr,
    /// 0 for protocols without ports.
    pub port: u16,
    /// As policy saw it.
    pub identity: IdentityId,
    /// Number of the endpoint, when on the node that saw the flow.
    pub endpoint: Option<EndpointId>,
    /// The pod's namespace; empty when it is not a pod.
    pub namespace: Arc<str>,
    /// The pod's name; empty when not known.
    pub pod_name: Arc<str>,
    /// What made the pod, where its node says so.
    pub workload: Option<Workload>,
    /// The identity's labels, each with its source: `k8s:app=web`, `reserved:world`, `cidr:10.0.0.0/8`.
    pub labels: Arc<[Arc<str>]>,
}

/// The service address that a flow used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlowService {
    /// The cluster IP.
    pub ip: IpAddr,
    /// The frontend's port.
    pub port: u16,
    /// Empty when the Service is not known any more.
    pub namespace: Arc<str>,
    /// Empty when the Service is not known any more.
    pub name: Arc<str>,
}

/// A number for each side of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Sent by the source.
    pub source: u64,
    /// Sent by the destination.
    pub destination: u64,
}

/// ICMP's type and code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Icmp {
    /// Type.
    pub r#type: u8,
    /// Code.
    pub code: u8,
}

/// Defines an enum with a fixed set of names, which are its text.
macro_rules! named {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name {
            $($(#[$variant_doc])* $variant,)*
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$variant => $text,)* })
            }
        }
    };
}

named! {
    /// What became of a flow.
    Verdict {
        /// Delivered.
        Forwarded = "FORWARDED",
        /// Delivered, although policies deny it: they only report that.
        Audit = "AUDIT",
        /// Dropped; `drop_reason_desc` says why.
        Dropped = "DROPPED",
    }
}

named! {
    /// Which way, seen from the pod.
    Direction {
        /// Neither of the node's pods: seen at a network device.
        Unknown = "TRAFFIC_DIRECTION_UNKNOWN",
        /// Into the pod.
        Ingress = "INGRESS",
        /// Out of the pod.
        Egress = "EGRESS",
    }
}

impl From<u8> for Direction {
    /// From `enum direction`.
    fn from(number: u8) -> Self {
        match direction(u32::from(number)) {
            direction::DIRECTION_INGRESS => Self::Ingress,
            direction::DIRECTION_EGRESS => Self::Egress,
            _ => Self::Unknown,
        }
    }
}

named! {
    /// What a record tells.
    EventType {
        /// A connection's first packet.
        New = "NEW",
        /// New TCP flags, a new verdict, or some seconds passed.
        Update = "UPDATE",
        /// Closed, reset or idle for too long.
        End = "END",
        /// A packet was dropped.
        Drop = "DROP",
    }
}

/// An L4 protocol, by number and family: ICMP has two names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum L4Protocol {
    /// 6
    Tcp,
    /// 17
    Udp,
    /// 132
    Sctp,
    /// 1
    IcmpV4,
    /// 58
    IcmpV6,
    /// Any other, by its number.
    Other(u8),
}

impl L4Protocol {
    /// The number in the IP header.
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
            Self::IcmpV4 => 1,
            Self::IcmpV6 => 58,
            Self::Other(number) => number,
        }
    }

    /// False where the ports of a record are something else: ICMP's identifier.
    pub fn has_ports(self) -> bool {
        matches!(self, Self::Tcp | Self::Udp | Self::Sctp)
    }
}

impl From<u8> for L4Protocol {
    fn from(number: u8) -> Self {
        match number {
            6 => Self::Tcp,
            17 => Self::Udp,
            132 => Self::Sctp,
            1 => Self::IcmpV4,
            58 => Self::IcmpV6,
            number => Self::Other(number),
        }
    }
}

impl fmt::Display for L4Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp => f.write_str("TCP"),
            Self::Udp => f.write_str("UDP"),
            Self::Sctp => f.write_str("SCTP"),
            Self::IcmpV4 => f.write_str("ICMPv4"),
            Self::IcmpV6 => f.write_str("ICMPv6"),
            Self::Other(number) => write!(f, "{number}"),
        }
    }
}

/// The flags byte of a TCP header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpFlags(pub u8);

impl TcpFlags {
    /// In the order in which people write them, not that of the bits.
    const NAMES: [(u8, &'static str); 8] = [
        (0x02, "SYN"),
        (0x10, "ACK"),
        (0x08, "PSH"),
        (0x01, "FIN"),
        (0x04, "RST"),
        (0x20, "URG"),
        (0x40, "ECE"),
        (0x80, "CWR"),
    ];

    /// The names of the flags that are set.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        Self::NAMES.into_iter().filter(move |(bit, _)| self.0 & bit != 0).map(|(_, name)| name)
    }
}
