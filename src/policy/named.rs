//! Which rules name which addresses: what DNS told pods of this node, held against the names in their policies.
//!
//! An answer counts only for the rules of the pod that asked. A pod that chooses its own answers so opens
//! addresses to nobody but those that have its rule, and not to pods with other rules.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use imbl::ordmap::DiffItem;

use crate::model::EndpointId;
use crate::model::l7::{DnsRule, NamePattern};
use crate::tables::Snapshot;

/// A pod of this node, and a name that it was told the addresses of.
pub type Told = (EndpointId, Arc<str>);
/// The addresses of names, as pods were told them.
pub type Heard = Snapshot<Told, Arc<[IpAddr]>>;
/// The rules that name each address, sorted; addresses that no rule names are not here.
pub type ByAddress = BTreeMap<IpAddr, Arc<[DnsRule]>>;

/// Different sets of rules that addresses may have at once: each is an identity, with a row in many policies.
const SETS_MAX: usize = 2048;
/// Different sets that the answers to one pod may make, beside two for each of its rules. Whoever chooses the names
/// that a pod is told could else make as many as there are sets.
const SETS_OF_POD: usize = 256;

/// Remembers its last answer, and works out differences.
#[derive(Default)]
pub struct Named {
    heard: Heard,
    rules: Arc<BTreeMap<EndpointId, Arc<[DnsRule]>>>,
    patterns: HashMap<DnsRule, NamePattern>,
    told: BTreeMap<IpAddr, BTreeSet<Told>>,
    by_address: ByAddress,
    /// How many addresses have each set of rules.
    uses: HashMap<Arc<[DnsRule]>, usize>,
    /// The sets that the answers to each pod made.
    made: HashMap<EndpointId, HashSet<Arc<[DnsRule]>>>,
}

impl Named {
    /// Takes in what pods were told; gives the addresses whose rules changed.
    pub fn hear(&mut self, heard: &Heard) -> BTreeSet<IpAddr> {
        let before = std::mem::replace(&mut self.heard, heard.clone());
        let mut touched = BTreeSet::new();
        for item in before.diff(heard) {
            let (told, old, new) = match item {
                DiffItem::Add(told, new) => (told, None, Some(new)),
                DiffItem::Update { old: (_, old), new: (told, new) } => (told, Some(old), Some(new)),
                DiffItem::Remove(told, old) => (told, Some(old), None),
            };
            for address in old.into_iter().flat_map(|all| all.iter()) {
                touched.insert(*address);
                let of_address = self.told.get_mut(address);
                if of_address.is_some_and(|all| all.remove(told) && all.is_empty()) {
                    self.told.remove(address);
                }
            }
            for address in new.into_iter().flat_map(|all| all.iter()) {
                touched.insert(*address);
                self.told.entry(*address).or_default().insert(told.clone());
            }
        }
        self.renew(touched)
    }

    /// Takes in the rules that pods have now; gives the addresses whose rules changed.
    pub fn rule(&mut self, rules: BTreeMap<EndpointId, Arc<[DnsRule]>>) -> BTreeSet<IpAddr> {
        if rules == *self.rules {
            return BTreeSet::new();
        }
        let used: BTreeSet<&DnsRule> = rules.values().flat_map(|rules| rules.iter()).collect();
        self.patterns.retain(|rule, _| used.contains(rule));
        for rule in used {
            self.patterns.entry(rule.clone()).or_insert_with(|| rule.pattern());
        }
        self.made.retain(|endpoint, _| rules.contains_key(endpoint));
        self.rules = Arc::new(rules);
        self.renew(self.told.keys().copied().collect())
    }

    /// The rules of every pod that has any.
    pub fn rules(&self) -> &Arc<BTreeMap<EndpointId, Arc<[DnsRule]>>> {
        &self.rules
    }

    /// The rules of every address.
    pub fn by_address(&self) -> &ByAddress {
        &self.by_address
    }

    fn renew(&mut self, touched: BTreeSet<IpAddr>) -> BTreeSet<IpAddr> {
        touched.into_iter().filter(|address| self.renew_one(*address)).collect()
    }

    /// True if the rules of an address are others now.
    fn renew_one(&mut self, address: IpAddr) -> bool {
        let rules = self.rules_of(address);
        let known = self.by_address.get(&address);
        if known.map_or(rules.is_empty(), |known| *known == rules) {
            return false;
        }
        let old = match rules.is_empty() {
            true => self.by_address.remove(&address),
            false => {
                *self.uses.entry(rules.clone()).or_default() += 1;
                self.by_address.insert(address, rules)
            }
        };
        if let Some(old) = old
            && let Some(uses) = self.uses.get_mut(&old)
        {
            *uses -= 1;
            if *uses == 0 {
                self.uses.remove(&old);
            }
        }
        true
    }

    /// The rules that name an address. A pod whose answers have made too many sets makes no more: its answers do
    /// not count for this address then, and those of others do.
    fn rules_of(&mut self, address: IpAddr) -> Arc<[DnsRule]> {
        let mut left_out = BTreeSet::new();
        loop {
            let (mut rules, mut who) = (BTreeSet::new(), BTreeSet::new());
            let told = self.told.get(&address).into_iter().flatten();
            for told in told.filter(|(endpoint, _)| !left_out.contains(endpoint)) {
                for rule in self.naming(told) {
                    rules.insert(rule);
                    who.insert(told.0);
                }
            }
            let set: Arc<[DnsRule]> = rules.into_iter().cloned().collect();
            if set.is_empty() || self.uses.contains_key(&set) {
                return set;
            }
            let made = |endpoint: &EndpointId| self.made.get(endpoint).map_or(0, HashSet::len);
            let Some(payer) = who.into_iter().max_by_key(made) else { return Arc::default() };
            let share = SETS_OF_POD + 2 * self.rules.get(&payer).map_or(0, |rules| rules.len());
            let is_paid = self.made.get(&payer).is_some_and(|made| made.contains(&set));
            if self.uses.len() < SETS_MAX && (is_paid || made(&payer) < share) {
                self.made.entry(payer).or_default().insert(set.clone());
                return set;
            }
            left_out.insert(payer);
        }
    }

    /// The rules of a pod that mean a name.
    fn naming<'a>(&'a self, (endpoint, name): &'a Told) -> impl Iterator<Item = &'a DnsRule> {
        let rules = self.rules.get(endpoint).into_iter().flat_map(|rules| rules.iter());
        rules.filter(move |rule| self.patterns.get(*rule).is_some_and(|pattern| pattern.matches_text(name)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    fn heard(rows: &[(u16, &str, &[&str])]) -> Heard {
        let row = |(endpoint, name, addresses): &(u16, &str, &[&str])| {
            (
                (EndpointId(*endpoint), Arc::from(*name)),
                addresses.iter().map(|text| ip(text)).collect::<Arc<[IpAddr]>>(),
            )
        };
        rows.iter().map(row).collect()
    }

    fn pattern(text: &str) -> DnsRule {
        DnsRule::MatchPattern(text.into())
    }

    #[test]
    fn an_answer_counts_for_the_rules_of_who_asked() {
        let (wide, narrow) = (pattern("*.test"), DnsRule::MatchName("a.test".into()));
        let mut named = Named::default();
        let rules: BTreeMap<EndpointId, Arc<[DnsRule]>> =
            [(EndpointId(1), [wide.clone()].into()), (EndpointId(2), [narrow.clone()].into())].into();
        assert!(named.rule(rules.clone()).is_empty());
        let first = heard(&[(1, "a.test", &["192.0.2.1"]), (3, "a.test", &["192.0.2.3"])]);
        assert_eq!(named.hear(&first), [ip("192.0.2.1")].into());
        assert_eq!(named.by_address(), &[(ip("192.0.2.1"), Arc::from([wide.clone()]))].into());
        let both = heard(&[(1, "a.test", &["192.0.2.1"]), (2, "a.test", &["192.0.2.1", "192.0.2.2"])]);
        assert_eq!(named.hear(&both), [ip("192.0.2.1"), ip("192.0.2.2")].into());
        assert_eq!(&*named.by_address()[&ip("192.0.2.1")], [narrow.clone(), wide.clone()]);
        assert!(named.hear(&both).is_empty(), "nothing changed");
        // Another name of the same pod that means the same changes nothing.
        let more = heard(&[
            (1, "a.test", &["192.0.2.1"]),
            (1, "b.test", &["192.0.2.1"]),
            (2, "a.test", &["192.0.2.1", "192.0.2.2"]),
        ]);
        assert!(named.hear(&more).is_empty());
        let gone = heard(&[(2, "a.test", &["192.0.2.1"])]);
        assert_eq!(named.hear(&gone), [ip("192.0.2.1"), ip("192.0.2.2")].into());
        assert_eq!(named.by_address(), &[(ip("192.0.2.1"), Arc::from([narrow]))].into());
        // A pod that loses its rule, or goes, opens nothing any more.
        assert_eq!(named.rule([(EndpointId(1), rules[&EndpointId(1)].clone())].into()).len(), 1);
        assert!(named.by_address().is_empty());
    }

    #[test]
    fn a_pod_that_chooses_its_names_makes_its_share_of_sets_and_takes_no_others() {
        let letters: Vec<char> = ('a'..='l').collect();
        let rules: Arc<[DnsRule]> =
            letters.iter().map(|letter| pattern(&format!("*{letter}*.test"))).collect();
        let mut named = Named::default();
        named.rule([(EndpointId(1), rules), (EndpointId(2), [pattern("*z*.test")].into())].into());
        let row = |number: u32| {
            let chosen = letters.iter().enumerate().filter(|(bit, _)| number >> bit & 1 == 1);
            let name: String = chosen.map(|(_, letter)| *letter).collect();
            (
                (EndpointId(1), Arc::from(format!("{name}.test"))),
                Arc::from([IpAddr::from(number.to_be_bytes())]),
            )
        };
        let mut told: Heard = (1..4096).map(row).collect();
        named.hear(&told);
        let share = SETS_OF_POD + 2 * letters.len();
        assert_eq!(named.by_address().len(), share);
        told.insert((EndpointId(2), Arc::from("z.test")), Arc::from([ip("192.0.2.9")]));
        assert_eq!(named.hear(&told), [ip("192.0.2.9")].into());
        // What goes and comes again is no other set.
        named.hear(&Heard::new());
        assert!(named.by_address().is_empty());
        named.hear(&told);
        assert_eq!(named.by_address().len(), share + 1);
    }
}
