//! NetworkPolicy (networking.k8s.io/v1), read to the letter.
//!
//! What is absent and what is empty differ in places: `from: []` and no `from` are
//! everyone, `ports: []` and no `ports` are every port, but `podSelector: {}` is every
//! pod where no `podSelector` leaves the namespaces' one to decide.

use std::collections::BTreeSet;
use std::sync::Arc;

use ipnet::IpNet;

use crate::identity::LabelFilter;
use crate::kube::Tables;
use crate::kube::convert::{Field, Notes, ObjectId, Result, check_labels, items, marks, names};
use crate::kube::kind::{Meta, ObjectKind};
use crate::kube::rows::{self, Rows};
use crate::model::{
    Action, Labels, Peer, Policy, PolicyDirection, PolicyRef, PolicyRule, PortMatch, PortSelector,
    Requirement, Selector, Subject, Tier,
};

/// networking.k8s.io/v1
pub struct NetworkPolicy;

impl ObjectKind for NetworkPolicy {
    const META: Meta = Meta {
        name: "NetworkPolicy",
        plural: "networkpolicies",
        group: "networking.k8s.io",
        doubt: "the policy isolates what it selects and allows only what can be read of it",
        ..Meta::CORE
    };
    type Row = Policy;

    fn read(id: &ObjectId, document: &Field, notes: &mut Notes) -> Result<Option<Policy>> {
        Ok(Some(network_policy(id, document, notes)))
    }

    /// Whom it selects is isolated; what its rules would allow is not known.
    fn read_other_version(id: &ObjectId, document: &Field, notes: &mut Notes) -> Option<Policy> {
        let isolating = || Some(PolicyDirection { default: Action::Deny, rules: Vec::new() });
        let Policy { reference, subject, .. } = network_policy(id, document, &mut Notes::default());
        let version = document.get("apiVersion").ok()?;
        let given = version.string().ok()?.unwrap_or_default();
        notes.doubt(version.error(format!("{given:?} is not read; write {}", Self::KIND.api_version())));
        Some(Policy {
            reference,
            subject,
            tier: Tier::Namespaced,
            priority: 0,
            ingress: isolating(),
            egress: isolating(),
            marks: marks(document, &mut notes.warnings),
            others: Vec::new(),
            doubts: notes.texts(),
        })
    }

    fn rows(tables: &Arc<Tables>) -> Box<dyn Rows<Policy>> {
        rows::plain(tables.policies.clone(), PolicyRef::network_policy)
    }
}

/// Reads as much of a policy as can be read. There is a policy in any case: what cannot be read
/// of its selector selects all, and what cannot be read of its rules allows nothing.
fn network_policy(id: &ObjectId, document: &Field, notes: &mut Notes) -> Policy {
    notes.read(document.only_known(&["apiVersion", "kind", "metadata", "spec", "status"]));
    let (subject, ingress, egress) = match notes.read(document.get("spec")) {
        Some(spec) => parts(&spec, notes),
        None => (Selector::default(), Some(Vec::new()), Some(Vec::new())),
    };
    let isolating = |rules: Vec<PolicyRule>| PolicyDirection { default: Action::Deny, rules };
    Policy {
        reference: PolicyRef::network_policy(&id.key),
        subject: Subject::Pods { namespaces: Selector::default(), pods: subject },
        tier: Tier::Namespaced,
        priority: 0,
        ingress: ingress.map(isolating),
        egress: egress.map(isolating),
        marks: marks(document, &mut notes.warnings),
        others: Vec::new(),
        doubts: notes.texts(),
    }
}

type Rules = Option<Vec<PolicyRule>>;

/// The selector of the subject, and the rules of the directions that the policy is about.
fn parts(spec: &Field, notes: &mut Notes) -> (Selector, Rules, Rules) {
    let is_known =
        notes.read(spec.only_known(&["podSelector", "policyTypes", "ingress", "egress"])).is_some();
    let ingress = rules(spec, "ingress", "from", notes);
    let before = notes.doubt_count();
    let egress = rules(spec, "egress", "to", notes);
    let is_read = is_known && notes.doubt_count() == before;
    let (is_ingress, is_egress) = match notes.read(policy_types(spec)) {
        Some(Some(types)) => types,
        // A rule for egress may be in what was not read.
        Some(None) => (true, !egress.is_empty() || !is_read),
        None => (true, true),
    };
    let before = notes.doubt_count();
    let subject = subject(spec, notes);
    // A selector that cannot be read selects pods that nobody meant: they are isolated, and allowed nothing.
    let may_allow = notes.doubt_count() == before;
    let allowed = |rules: Vec<PolicyRule>| if may_allow { rules } else { Vec::new() };
    (subject, is_ingress.then(|| allowed(ingress)), is_egress.then(|| allowed(egress)))
}

/// Whether ingress and egress are named; `None` when the field is absent or empty.
fn policy_types(spec: &Field) -> Result<Option<(bool, bool)>> {
    let types = items(&spec.get("policyTypes")?)?;
    if types.is_empty() {
        return Ok(None);
    }
    let (mut ingress, mut egress) = (false, false);
    for item in types {
        match item.required_string()? {
            "Ingress" => ingress = true,
            "Egress" => egress = true,
            other => return Err(item.error(format!("{other:?} is not Ingress or Egress"))),
        }
    }
    Ok(Some((ingress, egress)))
}

/// The rules of a direction, less those that cannot be read.
fn rules(spec: &Field, direction: &str, peers: &str, notes: &mut Notes) -> Vec<PolicyRule> {
    let list = notes.read(spec.get(direction).and_then(|list| items(&list))).unwrap_or_default();
    let mut rules = Vec::new();
    for rule in &list {
        let fields =
            rule.only_known(&[peers, "ports"]).and_then(|()| Ok((rule.get(peers)?, rule.get("ports")?)));
        let Some((from, ports)) = notes.read(fields) else { continue };
        let Some(peers) = collect(&from, notes, peer) else { continue };
        let Some(ports) = collect(&ports, notes, |field, _| port(field)) else { continue };
        rules.push(PolicyRule::new(Action::Allow, peers, ports));
    }
    rules
}

/// The elements that can be read, of a list of which "none" means "all": `Some(None)`. A list of which
/// nothing can be read is an empty one, which matches nothing.
fn collect<T>(
    list: &Field,
    notes: &mut Notes,
    mut read: impl FnMut(&Field, &mut Notes) -> Result<T>,
) -> Option<Option<Vec<T>>> {
    let items = notes.read(items(list))?;
    if items.is_empty() {
        return Some(None);
    }
    let mut all = Vec::new();
    for item in &items {
        let outcome = read(item, notes);
        all.extend(notes.read(outcome));
    }
    Some(Some(all))
}

fn peer(peer: &Field, notes: &mut Notes) -> Result<Peer> {
    peer.only_known(&["podSelector", "namespaceSelector", "ipBlock"])?;
    let (pods, namespaces) = (peer.get("podSelector")?, peer.get("namespaceSelector")?);
    let block = peer.get("ipBlock")?;
    match (block.is_present(), pods.is_present() || namespaces.is_present()) {
        (true, true) => Err(peer.error("has ipBlock and a selector; a peer is either addresses or pods")),
        (true, false) => ip_block(&block),
        (false, true) => {
            let selected = selector(&pods)?;
            notes.warnings.extend(LabelFilter::default().undecidable(&selected).map(|label| {
                pods.error(format!(
                    "whether a pod is without {label} cannot be told: none is let in for that"
                ))
            }));
            let namespaces = namespaces.is_present().then(|| selector(&namespaces)).transpose()?;
            Ok(Peer::Pods { namespaces, pods: selected })
        }
        (false, false) => {
            Err(peer.error("is empty; one of podSelector, namespaceSelector and ipBlock is required"))
        }
    }
}

fn ip_block(block: &Field) -> Result<Peer> {
    block.only_known(&["cidr", "except"])?;
    let cidr = block.get("cidr")?.cidr()?;
    let inside = |field: &Field| {
        let except: IpNet = field.cidr()?;
        if cidr.contains(&except) && cidr != except {
            Ok(except)
        } else {
            Err(field.error(format!("{except} is not a part of cidr {cidr}")))
        }
    };
    let except = items(&block.get("except")?)?.iter().map(inside).collect::<Result<_>>()?;
    Ok(Peer::Block { cidr, except })
}

fn port(field: &Field) -> Result<PortMatch> {
    field.only_known(&["protocol", "port", "endPort"])?;
    let protocol = field.get("protocol")?.protocol()?.into();
    let (first, last) = (field.get("port")?, field.get("endPort")?);
    let end = last.port()?;
    let port = match (port_name(&first)?, end) {
        (Some(name), None) => PortSelector::Named(name.to_owned()),
        (Some(_), Some(_)) => return Err(last.error("needs a numeric port beside it")),
        (None, end) => match (first.port()?, end) {
            (None, None) => PortSelector::Any,
            (None, Some(_)) => return Err(last.error("needs port beside it")),
            (Some(port), None) => PortSelector::Range(port, port),
            (Some(port), Some(end)) if end >= port => PortSelector::Range(port, end),
            (Some(port), Some(end)) => return Err(last.error(format!("{end} is less than port {port}"))),
        },
    };
    Ok(PortMatch { protocol, port })
}

fn port_name<'a>(field: &Field<'a>) -> Result<Option<&'a str>> {
    // Numbers are read by the caller, with their own words.
    let Ok(Some(name)) = field.string() else { return Ok(None) };
    if names::is_port_name(name) {
        return Ok(Some(name));
    }
    Err(field.error(format!(
        "{name:?} is neither a number nor a port's name \
         (at most 15 lower-case letters, digits and single '-', at least one letter)"
    )))
}

/// Which pods a policy applies to, by what can be read of its selector: what cannot be read narrows
/// nothing. At its widest that is every pod of the namespace.
fn subject(spec: &Field, notes: &mut Notes) -> Selector {
    let Some(field) = notes.read(spec.get("podSelector")) else { return Selector::default() };
    notes.read(field.only_known(&["matchLabels", "matchExpressions"]));
    let mut requirements = Vec::new();
    if let Some(equals) = notes.read(field.get("matchLabels")) {
        for (key, value) in notes.read(equals.entries()).unwrap_or_default() {
            requirements.extend(notes.read(equal_label(&equals, key, &value)));
        }
    }
    let expressions = field.get("matchExpressions").and_then(|list| items(&list));
    for expression in notes.read(expressions).unwrap_or_default() {
        requirements.extend(notes.read(requirement(&expression, check_key)));
    }
    Selector::new(requirements)
}

fn equal_label(equals: &Field, key: &str, value: &Field) -> Result<Requirement> {
    let text = value.string()?.unwrap_or("");
    let labels = Labels::from([(key.to_owned(), text.to_owned())]);
    check_labels(equals, &labels)?;
    Ok(Requirement::In(key.to_owned(), BTreeSet::from([text.to_owned()])))
}

/// A label selector; an absent one is the empty one, which selects everything.
pub(super) fn selector(field: &Field) -> Result<Selector> {
    field.only_known(&["matchLabels", "matchExpressions"])?;
    let equals = field.get("matchLabels")?;
    let labels = equals.strings()?;
    check_labels(&equals, &labels)?;
    let mut requirements: Vec<Requirement> =
        labels.into_iter().map(|(key, value)| Requirement::In(key, BTreeSet::from([value]))).collect();
    for expression in items(&field.get("matchExpressions")?)? {
        requirements.push(requirement(&expression, check_key)?);
    }
    Ok(Selector::new(requirements))
}

fn check_key(name: &str, field: &Field) -> Result<()> {
    match names::is_label_key(name) {
        true => Ok(()),
        false => Err(field.error(format!("{name:?} is not a label key"))),
    }
}

/// One line of matchExpressions. `check_key` says which keys there are.
pub fn requirement(expression: &Field, check_key: fn(&str, &Field) -> Result<()>) -> Result<Requirement> {
    expression.only_known(&["key", "operator", "values"])?;
    let key = expression.get("key")?;
    let name = key.required_string()?.to_owned();
    check_key(&name, &key)?;
    let list = expression.get("values")?;
    let values = values(&list)?;
    let operator = expression.get("operator")?;
    let of_values = |make: fn(String, BTreeSet<String>) -> Requirement| match values.is_empty() {
        true => Err(list.error("is required with operators In and NotIn")),
        false => Ok(make(name.clone(), values.clone())),
    };
    let of_presence = |make: fn(String) -> Requirement| match values.is_empty() {
        true => Ok(make(name.clone())),
        false => Err(list.error("must be empty with operators Exists and DoesNotExist")),
    };
    match operator.required_string()? {
        "In" => of_values(Requirement::In),
        "NotIn" => of_values(Requirement::NotIn),
        "Exists" => of_presence(Requirement::Exists),
        "DoesNotExist" => of_presence(Requirement::DoesNotExist),
        other => Err(operator.error(format!("{other:?} is not In, NotIn, Exists or DoesNotExist"))),
    }
}

fn values(list: &Field) -> Result<BTreeSet<String>> {
    let value = |field: &Field| match field.string()? {
        None => Err(field.error("is absent, must be a string")),
        Some(text) if names::is_label_value(text) => Ok(text.to_owned()),
        Some(text) => Err(field.error(format!("{text:?} is not a label value"))),
    };
    items(list)?.iter().map(value).collect()
}
