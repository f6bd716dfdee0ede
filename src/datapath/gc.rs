//! Deletes what has expired from the maps that the programs write. The deleting
//! is the kernel's: iterators look at every entry again before they remove it.

use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use libbpf_rs::{Iter, Link};
use nix::sched::{CloneFlags, setns};
use serde::Serialize;

use super::Datapath;
use super::abi::{Plain, StaleSocket};
use super::messages::with_messages;

/// What a round of garbage collection did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct GarbageReport {
    /// Connections deleted.
    pub connections: u64,
    /// Masquerading entries deleted.
    pub nat: u64,
    /// How long it took.
    pub duration: Duration,
}

impl Datapath {
    /// Walks `connections` and `nat` and deletes what has expired. Takes up to
    /// some hundred milliseconds on full maps: run it where blocking is allowed.
    pub fn collect_garbage(&self) -> Result<GarbageReport> {
        let start = Instant::now();
        let connections = self.run_map_iterator("collect_connections", "connections")?;
        let nat = self.run_map_iterator("collect_nat", "nat")?;
        Ok(GarbageReport { connections, nat, duration: start.elapsed() })
    }

    /// Ends UDP sockets that are connected to backends which are gone, in each of the
    /// network namespaces; all are tried, the first error is returned. `end` is for kernels
    /// that let no iterator do it; it runs in the socket's namespace.
    pub fn destroy_stale_sockets(
        &self,
        namespaces: &[BorrowedFd<'_>],
        end: impl Fn(&StaleSocket) -> Result<()> + Sync,
    ) -> Result<u64> {
        if self.is_left_out("destroy_sockets") {
            return Ok(0);
        }
        let link = self.program("destroy_sockets")?.attach().map_err(with_messages);
        let link = &link.context("attaching destroy_sockets")?;
        let walk = || {
            let stale = stale_sockets(link).context("running destroy_sockets")?;
            if !self.features.has_socket_destroy {
                stale.iter().map(&end).fold(Ok(()), Result::and)?;
            }
            Ok(stale.len() as u64)
        };
        // The iterator walks the namespace of the thread that opens it. The thread
        // ends with the work, so that nobody else finds itself in a pod.
        let work = || {
            let results = namespaces.iter().map(|namespace| {
                setns(namespace, CloneFlags::CLONE_NEWNET).context("entering a network namespace")?;
                walk()
            });
            // One namespace that cannot be entered keeps no other from being walked.
            let (mut total, mut failed) = (0, Ok(()));
            for destroyed in results {
                match destroyed {
                    Ok(destroyed) => total += destroyed,
                    Err(error) => failed = failed.and(Err(error)),
                }
            }
            failed.map(|()| total)
        };
        std::thread::scope(|scope| {
            scope.spawn(work).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    fn run_map_iterator(&self, program: &str, map: &str) -> Result<u64> {
        let handle = self.map(map)?;
        let link = self.program(program)?.attach_iter(handle.as_fd()).map_err(with_messages);
        let link = link.with_context(|| format!("attaching {program} to map {map}"))?;
        let mut written = 0;
        read_to_end(&link, |bytes| written += bytes.len() as u64)
            .with_context(|| format!("running {program}"))?;
        Ok(written)
    }
}

/// What destroy_sockets writes.
fn stale_sockets(link: &Link) -> Result<Vec<StaleSocket>> {
    let mut written = Vec::new();
    read_to_end(link, |bytes| written.extend_from_slice(bytes))?;
    Ok(written.chunks_exact(size_of::<StaleSocket>()).filter_map(StaleSocket::from_bytes).collect())
}

/// Runs an iterator, and takes what it writes: one byte for each entry deleted, if nothing else is said.
fn read_to_end(link: &Link, mut take: impl FnMut(&[u8])) -> Result<()> {
    let mut iterator = Iter::new(link)?;
    let mut buffer = [0; 4096];
    loop {
        match iterator.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => take(&buffer[..length]),
            // The iterator stops after a million entries in one call, to be called again.
            Err(error) if matches!(error.raw_os_error(), Some(nix::libc::EAGAIN | nix::libc::EINTR)) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
