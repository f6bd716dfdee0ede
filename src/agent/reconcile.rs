//! Makes the kernel hold what is desired.
//!
//! The order is the safety: what a packet could need is written before what
//! makes it needed (rules, then identities of addresses, then the flip of an
//! endpoint's policy), and nothing is deleted before everything is written.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use anyhow::{Context, Result};
use ipnet::IpNet;

use super::compute::Desired;
use super::node::Devices;
use crate::datapath::{Datapath, Writers};
use crate::model::{EndpointId, Node};
use crate::netlink::{self, Route};

/// What one round did.
#[derive(Debug, Default)]
pub struct Applied {
    /// Endpoints whose policy is in force and whose programs are attached.
    pub enforced: BTreeSet<EndpointId>,
    /// Backends that are no longer behind any service.
    pub removed_backends: Vec<SocketAddr>,
}

/// Owns every map that the agent writes, the pods' links and the routes.
pub struct Reconciler {
    datapath: Arc<Datapath>,
    writers: Writers,
    devices: Devices,
    attached: BTreeMap<EndpointId, u32>,
    routed: Option<Vec<Arc<Node>>>,
}

impl Reconciler {
    /// Takes the writers; nothing is written yet.
    pub fn new(datapath: Arc<Datapath>, writers: Writers, devices: Devices) -> Self {
        Self { datapath, writers, devices, attached: BTreeMap::new(), routed: None }
    }

    /// Removes what an agent of another ABI version has left; to be called when everything is attached.
    pub fn remove_other_versions(&self) {
        if let Err(error) = self.datapath.remove_other_versions() {
            tracing::warn!(error = format!("{error:#}"), "removing what another version has left");
        }
    }

    /// Writes the difference between `desired` and the kernel.
    pub fn apply(&mut self, desired: &Desired) -> Result<Applied> {
        self.steer_past_stack()?;
        let writers = &mut self.writers;
        writers.policies.write(&desired.policies).context("writing policies")?;
        writers.addresses.write(&desired.addresses, &desired.prefixes).context("writing addresses")?;
        writers.endpoints.write(&desired.endpoints).context("writing endpoints")?;
        let mut removed_backends = writers.services.write(&desired.frontends).context("writing services")?;
        let enforced = self.attach(desired)?;
        self.route(&desired.nodes).context("writing routes")?;
        removed_backends.extend(self.prune(desired)?);
        Ok(Applied { enforced, removed_backends })
    }

    /// IPsec policies of the node's own are its stack's to apply: packets go past it only where there are
    /// none. Where that cannot be found out they do not, which is slower and no reason to stop.
    fn steer_past_stack(&mut self) -> Result<()> {
        let policies = netlink::ipsec_policies();
        let is_news = self.writers.addresses.write_past_stack(matches!(policies, Ok(0)))?;
        match policies {
            _ if !is_news => {}
            Ok(0) => tracing::info!("packets go past the node's stack"),
            Ok(policies) => {
                tracing::warn!(
                    policies,
                    "packets go by the node's stack, more slowly: it has IPsec policies"
                );
            }
            Err(error) => tracing::warn!(%error, "packets go by the node's stack, more slowly"),
        }
        Ok(())
    }

    /// Takes away what is not desired; the backends of services that are gone.
    fn prune(&mut self, desired: &Desired) -> Result<Vec<SocketAddr>> {
        let gone: Vec<EndpointId> =
            self.attached.keys().filter(|id| !desired.endpoints.contains_key(id)).copied().collect();
        for id in gone {
            if let Some(ifindex) = self.attached.remove(&id) {
                self.datapath.detach_pod(id, ifindex).context("detaching an endpoint's programs")?;
            }
        }
        let writers = &mut self.writers;
        let removed_backends = writers.services.prune(&desired.frontends).context("pruning services")?;
        writers.endpoints.prune(&desired.endpoints).context("pruning endpoints")?;
        writers.addresses.prune(&desired.addresses, &desired.prefixes).context("pruning addresses")?;
        writers.policies.prune(&desired.policies).context("pruning policies")?;
        Ok(removed_backends)
    }

    /// Attaches the programs of endpoints that are new; an endpoint whose device
    /// has gone meanwhile is left out, its DEL is on the way.
    fn attach(&mut self, desired: &Desired) -> Result<BTreeSet<EndpointId>> {
        let mut enforced = BTreeSet::new();
        for (id, entry) in &desired.endpoints {
            let ifindex = entry.endpoint.host_ifindex;
            if self.attached.get(id) != Some(&ifindex) {
                if let Err(error) = self.datapath.attach_pod(*id, ifindex) {
                    let pod = &entry.endpoint.pod;
                    tracing::warn!(endpoint = id.0, %pod, error = format!("{error:#}"), "attaching an endpoint");
                    continue;
                }
                self.attached.insert(*id, ifindex);
            }
            enforced.insert(*id);
        }
        Ok(enforced)
    }

    fn route(&mut self, nodes: &[Arc<Node>]) -> Result<()> {
        if self.routed.as_deref() == Some(nodes) {
            return Ok(());
        }
        let wanted = nodes.iter().flat_map(|node| node.pod_cidrs.iter().map(move |prefix| (node, *prefix)));
        let routes: Vec<Route> = wanted.filter_map(|(node, prefix)| self.route_to(node, prefix)).collect();
        netlink::sync_routes(&routes)?;
        self.routed = Some(nodes.to_vec());
        Ok(())
    }

    /// To another node's pods: through the tunnel for the node's own packets (pods'
    /// are sent there by from_pod), or by way of that node's address.
    fn route_to(&self, node: &Node, prefix: IpNet) -> Option<Route> {
        let same_family = |address: &&IpAddr| address.is_ipv4() == prefix.addr().is_ipv4();
        if let Some(overlay) = self.devices.overlay {
            let source = self.devices.internal_addresses.iter().find(same_family).copied();
            return Some(Route {
                prefix,
                gateway: None,
                device_ifindex: overlay,
                source,
                mtu: self.devices.mtu,
            });
        }
        let gateway = node.addresses.iter().find(same_family).copied();
        if gateway.is_none() {
            tracing::warn!(node = node.name, %prefix, "the node has no address of this family: no route to its pods");
        }
        let device_ifindex = *self.devices.network.first()?;
        gateway.map(|gateway| Route { prefix, gateway: Some(gateway), device_ifindex, source: None, mtu: 0 })
    }
}
