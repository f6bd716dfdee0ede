//! Network policy as rules on selectors, and the compiled form.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use imbl::OrdMap;
use ipnet::IpNet;
use serde::{Serialize, Serializer};

use super::{IdentityId, Labels, ObjectKey, Protocol};

/// A label selector: every requirement must hold; none selects everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Selector {
    /// matchLabels (as `In` one value) and matchExpressions.
    pub requirements: Vec<Requirement>,
}

/// One line of a selector.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum Requirement {
    /// The label is there and has one of the values.
    In(String, BTreeSet<String>),
    /// The label is absent or has none of the values.
    NotIn(String, BTreeSet<String>),
    /// The label is there.
    Exists(String),
    /// The label is absent.
    DoesNotExist(String),
}

impl Selector {
    /// The selector of these requirements; equal ones are one.
    pub fn new(mut requirements: Vec<Requirement>) -> Self {
        requirements.sort_unstable();
        requirements.dedup();
        Self { requirements }
    }

    /// True if every requirement holds for `labels`.
    pub fn matches(&self, labels: &Labels) -> bool {
        self.requirements.iter().all(|requirement| match requirement {
            Requirement::In(key, values) => labels.get(key).is_some_and(|value| values.contains(value)),
            Requirement::NotIn(key, values) => labels.get(key).is_none_or(|value| !values.contains(value)),
            Requirement::Exists(key) => labels.contains_key(key),
            Requirement::DoesNotExist(key) => !labels.contains_key(key),
        })
    }
}

/// networking.k8s.io/v1 NetworkPolicy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NetworkPolicy {
    /// Namespace and name.
    pub key: ObjectKey,
    /// Which pods of the namespace it applies to.
    pub pod_selector: Selector,
    /// `None`: policyTypes does not name Ingress. Empty: nothing may come in.
    pub ingress: Option<Vec<PolicyRule>>,
    /// `None`: policyTypes does not name Egress. Empty: nothing may go out.
    pub egress: Option<Vec<PolicyRule>>,
}

/// One entry of `ingress` or `egress`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct PolicyRule {
    /// `None`: everyone (`from`/`to` empty or absent).
    pub peers: Option<Vec<Peer>>,
    /// `None`: every port of every protocol.
    pub ports: Option<Vec<PortMatch>>,
}

/// Who may talk.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum Peer {
    /// Pods by label.
    Pods {
        /// `None`: only the policy's own namespace.
        namespaces: Option<Selector>,
        /// An absent podSelector is the empty one: all pods.
        pods: Selector,
    },
    /// Addresses, pods' included.
    Block {
        /// `ipBlock.cidr`.
        cidr: IpNet,
        /// `ipBlock.except`, each within `cidr`.
        except: Vec<IpNet>,
    },
}

/// Which ports.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct PortMatch {
    /// TCP when absent.
    pub protocol: Protocol,
    /// The ports of it.
    pub port: PortSelector,
}

/// The ports of a protocol.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum PortSelector {
    /// All of them.
    Any,
    /// From, to; both included; a single port is a range of one.
    Range(u16, u16),
    /// A name, resolved in the destination pod.
    Named(String),
}

/// The number of a compiled policy; 0 is "nothing enforced". At most 2^30 - 2.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct PolicyId(pub u32);

impl PolicyId {
    /// Has no rows and never gets any: an endpoint with this policy is closed in both directions.
    pub const CLOSED: Self = Self((1 << 30) - 1);
}

/// The rows of one policy, as they stand in the maps.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CompiledPolicy {
    /// `None`: ingress is not enforced.
    pub ingress: Option<CompiledDirection>,
    /// `None`: egress is not enforced.
    pub egress: Option<CompiledDirection>,
}

impl CompiledPolicy {
    /// How many rows of `policy_rules` it is.
    pub fn rule_rows(&self) -> usize {
        self.directions().map(|direction| direction.rules.len()).sum()
    }

    /// How many rows of `policy_peers` it is.
    pub fn peer_rows(&self) -> usize {
        self.directions().map(|direction| direction.peers.len()).sum()
    }

    fn directions(&self) -> impl Iterator<Item = &CompiledDirection> {
        self.ingress.iter().chain(&self.egress)
    }
}

/// One direction of a compiled policy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CompiledDirection {
    /// Identity -> class; what is not here is class 0. A persistent map: two versions of
    /// a policy share what is equal, and `diff` costs as much as they differ.
    pub peers: OrdMap<IdentityId, u32>,
    /// The verdicts of a class.
    pub rules: BTreeMap<CompiledRuleKey, CompiledRule>,
}

/// What a packet must have to meet a rule. Shown as `class/protocol/port/prefix length`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CompiledRuleKey {
    /// The peer's class.
    pub class: u32,
    /// IP protocol number; `None`: any, ICMP and unknown ones included.
    pub protocol: Option<u8>,
    /// The port, of which `port_prefix_length` bits count.
    pub port: u16,
    /// 0 (any port) to 16 (exactly one).
    pub port_prefix_length: u8,
}

impl fmt::Display for CompiledRuleKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.protocol {
            Some(protocol) => {
                write!(f, "{}/{protocol}/{}/{}", self.class, self.port, self.port_prefix_length)
            }
            None => write!(f, "{}/any", self.class),
        }
    }
}

/// As a string: a key of a JSON object.
impl Serialize for CompiledRuleKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// What then happens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CompiledRule {
    /// Allowed or denied.
    pub is_allowed: bool,
    /// The policy that says so, for the flow record.
    pub origin: Arc<ObjectKey>,
}
