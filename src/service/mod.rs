//! Services and EndpointSlices to frontends: which backends a cluster IP leads to.
//!
//! The rules are kube-proxy's: ready backends; where there is none, those that still
//! serve while they end; a backend's family is its frontend's. Every cluster IP also has
//! a wildcard row, so that a port that no Service has is refused and not routed away.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use serde::Serialize;

use crate::model::{EndpointSlice, Frontend, FrontendKey, ObjectKey, Service, ServicePort};
use crate::tables::Snapshot;

/// Every frontend, and what could not be had twice.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Output {
    /// Rows of `services`.
    pub frontends: BTreeMap<FrontendKey, Frontend>,
    /// Services that name an address of another, in order of their keys.
    pub conflicts: Vec<Conflict>,
}

/// A Service whose address is another's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Conflict {
    /// The Service that does not get the address.
    pub service: ObjectKey,
    /// The address.
    pub address: IpAddr,
    /// The Service that has it: the first by key.
    pub owner: ObjectKey,
}

/// The frontends of all Services. Headless ones have no address and so none.
pub fn frontends(
    services: &Snapshot<ObjectKey, Arc<Service>>,
    slices: &Snapshot<ObjectKey, Arc<EndpointSlice>>,
) -> Output {
    let mut slices_of: HashMap<&ObjectKey, Vec<&EndpointSlice>> = HashMap::new();
    for slice in slices.values() {
        slices_of.entry(&slice.service).or_default().push(slice);
    }
    let mut output = Output::default();
    let mut owners: HashMap<IpAddr, &ObjectKey> = HashMap::new();
    for (key, service) in services {
        let slices = slices_of.get(key).map_or(&[][..], Vec::as_slice);
        let name = Arc::new(key.clone());
        let addresses: BTreeSet<IpAddr> = service.addresses.iter().copied().collect();
        for address in addresses.into_iter().filter(is_usable) {
            let owner = *owners.entry(address).or_insert(key);
            if owner == key {
                output.frontends.extend(frontends_of(&name, service, address, slices));
            } else {
                let owner = owner.clone();
                output.conflicts.push(Conflict { service: key.clone(), address, owner });
            }
        }
    }
    output
}

/// The frontends of one address of a Service.
fn frontends_of(
    name: &Arc<ObjectKey>,
    service: &Service,
    address: IpAddr,
    slices: &[&EndpointSlice],
) -> BTreeMap<FrontendKey, Frontend> {
    let wildcard = FrontendKey { address, port: 0, protocol: None };
    let refused = Frontend { service: name.clone(), backends: Vec::new() };
    let mut frontends = BTreeMap::from([(wildcard, refused)]);
    for port in service.ports.iter().filter(|port| port.port != 0) {
        let key = FrontendKey { address, port: port.port, protocol: Some(port.protocol) };
        frontends.entry(key).or_insert_with(|| Frontend {
            service: name.clone(),
            backends: backends_of(port, address.is_ipv4(), slices),
        });
    }
    frontends
}

/// The backends of a port, sorted.
fn backends_of(port: &ServicePort, is_ipv4: bool, slices: &[&EndpointSlice]) -> Vec<SocketAddr> {
    let mut ready = BTreeSet::new();
    let mut ending = BTreeSet::new();
    for slice in slices {
        let same = |of_slice: &&ServicePort| of_slice.name == port.name && of_slice.protocol == port.protocol;
        for target in slice.ports.iter().filter(same).filter(|target| target.port != 0) {
            for backend in &slice.backends {
                // The API says that consumers use the first address only.
                let Some(address) = backend.addresses.first().filter(|address| is_usable(address)) else {
                    continue;
                };
                if address.is_ipv4() != is_ipv4 {
                    continue;
                }
                let backend_address = SocketAddr::new(*address, target.port);
                if backend.ready {
                    ready.insert(backend_address);
                } else if backend.serving && backend.terminating {
                    ending.insert(backend_address);
                }
            }
        }
    }
    if ready.is_empty() { ending.into_iter().collect() } else { ready.into_iter().collect() }
}

/// False for addresses that the API server refuses in Services and EndpointSlices; a
/// manifest directory has no API server, and a pod must not reach its node that way.
fn is_usable(address: &IpAddr) -> bool {
    let is_link_local = match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local() || address.to_ipv4_mapped().is_some(),
    };
    !(address.is_unspecified() || address.is_loopback() || address.is_multicast() || is_link_local)
}
