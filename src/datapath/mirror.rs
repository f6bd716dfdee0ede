//! A map and what it holds, remembered: a writer compares with its mirror and
//! writes the difference, so that an unchanged desired state costs no system call.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::abi::Plain;
use super::map::{Bytes, MapError, Rows, TypedMap};

/// How many rows a map has, for `map_fill`; its writer keeps it.
pub(super) type Fill = Arc<AtomicUsize>;

/// What `put` found.
#[derive(Clone, Copy, Debug)]
pub(super) enum Put<V> {
    /// The row was there, byte for byte.
    Unchanged,
    /// There was no row.
    Inserted,
    /// There was another row.
    Replaced(V),
}

/// A map with exactly one writer, which is the owner of this.
#[derive(Debug)]
pub(super) struct Mirror<K, V> {
    map: TypedMap<K, V>,
    rows: Rows<K, V>,
    fill: Fill,
}

impl<K: Plain, V: Plain> Mirror<K, V> {
    /// Reads the map back.
    pub(super) fn read(map: TypedMap<K, V>, fill: Fill) -> Result<Self, MapError> {
        let rows = map.rows()?;
        fill.store(rows.len(), Ordering::Relaxed);
        Ok(Self { map, rows, fill })
    }

    /// What the map holds.
    pub(super) fn rows(&self) -> &Rows<K, V> {
        &self.rows
    }

    /// Writes a row unless it is there already.
    pub(super) fn put(&mut self, key: K, value: V) -> Result<Put<V>, MapError> {
        let old = self.rows.get(&Bytes(key)).copied();
        if old.is_some_and(|old| old.as_bytes() == value.as_bytes()) {
            return Ok(Put::Unchanged);
        }
        self.map.insert(&key, &value)?;
        self.rows.insert(Bytes(key), value);
        self.fill.store(self.rows.len(), Ordering::Relaxed);
        Ok(old.map_or(Put::Inserted, Put::Replaced))
    }

    /// Writes many rows, those that are not there already, and says of each what `put` would. Rows behind one
    /// that the map does not take are not written.
    pub(super) fn put_all(
        &mut self,
        rows: impl IntoIterator<Item = (K, V)>,
        mut found: impl FnMut(Put<V>),
    ) -> Result<(), MapError> {
        let is_news = |(key, value): &(K, V)| {
            self.rows.get(&Bytes(*key)).is_none_or(|old| old.as_bytes() != value.as_bytes())
        };
        let (keys, values): (Vec<K>, Vec<V>) = rows.into_iter().filter(is_news).unzip();
        let (written, result) = self.map.insert_all(&keys, &values);
        for (key, value) in keys.into_iter().zip(values).take(written) {
            found(self.rows.insert(Bytes(key), value).map_or(Put::Inserted, Put::Replaced));
        }
        self.fill.store(self.rows.len(), Ordering::Relaxed);
        result
    }

    /// Deletes many rows; how many of them there were.
    pub(super) fn take_all(&mut self, keys: impl IntoIterator<Item = K>) -> Result<usize, MapError> {
        let is_there = |key: &K| self.rows.contains_key(&Bytes(*key));
        let keys: Vec<K> = keys.into_iter().filter(is_there).collect();
        let result = self.map.remove_all(&keys).1;
        if result.is_err() {
            // Which of them are gone is not known.
            self.refresh()?;
            return result.map(|()| 0);
        }
        for key in &keys {
            self.rows.remove(&Bytes(*key));
        }
        self.fill.store(self.rows.len(), Ordering::Relaxed);
        Ok(keys.len())
    }

    /// Reads the map again: how many rows somebody else changed.
    pub(super) fn refresh(&mut self) -> Result<u64, MapError> {
        let rows = self.map.rows()?;
        let is_same = |key: &Bytes<K>, row: &V, others: &Rows<K, V>| {
            others.get(key).is_some_and(|other| other.as_bytes() == row.as_bytes())
        };
        let lost = self.rows.iter().filter(|(key, row)| !is_same(key, row, &rows)).count();
        let strange = rows.keys().filter(|key| !self.rows.contains_key(key)).count();
        self.rows = rows;
        self.fill.store(self.rows.len(), Ordering::Relaxed);
        Ok((lost + strange) as u64)
    }

    /// Deletes a row; what it was.
    pub(super) fn take(&mut self, key: K) -> Result<Option<V>, MapError> {
        if !self.rows.contains_key(&Bytes(key)) {
            return Ok(None);
        }
        self.map.remove(&key)?;
        let old = self.rows.remove(&Bytes(key));
        self.fill.store(self.rows.len(), Ordering::Relaxed);
        Ok(old)
    }
}
