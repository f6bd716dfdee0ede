//! One flow through the proxy: its ends, its judges, and the records of it.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use jiff::Timestamp;

use crate::model::Protocol;
use crate::model::l7::{Judges, L7Message, L7Verdict, Lookup, ProxyState, Record, RecordKind, RuleSetId};

use super::limits::{Limits, Shares};
use super::names::Announcer;
use super::records::Recorder;
use super::store::{Compiled, Store};

/// How long judges are believed without asking again.
const FRESH: Duration = Duration::from_millis(50);

/// What all flows share.
pub struct Shared {
    /// The rule sets.
    pub store: Store,
    /// Who judges which flow.
    pub lookup: arc_swap::ArcSwap<Box<dyn Lookup>>,
    /// Where records go.
    pub recorder: Recorder,
    /// Bounds.
    pub limits: Limits,
    /// Connections by payer.
    pub shares: Arc<Shares>,
    /// Where the addresses of names go.
    pub announcer: Announcer,
    /// DNS questions that no rule allows are answered with NXDOMAIN, not REFUSED.
    pub denies_with_nxdomain: AtomicBool,
}

impl Shared {
    /// How the proxy is.
    pub fn state(&self) -> ProxyState {
        let (connections, refused) = (self.shares.count() as u64, self.shares.take_refused());
        ProxyState { connections, refused, resident_bytes: resident_bytes().unwrap_or(0) }
    }
}

/// The memory of this process; `None`: the kernel does not say.
fn resident_bytes() -> Option<u64> {
    let pages = std::fs::read_to_string("/proc/self/statm").ok()?.split(' ').nth(1)?.parse::<u64>().ok()?;
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok()??;
    Some(pages * u64::try_from(page).ok()?)
}

/// One flow.
#[derive(Clone)]
pub struct Session {
    /// What all flows share.
    pub shared: Arc<Shared>,
    /// Who began it.
    pub client: SocketAddr,
    /// Whom it is for.
    pub server: SocketAddr,
    protocol: Protocol,
    judges: Judges,
    sets: Vec<Arc<Compiled>>,
    missing: Option<RuleSetId>,
    asked: Instant,
    version: u64,
}

/// Nobody knows the flow any more: it must be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownFlow;

impl Session {
    /// A flow that somebody knows.
    pub fn new(
        shared: &Arc<Shared>,
        client: SocketAddr,
        server: SocketAddr,
        protocol: Protocol,
    ) -> Result<Self, UnknownFlow> {
        let (client, server) = (plain(client), plain(server));
        let mut session = Self {
            shared: shared.clone(),
            client,
            server,
            protocol,
            judges: Judges::default(),
            sets: Vec::new(),
            missing: None,
            asked: Instant::now(),
            version: 0,
        };
        session.ask()?;
        Ok(session)
    }

    /// Asks again who judges the flow, unless that was asked just now.
    pub fn refresh(&mut self) -> Result<(), UnknownFlow> {
        if self.version == self.shared.store.version() && self.asked.elapsed() < FRESH {
            return Ok(());
        }
        self.ask()
    }

    fn ask(&mut self) -> Result<(), UnknownFlow> {
        // The version first: a set that comes meanwhile makes it old.
        self.version = self.shared.store.version();
        self.asked = Instant::now();
        let judges = self.shared.lookup.load().of(self.client, self.server, self.protocol);
        self.judges = judges.ok_or(UnknownFlow)?;
        self.sets.clear();
        self.missing = None;
        for id in self.judges.rule_sets() {
            match self.shared.store.get(id) {
                Some(set) => self.sets.push(set),
                None => self.missing = Some(id),
            }
        }
        Ok(())
    }

    /// Who judges.
    pub fn judges(&self) -> &Judges {
        &self.judges
    }

    /// The rule sets that must all allow; `Err` names one that is not known, so nothing is allowed.
    pub fn sets(&self) -> Result<&[Arc<Compiled>], RuleSetId> {
        match self.missing {
            Some(id) => Err(id),
            None => Ok(&self.sets),
        }
    }

    /// True if nothing is denied, whatever it is.
    pub fn is_visibility_only(&self) -> bool {
        self.missing.is_none() && self.sets.iter().all(|set| set.is_visibility_only)
    }

    /// True if an Envoy is to judge the flow, which alone would do so by another socket.
    pub fn is_by_envoy(&self) -> bool {
        let Ok([first, others @ ..]) = self.sets() else { return false };
        first.is_by_envoy && others.iter().all(|other| other.id == first.id)
    }

    /// Records a message.
    pub fn record(&self, entry: Entry) {
        let Judges { egress, ingress, source, destination, source_endpoint, destination_endpoint } =
            self.judges;
        let Entry { kind, verdict, denied_by, note, latency, message } = entry;
        self.shared.recorder.record(Record {
            time: Timestamp::now(),
            protocol: self.protocol,
            client: self.client,
            server: self.server,
            source,
            destination,
            source_endpoint,
            destination_endpoint,
            egress,
            ingress,
            denied_by,
            kind,
            verdict,
            note,
            latency_us: latency.map(|latency| u64::try_from(latency.as_micros()).unwrap_or(u64::MAX)),
            message,
        });
    }
}

/// The part of a record that differs from message to message.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Request or answer.
    pub kind: RecordKind,
    /// What became of it.
    pub verdict: L7Verdict,
    /// The rule set that denied it.
    pub denied_by: Option<RuleSetId>,
    /// Why.
    pub note: String,
    /// Of an answer.
    pub latency: Option<Duration>,
    /// What was said.
    pub message: L7Message,
}

impl Entry {
    /// A request that was passed on.
    pub fn request(message: L7Message) -> Self {
        let (kind, verdict) = (RecordKind::Request, L7Verdict::Forwarded);
        Self { kind, verdict, denied_by: None, note: String::new(), latency: None, message }
    }

    /// A request that no rule allows.
    pub fn denied(message: L7Message, denied_by: Option<RuleSetId>, note: impl Into<String>) -> Self {
        Self { verdict: L7Verdict::Denied, denied_by, note: note.into(), ..Self::request(message) }
    }

    /// A request that went wrong.
    pub fn error(message: L7Message, note: impl Into<String>) -> Self {
        Self { verdict: L7Verdict::Error, note: note.into(), ..Self::request(message) }
    }

    /// An answer that was passed on.
    pub fn answer(message: L7Message, latency: Duration) -> Self {
        Self { kind: RecordKind::Response, latency: Some(latency), ..Self::request(message) }
    }
}

/// An IPv4 address that came as an IPv6 one is that IPv4 address.
fn plain(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V6(ip) => match ip.to_ipv4_mapped() {
            Some(ip) => SocketAddr::new(ip.into(), address.port()),
            // The scope of a link-local address is not part of the flow's name.
            None => SocketAddr::new(ip.into(), address.port()),
        },
        IpAddr::V4(_) => address,
    }
}
