//! Typed access to one map: keys and values as the contract's types, errors that
//! name the map. Walking uses the kernel's batches to the end; libbpf-rs' own
//! batch iterator stops at the first short batch and so loses entries.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::marker::PhantomData;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::AtomicBool;

use libbpf_rs::libbpf_sys;
use libbpf_rs::{MapCore, MapHandle, MapType};
use nix::libc::{E2BIG, ENOENT, ENOSPC};
use thiserror::Error;

use super::abi::Plain;

/// Why a map could not be read or written.
#[derive(Debug, Error)]
pub enum MapError {
    /// It holds as many rows as it may.
    #[error("map {map} is full ({capacity} rows): raise it with --map-size {map}={}", capacity.saturating_mul(2))]
    Full {
        /// The map.
        map: String,
        /// Rows that it can hold.
        capacity: u32,
    },
    /// The pinned map is not of the contract's shape.
    #[error(
        "map {map} has keys of {key} and values of {value} bytes, this program's contract says otherwise"
    )]
    Shape {
        /// The map.
        map: String,
        /// Its key size.
        key: u32,
        /// Its value size.
        value: u32,
    },
    /// The kernel refused.
    #[error("{operation} map {map}")]
    Kernel {
        /// The map.
        map: String,
        /// What was tried, in the gerund.
        operation: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Orders and compares contract types by their bytes, as the kernel does.
#[derive(Clone, Copy, Debug)]
pub struct Bytes<T>(pub T);

impl<T: Plain> PartialEq for Bytes<T> {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_bytes() == other.0.as_bytes()
    }
}

impl<T: Plain> Eq for Bytes<T> {}

impl<T: Plain> PartialOrd for Bytes<T> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<T: Plain> Ord for Bytes<T> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.as_bytes().cmp(other.0.as_bytes())
    }
}

/// Rows by key, in the order of the keys' bytes.
pub type Rows<K, V> = BTreeMap<Bytes<K>, V>;

/// A map whose rows are `K` and `V`.
#[derive(Debug)]
pub struct TypedMap<K, V> {
    handle: MapHandle,
    name: String,
    /// Until the kernel refuses one.
    pub(super) has_batches: AtomicBool,
    types: PhantomData<fn() -> (K, V)>,
}

impl<K: Plain, V: Plain> TypedMap<K, V> {
    /// Checks that the map has rows of these types.
    pub fn new(handle: MapHandle) -> Result<Self, MapError> {
        let name = handle.name().to_string_lossy().into_owned();
        if handle.key_size() as usize != size_of::<K>() || handle.value_size() as usize != size_of::<V>() {
            return Err(MapError::Shape { map: name, key: handle.key_size(), value: handle.value_size() });
        }
        Ok(Self { handle, name, has_batches: AtomicBool::new(true), types: PhantomData })
    }

    /// Its name in `maps.h`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Rows that it can hold.
    pub fn capacity(&self) -> u32 {
        self.handle.max_entries()
    }

    /// The row of a key.
    pub fn get(&self, key: &K) -> Result<Option<V>, MapError> {
        let mut value = V::default();
        // SAFETY: `new` checked that the map's keys and values have the sizes of K and V.
        let result = unsafe {
            libbpf_sys::bpf_map_lookup_elem(
                self.fd(),
                std::ptr::from_ref(key).cast(),
                std::ptr::from_mut(&mut value).cast(),
            )
        };
        match result {
            0 => Ok(Some(value)),
            error if -error == ENOENT => Ok(None),
            error => Err(self.refused("reading", error)),
        }
    }

    /// Writes a row, new or not.
    pub fn insert(&self, key: &K, value: &V) -> Result<(), MapError> {
        // SAFETY: `new` checked that the map's keys and values have the sizes of K and V.
        let result = unsafe {
            libbpf_sys::bpf_map_update_elem(
                self.fd(),
                std::ptr::from_ref(key).cast(),
                std::ptr::from_ref(value).cast(),
                u64::from(libbpf_sys::BPF_ANY),
            )
        };
        match result {
            0 => Ok(()),
            error if matches!(-error, E2BIG | ENOSPC) => {
                Err(MapError::Full { map: self.name.clone(), capacity: self.capacity() })
            }
            error => Err(self.refused("writing", error)),
        }
    }

    /// Deletes a row; false if there was none.
    pub fn remove(&self, key: &K) -> Result<bool, MapError> {
        // SAFETY: `new` checked that the map's keys have the size of K.
        let result = unsafe { libbpf_sys::bpf_map_delete_elem(self.fd(), std::ptr::from_ref(key).cast()) };
        match result {
            0 => Ok(true),
            error if -error == ENOENT => Ok(false),
            error => Err(self.refused("deleting from", error)),
        }
    }

    /// Every row. Rows that come or go meanwhile may be in it or not.
    pub fn rows(&self) -> Result<Rows<K, V>, MapError> {
        let mut rows = Rows::new();
        self.for_each(|key, value| {
            rows.insert(Bytes(key), value);
        })?;
        Ok(rows)
    }

    /// Calls `each` for every row, in no order.
    pub fn for_each(&self, mut each: impl FnMut(K, V)) -> Result<(), MapError> {
        if self.handle.map_type() == MapType::LpmTrie {
            for key in self.handle.keys() {
                let Some(key) = K::from_bytes(&key) else { continue };
                if let Some(value) = self.get(&key)? {
                    each(key, value);
                }
            }
            return Ok(());
        }
        walk(&self.handle, size_of::<V>(), |key, value| {
            if let (Some(key), Some(value)) = (K::from_bytes(key), V::from_bytes(value)) {
                each(key, value);
            }
        })
        .map_err(|source| MapError::Kernel { map: self.name.clone(), operation: "walking", source })
    }

    /// Makes the map hold exactly `desired`: writes what differs first, deletes last.
    pub fn sync(&self, desired: &Rows<K, V>) -> Result<Changes, MapError> {
        let present = self.rows()?;
        let is_new = |(key, value): &(&Bytes<K>, &V)| {
            present.get(*key).is_none_or(|old| old.as_bytes() != value.as_bytes())
        };
        let (keys, values): (Vec<K>, Vec<V>) =
            desired.iter().filter(is_new).map(|(key, value)| (key.0, *value)).unzip();
        let (written, result) = self.insert_all(&keys, &values);
        result?;
        let stale = present.keys().filter(|key| !desired.contains_key(key));
        let (deleted, result) = self.remove_all(&stale.map(|key| key.0).collect::<Vec<_>>());
        result?;
        Ok(Changes { written, deleted })
    }

    pub(super) fn fd(&self) -> i32 {
        self.handle.as_fd().as_raw_fd()
    }

    /// `error` is what libbpf returned: a negative error number.
    fn refused(&self, operation: &'static str, error: i32) -> MapError {
        let source = io::Error::from_raw_os_error(-error);
        MapError::Kernel { map: self.name.clone(), operation, source }
    }
}

/// Where to begin with new numbers from `first` to `end` (exclusive): at the start of the largest gap
/// between those in use. So numbers that were used up are free again when the agent starts anew.
pub(super) fn first_free(in_use: &BTreeSet<u32>, first: u32, end: u32) -> u32 {
    let (mut best, mut length, mut next) = (first, 0, first);
    for used in in_use.range(first..end).copied().chain([end]) {
        // Of gaps of one length the last: numbers rise.
        if used - next >= length {
            (best, length) = (next, used - next);
        }
        next = used.saturating_add(1);
    }
    best
}

/// What a sync did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Rows inserted or replaced.
    pub written: usize,
    /// Rows deleted.
    pub deleted: usize,
}

/// Walks a hash or array to its end in batches. `value_size` is what the kernel
/// copies per row: for per-CPU maps that is the padded size times the CPUs.
pub(super) fn walk(
    handle: &MapHandle,
    value_size: usize,
    mut each: impl FnMut(&[u8], &[u8]),
) -> io::Result<()> {
    let key_size = handle.key_size() as usize;
    let mut capacity: u32 = 4096.min(handle.max_entries().max(1));
    let mut keys = vec![0_u8; key_size * capacity as usize];
    let mut values = vec![0_u8; value_size * capacity as usize];
    // The position is opaque: a bucket number for hashes, a key for arrays.
    let mut position = vec![0_u8; key_size.max(8)];
    let mut next = position.clone();
    let mut is_first = true;
    loop {
        let mut count = capacity;
        let from = if is_first { std::ptr::null_mut() } else { position.as_mut_ptr().cast() };
        // SAFETY: keys and values hold `count` rows of the map's sizes, and both
        // positions are at least as large as a key and as a bucket number.
        let result = unsafe {
            libbpf_sys::bpf_map_lookup_batch(
                handle.as_fd().as_raw_fd(),
                from,
                next.as_mut_ptr().cast(),
                keys.as_mut_ptr().cast(),
                values.as_mut_ptr().cast(),
                &mut count,
                std::ptr::null(),
            )
        };
        let is_last = -result == ENOENT;
        if -result == ENOSPC {
            // One bucket holds more rows than fit: ask again for the same one.
            capacity = capacity.saturating_mul(2);
            keys.resize(key_size * capacity as usize, 0);
            values.resize(value_size * capacity as usize, 0);
            continue;
        }
        if result < 0 && !is_last {
            return Err(io::Error::from_raw_os_error(-result));
        }
        let rows = keys.chunks_exact(key_size).zip(values.chunks_exact(value_size));
        rows.take(count as usize).for_each(|(key, value)| each(key, value));
        if is_last {
            return Ok(());
        }
        std::mem::swap(&mut position, &mut next);
        is_first = false;
    }
}
