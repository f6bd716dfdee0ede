//! Routes to the other nodes' pods.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use anyhow::{Context, Result};
use ipnet::IpNet;

use super::{Drift, Problem, Round, Sink};
use crate::agent::compute::Desired;
use crate::agent::node::Devices;
use crate::model::{AddressPair, NetworkDevice, Node};
use crate::netlink::{self, News, Route};

/// Makes each route by itself: one that cannot be made costs the way to its node only.
pub struct Routes {
    devices: Devices,
    /// What the routes in the kernel were made for; `None`: they are to be looked at.
    routed: Option<(Vec<Arc<Node>>, Option<u32>, AddressPair)>,
    /// The routes that this sink has made, or found.
    made: BTreeMap<IpNet, Route>,
    problems: Vec<Problem>,
}

impl Routes {
    /// Over the node's devices.
    pub fn new(devices: Devices) -> Self {
        Self { devices, routed: None, made: BTreeMap::new(), problems: Vec::new() }
    }

    /// To another node's pods: through the tunnel for the node's own packets (pods'
    /// are sent there by from_pod), or by way of that node's address.
    fn route_to(&self, node: &Node, prefix: IpNet, device: Option<u32>) -> Result<Route, Problem> {
        let same_family = |address: &&std::net::IpAddr| address.is_ipv4() == prefix.addr().is_ipv4();
        if let Some(overlay) = self.devices.overlay {
            let source = self.devices.internal_addresses.iter().find(same_family).copied();
            let mtu = self.devices.mtu;
            return Ok(Route { prefix, gateway: None, device_ifindex: overlay, source, mtu });
        }
        let gateway = node.addresses.iter().find(same_family).copied();
        match (gateway, device) {
            (Some(gateway), Some(device)) => {
                Ok(Route { prefix, gateway: Some(gateway), device_ifindex: device, source: None, mtu: 0 })
            }
            (None, _) => Err(Problem::new(format!(
                "no route {prefix}: node {} has no address of this family",
                node.name
            ))),
            (_, None) => Err(Problem::new(format!("no route {prefix}: this node has no network device"))),
        }
    }

    /// The device that has the node's address now.
    fn device(&self, desired: &Desired) -> Option<u32> {
        let AddressPair { ipv4, ipv6 } = desired.node_addresses;
        let node: Vec<IpAddr> = ipv4.map(IpAddr::V4).into_iter().chain(ipv6.map(IpAddr::V6)).collect();
        let has_address = |device: &NetworkDevice| device.addresses.iter().any(|own| node.contains(own));
        let found = desired.devices.iter().find(|(_, device)| has_address(device));
        found.map(|(ifindex, _)| *ifindex).or_else(|| desired.devices.keys().next().copied())
    }

    fn sync(&mut self, nodes: &[Arc<Node>], device: Option<u32>) -> Result<()> {
        let mut problems = Vec::new();
        let mut wanted: BTreeMap<IpNet, (Route, &Node)> = BTreeMap::new();
        for node in nodes {
            for prefix in &node.pod_cidrs {
                match self.route_to(node, *prefix, device) {
                    Ok(route) => drop(wanted.insert(prefix.trunc(), (route, node))),
                    Err(problem) => problems.push(problem),
                }
            }
        }
        let routes: Vec<Route> = wanted.values().map(|(route, _)| route.clone()).collect();
        let failed = netlink::sync_routes(&routes).context("writing routes")?;
        self.made = wanted.iter().map(|(prefix, (route, _))| (*prefix, route.clone())).collect();
        for (prefix, error) in failed {
            self.made.remove(&prefix);
            let node = wanted.get(&prefix).map(|(_, node)| *node);
            problems.push(Problem::new(cause(&prefix, node, &error)));
        }
        self.problems = problems;
        Ok(())
    }
}

/// What people read of a route that cannot be made.
fn cause(prefix: &IpNet, node: Option<&Node>, error: &std::io::Error) -> String {
    let name = node.map_or("a node that is gone", |node| node.name.as_str());
    match error.raw_os_error() {
        Some(libc::EEXIST) => {
            format!(
                "no route {prefix} to node {name}: another program's route has this prefix: remove that one"
            )
        }
        Some(libc::ENETUNREACH) => {
            format!("no route {prefix}: node {name} is not on this link, and native routing needs that")
        }
        _ => format!("no route {prefix} to node {name}: {error}"),
    }
}

impl Sink for Routes {
    fn name(&self) -> &'static str {
        "routes"
    }

    fn needs(&self) -> &'static [&'static str] {
        &["network"]
    }

    /// The kernel drops a device's routes with the device, or with its address, and does not say so.
    fn hears(&self) -> &'static [News] {
        &[News::Routes, News::Links]
    }

    fn compare(&mut self) -> Result<Vec<Drift>> {
        let present: BTreeMap<IpNet, Route> =
            netlink::node_routes()?.into_iter().map(|route| (route.prefix, route)).collect();
        let lost = self.made.iter().filter(|(prefix, route)| present.get(*prefix) != Some(*route));
        let drifts: Vec<Drift> = lost.map(|(prefix, _)| Drift::one(format!("route {prefix}"))).collect();
        if !drifts.is_empty() {
            self.routed = None;
        }
        Ok(drifts)
    }

    fn write(&mut self, round: &mut Round<'_>) -> Result<Vec<Problem>> {
        let nodes = &round.desired.nodes;
        let device = self.device(round.desired);
        // With its last address a device loses its routes.
        let own = round.desired.node_addresses;
        let routed = self.routed.as_ref();
        let is_settled = routed.is_some_and(|(to, by, from)| to == nodes && *by == device && *from == own);
        if !is_settled || (round.is_retry && !self.problems.is_empty()) {
            self.routed = None;
            self.sync(nodes, device)?;
            self.routed = Some((nodes.clone(), device, own));
        }
        Ok(self.problems.clone())
    }
}
