//! Services whose packets go to pods of the client's own node.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::model::{Endpoint, EndpointId, LocalRedirect, ObjectKey, Pod, RedirectPort, ServicePort};
use crate::tables::Snapshot;

/// Where one Service leads on this node.
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
    for (key, policy) in policies {
        let is_selected = |endpoint: &&Arc<Endpoint>| {
            let pod =
                pods.get(&endpoint.pod).filter(|pod| pod.is_ready && pod.key.namespace == key.namespace);
            pod.is_some_and(|pod| policy.selector.matches(&pod.labels))
        };
        let addresses: BTreeSet<IpAddr> =
            endpoints.values().filter(is_selected).flat_map(|endpoint| endpoint.addresses()).collect();
        if !addresses.is_empty() {
            let redirect = Redirect { policy: policy.clone(), pods: addresses };
            redirects.entry(policy.service.clone()).or_insert(redirect);
        }
    }
    redirects
}

impl Redirect {
    /// Where a port of the Service leads; nowhere else where it is not redirected.
    pub(super) fn backends(&self, port: &ServicePort, is_ipv4: bool) -> BTreeSet<SocketAddr> {
        let LocalRedirect { service_ports, ports, .. } = &*self.policy;
        let is_it = |of: &RedirectPort| {
            let has_name = of.name.is_empty() || of.name == port.name;
            of.port == port.port && of.protocol == port.protocol && has_name
        };
        if !service_ports.is_empty() && !service_ports.iter().any(is_it) {
            return BTreeSet::new();
        }
        let is_target = |target: &&RedirectPort| {
            target.protocol == port.protocol && (ports.len() == 1 || target.name == port.name)
        };
        let Some(target) = ports.iter().find(is_target) else { return BTreeSet::new() };
        let pods = self.pods.iter().filter(|address| address.is_ipv4() == is_ipv4);
        pods.map(|address| SocketAddr::new(*address, target.port)).collect()
    }
}
