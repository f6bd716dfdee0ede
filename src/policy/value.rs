//! A policy value: the rules of all policies that select an endpoint, compiled to classes.
//!
//! A class is a set of rows. Class 0 is what everyone gets (rules without peers, and what is done with
//! what no rule matches); for an identity that some peer matches those rules are weighed as well. A value's
//! rules never change: new identities bring new classes and peers, and that is all.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use crate::model::l7::L7Rules;
use crate::model::{
    Action, CompiledDirection, CompiledPolicy, CompiledRule, CompiledRuleKey, IdentityId, IdentityLabels,
    IpProtocol, NamedPort, Origins, Policy, PolicyDirection, PolicyId, PolicyRule, PortSelector,
};

use super::peers::{PeerIndex, PeerKey, Peers, Touched};
use super::rules::{self, Claim, Decision, Match, Order, Rows};
use super::select::Treatment;
use super::shown;

/// A compiled policy and what is needed to add identities to it.
pub struct Value {
    /// Its number.
    pub id: PolicyId,
    /// Its rows.
    pub compiled: Arc<CompiledPolicy>,
    ingress: Option<Direction>,
    egress: Option<Direction>,
}

struct Direction {
    rules: Vec<Rule>,
    peers: BTreeSet<PeerIndex>,
    everyone: Vec<Claim>,
    classes: HashMap<Rows, u32>,
    /// Saves building the rows of a combination again.
    known: HashMap<Combination, u32>,
    /// The same of a rule alone that names no port: most identities meet one.
    alone: HashMap<usize, u32>,
    refuses_strangers: bool,
}

/// What a rule says, wherever it says so.
#[derive(Clone)]
struct Saying {
    order: Order,
    action: Action,
    namespace: Option<Arc<str>>,
    origins: Origins,
    is_audit: bool,
    l7: Option<Arc<L7Rules>>,
}

impl Saying {
    fn of(&self, matched: Match) -> Claim {
        let Self { order, action, is_audit, .. } = *self;
        Claim { matched, order, action, origins: self.origins.clone(), is_audit, l7: self.l7.clone() }
    }
}

/// A rule that has peers.
struct Rule {
    saying: Saying,
    peers: Vec<PeerIndex>,
    matches: Vec<Match>,
    /// Port names, resolved in the peer.
    named: Vec<(String, IpProtocol)>,
}

/// The rules that an identity meets (sorted), and what its port names stand for in them.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Combination {
    rules: Vec<usize>,
    named: Vec<(usize, Match)>,
}

impl Value {
    /// Compiles `policies`, which select pods with `labels`, against every identity. `treatment`: how these pods are
    /// treated.
    pub fn new(
        id: PolicyId,
        policies: &[Arc<Policy>],
        labels: &IdentityLabels,
        treatment: &Treatment,
        peers: &mut Peers,
    ) -> Self {
        let is_audit = treatment.is_audit;
        let mut ingress: Option<Direction> = None;
        let mut egress: Option<Direction> = None;
        for policy in policies {
            if let Some(rules) = &policy.ingress {
                let direction = ingress.get_or_insert_with(Direction::new);
                direction.add_policy(policy, rules, Some(labels), is_audit, peers);
            }
            if let Some(rules) = &policy.egress {
                let direction = egress.get_or_insert_with(Direction::new);
                direction.add_policy(policy, rules, None, is_audit, peers);
            }
        }
        let shown = |direction: &mut Option<Direction>, claims: Vec<Claim>| {
            if !claims.is_empty() {
                direction.get_or_insert_with(Direction::new).everyone.extend(claims);
            }
        };
        shown(&mut ingress, shown::claims(Some(labels), treatment.shown));
        shown(&mut egress, shown::claims(None, treatment.shown));
        let compiled = CompiledPolicy {
            ingress: ingress.as_mut().map(|direction| direction.compile(peers)),
            egress: egress.as_mut().map(|direction| direction.compile(peers)),
        };
        Self { id, compiled: Arc::new(compiled), ingress, egress }
    }

    /// Judges the identities again that some peer of this value touched.
    pub fn update(&mut self, touched: &Touched, peers: &Peers) {
        let change = |direction: &mut Option<Direction>, old: &Option<CompiledDirection>| {
            direction
                .as_mut()
                .zip(old.as_ref())
                .map(|(direction, old)| direction.changes(touched, old, peers))
        };
        let ingress = change(&mut self.ingress, &self.compiled.ingress).unwrap_or_default();
        let egress = change(&mut self.egress, &self.compiled.egress).unwrap_or_default();
        if ingress.is_empty() && egress.is_empty() {
            return;
        }
        let compiled = Arc::make_mut(&mut self.compiled);
        for (direction, target, changes) in
            [(&self.ingress, &mut compiled.ingress, ingress), (&self.egress, &mut compiled.egress, egress)]
        {
            let Some((direction, target)) = direction.as_ref().zip(target.as_mut()) else { continue };
            for (id, class) in changes {
                set_class(target, id, class);
            }
            direction.add_missing_rows(target);
        }
    }

    /// The peers that it needs.
    pub fn peers(&self) -> impl Iterator<Item = PeerIndex> {
        let directions = self.ingress.iter().chain(&self.egress);
        directions.flat_map(|direction| direction.peers.iter().copied())
    }
}

fn set_class(target: &mut CompiledDirection, id: IdentityId, class: u32) {
    if class == 0 {
        target.peers.remove(&id);
    } else {
        target.peers.insert(id, class);
    }
}

impl Direction {
    fn new() -> Self {
        Self {
            rules: Vec::new(),
            peers: BTreeSet::new(),
            everyone: Vec::new(),
            classes: HashMap::new(),
            known: HashMap::new(),
            alone: HashMap::new(),
            refuses_strangers: false,
        }
    }

    /// `subject` is set for ingress: port names are then those of the selected pod.
    fn add_policy(
        &mut self,
        policy: &Policy,
        direction: &PolicyDirection,
        subject: Option<&IdentityLabels>,
        is_audit: bool,
        peers: &mut Peers,
    ) {
        let is_audit = is_audit || policy.marks.audit;
        let origins = Origins::from([policy.reference.clone()]);
        let namespace = policy.reference.namespace.clone();
        for (position, rule) in (0..).zip(&direction.rules) {
            let position = if policy.tier.is_ordered() { position } else { 0 };
            let order = Order { tier: policy.tier, priority: policy.priority, position };
            let (origins, namespace) = (origins.clone(), namespace.clone());
            let saying =
                Saying { order, action: rule.action, namespace, origins, is_audit, l7: rule.l7.clone() };
            self.add_rule(&saying, rule, subject, peers);
        }
        if direction.default != Action::Pass {
            let order = Order::default_of(policy.tier);
            self.everyone.push(Claim {
                matched: Match::ANY,
                order,
                action: direction.default,
                // Only what is reported needs a name.
                origins: if is_audit { origins } else { Origins::default() },
                is_audit,
                l7: None,
            });
        }
    }

    fn add_rule(
        &mut self,
        saying: &Saying,
        rule: &PolicyRule,
        subject: Option<&IdentityLabels>,
        peers: &mut Peers,
    ) {
        let (matches, named) = ports_of(rule, subject);
        let Some(rule_peers) = &rule.peers else {
            self.everyone.extend(matches.into_iter().map(|matched| saying.of(matched)));
            if !named.is_empty() {
                if saying.action != Action::Allow {
                    self.refuse_doubtful(saying, &[Match::ANY], named.iter().map(port_key), peers);
                }
                let with_port = named.iter().map(port_key).map(|key| peers.intern(key)).collect();
                self.push_rule(Rule { saying: saying.clone(), peers: with_port, matches: Vec::new(), named });
            }
            return;
        };
        if matches.is_empty() && named.is_empty() {
            return;
        }
        let namespace = saying.namespace.as_ref();
        let keys: Vec<PeerKey> = rule_peers.iter().map(|peer| PeerKey::new(namespace, peer)).collect();
        if saying.action != Action::Allow {
            let all = if named.is_empty() { &matches[..] } else { &[Match::ANY] };
            self.refuse_doubtful(saying, all, keys.iter().cloned(), peers);
        }
        let rule_peers = keys.into_iter().map(|key| peers.intern(key)).collect();
        self.push_rule(Rule { saying: saying.clone(), peers: rule_peers, matches, named });
    }

    /// Of whom it is not known whether a rule that does not allow means him gets nothing, whatever else
    /// would allow him.
    fn refuse_doubtful(
        &mut self,
        saying: &Saying,
        matches: &[Match],
        keys: impl Iterator<Item = PeerKey>,
        peers: &mut Peers,
    ) {
        // Whom an audited rule may mean is let through, as everybody else whom the rule means.
        self.refuses_strangers |= !saying.is_audit;
        let doubtful: Vec<PeerIndex> =
            keys.filter_map(|key| key.doubtful()).map(|key| peers.intern(key)).collect();
        if !doubtful.is_empty() {
            let saying = Saying { action: Action::Deny, ..saying.clone() };
            self.push_rule(Rule { saying, peers: doubtful, matches: matches.to_vec(), named: Vec::new() });
        }
    }

    fn push_rule(&mut self, rule: Rule) {
        self.peers.extend(&rule.peers);
        self.rules.push(rule);
    }

    /// Every identity's class, and the rows of the classes.
    fn compile(&mut self, peers: &Peers) -> CompiledDirection {
        self.classes.insert(rules::flatten(&self.everyone), 0);
        let mut met: Vec<(IdentityId, usize)> = Vec::new();
        for (index, rule) in self.rules.iter().enumerate() {
            met.extend(rule.peers.iter().flat_map(|peer| peers.matched(*peer)).map(|id| (*id, index)));
        }
        met.sort_unstable();
        met.dedup();
        let refuses_strangers = self.refuses_strangers;
        let mut compiled = CompiledDirection { refuses_strangers, ..CompiledDirection::default() };
        for same in met.chunk_by(|a, b| a.0 == b.0) {
            let id = same[0].0;
            let class = self.class_of(id, same.iter().map(|(_, rule)| *rule), peers);
            set_class(&mut compiled, id, class);
        }
        self.add_missing_rows(&mut compiled);
        compiled
    }

    /// The identities whose class is now another than in `old`.
    fn changes(
        &mut self,
        touched: &Touched,
        old: &CompiledDirection,
        peers: &Peers,
    ) -> Vec<(IdentityId, u32)> {
        let ids: BTreeSet<IdentityId> =
            self.peers.iter().filter_map(|peer| touched.get(peer)).flatten().copied().collect();
        ids.into_iter()
            .filter_map(|id| {
                let is_met = |rule: &Rule| {
                    rule.peers.iter().any(|peer| peers.matched(*peer).binary_search(&id).is_ok())
                };
                let met: Vec<usize> =
                    (0..self.rules.len()).filter(|index| is_met(&self.rules[*index])).collect();
                let class = self.class_of(id, met.into_iter(), peers);
                (class != old.peers.get(&id).copied().unwrap_or(0)).then_some((id, class))
            })
            .collect()
    }

    fn class_of(&mut self, id: IdentityId, met: impl Iterator<Item = usize> + Clone, peers: &Peers) -> u32 {
        let mut first = met.clone();
        let alone = match (first.next(), first.next()) {
            (Some(index), None) if self.rules[index].named.is_empty() => Some(index),
            _ => None,
        };
        if let Some(class) = alone.and_then(|index| self.alone.get(&index)) {
            return *class;
        }
        let class = self.class_of_many(id, met.collect(), peers);
        if let Some(index) = alone {
            self.alone.insert(index, class);
        }
        class
    }

    fn class_of_many(&mut self, id: IdentityId, met: Vec<usize>, peers: &Peers) -> u32 {
        let ports = peers.member(id).and_then(|member| member.labels.as_deref());
        let mut named = Vec::new();
        for index in &met {
            for (name, protocol) in &self.rules[*index].named {
                let resolved = ports.map_or(&[][..], |labels| resolve(labels, name));
                named.extend(
                    resolved
                        .iter()
                        .filter(|port| *protocol == port.protocol.into())
                        .map(|port| (*index, Match::port(*port))),
                );
            }
        }
        let combination = Combination { rules: met, named };
        if let Some(class) = self.known.get(&combination) {
            return *class;
        }
        let met = combination.rules.iter().map(|index| &self.rules[*index]);
        let mut claims: Vec<Claim> =
            met.flat_map(|rule| rule.matches.iter().map(|matched| rule.saying.of(*matched))).collect();
        let of_name = |(index, matched): &(usize, Match)| self.rules[*index].saying.of(*matched);
        claims.extend(combination.named.iter().map(of_name));
        let rows = rules::flatten(self.everyone.iter().chain(&claims));
        let next = u32::try_from(self.classes.len()).expect("classes are fewer than identities");
        let class = *self.classes.entry(rows).or_insert(next);
        self.known.insert(combination, class);
        class
    }

    fn add_missing_rows(&self, target: &mut CompiledDirection) {
        let known = target.rules.keys().next_back().map(|key| key.class);
        for (rows, class) in &self.classes {
            if known.is_some_and(|known| *class <= known) {
                continue;
            }
            for (matched, decision) in rows {
                let Match { protocol, port, port_prefix_length } = *matched;
                let key = CompiledRuleKey { class: *class, protocol, port, port_prefix_length };
                let Decision { action, origins, is_audit, l7 } = decision.clone();
                let rule = CompiledRule { action, origins, is_audit, l7 };
                target.rules.insert(key, rule);
            }
        }
    }
}

fn port_key((name, protocol): &(String, IpProtocol)) -> PeerKey {
    PeerKey::Port { name: name.clone(), protocol: *protocol }
}

/// The rows of a rule's ports, and the names that only a peer can resolve.
fn ports_of(rule: &PolicyRule, subject: Option<&IdentityLabels>) -> (Vec<Match>, Vec<(String, IpProtocol)>) {
    let Some(ports) = &rule.ports else { return (vec![Match::ANY], Vec::new()) };
    let mut matches = Vec::new();
    let mut named = Vec::new();
    for port in ports {
        match (&port.port, subject) {
            (PortSelector::Any, _) => matches.push(Match::protocol(port.protocol)),
            (PortSelector::Range(from, to), _) => matches.extend(Match::range(port.protocol, *from, *to)),
            (PortSelector::Named(name), Some(labels)) => matches.extend(
                resolve(labels, name)
                    .iter()
                    .filter(|known| port.protocol == known.protocol.into())
                    .map(|p| Match::port(*p)),
            ),
            (PortSelector::Named(name), None) => named.push((name.clone(), port.protocol)),
        }
    }
    (matches, named)
}

/// What a port name stands for in pods with `labels`.
pub fn resolve<'a>(labels: &'a IdentityLabels, name: &str) -> &'a [NamedPort] {
    labels.named_ports.get(name).map_or(&[], Vec::as_slice)
}
