//! Tables: the agent's state between watching and programming.
//!
//! One writer, cheap snapshots, a revision that can be awaited. Sources call
//! `apply`, `delete` and `reset`; compilers read snapshots and never block a
//! writer. A snapshot is a persistent map: taking one costs O(1), and two
//! snapshots of one table can be diffed in time proportional to the difference.

use std::sync::{Mutex, RwLock};

pub use imbl::OrdMap;
use tokio::sync::watch;

/// A value that was read at one moment and never changes.
pub type Snapshot<K, V> = OrdMap<K, V>;

/// A keyed set of objects with one writer and many readers. Values are cheap to
/// clone (`Arc<T>` where `T` is large).
pub struct Table<K, V> {
    rows: RwLock<OrdMap<K, V>>,
    writer: Mutex<()>,
    state: watch::Sender<State>,
}

/// What a waiter can learn without taking a snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Raised by every change.
    pub revision: u64,
    /// The source has delivered its first full list.
    pub is_synced: bool,
}

impl<K: Ord + Clone, V: Clone + PartialEq> Default for Table<K, V> {
    fn default() -> Self {
        Self::new()
    }
}

impl<K: Ord + Clone, V: Clone + PartialEq> Table<K, V> {
    /// An empty table that is not synced.
    pub fn new() -> Self {
        Self {
            rows: RwLock::new(OrdMap::new()),
            writer: Mutex::new(()),
            state: watch::Sender::new(State::default()),
        }
    }

    /// Inserts or replaces a row; true if anything changed.
    pub fn apply(&self, key: K, value: V) -> bool {
        self.write(|rows| match rows.get(&key) {
            Some(old) if *old == value => false,
            _ => {
                rows.insert(key, value);
                true
            }
        })
    }

    /// Removes a row; true if it was there.
    pub fn delete(&self, key: &K) -> bool {
        self.write(|rows| rows.remove(key).is_some())
    }

    /// Makes the table hold exactly `all`, and marks it synced; true if any row changed.
    pub fn reset(&self, all: impl IntoIterator<Item = (K, V)>) -> bool {
        let all: OrdMap<K, V> = all.into_iter().collect();
        let changed = self.write(|rows| {
            let changed = *rows != all;
            if changed {
                *rows = all;
            }
            changed
        });
        self.state.send_if_modified(|state| !std::mem::replace(&mut state.is_synced, true));
        changed
    }

    /// The rows as they are now.
    pub fn snapshot(&self) -> Snapshot<K, V> {
        self.rows.read().expect("no reader or writer panics while it holds the lock").clone()
    }

    /// One row as it is now.
    pub fn get(&self, key: &K) -> Option<V> {
        self.rows.read().expect("no reader or writer panics while it holds the lock").get(key).cloned()
    }

    /// Revision and sync state, to read or to await (`changed`, `wait_for`).
    pub fn subscribe(&self) -> watch::Receiver<State> {
        self.state.subscribe()
    }

    /// The source has delivered its first full list.
    pub fn is_synced(&self) -> bool {
        self.state.borrow().is_synced
    }

    fn write(&self, change: impl FnOnce(&mut OrdMap<K, V>) -> bool) -> bool {
        let _one_writer = self.writer.lock().expect("no writer panics while it holds the lock");
        let mut rows = self.snapshot();
        let changed = change(&mut rows);
        if changed {
            *self.rows.write().expect("no reader or writer panics while it holds the lock") = rows;
            self.state.send_modify(|state| state.revision += 1);
        }
        changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_rows_change_nothing() {
        let table = Table::new();
        assert!(table.apply("a", 1));
        assert!(!table.apply("a", 1));
        assert!(table.apply("a", 2));
        assert_eq!(table.subscribe().borrow().revision, 2);
    }

    #[test]
    fn reset_drops_what_is_not_listed_and_syncs() {
        let table = Table::new();
        table.apply("gone", 1);
        assert!(!table.is_synced());
        assert!(table.reset([("kept", 2)]));
        assert!(table.is_synced());
        assert_eq!(table.snapshot().into_iter().collect::<Vec<_>>(), vec![("kept", 2)]);
        assert!(!table.reset([("kept", 2)]));
    }
}
