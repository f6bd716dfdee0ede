//! Writes `egress_rules`: which pods' packets leave by which gateway.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use anyhow::{Context, Result};
use ipnet::IpNet;

use super::abi::{EgressRule, EgressRuleKey, addr_of};
use super::map::{Bytes, MapError};
use super::mirror::Mirror;
use super::types::egress_flags;
use crate::model::{EgressExit, EgressRoute};

/// The rows that are desired.
pub type EgressRules = BTreeMap<(IpAddr, IpNet), EgressRoute>;

/// The one writer of `egress_rules`.
pub struct EgressWriter {
    rules: Mirror<EgressRuleKey, EgressRule>,
}

impl EgressWriter {
    pub(super) fn new(rules: Mirror<EgressRuleKey, EgressRule>) -> Self {
        Self { rules }
    }

    /// Reads the map again: how many rows somebody else changed.
    pub fn compare(&mut self) -> Result<[(&'static str, u64); 1]> {
        Ok([("map egress_rules", self.rules.refresh()?)])
    }

    /// Writes rows that differ. Deletes none but, where the map is full, those of pods that have no rule any more.
    pub fn write(&mut self, rules: &EgressRules) -> Result<()> {
        let mut has_made_room = false;
        for ((pod, destination), route) in rules {
            let (key, row) = (key(*pod, *destination), row(*route));
            let mut put = self.rules.put(key, row);
            if matches!(put, Err(MapError::Full { .. })) && !has_made_room {
                has_made_room = true;
                self.forget_pods(rules)?;
                put = self.rules.put(key, row);
            }
            put.with_context(|| format!("writing the egress rule of {pod} for {destination}"))?;
        }
        Ok(())
    }

    /// Deletes the rows of pods of which nothing is desired: they are gone, or no policy selects them.
    fn forget_pods(&mut self, rules: &EgressRules) -> Result<()> {
        let pods: BTreeSet<_> = rules.keys().map(|(pod, _)| Bytes(addr_of(*pod))).collect();
        let there = self.rules.rows().keys();
        let gone: Vec<EgressRuleKey> =
            there.filter(|key| !pods.contains(&Bytes(key.0.source))).map(|key| key.0).collect();
        for key in gone {
            self.rules.take(key)?;
        }
        Ok(())
    }

    /// Deletes the rows that are not desired.
    pub fn prune(&mut self, rules: &EgressRules) -> Result<()> {
        let desired: BTreeSet<_> = rules.keys().map(|(pod, cidr)| Bytes(key(*pod, *cidr))).collect();
        let there = self.rules.rows().keys();
        let stale: Vec<EgressRuleKey> = there.filter(|key| !desired.contains(key)).map(|key| key.0).collect();
        for key in stale {
            self.rules.take(key)?;
        }
        Ok(())
    }
}

/// The pod's address is exact; IPv4 destinations lie below ::ffff:0:0/96.
fn key(pod: IpAddr, destination: IpNet) -> EgressRuleKey {
    let offset = if destination.addr().is_ipv4() { 128 + 96 } else { 128 };
    EgressRuleKey {
        prefix_length: offset + u32::from(destination.prefix_len()),
        source: addr_of(pod),
        destination: addr_of(destination.network()),
    }
}

fn row(route: EgressRoute) -> EgressRule {
    let flags = |flags: egress_flags| EgressRule { flags: flags.0, ..EgressRule::default() };
    match route {
        EgressRoute::Ordinary => flags(egress_flags::EGRESS_ORDINARY),
        EgressRoute::Closed => EgressRule::default(),
        EgressRoute::Away(node) => EgressRule { node: addr_of(node), ..EgressRule::default() },
        EgressRoute::Here(EgressExit::Nowhere) => flags(egress_flags::EGRESS_HERE),
        EgressRoute::Here(EgressExit::OfDevice) => EgressRule {
            flags: egress_flags::EGRESS_HERE.0 | egress_flags::EGRESS_OF_DEVICE.0,
            ..EgressRule::default()
        },
        EgressRoute::Here(EgressExit::With(address, ifindex)) => {
            EgressRule { address: addr_of(address), ifindex, ..flags(egress_flags::EGRESS_HERE) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::abi::{Addr, Plain};

    #[test]
    fn a_key_has_the_pod_exactly_and_a_prefix_of_the_destination() {
        let key = key("10.1.1.5".parse().expect("an address"), "203.0.113.9/24".parse().expect("a CIDR"));
        let destination = addr_of("203.0.113.0".parse().expect("an address"));
        assert_eq!((key.prefix_length, key.destination.w), (248, destination.w));
        let key = super::key("fd00::5".parse().expect("an address"), "::/0".parse().expect("a CIDR"));
        assert_eq!((key.prefix_length, key.destination.w), (128, Addr::default().w));
    }

    #[test]
    fn without_a_gateway_or_an_address_a_row_leads_nowhere() {
        assert_eq!(row(EgressRoute::Closed).as_bytes(), EgressRule::default().as_bytes());
        let nowhere = row(EgressRoute::Here(EgressExit::Nowhere));
        assert_eq!((nowhere.address.w, nowhere.flags), ([0; 4], egress_flags::EGRESS_HERE.0));
    }
}
