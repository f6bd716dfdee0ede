//! Whom pods speak to: the far ends of running connections.

use std::collections::BTreeSet;
use std::net::IpAddr;

use anyhow::Result;

use super::Datapath;
use super::abi::{Connection, ConnectionKey, ip_of};
use super::types::connection_flags;
use crate::model::EndpointId;

impl Datapath {
    /// Those of `wanted`, a pod of this node and an address, between which a connection runs.
    pub fn spoken_to(
        &self,
        wanted: &BTreeSet<(EndpointId, IpAddr)>,
    ) -> Result<BTreeSet<(EndpointId, IpAddr)>> {
        let mut found = BTreeSet::new();
        let has = |row: &Connection, flag: connection_flags| u32::from(row.flags) & flag.0 != 0;
        self.typed::<ConnectionKey, Connection>("connections")?.for_each(|key, row| {
            if has(&row, connection_flags::CONNECTION_ENDED) {
                return;
            }
            // Index 0 is who began; in the key the lower address stands first.
            let first = usize::from(has(&row, connection_flags::CONNECTION_INITIATOR_HIGH));
            for (side, endpoint) in row.endpoint.into_iter().enumerate() {
                let pair = (EndpointId(endpoint), ip_of(key.addr[first ^ side ^ 1]));
                if endpoint != 0 && wanted.contains(&pair) {
                    found.insert(pair);
                }
            }
        })?;
        Ok(found)
    }
}
