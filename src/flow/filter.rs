//! Filters, in two steps: what the raw record can tell, then what needs names.

use std::net::IpAddr;

use crate::datapath::types::event_flags;
use crate::model::IdentityId;

use super::names::{event_type_of, has_flag};
use super::query::{IdentityPattern, NamePattern};
use super::{
    Direction, DropReason, Event, Filter, Flow, L4Protocol, LabelPattern, Party, Query, Verdict, ip_of,
};

impl Query {
    /// False if the raw record alone tells that this flow is not asked for.
    pub fn may_match(&self, event: &Event) -> bool {
        self.filter.matches_event(event)
            && !self.not.iter().any(|not| !not.0.needs_names() && not.0.matches_event(event))
    }

    /// True if the flow is asked for; `event` is its record and has passed `may_match`.
    pub fn matches(&self, event: &Event, flow: &Flow) -> bool {
        let excluded = |filter: &Filter| {
            filter.needs_names() && filter.matches_event(event) && filter.matches_names(flow)
        };
        self.filter.matches_names(flow) && !self.not.iter().any(|not| excluded(&not.0))
    }
}

impl Filter {
    /// True if all that can be told from the raw record matches.
    pub fn matches_event(&self, event: &Event) -> bool {
        let verdict = if event.reason == 0 { Verdict::Forwarded } else { Verdict::Dropped };
        any(&self.verdict, |wanted| *wanted == verdict)
            && any(&self.drop_reason, |wanted| *wanted == DropReason(event.reason))
            && any(&self.protocol, |wanted| *wanted == L4Protocol::from(event.protocol))
            && any(&self.direction, |wanted| *wanted == Direction::from(event.direction))
            && any(&self.event_type, |wanted| *wanted == event_type_of(event))
            && self.matches_ports(event)
            && self.matches_addresses(event)
            && self.matches_identities(event)
    }

    fn matches_ports(&self, event: &Event) -> bool {
        let has_ports = L4Protocol::from(event.protocol).has_ports();
        let uses_service = has_flag(event, event_flags::EVENT_SERVICE);
        let is_source = |port: &u16| has_ports && port.to_be() == event.source_port;
        let is_destination = |port: &u16| {
            let is_service = uses_service && port.to_be() == event.service_port;
            has_ports && (port.to_be() == event.destination_port || is_service)
        };
        any(&self.port, |port| is_source(port) || is_destination(port))
            && any(&self.from_port, is_source)
            && any(&self.to_port, is_destination)
    }

    fn matches_addresses(&self, event: &Event) -> bool {
        if self.ip.is_empty() && self.from_ip.is_empty() && self.to_ip.is_empty() {
            return true;
        }
        let source = ip_of(event.source);
        let destination = ip_of(event.destination);
        let service = has_flag(event, event_flags::EVENT_SERVICE).then(|| ip_of(event.service));
        let is_source = |net: &ipnet::IpNet| net.contains(&source);
        let is_destination = |net: &ipnet::IpNet| {
            net.contains(&destination)
                || service.as_ref().is_some_and(|service: &IpAddr| net.contains(service))
        };
        any(&self.ip, |net| is_source(net) || is_destination(net))
            && any(&self.from_ip, is_source)
            && any(&self.to_ip, is_destination)
    }

    fn matches_identities(&self, event: &Event) -> bool {
        let is_source = |wanted: &IdentityPattern| wanted.0 == IdentityId(event.source_identity);
        let is_destination = |wanted: &IdentityPattern| wanted.0 == IdentityId(event.destination_identity);
        any(&self.identity, |wanted| is_source(wanted) || is_destination(wanted))
            && any(&self.from_identity, is_source)
            && any(&self.to_identity, is_destination)
    }

    /// True if some condition is on names.
    pub fn needs_names(&self) -> bool {
        let patterns = [&self.pod, &self.from_pod, &self.to_pod, &self.service];
        let namespaces = [&self.namespace, &self.from_namespace, &self.to_namespace];
        let labels = [&self.label, &self.from_label, &self.to_label];
        patterns.iter().any(|list| !list.is_empty())
            || namespaces.iter().any(|list| !list.is_empty())
            || labels.iter().any(|list| !list.is_empty())
    }

    /// True if all that needs names matches.
    pub fn matches_names(&self, flow: &Flow) -> bool {
        let pod = |party: &Party, wanted: &NamePattern| wanted.matches(&party.namespace, &party.pod_name);
        let namespace = |party: &Party, wanted: &String| *wanted == *party.namespace;
        let label = |party: &Party, wanted: &LabelPattern| wanted.matches(&party.labels);
        sides(flow, [&self.pod, &self.from_pod, &self.to_pod], pod)
            && sides(flow, [&self.namespace, &self.from_namespace, &self.to_namespace], namespace)
            && sides(flow, [&self.label, &self.from_label, &self.to_label], label)
            && any(&self.service, |wanted| {
                flow.service.as_ref().is_some_and(|service| wanted.matches(&service.namespace, &service.name))
            })
    }
}

/// No condition, or one of them holds.
fn any<T>(wanted: &[T], holds: impl Fn(&T) -> bool) -> bool {
    wanted.is_empty() || wanted.iter().any(holds)
}

/// Conditions on either side, on the source, on the destination.
fn sides<T>(flow: &Flow, [either, from, to]: [&Vec<T>; 3], holds: impl Fn(&Party, &T) -> bool) -> bool {
    any(either, |wanted| holds(&flow.source, wanted) || holds(&flow.destination, wanted))
        && any(from, |wanted| holds(&flow.source, wanted))
        && any(to, |wanted| holds(&flow.destination, wanted))
}
