//! What the rest of the agent has of the proxy: the rule sets that it must have, and those that it has.

use std::collections::BTreeSet;
use std::sync::Arc;

use tokio::sync::watch;

use crate::model::l7::RuleSetId;

/// The numbers of rule sets that policies ask for.
pub type Wanted = Arc<BTreeSet<RuleSetId>>;

/// A handle that can be shared.
#[derive(Clone, Debug)]
pub struct Proxy {
    wanted: Arc<watch::Sender<Wanted>>,
    known: Arc<watch::Sender<BTreeSet<RuleSetId>>>,
}

impl Default for Proxy {
    fn default() -> Self {
        Self {
            wanted: Arc::new(watch::Sender::new(Wanted::default())),
            known: Arc::new(watch::Sender::new(BTreeSet::new())),
        }
    }
}

impl Proxy {
    /// Policies ask for these rule sets now.
    pub fn want(&self, sets: BTreeSet<RuleSetId>) {
        self.wanted.send_if_modified(|wanted| {
            let is_changed = **wanted != sets;
            if is_changed {
                *wanted = Arc::new(sets);
            }
            is_changed
        });
    }

    /// The proxy has all of these, or had them: a new proxy gets them first of all.
    pub fn knows(&self, sets: &BTreeSet<RuleSetId>) -> bool {
        let known = self.known.borrow();
        sets.iter().all(|set| known.contains(set))
    }

    /// Changes when the proxy has got rule sets.
    pub fn known(&self) -> watch::Receiver<BTreeSet<RuleSetId>> {
        self.known.subscribe()
    }

    /// Changes with the rule sets that policies ask for.
    pub fn wanted(&self) -> watch::Receiver<Wanted> {
        self.wanted.subscribe()
    }

    pub(super) fn has(&self, sets: impl IntoIterator<Item = RuleSetId>) {
        self.known.send_modify(|known| known.extend(sets));
    }

    /// Takes out, and returns, what the proxy had and is not among `wanted`.
    pub(super) fn take_unwanted(&self, wanted: &BTreeSet<RuleSetId>) -> BTreeSet<RuleSetId> {
        let mut gone = BTreeSet::new();
        self.known.send_modify(|known| {
            gone = known.difference(wanted).copied().collect();
            known.retain(|set| wanted.contains(set));
        });
        gone
    }

    pub(super) fn has_no_more(&self, sets: &BTreeSet<RuleSetId>) {
        self.known.send_modify(|known| known.retain(|set| !sets.contains(set)));
    }
}
