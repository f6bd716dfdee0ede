//! What the rest of the agent has of the proxy: the rule sets that it must have, and those that it has.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use tokio::sync::watch;

use super::envoy;
use crate::datapath::RuleSets;
use crate::model::l7::{RuleSet, RuleSetId};

/// The numbers of rule sets that policies ask for.
pub type Wanted = Arc<BTreeSet<RuleSetId>>;

/// A handle that can be shared.
#[derive(Clone, Debug)]
pub struct Proxy {
    wanted: Arc<watch::Sender<Wanted>>,
    known: Arc<watch::Sender<BTreeSet<RuleSetId>>>,
    /// Those that an Envoy has; `None`: there is no Envoy to have any.
    envoy: Option<Arc<OfEnvoy>>,
}

#[derive(Debug)]
struct OfEnvoy {
    sets: RuleSets,
    has: Mutex<BTreeSet<RuleSetId>>,
}

impl OfEnvoy {
    /// Has the set, or never will: it is not for an Envoy.
    fn has(&self, set: RuleSetId) -> bool {
        let has = self.has.lock().expect("nobody panics with the lock");
        has.contains(&set) || !self.sets.get(set).is_some_and(|set| envoy::judges_by(&set))
    }
}

impl Default for Proxy {
    fn default() -> Self {
        Self {
            wanted: Arc::new(watch::Sender::new(Wanted::default())),
            known: Arc::new(watch::Sender::new(BTreeSet::new())),
            envoy: None,
        }
    }
}

impl Proxy {
    /// With an Envoy that judges by what it can of these sets.
    pub fn beside_envoy(sets: RuleSets) -> Self {
        Self { envoy: Some(Arc::new(OfEnvoy { sets, has: Mutex::default() })), ..Self::default() }
    }

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
        let has = |set: &RuleSetId| self.envoy.as_ref().is_none_or(|envoy| envoy.has(*set));
        sets.iter().all(|set| known.contains(set) && has(set))
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

    /// Its Envoy listens for these.
    pub(super) fn envoy_has(&self, sets: BTreeSet<RuleSetId>) {
        if let Some(envoy) = self.envoy.as_ref().filter(|_| !sets.is_empty()) {
            envoy.has.lock().expect("nobody panics with the lock").extend(sets);
            self.known.send_modify(|_| {});
        }
    }

    /// True if an Envoy judges by the set where it judges alone.
    pub(super) fn is_by_envoy(&self, set: &RuleSet) -> bool {
        self.envoy.is_some() && envoy::judges_by(set)
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
