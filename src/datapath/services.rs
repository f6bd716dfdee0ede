//! Writes `services`, `slots`, `backends`, `maglev` and `source_ranges`: where a frontend's address leads.
//!
//! A changed set of backends is written under the next generation, then the
//! frontend's row flips, then the old rows go; in between every CPU is awaited,
//! because a program may have read the old row just before the flip.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use imbl::OrdMap;
use imbl::ordmap::DiffItem;

use super::abi::{MaglevKey, MaglevPiece, Service, ServiceKey, Slot, SlotKey, SourceRangeKey};
use super::backends::Backends;
use super::map::{Bytes, MapError};
use super::mirror::Mirror;
use super::refused::Refused;
use super::service_rows::{self, service_key};
use super::settled::Settled;
use super::types::service_flags;
use crate::model::{Algorithm, Frontend, FrontendKey};

/// The maps of services, as they are read back.
pub(super) struct ServiceMaps {
    pub(super) services: Mirror<ServiceKey, Service>,
    pub(super) slots: Mirror<SlotKey, Slot>,
    pub(super) backends: Backends,
    pub(super) maglev: Mirror<MaglevKey, MaglevPiece>,
    pub(super) source_ranges: Mirror<SourceRangeKey, u32>,
}

/// The one writer of the maps of services.
pub struct ServiceWriter {
    maps: ServiceMaps,
    table_size: u32,
    next_id: u32,
    settled: Settled<FrontendKey, Frontend>,
    refused: Refused<FrontendKey, Frontend>,
    /// Sets that no frontend leads to any more.
    retired: Vec<Service>,
}

impl ServiceWriter {
    /// With `ids_are_known` rows of other maps name services of a former agent by their ids.
    pub(super) fn new(maps: ServiceMaps, table_size: u32, ids_are_known: bool) -> Result<Self> {
        let last_id = maps.services.rows().values().map(|row| row.service_id).max();
        let next_id = last_id.unwrap_or(if ids_are_known { seconds_now() } else { 0 }) + 1;
        let mut writer = Self {
            maps,
            table_size,
            next_id,
            settled: Settled::Unknown,
            refused: Refused::default(),
            retired: Vec::new(),
        };
        writer.clean()?;
        Ok(writer)
    }

    /// Writes frontends that differ; removes none. Returns the backends that were taken out of a
    /// frontend, sorted. A frontend that cannot be written keeps what it had, costs no other one, and is
    /// left alone until `retry_refused`. When a map is full, frontends that are not desired are deleted.
    pub fn write(&mut self, frontends: &OrdMap<FrontendKey, Frontend>) -> Result<Vec<SocketAddr>> {
        // First, so that no row of this write is on the list.
        self.delete_retired()?;
        let mut removed = BTreeSet::new();
        for key in self.refused.forget_undesired(frontends) {
            self.delete_frontends([service_key(&key)], &mut removed)?;
        }
        let refused_before = self.refused.len();
        let effective = self.refused.without(frontends);
        let mut is_pruned = false;
        let from = self.settled.before_write();
        for item in from.clone().unwrap_or_default().diff(&effective) {
            let (DiffItem::Add(key, frontend) | DiffItem::Update { new: (key, frontend), .. }) = item else {
                continue;
            };
            let mut written = self.write_frontend(key, frontend, &mut removed);
            if matches!(written, Err(MapError::Full { .. })) && !is_pruned {
                is_pruned = true;
                self.delete_frontends(self.stale_in_map(frontends), &mut removed)?;
                written = self.write_frontend(key, frontend, &mut removed);
            }
            if let Err(error) = written {
                // The rows of what did not fit would keep others out.
                self.delete_retired()?;
                self.refused.insert(*key, frontend.clone(), format!("{:#}", anyhow::Error::from(error)));
            }
        }
        self.delete_retired()?;
        if self.refused.len() == refused_before {
            self.settled.written(from, &effective);
        }
        Ok(removed.into_iter().collect())
    }

    /// The frontends that could not be written, and why.
    pub fn refused(&self) -> impl Iterator<Item = (&FrontendKey, &str)> {
        self.refused.causes()
    }

    /// Reads the maps again: by map, how many rows somebody else changed. The next write and prune
    /// mend them.
    pub fn compare(&mut self) -> Result<[(&'static str, u64); 5]> {
        let changed = [
            ("map services", self.maps.services.refresh()?),
            ("map slots", self.maps.slots.refresh()?),
            ("map backends", self.maps.backends.refresh()?),
            ("map maglev", self.maps.maglev.refresh()?),
            ("map source_ranges", self.maps.source_ranges.refresh()?),
        ];
        // Reading the backends again has forgotten who uses them.
        self.clean()?;
        if changed.iter().any(|(_, rows)| *rows > 0) {
            self.settled = Settled::Unknown;
        }
        Ok(changed)
    }

    /// Tries again, with the next write, what could not be written.
    pub fn retry_refused(&mut self) {
        self.refused.clear();
    }

    /// Deletes the frontends that are not desired and returns their backends.
    /// Only after every source is synced.
    pub fn prune(&mut self, frontends: &OrdMap<FrontendKey, Frontend>) -> Result<Vec<SocketAddr>> {
        let effective = self.refused.without(frontends);
        let stale = match self.settled.before_prune(&effective) {
            Some(from) => from
                .diff(&effective)
                .filter_map(|item| match item {
                    DiffItem::Remove(key, _) if !frontends.contains_key(key) => Some(service_key(key)),
                    DiffItem::Remove(..) | DiffItem::Add(..) | DiffItem::Update { .. } => None,
                })
                .collect(),
            None => self.stale_in_map(frontends),
        };
        let mut removed = BTreeSet::new();
        self.delete_frontends(stale, &mut removed)?;
        self.settled.pruned(&effective);
        Ok(removed.into_iter().collect())
    }

    fn delete_frontends(
        &mut self,
        keys: impl IntoIterator<Item = ServiceKey>,
        removed: &mut BTreeSet<SocketAddr>,
    ) -> Result<()> {
        for key in keys {
            if let Some(old) = self.maps.services.take(key)? {
                removed.extend(self.backends_of(&old));
                self.retired.push(old);
                self.keep_ranges(&old, &BTreeSet::new())?;
            }
        }
        self.delete_retired()
    }

    fn stale_in_map(&self, frontends: &OrdMap<FrontendKey, Frontend>) -> Vec<ServiceKey> {
        let desired: BTreeSet<_> = frontends.keys().map(|key| Bytes(service_key(key))).collect();
        let rows = self.maps.services.rows().keys();
        rows.filter(|key| !desired.contains(key)).map(|key| key.0).collect()
    }

    fn write_frontend(
        &mut self,
        key: &FrontendKey,
        frontend: &Frontend,
        removed: &mut BTreeSet<SocketAddr>,
    ) -> Result<(), MapError> {
        let row_key = service_key(key);
        let old = self.maps.services.rows().get(&Bytes(row_key)).copied();
        let service = Service {
            service_id: old.map_or(self.next_id, |old| old.service_id),
            generation: old.map_or(1, |old| old.generation.wrapping_add(1)),
            ..service_rows::service(key, frontend)
        };
        if old.is_some_and(|old| self.is_written(frontend, &old, &service)) {
            return Ok(());
        }
        self.next_id += u32::from(old.is_none());
        let written = self.write_set(key, frontend, &service);
        let written = written.and_then(|()| self.maps.services.put(row_key, service));
        if let Err(error) = written {
            self.retired.push(service);
            return Err(error);
        }
        if let Some(old) = old {
            let still: BTreeSet<_> = frontend.addresses().chain(frontend.draining.iter().copied()).collect();
            removed.extend(self.backends_of(&old).filter(|backend| !still.contains(backend)));
            self.retired.push(old);
            self.keep_ranges(&old, &service_rows::ranges(frontend, service.service_id).map(Bytes).collect())?;
        }
        Ok(())
    }

    /// The row in the map, and what it leads to, is what `new` would be.
    fn is_written(&self, frontend: &Frontend, old: &Service, new: &Service) -> bool {
        let same_row = Service { generation: new.generation, ..*old };
        let is_table = frontend.algorithm == Algorithm::Maglev;
        Bytes(same_row) == Bytes(*new)
            && self.backends_of(old).eq(service_rows::backends(frontend))
            && self.ranges_of(old) == service_rows::ranges(frontend, old.service_id).map(Bytes).collect()
            && (!is_table || self.has_table(frontend, old))
    }

    fn has_table(&self, frontend: &Frontend, old: &Service) -> bool {
        let ids: Vec<u32> = service_rows::slot_keys(old).filter_map(|key| self.slot(key)).collect();
        let rows = self.maps.maglev.rows();
        let is_there = |(key, piece): &(MaglevKey, MaglevPiece)| {
            rows.get(&Bytes(*key)).is_some_and(|row| Bytes(*row) == Bytes(*piece))
        };
        service_rows::pieces(frontend, old, &ids, self.table_size).iter().all(is_there)
    }

    /// Everything that the row of a frontend leads to.
    fn write_set(
        &mut self,
        key: &FrontendKey,
        frontend: &Frontend,
        service: &Service,
    ) -> Result<(), MapError> {
        let protocol = key.protocol.map_or(0, |protocol| protocol.number());
        let mut ids = Vec::new();
        let mut written = Ok(());
        for backend in service_rows::backends(frontend) {
            match self.maps.backends.take((backend, protocol)) {
                Ok(id) => ids.push(id),
                Err(error) => {
                    written = Err(error);
                    break;
                }
            }
        }
        let mut slots = 0;
        if written.is_ok() {
            let slot = |id: &u32| Slot { backend: *id, service_id: service.service_id };
            let rows = service_rows::slot_keys(service).zip(ids.iter().map(slot));
            written = self.maps.slots.put_all(rows, |_| slots += 1);
        }
        if let Err(error) = written {
            // Those that a slot says are given back with the slot.
            ids.drain(slots..).try_for_each(|id| self.maps.backends.give(id))?;
            return Err(error);
        }
        let pieces = service_rows::pieces(frontend, service, &ids, self.table_size);
        self.maps.maglev.put_all(pieces, |_| {})?;
        for range in service_rows::ranges(frontend, service.service_id) {
            self.maps.source_ranges.put(range, 1)?;
        }
        Ok(())
    }

    fn slot(&self, key: SlotKey) -> Option<u32> {
        self.maps.slots.rows().get(&Bytes(key)).map(|slot| slot.backend)
    }

    /// The backends of a set, those that drain at the end.
    fn backends_of(&self, service: &Service) -> impl Iterator<Item = SocketAddr> + '_ {
        service_rows::slot_keys(service)
            .filter_map(|key| self.maps.backends.name(self.slot(key)?))
            .map(|(address, _)| address)
    }

    fn delete_retired(&mut self) -> Result<()> {
        if self.retired.is_empty() {
            return Ok(());
        }
        super::await_programs();
        while let Some(service) = self.retired.last().copied() {
            self.delete_set(&service)?;
            self.retired.pop();
        }
        Ok(())
    }

    /// Deletes the rows of a set that is not in force.
    fn delete_set(&mut self, service: &Service) -> Result<(), MapError> {
        let keys: Vec<SlotKey> = service_rows::slot_keys(service).collect();
        let ids: Vec<(SlotKey, u32)> = keys.iter().filter_map(|key| Some((*key, self.slot(*key)?))).collect();
        let taken = self.maps.slots.take_all(keys);
        for (key, id) in ids {
            if self.slot(key).is_none() {
                self.maps.backends.give(id)?;
            }
        }
        taken?;
        let Service { service_id, generation, .. } = *service;
        let rows = self.maps.maglev.rows();
        let key = |piece| MaglevKey { service_id, generation, piece };
        let pieces = (0..).map(key).take_while(|key| rows.contains_key(&Bytes(*key)));
        let pieces: Vec<MaglevKey> = pieces.collect();
        self.maps.maglev.take_all(pieces)?;
        Ok(())
    }

    /// The ranges in the map of a service that has some.
    fn ranges_of(&self, service: &Service) -> BTreeSet<Bytes<SourceRangeKey>> {
        if u32::from(service.flags) & service_flags::SERVICE_RANGES.0 == 0 {
            return BTreeSet::new();
        }
        let rows = self.maps.source_ranges.rows().keys();
        rows.filter(|key| u32::from_be(key.0.service_id) == service.service_id).copied().collect()
    }

    /// Deletes the ranges that a service had, but for these.
    fn keep_ranges(&mut self, old: &Service, kept: &BTreeSet<Bytes<SourceRangeKey>>) -> Result<(), MapError> {
        for key in self.ranges_of(old).difference(kept) {
            self.maps.source_ranges.take(key.0)?;
        }
        Ok(())
    }

    /// Deletes what no frontend leads to: a process died between two steps, or somebody else wrote it.
    fn clean(&mut self) -> Result<()> {
        let in_force: BTreeMap<u32, Service> =
            self.maps.services.rows().values().map(|row| (row.service_id, *row)).collect();
        let is_reached = |id: u32, generation: u32| {
            in_force.get(&id).is_some_and(|service| service.generation == generation)
        };
        let of_set = |key: &SlotKey| {
            in_force.get(&key.service_id).is_some_and(|service| {
                key.generation == service.generation
                    && key.slot < service.backend_count + service.draining_count
            })
        };
        let slots: Vec<_> = self.maps.slots.rows().keys().map(|key| key.0).collect();
        for key in slots {
            match self.slot(key) {
                Some(id) if of_set(&key) => self.maps.backends.retake(id),
                _ => drop(self.maps.slots.take(key)?),
            }
        }
        let pieces: Vec<_> = self.maps.maglev.rows().keys().map(|key| key.0).collect();
        for key in pieces.into_iter().filter(|key| !is_reached(key.service_id, key.generation)) {
            self.maps.maglev.take(key)?;
        }
        let ranges: Vec<_> = self.maps.source_ranges.rows().keys().map(|key| key.0).collect();
        for key in ranges.into_iter().filter(|key| !in_force.contains_key(&u32::from_be(key.service_id))) {
            self.maps.source_ranges.take(key)?;
        }
        // No program that has read an id of these is running any more.
        super::await_programs();
        Ok(self.maps.backends.free_unused()?)
    }
}

/// No id of a former agent comes again above this: nobody makes a service a second for years.
fn seconds_now() -> u32 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    u32::try_from(now).unwrap_or(0)
}
