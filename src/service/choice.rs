//! Which backends of a port new connections may choose, and why not the others.
//!
//! The rules are those of Kubernetes' own proxy (CategorizeEndpoints, KEP-1669, KEP-2433):
//!
//! - ready backends; where there is none, those that still serve while they end;
//! - of ready ones those hinted for this node, if every ready one has such a hint and one is for this node;
//!   else those hinted for this zone, by the same rule; else all. Ending ones are taken without regard to hints;
//! - with a Local policy the ready ones of this node; where there is none, its ending ones that still serve.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::net::SocketAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::place::Place;
use crate::model::{Backend, EndpointSlice, Protocol, ServicePort, SliceBackend, SlicePort, TrafficPolicy};

/// Which hints count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Topology {
    /// None: backends of all zones are as good.
    Anywhere,
    /// Those for this node's zone.
    SameZone,
    /// Those for this node.
    SameNode,
}

/// What becomes of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fate {
    /// New connections may choose it.
    Chosen,
    /// It ends, and is chosen because no other is left.
    LastResort,
    /// It does not take connections.
    NotReady,
    /// It ends, and others are ready.
    Ending,
    /// It is on another node, and the traffic policy is Local.
    OtherNode,
    /// Hints say that it is for others.
    HintedElsewhere,
}

impl Fate {
    /// New connections may choose the backend.
    pub fn is_chosen(self) -> bool {
        matches!(self, Self::Chosen | Self::LastResort)
    }
}

/// The backends of one port and one family, by address. One that two slices name counts by its better state.
pub struct Candidates<'a> {
    protocol: Protocol,
    all: BTreeMap<SocketAddr, &'a SliceBackend>,
}

/// What a frontend gets of its candidates.
#[derive(Clone, Debug, Default)]
pub(super) struct Pool {
    pub backends: Arc<[Backend]>,
    pub draining: Arc<[SocketAddr]>,
    pub has_others: bool,
}

fn is_last_resort(backend: &SliceBackend) -> bool {
    !backend.ready && backend.serving && backend.terminating
}

fn is_on(backend: &SliceBackend, place: &Place) -> bool {
    backend.node.as_ref() == Some(&place.node)
}

fn is_for_node(backend: &SliceBackend, place: &Place) -> bool {
    backend.hints.as_ref().is_some_and(|hints| hints.nodes.contains(&place.node))
}

fn is_for_zone(backend: &SliceBackend, place: &Place) -> bool {
    let zone = place.zone.as_ref();
    zone.is_some_and(|zone| backend.hints.as_ref().is_some_and(|hints| hints.zones.contains(zone)))
}

impl<'a> Candidates<'a> {
    /// Those of `port` in `slices`.
    pub fn of(port: &ServicePort, is_ipv4: bool, slices: &[&'a EndpointSlice]) -> Self {
        let same = |of_slice: &&SlicePort| of_slice.name == port.name && of_slice.protocol == port.protocol;
        let mut all = BTreeMap::new();
        for slice in slices {
            for target in slice.ports.iter().filter(same).filter(|target| target.port != 0) {
                let usable = slice.backends.iter().filter(|backend| {
                    super::is_usable(&backend.address) && backend.address.is_ipv4() == is_ipv4
                });
                for backend in usable {
                    let state = |of: &SliceBackend| (of.ready, is_last_resort(of), of.serving);
                    match all.entry(SocketAddr::new(backend.address, target.port)) {
                        Entry::Vacant(entry) => drop(entry.insert(backend)),
                        Entry::Occupied(mut entry) if state(entry.get()) < state(backend) => {
                            entry.insert(backend);
                        }
                        Entry::Occupied(_) => {}
                    }
                }
            }
        }
        Self { protocol: port.protocol, all }
    }

    /// Which hints count at `place`.
    pub fn topology(&self, place: &Place) -> Topology {
        let ready = || self.all.values().filter(|backend| backend.ready);
        let hints = |backend: &&&SliceBackend, of_node: bool| {
            let hints = backend.hints.as_ref();
            hints.is_some_and(|hints| !(if of_node { &hints.nodes } else { &hints.zones }).is_empty())
        };
        if ready().all(|backend| hints(&backend, true)) && ready().any(|backend| is_for_node(backend, place))
        {
            Topology::SameNode
        } else if ready().all(|backend| hints(&backend, false))
            && ready().any(|backend| is_for_zone(backend, place))
        {
            Topology::SameZone
        } else {
            Topology::Anywhere
        }
    }

    /// What becomes of each at `place`, in order of their addresses.
    pub fn fates(
        &self,
        policy: TrafficPolicy,
        place: &Place,
    ) -> impl Iterator<Item = (SocketAddr, &'a SliceBackend, Fate)> {
        let is_local = policy == TrafficPolicy::Local;
        let topology = if is_local { Topology::Anywhere } else { self.topology(place) };
        let may = move |backend: &SliceBackend| !is_local || is_on(backend, place);
        let has_ready = self.all.values().any(|backend| backend.ready && may(backend));
        let fate = move |backend: &SliceBackend| match topology {
            _ if !backend.ready && !is_last_resort(backend) => Fate::NotReady,
            _ if !may(backend) => Fate::OtherNode,
            _ if !backend.ready => {
                if has_ready {
                    Fate::Ending
                } else {
                    Fate::LastResort
                }
            }
            Topology::SameNode if !is_for_node(backend, place) => Fate::HintedElsewhere,
            Topology::SameZone if !is_for_zone(backend, place) => Fate::HintedElsewhere,
            Topology::SameNode | Topology::SameZone | Topology::Anywhere => Fate::Chosen,
        };
        self.all.iter().map(move |(address, backend)| (*address, *backend, fate(backend)))
    }

    /// What a frontend with this policy gets. Connections to what is not chosen live on, as long as a slice
    /// names the backend; over UDP as long as it serves, since nothing else would end them.
    pub(super) fn pool(&self, policy: TrafficPolicy, place: &Place) -> Pool {
        let (mut backends, mut draining, mut has_others) = (Vec::new(), Vec::new(), false);
        for (address, backend, fate) in self.fates(policy, place) {
            if fate.is_chosen() {
                backends.push(Backend {
                    address,
                    weight: backend.weight,
                    is_terminating: backend.terminating,
                    zone: backend.zone.clone(),
                    node: backend.node.clone(),
                });
                continue;
            }
            has_others |= fate == Fate::OtherNode;
            if self.protocol != Protocol::Udp || backend.serving {
                draining.push(address);
            }
        }
        let has_others = has_others && backends.is_empty();
        Pool { backends: shared(backends), draining: shared(draining), has_others }
    }
}

/// No allocation for an empty list.
fn shared<T>(list: Vec<T>) -> Arc<[T]> {
    if list.is_empty() { Arc::default() } else { list.into() }
}
