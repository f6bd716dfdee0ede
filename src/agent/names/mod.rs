//! What DNS tells pods of this node: it counts from before the pod has the answer until its time has passed and no
//! connection runs to it, also over restarts of the agent.
//!
//! ```text
//! proxy: an answer ──> book ──> heard ──> a round ──> the maps ──> proxy: the pod gets the answer
//!                       └─> names.json
//! ```

mod args;
mod book;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use ipnet::IpNet;
use nix::time::{ClockId, clock_gettime};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::{Notify, watch};

pub use args::{DnsDenied, NameArgs};
use book::Book;
pub use book::{Bounds, Line};

use crate::datapath::Datapath;
use crate::files::{self, Survives};
use crate::model::l7::Names;
use crate::model::{Endpoint, EndpointId};
use crate::policy::{Heard, Told};
use crate::tables::{State, Table};
use crate::telemetry::Telemetry;

/// An answer waits no longer for the round that has its addresses: the proxy gives it up then, too.
const WAIT: Duration = Duration::from_secs(2);
/// How often it is looked what has passed its time.
const SWEEP_EVERY: Duration = Duration::from_secs(5);
/// The file is written at most so often.
const WRITE_EVERY: Duration = Duration::from_millis(50);

/// Which addresses answers may name.
#[derive(Clone, Debug, Default)]
pub struct Belief {
    /// Addresses that the node guards: metadata servers.
    pub guarded: Vec<IpNet>,
    /// But these are believed.
    pub believed: Vec<IpNet>,
}

impl Belief {
    /// True if an answer may name an address: one that is neither the client's own, its link's, nor guarded. Pods'
    /// and nodes' addresses are theirs, whatever they are called.
    fn allows(&self, address: &IpAddr) -> bool {
        let is_within = |nets: &[IpNet]| nets.iter().any(|net| net.contains(address));
        let is_nobodys = match address {
            IpAddr::V4(ip) => {
                ip.octets()[0] == 0 || ip.is_loopback() || ip.is_multicast() || ip.is_broadcast()
            }
            IpAddr::V6(ip) => {
                ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() || ip.to_ipv4_mapped().is_some()
            }
        };
        let is_of_link = match address {
            IpAddr::V4(ip) => ip.is_link_local(),
            IpAddr::V6(ip) => ip.is_unicast_link_local(),
        };
        !is_nobodys && (is_within(&self.believed) || !(is_of_link || is_within(&self.guarded)))
    }
}

/// What pods were told, to be read from anywhere.
pub struct Learned {
    bounds: Bounds,
    belief: Belief,
    file: PathBuf,
    endpoints: Arc<Table<EndpointId, Arc<Endpoint>>>,
    heard: Table<Told, Arc<[IpAddr]>>,
    book: Mutex<Book>,
    /// The revision of `heard` that the kernel has.
    applied: watch::Sender<u64>,
    is_changed: Notify,
    is_written: AtomicBool,
    addresses: Gauge,
    evicted: Counter,
    refused: Counter,
    late: Counter,
    left_out: Counter,
}

impl Learned {
    /// Nothing was heard yet.
    pub fn new(
        state_dir: &Path,
        bounds: Bounds,
        belief: Belief,
        endpoints: Arc<Table<EndpointId, Arc<Endpoint>>>,
    ) -> Self {
        Self {
            bounds,
            belief,
            file: state_dir.join("names.json"),
            endpoints,
            heard: Table::new(),
            book: Mutex::default(),
            applied: watch::Sender::new(0),
            is_changed: Notify::new(),
            is_written: AtomicBool::new(true),
            addresses: Gauge::default(),
            evicted: Counter::default(),
            refused: Counter::default(),
            late: Counter::default(),
            left_out: Counter::default(),
        }
    }

    /// Lets the metrics read what is counted here.
    pub fn show_to(&self, telemetry: &Telemetry) {
        telemetry.register_with(|registry| {
            let mut counter = |name: &str, help: &str, counter: &Counter| {
                registry.register(name, help, counter.clone());
            };
            counter("names_evicted", "Addresses of names that went because there was no room", &self.evicted);
            counter(
                "names_refused",
                "Addresses in answers of DNS that nobody may be called by",
                &self.refused,
            );
            counter(
                "names_late",
                "Answers of DNS that passed before their addresses were in the maps",
                &self.late,
            );
            counter(
                "names_left_out",
                "Addresses in answers of DNS that nobody remembers: too many came at once",
                &self.left_out,
            );
            registry.register(
                "names_addresses",
                "Addresses of names that pods were told",
                self.addresses.clone(),
            );
        });
    }

    /// Reads what the agent before has left. A file that cannot be read is as if there were none.
    pub fn load(&self) {
        let read = match std::fs::read(&self.file) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return,
            read => read
                .context("reading it")
                .and_then(|text| serde_json::from_slice::<Book>(&text).context("understanding it")),
        };
        match read {
            Ok(book) => {
                let mut own = self.lock();
                *own = book;
                own.retain(|endpoint, owner| self.owner(endpoint).is_some_and(|known| known == owner));
                let told: BTreeSet<Told> = own.told().collect();
                self.publish(&own, told);
            }
            Err(error) => tracing::warn!(
                error = crate::error::chain(&error),
                file = %self.file.display(),
                "names that pods were told are forgotten: what they ask for again is known again"
            ),
        }
    }

    /// Takes in an answer; returns when its addresses are in the maps, or were waited for long enough.
    pub async fn take(&self, names: Names) {
        let Some(revision) = self.note(names, Duration::ZERO) else { return };
        let mut applied = self.applied.subscribe();
        let is_applied = tokio::time::timeout(WAIT, applied.wait_for(|done| *done >= revision)).await;
        if !matches!(is_applied, Ok(Ok(_))) {
            self.late.inc();
        }
    }

    /// Takes in answers that passed so long ago; their clients have them already. Of `left_out` more addresses
    /// nothing is said.
    pub fn passed(&self, names: Vec<(Names, Duration)>, left_out: u64) {
        self.left_out.inc_by(left_out);
        for (names, ago) in names {
            self.note(names, ago);
        }
    }

    /// The revision of `heard` that has the answer; `None`: it tells nothing to a pod of this node.
    fn note(&self, names: Names, ago: Duration) -> Option<u64> {
        let endpoint = names.endpoint?;
        let owner = self.owner(endpoint)?;
        let (believed, refused): (Vec<IpAddr>, Vec<IpAddr>) =
            names.addresses.iter().partition(|address| self.belief.allows(address));
        self.refused.inc_by(refused.len() as u64);
        if believed.is_empty() {
            return None;
        }
        let (name, ttl_s) = (Arc::from(names.name), names.ttl_s);
        let heard_s = now_s().saturating_sub(ago.as_secs());
        let mut book = self.lock();
        let evicted = book.evicted;
        let touched = book.hear((endpoint, &owner), &name, (&believed, ttl_s), heard_s, &self.bounds);
        self.evicted.inc_by(book.evicted - evicted);
        self.publish(&book, touched);
        self.is_written.store(false, Ordering::Relaxed);
        Some(self.revision())
    }

    /// What pods were told.
    pub fn heard(&self) -> Heard {
        self.heard.snapshot()
    }

    /// Of `heard`; a snapshot that is taken afterwards has at least this.
    pub fn revision(&self) -> u64 {
        self.heard.subscribe().borrow().revision
    }

    /// Changes with `heard`.
    pub fn subscribe(&self) -> watch::Receiver<State> {
        self.heard.subscribe()
    }

    /// The kernel has what was heard up to this revision.
    pub fn applied(&self, revision: u64) {
        self.applied.send_if_modified(|applied| {
            let is_news = *applied < revision;
            *applied = revision.max(*applied);
            is_news
        });
    }

    /// Every address, for people.
    pub fn lines(&self) -> Vec<Line> {
        self.lock().lines(now_s()).collect()
    }

    /// Writes the file, and lets go what has passed its time, for ever.
    pub async fn keep(self: Arc<Self>, datapath: Arc<Datapath>) {
        let mut sweep = tokio::time::interval(SWEEP_EVERY);
        loop {
            tokio::select! {
                () = self.is_changed.notified() => {}
                _ = sweep.tick() => {
                    let (learned, datapath) = (self.clone(), datapath.clone());
                    let swept = tokio::task::spawn_blocking(move || learned.sweep(&datapath)).await;
                    if let Ok(Err(error)) = swept {
                        tracing::warn!(error = crate::error::chain(&error), "looking which names are in use");
                    }
                }
            }
            let learned = self.clone();
            let written = tokio::task::spawn_blocking(move || learned.write()).await;
            if let Ok(Err(error)) = written {
                tracing::warn!(error = crate::error::chain(&error), "a restart forgets names");
            }
            tokio::time::sleep(WRITE_EVERY).await;
        }
    }

    /// As `weir status` says it.
    pub fn said(&self) -> String {
        let book = self.lock();
        let (addresses, of_all) = (book.count(), self.bounds.of_all);
        format!("{addresses} addresses of {} names; at most {of_all}", book.told().count())
    }

    fn sweep(&self, datapath: &Datapath) -> Result<()> {
        let now_s = now_s();
        let expired = self.lock().expired(now_s);
        let running = match expired.is_empty() {
            true => BTreeSet::new(),
            false => datapath.spoken_to(&expired)?,
        };
        let mut book = self.lock();
        let mut touched = match expired.is_empty() {
            true => BTreeSet::new(),
            false => book.expire(now_s, &running),
        };
        touched
            .extend(book.retain(|endpoint, owner| self.owner(endpoint).is_some_and(|known| known == owner)));
        self.publish(&book, touched);
        Ok(())
    }

    fn write(&self) -> Result<()> {
        if self.is_written.swap(true, Ordering::Relaxed) {
            return Ok(());
        }
        let text = serde_json::to_vec(&*self.lock()).context("writing names as JSON")?;
        files::replace(&self.file, &text, 0o600, Survives::Process)
            .with_context(|| format!("writing {}", self.file.display()))
    }

    /// Shows names as they are now.
    fn publish(&self, book: &Book, touched: BTreeSet<Told>) {
        self.addresses.set(i64::try_from(book.count()).unwrap_or(i64::MAX));
        if touched.is_empty() {
            return;
        }
        for told in touched {
            match book.addresses(&told) {
                Some(addresses) => self.heard.apply(told, addresses),
                None => self.heard.delete(&told),
            };
        }
        self.is_written.store(false, Ordering::Relaxed);
        self.is_changed.notify_one();
    }

    /// Which attachment has a number now.
    fn owner(&self, endpoint: EndpointId) -> Option<String> {
        self.endpoints.get(&endpoint).map(|endpoint| endpoint.container_id.clone())
    }

    fn lock(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Seconds since the machine started: the wall clock may jump.
fn now_s() -> u64 {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |time| u64::try_from(time.tv_sec()).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_nobody_may_be_called_by_are_not_believed() {
        let nets = |texts: &[&str]| texts.iter().map(|text| text.parse().expect("a prefix")).collect();
        let belief = Belief {
            guarded: nets(&["169.254.0.0/16", "168.63.129.16/32", "fd00:ec2::254/128"]),
            believed: nets(&["169.254.20.0/24", "127.0.0.0/8"]),
        };
        let allows = |text: &str| belief.allows(&text.parse().expect("an address"));
        for address in ["192.0.2.1", "10.9.9.9", "2001:db8::1", "fd00::1", "169.254.20.10"] {
            assert!(allows(address), "{address}");
        }
        let refused = [
            "0.0.0.0",
            "0.1.2.3",
            "127.0.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "169.254.169.254",
            "168.63.129.16",
            "::",
            "::1",
            "ff02::1",
            "fe80::1",
            "::ffff:192.0.2.1",
            "fd00:ec2::254",
        ];
        for address in refused {
            assert!(!allows(address), "{address}");
        }
    }
}
