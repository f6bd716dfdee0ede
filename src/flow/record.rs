//! A flow as readers see it: names and enum values are those of Hubble's API where it has them.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::datapath::types::direction;
use crate::model::{EndpointId, IdentityId, Origins};

use super::DropReason;

/// One record: a connection that began, changed, went on or ended, or a dropped packet.
///
/// Source is who began the connection, whoever sent the packet that caused the
/// record; for a dropped packet without a connection it is the packet's sender.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    #[serde(default, skip_serializing_if = "Option::is_none")]
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
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<FlowService>,
    /// Of the dropped packet; else every flag that the connection had so far.
    #[serde(default, skip_serializing_if = "TcpFlags::is_empty")]
    pub tcp_flags: TcpFlags,
    /// Of the packet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub icmp: Option<Icmp>,
    /// The policies whose rules decided: in the direction of the flow, or at its destination. Empty: no rule did.
    #[serde(default, skip_serializing_if = "is_empty")]
    pub policies: Origins,
    /// The policies whose rules let it out at its source.
    #[serde(default, skip_serializing_if = "is_empty")]
    pub egress_allowed_by: Origins,
    /// The policies whose rules let it in at its destination.
    #[serde(default, skip_serializing_if = "is_empty")]
    pub ingress_allowed_by: Origins,
    /// Packets so far.
    pub packets: Counts,
    /// Bytes so far.
    pub bytes: Counts,
    /// The interface where it was seen; 0: not known.
    pub ifindex: u32,
}

fn is_empty(origins: &Origins) -> bool {
    origins.is_empty()
}

/// One side of a flow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Party {
    /// Its address.
    pub ip: IpAddr,
    /// 0 for protocols without ports.
    pub port: u16,
    /// As policy saw it.
    pub identity: IdentityId,
    /// Number of the endpoint, when on the node that saw the flow.
    #[serde(rename = "ID", default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<EndpointId>,
    /// The pod's namespace; empty when it is not a pod.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub namespace: Arc<str>,
    /// The pod's name; empty when not known.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub pod_name: Arc<str>,
    /// The identity's labels, each with its source: `k8s:app=web`, `reserved:world`, `cidr:10.0.0.0/8`.
    pub labels: Arc<[Arc<str>]>,
}

/// The service address that a flow used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowService {
    /// The cluster IP.
    pub ip: IpAddr,
    /// The frontend's port.
    pub port: u16,
    /// Empty when the Service is not known any more.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub namespace: Arc<str>,
    /// Empty when the Service is not known any more.
    #[serde(default, skip_serializing_if = "str::is_empty")]
    pub name: Arc<str>,
}

/// A number for each side of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Sent by the source.
    pub source: u64,
    /// Sent by the destination.
    pub destination: u64,
}

/// ICMP's type and code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Icmp {
    /// Type.
    pub r#type: u8,
    /// Code.
    pub code: u8,
}

/// Defines an enum with a fixed set of names, which are its text, JSON and command line form.
macro_rules! named {
    ($(#[$doc:meta])* $name:ident, $what:literal { $($(#[$variant_doc:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum $name {
            $($(#[$variant_doc])* #[serde(rename = $text)] $variant,)*
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$variant => $text,)* })
            }
        }

        impl FromStr for $name {
            type Err = String;

            /// The name, in any case.
            fn from_str(text: &str) -> Result<Self, String> {
                $(if text.eq_ignore_ascii_case($text) { return Ok(Self::$variant); })*
                Err(format!(concat!("unknown ", $what, "; known are {}"), [$($text),*].join(", ")))
            }
        }
    };
}

named! {
    /// What became of a flow.
    Verdict, "verdict" {
        /// Delivered.
        Forwarded = "FORWARDED",
        /// Dropped; `drop_reason_desc` says why.
        Dropped = "DROPPED",
    }
}

named! {
    /// Which way, seen from the pod.
    Direction, "direction" {
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
    EventType, "event type" {
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

impl FromStr for L4Protocol {
    type Err = String;

    /// A name in any case, or a number.
    fn from_str(text: &str) -> Result<Self, String> {
        match text.to_ascii_lowercase().as_str() {
            "tcp" => Ok(Self::Tcp),
            "udp" => Ok(Self::Udp),
            "sctp" => Ok(Self::Sctp),
            "icmp" | "icmpv4" => Ok(Self::IcmpV4),
            "icmpv6" => Ok(Self::IcmpV6),
            number => number
                .parse::<u8>()
                .map(Self::from)
                .map_err(|_| "not tcp, udp, sctp, icmpv4, icmpv6 or a protocol number".to_owned()),
        }
    }
}

impl Serialize for L4Protocol {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for L4Protocol {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

/// The flags byte of a TCP header; a list of names in JSON.
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

    /// No flag.
    pub fn is_empty(&self) -> bool {
        self.0 == 0
    }

    /// The names of the flags that are set.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        Self::NAMES.into_iter().filter(move |(bit, _)| self.0 & bit != 0).map(|(_, name)| name)
    }
}

impl Serialize for TcpFlags {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.names())
    }
}

impl<'de> Deserialize<'de> for TcpFlags {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let names = Vec::<String>::deserialize(deserializer)?;
        let bit = |name: &String| Self::NAMES.iter().find(|(_, known)| known == name).map(|(bit, _)| *bit);
        names.iter().try_fold(Self(0), |flags, name| {
            bit(name)
                .map(|bit| Self(flags.0 | bit))
                .ok_or_else(|| de::Error::custom(format!("unknown TCP flag {name}")))
        })
    }
}
