//! Identities between their source and the pods of this node.
//!
//! A row of `identities` may be ahead of the source (this agent just claimed it), or
//! outlive its object: the operator, or in a directory of manifests every agent, deletes
//! identities that nobody seems to use, and an agent that was cut off for longer than the grace time comes back to find one of its
//! own gone. Such a row stays for as long as pods of this node have it, so that they keep
//! running, and is in `to_claim` until the object is there again.
//!
//! `to_claim` is written before `identities` where a number becomes unusable, and after
//! it where it becomes usable.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};

use super::Tables;
use crate::model::{IdentityId, IdentityLabels};

/// What is known of identities beside what the source says.
#[derive(Default)]
pub struct Claims(Mutex<State>);

/// Numbers with their labels.
type Rows = BTreeMap<IdentityId, Arc<IdentityLabels>>;

#[derive(Default)]
struct State {
    /// Claimed, and not shown by the source yet: a list that began before the claim must
    /// not take them away again.
    pending: Rows,
    /// Of pods of this node.
    held: Rows,
    /// Held ones whose object is gone.
    gone: BTreeSet<IdentityId>,
}

impl Claims {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("nobody panics while holding the lock")
    }
}

impl Tables {
    /// Says which identities the pods of this node have: their rows stay, whatever becomes of the objects.
    pub fn hold_identities(&self, held: Rows) {
        let mut claims = self.claims.lock();
        for (id, labels) in &held {
            if self.identities.get(id).is_none() {
                claims.gone.insert(*id);
                self.to_claim.apply(*id, ());
                self.identities.apply(*id, labels.clone());
            }
        }
        let given_up: Vec<_> = claims.gone.iter().filter(|id| !held.contains_key(id)).copied().collect();
        for id in given_up {
            claims.gone.remove(&id);
            self.identities.delete(&id);
            self.to_claim.delete(&id);
        }
        claims.held = held;
    }

    /// Shows an identity that was just claimed, ahead of the source.
    pub(super) fn apply_claim(&self, id: IdentityId, labels: Arc<IdentityLabels>) {
        let mut claims = self.claims.lock();
        if claims.gone.remove(&id) || self.identities.get(&id).is_none() {
            claims.pending.insert(id, labels.clone());
            self.identities.apply(id, labels);
        }
        self.to_claim.delete(&id);
    }

    /// The source shows an identity.
    pub(super) fn apply_identity(
        &self,
        id: IdentityId,
        labels: Arc<IdentityLabels>,
        is_unused: bool,
    ) -> bool {
        let mut claims = self.claims.lock();
        claims.pending.remove(&id);
        claims.gone.remove(&id);
        if is_unused {
            self.to_claim.apply(id, ());
            self.identities.apply(id, labels)
        } else {
            let changed = self.identities.apply(id, labels);
            self.to_claim.delete(&id) || changed
        }
    }

    /// The source shows an identity no more.
    pub(super) fn delete_identity(&self, id: IdentityId) -> bool {
        let mut claims = self.claims.lock();
        claims.pending.remove(&id);
        if claims.held.contains_key(&id) {
            claims.gone.insert(id);
            return self.to_claim.apply(id, ());
        }
        let changed = self.identities.delete(&id);
        self.to_claim.delete(&id) || changed
    }

    /// The source shows exactly these; true in a row for one that is marked as unused.
    pub(super) fn reset_identities(&self, listed: BTreeMap<IdentityId, (Arc<IdentityLabels>, bool)>) -> bool {
        let mut claims = self.claims.lock();
        let State { pending, held, gone } = &mut *claims;
        pending.retain(|id, _| !listed.contains_key(id));
        *gone =
            held.keys().filter(|id| !listed.contains_key(id) && !pending.contains_key(id)).copied().collect();
        let marked = listed.iter().filter(|(_, (_, is_unused))| *is_unused).map(|(id, _)| *id);
        let to_claim: BTreeMap<_, _> = marked.chain(gone.iter().copied()).map(|id| (id, ())).collect();
        let kept = gone.iter().filter_map(|id| Some((*id, held.get(id)?.clone())));
        let rows: Rows = listed
            .into_iter()
            .map(|(id, (labels, _))| (id, labels))
            .chain(pending.clone())
            .chain(kept)
            .collect();
        self.to_claim.reset(to_claim);
        self.identities.reset(rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(namespace: &str) -> Arc<IdentityLabels> {
        Arc::new(IdentityLabels { namespace: namespace.to_owned(), ..IdentityLabels::default() })
    }

    const ID: IdentityId = IdentityId(4711);

    fn held() -> Rows {
        Rows::from([(ID, labels("shop"))])
    }

    fn is_usable(tables: &Tables) -> bool {
        tables.identities.get(&ID).is_some() && tables.to_claim.get(&ID).is_none()
    }

    #[test]
    fn a_marked_identity_is_to_be_claimed_and_its_row_stays() {
        let tables = Tables::new();
        tables.apply_identity(ID, labels("shop"), true);
        assert!(tables.identities.get(&ID).is_some() && !is_usable(&tables));
        tables.apply_claim(ID, labels("shop"));
        assert!(is_usable(&tables));
    }

    #[test]
    fn a_held_identity_outlives_its_object_until_it_is_claimed_again() {
        let tables = Tables::new();
        tables.apply_identity(ID, labels("shop"), false);
        tables.hold_identities(held());
        tables.delete_identity(ID);
        assert_eq!(tables.identities.get(&ID), Some(labels("shop")));
        assert!(!is_usable(&tables));
        // A list says the same.
        tables.reset_identities(BTreeMap::new());
        assert_eq!(tables.identities.get(&ID), Some(labels("shop")));
        tables.apply_claim(ID, labels("shop"));
        assert!(is_usable(&tables));
        // A list that began before the claim.
        tables.reset_identities(BTreeMap::new());
        assert!(is_usable(&tables));
    }

    #[test]
    fn what_is_gone_goes_with_the_last_pod_that_held_it() {
        let tables = Tables::new();
        tables.apply_identity(ID, labels("shop"), false);
        tables.hold_identities(held());
        tables.delete_identity(ID);
        tables.hold_identities(Rows::new());
        assert!(tables.identities.get(&ID).is_none() && tables.to_claim.get(&ID).is_none());
        // Deleted before this node said that it holds it.
        tables.hold_identities(held());
        assert!(tables.identities.get(&ID).is_some() && !is_usable(&tables));
    }

    #[test]
    fn others_may_take_a_number_that_is_gone() {
        let tables = Tables::new();
        tables.apply_identity(ID, labels("shop"), false);
        tables.hold_identities(held());
        tables.delete_identity(ID);
        tables.apply_identity(ID, labels("other"), false);
        assert_eq!(tables.identities.get(&ID), Some(labels("other")));
        tables.hold_identities(Rows::new());
        assert_eq!(tables.identities.get(&ID), Some(labels("other")));
    }
}
