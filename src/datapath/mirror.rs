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
