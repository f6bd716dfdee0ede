//! Writes `services` and `backends`: where a frontend's address leads.
//!
//! A changed set of backends is written under the next generation, then the
//! frontend's row flips, then the old rows go; in between every CPU is awaited,
//! because a program may have read the old row just before the flip.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use anyhow::Result;
use imbl::OrdMap;
use imbl::ordmap::DiffItem;

use super::abi::{Backend, BackendKey, Service, ServiceKey, addr_of, ip_of};
use super::map::{Bytes, MapError};
use super::mirror::Mirror;
use super::refused::Refused;
use super::settled::Settled;
use super::types::service_flags;
use crate::model::{Frontend, FrontendKey, FrontendKind, Scope};

/// The one writer of `services` and `backends`.
pub struct ServiceWriter {
    services: Mirror<ServiceKey, Service>,
    backends: Mirror<BackendKey, Backend>,
    next_id: u32,
    settled: Settled<FrontendKey, Frontend>,
    refused: Refused<FrontendKey, Frontend>,
    /// Rows that no frontend leads to any more.
    retired: Vec<BackendKey>,
}

impl ServiceWriter {
    pub(super) fn new(services: Mirror<ServiceKey, Service>, backends: Mirror<BackendKey, Backend>) -> Self {
        let next_id = services.rows().values().map(|row| row.service_id).max().unwrap_or(0) + 1;
        // Left by a process that died between two steps.
        let retired = unreached(&services, &backends);
        Self { services, backends, next_id, settled: Settled::Unknown, refused: Refused::default(), retired }
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
    pub fn compare(&mut self) -> Result<[(&'static str, u64); 2]> {
        let changed =
            [("map services", self.services.refresh()?), ("map backends", self.backends.refresh()?)];
        if changed.iter().any(|(_, rows)| *rows > 0) {
            self.settled = Settled::Unknown;
            self.retired = unreached(&self.services, &self.backends);
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
            if let Some(old) = self.services.take(key)? {
                removed.extend(self.backends_of(&old));
                self.retired.extend(backend_keys(&old));
            }
        }
        self.delete_retired()
    }

    fn stale_in_map(&self, frontends: &OrdMap<FrontendKey, Frontend>) -> Vec<ServiceKey> {
        let desired: BTreeSet<_> = frontends.keys().map(|key| Bytes(service_key(key))).collect();
        let rows = self.services.rows().keys();
        rows.filter(|key| !desired.contains(key)).map(|key| key.0).collect()
    }

    fn write_frontend(
        &mut self,
        key: &FrontendKey,
        frontend: &Frontend,
        removed: &mut BTreeSet<SocketAddr>,
    ) -> Result<(), MapError> {
        let row_key = service_key(key);
        let old = self.services.rows().get(&Bytes(row_key)).copied();
        let old_backends = old.map(|old| self.backends_of(&old)).unwrap_or_default();
        let flags = flags_of(key, frontend);
        if old.is_some_and(|old| old.flags == flags) && old_backends.iter().copied().eq(frontend.addresses())
        {
            return Ok(());
        }
        let service = Service {
            service_id: old.map_or(self.next_id, |old| old.service_id),
            generation: old.map_or(1, |old| old.generation.wrapping_add(1)),
            backend_count: u32::try_from(frontend.backends.len()).unwrap_or(u32::MAX),
            flags,
        };
        self.next_id += u32::from(old.is_none());
        for (row_key, backend) in backend_keys(&service).zip(frontend.addresses()) {
            let row = backend_row(key, backend, service.service_id);
            if let Err(error) = self.backends.put(row_key, row) {
                self.retired.extend(backend_keys(&service));
                return Err(error);
            }
        }
        if let Err(error) = self.services.put(row_key, service) {
            self.retired.extend(backend_keys(&service));
            return Err(error);
        }
        if let Some(old) = old {
            self.retired.extend(backend_keys(&old));
            let is_there = |backend: &SocketAddr| frontend.addresses().any(|there| there == *backend);
            removed.extend(old_backends.into_iter().filter(|backend| !is_there(backend)));
        }
        Ok(())
    }

    fn backends_of(&self, service: &Service) -> Vec<SocketAddr> {
        let rows = backend_keys(service).filter_map(|key| self.backends.rows().get(&Bytes(key)));
        rows.map(|row| SocketAddr::new(ip_of(row.addr), u16::from_be(row.port))).collect()
    }

    fn delete_retired(&mut self) -> Result<()> {
        if self.retired.is_empty() {
            return Ok(());
        }
        super::await_programs();
        while let Some(key) = self.retired.pop() {
            if let Err(error) = self.backends.take(key) {
                self.retired.push(key);
                return Err(error.into());
            }
        }
        Ok(())
    }
}

/// The rows of backends that no frontend leads to.
fn unreached(
    services: &Mirror<ServiceKey, Service>,
    backends: &Mirror<BackendKey, Backend>,
) -> Vec<BackendKey> {
    let in_force: BTreeMap<u32, Service> =
        services.rows().values().map(|row| (row.service_id, *row)).collect();
    let is_reached = |key: &BackendKey| {
        in_force
            .get(&key.service_id)
            .is_some_and(|service| key.generation == service.generation && key.slot < service.backend_count)
    };
    backends.rows().keys().map(|key| key.0).filter(|key| !is_reached(key)).collect()
}

fn service_key(key: &FrontendKey) -> ServiceKey {
    ServiceKey {
        addr: addr_of(key.address),
        port: key.port.to_be(),
        protocol: key.protocol.map_or(0, |protocol| protocol.number()),
        scope: u8::from(key.scope == Scope::External),
    }
}

fn flags_of(key: &FrontendKey, frontend: &Frontend) -> u32 {
    let wildcard = if key.protocol.is_none() { service_flags::SERVICE_WILDCARD.0 } else { 0 };
    let is_host_port = frontend.kind == FrontendKind::HostPort;
    let host_port = if is_host_port { service_flags::SERVICE_HOST_PORT.0 } else { 0 };
    let is_loopback = is_host_port && key.address.is_loopback();
    let loopback = if is_loopback { service_flags::SERVICE_LOOPBACK.0 } else { 0 };
    wildcard | host_port | loopback
}

fn backend_keys(service: &Service) -> impl Iterator<Item = BackendKey> + use<> {
    let Service { service_id, generation, backend_count, .. } = *service;
    (0..backend_count).map(move |slot| BackendKey { service_id, generation, slot })
}

fn backend_row(frontend: &FrontendKey, backend: SocketAddr, service_id: u32) -> Backend {
    Backend {
        addr: addr_of(backend.ip()),
        service_id,
        port: backend.port().to_be(),
        protocol: frontend.protocol.map_or(0, |protocol| protocol.number()),
        flags: 0,
    }
}
