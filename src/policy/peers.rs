//! Peers of rules, each kept once, with the identities that it matches.
//!
//! Policies share peers ("all pods of this namespace"), and a new identity has to be
//! held against each distinct peer once, not against each policy.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use ipnet::IpNet;

use crate::identity::LabelFilter;
use crate::model::l7::DnsRule;
use crate::model::{Entity, IdentityId, IdentityLabels, IpProtocol, Peer, Requirement, Selector};

/// What a rule asks of the other side.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum PeerKey {
    /// Pods by label.
    Pods {
        /// Only this namespace.
        namespace: Option<Arc<str>>,
        /// Asked of the namespace's labels.
        namespaces: Selector,
        /// Asked of the pod's labels.
        pods: Selector,
    },
    /// Addresses, whoever has them.
    Block {
        /// Within this prefix,
        cidr: IpNet,
        /// but not within one of these.
        except: Vec<IpNet>,
    },
    /// The same, but only of who is not in the cluster.
    Outside {
        /// Within this prefix,
        cidr: IpNet,
        /// but not within one of these.
        except: Vec<IpNet>,
    },
    /// Whom a name stands for.
    Entity(Entity),
    /// Nodes with one of these addresses.
    Nodes(BTreeSet<IpNet>),
    /// Addresses of nobody in the cluster that DNS named to a pod with this rule.
    Name(DnsRule),
    /// Pods of which it is not known whether the peer matches them.
    Doubtful(Box<PeerKey>),
    /// Pods that have a port of this name.
    Port {
        /// The name.
        name: String,
        /// Its protocol.
        protocol: IpProtocol,
    },
}

impl PeerKey {
    /// The peer of a policy in `namespace`, or of the cluster's.
    pub fn new(namespace: Option<&Arc<str>>, peer: &Peer) -> Self {
        match peer {
            Peer::Pods { namespaces: None, pods } => Self::Pods {
                namespace: namespace.cloned(),
                namespaces: Selector::default(),
                pods: pods.clone(),
            },
            Peer::Pods { namespaces: Some(namespaces), pods } => {
                Self::Pods { namespace: None, namespaces: namespaces.clone(), pods: pods.clone() }
            }
            Peer::Block { cidr, except } => {
                Self::Block { cidr: cidr.trunc(), except: except.iter().map(IpNet::trunc).collect() }
            }
            Peer::Outside { cidr, except } => {
                Self::Outside { cidr: cidr.trunc(), except: except.iter().map(IpNet::trunc).collect() }
            }
            Peer::Entity(entity) => Self::Entity(*entity),
            Peer::NodeAddresses(addresses) => Self::Nodes(addresses.clone()),
            Peer::Name(rule) => Self::Name(rule.clone()),
            // Names that nobody has resolved are nobody's.
            Peer::Nodes(_) | Peer::Groups { .. } | Peer::Services(_) => Self::Entity(Entity::Nobody),
        }
    }

    /// Of whom it may be unknown whether the peer matches them.
    pub fn doubtful(&self) -> Option<Self> {
        matches!(self, Self::Pods { .. } | Self::Port { .. }).then(|| Self::Doubtful(Box::new(self.clone())))
    }

    /// True if it means `member`.
    pub fn matches(&self, member: &Member, filter: &LabelFilter) -> bool {
        let labels = member.labels.as_deref();
        let is_within = |cidr, except: &[IpNet]| {
            member.prefixes.contains(cidr) && !except.iter().any(|hole| member.prefixes.contains(hole))
        };
        match self {
            Self::Pods { namespace, namespaces, pods } => labels.is_some_and(|labels| {
                namespace.as_deref().is_none_or(|namespace| *namespace == *labels.namespace)
                    && pods.matches_by(|key| labels.pod_label(key))
                    && namespaces.matches(&labels.namespace_labels)
                    // Whether a pod is without such a label is not known: nobody is let in for it.
                    && filter.undecidable(pods).next().is_none()
            }),
            Self::Block { cidr, except } => is_within(cidr, except),
            Self::Outside { cidr, except } => member.is_outside() && is_within(cidr, except),
            Self::Nodes(addresses) => {
                member.is_node() && member.prefixes.iter().any(|prefix| addresses.contains(prefix))
            }
            Self::Name(rule) => member.is_outside() && member.names.contains(rule),
            Self::Entity(entity) => match entity {
                Entity::World => member.is_outside(),
                Entity::Cluster | Entity::KubeApiServer => !member.is_outside() && *entity == Entity::Cluster,
                Entity::Host => member.base == Some(IdentityId::HOST),
                Entity::RemoteNode => member.base == Some(IdentityId::REMOTE_NODE),
                Entity::Nobody => false,
            },
            Self::Doubtful(peer) => match (&**peer, labels) {
                (Self::Pods { namespace, namespaces, pods }, Some(labels)) => {
                    let mut doubtful = filter.undecidable(pods).peekable();
                    let is_possible = |requirement: &Requirement| {
                        let one = Selector { requirements: vec![requirement.clone()] };
                        filter.drops(requirement.key()) || one.matches_by(|key| labels.pod_label(key))
                    };
                    doubtful.peek().is_some()
                        && namespace.as_deref().is_none_or(|namespace| *namespace == *labels.namespace)
                        && namespaces.matches(&labels.namespace_labels)
                        && pods.requirements.iter().all(is_possible)
                }
                _ => member.is_unlabelled(),
            },
            Self::Port { name, protocol } => labels
                .and_then(|labels| labels.named_ports.get(name))
                .is_some_and(|ports| ports.iter().any(|port| *protocol == port.protocol.into())),
        }
    }
}

/// What of an identity peers can match.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Member {
    /// Who it is on every node; `None` for addresses of nobody known.
    pub base: Option<IdentityId>,
    /// The pod's; `None` for nodes, for addresses of nobody known, and where they are not known yet.
    pub labels: Option<Arc<IdentityLabels>>,
    /// The rules' prefixes that cover the address.
    pub prefixes: Arc<[IpNet]>,
    /// The rules that name it by a name of DNS.
    pub names: Arc<[DnsRule]>,
}

impl Member {
    fn is_outside(&self) -> bool {
        self.base.is_none_or(|base| base == IdentityId::WORLD)
    }

    fn is_node(&self) -> bool {
        matches!(self.base, Some(IdentityId::HOST | IdentityId::REMOTE_NODE))
    }

    /// A pod, and nothing else is known.
    fn is_unlabelled(&self) -> bool {
        let is_pod = |base: IdentityId| !base.is_reserved() || base == IdentityId::UNMANAGED;
        self.labels.is_none() && self.base.is_some_and(is_pod)
    }
}

/// Names a peer while something uses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerIndex(u32);

/// Which peers had or have which of the changed identities.
pub type Touched = HashMap<PeerIndex, Vec<IdentityId>>;

/// All identities, all peers in use, and who matches what.
#[derive(Default)]
pub struct Peers {
    members: BTreeMap<IdentityId, Member>,
    sets: BTreeMap<PeerIndex, Set>,
    by_key: HashMap<Arc<PeerKey>, PeerIndex>,
    next: u32,
    filter: Arc<LabelFilter>,
}

struct Set {
    key: Arc<PeerKey>,
    /// Sorted.
    matched: Vec<IdentityId>,
}

impl Peers {
    /// Knows those who are always there; identities have the labels that `filter` says.
    pub fn new(filter: Arc<LabelFilter>) -> Self {
        let reserved = [IdentityId::HOST, IdentityId::WORLD, IdentityId::REMOTE_NODE, IdentityId::UNMANAGED];
        let member = |id| (id, Member { base: Some(id), ..Member::default() });
        Self { filter, members: reserved.into_iter().map(member).collect(), ..Self::default() }
    }

    /// The index of `key`; a peer that is new is held against every identity.
    pub fn intern(&mut self, key: PeerKey) -> PeerIndex {
        if let Some(index) = self.by_key.get(&key) {
            return *index;
        }
        let matched = self
            .members
            .iter()
            .filter(|(_, member)| key.matches(member, &self.filter))
            .map(|(id, _)| *id)
            .collect();
        let index = PeerIndex(self.next);
        self.next += 1;
        let key = Arc::new(key);
        self.by_key.insert(key.clone(), index);
        self.sets.insert(index, Set { key, matched });
        index
    }

    /// Takes in new, changed and gone (`None`) identities.
    pub fn apply(&mut self, changes: &BTreeMap<IdentityId, Option<Member>>) -> Touched {
        let mut touched = Touched::new();
        for (index, set) in &mut self.sets {
            for (id, member) in changes {
                let is_in = member.as_ref().is_some_and(|member| set.key.matches(member, &self.filter));
                match (set.matched.binary_search(id), is_in) {
                    (Err(_), false) => continue,
                    (Err(place), true) => set.matched.insert(place, *id),
                    (Ok(place), false) => drop(set.matched.remove(place)),
                    (Ok(_), true) => {}
                }
                touched.entry(*index).or_default().push(*id);
            }
        }
        for (id, member) in changes {
            match member {
                Some(member) => drop(self.members.insert(*id, member.clone())),
                None => drop(self.members.remove(id)),
            }
        }
        touched
    }

    /// Forgets the peers that nothing uses.
    pub fn retain(&mut self, used: &HashSet<PeerIndex>) {
        self.sets.retain(|index, _| used.contains(index));
        self.by_key.retain(|_, index| used.contains(index));
    }

    /// The identities that a peer matches, sorted.
    pub fn matched(&self, index: PeerIndex) -> &[IdentityId] {
        self.sets.get(&index).map_or(&[], |set| &set.matched)
    }

    /// An identity's facts.
    pub fn member(&self, id: IdentityId) -> Option<&Member> {
        self.members.get(&id)
    }
}
