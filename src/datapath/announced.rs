//! Writes `announced` and `announcing`: the addresses that this node answers for on the link.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use anyhow::Result;
use nix::time::{ClockId, clock_gettime};

use super::abi::{Announced, AnnouncedKey, Announcing, addr_of, ip_of};
use super::map::TypedMap;
use crate::model::MacAddress;

/// Address and device.
pub type Place = (IpAddr, u32);

/// The one writer of `announced` and `announcing`.
pub struct AnnounceWriter {
    rows: TypedMap<AnnouncedKey, Announced>,
    times: TypedMap<u32, Announcing>,
}

impl AnnounceWriter {
    pub(super) fn new(rows: TypedMap<AnnouncedKey, Announced>, times: TypedMap<u32, Announcing>) -> Self {
        Self { rows, times }
    }

    /// Answers for exactly these; returns those that were not answered for before.
    pub fn write(&self, wanted: &BTreeMap<Place, MacAddress>) -> Result<BTreeSet<Place>> {
        let there = self.rows.rows()?;
        let mut new = BTreeSet::new();
        for ((address, ifindex), mac) in wanted {
            let key = AnnouncedKey { addr: addr_of(*address), ifindex: *ifindex };
            let row = Announced { mac: mac.0, ..Announced::default() };
            let old = there.get(&super::map::Bytes(key));
            if old.is_some_and(|old| (old.mac, old.is_yielded) == (row.mac, 0)) {
                continue;
            }
            self.rows.insert(&key, &row)?;
            new.insert((*address, *ifindex));
        }
        self.keep(wanted)?;
        Ok(new)
    }

    /// Answers no more for what is none of these. A row that was yielded stays so.
    pub fn keep(&self, wanted: &BTreeMap<Place, MacAddress>) -> Result<()> {
        for key in self.rows.rows()?.keys().map(|key| key.0) {
            if !wanted.contains_key(&(ip_of(key.addr), key.ifindex)) {
                self.rows.remove(&key)?;
            }
        }
        Ok(())
    }

    /// From now on the rows count for so long as the agent lives, and lead for so long.
    pub fn extend(&self, lives: Duration, leads: Duration) -> Result<()> {
        let now = boot_ns();
        let after = |time: Duration| now.saturating_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
        let times = Announcing { until_ns: after(lives), led_until_ns: after(leads) };
        Ok(self.times.insert(&0, &times)?)
    }
}

/// CLOCK_BOOTTIME now: the clock of bpf_ktime_get_boot_ns.
fn boot_ns() -> u64 {
    let time = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("Linux has had CLOCK_BOOTTIME since 2.6.39");
    u64::try_from(time.tv_sec()).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec()).unwrap_or(0)
}
