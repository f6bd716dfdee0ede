//! What one pod may have of what all pods of the node share, and what each has.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::Datapath;
use super::abi;
use super::types::{quota_kind, usage_size};
use crate::model::EndpointId;

/// Kinds of what pods share.
const KINDS: usize = quota_kind::QUOTA_KINDS.0 as usize;

/// Rows that a CPU keeps for itself in maps that evict (`LOCAL_FREE_TARGET` of the kernel).
const ROWS_OF_A_CPU: u32 = 128;

/// Ports that a pod may have however few there are.
const FEW_PORTS: u32 = 16;

/// What one pod may have; `None`: as much as the sizes of the maps suggest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quotas {
    /// Connections; by default half of those that the map holds.
    pub connections: Option<u32>,
    /// Unanswered connections; by default a sixteenth of those that the map holds, at least 1024.
    pub opening: Option<u32>,
    /// Ports for masquerading; by default half of the range, and of those that the map holds.
    pub nat_ports: Option<u32>,
    /// Records of drops in a second; 0: any number.
    pub drop_records_per_second: u32,
}

impl Default for Quotas {
    fn default() -> Self {
        Self { connections: None, opening: None, nat_ports: None, drop_records_per_second: 1000 }
    }
}

impl Quotas {
    /// A record moves the time of a pod's next one on by so many 1/1024 jiffies.
    pub(super) fn drop_record_cost(&self, jiffies_per_second: u32) -> u32 {
        match self.drop_records_per_second {
            0 => 0,
            rate => (jiffies_per_second.saturating_mul(1024) / rate).max(1),
        }
    }
}

/// `Quotas` in numbers, by `enum quota_kind`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// What one pod may have.
    pub of_one: [u32; KINDS],
    /// What all together should have at most, so that maps need not evict; 0: not bounded together.
    pub of_all: [u32; KINDS],
    /// Size of the buffer of records.
    pub event_buffer_bytes: u32,
}

impl Limits {
    /// The limits over maps with so many rows.
    pub(super) fn new(
        quotas: &Quotas,
        nat_ports: &RangeInclusive<u16>,
        rows: &BTreeMap<String, u32>,
    ) -> Self {
        let rows = |map: &str| rows.get(map).copied().unwrap_or(0);
        let (connections, nat) = (rows("connections"), rows("nat") / 2);
        let ports = u32::from(*nat_ports.end()).saturating_sub((*nat_ports.start()).into()) + 1;
        let mut limits = Self { event_buffer_bytes: rows("events"), ..Self::default() };
        let mut set = |kind: quota_kind, of_one: Option<u32>, default: u32, of_all: u32| {
            limits.of_one[kind.0 as usize] = of_one.unwrap_or(default);
            limits.of_all[kind.0 as usize] = of_all;
        };
        set(quota_kind::QUOTA_CONNECTIONS, quotas.connections, connections / 2, usable(connections));
        set(quota_kind::QUOTA_OPENING, quotas.opening, (connections / 16).max(1024), 0);
        set(
            quota_kind::QUOTA_NAT_PORTS,
            quotas.nat_ports,
            (nat.min(ports) / 2).max(FEW_PORTS),
            usable(nat * 2) / 2,
        );
        limits
    }
}

/// Rows of an evicting map that can be used before it evicts: some lie with CPUs that do not need them.
fn usable(rows: u32) -> u32 {
    let cpus = libbpf_rs::num_possible_cpus().map_or(1, |cpus| u32::try_from(cpus).unwrap_or(u32::MAX));
    let reserve = (rows / 16).max(cpus.saturating_mul(ROWS_OF_A_CPU)).min(rows / 2);
    rows - reserve
}

/// What pods share (`enum quota_kind`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UsageKind {
    /// Rows of `connections`.
    Connections,
    /// Those of them that are unanswered.
    Opening,
    /// Ports for masquerading.
    NatPorts,
}

impl UsageKind {
    /// Every kind, in the order of `enum quota_kind`.
    pub const ALL: [Self; KINDS] = [Self::Connections, Self::Opening, Self::NatPorts];

    /// Its name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::Opening => "unanswered_connections",
            Self::NatPorts => "nat_ports",
        }
    }
}

/// What a pod has, and was refused. Of unanswered connections nothing is refused: the pod's
/// oldest one is forgotten instead.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Usage {
    /// Connections that it has.
    pub connections: u32,
    /// Unanswered ones among them.
    pub opening: u32,
    /// Ports for masquerading that it has.
    pub nat_ports: u32,
    /// What it may have: connections, unanswered ones, ports for masquerading.
    pub limits: [u32; KINDS],
    /// Refused, or forgotten for a newer one: connections, unanswered ones, ports.
    pub refused: [u64; KINDS],
    /// Records of its drops that were only counted.
    pub records_suppressed: u64,
}

impl Usage {
    fn new(row: &abi::Usage, limits: &Limits) -> Self {
        // A counter may be off below zero until the next round of the collector.
        let in_use = |kind: quota_kind| u32::try_from(row.in_use[kind.0 as usize].cast_signed()).unwrap_or(0);
        Self {
            connections: in_use(quota_kind::QUOTA_CONNECTIONS),
            opening: in_use(quota_kind::QUOTA_OPENING),
            nat_ports: in_use(quota_kind::QUOTA_NAT_PORTS),
            limits: limits.of_one,
            refused: row.refused,
            records_suppressed: row.records_suppressed,
        }
    }

    /// Connections and ports that the pod did not get.
    pub fn refused_total(&self) -> u64 {
        self.refused[UsageKind::Connections as usize] + self.refused[UsageKind::NatPorts as usize]
    }
}

impl Datapath {
    /// What every pod has; number 0 is the node itself.
    pub fn usage(&self) -> Result<BTreeMap<EndpointId, Usage>> {
        let mut rows = BTreeMap::new();
        self.typed::<u32, abi::Usage>("usage")?.for_each(|index, row| {
            if index < usage_size::USAGE_ENDPOINTS.0 {
                rows.extend(
                    u16::try_from(index).ok().map(|id| (EndpointId(id), Usage::new(&row, &self.limits))),
                );
            }
        })?;
        Ok(rows)
    }

    /// What pods may have.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Refused by kind, of all pods.
    pub fn refused(&self) -> Result<[u64; KINDS]> {
        let mut total = [0; KINDS];
        self.typed::<u32, abi::Usage>("usage")?.for_each(|_, row| {
            total.iter_mut().zip(row.refused).for_each(|(total, refused)| *total += refused);
        })?;
        Ok(total)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(quotas: &Quotas, connections: u32) -> Limits {
        let rows = [("connections", connections), ("nat", 131_072)];
        let rows = rows.map(|(map, rows)| (map.to_owned(), rows)).into();
        Limits::new(quotas, &(10_240..=29_999), &rows)
    }

    #[test]
    fn limits_come_from_the_maps_sizes_unless_they_are_set() {
        assert_eq!(limits(&Quotas::default(), 262_144).of_one, [131_072, 16_384, 9880]);
        assert_eq!(limits(&Quotas::default(), 4096).of_one, [2048, 1024, 9880]);
        let set = Quotas { connections: Some(7), opening: Some(5), nat_ports: Some(3), ..Quotas::default() };
        assert_eq!(limits(&set, 4096).of_one, [7, 5, 3]);
    }

    #[test]
    fn all_together_leave_rows_free() {
        for rows in [1024, 4096, 262_144] {
            let all = limits(&Quotas::default(), rows).of_all[0];
            assert!(all >= rows / 2 && all <= rows - rows / 16, "{all} of {rows}");
        }
    }

    #[test]
    fn a_seconds_records_cost_a_second() {
        assert_eq!(Quotas::default().drop_record_cost(250), 256);
        assert_eq!(Quotas { drop_records_per_second: 0, ..Quotas::default() }.drop_record_cost(250), 0);
        assert_eq!(
            Quotas { drop_records_per_second: u32::MAX, ..Quotas::default() }.drop_record_cost(250),
            1
        );
    }
}
