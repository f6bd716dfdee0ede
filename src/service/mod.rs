//! Services and EndpointSlices to frontends: which backends an address and port leads to, for whom.
//!
//! - `place`: where the node is and which addresses nodes have;
//! - `choice`: which backends new connections may choose, by kube-proxy's rules;
//! - `rows`: the frontends of one Service, at its own addresses, the nodes' and those from outside;
//! - `claims`: whose an address is that several Services want.
//!
//! Every cluster IP and load balancer's address also has a wildcard row, so that a port that no Service has is
//! refused and not routed away.
//! [`frontends`] says what there is; [`Frontends`] says the same again and again at the cost of what changed.

pub mod announced;
mod args;
mod choice;
mod claims;
mod host_ports;
mod place;
mod redirects;
mod rows;
#[cfg(test)]
mod tests;
mod trace;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use imbl::ordmap::DiffItem;
use serde::Serialize;

pub use args::{HealthzAddress, PortRange, ServiceArgs};
pub use choice::{Candidates, Fate, Topology};
pub use claims::{Conflict, Reason};
pub use host_ports::{host_ports, host_ports_of};
pub use place::{Defaults, Place};
pub use redirects::{Redirect, redirected_addresses, redirects};
pub use trace::{Client, Flow};

use crate::model::{EndpointSlice, Frontend, FrontendKey, FrontendKind, ObjectKey, Service};
use crate::tables::Snapshot;
use claims::Claims;
use rows::Claim;

/// All Services.
pub type Services = Snapshot<ObjectKey, Arc<Service>>;
/// All EndpointSlices.
pub type Slices = Snapshot<ObjectKey, Arc<EndpointSlice>>;

/// Every frontend, and what could not be had twice.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Output {
    /// Rows of `services`.
    pub frontends: Snapshot<FrontendKey, Frontend>,
    /// Services that name an address of another, in order of their keys.
    pub conflicts: BTreeMap<ObjectKey, BTreeSet<Conflict>>,
    /// What load balancers are told, by Service.
    pub health: BTreeMap<ObjectKey, Health>,
}

/// What load balancers are told of a Service whose traffic stays on the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Health {
    /// Where they ask.
    pub port: u16,
    /// Ready backends of this node.
    pub local_endpoints: usize,
}

/// The frontends of all Services at `place`. Headless ones have no address and so none.
pub fn frontends(services: &Services, slices: &Slices, place: &Place) -> Output {
    let mut all = Frontends::default();
    all.update(services, slices, place);
    all.output
}

/// Remembers its last answer, and works out differences.
#[derive(Default)]
pub struct Frontends {
    output: Output,
    services: Services,
    slices: Slices,
    place: Place,
    claims: Claims,
    /// What each Service has.
    rows: HashMap<Arc<ObjectKey>, Box<[FrontendKey]>>,
    /// Services with frontends at addresses of nodes or of the network.
    exposed: BTreeSet<Arc<ObjectKey>>,
}

impl Frontends {
    /// What [`frontends`] says for these.
    pub fn update(&mut self, services: &Services, slices: &Slices, place: &Place) -> &Output {
        let mut affected = self.changed(services, slices);
        let touched = self.claim(&affected, services);
        let mut place = place.clone();
        // A Service keeps its address, also where a device of the node has it.
        place.own.retain(|address| self.claims.owner_of(*address).is_none());
        for claim in &touched {
            affected.extend(self.claims.rivals(claim).cloned());
            affected.extend(self.claims.rivals_at_nodes(claim, &place).cloned());
        }
        self.affect_by_place(&place, services, &mut affected);
        let slices_of = slices_of(&affected, slices);
        for name in &affected {
            for key in self.rows.remove(name).unwrap_or_default() {
                self.output.frontends.remove(&key);
            }
            self.output.conflicts.remove(&**name);
            self.output.health.remove(&**name);
        }
        for name in &affected {
            if let Some(service) = services.get(&**name) {
                self.make(name, service, slices_of.get(&**name).map_or(&[], Vec::as_slice), &place);
            }
        }
        self.services = services.clone();
        self.slices = slices.clone();
        self.place = place;
        &self.output
    }

    /// Every Service that is affected where the node or what is around it has changed.
    fn affect_by_place(&self, place: &Place, services: &Services, affected: &mut BTreeSet<Arc<ObjectKey>>) {
        let old = &self.place;
        let names = old.redirects.keys().chain(place.redirects.keys());
        let redirected = names.filter(|name| old.redirects.get(*name) != place.redirects.get(*name));
        affected.extend(redirected.cloned().map(Arc::new));
        if (&old.node, &old.zone, &old.defaults) != (&place.node, &place.zone, &place.defaults) {
            affected.extend(services.keys().map(|key| Arc::new(key.clone())));
        } else if (&old.own, &old.others, &old.pod_cidrs) != (&place.own, &place.others, &place.pod_cidrs) {
            affected.extend(self.exposed.iter().cloned());
        }
    }

    /// Makes the rows of one Service that nobody else has.
    fn make(&mut self, name: &Arc<ObjectKey>, service: &Service, slices: &[&EndpointSlice], place: &Place) {
        if let Some(port) = service.health_port {
            let backends = slices.iter().flat_map(|slice| &slice.backends);
            let here = backends.filter(|backend| backend.ready && backend.node.as_ref() == Some(&place.node));
            let addresses: BTreeSet<IpAddr> = here.map(|backend| backend.address).collect();
            let health = Health { port, local_endpoints: addresses.len() };
            self.output.health.insert(ObjectKey::clone(name), health);
        }
        let mut keys = Vec::new();
        for (key, frontend) in rows::rows(name, service, slices, place) {
            match self.claims.obstacle(name, &key, frontend.kind, place) {
                None => {
                    keys.push(key);
                    self.output.frontends.insert(key, frontend);
                }
                // Who shares an address wants its ports, and not what nobody serves.
                Some(_) if key.protocol.is_none() && frontend.kind == FrontendKind::LoadBalancer => {}
                Some(conflict) => {
                    self.output.conflicts.entry(ObjectKey::clone(name)).or_default().insert(conflict);
                }
            }
        }
        if !keys.is_empty() {
            self.rows.insert(name.clone(), keys.into());
        }
    }

    /// Brings the claims of these Services up to date; returns those that came or went.
    fn claim(&mut self, changed: &BTreeSet<Arc<ObjectKey>>, services: &Services) -> BTreeSet<Claim> {
        let mut touched = BTreeSet::new();
        for name in changed {
            let (old, new) = (self.services.get(&**name), services.get(&**name));
            if old == new {
                continue;
            }
            let of = |service: Option<&Arc<Service>>| -> BTreeSet<Claim> {
                service.map(|service| rows::claims(name, service).collect()).unwrap_or_default()
            };
            let (old, new_claims) = (of(old), of(new));
            for claim in old.difference(&new_claims) {
                self.claims.remove(claim);
                touched.insert(claim.clone());
            }
            for claim in new_claims.difference(&old) {
                self.claims.insert(claim.clone());
                touched.insert(claim.clone());
            }
            match new.is_some_and(|service| rows::is_exposed(service)) {
                true => drop(self.exposed.insert(name.clone())),
                false => drop(self.exposed.remove(name)),
            }
        }
        touched
    }

    /// The Services that are others now, or whose slices are.
    fn changed(&self, services: &Services, slices: &Slices) -> BTreeSet<Arc<ObjectKey>> {
        let mut changed = BTreeSet::new();
        for item in self.services.diff(services) {
            let (DiffItem::Add(key, _) | DiffItem::Update { new: (key, _), .. } | DiffItem::Remove(key, _)) =
                item;
            changed.insert(Arc::new(key.clone()));
        }
        for item in self.slices.diff(slices) {
            let (old, new) = match item {
                DiffItem::Add(_, new) => (None, Some(new)),
                DiffItem::Update { old: (_, old), new: (_, new) } => (Some(old), Some(new)),
                DiffItem::Remove(_, old) => (Some(old), None),
            };
            changed.extend(old.into_iter().chain(new).map(|slice| Arc::new(slice.service.clone())));
        }
        changed
    }
}

/// Of more Services than this all slices are looked through at once.
const FEW: usize = 16;

/// The slices of these Services. A slice is in the namespace of its Service.
fn slices_of<'a>(
    names: &BTreeSet<Arc<ObjectKey>>,
    slices: &'a Slices,
) -> HashMap<&'a ObjectKey, Vec<&'a EndpointSlice>> {
    let mut slices_of: HashMap<&ObjectKey, Vec<&EndpointSlice>> = HashMap::new();
    if names.len() > FEW {
        for slice in slices.values() {
            slices_of.entry(&slice.service).or_default().push(slice);
        }
        return slices_of;
    }
    let namespaces: BTreeSet<&Arc<str>> = names.iter().map(|name| &name.namespace).collect();
    for namespace in namespaces {
        let first = ObjectKey::new(namespace.clone(), "");
        let in_namespace = slices.range(first..).take_while(|(slice, _)| slice.namespace == *namespace);
        for (_, slice) in in_namespace.filter(|(_, slice)| names.contains(&slice.service)) {
            slices_of.entry(&slice.service).or_default().push(slice);
        }
    }
    slices_of
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
