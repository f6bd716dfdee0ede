//! Writes `dns_states`, `dns_rules` and `dns_names`: the rules of names that `before_proxy` judges by.
//!
//! An automaton is written completely where nobody points at, then the rows that point at it. What a former agent's
//! rows point at stays as it is until nobody does any more.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::abi::{DnsAutomaton, DnsState};
use super::map::{Bytes, MapError, TypedMap};
use super::mirror::{Mirror, Put};
use crate::model::EndpointId;
use crate::model::l7::{Automaton, DnsRule, NamePattern, RuleSetId, WORK_MAX};

/// Of `dns_names`: the proxy has every name of the endpoint.
const EVERY_NAME: DnsAutomaton = DnsAutomaton { first: 1, count: 0 };
/// Nothing.
const NONE: DnsAutomaton = DnsAutomaton { first: 0, count: 0 };
/// The first states: 0 is none, and 1 stands for every name.
const FIRST: u32 = 8;
/// A program that was running when its rows went may read states for so long: it ends within microseconds.
const REST: Duration = Duration::from_secs(1);

/// Automata are made for so many steps of work a round, half a second; the proxy judges by the others meanwhile.
const WORK_OF_ROUND: usize = 4 * WORK_MAX;

/// Rules, sorted; no rule: any name.
type Rules = Arc<[DnsRule]>;

/// Where the automaton of rules is.
#[derive(Clone, Copy, Debug)]
enum Place {
    At(DnsAutomaton),
    /// It would be too large, and always will be.
    TooWide,
    /// There was no room for its states, after room had become free so often.
    NoRoom {
        states: usize,
        freed: u64,
    },
}

/// The one writer of these maps.
pub struct DnsWriter {
    states: TypedMap<u32, DnsState>,
    rules: Mirror<u32, DnsAutomaton>,
    names: TypedMap<u32, DnsAutomaton>,
    of_endpoint: BTreeMap<u32, DnsAutomaton>,
    placed: HashMap<Rules, Place>,
    /// The rules that `write_names` was called with.
    named: HashSet<Rules>,
    /// Where automata were that a row no more points at.
    resting: Vec<(Instant, DnsAutomaton)>,
    /// How often room became free.
    freed: u64,
    /// Steps that are left in this round.
    work: usize,
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
        Ok(Self {
            states,
            rules,
            names,
            of_endpoint,
            placed: HashMap::new(),
            named: HashSet::new(),
            resting: Vec::new(),
            freed: 0,
            work: WORK_OF_ROUND,
        })
    }

    /// Writes the rules of these numbers that are not written yet. What does not fit the proxy judges.
    pub fn write_rules(&mut self, sets: &BTreeMap<RuleSetId, Rules>) -> Result<(), MapError> {
        let mut is_pruned = false;
        for (id, rules) in sets {
            let key = u32::from(id.0);
            let Some(automaton) = self.place(rules)? else {
                self.take(key)?;
                continue;
            };
            let mut put = self.rules.put(key, automaton);
            if matches!(put, Err(MapError::Full { .. })) && !is_pruned {
                is_pruned = true;
                self.take_others(sets)?;
                put = self.rules.put(key, automaton);
            }
            match put {
                Ok(Put::Replaced(before)) => self.rest(before),
                Ok(_) => {}
                // The next round tries again.
                Err(MapError::Full { .. }) => self.take(key)?,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// From now on the answers about these names are the proxy's, for each endpoint: rules name the addresses.
    pub fn write_names(&mut self, names: &BTreeMap<EndpointId, Rules>) -> Result<(), MapError> {
        let mut wanted = BTreeMap::new();
        self.named = names.values().cloned().collect();
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
            self.rest(before);
            match row.first {
                0 => self.of_endpoint.remove(&endpoint),
                _ => self.of_endpoint.insert(endpoint, row),
            };
        }
        Ok(())
    }

    /// Takes back the rules of other numbers, and the room of what nobody points at. The round has ended.
    pub fn prune(&mut self, sets: &BTreeMap<RuleSetId, Rules>) -> Result<(), MapError> {
        self.take_others(sets)?;
        let used = self.used();
        let wanted: HashSet<&Rules> = sets.values().chain(&self.named).collect();
        let mut unused = Vec::new();
        self.placed.retain(|rules, place| match place {
            Place::At(automaton) if !used.contains(&automaton.first) => {
                unused.push(*automaton);
                false
            }
            Place::At(_) => true,
            // Asked again, they would cost the same work again.
            Place::TooWide | Place::NoRoom { .. } => wanted.contains(rules),
        });
        unused.into_iter().for_each(|automaton| self.rest(automaton));
        let resting = self.resting.len();
        self.resting.retain(|(since, _)| since.elapsed() < REST);
        self.freed += u64::from(self.resting.len() < resting);
        self.work = WORK_OF_ROUND;
        Ok(())
    }

    /// Takes back the rules of other numbers.
    fn take_others(&mut self, sets: &BTreeMap<RuleSetId, Rules>) -> Result<(), MapError> {
        let is_wanted = |id: &u32| u16::try_from(*id).is_ok_and(|id| sets.contains_key(&RuleSetId(id)));
        let gone: Vec<u32> = self.rules.rows().keys().map(|key| key.0).filter(|id| !is_wanted(id)).collect();
        gone.into_iter().try_for_each(|id| self.take(id))
    }

    /// Takes a row of `dns_rules`; whoever reads what it points at may not have ended.
    fn take(&mut self, key: u32) -> Result<(), MapError> {
        if let Some(before) = self.rules.take(key)? {
            self.rest(before);
        }
        Ok(())
    }

    /// A row that pointed there points there no more.
    fn rest(&mut self, automaton: DnsAutomaton) {
        if automaton.first >= FIRST {
            self.resting.push((Instant::now(), automaton));
        }
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
        let known = self.placed.get(rules).copied();
        match known {
            Some(Place::At(automaton)) => return Ok(Some(automaton)),
            Some(Place::TooWide) => return Ok(None),
            Some(Place::NoRoom { states, freed }) if freed == self.freed || self.room(states).is_none() => {
                self.placed.insert(rules.clone(), Place::NoRoom { states, freed: self.freed });
                return Ok(None);
            }
            // The next round does it.
            _ if self.work < WORK_MAX => return Ok(None),
            _ => {}
        }
        let place = self.make(rules)?;
        if !matches!(place, Place::At(_)) && known.is_none() {
            tracing::info!(
                rules = rules.len(),
                "names that are too many or too wide for the kernel: the proxy judges their questions"
            );
        }
        self.placed.insert(rules.clone(), place);
        Ok(match place {
            Place::At(automaton) => Some(automaton),
            Place::TooWide | Place::NoRoom { .. } => None,
        })
    }

    /// Makes the automaton of these rules, and writes it where there is room.
    fn make(&mut self, rules: &Rules) -> Result<Place, MapError> {
        let patterns: Vec<NamePattern> = match rules.is_empty() {
            true => vec![NamePattern::Any],
            false => rules.iter().map(DnsRule::pattern).collect(),
        };
        let (automaton, work) = Automaton::counted(&patterns);
        self.work = self.work.saturating_sub(work);
        let Some(automaton) = automaton else { return Ok(Place::TooWide) };
        let states = automaton.states();
        let Some(at) = self.room(states.len()) else {
            return Ok(Place::NoRoom { states: states.len(), freed: self.freed });
        };
        for (index, state) in (at.first..).zip(states) {
            let row = DnsState { next: state.next, accepts: state.accepts.into(), pad: [0; 3] };
            self.states.insert(&index, &row)?;
        }
        Ok(Place::At(at))
    }

    /// Room for so many states, where nobody points at.
    fn room(&self, count: usize) -> Option<DnsAutomaton> {
        let count = u32::try_from(count).ok()?;
        let rows = self.rules.rows().values().chain(self.of_endpoint.values());
        let placed = self.placed.values().filter_map(|place| match place {
            Place::At(automaton) => Some(automaton),
            Place::TooWide | Place::NoRoom { .. } => None,
        });
        let rows = rows.chain(placed).chain(self.resting.iter().map(|(_, row)| row));
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
