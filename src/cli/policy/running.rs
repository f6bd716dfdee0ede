//! The flows that are kept and that a change of policies would judge otherwise.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::Serialize;

use crate::cli::observe::flows_of;
use crate::cli::{Connection, Failure};
use crate::flow::L4Protocol;
use crate::hubble::proto::flow::{Flow, Verdict};
use crate::hubble::proto::observer::GetFlowsRequest;
use crate::hubble::suggest::own_labels;
use crate::hubble::view::{Side, protocol, sides};
use crate::model::IpProtocol;
use crate::policy::diff::{CHANGES_MAX, Change};

/// A flow that would be judged otherwise.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Judged {
    /// It would be allowed, and was not.
    pub is_allowed: bool,
    /// Who began it: a pod with its namespace, or an address.
    pub from: String,
    /// Whom it reached.
    pub to: String,
    /// As `TCP/80`.
    pub port: String,
}

impl Judged {
    /// For a table: what becomes of it, from, to, protocol and port.
    pub fn line(&self) -> [String; 4] {
        let becomes = if self.is_allowed { "allowed" } else { "denied" };
        [becomes.to_owned(), self.from.clone(), self.to.clone(), self.port.clone()]
    }
}

/// At most as many as there may be changes.
pub fn judged_otherwise(connection: &Connection, changes: &[Change]) -> Result<BTreeSet<Judged>, Failure> {
    let mut lines = BTreeSet::new();
    if changes.is_empty() {
        return Ok(lines);
    }
    let request = GetFlowsRequest { number: u64::MAX, ..GetFlowsRequest::default() };
    flows_of(connection, request, |flow| {
        if lines.len() < CHANGES_MAX && changes.iter().any(|change| concerns(change, flow)) {
            lines.extend(judged(flow));
        }
    })?;
    Ok(lines)
}

fn judged(flow: &Flow) -> Option<Judged> {
    let [from, to] = sides(flow);
    let name = |side: &Side<'_>| match side.pod() {
        "" => side.ip.map(|ip| ip.to_string()).unwrap_or_default(),
        pod => format!("{}/{pod}", side.namespace()),
    };
    Some(Judged {
        is_allowed: flow.verdict() == Verdict::Dropped,
        from: name(&from),
        to: name(&to),
        port: format!("{}/{}", named_protocol(flow)?, to.port),
    })
}

fn named_protocol(flow: &Flow) -> Option<IpProtocol> {
    Some(match protocol(flow)? {
        L4Protocol::IcmpV4 => IpProtocol::ICMP,
        L4Protocol::IcmpV6 => IpProtocol::ICMPV6,
        protocol => IpProtocol(protocol.number()),
    })
}

/// True if the flow is of the change's pair and ports, and is judged the other way now.
fn concerns(change: &Change, flow: &Flow) -> bool {
    let [from, to] = sides(flow);
    let (own, other) = if change.direction == "egress" { (&from, &to) } else { (&to, &from) };
    let Some(protocol) = named_protocol(flow) else { return false };
    (flow.verdict() == Verdict::Dropped) == change.is_allowed
        && is_named(&change.pods, own)
        && is_named(&change.peer, other)
        && has_port(&change.ports, protocol, to.port)
}

/// `NAMESPACE/KEY=VALUE,...`, a reserved name, either with the address, or a prefix.
fn is_named(name: &str, side: &Side<'_>) -> bool {
    let is_within = |ip: IpAddr| name.parse::<IpNet>().is_ok_and(|net| net.contains(&ip));
    if side.namespace().is_empty() && side.ip.is_some_and(is_within) {
        return true;
    }
    let labels: Vec<String> =
        own_labels(side.labels()).iter().map(|(key, value)| format!("{key}={value}")).collect();
    let reserved = side.labels().iter().find_map(|label| label.strip_prefix("reserved:"));
    let own = match side.namespace() {
        "" => reserved.unwrap_or_default().to_owned(),
        namespace => format!("{namespace}/{}", labels.join(",")),
    };
    let with_address = side.ip.map(|ip| format!("{own} ({ip})"));
    name == own || with_address.is_some_and(|with_address| name == with_address)
}

/// As `TCP`, `TCP/80`, `TCP/80-89`.
fn has_port(ports: &str, protocol: IpProtocol, port: u16) -> bool {
    let (name, range) = ports.split_once('/').unwrap_or((ports, ""));
    let (from, to) = range.split_once('-').unwrap_or((range, range));
    let is_in = match (from.parse::<u16>(), to.parse::<u16>()) {
        (Ok(from), Ok(to)) => (from..=to).contains(&port),
        _ => range.is_empty(),
    };
    name == protocol.to_string() && (is_in || matches!(protocol, IpProtocol::ICMP | IpProtocol::ICMPV6))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read_as_a_difference_writes_them() {
        let tcp = IpProtocol(6);
        for (ports, port, is_in) in [
            ("TCP", 80, true),
            ("TCP/80", 80, true),
            ("TCP/80", 81, false),
            ("TCP/80-89", 85, true),
            ("UDP", 80, false),
        ] {
            assert_eq!(has_port(ports, tcp, port), is_in, "{ports} {port}");
        }
        assert!(has_port("ICMP/8", IpProtocol::ICMP, 0));
    }
}
