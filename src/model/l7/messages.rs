//! What the agent and the proxy say to each other: one JSON object a line.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use super::{Record, RuleSet, RuleSetId};
use crate::model::{EndpointId, IdentityId, Protocol};

/// The longest line in either direction, in bytes.
pub const MESSAGE_MAX: usize = 16 << 20;

/// The first message of a connection; the descriptors come with its first byte (SCM_RIGHTS), in the order of
/// `descriptors`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// What each descriptor is.
    pub descriptors: Vec<Descriptor>,
    /// Answer a DNS question that no rule allows with NXDOMAIN instead of REFUSED.
    #[serde(default)]
    pub deny_with_nxdomain: bool,
}

/// What a descriptor is that the agent hands over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Descriptor {
    /// A TCP listener with IP_TRANSPARENT; connections of any port arrive there.
    TcpListener,
    /// A UDP socket with IP_TRANSPARENT for DNS.
    UdpSocket,
    /// The map that says who judges a flow.
    FlowsMap,
}

/// From the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToProxy {
    /// Rule sets that are new, and those that nobody needs any more; answered by `Ack`.
    RuleSets {
        /// New ones.
        #[serde(default)]
        set: Vec<RuleSet>,
        /// No longer needed.
        #[serde(default)]
        remove: Vec<RuleSetId>,
        /// Forget all that are not in `set`: the first message of a connection says so.
        #[serde(default)]
        replace: bool,
        /// The number that the acknowledgement has.
        seq: u64,
    },
    /// The addresses of the `Names` message with this number are in the maps.
    NamesAck(u64),
    /// Accept nothing more, and end when the connections have ended.
    Drain {
        /// After this time they are cut off.
        within_s: u64,
    },
}

/// From the proxy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromProxy {
    /// The rule sets of this number are in force in the proxy.
    Ack(u64),
    /// Rule sets that could not be compiled, and why; what they judge is denied.
    Refused {
        /// Which rule set.
        id: RuleSetId,
        /// Why.
        why: String,
    },
    /// What was seen.
    Records {
        /// In the order in which it was seen.
        records: Vec<Record>,
        /// How many were lost since the last message.
        #[serde(default)]
        lost: u64,
    },
    /// The addresses of a name, before the client has the answer; answered by `NamesAck`.
    Names(Names),
    /// How the proxy is, every few seconds.
    State(ProxyState),
}

/// How the proxy is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProxyState {
    /// Connections and flows of DNS in its hands.
    pub connections: u64,
    /// Those that it refused since the last message because there were too many.
    pub refused: u64,
    /// Its memory.
    pub resident_bytes: u64,
}

/// What a DNS answer said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Names {
    /// The rule set that allowed the question.
    pub set: RuleSetId,
    /// The client's endpoint, where it is of this node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<EndpointId>,
    /// The name that was asked for, in lower case and without the last dot.
    pub name: String,
    /// Its addresses, behind any CNAME.
    pub addresses: Vec<IpAddr>,
    /// The shortest TTL on the way to them.
    pub ttl_s: u32,
    /// The number that the acknowledgement has.
    pub seq: u64,
}

/// Who judges a flow, and whose it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Judges {
    /// The rule set of the client's pod, on its way out.
    pub egress: Option<RuleSetId>,
    /// The rule set of the server's pod, on its way in.
    pub ingress: Option<RuleSetId>,
    /// Who the client is.
    pub source: IdentityId,
    /// Who the server is.
    pub destination: IdentityId,
    /// The client's endpoint, where it is of this node.
    pub source_endpoint: Option<EndpointId>,
    /// The server's endpoint, where it is of this node.
    pub destination_endpoint: Option<EndpointId>,
}

impl Judges {
    /// The rule sets that must all allow a message.
    pub fn rule_sets(&self) -> impl Iterator<Item = RuleSetId> + use<> {
        self.egress.into_iter().chain(self.ingress)
    }
}

/// Says who judges a flow.
pub trait Lookup: Send + Sync {
    /// The judges of a flow; `None`: nobody knows the flow, and it must be closed.
    fn of(&self, client: SocketAddr, server: SocketAddr, protocol: Protocol) -> Option<Judges>;
}
