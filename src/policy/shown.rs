//! What `weir.dev/visibility` shows: claims that decide nothing. Where everything else allows all that is said on a
//! port, the proxy gets rules that deny nothing.

use std::sync::Arc;

use super::rules::{Claim, Match, Order};
use crate::model::l7::{HttpRule, KafkaRule, L7Rules};
use crate::model::{Action, IdentityLabels, IpProtocol, NamedPort, Origins, Tier, Visibility};

/// The ports that are those of a protocol by convention.
const PORTS: [(&str, IpProtocol, u16); 5] = [
    ("http", IpProtocol::TCP, 80),
    ("http", IpProtocol::TCP, 8080),
    ("dns", IpProtocol::UDP, 53),
    ("dns", IpProtocol::TCP, 53),
    ("kafka", IpProtocol::TCP, 9092),
];

impl Visibility {
    fn has(self, protocol: &str) -> bool {
        match protocol {
            "http" | "grpc" => self.http,
            "dns" => self.dns,
            _ => self.kafka,
        }
    }
}

/// The protocol that a port of this name speaks, as `http`, `http-api` or `grpc-orders`.
fn spoken(name: &str) -> Option<&'static str> {
    let first = name.split('-').next()?;
    ["http", "grpc", "dns", "kafka"].into_iter().find(|protocol| *protocol == first)
}

/// The ports of a pod whose names say that they speak what is shown.
pub fn named_ports(
    labels: &IdentityLabels,
    shown: Visibility,
) -> impl Iterator<Item = (String, IpProtocol, u16)> {
    let named = labels.named_ports.iter().filter(move |(name, _)| {
        let protocol = spoken(name);
        protocol.is_some_and(|protocol| shown.has(protocol))
    });
    named.flat_map(|(name, ports)| {
        ports.iter().map(move |port: &NamedPort| (name.clone(), port.protocol.into(), port.port))
    })
}

/// The claims for what comes in to a pod with these labels, or, without labels, for what goes out of one.
pub fn claims(labels: Option<&IdentityLabels>, shown: Visibility) -> Vec<Claim> {
    let by_number = PORTS.into_iter().filter(|(protocol, ..)| shown.has(protocol));
    let mut ports: Vec<(&str, IpProtocol, u16)> = by_number.collect();
    for (name, protocol, port) in labels.into_iter().flat_map(|labels| named_ports(labels, shown)) {
        let is_known = ports.iter().any(|(_, known, number)| (*known, *number) == (protocol, port));
        if let Some(spoken) = spoken(&name).filter(|_| !is_known) {
            ports.push((spoken, protocol, port));
        }
    }
    let claim = |(spoken, protocol, port): (&str, IpProtocol, u16)| {
        let rules = match spoken {
            "http" | "grpc" => L7Rules::Http(vec![HttpRule::default()]),
            // No rule at all: any name, of which no answer counts for anybody's rules.
            "dns" => L7Rules::Dns(Vec::new()),
            _ => L7Rules::Kafka(vec![KafkaRule::default()]),
        };
        let is_possible =
            protocol == IpProtocol::TCP || protocol == IpProtocol::UDP && matches!(rules, L7Rules::Dns(_));
        is_possible.then(|| Claim {
            matched: Match { protocol: Some(protocol.0), port, port_prefix_length: 16 },
            order: Order::default_of(Tier::Baseline),
            action: Action::Pass,
            origins: Origins::default(),
            is_audit: false,
            l7: Some(Arc::new(rules)),
        })
    };
    ports.into_iter().filter_map(claim).collect()
}
