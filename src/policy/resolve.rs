//! Policies of every kind, with the names in them replaced by what they stand for now: CIDR groups by
//! their prefixes, Services by who is behind them, nodes by their addresses.
//!
//! What a name stands for that nobody knows is nobody: a rule that allows it allows nothing by it, and
//! never everything. A rule that denies a group of which something cannot be read denies everything.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use imbl::ordmap::DiffItem;
use ipnet::IpNet;

use crate::identity::NAMESPACE_NAME;
use crate::model::{
    Action, CidrGroup, EndpointSlice, Entity, GroupSelector, Node, NodeEndpoints, ObjectKey, Peer, Policy,
    PolicyDirection, PolicyKind, PolicyRef, PolicyRule, Requirement, Selector, Service, ServiceName,
    ServiceSelector,
};
use crate::tables::Snapshot;

/// What names in policies stand for.
#[derive(Clone, Default)]
pub struct References {
    /// CiliumCIDRGroups.
    pub groups: Snapshot<ObjectKey, Arc<CidrGroup>>,
    /// Services.
    pub services: Snapshot<ObjectKey, Arc<Service>>,
    /// Their backends.
    pub slices: Snapshot<ObjectKey, Arc<EndpointSlice>>,
    /// Nodes.
    pub nodes: Snapshot<Arc<str>, Arc<Node>>,
    /// What they have published: through the tunnel a node speaks from an address of the pod network.
    pub node_endpoints: Snapshot<Arc<str>, Arc<NodeEndpoints>>,
}

/// The addresses of nodes in the pod network.
type Internal = BTreeMap<Arc<str>, Vec<IpAddr>>;

/// The policies of every kind as they were read, by kind.
#[derive(Clone, Default)]
pub struct Sources {
    /// NetworkPolicies.
    pub network: Snapshot<PolicyRef, Arc<Policy>>,
    /// Those of the other kinds.
    pub others: Vec<Snapshot<ObjectKey, Arc<Policy>>>,
}

impl Sources {
    /// Every object.
    pub fn all(&self) -> impl Iterator<Item = &Policy> {
        let others = self.others.iter().flat_map(Snapshot::values);
        self.network.values().chain(others).map(AsRef::as_ref)
    }

    /// These, with those of `before` that are gone while their namespace is being deleted: its policies go first,
    /// and its pods are not to be open until they end.
    pub fn kept_from(mut self, before: &Self, is_leaving: impl Fn(&str) -> bool) -> Self {
        for item in before.network.diff(&self.network.clone()) {
            if let DiffItem::Remove(key, policy) = item
                && key.namespace.as_deref().is_some_and(&is_leaving)
            {
                self.network.insert(key.clone(), policy.clone());
            }
        }
        for (old, new) in before.others.iter().zip(&mut self.others) {
            for item in old.diff(&new.clone()) {
                if let DiffItem::Remove(key, policy) = item
                    && is_leaving(&key.namespace)
                {
                    new.insert(key.clone(), policy.clone());
                }
            }
        }
        self
    }

    /// These, with `given` beside them, or instead of those of the same name.
    pub fn with(mut self, given: Vec<Policy>) -> Self {
        let mut added: BTreeMap<PolicyKind, Snapshot<ObjectKey, Arc<Policy>>> = BTreeMap::new();
        for policy in given {
            let PolicyRef { kind, namespace, name, .. } = policy.reference.clone();
            let key = ObjectKey { namespace: namespace.unwrap_or_default(), name };
            if kind == PolicyKind::NetworkPolicy {
                self.network.insert(policy.reference.clone(), Arc::new(policy));
                continue;
            }
            for known in &mut self.others {
                if known.get(&key).is_some_and(|known| known.reference.kind == kind) {
                    known.remove(&key);
                }
            }
            added.entry(kind).or_default().insert(key, Arc::new(policy));
        }
        self.others.extend(added.into_values());
        self
    }
}

/// What a policy names, and what of it has changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Names {
    groups: bool,
    nodes: bool,
    /// Services and those behind them.
    services: bool,
    /// Those behind the Service of the API server.
    api_server: bool,
}

impl Names {
    fn of(policy: &Policy) -> Self {
        let mut names = Self::default();
        let rules = policy.ingress.iter().chain(&policy.egress).flat_map(|direction| &direction.rules);
        for peer in rules.flat_map(|rule| rule.peers.iter().flatten()) {
            match peer {
                Peer::Pods { .. }
                | Peer::Block { .. }
                | Peer::Outside { .. }
                | Peer::NodeAddresses(_)
                | Peer::Name(_) => {}
                Peer::Nodes(_) => names.nodes = true,
                Peer::Groups { .. } => names.groups = true,
                Peer::Services(_) => names.services = true,
                Peer::Entity(Entity::KubeApiServer | Entity::Cluster) => names.api_server = true,
                Peer::Entity(_) => {}
            }
        }
        names
    }

    /// What of `now` is otherwise than `before`, in what policies can name.
    fn changed(before: &References, now: &References) -> Self {
        let mut slices = before.slices.diff(&now.slices).map(|item| match item {
            DiffItem::Add(_, slice) | DiffItem::Remove(_, slice) => [slice, slice],
            DiffItem::Update { old: (_, old), new: (_, new) } => [old, new],
        });
        let api_server = ObjectKey::new(API_SERVER.0, API_SERVER.1);
        Self {
            groups: !before.groups.ptr_eq(&now.groups),
            nodes: before.nodes.diff(&now.nodes).any(|item| match item {
                DiffItem::Add(..) | DiffItem::Remove(..) => true,
                // Whether it is ready, and its pod CIDRs, are nothing that a policy asks for.
                DiffItem::Update { old: (_, old), new: (_, new) } => {
                    old.labels != new.labels || old.addresses != new.addresses
                }
            }),
            services: !before.services.ptr_eq(&now.services) || !before.slices.ptr_eq(&now.slices),
            api_server: slices.any(|pair| pair.iter().any(|slice| slice.service == api_server)),
        }
    }

    fn is_none(self) -> bool {
        self == Self::default()
    }

    fn meets(self, other: Self) -> bool {
        (self.groups && other.groups)
            || (self.nodes && other.nodes)
            || (self.services && other.services)
            || (self.api_server && other.api_server)
    }
}

/// Namespace and name of the Service of the API server.
const API_SERVER: (&str, &str) = ("default", "kubernetes");

/// Resolves again and again; what did not change shares memory with the last answer.
#[derive(Default)]
pub struct Resolver {
    sources: Sources,
    references: References,
    internal: Internal,
    /// The policies that name something, as they were read, and what they name.
    naming: BTreeMap<PolicyRef, (Arc<Policy>, Names)>,
    resolved: Snapshot<PolicyRef, Arc<Policy>>,
    resolutions: u64,
}

impl Resolver {
    /// Every policy, a row for each of its specs.
    pub fn update(&mut self, sources: Sources, references: References) -> Snapshot<PolicyRef, Arc<Policy>> {
        let before = std::mem::replace(&mut self.sources, sources.clone());
        let old = std::mem::replace(&mut self.references, references);
        let mut changed = Names::changed(&old, &self.references);
        changed.nodes |= self.follow_internal(&old.node_endpoints);
        for (policy, names) in self.naming.values() {
            if names.meets(changed) {
                self.resolutions += 1;
                let now = resolve(policy, &self.references, &self.internal);
                let known = self.resolved.get(&policy.reference);
                if known.is_none_or(|known| **known != now) {
                    self.resolved.insert(policy.reference.clone(), Arc::new(now));
                }
            }
        }
        self.follow(&before.network, &sources.network);
        let none = Snapshot::new();
        for index in 0..before.others.len().max(sources.others.len()) {
            let of = |sources: &Sources| sources.others.get(index).unwrap_or(&none).clone();
            self.follow(&of(&before), &of(&sources));
        }
        self.resolved.clone()
    }

    /// How often a policy's names were looked up, since the beginning.
    pub fn resolutions(&self) -> u64 {
        self.resolutions
    }

    /// True if a node has other addresses in the pod network. Its pods change all the time, and do not matter.
    fn follow_internal(&mut self, before: &Snapshot<Arc<str>, Arc<NodeEndpoints>>) -> bool {
        let mut is_moved = false;
        for item in before.diff(&self.references.node_endpoints) {
            match item {
                DiffItem::Add(name, now) | DiffItem::Update { new: (name, now), .. } => {
                    let known = self.internal.insert(name.clone(), now.internal_addresses.clone());
                    is_moved |= known.unwrap_or_default() != now.internal_addresses;
                }
                DiffItem::Remove(name, _) => is_moved |= self.internal.remove(name).is_some(),
            }
        }
        is_moved
    }

    fn follow<K: Ord + Clone>(&mut self, before: &Snapshot<K, Arc<Policy>>, now: &Snapshot<K, Arc<Policy>>) {
        for item in before.diff(now) {
            let (gone, come) = match &item {
                DiffItem::Add(_, policy) => (None, Some(*policy)),
                DiffItem::Update { old: (_, old), new: (_, new) } => (Some(*old), Some(*new)),
                DiffItem::Remove(_, policy) => (Some(*policy), None),
            };
            let come: Vec<Arc<Policy>> = come.into_iter().flat_map(specs).collect();
            for spec in gone.into_iter().flat_map(specs) {
                if come.iter().all(|policy| policy.reference != spec.reference) {
                    self.naming.remove(&spec.reference);
                    self.resolved.remove(&spec.reference);
                }
            }
            for policy in come {
                self.take(policy);
            }
        }
    }

    fn take(&mut self, policy: Arc<Policy>) {
        let reference = policy.reference.clone();
        let names = Names::of(&policy);
        if names.is_none() {
            self.naming.remove(&reference);
            self.resolved.insert(reference, policy);
            return;
        }
        self.resolutions += 1;
        let now = resolve(&policy, &self.references, &self.internal);
        self.resolved.insert(reference.clone(), Arc::new(now));
        self.naming.insert(reference, (policy, names));
    }
}

/// An object's specs, the first without the others.
fn specs(policy: &Arc<Policy>) -> Vec<Arc<Policy>> {
    if policy.others.is_empty() {
        return vec![policy.clone()];
    }
    let first = Policy { others: Vec::new(), ..Policy::clone(policy) };
    std::iter::once(first).chain(policy.others.iter().cloned()).map(Arc::new).collect()
}

fn resolve(policy: &Policy, references: &References, internal: &Internal) -> Policy {
    let direction = |direction: &Option<PolicyDirection>| {
        direction.as_ref().map(|PolicyDirection { default, rules }| PolicyDirection {
            default: *default,
            rules: rules.iter().map(|rule| references.rule(rule, internal)).collect(),
        })
    };
    Policy { ingress: direction(&policy.ingress), egress: direction(&policy.egress), ..policy.clone() }
}

impl References {
    fn rule(&self, rule: &PolicyRule, internal: &Internal) -> PolicyRule {
        let mut peers = Vec::new();
        for peer in rule.peers.iter().flatten() {
            match peer {
                Peer::Groups { groups, except } => {
                    let all: Vec<&CidrGroup> = self.groups(groups).collect();
                    if rule.action != Action::Allow && all.iter().any(|group| group.is_partial) {
                        return PolicyRule { peers: None, ..rule.clone() };
                    }
                    let cidrs = all.iter().flat_map(|group| &group.cidrs);
                    let outside =
                        cidrs.map(|cidr| Peer::Outside { cidr: *cidr, except: within(except, cidr) });
                    peers.extend(outside);
                }
                Peer::Nodes(selector) => {
                    let nodes = self.nodes.values().filter(|node| selector.matches(&node.labels));
                    let addresses = nodes.flat_map(|node| {
                        let internal = internal.get(&*node.name).into_iter().flatten();
                        node.addresses.iter().chain(internal).map(|it| IpNet::from(*it))
                    });
                    peers.push(Peer::NodeAddresses(addresses.collect()));
                }
                Peer::Services(selector) => peers.extend(self.services(selector)),
                Peer::Entity(Entity::KubeApiServer) => peers.extend(self.api_server()),
                Peer::Entity(Entity::Cluster) => {
                    peers.push(peer.clone());
                    peers.extend(self.api_server());
                }
                known => peers.push(known.clone()),
            }
        }
        PolicyRule { peers: rule.peers.is_some().then_some(peers), ..rule.clone() }
    }

    fn groups(&self, wanted: &GroupSelector) -> impl Iterator<Item = &CidrGroup> {
        let is_wanted = move |(key, group): &(&ObjectKey, &Arc<CidrGroup>)| match wanted {
            GroupSelector::Named(name) => key.name == *name,
            GroupSelector::Labelled(selector) => selector.matches(&group.labels),
        };
        self.groups.iter().filter(is_wanted).map(|(_, group)| &**group)
    }

    /// Who is behind Services: the pods that they select; of those without a selector the backends, whoever
    /// has the addresses.
    fn services(&self, wanted: &ServiceSelector) -> Vec<Peer> {
        let is_wanted = |service: &&Arc<Service>| {
            wanted.namespace.as_ref().is_none_or(|own| *own == service.key.namespace)
                && match &wanted.services {
                    ServiceName::Named(name) => service.key.name == *name,
                    ServiceName::Labelled(selector) => selector.matches(&service.labels),
                }
        };
        let mut peers = Vec::new();
        for service in self.services.values().filter(is_wanted) {
            if service.selector.is_empty() {
                peers.extend(self.backends(&service.key));
            } else {
                peers.push(selected_by(service));
            }
        }
        peers
    }

    fn api_server(&self) -> Vec<Peer> {
        self.backends(&ObjectKey::new(API_SERVER.0, API_SERVER.1))
    }

    fn backends(&self, service: &ObjectKey) -> Vec<Peer> {
        // A slice is in the namespace of its Service.
        let first = ObjectKey::new(service.namespace.clone(), "");
        let in_namespace =
            self.slices.range(first..).take_while(|(slice, _)| slice.namespace == service.namespace);
        let slices = in_namespace.map(|(_, slice)| slice).filter(|slice| slice.service == *service);
        let addresses: BTreeSet<IpAddr> =
            slices.flat_map(|slice| &slice.backends).map(|backend| backend.address).collect();
        let block = |address: IpAddr| Peer::Block { cidr: address.into(), except: Vec::new() };
        addresses.into_iter().map(block).collect()
    }
}

fn selected_by(service: &Service) -> Peer {
    let is = |key: &str, value: &str| Requirement::In(key.to_owned(), BTreeSet::from([value.to_owned()]));
    let namespace = is(NAMESPACE_NAME, &service.key.namespace);
    let pods = service.selector.iter().map(|(key, value)| is(key, value)).collect();
    Peer::Pods { namespaces: Some(Selector::new(vec![namespace])), pods: Selector::new(pods) }
}

/// The holes that lie in a prefix, or hold all of it.
fn within(except: &[IpNet], cidr: &IpNet) -> Vec<IpNet> {
    let touches = |hole: &&IpNet| cidr.contains(*hole) || hole.contains(cidr);
    except.iter().filter(touches).copied().collect()
}
