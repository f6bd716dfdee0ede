//! Which identities have addresses, whether their labels are known or not.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use imbl::ordmap::DiffItem;

use crate::model::{BaseAddress, IdentityId};
use crate::tables::Snapshot;

/// How many addresses each identity of the cluster has.
#[derive(Default)]
pub struct Owners(HashMap<IdentityId, usize>);

impl Owners {
    /// Takes in what changed; returns who has an address now and had none, or has none any more.
    pub fn follow(
        &mut self,
        before: &Snapshot<IpAddr, BaseAddress>,
        after: &Snapshot<IpAddr, BaseAddress>,
    ) -> BTreeSet<IdentityId> {
        let mut changed = BTreeSet::new();
        for item in before.diff(after) {
            let (gone, come) = match item {
                DiffItem::Add(_, owner) => (None, Some(owner)),
                DiffItem::Update { old: (_, old), new: (_, new) } => (Some(old), Some(new)),
                DiffItem::Remove(_, owner) => (Some(owner), None),
            };
            let identity = |owner: Option<&BaseAddress>| {
                owner.map(|owner| owner.identity).filter(|id| !id.is_reserved())
            };
            if let Some(id) = identity(come) {
                let count = self.0.entry(id).or_default();
                *count += 1;
                if *count == 1 {
                    changed.insert(id);
                }
            }
            if let Some(id) = identity(gone) {
                let count = self.0.entry(id).or_default();
                *count = count.saturating_sub(1);
                if *count == 0 {
                    self.0.remove(&id);
                    changed.insert(id);
                }
            }
        }
        changed
    }

    /// It has an address.
    pub fn has(&self, id: IdentityId) -> bool {
        self.0.contains_key(&id)
    }
}
