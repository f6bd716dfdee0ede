//! Deletes what has expired from the maps that the programs write. The deleting is
//! the kernel's: a program looks at every entry again before it removes it.

use std::io::Read;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use libbpf_rs::{Iter, Link, ProgramInput, ProgramMut};
use nix::sched::{CloneFlags, setns};
use serde::Serialize;

use super::Datapath;
use super::abi::{
    CollectRequest, Connection, ConnectionKey, GoneBackend, Nat, NatKey, Plain, RecountRequest, StaleSocket,
    addr_of,
};
use super::map::{Bytes, TypedMap};
use super::messages::with_messages;

/// Keys that a program looks at in one call; it keeps the processor meanwhile, for less than a millisecond.
const KEYS_PER_CALL: usize = 1024;

/// Rows of `gone_backends`.
const GONE_MAX: usize = 65_536;

/// Between two rounds, at least.
const INTERVAL: Duration = Duration::from_secs(15);
/// And as many times as long as the last round took: over full maps it takes long.
const REST: u32 = 100;
/// Rounds that may be missing before limits are not in force any more.
const LEASE: u32 = 8;

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

impl GarbageReport {
    /// How long to rest before the next round.
    pub fn rest(&self) -> Duration {
        INTERVAL.max(self.duration * REST)
    }

    /// Limits of what pods may have are in force for so long: a few rounds may fail.
    fn lease_seconds(&self) -> u32 {
        u32::try_from((self.rest() * LEASE).as_secs()).unwrap_or(u32::MAX)
    }
}

impl Datapath {
    /// Walks `connections` and `nat`, deletes what has expired and corrects the counts of what
    /// pods have. Takes a quarter of a second on full maps of the default size: run it where
    /// blocking is allowed.
    pub fn collect_garbage(&self) -> Result<GarbageReport> {
        let start = Instant::now();
        self.recount(&RecountRequest::default())?;
        let connections =
            self.collect("collect_connections", &self.typed::<ConnectionKey, Connection>("connections")?)?;
        let nat = self.collect("collect_nat", &self.typed::<NatKey, Nat>("nat")?)?;
        self.collect_flows_of_proxy()?;
        let report = GarbageReport { connections, nat, duration: start.elapsed() };
        self.recount(&RecountRequest { is_end: 1, lease_seconds: report.lease_seconds() })?;
        Ok(report)
    }

    fn collect_flows_of_proxy(&self) -> Result<()> {
        let mut before = self.l7_flows_alone.lock().expect("nobody panics while holding the lock");
        *before = self.collect_l7_flows(&before).context("collecting flows of the proxy")?;
        self.collect_aliases().context("collecting aliases of the proxy's clients")?;
        Ok(())
    }

    fn recount(&self, request: &RecountRequest) -> Result<()> {
        let mut context = request.as_bytes().to_vec();
        let input = ProgramInput { context_in: Some(&mut context), ..ProgramInput::default() };
        let output = self.program("collect_usage")?.test_run(input).context("running collect_usage")?;
        ensure!(output.return_value == 0, "collect_usage found no row of a kind");
        Ok(())
    }

    /// Ends sockets that are connected to backends which are gone, in each of the network
    /// namespaces: by UDP where the service does not lead to the backend any more, by TCP where
    /// the backend is in `gone`. All are tried, the first error is returned. `end` is for
    /// kernels that let no iterator do it; it runs in the socket's namespace.
    pub fn destroy_stale_sockets(
        &self,
        namespaces: &[BorrowedFd<'_>],
        gone: &[SocketAddr],
        end: impl Fn(&StaleSocket) -> Result<()> + Sync,
    ) -> Result<u64> {
        if self.is_left_out("destroy_sockets") {
            return Ok(0);
        }
        self.write_gone(gone)?;
        let programs: &[&str] = match gone {
            [] => &["destroy_sockets"],
            _ => &["destroy_sockets", "destroy_tcp_sockets"],
        };
        let attach = |name: &&str| {
            let link = self.program(name)?.attach().map_err(with_messages);
            link.with_context(|| format!("attaching {name}"))
        };
        let links = &programs.iter().map(attach).collect::<Result<Vec<_>>>()?;
        let walk = || {
            let mut ended = 0;
            for (link, name) in links.iter().zip(programs) {
                let stale = stale_sockets(link).with_context(|| format!("running {name}"))?;
                if !self.features.has_socket_destroy {
                    stale.iter().map(&end).fold(Ok(()), Result::and)?;
                }
                ended += stale.len() as u64;
            }
            Ok(ended)
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

    /// Makes `gone_backends` hold these, as far as there is room.
    fn write_gone(&self, gone: &[SocketAddr]) -> Result<()> {
        let row = |backend: &SocketAddr| {
            let key = GoneBackend { addr: addr_of(backend.ip()), port: backend.port().to_be(), pad: [0; 6] };
            (Bytes(key), 1_u32)
        };
        let map = self.typed::<GoneBackend, u32>("gone_backends")?;
        let rows = gone.iter().take(GONE_MAX).map(row).collect();
        map.sync(&rows).context("writing the backends that are gone")?;
        Ok(())
    }

    /// Shows every key of the map to the program, and counts what that has deleted.
    fn collect<K: Plain, V: Plain>(&self, program: &str, map: &TypedMap<K, V>) -> Result<u64> {
        let loaded = self.program(program)?;
        let mut keys = Vec::with_capacity(KEYS_PER_CALL);
        let mut collected = Ok(0);
        let mut look = |keys: &mut Vec<K>| {
            if let Ok(total) = collected {
                collected = run_collector(&loaded, keys).map(|deleted| total + u64::from(deleted));
            }
            keys.clear();
        };
        map.for_each(|key, _| {
            keys.push(key);
            if keys.len() == KEYS_PER_CALL {
                look(&mut keys);
            }
        })?;
        look(&mut keys);
        collected.with_context(|| format!("running {program}"))
    }
}

/// How many of the entries the program has deleted.
fn run_collector<K: Plain>(program: &ProgramMut<'_>, keys: &[K]) -> Result<u32> {
    let request = CollectRequest {
        keys: keys.as_ptr().expose_provenance() as u64,
        count: u32::try_from(keys.len()).context("counting keys")?,
        deleted: 0,
    };
    // The kernel writes the answer into it.
    let mut context = request.as_bytes().to_vec();
    let input = ProgramInput { context_in: Some(&mut context), ..ProgramInput::default() };
    ensure!(program.test_run(input)?.return_value == 0, "the program could not read the agent's memory");
    Ok(CollectRequest::from_bytes(&context).context("reading the answer")?.deleted)
}

/// What destroy_sockets and destroy_tcp_sockets write.
fn stale_sockets(link: &Link) -> Result<Vec<StaleSocket>> {
    let mut written = Vec::new();
    read_to_end(link, |bytes| written.extend_from_slice(bytes))?;
    Ok(written.chunks_exact(size_of::<StaleSocket>()).filter_map(StaleSocket::from_bytes).collect())
}

/// Runs an iterator, and takes what it writes.
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
