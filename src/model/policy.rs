//! Network policy as rules on selectors, and the compiled form.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use imbl::OrdMap;
use ipnet::IpNet;
use serde::{Deserialize, Serialize, Serializer};

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

/// The kinds of objects that are policies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum PolicyKind {
    /// networking.k8s.io/v1
    NetworkPolicy,
    /// cilium.io/v2
    CiliumNetworkPolicy,
    /// cilium.io/v2, of the cluster
    CiliumClusterwideNetworkPolicy,
    /// policy.networking.k8s.io/v1alpha2, of the cluster
    ClusterNetworkPolicy,
}

impl PolicyKind {
    /// `kind` of the object.
    pub fn name(self) -> &'static str {
        match self {
            Self::NetworkPolicy => "NetworkPolicy",
            Self::CiliumNetworkPolicy => "CiliumNetworkPolicy",
            Self::CiliumClusterwideNetworkPolicy => "CiliumClusterwideNetworkPolicy",
            Self::ClusterNetworkPolicy => "ClusterNetworkPolicy",
        }
    }
}

/// Which policy: two kinds may use one name. Shown as `KIND NAMESPACE/NAME`, or `KIND NAME`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PolicyRef {
    /// The object's kind.
    pub kind: PolicyKind,
    /// `None`: it is the cluster's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<Arc<str>>,
    /// The object's name.
    pub name: Arc<str>,
}

impl PolicyRef {
    /// A NetworkPolicy.
    pub fn network_policy(key: &ObjectKey) -> Self {
        let ObjectKey { namespace, name } = key.clone();
        Self { kind: PolicyKind::NetworkPolicy, namespace: Some(namespace), name }
    }
}

impl fmt::Display for PolicyRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.namespace {
            Some(namespace) => write!(f, "{} {namespace}/{}", self.kind.name(), self.name),
            None => write!(f, "{} {}", self.kind.name(), self.name),
        }
    }
}

/// The policies that say the same, sorted; empty where no policy says it.
pub type Origins = Arc<[PolicyRef]>;

/// A policy of any kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Policy {
    /// Which object.
    pub reference: PolicyRef,
    /// Whom it applies to.
    pub subject: Subject,
    /// Which policies it is weighed with.
    pub tier: Tier,
    /// Within an ordered tier the lower one counts first; 0 in the other.
    pub priority: u32,
    /// What it says of what comes in; `None`: nothing.
    pub ingress: Option<PolicyDirection>,
    /// What it says of what goes out; `None`: nothing.
    pub egress: Option<PolicyDirection>,
    /// What could not be read of the object, for people.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub doubts: Vec<String>,
}

/// Policies are weighed tier by tier, the first tier that decides ends it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum Tier {
    /// The cluster's administrators. By priority, then in the order of the rules, the first match decides.
    Admin,
    /// NetworkPolicy and Cilium's kinds. Their rules have no order: a deny counts before every allow.
    Namespaced,
    /// What holds where nobody has said anything; as Admin.
    Baseline,
}

impl Tier {
    /// Rules of one policy are weighed one after the other, not all at once.
    pub fn is_ordered(self) -> bool {
        self != Self::Namespaced
    }
}

/// Whom a policy applies to. The policy of a namespace applies to that namespace only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum Subject {
    /// Pods by label.
    Pods {
        /// Asked of the namespace's labels.
        namespaces: Selector,
        /// Asked of the pod's labels.
        pods: Selector,
    },
}

/// What a policy says of one direction.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct PolicyDirection {
    /// Of what no rule matches: `Deny` isolates, `Pass` says nothing.
    pub default: Action,
    /// Its rules.
    pub rules: Vec<PolicyRule>,
}

/// What a rule does with what it matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Action {
    /// Drops it.
    Deny,
    /// Leaves it to the next tier.
    Pass,
    /// Lets it through.
    Allow,
}

/// A rule of a policy.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct PolicyRule {
    /// What to do.
    pub action: Action,
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
        /// `None`: only the policy's own namespace, or any where it has none.
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
    /// `Allow` or `Deny`; what has no row is denied.
    pub action: Action,
    /// The policies that say so, for the flow record.
    pub origins: Origins,
}
