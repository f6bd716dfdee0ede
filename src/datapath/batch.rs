//! Many rows of a map in one system call.
//!
//! A kernel or a type of map without batches, and a row that a batch stopped at, get a call for each row.

use std::sync::atomic::Ordering;

use libbpf_rs::libbpf_sys;

use super::abi::Plain;
use super::map::{MapError, TypedMap};

/// So many rows go in one call. The kernel copies them one by one.
const ROWS_MAX: usize = 4096;

/// How far a call for many rows came.
enum Stopped {
    /// All rows are done.
    Nowhere,
    /// So many are done, and the next one was not.
    At(usize),
}

impl<K: Plain, V: Plain> TypedMap<K, V> {
    /// Writes rows, new or not, in their order. Returns how many were written: fewer than all with an error only.
    pub fn insert_all(&self, keys: &[K], values: &[V]) -> (usize, Result<(), MapError>) {
        let rows = keys.len().min(values.len());
        self.in_batches(
            rows,
            |from, to| self.insert_batch(&keys[from..to], &values[from..to]),
            |row| self.insert(&keys[row], &values[row]),
        )
    }

    /// Deletes rows. Returns how many of them there were: what was not there is no error.
    pub fn remove_all(&self, keys: &[K]) -> (usize, Result<(), MapError>) {
        let mut missing = 0;
        let (done, result) = self.in_batches(
            keys.len(),
            |from, to| self.remove_batch(&keys[from..to]),
            |row| self.remove(&keys[row]).map(|was_there| missing += usize::from(!was_there)),
        );
        (done - missing, result)
    }

    fn in_batches(
        &self,
        rows: usize,
        mut batch: impl FnMut(usize, usize) -> Stopped,
        mut single: impl FnMut(usize) -> Result<(), MapError>,
    ) -> (usize, Result<(), MapError>) {
        let mut done = 0;
        while done < rows {
            let end = rows.min(done + ROWS_MAX);
            if end - done > 1 && self.has_batches.load(Ordering::Relaxed) {
                match batch(done, end) {
                    Stopped::Nowhere => {
                        done = end;
                        continue;
                    }
                    Stopped::At(place) => done += place,
                }
            }
            // By itself the row says what is wrong with it, if anything is.
            if let Err(error) = single(done) {
                return (done, Err(error));
            }
            done += 1;
        }
        (done, Ok(()))
    }

    fn insert_batch(&self, keys: &[K], values: &[V]) -> Stopped {
        self.stopped(keys.len().min(values.len()), |count| {
            // SAFETY: `new` checked that the map's rows have the sizes of K and V, and both slices have
            // `count` of them. The kernel only reads them.
            unsafe {
                libbpf_sys::bpf_map_update_batch(
                    self.fd(),
                    keys.as_ptr().cast(),
                    values.as_ptr().cast(),
                    count,
                    std::ptr::null(),
                )
            }
        })
    }

    fn remove_batch(&self, keys: &[K]) -> Stopped {
        self.stopped(keys.len(), |count| {
            // SAFETY: `new` checked that the map's keys have the size of K, and the slice has `count` of them.
            // The kernel only reads them.
            unsafe {
                libbpf_sys::bpf_map_delete_batch(self.fd(), keys.as_ptr().cast(), count, std::ptr::null())
            }
        })
    }

    /// `call` sets the count to what it has done, unless the kernel refuses before the first row.
    fn stopped(&self, rows: usize, call: impl FnOnce(&mut u32) -> i32) -> Stopped {
        let mut count = u32::try_from(rows).unwrap_or(0);
        let result = call(&mut count);
        let done = count as usize;
        match result {
            0 if done == rows => Stopped::Nowhere,
            _ if done < rows && (result == 0 || done > 0) => Stopped::At(done),
            error => {
                // Nothing was done: by one row, or because there are no batches.
                let is_refused = !matches!(-error, nix::libc::ENOENT | nix::libc::E2BIG | nix::libc::ENOSPC);
                if is_refused {
                    self.has_batches.store(false, Ordering::Relaxed);
                }
                Stopped::At(0)
            }
        }
    }

    /// Has a call for each row, as on a kernel without batches.
    pub fn without_batches(self) -> Self {
        self.has_batches.store(false, Ordering::Relaxed);
        self
    }
}
