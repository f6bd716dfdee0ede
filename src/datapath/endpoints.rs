//! Writes `endpoints`: the pods of this node and the policies in force.
//!
//! A row is stored with its old epoch first and with the next one after that: a
//! program reads epoch and policy as one word, so it never keeps the verdict of
//! an old policy under the new epoch. Epochs of an id only rise, also while
//! nobody has it, so that no cached verdict survives its pod.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{Ordering, fence};

use anyhow::Result;

use super::abi::{Endpoint, Plain, addr_of};
use super::map::Bytes;
use super::mirror::{Fill, Mirror};
use super::types::{endpoint_flags, policy_bits};
use crate::model::{EndpointEntry, EndpointId, PolicyId};

/// The one writer of `endpoints`.
pub struct EndpointWriter {
    endpoints: Mirror<u32, Endpoint>,
    /// Rows in use; the map itself is an array and always full.
    used: Fill,
}

impl EndpointWriter {
    pub(super) fn new(endpoints: Mirror<u32, Endpoint>, used: Fill) -> Self {
        let writer = Self { endpoints, used };
        writer.count();
        writer
    }

    /// Endpoints in the map.
    pub fn ids(&self) -> impl Iterator<Item = EndpointId> {
        let rows = self.endpoints.rows().iter().filter(|(_, row)| is_used(row));
        rows.filter_map(|(id, _)| u16::try_from(id.0).ok().map(EndpointId))
    }

    /// The policies that endpoints point at.
    pub fn policies_in_force(&self) -> BTreeSet<PolicyId> {
        let rows = self.endpoints.rows().values().filter(|row| is_used(row));
        rows.map(|row| PolicyId(row.policy & policy_bits::POLICY_ID_MASK.0)).collect()
    }

    /// Reads the map again: how many rows somebody else changed. The next write and prune mend them.
    pub fn compare(&mut self) -> Result<[(&'static str, u64); 1]> {
        Ok([("map endpoints", self.endpoints.refresh()?)])
    }

    /// Writes rows that differ; removes none.
    pub fn write(&mut self, endpoints: &BTreeMap<EndpointId, EndpointEntry>) -> Result<()> {
        for (id, entry) in endpoints {
            self.replace(*id, row(entry))?;
        }
        self.count();
        Ok(())
    }

    /// Empties the rows that are not desired. Only after every source is synced.
    pub fn prune(&mut self, endpoints: &BTreeMap<EndpointId, EndpointEntry>) -> Result<()> {
        let stale: Vec<EndpointId> = self.ids().filter(|id| !endpoints.contains_key(id)).collect();
        for id in stale {
            self.replace(id, Endpoint::default())?;
        }
        self.count();
        Ok(())
    }

    fn count(&self) {
        self.used.store(self.ids().count(), Ordering::Relaxed);
    }

    fn replace(&mut self, id: EndpointId, desired: Endpoint) -> Result<()> {
        let id = u32::from(id.0);
        let old = self.endpoints.rows().get(&Bytes(id)).copied().unwrap_or_default();
        for row in steps(&old, &desired) {
            self.endpoints.put(id, row)?;
            // The next row is seen after this one on every processor.
            fence(Ordering::SeqCst);
        }
        Ok(())
    }
}

fn is_used(row: &Endpoint) -> bool {
    Endpoint { epoch: 0, ..*row }.as_bytes() != Endpoint::default().as_bytes()
}

/// The rows to write, in order, to get from one to the other; the epoch of `desired` is not used.
fn steps(old: &Endpoint, desired: &Endpoint) -> Vec<Endpoint> {
    let first = Endpoint { epoch: old.epoch, ..*desired };
    if first.as_bytes() == old.as_bytes() {
        return Vec::new();
    }
    vec![first, Endpoint { epoch: old.epoch.wrapping_add(1), ..*desired }]
}

fn row(entry: &EndpointEntry) -> Endpoint {
    let mut policy = entry.policy.0 & policy_bits::POLICY_ID_MASK.0;
    if entry.enforces_ingress {
        policy |= policy_bits::POLICY_ENFORCE_INGRESS.0;
    }
    if entry.enforces_egress {
        policy |= policy_bits::POLICY_ENFORCE_EGRESS.0;
    }
    if entry.refuses_strangers {
        policy |= policy_bits::POLICY_REFUSE_STRANGERS.0;
    }
    if entry.rejects {
        policy |= policy_bits::POLICY_REJECT.0;
    }
    let gateway = if entry.has_gateway { endpoint_flags::ENDPOINT_EGRESS.0 } else { 0 };
    let limited = if entry.shaping.is_limited { endpoint_flags::ENDPOINT_LIMITED.0 } else { 0 };
    let priority = u32::from(entry.shaping.priority) * endpoint_flags::ENDPOINT_PRIORITY.0;
    let flags = endpoint_flags(endpoint_flags::ENDPOINT_READY.0 | gateway | limited | priority);
    Endpoint {
        epoch: 0,
        policy,
        ipv4: entry.endpoint.ipv4.map(|ip| addr_of(ip.into())).unwrap_or_default(),
        ipv6: entry.endpoint.ipv6.map(|ip| addr_of(ip.into())).unwrap_or_default(),
        ifindex: entry.endpoint.host_ifindex,
        identity: entry.identity.0,
        mac: entry.endpoint.mac.0,
        flags: flags.0 as u16,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::model::{Endpoint as ModelEndpoint, IdentityId, MacAddress, ObjectKey};

    fn entry() -> EndpointEntry {
        EndpointEntry {
            endpoint: Arc::new(ModelEndpoint {
                id: EndpointId(3),
                container_id: "c".to_owned(),
                interface: "eth0".to_owned(),
                netns: "/run/netns/c".into(),
                pod: ObjectKey::new("shop", "frontend"),
                pod_uid: None,
                ipv4: Some([10, 0, 0, 3].into()),
                ipv6: None,
                host_interface: "weir0".to_owned(),
                host_ifindex: 12,
                mac: MacAddress([2, 0, 0, 0, 0, 3]),
                port_mappings: Vec::new(),
            }),
            identity: IdentityId(256),
            policy: PolicyId(5),
            enforces_ingress: true,
            enforces_egress: false,
            refuses_strangers: false,
            rejects: false,
            has_gateway: false,
            shaping: Default::default(),
        }
    }

    fn expected() -> Endpoint {
        Endpoint {
            epoch: 0,
            policy: 0x8000_0005,
            ipv4: addr_of([10, 0, 0, 3].into()),
            ipv6: Default::default(),
            ifindex: 12,
            identity: 256,
            mac: [2, 0, 0, 0, 0, 3],
            flags: 1,
        }
    }

    fn bytes(rows: &[Endpoint]) -> Vec<Vec<u8>> {
        rows.iter().map(|row| row.as_bytes().to_vec()).collect()
    }

    #[test]
    fn a_row_has_what_the_entry_says() {
        assert_eq!(bytes(&[row(&entry())]), bytes(&[expected()]));
    }

    #[test]
    fn the_epoch_is_raised_after_everything_else() {
        let old = Endpoint { epoch: 7, policy: 4, ..expected() };
        let written = steps(&old, &expected());
        assert_eq!(
            bytes(&written),
            bytes(&[Endpoint { epoch: 7, ..expected() }, Endpoint { epoch: 8, ..expected() }])
        );
        assert!(steps(&written[1], &expected()).is_empty());
    }

    #[test]
    fn bypass_12_a_reused_id_never_has_an_old_epoch() {
        let removed = steps(&Endpoint { epoch: 7, ..expected() }, &Endpoint::default());
        assert_eq!(bytes(&removed), bytes(&[7, 8].map(|epoch| Endpoint { epoch, ..Endpoint::default() })));
        let reused = steps(&removed[1], &expected());
        assert_eq!(reused.last().map(|row| row.epoch), Some(9));
    }
}
