//! NetworkPolicy (networking.k8s.io/v1), read to the letter.
//!
//! What is absent and what is empty differ in places: `from: []` and no `from` are
//! everyone, `ports: []` and no `ports` are every port, but `podSelector: {}` is every
//! pod where no `podSelector` leaves the namespaces' one to decide.

use std::collections::BTreeSet;

use ipnet::IpNet;

use super::{Field, FieldError, ObjectId, Result, check_labels, items, names};
use crate::identity;
use crate::model::{NetworkPolicy, Peer, PolicyRule, PortMatch, PortSelector, Requirement, Selector};

pub fn network_policy(
    id: &ObjectId,
    document: &Field,
    warnings: &mut Vec<FieldError>,
) -> Result<NetworkPolicy> {
    document.only(&["apiVersion", "kind", "metadata", "spec", "status"])?;
    let spec = document.get("spec")?;
    spec.only(&["podSelector", "policyTypes", "ingress", "egress"])?;
    let pod_selector = selector(&spec.get("podSelector")?)?;
    let ingress = rules(&spec.get("ingress")?, "from", warnings)?;
    let egress = rules(&spec.get("egress")?, "to", warnings)?;
    let (is_ingress, is_egress) = match policy_types(&spec.get("policyTypes")?)? {
        Some(types) => types,
        None => (true, !egress.is_empty()),
    };
    Ok(NetworkPolicy {
        key: id.key.clone(),
        pod_selector,
        ingress: is_ingress.then_some(ingress),
        egress: is_egress.then_some(egress),
    })
}

/// Whether ingress and egress are named; `None` when the field is absent or empty.
fn policy_types(field: &Field) -> Result<Option<(bool, bool)>> {
    let types = items(field)?;
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

fn rules(list: &Field, peers: &str, warnings: &mut Vec<FieldError>) -> Result<Vec<PolicyRule>> {
    let rule = |rule: &Field| {
        rule.only(&[peers, "ports"])?;
        Ok(PolicyRule {
            peers: collect(&rule.get(peers)?, |field| peer(field, warnings))?,
            ports: collect(&rule.get("ports")?, port)?,
        })
    };
    items(list)?.iter().map(rule).collect()
}

/// The elements of a list of which "none" means "all".
fn collect<T>(list: &Field, read: impl FnMut(&Field) -> Result<T>) -> Result<Option<Vec<T>>> {
    match items(list)? {
        items if items.is_empty() => Ok(None),
        items => Ok(Some(items.iter().map(read).collect::<Result<_>>()?)),
    }
}

fn peer(peer: &Field, warnings: &mut Vec<FieldError>) -> Result<Peer> {
    peer.only(&["podSelector", "namespaceSelector", "ipBlock"])?;
    let (pods, namespaces) = (peer.get("podSelector")?, peer.get("namespaceSelector")?);
    let block = peer.get("ipBlock")?;
    match (block.is_present(), pods.is_present() || namespaces.is_present()) {
        (true, true) => Err(peer.error("has ipBlock and a selector; a peer is either addresses or pods")),
        (true, false) => ip_block(&block),
        (false, true) => {
            let selected = selector(&pods)?;
            warnings.extend(identity::undecidable_labels(&selected).map(|label| {
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
    block.only(&["cidr", "except"])?;
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
    field.only(&["protocol", "port", "endPort"])?;
    let protocol = field.get("protocol")?.protocol()?;
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

/// A label selector; an absent one is the empty one, which selects everything.
fn selector(field: &Field) -> Result<Selector> {
    field.only(&["matchLabels", "matchExpressions"])?;
    let equals = field.get("matchLabels")?;
    let labels = equals.strings()?;
    check_labels(&equals, &labels)?;
    let mut requirements: Vec<Requirement> =
        labels.into_iter().map(|(key, value)| Requirement::In(key, BTreeSet::from([value]))).collect();
    for expression in items(&field.get("matchExpressions")?)? {
        requirements.push(requirement(&expression)?);
    }
    requirements.sort_unstable();
    requirements.dedup();
    Ok(Selector { requirements })
}

fn requirement(expression: &Field) -> Result<Requirement> {
    expression.only(&["key", "operator", "values"])?;
    let key = expression.get("key")?;
    let name = key.required_string()?.to_owned();
    if !names::is_label_key(&name) {
        return Err(key.error(format!("{name:?} is not a label key")));
    }
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
