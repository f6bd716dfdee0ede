//! The frontends of one Service, before it is known which of its addresses are another's.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use super::choice::{Candidates, Pool};
use super::is_usable;
use super::place::Place;
use crate::model::{
    Backend, EndpointSlice, Forwarding, Frontend, FrontendKey, FrontendKind, ObjectKey, Protocol, Scope,
    Service, ServicePort, TrafficPolicy,
};

/// Stands for every node's address in claims on node ports.
pub(super) const EVERY_NODE: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);

/// A wish of a Service: a port of an address, a port of every node, or a whole address (no port).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Claim {
    pub address: IpAddr,
    pub port: u16,
    pub protocol: Option<Protocol>,
    pub kind: FrontendKind,
    pub service: Arc<ObjectKey>,
}

/// Everything that a Service wants. A cluster IP is wanted whole, all else by port.
pub(super) fn claims<'a>(
    name: &'a Arc<ObjectKey>,
    service: &'a Service,
) -> impl Iterator<Item = Claim> + use<'a> {
    let claim =
        move |address, port, protocol, kind| Claim { address, port, protocol, kind, service: name.clone() };
    let whole = service.addresses.iter().filter(|address| is_usable(address));
    let whole = whole.map(move |address| claim(*address, 0, None, FrontendKind::ClusterIp));
    // Of Services that share one the first has what no port of it is.
    let rest = outer_addresses(service).filter(|(_, kind)| *kind == FrontendKind::LoadBalancer);
    let whole = whole.chain(rest.map(move |(address, kind)| claim(address, 0, None, kind)));
    let by_port = service.ports.iter().flat_map(move |port| {
        let protocol = Some(port.protocol);
        let node_port =
            port.node_port.map(|number| claim(EVERY_NODE, number, protocol, FrontendKind::NodePort));
        let outer = outer_addresses(service);
        node_port
            .into_iter()
            .chain(outer.map(move |(address, kind)| claim(address, port.port, protocol, kind)))
    });
    whole.chain(by_port)
}

/// The addresses that the cluster does not give.
pub(super) fn outer_addresses(service: &Service) -> impl Iterator<Item = (IpAddr, FrontendKind)> + '_ {
    let balancer = service.balancer_addresses.iter().map(|address| (*address, FrontendKind::LoadBalancer));
    let external = service.external_addresses.iter();
    let external = external.filter(|address| !service.balancer_addresses.contains(address));
    let external = external.map(|address| (*address, FrontendKind::ExternalIp));
    balancer.chain(external).filter(|(address, _)| is_usable(address))
}

/// The Service has frontends at addresses of nodes or of the network.
pub(super) fn is_exposed(service: &Service) -> bool {
    outer_addresses(service).next().is_some() || service.ports.iter().any(|port| port.node_port.is_some())
}

/// All frontends of a Service at `place`.
pub(super) fn rows(
    name: &Arc<ObjectKey>,
    service: &Service,
    slices: &[&EndpointSlice],
    place: &Place,
) -> Vec<(FrontendKey, Frontend)> {
    let mut rows = Rows { name, service, place, rows: Vec::new() };
    for is_ipv4 in [true, false] {
        let cluster = |address: &&IpAddr| is_usable(address) && address.is_ipv4() == is_ipv4;
        for address in service.addresses.iter().filter(cluster) {
            let refused = Frontend::refusing(name.clone(), FrontendKind::ClusterIp);
            rows.rows.push((FrontendKey::rest_of(*address), refused));
        }
        // A node's own address serves other things beside.
        let is_balancers = |(address, kind): &(IpAddr, FrontendKind)| {
            *kind == FrontendKind::LoadBalancer && address.is_ipv4() == is_ipv4 && !place.is_a_nodes(address)
        };
        for (address, kind) in outer_addresses(service).filter(is_balancers) {
            rows.rows.push((FrontendKey::rest_of(address), Frontend::refusing(name.clone(), kind)));
        }
        for port in service.ports.iter().filter(|port| port.port != 0) {
            rows.of_port(port, is_ipv4, slices);
        }
    }
    rows.rows
}

struct Rows<'a> {
    name: &'a Arc<ObjectKey>,
    service: &'a Service,
    place: &'a Place,
    rows: Vec<(FrontendKey, Frontend)>,
}

/// What a port leads to, by who asks and where.
struct Pools {
    /// At cluster IPs.
    cluster_ip: Pool,
    /// At all other addresses, for pods and nodes: as if they came through the cluster.
    internal: Pool,
    /// There, for the network.
    external: Pool,
}

impl Pools {
    fn of(service: &Service, candidates: &Candidates, place: &Place) -> Self {
        let pool = |policy| candidates.pool(policy, place);
        let internal = pool(TrafficPolicy::Cluster);
        let of = |policy| match policy {
            TrafficPolicy::Cluster => internal.clone(),
            TrafficPolicy::Local => pool(policy),
        };
        Self { cluster_ip: of(service.internal_policy), external: of(service.external_policy), internal }
    }
}

/// Leads to these instead, if there are any; running connections stay where they are.
fn redirected(to: &BTreeSet<SocketAddr>, pool: Pool) -> Pool {
    if to.is_empty() {
        return pool;
    }
    let before = pool.backends.iter().map(|backend| backend.address).chain(pool.draining.iter().copied());
    let draining: BTreeSet<SocketAddr> = before.filter(|address| !to.contains(address)).collect();
    Pool {
        backends: to.iter().copied().map(Backend::at).collect(),
        draining: draining.into_iter().collect(),
        has_others: false,
    }
}

impl Rows<'_> {
    fn of_port(&mut self, port: &ServicePort, is_ipv4: bool, slices: &[&EndpointSlice]) {
        let (service, place) = (self.service, self.place);
        let is_family = |address: &IpAddr| address.is_ipv4() == is_ipv4;
        let has_family = service.addresses.iter().any(is_family);
        let outer: Vec<_> = outer_addresses(service).filter(|(address, _)| is_family(address)).collect();
        if !has_family && outer.is_empty() {
            return;
        }
        let mut pools = Pools::of(service, &Candidates::of(port, is_ipv4, slices), place);
        if let Some(redirect) = place.redirects.get(&service.key) {
            pools.cluster_ip = redirected(&redirect.backends(port, is_ipv4), pools.cluster_ip);
        }
        for address in service.addresses.iter().filter(|address| is_usable(address) && is_family(address)) {
            let kind = FrontendKind::ClusterIp;
            self.push(*address, port.port, port.protocol, Scope::Internal, kind, &pools.cluster_ip);
        }
        for (address, kind) in outer {
            self.pair(address, port.port, port.protocol, kind, &pools);
        }
        // Last: where an external address is a node's, its node ports come first.
        if let Some(number) = port.node_port.filter(|_| has_family) {
            for address in place.own_node_port_addresses().filter(is_family) {
                self.pair(address, number, port.protocol, FrontendKind::NodePort, &pools);
            }
            for address in place.other_node_port_addresses().filter(is_family) {
                let kind = FrontendKind::NodePort;
                self.push(address, number, port.protocol, Scope::Internal, kind, &pools.internal);
            }
        }
    }

    /// The rows for pods and for the network. A loopback address is the node's own sockets' alone.
    fn pair(&mut self, address: IpAddr, port: u16, protocol: Protocol, kind: FrontendKind, pools: &Pools) {
        self.push(address, port, protocol, Scope::Internal, kind, &pools.internal);
        if !address.is_loopback() {
            self.push(address, port, protocol, Scope::External, kind, &pools.external);
        }
    }

    fn push(
        &mut self,
        address: IpAddr,
        port: u16,
        protocol: Protocol,
        scope: Scope,
        kind: FrontendKind,
        pool: &Pool,
    ) {
        let Self { service, place, .. } = *self;
        let is_external = scope == Scope::External;
        let keeps_source = is_external && service.external_policy == TrafficPolicy::Local;
        let forwarding = service.forwarding.unwrap_or(place.defaults.forwarding);
        let has_ranges = is_external && kind == FrontendKind::LoadBalancer;
        let frontend = Frontend {
            service: self.name.clone(),
            kind,
            algorithm: service.algorithm.unwrap_or(place.defaults.algorithm),
            affinity: service.affinity,
            forwarding: if is_external && !keeps_source { forwarding } else { Forwarding::Snat },
            keeps_source,
            has_others: pool.has_others,
            source_ranges: if has_ranges { service.source_ranges.clone() } else { Arc::default() },
            backends: pool.backends.clone(),
            draining: pool.draining.clone(),
        };
        self.rows.push((FrontendKey::new(address, port, protocol, scope), frontend));
    }
}
