//! Metrics that are read when somebody asks: the kernel's counters, the recorder's, the tables'.

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::Result;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::{PartRow, Parts};
use crate::datapath::{Datapath, MapFill, MetricRow, NatSearches, UsageKind};
use crate::flow::{Direction, DropReason, Recorder};
use crate::model::PeerState;

/// What the programs count, and how full the maps are.
pub trait KernelCounters: Send + Sync + 'static {
    /// Packets and bytes by reason and direction, summed over all CPUs; rows of zeros may be left out.
    fn packets(&self) -> Result<Vec<MetricRow>>;
    /// Every map with the number of its entries, as far as that can be told.
    fn maps(&self) -> Result<Vec<MapFill>>;
    /// Searches for a port for masquerading, by how many ports they tried.
    fn nat_searches(&self) -> Result<Vec<NatSearches>>;
    /// What pods did not get of each kind, or lost their oldest for.
    fn refused(&self) -> Result<Vec<(UsageKind, u64)>>;
}

impl KernelCounters for Datapath {
    fn packets(&self) -> Result<Vec<MetricRow>> {
        self.metrics()
    }

    fn maps(&self) -> Result<Vec<MapFill>> {
        self.map_fill()
    }

    fn nat_searches(&self) -> Result<Vec<NatSearches>> {
        Datapath::nat_searches(self)
    }

    fn refused(&self) -> Result<Vec<(UsageKind, u64)>> {
        Ok(UsageKind::ALL.into_iter().zip(Datapath::refused(self)?).collect())
    }
}

/// How many objects the agent works with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectCounts {
    /// Pods of this node.
    pub endpoints: u64,
    /// Those of them whose policy is in force.
    pub endpoints_enforced: u64,
    /// Identities of the cluster.
    pub identities: u64,
    /// Identities of this node's own.
    pub local_identities: u64,
    /// Nodes of the cluster.
    pub nodes: u64,
    /// NetworkPolicies.
    pub policies: u64,
    /// Different compiled policies in the maps.
    pub compiled_policies: u64,
    /// Services.
    pub services: u64,
    /// Addresses of pods and nodes.
    pub addresses: u64,
    /// Pods of this node that leave by an egress gateway.
    #[serde(default)]
    pub egress_pods: u64,
    /// Those of them without a gateway.
    #[serde(default)]
    pub egress_pods_closed: u64,
    /// Pods that leave by this node as their gateway.
    #[serde(default)]
    pub egress_served: u64,
}

/// How the source of one kind of objects is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchHealth {
    /// Which kind.
    pub kind: String,
    /// The first full list has come.
    pub is_synced: bool,
    /// The source answers.
    pub is_connected: bool,
    /// When it last said anything.
    pub last_event: Option<SystemTime>,
    /// How often it could not be read.
    pub errors_total: u64,
}

type Encoded = Result<(), fmt::Error>;

/// A family of counters: name, help, rows of labels and value.
fn counters<const N: usize>(
    encoder: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    rows: impl IntoIterator<Item = ([(&'static str, String); N], u64)>,
) -> Encoded {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    rows.into_iter().try_for_each(|(labels, value)| row(&mut family, labels, &ConstCounter::new(value)))
}

/// A family of gauges: name, help, rows of labels and value.
fn gauges<const N: usize>(
    encoder: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    rows: impl IntoIterator<Item = ([(&'static str, String); N], f64)>,
) -> Encoded {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    rows.into_iter().try_for_each(|(labels, value)| row(&mut family, labels, &ConstGauge::new(value)))
}

/// A counter without labels.
fn counter(encoder: &mut DescriptorEncoder, name: &str, help: &str, value: u64) -> Encoded {
    ConstCounter::new(value).encode(encoder.encode_descriptor(name, help, None, MetricType::Counter)?)
}

/// A gauge without labels.
fn gauge(encoder: &mut DescriptorEncoder, name: &str, help: &str, value: f64) -> Encoded {
    ConstGauge::new(value).encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)
}

fn row<const N: usize>(
    family: &mut MetricEncoder,
    labels: [(&'static str, String); N],
    metric: &impl EncodeMetric,
) -> Encoded {
    metric.encode(family.encode_family(&labels)?)
}

pub(super) struct Kernel(pub(super) Arc<dyn KernelCounters>);

impl Collector for Kernel {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Encoded {
        match self.0.packets() {
            Ok(packets) => encode_packets(&mut encoder, &packets)?,
            Err(error) => warn!(error = crate::error::chain(&error), "reading the kernel's packet counters"),
        }
        match self.0.nat_searches() {
            Ok(searches) => encode_nat_searches(&mut encoder, &searches)?,
            Err(error) => warn!(error = crate::error::chain(&error), "reading the searches for ports"),
        }
        match self.0.refused() {
            Ok(refused) => counters(
                &mut encoder,
                "endpoint_quota_exceeded",
                "What pods did not get as they had their share, or gave their oldest one for",
                refused.into_iter().map(|(kind, count)| ([("kind", kind.name().to_owned())], count)),
            )?,
            Err(error) => warn!(error = crate::error::chain(&error), "reading what pods were refused"),
        }
        let maps = match self.0.maps() {
            Ok(maps) => maps,
            Err(error) => {
                warn!(error = crate::error::chain(&error), "reading how full the maps are");
                return Ok(());
            }
        };
        let rows = |value: fn(&MapFill) -> usize| {
            maps.iter().map(move |map| ([("map", map.map.clone())], value(map) as f64))
        };
        gauges(&mut encoder, "map_entries", "What a map holds", rows(|map| map.used))?;
        gauges(&mut encoder, "map_max_entries", "What a map can hold", rows(|map| map.capacity))
    }
}

/// A histogram; who found no port is beyond its last bound.
fn encode_nat_searches(encoder: &mut DescriptorEncoder, rows: &[NatSearches]) -> Encoded {
    let bounds = |row: &NatSearches| (row.most_tries.map_or(f64::INFINITY, f64::from), row.searches);
    let buckets: Vec<_> = rows.iter().map(bounds).collect();
    let searches = rows.iter().map(|row| row.searches).sum();
    let tries: u64 = rows.iter().map(|row| row.tries).sum();
    let help = "Ports that were tried for a flow to be masqueraded; +Inf: none of them was free";
    let mut family = encoder.encode_descriptor("nat_port_tries", help, None, MetricType::Histogram)?;
    family.encode_histogram::<NoLabelSet>(tries as f64, searches, &buckets, None)
}

fn encode_packets(encoder: &mut DescriptorEncoder, packets: &[MetricRow]) -> Encoded {
    let direction = |row: &MetricRow| ("direction", Direction::from(row.direction).to_string());
    let forwarded = |value: fn(&MetricRow) -> u64| {
        let rows = packets.iter().filter(|row| row.reason == 0);
        rows.map(move |row| ([direction(row)], value(row)))
    };
    let dropped = |value: fn(&MetricRow) -> u64| {
        let rows = packets.iter().filter(|row| row.reason != 0);
        rows.map(move |row| ([("reason", DropReason(row.reason).to_string()), direction(row)], value(row)))
    };
    counters(encoder, "forwarded_packets", "Packets delivered", forwarded(|row| row.packets))?;
    counters(encoder, "forwarded_bytes", "Bytes of packets delivered", forwarded(|row| row.bytes))?;
    counters(encoder, "dropped_packets", "Packets dropped, by reason", dropped(|row| row.packets))?;
    counters(encoder, "dropped_bytes", "Bytes of packets dropped, by reason", dropped(|row| row.bytes))
}

pub(super) struct Flows(pub(super) Arc<Recorder>);

impl Collector for Flows {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Encoded {
        let counts = self.0.counts();
        counter(&mut encoder, "flow_events_seen", "Flow records that arrived from the kernel", counts.seen)?;
        let lost = [
            ("kernel", counts.lost_in_kernel),
            ("quota", counts.suppressed),
            ("observer", counts.missed_by_readers),
        ];
        counters(
            &mut encoder,
            "flow_events_lost",
            "Flow records that did not fit the kernel's buffer, that were more than their pod's share, or that a slow observer missed",
            lost.map(|(place, lost)| ([("where", place.to_owned())], lost)),
        )?;
        gauge(&mut encoder, "flow_events_held", "Flow records in memory", counts.held as f64)?;
        gauge(
            &mut encoder,
            "flow_events_capacity",
            "Flow records that memory can hold",
            counts.capacity as f64,
        )
    }
}

pub(super) struct Objects(pub(super) Box<dyn Fn() -> ObjectCounts + Send + Sync>);

impl Collector for Objects {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Encoded {
        let counts = (self.0)();
        for (name, help, value) in [
            ("endpoints", "Pods of this node", counts.endpoints),
            ("endpoints_enforced", "Pods of this node whose policy is in force", counts.endpoints_enforced),
            ("identities", "Identities of the cluster", counts.identities),
            ("local_identities", "Identities of this node's own: prefixes of rules", counts.local_identities),
            ("nodes", "Nodes of the cluster", counts.nodes),
            ("policies", "Network policies", counts.policies),
            ("compiled_policies", "Different compiled policies in the maps", counts.compiled_policies),
            ("services", "Services", counts.services),
            ("addresses", "Known addresses of pods and nodes", counts.addresses),
            ("egress_gateway_pods", "Pods of this node that leave by an egress gateway", counts.egress_pods),
            ("egress_gateway_pods_closed", "Those of them without a gateway", counts.egress_pods_closed),
            (
                "egress_gateway_pods_served",
                "Pods that leave by this node as their gateway",
                counts.egress_served,
            ),
        ] {
            gauge(&mut encoder, name, help, value as f64)?;
        }
        Ok(())
    }
}

pub(super) struct Peers(pub(super) Box<dyn Fn() -> Vec<(String, PeerState)> + Send + Sync>);

impl Collector for Peers {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Encoded {
        let peers = (self.0)();
        let node = |name: &str| [("node", name.to_owned())];
        let since = |state: &PeerState| state.last_handshake_seconds.map(|seconds| seconds as f64);
        gauges(
            &mut encoder,
            "encryption_peer_last_handshake_age_seconds",
            "How long ago the last handshake with a node was; absent: there was none",
            peers.iter().filter_map(|(name, state)| Some((node(name), since(state)?))),
        )?;
        for (name, help, value) in [
            (
                "encryption_peer_received_bytes",
                "Bytes that came from a node encrypted",
                (|state| state.received_bytes) as fn(&PeerState) -> u64,
            ),
            ("encryption_peer_sent_bytes", "Bytes that went to a node encrypted", |state| state.sent_bytes),
            (
                "encryption_peer_errors",
                "Packets of a node that could not be encrypted, decrypted or sent, or were not the node's",
                |state| state.errors,
            ),
        ] {
            counters(
                &mut encoder,
                name,
                help,
                peers.iter().map(|(node_name, state)| (node(node_name), value(state))),
            )?;
        }
        Ok(())
    }
}

pub(super) struct Watches(pub(super) Box<dyn Fn() -> Vec<WatchHealth> + Send + Sync>);

impl Collector for Watches {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Encoded {
        let watches = (self.0)();
        let kind = |watch: &WatchHealth| [("kind", watch.kind.clone())];
        let number = |flag: bool| if flag { 1.0 } else { 0.0 };
        gauges(
            &mut encoder,
            "watch_synced",
            "1 when the first full list has come",
            watches.iter().map(|watch| (kind(watch), number(watch.is_synced))),
        )?;
        gauges(
            &mut encoder,
            "watch_connected",
            "1 while the source answers",
            watches.iter().map(|watch| (kind(watch), number(watch.is_connected))),
        )?;
        let seconds =
            |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).ok().map(|age| age.as_secs_f64());
        gauges(
            &mut encoder,
            "watch_last_event_timestamp_seconds",
            "When the source last said anything",
            watches.iter().filter_map(|watch| Some((kind(watch), seconds(watch.last_event?)?))),
        )?;
        counters(
            &mut encoder,
            "watch_errors",
            "How often the source could not be read",
            watches.iter().map(|watch| (kind(watch), watch.errors_total)),
        )
    }
}

pub(super) struct AllParts(pub(super) Parts);

impl Collector for AllParts {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Encoded {
        let rows = self.0.rows();
        let part = |row: &PartRow| [("part", row.part.clone())];
        gauges(
            &mut encoder,
            "part_failing_seconds",
            "For how long a part of the agent has failed; 0 while it works",
            rows.iter()
                .map(|row| (part(row), row.failing_seconds.map_or(0, |seconds| seconds.max(1)) as f64)),
        )?;
        counters(
            &mut encoder,
            "part_errors",
            "How often a part of the agent tried in vain",
            rows.iter().map(|row| (part(row), row.errors_total)),
        )?;
        counters(
            &mut encoder,
            "repairs",
            "How often something was put back that somebody else had changed",
            rows.iter().map(|row| ([("target", row.part.clone())], row.repairs_total)),
        )
    }
}

/// The process itself, under the names that every Prometheus client uses.
pub(super) struct Process;

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Encoded {
        let Some(process) = ProcessUsage::read() else { return Ok(()) };
        gauge(
            &mut encoder,
            "process_resident_memory_bytes",
            "Resident memory",
            process.resident_bytes as f64,
        )?;
        gauge(&mut encoder, "process_open_fds", "Open file descriptors", process.open_files as f64)?;
        let cpu = encoder.encode_descriptor(
            "process_cpu_seconds",
            "CPU time, user and system",
            None,
            MetricType::Counter,
        )?;
        ConstCounter::new(process.cpu_seconds).encode(cpu)
    }
}

/// USER_HZ: the same on every architecture that we build for.
const USER_TICKS_PER_SECOND: f64 = 100.0;

/// What the process uses.
#[derive(Clone, Copy, Debug)]
pub(super) struct ProcessUsage {
    pub(super) resident_bytes: u64,
    pub(super) open_files: usize,
    pub(super) cpu_seconds: f64,
}

impl ProcessUsage {
    pub(super) fn read() -> Option<Self> {
        let status = std::fs::read_to_string("/proc/self/status").ok()?;
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        let resident_kib: u64 = resident.trim().strip_suffix(" kB")?.parse().ok()?;
        let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
        // The name, in parentheses, may hold anything; user and system time are the 12th and 13th after it.
        let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
        let ticks = fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?;
        Some(Self {
            resident_bytes: resident_kib * 1024,
            open_files: std::fs::read_dir("/proc/self/fd").ok()?.count(),
            cpu_seconds: ticks as f64 / USER_TICKS_PER_SECOND,
        })
    }
}

macro_rules! debug {
    ($($name:ident)*) => { $(
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(stringify!($name))
            }
        }
    )* };
}
debug! { AllParts Kernel Flows Objects Peers Watches Process }
