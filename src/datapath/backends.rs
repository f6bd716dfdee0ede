//! Writes `backends`: every distinct backend has an id, whatever services have it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;

use super::abi::{Backend, addr_of, ip_of};
use super::map::{MapError, TypedMap};
use super::mirror::Fill;

/// Address, port and protocol.
pub(super) type Name = (SocketAddr, u8);

struct Known {
    id: u32,
    /// Slots that say the id.
    users: usize,
}

/// The one writer of `backends`. An id is free again when no slot says it, and is used again as late as can be.
pub(super) struct Backends {
    map: TypedMap<u32, Backend>,
    known: BTreeMap<Name, Known>,
    names: BTreeMap<u32, Name>,
    last: u32,
    fill: Fill,
}

impl Backends {
    /// Reads the map back. Nobody uses what it holds, until `take` says so.
    pub(super) fn read(map: TypedMap<u32, Backend>, fill: Fill) -> Result<Self, MapError> {
        let mut backends = Self { map, known: BTreeMap::new(), names: BTreeMap::new(), last: 0, fill };
        backends.refresh()?;
        Ok(backends)
    }

    /// Reads the map again: how many rows somebody else changed.
    pub(super) fn refresh(&mut self) -> Result<u64, MapError> {
        let before = std::mem::take(&mut self.names);
        let mut names = BTreeMap::new();
        self.map.for_each(|id, row| {
            let address = SocketAddr::new(ip_of(row.addr), u16::from_be(row.port));
            names.insert(id, (address, row.protocol));
        })?;
        let strange = names.iter().filter(|(id, name)| before.get(id) != Some(name)).count();
        let lost = before.keys().filter(|id| !names.contains_key(id)).count();
        self.known = names.iter().map(|(id, name)| (*name, Known { id: *id, users: 0 })).collect();
        self.names = names;
        self.last = self.last.max(self.names.keys().next_back().copied().unwrap_or(0));
        self.count();
        Ok((strange + lost) as u64)
    }

    /// The backend that an id means.
    pub(super) fn name(&self, id: u32) -> Option<Name> {
        self.names.get(&id).copied()
    }

    /// One more slot says the id of this backend, which gets one if it has none.
    pub(super) fn take(&mut self, name: Name) -> Result<u32, MapError> {
        if let Some(known) = self.known.get_mut(&name) {
            known.users += 1;
            return Ok(known.id);
        }
        let id = self.free_id()?;
        let (address, protocol) = name;
        let row = Backend { addr: addr_of(address.ip()), port: address.port().to_be(), id, protocol, pad: 0 };
        self.map.insert(&id, &row)?;
        self.last = id;
        self.known.insert(name, Known { id, users: 1 });
        self.names.insert(id, name);
        self.count();
        Ok(id)
    }

    /// A slot that is there says this id.
    pub(super) fn retake(&mut self, id: u32) {
        if let Some(known) = self.names.get(&id).and_then(|name| self.known.get_mut(name)) {
            known.users += 1;
        }
    }

    /// A slot less says this id. No program reads that slot any more.
    pub(super) fn give(&mut self, id: u32) -> Result<(), MapError> {
        let Some(name) = self.names.get(&id).copied() else { return Ok(()) };
        let Some(known) = self.known.get_mut(&name) else { return Ok(()) };
        known.users = known.users.saturating_sub(1);
        if known.users == 0 { self.free(id, &name) } else { Ok(()) }
    }

    /// Frees what nobody uses.
    pub(super) fn free_unused(&mut self) -> Result<(), MapError> {
        let unused: Vec<_> = self.known.iter().filter(|(_, known)| known.users == 0).collect();
        let unused: Vec<_> = unused.into_iter().map(|(name, known)| (known.id, *name)).collect();
        // Of a row that two ids had, one is unknown here.
        let doubles =
            self.names.iter().filter(|(id, name)| self.known.get(name).is_none_or(|k| k.id != **id));
        let doubles: Vec<_> = doubles.map(|(id, name)| (*id, *name)).collect();
        unused.into_iter().try_for_each(|(id, name)| self.free(id, &name))?;
        for (id, _) in doubles {
            self.map.remove(&id)?;
            self.names.remove(&id);
        }
        self.count();
        Ok(())
    }

    fn free(&mut self, id: u32, name: &Name) -> Result<(), MapError> {
        self.map.remove(&id)?;
        self.known.remove(name);
        self.names.remove(&id);
        self.count();
        Ok(())
    }

    /// The next one after the last that was given.
    fn free_id(&self) -> Result<u32, MapError> {
        let capacity = self.map.capacity();
        let after = (self.last.saturating_add(1)..capacity).chain(1..capacity);
        let mut free = after.take(capacity as usize).filter(|id| !self.names.contains_key(id));
        free.next().ok_or_else(|| MapError::Full { map: self.map.name().to_owned(), capacity })
    }

    fn count(&self) {
        self.fill.store(self.names.len(), Ordering::Relaxed);
    }
}
