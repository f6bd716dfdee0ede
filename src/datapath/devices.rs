//! Writes `devices` and `this_node`: what leads out of the node, and the node's own addresses.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::Result;

use super::abi::{OwnAddresses, addr_of};
use super::map::TypedMap;
use super::mirror::{Mirror, Put};
use crate::model::AddressPair;

/// The one writer of `devices` and `this_node`.
pub struct DeviceWriter {
    devices: Mirror<u32, OwnAddresses>,
    this_node: TypedMap<u32, OwnAddresses>,
}

impl DeviceWriter {
    pub(super) fn new(devices: Mirror<u32, OwnAddresses>, this_node: TypedMap<u32, OwnAddresses>) -> Self {
        Self { devices, this_node }
    }

    /// Writes the addresses by which the other nodes know this one: the sources of its tunnel packets.
    pub fn write_node(&mut self, addresses: &AddressPair) -> Result<()> {
        Ok(self.this_node.insert(&0, &row_of(addresses))?)
    }

    /// Writes one device; true if the row was another one, or none.
    pub fn write(&mut self, ifindex: u32, addresses: &AddressPair) -> Result<bool> {
        Ok(!matches!(self.devices.put(ifindex, row_of(addresses))?, Put::Unchanged))
    }

    /// Deletes the devices that are none of these.
    pub fn keep<T>(&mut self, devices: &BTreeMap<u32, T>) -> Result<()> {
        let gone: Vec<u32> =
            self.devices.rows().keys().map(|key| key.0).filter(|key| !devices.contains_key(key)).collect();
        for ifindex in gone {
            self.devices.take(ifindex)?;
        }
        Ok(())
    }
}

fn row_of(addresses: &AddressPair) -> OwnAddresses {
    let row = |address: Option<IpAddr>| address.map(addr_of).unwrap_or_default();
    OwnAddresses { ipv4: row(addresses.ipv4.map(IpAddr::V4)), ipv6: row(addresses.ipv6.map(IpAddr::V6)) }
}
