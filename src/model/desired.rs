//! What the maps should hold: the output of the compilers, the input of `datapath`.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::Serialize;

use super::l7::DnsRule;
use super::{Endpoint, IdentityId, PolicyId};

/// Who has an address, before prefixes of rules are considered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BaseAddress {
    /// A cluster identity or a reserved one, never a local number.
    pub identity: IdentityId,
    /// Underlay address of the node that has it; `None` on this node.
    pub node: Option<IpAddr>,
    /// Set for pods of this node.
    pub endpoint: Option<super::EndpointId>,
    /// What kind of address it is.
    pub kind: AddressKind,
}

/// What a local number stands for. It never changes; another set is another number.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct LocalIdentity {
    /// The pod's or node's own identity; `None` for addresses of nobody known.
    pub base: Option<IdentityId>,
    /// Every prefix of a rule that covers the address, sorted.
    pub prefixes: Arc<[IpNet]>,
    /// The rules that name the address by a name of DNS, sorted; only of an address that nobody of the cluster has.
    #[serde(skip_serializing_if = "has_none")]
    pub names: Arc<[DnsRule]>,
}

fn has_none(names: &Arc<[DnsRule]>) -> bool {
    names.is_empty()
}

/// A row of `addresses`: who has exactly this address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AddressEntry {
    /// What policy sees; a local number where prefixes of rules cover the address.
    pub identity: IdentityId,
    /// Underlay address of the node that has it; `None` on this node.
    pub node: Option<IpAddr>,
    /// Set for pods of this node.
    pub endpoint: Option<super::EndpointId>,
    /// What kind of address it is.
    pub kind: AddressKind,
}

/// Whose address it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum AddressKind {
    /// A pod's.
    Pod,
    /// A node's, on the underlay.
    Node,
    /// A node's, in the pod network: reached by tunnel when there is one.
    NodeInternal,
}

/// A row of `prefixes`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PrefixEntry {
    /// What an address without a row of its own in `addresses` is.
    pub identity: IdentityId,
    /// Within a pod CIDR of the cluster.
    pub is_pod_cidr: bool,
    /// Underlay address of the node that has this pod CIDR; `None` on this node.
    pub node: Option<IpAddr>,
    /// What pods send there passes the node's netfilter.
    pub is_guarded: bool,
    /// One address, which an answer of DNS named. Without the row less is allowed, and nothing else.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub is_learned: bool,
}

/// A row of `endpoints`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EndpointEntry {
    /// The pod's attachment.
    pub endpoint: Arc<Endpoint>,
    /// Its cluster identity.
    pub identity: IdentityId,
    /// The policy in force.
    pub policy: PolicyId,
    /// That policy has rules for what comes in.
    pub enforces_ingress: bool,
    /// That policy has rules for what goes out.
    pub enforces_egress: bool,
    /// Some peer may get less by it than one of whom nothing is known.
    pub refuses_strangers: bool,
    /// The pod is told what is denied of what it sends.
    pub rejects: bool,
    /// Some of what it sends out of the cluster leaves by a gateway, or not at all.
    pub has_gateway: bool,
    /// How its packets queue.
    pub shaping: Shaping,
}

/// How a pod's packets queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Shaping {
    /// What it receives has a limit.
    pub is_limited: bool,
    /// `skb->priority` of what it sends out of the node.
    pub priority: u8,
}
