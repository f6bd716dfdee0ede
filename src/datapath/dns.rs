//! Writes `dns_states`, `dns_rules` and `dns_names`: the rules of names that `before_proxy` judges by.
//!
//! An automaton is written completely where nobody points at, then the rows that point at it. What a former agent's
//! rows point at stays as it is until nobody does any more.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::abi::{DnsAutomaton, DnsState};
use super::map::{Bytes, MapError, TypedMap};
use super::mirror::Mirror;
use crate::model::EndpointId;
use crate::model::l7::{Automaton, DnsRule, NamePattern, RuleSetId};

/// Of `dns_names`: the proxy has every name of the endpoint.
const EVERY_NAME: DnsAutomaton = DnsAutomaton { first: 1, count: 0 };
/// Nothing.
const NONE: DnsAutomaton = DnsAutomaton { first: 0, count: 0 };
/// The first states: 0 is none, and 1 stands for every name.
const FIRST: u32 = 8;
/// A program that was running when its rows went may read states for so long: it ends within microseconds.
const REST: Duration = Duration::from_secs(1);

/// Rules, sorted; no rule: any name.
type Rules = Arc<[DnsRule]>;

/// The one writer of these maps.
pub struct DnsWriter {
    states: TypedMap<u32, DnsState>,
    rules: Mirror<u32, DnsAutomaton>,
    names: TypedMap<u32, DnsAutomaton>,
    of_endpoint: BTreeMap<u32, DnsAutomaton>,
    /// Where automata are; `None`: they are too large, or have no room.
    placed: HashMap<Rules, Option<DnsAutomaton>>,
    /// Where automata were that nobody points at any more.
    resting: Vec<(Instant, DnsAutomaton)>,
}

impl DnsWriter {
    pub(super) fn new(
        states: TypedMap<u32, DnsState>,
        rules: Mirror<u32, DnsAutomaton>,
        names: TypedMap<u32, DnsAutomaton>,
    ) -> Result<Self, MapError> {
        let mut of_endpoint = BTreeMap::new();
        names.for_each(|endpoint, row| {
            if row.first != 0 {
                of_endpoint.insert(endpoint, row);
            }
        })?;
        Ok(Self { states, rules, names, of_endpoint, placed: HashMap::new(), resting: Vec::new() })
    }

    /// Writes the rules of these numbers that are not written yet. What does not fit the proxy judges.
    pub fn write_rules(&mut self, sets: &BTreeMap<RuleSetId, Rules>) -> Result<(), MapError> {
        for (id, rules) in sets {
            match self.place(rules)? {
                Some(automaton) => self.rules.put(u32::from(id.0), automaton).map(drop)?,
                None => self.rules.take(u32::from(id.0)).map(drop)?,
            }
        }
        Ok(())
    }

    /// From now on the answers about these names are the proxy's, for each endpoint: rules name the addresses.
    pub fn write_names(&mut self, names: &BTreeMap<EndpointId, Rules>) -> Result<(), MapError> {
        let mut wanted = BTreeMap::new();
        for (endpoint, rules) in names {
            // No rule names nothing here.
            if !rules.is_empty() {
                wanted.insert(u32::from(endpoint.0), self.place(rules)?.unwrap_or(EVERY_NAME));
            }
        }
        let known: BTreeSet<u32> = self.of_endpoint.keys().chain(wanted.keys()).copied().collect();
        for endpoint in known {
            let row = wanted.get(&endpoint).copied().unwrap_or(NONE);
            let before = self.of_endpoint.get(&endpoint).copied().unwrap_or(NONE);
            if (row.first, row.count) == (before.first, before.count) {
                continue;
            }
            self.names.insert(&endpoint, &row)?;
            match row.first {
                0 => self.of_endpoint.remove(&endpoint),
                _ => self.of_endpoint.insert(endpoint, row),
            };
        }
        Ok(())
    }

    /// Takes back the rules of other numbers, and the room of what nobody points at.
    pub fn prune(&mut self, sets: &BTreeMap<RuleSetId, Rules>) -> Result<(), MapError> {
        let gone = self.rules.rows().keys().map(|key| key.0);
        let gone: Vec<u32> = gone.filter(|id| sets.keys().all(|known| u32::from(known.0) != *id)).collect();
        for id in gone {
            self.rules.take(id)?;
        }
        let used = self.used();
        let now = Instant::now();
        let resting = &mut self.resting;
        self.placed.retain(|_, placed| match placed {
            Some(automaton) if !used.contains(&automaton.first) => {
                resting.push((now, *automaton));
                false
            }
            Some(_) => true,
            // It may have room now.
            None => false,
        });
        self.resting.retain(|(since, _)| since.elapsed() < REST);
        Ok(())
    }

    /// Reads the maps again: how many rows somebody else changed.
    pub fn compare(&mut self) -> Result<[(&'static str, u64); 1], MapError> {
        Ok([("dns_rules", self.rules.refresh()?)])
    }

    fn used(&self) -> BTreeSet<u32> {
        self.rules.rows().values().chain(self.of_endpoint.values()).map(|row| row.first).collect()
    }

    /// Where the automaton of these rules is; it is written if it was not.
    fn place(&mut self, rules: &Rules) -> Result<Option<DnsAutomaton>, MapError> {
        if let Some(placed) = self.placed.get(rules) {
            return Ok(*placed);
        }
        let patterns: Vec<NamePattern> = match rules.is_empty() {
            true => vec![NamePattern::Any],
            false => rules.iter().map(DnsRule::pattern).collect(),
        };
        let automaton = Automaton::new(&patterns);
        let placed = automaton.as_ref().and_then(|automaton| self.room(automaton.states().len()));
        if let (Some(automaton), Some(placed)) = (&automaton, placed) {
            for (index, state) in (placed.first..).zip(automaton.states()) {
                let row = DnsState { next: state.next, accepts: state.accepts.into(), pad: [0; 3] };
                self.states.insert(&index, &row)?;
            }
        }
        if placed.is_none() {
            tracing::info!(
                rules = rules.len(),
                "names that are too many or too wide for the kernel: the proxy judges their questions"
            );
        }
        self.placed.insert(rules.clone(), placed);
        Ok(placed)
    }

    /// Room for so many states, where nobody points at.
    fn room(&self, count: usize) -> Option<DnsAutomaton> {
        let count = u32::try_from(count).ok()?;
        let rows = self.rules.rows().values().chain(self.of_endpoint.values());
        let rows = rows.chain(self.placed.values().flatten()).chain(self.resting.iter().map(|(_, row)| row));
        let taken: BTreeSet<(u32, u32)> = rows.map(|row| (row.first, row.count)).collect();
        let mut first = FIRST;
        for (start, length) in taken {
            if start >= first && start - first >= count {
                break;
            }
            first = first.max(start.saturating_add(length));
        }
        (first.checked_add(count)? <= self.states.capacity()).then_some(DnsAutomaton { first, count })
    }

    /// The rows of `dns_rules`, for tests.
    pub fn judged(&self) -> impl Iterator<Item = RuleSetId> {
        self.rules.rows().keys().filter_map(|Bytes(id)| u16::try_from(*id).ok().map(RuleSetId))
    }
}
