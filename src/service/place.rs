//! Where a node is, and which addresses its services have besides their own.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::redirects::Redirect;
use crate::model::{Algorithm, Forwarding, Node, ObjectKey};

/// The label of a Node that names its zone.
const ZONE: &str = "topology.kubernetes.io/zone";

/// In a larger cluster than this, node ports of other nodes are translated there and not at the client's node: rows
/// grow with nodes times node ports.
const OTHERS_MAX: usize = 128;

/// What counts where a Service says nothing itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Defaults {
    /// How a backend is chosen.
    pub algorithm: Algorithm,
    /// How backends of other nodes are reached from the network.
    pub forwarding: Forwarding,
    /// Node ports are at the node's addresses within these; empty: at all of them.
    pub node_port_cidrs: Arc<[IpNet]>,
    /// Addresses that policies may redirect are within these.
    pub redirect_cidrs: Arc<[IpNet]>,
}

impl Defaults {
    fn has_node_ports(&self, address: &IpAddr) -> bool {
        self.node_port_cidrs.is_empty() || self.node_port_cidrs.iter().any(|cidr| cidr.contains(address))
    }
}

/// The node that looks, and what it sees around it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Its name.
    pub node: Arc<str>,
    /// Its zone, where its labels name one.
    pub zone: Option<Arc<str>>,
    /// What the settings say.
    pub defaults: Defaults,
    /// Its own addresses, the loopback ones among them.
    pub own: BTreeSet<IpAddr>,
    /// The other nodes' addresses.
    pub others: BTreeSet<IpAddr>,
    /// Where pods have their addresses: no Service may have one of these from outside.
    pub pod_cidrs: BTreeSet<IpNet>,
    /// Services that lead to pods of this node.
    pub redirects: BTreeMap<ObjectKey, Redirect>,
}

impl Place {
    /// Of the node `name` among `nodes`, with the addresses that its devices have.
    pub fn of<'a>(
        name: &Arc<str>,
        nodes: impl Iterator<Item = &'a Arc<Node>>,
        own: impl Iterator<Item = IpAddr>,
        defaults: &Defaults,
    ) -> Self {
        let mut place = Self { node: name.clone(), defaults: defaults.clone(), ..Self::default() };
        place.own = own.collect();
        for node in nodes {
            place.pod_cidrs.extend(&node.pod_cidrs);
            if *node.name == **name {
                place.zone = node.labels.get(ZONE).map(|zone| zone.as_str().into());
                place.own.extend(&node.addresses);
            } else {
                place.others.extend(&node.addresses);
            }
        }
        place
    }

    /// The addresses of this node that have node ports; loopback ones always, for its own sockets.
    pub(super) fn own_node_port_addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        let own = self.own.iter().copied();
        own.filter(|address| address.is_loopback() || self.defaults.has_node_ports(address))
    }

    /// The addresses of the other nodes that have node ports; none where they are too many.
    pub(super) fn other_node_port_addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        let is_small = self.others.len() <= OTHERS_MAX;
        self.others.iter().copied().filter(move |address| is_small && self.defaults.has_node_ports(address))
    }

    /// Why policies may not redirect an address; `None` if they may.
    pub(super) fn keeps_from_redirects(&self, address: &IpAddr) -> Option<&'static str> {
        if self.is_a_nodes(address) {
            return Some("is a node's");
        }
        if self.is_a_pods(address) {
            return Some("is within the pods' CIDRs");
        }
        let may = self.defaults.redirect_cidrs.iter().any(|cidr| cidr.contains(address));
        (!may).then_some("is not within WEIR_REDIRECT_ADDRESSES")
    }

    pub(super) fn is_a_nodes(&self, address: &IpAddr) -> bool {
        self.own.contains(address) || self.others.contains(address)
    }

    pub(super) fn is_a_pods(&self, address: &IpAddr) -> bool {
        self.pod_cidrs.iter().any(|cidr| cidr.contains(address))
    }
}
