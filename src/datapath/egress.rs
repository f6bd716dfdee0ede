//! Writes `egress_pods` and `egress_rules`: which pods' packets leave by which gateway.
//!
//! Pods with the same rules share a set. A set never changes under its number: a pod whose rules change gets the number
//! of another set, by one row, after all rows of that set were written. A pod whose set is not completely in the map
//! has no row: the programs let nothing of it out of the cluster.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use anyhow::Result;
use ipnet::IpNet;

use super::abi::{Addr, EgressRule, EgressRuleKey, addr_of};
use super::map::{self, Bytes, MapError};
use super::mirror::Mirror;
use super::types::egress_flags;
use crate::model::{EgressExit, EgressRoute, EgressTable};

/// The rules of each address that are desired.
pub type EgressTables = BTreeMap<IpAddr, Arc<EgressTable>>;

/// The rows of a set under no number: what makes two sets the same.
type Content = BTreeMap<Bytes<EgressRuleKey>, Bytes<EgressRule>>;

/// The one writer of `egress_pods` and `egress_rules`.
pub struct EgressWriter {
    pods: Mirror<Addr, u32>,
    rules: Mirror<EgressRuleKey, EgressRule>,
    /// The sets that are in the map.
    sets: BTreeMap<Content, u32>,
}

impl EgressWriter {
    pub(super) fn new(pods: Mirror<Addr, u32>, rules: Mirror<EgressRuleKey, EgressRule>) -> Self {
        let sets = sets_of(&rules);
        Self { pods, rules, sets }
    }

    /// Reads the maps again: how many rows somebody else changed.
    pub fn compare(&mut self) -> Result<[(&'static str, u64); 2]> {
        let changed =
            [("map egress_pods", self.pods.refresh()?), ("map egress_rules", self.rules.refresh()?)];
        self.sets = sets_of(&self.rules);
        Ok(changed)
    }

    /// Gives each address its rules. Returns those whose rules do not fit, and why: they have none, and are closed.
    /// Deletes nothing but, where a map is full, what nothing uses.
    pub fn write(&mut self, tables: &EgressTables) -> Result<BTreeMap<IpAddr, String>> {
        let unfit = self.write_once(tables)?;
        if unfit.is_empty() {
            return Ok(unfit);
        }
        self.prune(tables)?;
        self.write_once(tables)
    }

    fn write_once(&mut self, tables: &EgressTables) -> Result<BTreeMap<IpAddr, String>> {
        let (mut numbers, mut unfit) = (BTreeMap::new(), BTreeMap::new());
        for table in tables.values() {
            if let std::collections::btree_map::Entry::Vacant(entry) = numbers.entry(Arc::as_ptr(table)) {
                entry.insert(self.number_of(table)?);
            }
        }
        // The rules are seen before the row that leads to them, on every processor.
        fence(Ordering::SeqCst);
        for (pod, table) in tables {
            let number = numbers.get(&Arc::as_ptr(table)).cloned().unwrap_or_else(|| Err(String::new()));
            let put = number.and_then(|set| match self.pods.put(addr_of(*pod), set) {
                Err(full @ MapError::Full { .. }) => Err(full.to_string()),
                put => Ok(put.map(drop)),
            });
            match put {
                Ok(put) => put?,
                Err(why) => {
                    // What it had may let out what its rules of now do not.
                    self.pods.take(addr_of(*pod))?;
                    unfit.insert(*pod, why);
                }
            }
        }
        Ok(unfit)
    }

    /// The number of the set with these rules, which is made if there is none; or why the map cannot have it.
    fn number_of(&mut self, table: &EgressTable) -> Result<Result<u32, String>> {
        let rows = |set| table.iter().map(move |(prefix, route)| (key(set, *prefix), row(*route)));
        let content: Content = rows(0).map(|(key, row)| (Bytes(key), Bytes(row))).collect();
        if let Some(set) = self.sets.get(&content) {
            return Ok(Ok(*set));
        }
        let in_use = self.rules.rows().keys().map(|key| key.0.set).chain(self.pods.rows().values().copied());
        let set = map::first_free(&in_use.collect(), 1, u32::MAX);
        for (key, row) in rows(set) {
            match self.rules.put(key, row) {
                Ok(_) => {}
                Err(full @ MapError::Full { .. }) => {
                    self.forget(&BTreeSet::from([set]))?;
                    return Ok(Err(full.to_string()));
                }
                Err(error) => return Err(error.into()),
            }
        }
        self.sets.insert(content, set);
        Ok(Ok(set))
    }

    /// Deletes the rows of addresses that are not desired, and the sets that none has.
    pub fn prune(&mut self, tables: &EgressTables) -> Result<()> {
        let desired: BTreeSet<_> = tables.keys().map(|pod| Bytes(addr_of(*pod))).collect();
        let gone: Vec<Addr> =
            self.pods.rows().keys().filter(|pod| !desired.contains(pod)).map(|pod| pod.0).collect();
        for pod in gone {
            self.pods.take(pod)?;
        }
        let used: BTreeSet<u32> = self.pods.rows().values().copied().collect();
        let unused = self.rules.rows().keys().map(|key| key.0.set).filter(|set| !used.contains(set));
        self.forget(&unused.collect())
    }

    fn forget(&mut self, sets: &BTreeSet<u32>) -> Result<()> {
        let stale: Vec<EgressRuleKey> =
            self.rules.rows().keys().filter(|key| sets.contains(&key.0.set)).map(|key| key.0).collect();
        self.sets.retain(|_, set| !sets.contains(set));
        for key in stale {
            self.rules.take(key)?;
        }
        Ok(())
    }
}

fn sets_of(rules: &Mirror<EgressRuleKey, EgressRule>) -> BTreeMap<Content, u32> {
    let mut contents: BTreeMap<u32, Content> = BTreeMap::new();
    for (key, row) in rules.rows() {
        let without_number = EgressRuleKey { set: 0, ..key.0 };
        contents.entry(key.0.set).or_default().insert(Bytes(without_number), Bytes(*row));
    }
    contents.into_iter().map(|(set, content)| (content, set)).collect()
}

/// The set is exact; IPv4 destinations lie below ::ffff:0:0/96.
fn key(set: u32, destination: IpNet) -> EgressRuleKey {
    let offset = if destination.addr().is_ipv4() { 32 + 96 } else { 32 };
    EgressRuleKey {
        prefix_length: offset + u32::from(destination.prefix_len()),
        set,
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
    use crate::datapath::abi::Plain;

    #[test]
    fn a_key_has_the_set_exactly_and_a_prefix_of_the_destination() {
        let key = key(5, "203.0.113.9/24".parse().expect("a CIDR"));
        let destination = addr_of("203.0.113.0".parse().expect("an address"));
        assert_eq!((key.prefix_length, key.set, key.destination.w), (152, 5, destination.w));
        let key = super::key(5, "::/0".parse().expect("a CIDR"));
        assert_eq!((key.prefix_length, key.destination.w), (32, Addr::default().w));
    }

    #[test]
    fn without_a_gateway_or_an_address_a_row_leads_nowhere() {
        assert_eq!(row(EgressRoute::Closed).as_bytes(), EgressRule::default().as_bytes());
        let nowhere = row(EgressRoute::Here(EgressExit::Nowhere));
        assert_eq!((nowhere.address.w, nowhere.flags), ([0; 4], egress_flags::EGRESS_HERE.0));
    }
}
