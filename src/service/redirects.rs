//! Services, and addresses, whose packets go to pods of the client's own node.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::place::Place;
use crate::model::{
    Backend, Endpoint, EndpointId, Frontend, FrontendKey, FrontendKind, LocalRedirect, ObjectKey, Pod,
    Protocol, RedirectFrom, RedirectPort, Scope, ServicePort,
};
use crate::tables::Snapshot;

/// Where one Service, or one address, leads on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Redirect {
    /// The policy that says so.
    pub policy: Arc<LocalRedirect>,
    /// The addresses of the ready pods that it selects; never empty.
    pub pods: BTreeSet<IpAddr>,
}

/// The Services that lead to pods of this node, by the policies that select any ready one; of several policies
/// for a Service the first by name counts.
pub fn redirects(
    policies: &Snapshot<ObjectKey, Arc<LocalRedirect>>,
    pods: &Snapshot<ObjectKey, Arc<Pod>>,
    endpoints: &Snapshot<EndpointId, Arc<Endpoint>>,
) -> BTreeMap<ObjectKey, Redirect> {
    let mut redirects = BTreeMap::new();
    for policy in policies.values() {
        let RedirectFrom::Service(service) = &policy.from else { continue };
        if let Some(redirect) = Redirect::of(policy, pods, endpoints) {
            redirects.entry(service.clone()).or_insert(redirect);
        }
    }
    redirects
}

/// The frontends of the addresses that lead to pods of this node, for its pods and sockets; and in words which
/// policies get none. What a policy redirects is redirected for pods of all namespaces, so an address must be
/// one that the settings leave to policies, and nobody's of the cluster.
pub fn redirected_addresses(
    policies: &Snapshot<ObjectKey, Arc<LocalRedirect>>,
    pods: &Snapshot<ObjectKey, Arc<Pod>>,
    endpoints: &Snapshot<EndpointId, Arc<Endpoint>>,
    place: &Place,
) -> (BTreeMap<FrontendKey, Frontend>, Vec<String>) {
    let (mut frontends, mut refused) = (BTreeMap::<FrontendKey, Frontend>::new(), Vec::new());
    for (key, policy) in policies {
        let RedirectFrom::Address(address) = policy.from else { continue };
        if let Some(why) = place.keeps_from_redirects(&address) {
            refused.push(format!("CiliumLocalRedirectPolicy {key} is not served: {address} {why}"));
            continue;
        }
        let Some(redirect) = Redirect::of(policy, pods, endpoints) else { continue };
        for port in &policy.from_ports {
            let backends = redirect.targets(&port.name, port.protocol, address.is_ipv4());
            if backends.is_empty() {
                continue;
            }
            let frontend = Frontend {
                backends: backends.into_iter().map(Backend::at).collect(),
                ..Frontend::refusing(Arc::new(key.clone()), FrontendKind::LocalRedirect)
            };
            let row = FrontendKey::new(address, port.port, port.protocol, Scope::Internal);
            match frontends.entry(row) {
                Entry::Vacant(place) => {
                    place.insert(frontend);
                }
                Entry::Occupied(first) => refused.push(format!(
                    "CiliumLocalRedirectPolicy {key} is not served for {address} port {}/{}: {} comes before it",
                    port.port,
                    port.protocol,
                    first.get().service
                )),
            }
        }
    }
    (frontends, refused)
}

impl Redirect {
    /// To the ready pods that a policy selects; `None` where there is none.
    fn of(
        policy: &Arc<LocalRedirect>,
        pods: &Snapshot<ObjectKey, Arc<Pod>>,
        endpoints: &Snapshot<EndpointId, Arc<Endpoint>>,
    ) -> Option<Self> {
        let namespace = &policy.key.namespace;
        let is_selected = |endpoint: &&Arc<Endpoint>| {
            let pod = pods.get(&endpoint.pod).filter(|pod| pod.is_ready && pod.key.namespace == *namespace);
            pod.is_some_and(|pod| policy.selector.matches(&pod.labels))
        };
        let addresses: BTreeSet<IpAddr> =
            endpoints.values().filter(is_selected).flat_map(|endpoint| endpoint.addresses()).collect();
        (!addresses.is_empty()).then(|| Self { policy: policy.clone(), pods: addresses })
    }

    /// Where a port of the Service leads; nowhere else where it is not redirected.
    pub(super) fn backends(&self, port: &ServicePort, is_ipv4: bool) -> BTreeSet<SocketAddr> {
        let from_ports = &self.policy.from_ports;
        let is_it = |of: &RedirectPort| {
            let has_name = of.name.is_empty() || of.name == port.name;
            of.port == port.port && of.protocol == port.protocol && has_name
        };
        if !from_ports.is_empty() && !from_ports.iter().any(is_it) {
            return BTreeSet::new();
        }
        self.targets(&port.name, port.protocol, is_ipv4)
    }

    /// The pods' port that goes with this one.
    fn targets(&self, name: &str, protocol: Protocol, is_ipv4: bool) -> BTreeSet<SocketAddr> {
        let ports = &self.policy.ports;
        let is_target =
            |target: &&RedirectPort| target.protocol == protocol && (ports.len() == 1 || target.name == name);
        let Some(target) = ports.iter().find(is_target) else { return BTreeSet::new() };
        let pods = self.pods.iter().filter(|address| address.is_ipv4() == is_ipv4);
        pods.map(|address| SocketAddr::new(*address, target.port)).collect()
    }
}
