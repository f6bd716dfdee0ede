//! Writes `addresses`, `prefixes` and `node_state`: who has which address.
//!
//! Whenever an address may have got another identity, the address epoch is
//! raised after the rows are written, so that established connections are
//! judged again at their next packet.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::atomic::{Ordering, fence};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use imbl::OrdMap;
use imbl::ordmap::DiffItem;
use ipnet::IpNet;

use super::abi::{Addr, Address, NodeState, Prefix, PrefixKey, addr_of};
use super::map::{Bytes, MapError, TypedMap};
use super::mirror::{Mirror, Put};
use super::refused::Refused;
use super::settled::Settled;
use super::types::{address_flags, node_flags, prefix_flags};
use crate::model::{AddressEntry, AddressKind, IdentityId, PrefixEntry};

/// The one writer of `addresses`, `prefixes` and `node_state`.
pub struct AddressWriter {
    addresses: Mirror<Addr, Address>,
    prefixes: Mirror<PrefixKey, Prefix>,
    node_state: TypedMap<u32, NodeState>,
    settled: Settled<IpAddr, AddressEntry>,
    refused: Refused<IpAddr, AddressEntry>,
    refused_prefixes: BTreeMap<IpNet, String>,
    /// What `prefixes` holds exactly, where that is known.
    settled_prefixes: Option<BTreeMap<IpNet, PrefixEntry>>,
    /// Whose rows say that nothing goes there in plain.
    encrypted: Encrypted,
    /// Identities were changed in the maps, or other programs judged by them, but the epoch was not raised yet.
    is_epoch_due: bool,
}

impl AddressWriter {
    /// With `is_epoch_due` every flow gets a new verdict once the first rows are written: other programs
    /// gave those that it has.
    pub(super) fn new(
        addresses: Mirror<Addr, Address>,
        prefixes: Mirror<PrefixKey, Prefix>,
        node_state: TypedMap<u32, NodeState>,
        is_epoch_due: bool,
    ) -> Result<Self> {
        let writer = Self {
            addresses,
            prefixes,
            node_state,
            settled: Settled::Unknown,
            refused: Refused::default(),
            refused_prefixes: BTreeMap::new(),
            settled_prefixes: None,
            encrypted: Encrypted::default(),
            is_epoch_due,
        };
        if writer.node_state.get(&0)?.unwrap_or_default().address_epoch == 0 {
            // The map is new but `connections` may be older: no epoch of theirs may come again.
            let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |time| time.as_secs());
            let address_epoch = u32::try_from(seconds).unwrap_or(1);
            writer.node_state.insert(&0, &NodeState { address_epoch, ..NodeState::default() })?;
        }
        Ok(writer)
    }

    /// The node-local identities in the maps.
    pub(super) fn local_identities(&self) -> impl Iterator<Item = IdentityId> {
        let addresses = self.addresses.rows().values().map(|row| row.identity);
        let prefixes = self.prefixes.rows().values().map(|row| row.identity);
        addresses.chain(prefixes).map(IdentityId).filter(|id| id.is_local())
    }

    /// Writes rows that differ; deletes none, unless a map is full: then the addresses that are not desired
    /// go first. What still does not fit is left alone until `retry_refused`.
    pub fn write(
        &mut self,
        addresses: &OrdMap<IpAddr, AddressEntry>,
        prefixes: &BTreeMap<IpNet, PrefixEntry>,
    ) -> Result<()> {
        let written = self.write_addresses(addresses).and_then(|()| self.write_prefixes(prefixes));
        // Also after an error: what was written before it counts.
        self.raise_epoch_if_due().and(written)
    }

    /// From now on nothing goes to these nodes and their pods in plain; the next `write` says so in the rows.
    pub fn encrypt(&mut self, encrypted: &Encrypted) {
        if self.encrypted != *encrypted {
            self.encrypted = encrypted.clone();
            self.settled = Settled::Unknown;
            self.settled_prefixes = None;
        }
    }

    /// Deletes the rows that are not desired. Only after every source is synced.
    pub fn prune(
        &mut self,
        addresses: &OrdMap<IpAddr, AddressEntry>,
        prefixes: &BTreeMap<IpNet, PrefixEntry>,
    ) -> Result<()> {
        let pruned = self.prune_addresses(addresses).and_then(|()| self.prune_prefixes(prefixes));
        self.raise_epoch_if_due().and(pruned)
    }

    /// Reads the maps again: by map, how many rows somebody else changed. The next write and prune
    /// mend them.
    pub fn compare(&mut self) -> Result<[(&'static str, u64); 2]> {
        let changed =
            [("map addresses", self.addresses.refresh()?), ("map prefixes", self.prefixes.refresh()?)];
        if changed.iter().any(|(_, rows)| *rows > 0) {
            self.settled = Settled::Unknown;
            self.settled_prefixes = None;
            self.is_epoch_due = true;
        }
        Ok(changed)
    }

    /// Tries again, with the next write, what could not be written.
    pub fn retry_refused(&mut self) {
        self.refused.clear();
        if !self.refused_prefixes.is_empty() {
            self.refused_prefixes.clear();
            self.settled_prefixes = None;
        }
    }

    /// The addresses that could not be written, and why.
    pub fn refused(&self) -> impl Iterator<Item = (&IpAddr, &str)> {
        self.refused.causes()
    }

    /// The prefixes that could not be written, and why.
    pub fn refused_prefixes(&self) -> &BTreeMap<IpNet, String> {
        &self.refused_prefixes
    }

    fn write_addresses(&mut self, addresses: &OrdMap<IpAddr, AddressEntry>) -> Result<()> {
        for address in self.refused.forget_undesired(addresses) {
            self.is_epoch_due |= self.addresses.take(addr_of(address))?.is_some();
        }
        let refused_before = self.refused.len();
        let effective = self.refused.without(addresses);
        let mut is_pruned = false;
        let from = self.settled.before_write();
        let before = from.clone().unwrap_or_default();
        let changed: Vec<_> = before
            .diff(&effective)
            .filter_map(|item| match item {
                DiffItem::Add(address, entry) | DiffItem::Update { new: (address, entry), .. } => {
                    Some((address, entry))
                }
                DiffItem::Remove(..) => None,
            })
            .collect();
        // All at once. If one is refused, each by itself: what has been written then costs nothing.
        let is_written = self.write_many(&changed).is_ok();
        for (address, entry) in changed.into_iter().filter(|_| !is_written) {
            let mut written = self.write_address(*address, entry);
            if matches!(written, Err(MapError::Full { .. })) && !is_pruned {
                is_pruned = true;
                self.delete_addresses(self.stale_in_map(addresses))?;
                written = self.write_address(*address, entry);
            }
            if matches!(written, Err(MapError::Full { .. })) && entry.node.is_none() {
                // Addresses of this node's own come first: another node's makes room.
                written = self.make_room(addresses).and_then(|()| self.write_address(*address, entry));
            }
            if let Err(error) = written {
                self.refused.insert(*address, entry.clone(), format!("{:#}", anyhow::Error::from(error)));
            }
        }
        if self.refused.len() == refused_before {
            self.settled.written(from, &effective);
        }
        Ok(())
    }

    fn write_many(&mut self, changed: &[(&IpAddr, &AddressEntry)]) -> Result<(), MapError> {
        let Self { addresses, encrypted, is_epoch_due, .. } = self;
        let row = |(address, entry): &(&IpAddr, &AddressEntry)| {
            let row = address_row(entry, encrypted);
            (addr_of(**address), row)
        };
        let rows: Vec<(Addr, Address)> = changed.iter().map(row).collect();
        let before: Vec<_> =
            rows.iter().map(|(key, _)| addresses.rows().get(&Bytes(*key)).copied()).collect();
        let is_renamed =
            rows.iter().zip(before).any(|((_, row), old)| old.is_none_or(|old| old.identity != row.identity));
        *is_epoch_due |= is_renamed;
        addresses.put_all(rows, |_| {})
    }

    fn write_address(&mut self, address: IpAddr, entry: &AddressEntry) -> Result<(), MapError> {
        let row = address_row(entry, &self.encrypted);
        match self.addresses.put(addr_of(address), row)? {
            Put::Unchanged => {}
            Put::Replaced(old) => self.is_epoch_due |= old.identity != row.identity,
            Put::Inserted => self.is_epoch_due = true,
        }
        Ok(())
    }

    /// Takes one address of another node out of the full map.
    fn make_room(&mut self, addresses: &OrdMap<IpAddr, AddressEntry>) -> Result<(), MapError> {
        let is_remote = |row: &Address| row.flags & address_flags::ADDRESS_LOCAL.0 as u16 == 0;
        let victim = self.addresses.rows().iter().rev().find(|(_, row)| is_remote(row));
        let Some(key) = victim.map(|(key, _)| key.0) else { return Ok(()) };
        self.addresses.take(key)?;
        self.is_epoch_due = true;
        let address = super::abi::ip_of(key);
        if let Some(entry) = addresses.get(&address) {
            self.refused.insert(
                address,
                entry.clone(),
                "this node's own addresses took its place".to_owned(),
            );
        }
        Ok(())
    }

    fn write_prefixes(&mut self, prefixes: &BTreeMap<IpNet, PrefixEntry>) -> Result<()> {
        if self.settled_prefixes.as_ref() == Some(prefixes) {
            return Ok(());
        }
        self.settled_prefixes = None;
        self.refused_prefixes.clear();
        for (&prefix, entry) in prefixes {
            match self.prefixes.put(prefix_key(prefix), prefix_row(*entry, &self.encrypted)) {
                Ok(Put::Unchanged) => {}
                Ok(Put::Inserted | Put::Replaced(_)) => self.is_epoch_due = true,
                Err(error) => {
                    let cause = format!("{:#}", anyhow::Error::from(error));
                    self.refused_prefixes.insert(prefix, cause);
                }
            }
        }
        Ok(())
    }

    fn prune_addresses(&mut self, addresses: &OrdMap<IpAddr, AddressEntry>) -> Result<()> {
        let effective = self.refused.without(addresses);
        let stale: Vec<Addr> = match self.settled.before_prune(&effective) {
            Some(from) => from
                .diff(&effective)
                .filter_map(|item| match item {
                    DiffItem::Remove(address, _) if !addresses.contains_key(address) => {
                        Some(addr_of(*address))
                    }
                    DiffItem::Remove(..) | DiffItem::Add(..) | DiffItem::Update { .. } => None,
                })
                .collect(),
            None => self.stale_in_map(addresses),
        };
        self.delete_addresses(stale)?;
        self.settled.pruned(&effective);
        Ok(())
    }

    fn stale_in_map(&self, addresses: &OrdMap<IpAddr, AddressEntry>) -> Vec<Addr> {
        let rows = self.addresses.rows().keys().map(|key| key.0);
        rows.filter(|addr| !addresses.contains_key(&super::abi::ip_of(*addr))).collect()
    }

    fn delete_addresses(&mut self, stale: Vec<Addr>) -> Result<()> {
        // Also if not all of them could be deleted.
        self.is_epoch_due |= !stale.is_empty();
        self.addresses.take_all(stale)?;
        Ok(())
    }

    fn prune_prefixes(&mut self, prefixes: &BTreeMap<IpNet, PrefixEntry>) -> Result<()> {
        if self.settled_prefixes.as_ref() == Some(prefixes) {
            return Ok(());
        }
        let desired: BTreeSet<_> = prefixes.keys().map(|prefix| Bytes(prefix_key(*prefix))).collect();
        let rows = self.prefixes.rows().keys();
        let stale: Vec<PrefixKey> = rows.filter(|key| !desired.contains(key)).map(|key| key.0).collect();
        for key in stale {
            self.is_epoch_due |= self.prefixes.take(key)?.is_some();
        }
        // With refused prefixes, too: they are tried again when it is time.
        let missing = self.refused_prefixes.len();
        let is_complete = desired.len() == self.prefixes.rows().len() + missing;
        self.settled_prefixes = is_complete.then(|| prefixes.clone());
        Ok(())
    }

    fn raise_epoch_if_due(&mut self) -> Result<()> {
        if self.is_epoch_due {
            let mut state = self.node_state.get(&0)?.context("reading the only row of node_state")?;
            state.address_epoch = state.address_epoch.wrapping_add(1);
            // The rows are seen before the epoch on every processor.
            fence(Ordering::SeqCst);
            self.node_state.insert(&0, &state)?;
            self.is_epoch_due = false;
        }
        Ok(())
    }
}

/// Writes the flags of `node_state`, whose epoch is `AddressWriter`'s. Both belong to one thread.
pub struct StackWriter(TypedMap<u32, NodeState>);

impl StackWriter {
    pub(super) fn new(node_state: TypedMap<u32, NodeState>) -> Self {
        Self(node_state)
    }

    /// Whether packets may go past the node's stack; true if that is news.
    pub fn write_past_stack(&mut self, may: bool) -> Result<bool> {
        self.write(node_flags::NODE_PAST_STACK.0, may)
    }

    /// Whether the second device encrypts; true if that is news.
    pub fn write_encrypt_second(&mut self, is_second: bool) -> Result<bool> {
        self.write(node_flags::NODE_ENCRYPT_SECOND.0, is_second)
    }

    fn write(&mut self, flag: u32, is_set: bool) -> Result<bool> {
        let mut state = self.0.get(&0)?.context("reading the only row of node_state")?;
        let flags = if is_set { state.flags | flag } else { state.flags & !flag };
        let is_news = state.flags != flags;
        if is_news {
            state.flags = flags;
            self.0.insert(&0, &state)?;
        }
        Ok(is_news)
    }
}

/// Which nodes are never spoken to in plain, by their addresses between the nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Encrypted {
    /// None of them: encryption is off.
    #[default]
    Nobody,
    /// These.
    Nodes(BTreeSet<IpAddr>),
    /// Every other node, also one that has no key yet.
    Everybody,
}

impl Encrypted {
    /// Whether a node is; `None` is this node.
    pub fn has(&self, node: Option<IpAddr>) -> bool {
        match self {
            Self::Nobody => false,
            Self::Nodes(nodes) => node.is_some_and(|node| nodes.contains(&node)),
            Self::Everybody => node.is_some(),
        }
    }
}

fn address_row(entry: &AddressEntry, encrypted: &Encrypted) -> Address {
    let kind = match entry.kind {
        AddressKind::Pod => address_flags::ADDRESS_POD,
        AddressKind::Node => address_flags::ADDRESS_NODE,
        AddressKind::NodeInternal => address_flags::ADDRESS_INTERNAL,
    };
    let local = if entry.node.is_none() { address_flags::ADDRESS_LOCAL.0 } else { 0 };
    let encrypt = if encrypted.has(entry.node) { address_flags::ADDRESS_ENCRYPT.0 } else { 0 };
    Address {
        node: entry.node.map(addr_of).unwrap_or_default(),
        identity: entry.identity.0,
        endpoint_id: entry.endpoint.map_or(0, |id| id.0),
        flags: (kind.0 | local | encrypt) as u16,
    }
}

/// IPv4 prefixes lie below ::ffff:0:0/96.
fn prefix_key(prefix: IpNet) -> PrefixKey {
    let offset = match prefix {
        IpNet::V4(_) => 96,
        IpNet::V6(_) => 0,
    };
    PrefixKey { prefix_length: offset + u32::from(prefix.prefix_len()), addr: addr_of(prefix.network()) }
}

fn prefix_row(entry: PrefixEntry, encrypted: &Encrypted) -> Prefix {
    let flag = |is_set: bool, flag: prefix_flags| if is_set { flag.0 } else { 0 };
    Prefix {
        node: entry.node.map(addr_of).unwrap_or_default(),
        identity: entry.identity.0,
        flags: flag(entry.is_pod_cidr, prefix_flags::PREFIX_POD_CIDR)
            | flag(entry.is_guarded, prefix_flags::PREFIX_GUARDED)
            | flag(entry.is_pod_cidr && encrypted.has(entry.node), prefix_flags::PREFIX_ENCRYPT),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::abi::Plain;
    use crate::model::EndpointId;

    #[test]
    fn a_local_pod_has_no_node() {
        let entry = AddressEntry {
            identity: IdentityId(300),
            node: None,
            endpoint: Some(EndpointId(7)),
            kind: AddressKind::Pod,
        };
        let row = Address { identity: 300, endpoint_id: 7, flags: 1 | 4, ..Address::default() };
        assert_eq!(address_row(&entry, &Encrypted::Everybody).as_bytes(), row.as_bytes());
    }

    #[test]
    fn a_remote_gateway_is_internal_to_its_node() {
        let node = "192.0.2.1".parse().unwrap();
        let entry = AddressEntry {
            identity: IdentityId::REMOTE_NODE,
            node: Some(node),
            endpoint: None,
            kind: AddressKind::NodeInternal,
        };
        let row = Address { node: addr_of(node), identity: 6, endpoint_id: 0, flags: 8 };
        assert_eq!(address_row(&entry, &Encrypted::Nobody).as_bytes(), row.as_bytes());
        let row = Address { flags: 8 | 16, ..row };
        for encrypted in [Encrypted::Everybody, Encrypted::Nodes(BTreeSet::from([node]))] {
            assert_eq!(address_row(&entry, &encrypted).as_bytes(), row.as_bytes());
        }
    }

    #[test]
    fn ipv4_prefixes_lie_below_the_mapped_prefix() {
        let key = prefix_key("10.1.2.3/8".parse().unwrap());
        let mut bytes = 104_u32.to_ne_bytes().to_vec();
        bytes.extend([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 0]);
        assert_eq!(key.as_bytes(), bytes);
        assert_eq!(prefix_key("::/0".parse().unwrap()).prefix_length, 0);
        assert_eq!(prefix_key("0.0.0.0/0".parse().unwrap()).prefix_length, 96);
    }
}
