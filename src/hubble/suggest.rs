//! From flows to policies: what was seen, for `weir policy suggest`, and the rule that would allow what was denied.

use super::convert::event_types;
use super::proto::flow::{Endpoint, Flow, Kafka, TrafficDirection, Verdict, layer4, layer7};
use super::view::{Side, deciding_denied, drop_reason, policy_name, protocol, sides};
use crate::flow::{DropReason, L4Protocol};
use crate::model::{IpProtocol, Labels};
use crate::policy::allow::{Asked, Denied, Rule, allow};
use crate::policy::suggest::{Other, Seen, Subject, Way};

/// A flow as the policies of one of its sides see it; `None` where it does not say who the other is.
pub fn seen(flow: &Flow, way: Way, other: &Side<'_>, port: u16) -> Option<Seen> {
    let other = if other.labels().iter().any(|label| label == "reserved:host") {
        Other::OwnNode
    } else {
        other_of(other)?
    };
    Some(Seen { way, other, protocol: ip_protocol(flow)?, port })
}

fn ip_protocol(flow: &Flow) -> Option<IpProtocol> {
    Some(match protocol(flow)? {
        L4Protocol::IcmpV4 => IpProtocol::ICMP,
        L4Protocol::IcmpV6 => IpProtocol::ICMPV6,
        protocol => IpProtocol(protocol.number()),
    })
}

/// A pod, or an address.
fn other_of(side: &Side<'_>) -> Option<Other> {
    match side.namespace() {
        "" => side.ip.map(Other::Address),
        namespace => Some(Other::Pod { namespace: namespace.to_owned(), labels: own_labels(side.labels()) }),
    }
}

/// A pod's own labels, of those of its identity.
pub fn own_labels(labels: &[String]) -> Labels {
    let own = labels.iter().filter_map(|label| label.strip_prefix("k8s:"));
    let own = own.filter(|label| !label.starts_with("io.kubernetes.") && !label.starts_with("io.cilium."));
    own.filter_map(|label| label.split_once('='))
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}

/// The rule that would allow a denied flow; or why there is none.
pub fn rule_for(flow: &Flow) -> Result<Rule, String> {
    if flow.verdict() != Verdict::Dropped {
        return Err("The flow was not dropped.".to_owned());
    }
    let reason = drop_reason(flow).ok_or("The flow does not say why it was dropped.")?;
    if reason == DropReason::POLICY_DENY {
        let by: Vec<String> = deciding_denied(flow).map(policy_name).collect();
        let by = if by.is_empty() { "the policy that denies it".to_owned() } else { by.join(", ") };
        return Err(format!("A deny rule counts before every allow: change {by} instead."));
    }
    if !reason.is_policy() {
        return Err("No policy dropped this flow, so no rule can allow it.".to_owned());
    }
    let [from, to] = sides(flow);
    let way = match flow.traffic_direction() {
        TrafficDirection::Egress => Way::Out,
        TrafficDirection::Ingress => Way::In,
        TrafficDirection::Unknown if to.namespace().is_empty() => Way::Out,
        TrafficDirection::Unknown => Way::In,
    };
    let (own, other) = if way == Way::In { (&to, &from) } else { (&from, &to) };
    if own.namespace().is_empty() {
        return Err("The flow does not say which pod the policy is for.".to_owned());
    }
    let seen = Seen {
        way,
        other: other_of(other).ok_or("The flow does not say who the other side is.")?,
        protocol: ip_protocol(flow).ok_or("The flow does not say by which protocol it came.")?,
        port: to.port,
    };
    let denied = Denied {
        subject: Subject { namespace: own.namespace().to_owned(), labels: own_labels(own.labels()) },
        seen,
        icmp: icmp_type(flow),
        request: asked(flow)?,
        entity: entity(other),
        names: [name(&from), name(&to)],
    };
    let mut rule = allow(&denied)?;
    rule.notes.extend(notes(flow, way, [&from, &to]));
    Ok(rule)
}

/// What else decides.
fn notes(flow: &Flow, way: Way, [from, to]: [&Side<'_>; 2]) -> Vec<String> {
    let mut notes = Vec::new();
    if let Some(service) = flow.destination_service.as_ref().filter(|service| !service.name.is_empty()) {
        let port = to.port;
        let name = format!("{}/{}", service.namespace, service.name);
        notes.push(format!("The client used Service {name}; rules name the backend's port, {port}."));
    }
    if way == Way::Out && !to.namespace().is_empty() {
        notes.push("The destination's own ingress policies still decide, too.".to_owned());
    }
    if way == Way::In && !from.namespace().is_empty() {
        notes.push("The source's egress policies let the flow pass; only this side denied it.".to_owned());
    }
    notes
}

/// What was asked, of a flow that a proxy denied.
fn asked(flow: &Flow) -> Result<Option<Asked>, String> {
    let is_request = flow.event_type.as_ref().is_some_and(|event| event.r#type == event_types::L7);
    let record = flow.l7.as_ref().and_then(|l7| l7.record.as_ref());
    Ok(match record {
        Some(layer7::Record::Http(http)) => {
            Some(Asked::Http(http.method.clone(), path_and_query(&http.url).to_owned()))
        }
        Some(layer7::Record::Dns(dns)) => Some(Asked::Dns(dns.query.clone())),
        Some(layer7::Record::Kafka(Kafka { api_key, topic, .. })) => {
            let topics = topic.split(',').filter(|topic| !topic.is_empty()).map(str::to_owned);
            Some(Asked::Kafka(api_key.clone(), topics.collect()))
        }
        None if !is_request => None,
        None => match flow.destination_names.first() {
            Some(name) => Some(Asked::ServerName(name.clone())),
            None => {
                let words = "The connection spoke none of the protocols that the port's rules are for.";
                return Err(words.to_owned());
            }
        },
    })
}

/// What follows the host in a URL.
fn path_and_query(url: &str) -> &str {
    match url.split_once("://") {
        Some((_, rest)) => rest.find('/').map_or("/", |at| &rest[at..]),
        None => url,
    }
}

fn icmp_type(flow: &Flow) -> Option<u8> {
    match flow.l4.as_ref()?.protocol.as_ref()? {
        layer4::Protocol::IcmPv4(icmp) => u8::try_from(icmp.r#type).ok(),
        layer4::Protocol::IcmPv6(icmp) => u8::try_from(icmp.r#type).ok(),
        _ => None,
    }
}

/// The reserved word for what is neither a pod nor the world.
fn entity(side: &Side<'_>) -> Option<String> {
    const ENTITIES: [&str; 5] = ["host", "remote-node", "kube-apiserver", "health", "ingress"];
    let words = side.labels().iter().filter_map(|label| label.strip_prefix("reserved:"));
    words.filter(|word| ENTITIES.contains(word)).map(str::to_owned).next()
}

/// What people call a side.
fn name(side: &Side<'_>) -> String {
    let workload = |endpoint: &Endpoint| endpoint.workloads.first().map(|workload| workload.name.clone());
    let named = side.endpoint.and_then(workload).filter(|name| !name.is_empty());
    let labelled = || {
        let labels = own_labels(side.labels());
        ["app.kubernetes.io/name", "app", "k8s-app", "name"].iter().find_map(|key| labels.get(*key).cloned())
    };
    let other = || match (side.pod(), entity(side), side.ip) {
        ("", Some(entity), _) => entity,
        ("", None, Some(ip)) => ip.to_string(),
        ("", None, None) => "unknown".to_owned(),
        (pod, ..) => pod.to_owned(),
    };
    named.or_else(labelled).unwrap_or_else(other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::tests::{dropped, forwarded};
    use crate::hubble::json::from_str;
    use crate::hubble::tests::flow;

    #[test]
    fn a_dropped_packet_has_the_rule_of_its_direction() {
        let rule = rule_for(&flow(&dropped())).expect("a rule");
        assert!(rule.yaml.contains("  namespace: shop\n") && rule.yaml.contains("  - Ingress\n"), "{rule:?}");
        assert!(rule.yaml.contains("port: 8080\n"), "{rule:?}");
        let why = rule_for(&flow(&forwarded())).expect_err("it passed");
        assert!(why.contains("not dropped"), "{why}");
        let other = Flow { drop_reason_desc: 169, ..flow(&dropped()) };
        assert!(rule_for(&other).is_err_and(|why| why.contains("No policy")));
    }

    #[test]
    fn a_denied_request_has_a_rule_of_layer_7() {
        let flow: Flow = from_str(
            r#"{"verdict":"DROPPED","drop_reason_desc":"POLICY_DENIED","traffic_direction":"INGRESS",
            "IP":{"source":"10.1.0.2","destination":"10.1.0.3"},
            "l4":{"TCP":{"source_port":40000,"destination_port":8080}},
            "source":{"namespace":"shop","labels":["k8s:app=web"],"pod_name":"web-1"},
            "destination":{"namespace":"shop","labels":["k8s:app=cart"],"pod_name":"cart-1"},
            "event_type":{"type":129},"is_reply":false,
            "l7":{"type":"REQUEST","http":{"method":"POST","url":"http://cart/items?x=1"}}}"#,
        )
        .expect("a flow");
        let rule = rule_for(&flow).expect("a rule");
        for line in
            ["kind: CiliumNetworkPolicy", "- method: POST", r#"path: "/items(\\?.*)?""#, "fromEndpoints:"]
        {
            assert!(rule.yaml.contains(line), "{line} is not in\n{}", rule.yaml);
        }
        let unknown = Flow { l7: None, ..flow };
        assert!(rule_for(&unknown).is_err_and(|why| why.contains("none of the protocols")));
    }
}
