//! What the programs and writers counted: packets by reason, events offered and
//! lost, how full the maps are.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use libbpf_rs::{MapCore, MapHandle};
use serde::{Deserialize, Serialize};

use super::Datapath;
use super::abi::{EventCount, Metric, NatSearch, Plain};
use super::map::walk;
use super::mirror::Fill;
use super::types::nat_search_index;

/// Packets and bytes of one reason and direction since the map was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MetricRow {
    /// `enum drop_reason`; 0: forwarded.
    pub reason: u8,
    /// `enum direction`.
    pub direction: u8,
    /// Packets, of all CPUs.
    pub packets: u64,
    /// Bytes, of all CPUs.
    pub bytes: u64,
}

/// What became of events: `offered` less the other two were delivered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EventCounts {
    /// Events that the programs had to report.
    pub offered: u64,
    /// The ring buffer was full.
    pub lost: u64,
    /// The pod had its share of records.
    pub suppressed: u64,
}

/// Searches for a port of the node for a flow to be masqueraded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct NatSearches {
    /// So many found a port at most at this try; `None`: they found none.
    pub most_tries: Option<u32>,
    /// Searches, of all CPUs.
    pub searches: u64,
    /// Ports that all of them tried.
    pub tries: u64,
}

/// How full a map is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MapFill {
    /// Its name.
    pub map: String,
    /// Rows in it.
    pub used: usize,
    /// Rows that it can hold.
    pub capacity: usize,
}

/// Maps that writers of ours fill and count.
const WRITTEN: [&str; 12] = [
    "addresses",
    "backends",
    "egress_pods",
    "egress_rules",
    "endpoints",
    "maglev",
    "policy_peers",
    "policy_rules",
    "prefixes",
    "services",
    "slots",
    "source_ranges",
];

/// Maps that the programs fill: counting walks them, so it is not done often.
const WALKED: [&str; 2] = ["connections", "nat"];

/// A walk of a full `connections` takes some 100 ms.
const WALK_INTERVAL: Duration = Duration::from_secs(10);

/// Directions of one reason in `metrics`.
const DIRECTIONS: u32 = 4;

/// Row counts by map.
#[derive(Debug)]
pub(super) struct Fills {
    written: BTreeMap<&'static str, Fill>,
    walked: Mutex<Walked>,
}

#[derive(Debug, Default)]
struct Walked {
    at: Option<Instant>,
    used: BTreeMap<&'static str, usize>,
}

impl Default for Fills {
    fn default() -> Self {
        let written = WRITTEN.iter().map(|name| (*name, Fill::default())).collect();
        Self { written, walked: Mutex::default() }
    }
}

impl Fills {
    /// The count that a map's writer keeps.
    pub(super) fn of(&self, map: &str) -> Fill {
        self.written.get(map).cloned().unwrap_or_default()
    }
}

impl Datapath {
    /// Packets and bytes by reason and direction, without the rows that are zero.
    pub fn metrics(&self) -> Result<Vec<MetricRow>> {
        let mut rows = Vec::new();
        per_cpu(&self.map("metrics")?, |index, values: Vec<Metric>| {
            let packets = values.iter().map(|value| value.packets).sum();
            let bytes = values.iter().map(|value| value.bytes).sum();
            if packets != 0 {
                let (reason, direction) = ((index / DIRECTIONS) as u8, (index % DIRECTIONS) as u8);
                rows.push(MetricRow { reason, direction, packets, bytes });
            }
        })?;
        Ok(rows)
    }

    /// What became of the events that the programs offered.
    pub fn event_counts(&self) -> Result<EventCounts> {
        self.counts_of("event_counts")
    }

    /// What became of the records of DNS that the programs offered.
    pub fn dns_counts(&self) -> Result<EventCounts> {
        self.counts_of("dns_counts")
    }

    fn counts_of(&self, map: &str) -> Result<EventCounts> {
        let mut counts = EventCounts::default();
        per_cpu(&self.map(map)?, |_, values: Vec<EventCount>| {
            for value in values {
                counts.offered += value.offered;
                counts.lost += value.lost;
                counts.suppressed += value.suppressed;
            }
        })?;
        Ok(counts)
    }

    /// Searches for ports, by how many ports they tried; the last row has those that found none.
    pub fn nat_searches(&self) -> Result<Vec<NatSearches>> {
        let mut rows = Vec::new();
        per_cpu(&self.map("nat_searches")?, |index, values: Vec<NatSearch>| {
            rows.push(NatSearches {
                most_tries: (index != nat_search_index::NAT_SEARCH_FAILED.0).then_some(1 << index),
                searches: values.iter().map(|value| value.searches).sum(),
                tries: values.iter().map(|value| value.tries).sum(),
            });
        })?;
        rows.sort_by_key(|row| row.most_tries.unwrap_or(u32::MAX));
        Ok(rows)
    }

    /// How full the maps are. Counts of maps that the programs write may be 10 s old.
    pub fn map_fill(&self) -> Result<Vec<MapFill>> {
        let mut walked = self.fills.walked.lock().expect("nobody panics while counting");
        if walked.at.is_none_or(|at| at.elapsed() >= WALK_INTERVAL) {
            for name in WALKED {
                walked.used.insert(name, count_rows(&self.map(name)?)?);
            }
            walked.at = Some(Instant::now());
        }
        let written = self.fills.written.iter().map(|(name, fill)| (*name, fill.load(Ordering::Relaxed)));
        let walked = walked.used.iter().map(|(name, used)| (*name, *used));
        let used: BTreeMap<_, _> = written.chain(walked).collect();
        used.into_iter()
            .map(|(map, used)| {
                let capacity = self.map(map)?.max_entries() as usize;
                Ok(MapFill { map: map.to_owned(), used, capacity })
            })
            .collect()
    }
}

fn count_rows(map: &MapHandle) -> Result<usize> {
    let mut count = 0;
    walk(map, map.value_size() as usize, |_, _| count += 1)
        .with_context(|| format!("counting the rows of {}", map.name().display()))?;
    Ok(count)
}

/// Calls `each` with the index and every CPU's value of a per-CPU array's rows.
pub(super) fn per_cpu<V: Plain>(map: &MapHandle, mut each: impl FnMut(u32, Vec<V>)) -> Result<()> {
    let stride = size_of::<V>().next_multiple_of(8);
    let cpus = libbpf_rs::num_possible_cpus().context("counting the CPUs")?;
    walk(map, stride * cpus, |index, values| {
        let values = values.chunks_exact(stride).filter_map(|value| V::from_bytes(&value[..size_of::<V>()]));
        each(u32::from_bytes(index).unwrap_or_default(), values.collect());
    })
    .with_context(|| format!("reading map {}", map.name().display()))
}
