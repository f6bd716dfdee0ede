//! What a map held when it last was exactly what was desired: with it, a round costs what changed.
//!
//! A round writes and then prunes. Only when both have succeeded for one desired state is the next
//! one compared with it; else every row is looked at again.

use imbl::OrdMap;

/// How a map stands to the desired states that were given for it.
pub(super) enum Settled<K, V> {
    /// Rows of a former process, or of a write that failed.
    Unknown,
    /// It holds all rows of `to`, and of what was before; `from` is that, where it is known.
    Written { from: Option<OrdMap<K, V>>, to: OrdMap<K, V> },
    /// It holds exactly these.
    At(OrdMap<K, V>),
}

impl<K: Ord + Clone, V: Clone + PartialEq> Settled<K, V> {
    /// What the rows to be written are to be compared with; `None`: with the map. Until `written`, nothing is known.
    pub(super) fn before_write(&mut self) -> Option<OrdMap<K, V>> {
        match std::mem::replace(self, Self::Unknown) {
            Self::At(rows) => Some(rows),
            Self::Unknown | Self::Written { .. } => None,
        }
    }

    /// All rows of `to` have been written; `from` is what `before_write` said.
    pub(super) fn written(&mut self, from: Option<OrdMap<K, V>>, to: &OrdMap<K, V>) {
        *self = Self::Written { from, to: to.clone() };
    }

    /// Where to look for rows that are not of `desired`; `None`: in the map.
    pub(super) fn before_prune(&self, desired: &OrdMap<K, V>) -> Option<OrdMap<K, V>> {
        match self {
            Self::Written { from, to } if to.ptr_eq(desired) => from.clone(),
            Self::At(rows) if rows.ptr_eq(desired) => Some(rows.clone()),
            _ => None,
        }
    }

    /// The map holds no rows but those of `desired`.
    pub(super) fn pruned(&mut self, desired: &OrdMap<K, V>) {
        let is_written = matches!(self, Self::Written { to, .. } | Self::At(to) if to.ptr_eq(desired));
        *self = if is_written { Self::At(desired.clone()) } else { Self::Unknown };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(rows: &[(u8, u8)]) -> OrdMap<u8, u8> {
        rows.iter().copied().collect()
    }

    #[test]
    fn a_round_that_succeeds_is_what_the_next_is_compared_with() {
        let (one, two) = (rows(&[(1, 1)]), rows(&[(2, 2)]));
        let mut settled = Settled::Unknown;
        assert_eq!(settled.before_write(), None);
        settled.written(None, &one);
        assert_eq!(settled.before_prune(&one), None);
        settled.pruned(&one);
        let from = settled.before_write();
        assert_eq!(from, Some(one.clone()));
        settled.written(from, &two);
        assert_eq!(settled.before_prune(&two), Some(one));
        settled.pruned(&two);
        assert_eq!(settled.before_prune(&two), Some(two));
    }

    #[test]
    fn what_was_not_written_or_not_pruned_is_not_known() {
        let (one, two) = (rows(&[(1, 1)]), rows(&[(2, 2)]));
        let mut settled = Settled::At(one.clone());
        // This write fails.
        assert_eq!(settled.before_write(), Some(one.clone()));
        assert_eq!(settled.before_write(), None);
        settled.pruned(&one);
        assert_eq!(settled.before_write(), None);
        // This one is not pruned.
        settled.written(Some(one), &two);
        assert_eq!(settled.before_prune(&rows(&[(3, 3)])), None);
        assert_eq!(settled.before_write(), None);
    }
}
