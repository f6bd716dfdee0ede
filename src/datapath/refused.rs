//! Rows that a map did not take: the writer goes on without them, and tries them again when it is told to.
//!
//! A row is left alone only as long as it is desired as it was refused. Another value may fit.

use std::collections::BTreeMap;

use imbl::OrdMap;

/// The rows of one map that were refused.
pub(super) struct Refused<K, V> {
    rows: BTreeMap<K, (V, String)>,
    /// The last desired state, and what is left of it.
    last: Option<(OrdMap<K, V>, OrdMap<K, V>)>,
}

impl<K, V> Default for Refused<K, V> {
    fn default() -> Self {
        Self { rows: BTreeMap::new(), last: None }
    }
}

impl<K: Ord + Clone, V: Clone + PartialEq> Refused<K, V> {
    /// What of `desired` is to be written. The same as before, pointer for pointer, if nothing changed.
    pub(super) fn without(&mut self, desired: &OrdMap<K, V>) -> OrdMap<K, V> {
        if self.rows.is_empty() {
            return desired.clone();
        }
        if let Some((from, rest)) = &self.last
            && from.ptr_eq(desired)
        {
            return rest.clone();
        }
        let mut rest = desired.clone();
        for (key, (value, _)) in &self.rows {
            if desired.get(key) == Some(value) {
                rest.remove(key);
            }
        }
        self.last = Some((desired.clone(), rest.clone()));
        rest
    }

    /// The map did not take this row.
    pub(super) fn insert(&mut self, key: K, value: V, cause: String) {
        self.rows.insert(key, (value, cause));
        self.last = None;
    }

    /// Every row is to be tried again.
    pub(super) fn clear(&mut self) {
        self.rows.clear();
        self.last = None;
    }

    /// Forgets the rows that are not desired, or not as they were refused; returns the keys that are not.
    pub(super) fn forget_undesired(&mut self, desired: &OrdMap<K, V>) -> Vec<K> {
        let gone: Vec<K> = self.rows.keys().filter(|key| !desired.contains_key(*key)).cloned().collect();
        let count = self.rows.len();
        self.rows.retain(|key, (value, _)| desired.get(key) == Some(value));
        if self.rows.len() != count {
            self.last = None;
        }
        gone
    }

    /// How many rows were refused.
    pub(super) fn len(&self) -> usize {
        self.rows.len()
    }

    /// The refused rows, and why.
    pub(super) fn causes(&self) -> impl Iterator<Item = (&K, &str)> {
        self.rows.iter().map(|(key, (_, cause))| (key, cause.as_str()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_row_is_left_out_until_it_changes_or_is_tried_again() {
        let mut refused = Refused::default();
        let one: OrdMap<u8, u8> = [(1, 1), (2, 2)].into_iter().collect();
        assert!(refused.without(&one).ptr_eq(&one));
        refused.insert(2, 2, "full".to_owned());
        let rest = refused.without(&one);
        assert_eq!(rest, [(1, 1)].into_iter().collect());
        assert!(refused.without(&one).ptr_eq(&rest), "nothing changed");
        let two: OrdMap<u8, u8> = [(2, 3)].into_iter().collect();
        assert_eq!(refused.without(&two), two, "another value is tried");
        assert_eq!(refused.forget_undesired(&OrdMap::new()), [2]);
        refused.insert(2, 2, "full".to_owned());
        refused.clear();
        assert!(refused.without(&one).ptr_eq(&one));
    }
}
