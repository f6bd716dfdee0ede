//! Network policy as rules on selectors, and the compiled form.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use imbl::OrdMap;
use ipnet::IpNet;
use serde::{Deserialize, Serialize, Serializer};

use super::l7::{DnsRule, L7Rules, RuleSet, RuleSetId};
use super::{IdentityId, Labels, Marks, ObjectKey, Protocol};

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

impl Requirement {
    /// The label's key.
    pub fn key(&self) -> &str {
        match self {
            Self::In(key, _) | Self::NotIn(key, _) | Self::Exists(key) | Self::DoesNotExist(key) => key,
        }
    }
}

impl Selector {
    /// Selects nothing: no label has one of no values.
    pub fn nothing() -> Self {
        Self { requirements: vec![Requirement::In(String::new(), BTreeSet::new())] }
    }
    /// The selector of these requirements; equal ones are one.
    pub fn new(mut requirements: Vec<Requirement>) -> Self {
        requirements.sort_unstable();
        requirements.dedup();
        Self { requirements }
    }

    /// True if every requirement holds for `labels`.
    pub fn matches(&self, labels: &Labels) -> bool {
        self.matches_by(|key| labels.get(key).map(String::as_str))
    }

    /// True if every requirement holds, where `value` is what a label has.
    pub fn matches_by<'a>(&self, value: impl Fn(&str) -> Option<&'a str>) -> bool {
        self.requirements.iter().all(|requirement| match requirement {
            Requirement::In(key, values) => value(key).is_some_and(|value| values.contains(value)),
            Requirement::NotIn(key, values) => value(key).is_none_or(|value| !values.contains(value)),
            Requirement::Exists(key) => value(key).is_some(),
            Requirement::DoesNotExist(key) => value(key).is_none(),
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
    /// Which of the object's specs, where it has several.
    #[serde(default, skip_serializing_if = "is_first")]
    pub spec: u16,
}

fn is_first(spec: &u16) -> bool {
    *spec == 0
}

impl PolicyRef {
    /// A policy of a kind; the key of a cluster's policy has no namespace.
    pub fn new(kind: PolicyKind, key: &ObjectKey) -> Self {
        let ObjectKey { namespace, name } = key.clone();
        Self { kind, namespace: Some(namespace).filter(|namespace| !namespace.is_empty()), name, spec: 0 }
    }

    /// A NetworkPolicy.
    pub fn network_policy(key: &ObjectKey) -> Self {
        Self::new(PolicyKind::NetworkPolicy, key)
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
    /// What its annotations ask for.
    #[serde(skip_serializing_if = "Marks::is_none")]
    pub marks: Marks,
    /// What the object's other specs say, each a policy by itself.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub others: Vec<Policy>,
    /// What could not be read of the object or is not enforced of it, for people.
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
    /// Nodes by label: their own addresses.
    Nodes(Selector),
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
    /// What of it may be said; `None`: anything. Only of a rule that allows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub l7: Option<Arc<L7Rules>>,
}

impl PolicyRule {
    /// A rule that asks for nothing inside of connections.
    pub fn new(action: Action, peers: Option<Vec<Peer>>, ports: Option<Vec<PortMatch>>) -> Self {
        Self { action, peers, ports, l7: None }
    }
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
    /// Addresses of nobody in the cluster: Cilium's CIDR rules do not speak of pods and nodes.
    Outside {
        /// Within this prefix,
        cidr: IpNet,
        /// but not within one of these.
        except: Vec<IpNet>,
    },
    /// Whom a name of Cilium's stands for.
    Entity(Entity),
    /// Nodes by label: their addresses.
    Nodes(Selector),
    /// Nodes that have one of these addresses: what became of `Nodes`.
    NodeAddresses(BTreeSet<IpNet>),
    /// The prefixes of groups, outside of the cluster.
    Groups {
        /// Which groups.
        groups: GroupSelector,
        /// But not within one of these.
        except: Vec<IpNet>,
    },
    /// Who is behind Services.
    Services(ServiceSelector),
    /// Addresses outside of the cluster that DNS named to the pod.
    Name(DnsRule),
}

/// CiliumCIDRGroups, by name or by label.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum GroupSelector {
    /// The one of this name.
    Named(Arc<str>),
    /// Those with labels.
    Labelled(Selector),
}

/// Services, by name or by label.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct ServiceSelector {
    /// `None`: of every namespace.
    pub namespace: Option<Arc<str>>,
    /// Which ones.
    pub services: ServiceName,
}

/// How Services are named.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum ServiceName {
    /// By name.
    Named(Arc<str>),
    /// By label.
    Labelled(Selector),
}

/// The names that stand for peers without labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum Entity {
    /// Whatever is outside of the cluster.
    World,
    /// Pods and nodes of the cluster.
    Cluster,
    /// This node.
    Host,
    /// The other nodes.
    RemoteNode,
    /// The API server's addresses, whoever has them.
    KubeApiServer,
    /// What Weir has none of: `init`, `health`, `unmanaged`, `ingress`, `none`.
    Nobody,
}

/// An IP protocol by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IpProtocol(pub u8);

impl IpProtocol {
    /// The protocols that have ports.
    pub const WITH_PORTS: [Self; 3] = [Self::TCP, Self::UDP, Self(132)];
    /// 6.
    pub const TCP: Self = Self(6);
    /// 17.
    pub const UDP: Self = Self(17);
    /// 1; a port of it is a message's type.
    pub const ICMP: Self = Self(1);
    /// 58; a port of it is a message's type.
    pub const ICMPV6: Self = Self(58);

    const NAMES: [(&str, u8); 12] = [
        ("TCP", 6),
        ("UDP", 17),
        ("SCTP", 132),
        ("ICMP", 1),
        ("ICMPv6", 58),
        ("IGMP", 2),
        ("IPIP", 4),
        ("IPV6", 41),
        ("GRE", 47),
        ("ESP", 50),
        ("AH", 51),
        ("VRRP", 112),
    ];

    /// The protocol that is called so, in any case.
    pub fn named(name: &str) -> Option<Self> {
        let known = Self::NAMES.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
        known.map(|(_, number)| Self(*number))
    }
}

impl From<Protocol> for IpProtocol {
    fn from(protocol: Protocol) -> Self {
        Self(protocol.number())
    }
}

impl fmt::Display for IpProtocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Self::NAMES.iter().find(|(_, number)| *number == self.0) {
            Some((name, _)) => f.write_str(name),
            None => write!(f, "protocol {}", self.0),
        }
    }
}

impl Serialize for IpProtocol {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Which ports.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct PortMatch {
    /// TCP when absent.
    pub protocol: IpProtocol,
    /// The ports of it; of ICMP the types.
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

/// The number of a compiled policy; 0 is "nothing enforced". At most 2^28 - 2.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct PolicyId(pub u32);

impl PolicyId {
    /// Has no rows and never gets any: an endpoint with this policy is closed in both directions.
    pub const CLOSED: Self = Self((1 << 28) - 1);
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

    /// What it leaves to the proxy.
    pub fn rule_sets(&self) -> impl Iterator<Item = &Arc<L7Set>> {
        self.directions().flat_map(|direction| direction.rules.values()).filter_map(|rule| rule.l7.as_ref())
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
    /// The verdicts of a class; as persistent as `peers`.
    pub rules: OrdMap<CompiledRuleKey, CompiledRule>,
    /// Some peer may get less than class 0: whoever is not known to be in it is let in by nothing.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub refuses_strangers: bool,
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

/// What of a packet the row looked at that decided: peer, protocol, port. The numbers are Hubble's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MatchType {
    /// No row decided.
    #[default]
    None = 0,
    /// The peer.
    Peer = 1,
    /// The peer and the port.
    PeerAndPort = 2,
    /// The port, whoever the peer is.
    Port = 3,
    /// Nothing: all is alike.
    All = 4,
    /// The peer and the protocol.
    PeerAndProtocol = 5,
    /// The protocol, whoever the peer is.
    Protocol = 6,
}

impl MatchType {
    /// Every one of them, by its number.
    pub const EACH: [Self; 7] = [
        Self::None,
        Self::Peer,
        Self::PeerAndPort,
        Self::Port,
        Self::All,
        Self::PeerAndProtocol,
        Self::Protocol,
    ];

    /// Hubble's word.
    pub fn word(self) -> &'static str {
        ["none", "L3-Only", "L3-L4", "L4-Only", "all", "L3-Proto", "Proto-Only"][self as usize]
    }
}

impl CompiledRuleKey {
    /// What the row looks at. Class 0 is for everyone.
    pub fn match_type(&self) -> MatchType {
        match (self.class != 0, self.protocol, self.port_prefix_length) {
            (true, None, _) => MatchType::Peer,
            (true, Some(_), 0) => MatchType::PeerAndProtocol,
            (true, Some(_), _) => MatchType::PeerAndPort,
            (false, None, _) => MatchType::All,
            (false, Some(_), 0) => MatchType::Protocol,
            (false, Some(_), _) => MatchType::Port,
        }
    }
}

/// What then happens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CompiledRule {
    /// `Allow` or `Deny`; what has no row is denied.
    pub action: Action,
    /// The policies that say so, for the flow record.
    pub origins: Origins,
    /// They would deny it, and only report that.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub is_audit: bool,
    /// By what the proxy judges what is allowed; `None`: by nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub l7: Option<Arc<L7Set>>,
}

/// Rules of layer 7 that one row of a policy leaves to the proxy. Equal ones share a number.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct L7Set {
    /// What may pass.
    pub rules: L7Rules,
    /// The policies that say so, for records.
    pub origins: Origins,
    /// Something else allows all of it: the proxy shows requests and denies none.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub visibility_only: bool,
}

impl L7Set {
    /// With its number.
    pub fn numbered(&self, id: RuleSetId) -> RuleSet {
        RuleSet {
            id,
            rules: self.rules.clone(),
            origins: self.origins.clone(),
            visibility_only: self.visibility_only,
            by_envoy: false,
        }
    }
}
