//! Numbers of rule sets: what a row of `policy_rules` leaves to the proxy.
//!
//! The rules of a number never change, and a number that a former process gave is not given again while its
//! rows may be there.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, RwLock};

use crate::model::L7Set;
use crate::model::l7::{RuleSet, RuleSetId};

/// Who gets no number of his own gets this one, which the proxy never knows: it lets nothing pass.
const NONE_LEFT: RuleSetId = RuleSetId(u16::MAX);

/// Rule sets and their numbers. A handle that can be shared.
#[derive(Clone, Debug)]
pub struct RuleSets(Arc<RwLock<Known>>);

#[derive(Debug)]
struct Known {
    ids: HashMap<Arc<L7Set>, RuleSetId>,
    by_id: BTreeMap<RuleSetId, Arc<L7Set>>,
    inherited: BTreeSet<u16>,
    next: u16,
}

impl RuleSets {
    pub(super) fn beside(inherited: BTreeSet<u16>) -> Self {
        let next = inherited.last().map_or(1, |highest| highest.wrapping_add(1));
        Self(Arc::new(RwLock::new(Known { ids: HashMap::new(), by_id: BTreeMap::new(), inherited, next })))
    }

    /// The number of these rules.
    pub fn id_of(&self, set: &Arc<L7Set>) -> RuleSetId {
        let mut known = self.0.write().expect("nobody panics while holding the lock");
        if let Some(id) = known.ids.get(set) {
            return *id;
        }
        let Some(id) = known.free() else { return NONE_LEFT };
        known.next = id.0.wrapping_add(1);
        known.ids.insert(set.clone(), id);
        known.by_id.insert(id, set.clone());
        id
    }

    /// The rules of a number.
    pub fn get(&self, id: RuleSetId) -> Option<RuleSet> {
        let known = self.0.read().expect("nobody panics while holding the lock");
        known.by_id.get(&id).map(|set| set.numbered(id))
    }

    /// Forgets the rules of these numbers. Nobody may ask by them any more.
    pub fn forget(&self, ids: &BTreeSet<RuleSetId>) {
        let mut known = self.0.write().expect("nobody panics while holding the lock");
        for id in ids {
            if let Some(set) = known.by_id.remove(id) {
                known.ids.remove(&set);
            }
        }
    }
}

impl Known {
    /// The next number that nobody has: none is given again before all others were.
    fn free(&self) -> Option<RuleSetId> {
        let above = (self.next..NONE_LEFT.0).chain(1..self.next);
        let is_free =
            |id: &u16| *id > 0 && !self.by_id.contains_key(&RuleSetId(*id)) && !self.inherited.contains(id);
        above.into_iter().find(is_free).map(RuleSetId)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Origins;
    use crate::model::l7::L7Rules;

    fn set(name: &str) -> Arc<L7Set> {
        let rules = L7Rules::ServerNames(vec![name.to_owned()]);
        Arc::new(L7Set { rules, origins: Origins::default(), visibility_only: false })
    }

    #[test]
    fn equal_rules_have_one_number_that_nobody_had_before() {
        let sets = RuleSets::beside(BTreeSet::from([0, 3]));
        assert_eq!(
            [sets.id_of(&set("a")), sets.id_of(&set("b")), sets.id_of(&set("a"))].map(|id| id.0),
            [4, 5, 4]
        );
        sets.forget(&BTreeSet::from([RuleSetId(4)]));
        assert_eq!(sets.get(RuleSetId(4)), None);
        assert_eq!(sets.id_of(&set("c")), RuleSetId(6), "a number is not used again soon");
        assert_eq!(sets.get(RuleSetId(5)).map(|set| set.id), Some(RuleSetId(5)));
    }

    #[test]
    fn when_all_numbers_are_given_nothing_passes() {
        let sets = RuleSets::beside(BTreeSet::from_iter(0..u16::MAX - 1));
        assert_eq!(sets.id_of(&set("a")), RuleSetId(u16::MAX - 1));
        assert_eq!(sets.id_of(&set("b")), NONE_LEFT);
        assert_eq!(sets.get(NONE_LEFT), None);
    }
}
