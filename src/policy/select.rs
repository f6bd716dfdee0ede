//! Which policies select which pods of this node, and so which policy value each has.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use imbl::ordmap::DiffItem;
use ipnet::IpNet;

use crate::identity::LabelFilter;
use crate::model::l7::DnsRule;
use crate::model::{
    Action, IdentityId, IdentityLabels, IpProtocol, Origins, Peer, Policy, PolicyDirection, PolicyRef,
    PolicyRule, PortSelector, Selector, Subject, Visibility,
};
use crate::tables::Snapshot;

use super::{shown, value};

/// What makes a policy value what it is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Definition {
    /// What annotations say.
    pub treatment: Treatment,
    /// The revisions of the policies that select the pod.
    pub revisions: Vec<Revision>,
    /// What the port names of their ingress rules stand for in the pod.
    ports: Vec<(String, IpProtocol, u16)>,
}

/// What annotations of a pod and its namespace say of how it is treated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Treatment {
    /// What is denied is only reported.
    pub is_audit: bool,
    /// Whose requests are shown.
    pub shown: Visibility,
}

/// Names one state of one policy's rules; never used again for others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision(u64);

/// What an identity of this node is selected by.
pub struct Selection {
    /// The policies, sorted.
    pub policies: Arc<[PolicyRef]>,
    /// Those of them that isolate it: for what comes in, for what goes out.
    pub isolating: [Origins; 2],
    /// `None`: no policy selects it.
    pub definition: Option<Definition>,
}

/// Whom policies select: pods of an identity or the host, and how they are treated.
pub type Selected = (IdentityId, Treatment);

/// The policies, with what does not depend on who is selected.
#[derive(Default)]
pub struct Selections {
    snapshot: Snapshot<PolicyRef, Arc<Policy>>,
    /// By namespace, those of the cluster under `None`.
    states: BTreeMap<Option<Arc<str>>, BTreeMap<PolicyRef, State>>,
    selected: BTreeMap<Selected, Arc<Selection>>,
    next: u64,
}

struct State {
    policy: Arc<Policy>,
    revision: Revision,
    /// Every cidr and except of its rules.
    prefixes: BTreeSet<IpNet>,
    /// Port names of its ingress rules.
    names: BTreeSet<(String, IpProtocol)>,
    /// Names of DNS in its rules.
    dns: BTreeSet<DnsRule>,
}

/// The labels that the filter drops and that policies ask pods for: identities have them then.
pub fn asked_labels(policies: &Snapshot<PolicyRef, Arc<Policy>>, filter: &LabelFilter) -> BTreeSet<String> {
    let selectors = policies.values().flat_map(|policy| {
        let subject = match &policy.subject {
            Subject::Pods { pods, .. } => Some(pods),
            Subject::Nodes(_) => None,
        };
        subject.into_iter().chain(peers_of(policy))
    });
    selectors.flat_map(|selector| filter.dropped(selector)).map(str::to_owned).collect()
}

/// The pods that a policy's rules are about.
fn peers_of(policy: &Policy) -> impl Iterator<Item = &Selector> {
    rules_of(policy.ingress.iter().chain(&policy.egress))
        .flat_map(|rule| rule.peers.iter().flatten())
        .filter_map(|peer| match peer {
            Peer::Pods { pods, .. } => Some(pods),
            _ => None,
        })
}

fn rules_of<'a>(
    directions: impl IntoIterator<Item = &'a PolicyDirection>,
) -> impl Iterator<Item = &'a PolicyRule> {
    directions.into_iter().flat_map(|direction| &direction.rules)
}

impl Selections {
    /// Takes in the policies as they are now; true if any changed.
    pub fn update(&mut self, policies: &Snapshot<PolicyRef, Arc<Policy>>) -> bool {
        let before = std::mem::replace(&mut self.snapshot, policies.clone());
        let mut is_changed = false;
        for item in before.diff(policies) {
            is_changed = true;
            match item {
                DiffItem::Add(key, policy) | DiffItem::Update { new: (key, policy), .. } => {
                    let old = self.state(key).filter(|old| says_the_same(&old.policy, policy));
                    let known = old.map(|old| old.revision);
                    let revision = known.unwrap_or_else(|| self.next_revision());
                    let of_namespace = self.states.entry(key.namespace.clone()).or_default();
                    of_namespace.insert(key.clone(), State::new(policy.clone(), revision));
                }
                DiffItem::Remove(key, _) => {
                    let of_namespace = self.states.get_mut(&key.namespace);
                    of_namespace.and_then(|of_namespace| of_namespace.remove(key));
                    self.states.retain(|_, of_namespace| !of_namespace.is_empty());
                }
            }
        }
        if is_changed {
            self.selected.clear();
        }
        is_changed
    }

    fn state(&self, policy: &PolicyRef) -> Option<&State> {
        self.states.get(&policy.namespace)?.get(policy)
    }

    fn next_revision(&mut self) -> Revision {
        self.next += 1;
        Revision(self.next)
    }

    /// The labels of these identities are others now; true if any is selected here.
    pub fn forget<'a>(&mut self, identities: impl Iterator<Item = &'a IdentityId>) -> bool {
        let count = self.selected.len();
        let gone: BTreeSet<&IdentityId> = identities.collect();
        if !gone.is_empty() {
            self.selected.retain(|(id, _), _| !gone.contains(id));
        }
        self.selected.len() != count
    }

    /// What selects each of `used`, as far as its labels are known.
    pub fn select(
        &mut self,
        used: &BTreeSet<Selected>,
        identities: &Snapshot<IdentityId, Arc<IdentityLabels>>,
        host: &IdentityLabels,
    ) {
        self.selected.retain(|id, _| used.contains(id));
        for key @ (id, treatment) in used {
            if self.selected.contains_key(key) {
                continue;
            }
            let selection = match *id {
                IdentityId::HOST => Some(self.selection_of_host(host)),
                id => identities.get(&id).map(|labels| self.selection_of(labels, *treatment)),
            };
            if let Some(selection) = selection {
                self.selected.insert(*key, Arc::new(selection));
            }
        }
    }

    /// The selections, by the identity that is selected.
    pub fn selected(&self) -> &BTreeMap<Selected, Arc<Selection>> {
        &self.selected
    }

    fn selection_of(&self, labels: &IdentityLabels, treatment: Treatment) -> Selection {
        let namespace = Arc::from(labels.namespace.as_str());
        let may_select = [Some(namespace), None].into_iter().filter_map(|key| self.states.get(&key));
        let states = may_select.flat_map(BTreeMap::values).filter(|state| state.selects(labels));
        selection(states.collect(), labels, treatment)
    }

    /// Of the node whose labels these are.
    fn selection_of_host(&self, host: &IdentityLabels) -> Selection {
        let selects = |state: &&State| match &state.policy.subject {
            Subject::Nodes(selector) => selector.matches(&host.pod_labels),
            Subject::Pods { .. } => false,
        };
        let of_cluster = self.states.get(&None).into_iter().flat_map(BTreeMap::values);
        selection(of_cluster.filter(selects).collect(), host, Treatment::default())
    }

    /// The policies of a selection.
    pub fn policies(&self, selection: &Selection) -> Vec<Arc<Policy>> {
        let states = selection.policies.iter().filter_map(|key| self.state(key));
        states.map(|state| state.policy.clone()).collect()
    }

    /// The names of DNS in the policies of a selection, sorted.
    pub fn dns_rules(&self, selection: &Selection) -> Arc<[DnsRule]> {
        let states = selection.policies.iter().filter_map(|key| self.state(key));
        let rules: BTreeSet<&DnsRule> = states.flat_map(|state| &state.dns).collect();
        rules.into_iter().cloned().collect()
    }

    /// Every prefix that rules of the policies in use name.
    pub fn prefixes(&self) -> BTreeSet<IpNet> {
        let used: BTreeSet<&PolicyRef> =
            self.selected.values().flat_map(|selection| selection.policies.iter()).collect();
        used.into_iter()
            .filter_map(|key| self.state(key))
            .flat_map(|state| &state.prefixes)
            .copied()
            .collect()
    }
}

/// What the states that select somebody are to him.
fn selection(mut states: Vec<&State>, labels: &IdentityLabels, treatment: Treatment) -> Selection {
    states.sort_unstable_by(|a, b| a.policy.reference.cmp(&b.policy.reference));
    let names: BTreeSet<_> = states.iter().flat_map(|state| &state.names).collect();
    let mut ports = Vec::new();
    for (name, protocol) in names {
        let resolved = value::resolve(labels, name).iter().filter(|port| *protocol == port.protocol.into());
        ports.extend(resolved.map(|port| (name.clone(), *protocol, port.port)));
    }
    ports.extend(shown::named_ports(labels, treatment.shown));
    ports.sort_unstable();
    ports.dedup();
    let revisions: Vec<Revision> = states.iter().map(|state| state.revision).collect();
    let isolating = |side: fn(&Policy) -> &Option<PolicyDirection>| -> Origins {
        let isolates = |policy: &Policy| side(policy).as_ref().is_some_and(|it| it.default == Action::Deny);
        let isolating = states.iter().filter(|state| isolates(&state.policy));
        isolating.map(|state| state.policy.reference.clone()).collect()
    };
    Selection {
        isolating: [isolating(|policy| &policy.ingress), isolating(|policy| &policy.egress)],
        policies: states.iter().map(|state| state.policy.reference.clone()).collect(),
        definition: (!revisions.is_empty() || !treatment.shown.is_none()).then_some(Definition {
            treatment,
            revisions,
            ports,
        }),
    }
}

/// True if a policy is about pods with these labels. That of a namespace is about no others.
pub fn selects(policy: &Policy, labels: &IdentityLabels) -> bool {
    let Subject::Pods { namespaces, pods } = &policy.subject else { return false };
    policy.reference.namespace.as_ref().is_none_or(|own| **own == *labels.namespace)
        && pods.matches_by(|key| labels.pod_label(key))
        && namespaces.matches(&labels.namespace_labels)
}

/// True if both make the same rows of whom they apply to.
fn says_the_same(one: &Policy, other: &Policy) -> bool {
    (one.tier, one.priority, one.marks.audit) == (other.tier, other.priority, other.marks.audit)
        && one.ingress == other.ingress
        && one.egress == other.egress
}

impl State {
    fn new(policy: Arc<Policy>, revision: Revision) -> Self {
        let mut state = Self {
            revision,
            prefixes: BTreeSet::new(),
            names: BTreeSet::new(),
            dns: BTreeSet::new(),
            policy: policy.clone(),
        };
        for rule in rules_of(&policy.ingress) {
            state.add_peers(rule);
            for port in rule.ports.iter().flatten() {
                if let PortSelector::Named(name) = &port.port {
                    state.names.insert((name.clone(), port.protocol));
                }
            }
        }
        rules_of(&policy.egress).for_each(|rule| state.add_peers(rule));
        state
    }

    fn selects(&self, labels: &IdentityLabels) -> bool {
        selects(&self.policy, labels)
    }

    fn add_peers(&mut self, rule: &PolicyRule) {
        for peer in rule.peers.iter().flatten() {
            match peer {
                Peer::Block { cidr, except } | Peer::Outside { cidr, except } => {
                    self.prefixes.insert(cidr.trunc());
                    self.prefixes.extend(except.iter().map(IpNet::trunc));
                }
                Peer::NodeAddresses(addresses) => self.prefixes.extend(addresses),
                Peer::Name(rule) => drop(self.dns.insert(rule.clone())),
                _ => {}
            }
        }
    }
}
