//! Rule ids: what a row says of who decides, in one number.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, RwLock};

use crate::model::{MatchType, Origins};

/// Rule ids of events and the policies that they stand for. Ids of a former process are not used
/// again, so that its last events are not misattributed. 0 is nobody.
#[derive(Clone, Debug)]
pub struct RuleOrigins(Arc<RwLock<KnownOrigins>>);

/// So many ids that no row has any more are kept: records that are read later name them.
const GONE_KEPT: usize = 4096;

/// Who says so, whether that is only reported, and what the row looked at.
type Saying = (Origins, bool, MatchType);

#[derive(Debug)]
struct KnownOrigins {
    next: u32,
    by_id: BTreeMap<u32, Saying>,
    ids: HashMap<Saying, u32>,
    /// How many there may be before those that are gone are looked for.
    limit: usize,
}

impl RuleOrigins {
    pub(super) fn starting_above(highest: u32) -> Self {
        Self(Arc::new(RwLock::new(KnownOrigins {
            next: highest.wrapping_add(1).max(1),
            by_id: BTreeMap::new(),
            ids: HashMap::new(),
            limit: 2 * GONE_KEPT,
        })))
    }

    /// The policies that a rule id stands for.
    pub fn get(&self, rule_id: u32) -> Option<Origins> {
        let known = self.0.read().expect("nobody panics while holding the lock");
        known.by_id.get(&rule_id).map(|(origins, ..)| origins.clone())
    }

    /// What the rule lets through its policies would deny: they only report it.
    pub fn is_audit(&self, rule_id: u32) -> bool {
        let known = self.0.read().expect("nobody panics while holding the lock");
        known.by_id.get(&rule_id).is_some_and(|(_, is_audit, _)| *is_audit)
    }

    /// What the row looked at.
    pub fn match_type(&self, rule_id: u32) -> MatchType {
        let known = self.0.read().expect("nobody panics while holding the lock");
        known.by_id.get(&rule_id).map_or(MatchType::None, |(.., matched)| *matched)
    }

    pub(super) fn id_of(&self, origins: &Origins, is_audit: bool, matched: MatchType) -> u32 {
        if origins.is_empty() {
            return 0;
        }
        let key = (origins.clone(), is_audit, matched);
        let mut known = self.0.write().expect("nobody panics while holding the lock");
        if let Some(&id) = known.ids.get(&key) {
            return id;
        }
        let id = known.next;
        known.next = id.wrapping_add(1).max(1);
        known.by_id.insert(id, key.clone());
        known.ids.insert(key, id);
        id
    }

    /// Forgets what is long gone, now and then: `used` yields what rows have.
    pub(super) fn forget<'a>(&self, used: impl Iterator<Item = &'a Origins>) {
        let mut known = self.0.write().expect("nobody panics while holding the lock");
        if known.by_id.len() < known.limit {
            return;
        }
        let used: HashSet<&Origins> = used.collect();
        let ids = known.ids.iter().filter(|((origins, ..), _)| used.contains(origins)).map(|(_, id)| *id);
        let used: HashSet<u32> = ids.collect();
        let unused: Vec<u32> = known.by_id.keys().copied().filter(|id| !used.contains(id)).collect();
        for id in &unused[..unused.len().saturating_sub(GONE_KEPT)] {
            if let Some(key) = known.by_id.remove(id) {
                known.ids.remove(&key);
            }
        }
        known.limit = 2 * (used.len() + GONE_KEPT);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{CompiledRuleKey, ObjectKey, PolicyRef};

    fn key(protocol: Option<u8>, port: u16, port_prefix_length: u8) -> CompiledRuleKey {
        CompiledRuleKey { class: 0x0102, protocol, port, port_prefix_length }
    }

    #[test]
    fn one_rule_id_per_origin_above_the_inherited_ones() {
        let origins = RuleOrigins::starting_above(5);
        let (a, b) = (origin("a"), origin("b"));
        let id_of = |of: &Origins| origins.id_of(of, false, MatchType::All);
        let ids = [id_of(&a), id_of(&b), id_of(&a), id_of(&Arc::from([]))];
        assert_eq!(ids, [6, 7, 6, 0]);
        assert_eq!([0, 5, 6, 7, 8].map(|id| origins.get(id)), [None, None, Some(a), Some(b), None]);
    }

    #[test]
    fn a_rule_id_says_what_the_row_looked_at() {
        let origins = RuleOrigins::starting_above(0);
        let a = origin("a");
        let class = |class, key: CompiledRuleKey| CompiledRuleKey { class, ..key };
        for (id, (key, expected)) in [
            (class(1, key(None, 0, 0)), MatchType::Peer),
            (class(1, key(Some(6), 0, 0)), MatchType::PeerAndProtocol),
            (class(1, key(Some(6), 80, 16)), MatchType::PeerAndPort),
            (class(0, key(Some(6), 80, 8)), MatchType::Port),
            (class(0, key(Some(6), 0, 0)), MatchType::Protocol),
            (class(0, key(None, 0, 0)), MatchType::All),
        ]
        .into_iter()
        .enumerate()
        {
            let got = origins.id_of(&a, false, key.match_type());
            assert_eq!((got, origins.match_type(got)), (id as u32 + 1, expected));
        }
        assert_eq!(origins.match_type(99), MatchType::None);
    }

    #[test]
    fn a15_origins_that_no_row_has_any_more_are_forgotten() {
        let origins = RuleOrigins::starting_above(0);
        let kept = origin("kept");
        let first = origins.id_of(&kept, false, MatchType::All);
        let count = 5 * GONE_KEPT;
        for number in 0..count {
            origins.id_of(&origin(&number.to_string()), false, MatchType::All);
            origins.forget([&kept].into_iter());
        }
        let last = u32::try_from(count).expect("few") + first;
        assert_eq!(origins.get(first), Some(kept.clone()), "a row has it");
        assert_eq!(
            origins.get(last),
            Some(origin(&(count - 1).to_string())),
            "its records may still be read"
        );
        assert_eq!(origins.get(first + 1), None, "it is long gone");
        assert_eq!(origins.id_of(&kept, false, MatchType::All), first);
    }

    fn origin(name: &str) -> Origins {
        Arc::from([PolicyRef::network_policy(&ObjectKey::new("shop", name))])
    }
}
