//! Services and EndpointSlices to frontends: which backends a cluster IP leads to.
//!
//! The rules are kube-proxy's: ready backends; where there is none, those that still
//! serve while they end; a backend's family is its frontend's. Every cluster IP also has
//! a wildcard row, so that a port that no Service has is refused and not routed away.
//!
//! [`frontends`] says what there is; [`Frontends`] says the same again and again at the cost
//! of what changed.

mod host_ports;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

pub use host_ports::host_ports;
use imbl::ordmap::DiffItem;
use serde::Serialize;

use crate::model::{
    Backend, EndpointSlice, Frontend, FrontendKey, FrontendKind, ObjectKey, Scope, Service, ServicePort,
    SlicePort,
};
use crate::tables::Snapshot;

/// Every frontend, and what could not be had twice.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Output {
    /// Rows of `services`.
    pub frontends: Snapshot<FrontendKey, Frontend>,
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
        for address in usable_addresses(service) {
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

/// Remembers its last answer, and works out differences.
#[derive(Default)]
pub struct Frontends {
    output: Output,
    services: Snapshot<ObjectKey, Arc<Service>>,
    slices: Snapshot<ObjectKey, Arc<EndpointSlice>>,
}

impl Frontends {
    /// What [`frontends`] says for these.
    pub fn update(
        &mut self,
        services: &Snapshot<ObjectKey, Arc<Service>>,
        slices: &Snapshot<ObjectKey, Arc<EndpointSlice>>,
    ) -> &Output {
        match self.difference(services, slices) {
            Some(frontends) => self.output.frontends = frontends,
            None => self.output = frontends(services, slices),
        }
        self.services = services.clone();
        self.slices = slices.clone();
        &self.output
    }

    /// The frontends with those of the changed Services made anew; `None` where Services have or
    /// get an address in common: then it has to be found out again whose it is.
    fn difference(
        &self,
        services: &Snapshot<ObjectKey, Arc<Service>>,
        slices: &Snapshot<ObjectKey, Arc<EndpointSlice>>,
    ) -> Option<Snapshot<FrontendKey, Frontend>> {
        if !self.output.conflicts.is_empty() {
            return None;
        }
        let changed = self.changed(services, slices);
        let mut frontends = self.output.frontends.clone();
        for service in changed.iter().filter_map(|key| self.services.get(key)) {
            for address in usable_addresses(service) {
                let keys = keys_of(service, address);
                keys.for_each(|key| drop(frontends.remove(&key)));
            }
        }
        for key in &changed {
            let Some(service) = services.get(key) else { continue };
            let first = ObjectKey::new(key.namespace.clone(), "");
            // A slice is in the namespace of its Service.
            let in_namespace =
                slices.range(first..).take_while(|(slice, _)| slice.namespace == key.namespace);
            let of_service = in_namespace.filter(|(_, slice)| slice.service == *key);
            let slices: Vec<&EndpointSlice> = of_service.map(|(_, slice)| slice.as_ref()).collect();
            let name = Arc::new(key.clone());
            for address in usable_addresses(service) {
                for (key, frontend) in frontends_of(&name, service, address, &slices) {
                    if frontends.insert(key, frontend).is_some() {
                        return None;
                    }
                }
            }
        }
        Some(frontends)
    }

    /// The Services that are others now, or whose slices are.
    fn changed(
        &self,
        services: &Snapshot<ObjectKey, Arc<Service>>,
        slices: &Snapshot<ObjectKey, Arc<EndpointSlice>>,
    ) -> BTreeSet<ObjectKey> {
        let mut changed = BTreeSet::new();
        for item in self.services.diff(services) {
            let (DiffItem::Add(key, _) | DiffItem::Update { new: (key, _), .. } | DiffItem::Remove(key, _)) =
                item;
            changed.insert(key.clone());
        }
        for item in self.slices.diff(slices) {
            let (old, new) = match item {
                DiffItem::Add(_, new) => (None, Some(new)),
                DiffItem::Update { old: (_, old), new: (_, new) } => (Some(old), Some(new)),
                DiffItem::Remove(_, old) => (Some(old), None),
            };
            changed.extend(old.into_iter().chain(new).map(|slice| slice.service.clone()));
        }
        changed
    }
}

/// The cluster IPs that a Service may have, each once.
fn usable_addresses(service: &Service) -> BTreeSet<IpAddr> {
    service.addresses.iter().copied().filter(is_usable).collect()
}

/// The rows of one address of a Service.
fn keys_of(service: &Service, address: IpAddr) -> impl Iterator<Item = FrontendKey> {
    let wildcard = FrontendKey::rest_of(address);
    let ports = service.ports.iter().filter(|port| port.port != 0);
    let of_ports =
        ports.map(move |port| FrontendKey::new(address, port.port, port.protocol, Scope::Internal));
    std::iter::once(wildcard).chain(of_ports)
}

/// The frontends of one address of a Service.
fn frontends_of(
    name: &Arc<ObjectKey>,
    service: &Service,
    address: IpAddr,
    slices: &[&EndpointSlice],
) -> BTreeMap<FrontendKey, Frontend> {
    let wildcard = FrontendKey::rest_of(address);
    let refused = Frontend::refusing(name.clone(), FrontendKind::ClusterIp);
    let mut frontends = BTreeMap::from([(wildcard, refused)]);
    for port in service.ports.iter().filter(|port| port.port != 0) {
        let key = FrontendKey::new(address, port.port, port.protocol, Scope::Internal);
        frontends.entry(key).or_insert_with(|| Frontend {
            backends: backends_of(port, address.is_ipv4(), slices),
            ..Frontend::refusing(name.clone(), FrontendKind::ClusterIp)
        });
    }
    frontends
}

/// The backends of a port, sorted.
fn backends_of(port: &ServicePort, is_ipv4: bool, slices: &[&EndpointSlice]) -> Arc<[Backend]> {
    let mut ready = BTreeSet::new();
    let mut ending = BTreeSet::new();
    for slice in slices {
        let same = |of_slice: &&SlicePort| of_slice.name == port.name && of_slice.protocol == port.protocol;
        for target in slice.ports.iter().filter(same).filter(|target| target.port != 0) {
            for backend in &slice.backends {
                if !is_usable(&backend.address) || backend.address.is_ipv4() != is_ipv4 {
                    continue;
                }
                let backend_address = SocketAddr::new(backend.address, target.port);
                if backend.ready {
                    ready.insert(backend_address);
                } else if backend.serving && backend.terminating {
                    ending.insert(backend_address);
                }
            }
        }
    }
    let chosen = if ready.is_empty() { ending } else { ready };
    chosen.into_iter().map(Backend::at).collect()
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
