//! Why policy lets a packet through or not: the rules that were weighed, the one that decided, and what
//! would change it.
//!
//! Rules are asked by the same code that compiles them, for one pair and one port, so the answer is the
//! one that the maps hold, on a live node and for manifests that no node has seen.

use std::collections::BTreeSet;
use std::fmt::{self, Write};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::peers::{Member, PeerKey};
use super::rules::{self, Claim, Match, Order};
use super::select::selects;
use super::value::resolve;
use crate::identity::LabelFilter;
use crate::model::l7::{DnsRule, L7Rules};
use crate::model::{
    Action, IdentityId, IdentityLabels, IpProtocol, L7Set, Origins, Peer, Policy, PolicyDirection, PolicyRef,
    PolicyRule, PortSelector, Tier,
};
use crate::tables::Snapshot;

/// One end of a packet.
#[derive(Clone, Debug, Default)]
pub struct End {
    /// What it is called in the answer.
    pub name: String,
    /// Who it is on every node; `None`: nobody of the cluster.
    pub base: Option<IdentityId>,
    /// A pod's labels.
    pub labels: Option<Arc<IdentityLabels>>,
    /// Its addresses, as far as they are known.
    pub addresses: Vec<IpAddr>,
    /// The rules that name it by a name of DNS.
    pub names: Arc<[DnsRule]>,
}

/// What the packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Packet {
    /// IP protocol number.
    pub protocol: u8,
    /// The responder's port, or the type of ICMP.
    pub port: u16,
}

impl fmt::Display for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.port, IpProtocol(self.protocol))
    }
}

/// What policy says of a packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// Both ends allow it.
    pub is_allowed: bool,
    /// At the pod that sends it.
    pub egress: Weighing,
    /// At the pod that gets it.
    pub ingress: Weighing,
}

/// What policy says at one end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Weighing {
    /// The end.
    pub end: String,
    /// It may pass here.
    pub is_allowed: bool,
    /// It may because what denies it is only reported.
    pub is_audit: bool,
    /// The tier that decided; `None`: nothing is enforced, or no tier decided.
    pub tier: Option<String>,
    /// The rules that decided; none: by default.
    pub decided_by: Vec<RuleRef>,
    /// Where nothing matched, the policies that isolate the pod.
    pub isolated_by: Vec<PolicyRef>,
    /// Every rule of the policies that select the pod, and whether it matches.
    pub rules: Vec<Considered>,
    /// What would change it.
    pub change: String,
    /// What could not be judged.
    pub unknown: Vec<String>,
    /// The rules by which a proxy judges each request of what may pass.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layer7: Option<String>,
}

/// A rule of a policy, by its place among those of its direction.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RuleRef {
    /// The policy.
    pub policy: PolicyRef,
    /// From 0.
    pub rule: usize,
    /// What it says.
    pub action: Action,
}

/// A rule, and what came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Considered {
    /// Which.
    pub rule: RuleRef,
    /// `matches`, `another peer` or `another port`.
    pub outcome: String,
}

/// What is asked, with what it is to be answered by.
pub struct Question<'a> {
    /// Resolved.
    pub policies: &'a Snapshot<PolicyRef, Arc<Policy>>,
    /// Which labels count.
    pub filter: &'a LabelFilter,
    /// Who begins.
    pub from: &'a End,
    /// Who is spoken to.
    pub to: &'a End,
    /// By what.
    pub packet: Packet,
}

impl Question<'_> {
    /// The answer, for both ends.
    pub fn answer(&self) -> Explanation {
        let egress = self.weigh(self.from, self.to, |policy| policy.egress.as_ref(), false);
        let ingress = self.weigh(self.to, self.from, |policy| policy.ingress.as_ref(), true);
        Explanation { is_allowed: egress.is_allowed && ingress.is_allowed, egress, ingress }
    }

    fn weigh(
        &self,
        end: &End,
        other: &End,
        side: impl Fn(&Policy) -> Option<&PolicyDirection>,
        is_ingress: bool,
    ) -> Weighing {
        let mut weighing = Weighing {
            end: end.name.clone(),
            is_allowed: true,
            is_audit: false,
            tier: None,
            decided_by: Vec::new(),
            isolated_by: Vec::new(),
            rules: Vec::new(),
            change: String::new(),
            unknown: Vec::new(),
            layer7: None,
        };
        let Some(labels) = &end.labels else {
            weighing.change = "no policy applies to what is no pod".to_owned();
            return weighing;
        };
        if is_ingress && other.base == Some(IdentityId::HOST) {
            weighing.change = "a node may always reach its own pods".to_owned();
            return weighing;
        }
        let selecting = self.policies.values().filter(|policy| selects(policy, labels));
        let mut claims: Vec<(Claim, Option<RuleRef>)> = Vec::new();
        for (policy, direction) in selecting.filter_map(|policy| Some((policy, side(policy)?))) {
            if direction.default == Action::Deny {
                weighing.isolated_by.push(policy.reference.clone());
                claims.push((
                    claim(Order::default_of(policy.tier), Action::Deny, None, policy.marks.audit, None),
                    None,
                ));
            }
            let named = if is_ingress { Some(&**labels) } else { other.labels.as_deref() };
            for (position, rule) in direction.rules.iter().enumerate() {
                let reference =
                    RuleRef { policy: policy.reference.clone(), rule: position, action: rule.action };
                let outcome = self.outcome(policy, rule, other, named, &mut weighing.unknown);
                if outcome == MATCHES {
                    let order = Order {
                        tier: policy.tier,
                        priority: policy.priority,
                        position: if policy.tier.is_ordered() {
                            u32::try_from(position).unwrap_or(u32::MAX)
                        } else {
                            0
                        },
                    };
                    claims.push((
                        claim(
                            order,
                            rule.action,
                            Some(&policy.reference),
                            policy.marks.audit,
                            rule.l7.as_ref(),
                        ),
                        Some(reference.clone()),
                    ));
                }
                weighing.rules.push(Considered { rule: reference, outcome: outcome.to_owned() });
            }
        }
        decide(&mut weighing, &claims);
        weighing
    }

    fn outcome(
        &self,
        policy: &Policy,
        rule: &PolicyRule,
        other: &End,
        named: Option<&IdentityLabels>,
        unknown: &mut Vec<String>,
    ) -> &'static str {
        if let Some(peers) = &rule.peers {
            let is_by_address = |peer: &Peer| {
                matches!(
                    peer,
                    Peer::Block { .. } | Peer::Outside { .. } | Peer::NodeAddresses(_) | Peer::Name(_)
                )
            };
            if other.addresses.is_empty() && peers.iter().any(is_by_address) {
                let said =
                    format!("no address of {} is known: rules about addresses do not match", other.name);
                if !unknown.contains(&said) {
                    unknown.push(said);
                }
            }
            if !peers.iter().any(|peer| self.is_peer(policy, peer, other)) {
                return "another peer";
            }
        }
        if rule.ports.as_ref().is_some_and(|ports| !ports.iter().any(|port| self.is_port(port, named))) {
            return "another port";
        }
        MATCHES
    }

    fn is_peer(&self, policy: &Policy, peer: &Peer, other: &End) -> bool {
        let prefixes: BTreeSet<IpNet> = match peer {
            Peer::Block { cidr, except } | Peer::Outside { cidr, except } => {
                std::iter::once(*cidr).chain(except.iter().copied()).map(|net| net.trunc()).collect()
            }
            Peer::NodeAddresses(addresses) => addresses.clone(),
            _ => BTreeSet::new(),
        };
        let covers = |net: &IpNet| other.addresses.iter().any(|address| net.contains(address));
        let member = Member {
            base: other.base,
            labels: other.labels.clone(),
            prefixes: prefixes.into_iter().filter(covers).collect(),
            names: other.names.clone(),
        };
        PeerKey::new(policy.reference.namespace.as_ref(), peer).matches(&member, self.filter)
    }

    fn is_port(&self, port: &crate::model::PortMatch, named: Option<&IdentityLabels>) -> bool {
        let Packet { protocol, port: number } = self.packet;
        port.protocol.0 == protocol
            && match &port.port {
                PortSelector::Any => true,
                PortSelector::Range(from, to) => (*from..=*to).contains(&number),
                PortSelector::Named(name) => named.is_some_and(|labels| {
                    let is_it = |known: &crate::model::NamedPort| {
                        known.protocol.number() == protocol && known.port == number
                    };
                    resolve(labels, name).iter().any(is_it)
                }),
            }
    }
}

const MATCHES: &str = "matches";

fn claim(
    order: Order,
    action: Action,
    policy: Option<&PolicyRef>,
    is_audit: bool,
    l7: Option<&Arc<L7Rules>>,
) -> Claim {
    let origins: Origins = policy.cloned().into_iter().collect();
    Claim { matched: Match::ANY, order, action, origins, is_audit, l7: l7.cloned() }
}

/// What a proxy does with what may pass.
fn judged(set: &L7Set) -> String {
    let rules = serde_json::to_string(&set.rules).unwrap_or_default();
    match set.visibility_only {
        true => format!("a proxy shows each request and denies none, as another rule allows all: {rules}"),
        false => format!("a proxy judges each request by {rules}"),
    }
}

/// The outcome as the compiler has it, and the rules of the tier that it comes from.
fn decide(weighing: &mut Weighing, claims: &[(Claim, Option<RuleRef>)]) {
    let rows = rules::flatten(claims.iter().map(|(claim, _)| claim));
    let action = rows.get(&Match::ANY).map_or(Action::Deny, |row| row.action);
    weighing.is_allowed = action == Action::Allow;
    weighing.is_audit = rows.get(&Match::ANY).is_some_and(|row| row.is_audit);
    weighing.layer7 = rows.get(&Match::ANY).and_then(|row| row.l7.as_deref()).map(judged);
    for tier in [Tier::Admin, Tier::Namespaced, Tier::Baseline] {
        let of_tier = || claims.iter().filter(|(claim, _)| claim.order.tier == tier);
        let Some((order, action)) = of_tier().map(|(claim, _)| (claim.order, claim.action)).min() else {
            continue;
        };
        if action == Action::Pass {
            continue;
        }
        let deciding = of_tier().filter(|(claim, _)| (claim.order, claim.action) == (order, action));
        weighing.decided_by = deciding.filter_map(|(_, rule)| rule.clone()).collect();
        weighing.tier = Some(format!("{tier:?}"));
        break;
    }
    weighing.change = change(weighing);
}

fn change(weighing: &Weighing) -> String {
    let names = |policies: &mut dyn Iterator<Item = &PolicyRef>| {
        let names: BTreeSet<String> = policies.map(ToString::to_string).collect();
        names.into_iter().collect::<Vec<_>>().join(", ")
    };
    let deciding = names(&mut weighing.decided_by.iter().map(|rule| &rule.policy));
    let isolating = names(&mut weighing.isolated_by.iter());
    match (weighing.is_allowed, weighing.decided_by.is_empty()) {
        (true, true) if weighing.rules.is_empty() => {
            "no policy selects it: one that selects it and has no rule for this denies it".to_owned()
        }
        (true, true) => "no rule that matches denies it".to_owned(),
        (true, false) => format!("without these rules of {deciding} it would be judged by the others"),
        (false, true) => {
            format!(
                "no rule of these policies allows it: {isolating}. A rule in any policy that selects the pod does"
            )
        }
        (false, false) => format!("a rule denies it, and no allow of its tier counts against it: {deciding}"),
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", if self.is_allowed { "ALLOWED" } else { "DENIED" })?;
        for (name, weighing) in [("egress", &self.egress), ("ingress", &self.ingress)] {
            let verdict = match (weighing.is_allowed, weighing.is_audit) {
                (true, true) => "allowed, and reported as AUDIT: it is denied",
                (true, false) => "allowed",
                (false, _) => "denied",
            };
            write!(f, "{name} of {}: {verdict}", weighing.end)?;
            match &weighing.tier {
                Some(tier) => writeln!(f, " in the tier {tier}")?,
                None => writeln!(f)?,
            }
            for rule in &weighing.decided_by {
                writeln!(f, "  decided by {} {name}[{}] ({:?})", rule.policy, rule.rule, rule.action)?;
            }
            if let Some(layer7) = &weighing.layer7 {
                writeln!(f, "  {layer7}")?;
            }
            writeln!(f, "  {}", weighing.change)?;
            for Considered { rule, outcome } in &weighing.rules {
                writeln!(f, "  - {} {name}[{}] {:?}: {outcome}", rule.policy, rule.rule, rule.action)?;
            }
            for unknown in &weighing.unknown {
                writeln!(f, "  ? {unknown}")?;
            }
        }
        Ok(())
    }
}

/// The answer as text, without the last line's end.
pub fn text(explanation: &Explanation) -> String {
    let mut text = String::new();
    let _ = write!(text, "{explanation}");
    text.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Labels, ObjectKey, PolicyKind, PortMatch, Requirement, Selector, Subject};

    fn pod(namespace: &str, app: &str) -> End {
        let labels = IdentityLabels {
            namespace: namespace.to_owned(),
            pod_labels: Labels::from([("app".to_owned(), app.to_owned())]),
            ..IdentityLabels::default()
        };
        End {
            name: format!("{namespace}/{app}"),
            base: Some(IdentityId(300)),
            labels: Some(Arc::new(labels)),
            ..End::default()
        }
    }

    fn is(app: &str) -> Selector {
        Selector::new(vec![Requirement::In("app".to_owned(), BTreeSet::from([app.to_owned()]))])
    }

    fn policy(kind: PolicyKind, name: &str, tier: Tier, default: Action, rules: Vec<PolicyRule>) -> Policy {
        let namespace = if kind == PolicyKind::NetworkPolicy { "shop" } else { "" };
        Policy {
            reference: PolicyRef::new(kind, &ObjectKey::new(namespace, name)),
            subject: Subject::Pods { namespaces: Selector::default(), pods: is("db") },
            tier,
            priority: 0,
            ingress: Some(PolicyDirection { default, rules }),
            egress: None,
            marks: Default::default(),
            others: vec![],
            doubts: vec![],
        }
    }

    fn rule(action: Action, app: &str, port: u16) -> PolicyRule {
        let ports = vec![PortMatch { protocol: IpProtocol(6), port: PortSelector::Range(port, port) }];
        PolicyRule::new(action, Some(vec![Peer::Pods { namespaces: None, pods: is(app) }]), Some(ports))
    }

    fn ask(policies: &[Policy], from: &End, to: &End, port: u16) -> Explanation {
        let row = |policy: &Policy| (policy.reference.clone(), Arc::new(policy.clone()));
        let policies = policies.iter().map(row).collect();
        let packet = Packet { protocol: 6, port };
        Question { policies: &policies, filter: &LabelFilter::default(), from, to, packet }.answer()
    }

    #[test]
    fn the_deciding_rule_is_named_and_so_is_who_isolates() {
        use Action::{Allow, Deny, Pass};
        let db =
            policy(PolicyKind::NetworkPolicy, "db", Tier::Namespaced, Deny, vec![rule(Allow, "web", 5432)]);
        let admin =
            policy(PolicyKind::ClusterNetworkPolicy, "guard", Tier::Admin, Pass, vec![rule(Deny, "web", 22)]);
        let all = [db, admin];
        let (web, other, db) = (pod("shop", "web"), pod("shop", "other"), pod("shop", "db"));
        let allowed = ask(&all, &web, &db, 5432);
        assert!(allowed.is_allowed && allowed.egress.is_allowed);
        assert_eq!(allowed.ingress.decided_by.len(), 1);
        assert_eq!(allowed.ingress.decided_by[0].policy.to_string(), "NetworkPolicy shop/db");
        assert_eq!(allowed.ingress.tier.as_deref(), Some("Namespaced"));

        let by_default = ask(&all, &other, &db, 5432).ingress;
        assert!(!by_default.is_allowed && by_default.decided_by.is_empty());
        assert_eq!(
            by_default.isolated_by.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["NetworkPolicy shop/db"]
        );
        assert!(by_default.change.starts_with("no rule of these policies allows it: NetworkPolicy shop/db"));
        let outcomes: Vec<&str> = by_default.rules.iter().map(|rule| rule.outcome.as_str()).collect();
        assert_eq!(outcomes, ["another peer", "another peer"]);

        let denied = ask(&all, &web, &db, 22).ingress;
        assert!(!denied.is_allowed);
        assert_eq!(denied.tier.as_deref(), Some("Admin"));
        assert_eq!(denied.decided_by[0].policy.to_string(), "ClusterNetworkPolicy guard");
        assert!(text(&ask(&all, &web, &db, 22)).starts_with("DENIED\negress of shop/web: allowed\n"));
    }

    #[test]
    fn who_judges_requests_is_said() {
        let http = L7Rules::Http(vec![Default::default()]);
        let judged = PolicyRule { l7: Some(Arc::new(http)), ..rule(Action::Allow, "web", 80) };
        let of = |rules| policy(PolicyKind::CiliumNetworkPolicy, "db", Tier::Namespaced, Action::Deny, rules);
        let (web, db) = (pod("shop", "web"), pod("shop", "db"));
        let answer = ask(&[of(vec![judged.clone()])], &web, &db, 80);
        assert!(answer.is_allowed);
        assert!(text(&answer).contains("\n  a proxy judges each request by {\"http\":[{}]}\n"), "{answer}");
        let shown = ask(&[of(vec![judged, rule(Action::Allow, "web", 80)])], &web, &db, 80).ingress;
        assert!(shown.layer7.is_some_and(|said| said.contains("denies none")));
        assert_eq!(ask(&[], &web, &db, 80).ingress.layer7, None);
    }

    #[test]
    fn a_name_matches_what_it_means_now() {
        let name = DnsRule::MatchName("a.test".into());
        let by_name = PolicyRule::new(Action::Allow, Some(vec![Peer::Name(name.clone())]), None);
        let of = |rules| Policy {
            ingress: None,
            egress: Some(PolicyDirection { default: Action::Deny, rules }),
            ..policy(PolicyKind::CiliumNetworkPolicy, "db", Tier::Namespaced, Action::Deny, vec![])
        };
        let all = [of(vec![by_name])];
        let address = vec!["192.0.2.1".parse().expect("an address")];
        let mut there = End { name: "192.0.2.1".into(), addresses: address, ..End::default() };
        let db = pod("shop", "db");
        assert!(!ask(&all, &db, &there, 443).is_allowed);
        there.names = [name].into();
        assert!(ask(&all, &db, &there, 443).is_allowed);
        there.base = Some(IdentityId::REMOTE_NODE);
        assert!(!ask(&all, &db, &there, 443).is_allowed, "a node is no name");
    }

    #[test]
    fn rules_about_addresses_need_one() {
        let block = Peer::Block { cidr: "10.0.0.0/8".parse().expect("a CIDR"), except: vec![] };
        let by_address = PolicyRule::new(Action::Allow, Some(vec![block]), None);
        let all = [policy(PolicyKind::NetworkPolicy, "db", Tier::Namespaced, Action::Deny, vec![by_address])];
        let (mut web, db) = (pod("shop", "web"), pod("shop", "db"));
        let unknown = ask(&all, &web, &db, 80).ingress;
        assert!(!unknown.is_allowed && unknown.unknown.len() == 1);
        web.addresses = vec!["10.1.1.1".parse().expect("an address")];
        assert!(ask(&all, &web, &db, 80).is_allowed);
    }
}
