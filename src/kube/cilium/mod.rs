//! Cilium's policies (cilium.io/v2), read to the letter: both kinds have one body.
//!
//! What cannot be read of a rule that allows, allows nothing; what cannot be read of a rule that denies,
//! denies all that the rest of it names. What Weir does not enforce yet (TLS of its own, authentication) allows nothing either, and denies nothing: the policy says so.

mod layer7;
mod peers;
mod ports;
pub(super) mod selector;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use super::convert::{Field, FieldError, Notes, ObjectId, items, marks};
use crate::model::l7::L7Rules;
use crate::model::{
    Action, Marks, Peer, Policy, PolicyDirection, PolicyKind, PolicyRef, PolicyRule, PortMatch, Selector,
    Subject, Tier,
};

/// Reads as much of a policy as can be read; there is one in any case.
pub fn policy(kind: PolicyKind, id: &ObjectId, document: &Field, notes: &mut Notes) -> Policy {
    let reference = PolicyRef::new(kind, &id.key);
    let mut reader = Reader { namespace: reference.namespace.clone(), notes, unenforced: Vec::new() };
    let mut specs = reader.specs(document);
    let count = specs.len();
    let mut policies = specs.drain(..).zip(0..).map(|(spec, number)| {
        let mut policy = reader.policy(&reference, &spec);
        policy.reference.spec = number;
        policy
    });
    let first = policies.next();
    let others: Vec<Policy> = policies.collect();
    let mut policy = first.unwrap_or_else(|| nothing(&reference));
    if count == 0 {
        let missing = document.error("has neither spec nor specs: it says nothing");
        reader.notes.doubt(missing);
    }
    policy.others = others;
    policy.marks = marks(document, &mut reader.notes.warnings);
    let marks = policy.marks;
    policy.others.iter_mut().for_each(|other| other.marks = marks);
    let unenforced = std::mem::take(&mut reader.unenforced);
    policy.doubts = notes.texts();
    policy.doubts.extend(unenforced.iter().map(ToString::to_string));
    notes.warnings.extend(unenforced);
    policy
}

/// A policy that selects nobody.
fn nothing(reference: &PolicyRef) -> Policy {
    Policy {
        reference: reference.clone(),
        subject: Subject::Pods { namespaces: Selector::default(), pods: Selector::nothing() },
        tier: Tier::Namespaced,
        priority: 0,
        ingress: None,
        egress: None,
        marks: Marks::default(),
        others: Vec::new(),
        doubts: Vec::new(),
    }
}

/// Which way the rules of a list look.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Ingress,
    Egress,
}

/// What is read of one object.
struct Reader<'a> {
    /// The policy's own; `None` for the cluster's.
    namespace: Option<Arc<str>>,
    notes: &'a mut Notes,
    /// What is read and not enforced yet.
    unenforced: Vec<FieldError>,
}

const SPEC: [&str; 10] = [
    "endpointSelector",
    "nodeSelector",
    "ingress",
    "ingressDeny",
    "egress",
    "egressDeny",
    "labels",
    "description",
    "enableDefaultDeny",
    "log",
];

impl Reader<'_> {
    fn specs<'a>(&mut self, document: &Field<'a>) -> Vec<Field<'a>> {
        let known = ["apiVersion", "kind", "metadata", "spec", "specs", "status"];
        self.notes.read(document.only_known(&known));
        let single = self.notes.read(document.get("spec")).filter(Field::is_present);
        let list = document.get("specs").and_then(|list| items(&list));
        single.into_iter().chain(self.notes.read(list).unwrap_or_default()).collect()
    }

    fn policy(&mut self, reference: &PolicyRef, spec: &Field) -> Policy {
        let is_known = self.notes.read(spec.only_known(&SPEC)).is_some();
        let before = self.notes.doubt_count();
        let subject = self.subject(spec);
        let may_allow = self.notes.doubt_count() == before;
        let is_everybody = matches!(&subject, Subject::Pods { namespaces, pods }
            if namespaces.requirements.is_empty() && pods.requirements.is_empty());
        if self.namespace.is_none() && !may_allow && is_everybody {
            // One typo would close the cluster (docs/decisions/010-doubt-is-closed.md).
            return nothing(reference);
        }
        let ingress = self.direction(spec, Side::Ingress, !is_known, may_allow);
        let egress = self.direction(spec, Side::Egress, !is_known, may_allow);
        Policy { subject, ingress, egress, ..nothing(reference) }
    }

    /// Whom a spec applies to: what cannot be read of the selector narrows nothing.
    fn subject(&mut self, spec: &Field) -> Subject {
        let (endpoints, nodes) = (spec.get("endpointSelector"), spec.get("nodeSelector"));
        let endpoints = self.notes.read(endpoints).filter(Field::is_present);
        let nodes = self.notes.read(nodes).filter(Field::is_present);
        let (None, Some(nodes)) = (&endpoints, nodes) else {
            return match endpoints {
                Some(endpoints) => self.endpoints(&endpoints),
                None => {
                    let missing = spec.error("has neither endpointSelector nor nodeSelector");
                    self.notes.doubt(missing);
                    Subject::Pods { namespaces: Selector::default(), pods: Selector::default() }
                }
            };
        };
        if self.namespace.is_some() {
            self.notes.doubt(nodes.error("only a CiliumClusterwideNetworkPolicy may select nodes"));
        }
        let read = selector::of_nodes(&nodes);
        // A selector that cannot be read selects no node: one typo would close all of them.
        Subject::Nodes(self.notes.read(read).unwrap_or_else(Selector::nothing))
    }

    /// `None`: it says nothing of that direction. Where the subject cannot be read, the policy selects pods that
    /// nobody meant (`may_allow` is false): it allows them nothing.
    fn direction(
        &mut self,
        spec: &Field,
        side: Side,
        is_doubtful: bool,
        may_allow: bool,
    ) -> Option<PolicyDirection> {
        let name = match side {
            Side::Ingress => "ingress",
            Side::Egress => "egress",
        };
        let before = self.notes.doubt_count();
        let allowing = self.list(spec, name);
        let denying = self.list(spec, &format!("{name}Deny"));
        let wanted = spec
            .get("enableDefaultDeny")
            .and_then(|wanted| wanted.only_known(&["ingress", "egress"]).map(|()| wanted))
            .and_then(|wanted| wanted.get(name)?.boolean());
        let wanted = self.notes.read(wanted).flatten();
        let is_unread = is_doubtful || self.notes.doubt_count() != before;
        let is_said = !allowing.is_empty() || !denying.is_empty();
        let is_isolating = is_unread || wanted.unwrap_or(is_said);
        if !is_said && !is_isolating {
            return None;
        }
        let mut rules = Vec::new();
        for (list, action) in [(denying, Action::Deny), (allowing, Action::Allow)] {
            for rule in list {
                let read = self.rule(&rule, side, action).unwrap_or_default();
                rules.extend(read.into_iter().filter(|rule| may_allow || rule.action != Action::Allow));
            }
        }
        let default = if is_isolating { Action::Deny } else { Action::Pass };
        Some(PolicyDirection { default, rules })
    }

    fn list<'a>(&mut self, spec: &Field<'a>, name: &str) -> Vec<Field<'a>> {
        let list = spec.get(name).and_then(|list| items(&list));
        self.notes.read(list).unwrap_or_default()
    }

    /// A rule, once for each set of rules of layer 7; `None`: it matches nothing, or nothing may be read into it.
    fn rule(&mut self, rule: &Field, side: Side, action: Action) -> Option<Vec<PolicyRule>> {
        let mut known = peers::fields(side).to_vec();
        known.extend(["toPorts", "icmps"]);
        if action == Action::Allow {
            known.push("authentication");
        }
        let is_known = self.notes.read(rule.only_known(&known)).is_some();
        if !is_known && action == Action::Allow {
            return None;
        }
        // Deny rules have no such field: what else they say counts.
        if action == Action::Allow && self.asks_for_authentication(rule) {
            return None;
        }
        let peers = self.peers(rule, side, action);
        let ports = self.ports(rule, action);
        // A rule that names neither peers nor ports matches nothing.
        let (peers, ports) = match (peers, ports) {
            (Named::Absent, Named::Absent) if is_known => return None,
            (peers, ports) => (peers.into_list()?, ports.into_list()?),
        };
        let Some(ports) = ports else { return Some(vec![PolicyRule::new(action, peers, None)]) };
        let mut rules: Vec<PolicyRule> = Vec::new();
        for (port, l7) in ports {
            match rules.iter_mut().find(|rule| rule.l7 == l7) {
                Some(rule) => rule.ports.get_or_insert_default().push(port),
                None => rules.push(PolicyRule { action, peers: peers.clone(), ports: Some(vec![port]), l7 }),
            }
        }
        Some(rules)
    }

    fn asks_for_authentication(&mut self, rule: &Field) -> bool {
        let mode = rule.get("authentication").and_then(|field| {
            let mode = field.get("mode")?;
            Ok(mode.string()?.is_some_and(|text| text != "disabled").then_some(mode))
        });
        match self.notes.read(mode) {
            Some(None) => false,
            Some(Some(mode)) => {
                self.unenforced
                    .push(mode.error("authentication is not enforced yet: the rule allows nothing"));
                true
            }
            None => true,
        }
    }

    /// Notes what is read and not enforced.
    fn not_yet(&mut self, field: &Field, what: &str) {
        self.unenforced.push(field.error(format!("{what} is not enforced yet: it allows nothing")));
    }
}

/// What a part of a rule names.
enum Named<T> {
    /// The part is not there.
    Absent,
    /// Everything.
    All,
    /// These; none of them is nothing.
    These(Vec<T>),
}

impl<T> Named<T> {
    /// As a rule has it; `None`: nothing.
    fn into_list(self) -> Option<Option<Vec<T>>> {
        match self {
            Self::Absent | Self::All => Some(None),
            Self::These(list) if list.is_empty() => None,
            Self::These(list) => Some(Some(list)),
        }
    }
}

type Peers = Named<Peer>;
/// A port, and what may be said there.
type PortRule = (PortMatch, Option<Arc<L7Rules>>);
type Ports = Named<PortRule>;
