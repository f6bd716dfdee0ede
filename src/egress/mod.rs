//! Which pods' packets leave the cluster by which gateway, and with which address.
//!
//! The pod's node and the gateway work out the same from the same objects: identities, nodes, policies. A pod's gateway
//! is chosen by rendezvous hashing among those that are ready, so that a gateway that comes or goes moves its own pods
//! alone. Of several policies for one destination the longest prefix counts, then the first name.

mod choose;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::model::{
    AddressKind, BaseAddress, EgressExit, EgressGateway, EgressPods, EgressPolicy, EgressRoute, EgressRow,
    EgressTable, Endpoint, EndpointId, IdentityId, IdentityLabels, NetworkDevice, Node, NodeEndpoints,
    ObjectKey, PublishedEndpoint,
};
use crate::tables::Snapshot;

/// What the rules depend on.
pub struct Input<'a> {
    /// This node's name.
    pub this_node: &'a str,
    /// Every policy.
    pub policies: &'a Snapshot<ObjectKey, Arc<EgressPolicy>>,
    /// Every cluster identity.
    pub identities: &'a Snapshot<IdentityId, Arc<IdentityLabels>>,
    /// This node's pods whose identity is known.
    pub endpoints: &'a BTreeMap<EndpointId, (Arc<Endpoint>, IdentityId)>,
    /// What every node publishes; this node's own is not read.
    pub node_endpoints: &'a Snapshot<Arc<str>, Arc<NodeEndpoints>>,
    /// Who has which address: what a node publishes counts where it was believed.
    pub addresses: &'a Snapshot<IpAddr, BaseAddress>,
    /// Every node.
    pub nodes: &'a Snapshot<Arc<str>, Arc<Node>>,
    /// This node's devices that lead out.
    pub devices: &'a Snapshot<u32, NetworkDevice>,
    /// Every address of this node.
    pub own_addresses: &'a Snapshot<IpAddr, ()>,
    /// By which address tunnels reach another node.
    pub underlay_of: &'a dyn Fn(&Node) -> Option<IpAddr>,
}

/// What the kernel should hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Output {
    /// The rules of each address of this node's pods, and of those whose gateway it is. Pods with the same ones share
    /// them.
    pub tables: BTreeMap<IpAddr, Arc<EgressTable>>,
    /// This node's pods that a policy selects.
    pub selected: BTreeSet<EndpointId>,
    /// The same for people.
    pub rows: Vec<EgressRow>,
}

/// Remembers its last answer: most changes are none of its.
#[derive(Default)]
pub struct Rules {
    policies: Snapshot<ObjectKey, Arc<EgressPolicy>>,
    identities: Snapshot<IdentityId, Arc<IdentityLabels>>,
    endpoints: BTreeMap<EndpointId, (Arc<Endpoint>, IdentityId)>,
    node_endpoints: Snapshot<Arc<str>, Arc<NodeEndpoints>>,
    addresses: Snapshot<IpAddr, BaseAddress>,
    nodes: Snapshot<Arc<str>, Arc<Node>>,
    devices: Snapshot<u32, NetworkDevice>,
    own_addresses: Snapshot<IpAddr, ()>,
    output: Arc<Output>,
}

impl Rules {
    /// What [`rules`] says for `input`; one `Rules` serves one node.
    pub fn update(&mut self, input: &Input<'_>) -> Arc<Output> {
        if input.policies.is_empty() {
            *self = Self::default();
        } else if !self.is_of(input) {
            *self = Self {
                policies: input.policies.clone(),
                identities: input.identities.clone(),
                endpoints: input.endpoints.clone(),
                node_endpoints: input.node_endpoints.clone(),
                addresses: input.addresses.clone(),
                nodes: input.nodes.clone(),
                devices: input.devices.clone(),
                own_addresses: input.own_addresses.clone(),
                output: Arc::new(rules(input)),
            };
        }
        self.output.clone()
    }

    fn is_of(&self, input: &Input<'_>) -> bool {
        self.policies.ptr_eq(input.policies)
            && self.identities.ptr_eq(input.identities)
            && self.node_endpoints.ptr_eq(input.node_endpoints)
            && self.addresses.ptr_eq(input.addresses)
            && self.nodes.ptr_eq(input.nodes)
            && self.devices.ptr_eq(input.devices)
            && self.own_addresses.ptr_eq(input.own_addresses)
            && self.endpoints == *input.endpoints
    }
}

/// A pod of any node.
struct Pod<'a> {
    key: &'a ObjectKey,
    node: &'a str,
    labels: &'a IdentityLabels,
    addresses: Vec<IpAddr>,
}

/// A policy that selects a pod, with the pod's gateway.
struct Way<'a> {
    policy: &'a EgressPolicy,
    gateway: Option<(&'a Node, &'a EgressGateway)>,
}

/// The tables that were worked out, by family, and by the policies of a pod with the gateway that it has of each.
type Known<'a> = BTreeMap<(bool, Vec<(*const EgressPolicy, Option<*const EgressGateway>)>), Arc<EgressTable>>;

/// What a look at the input says.
pub fn rules(input: &Input<'_>) -> Output {
    let mut output = Output::default();
    if input.policies.is_empty() {
        return output;
    }
    let gateways: Vec<(&EgressPolicy, Vec<choose::Candidate<'_>>)> = input
        .policies
        .values()
        .map(|policy| (policy.as_ref(), choose::candidates(policy, input.nodes)))
        .collect();
    let mut known = Known::new();
    for (id, (endpoint, identity)) in input.endpoints {
        let Some(labels) = input.identities.get(identity) else { continue };
        let pod = Pod {
            key: &endpoint.pod,
            node: input.this_node,
            labels,
            addresses: endpoint.addresses().collect(),
        };
        let ways = input.ways(&pod, &gateways);
        if !ways.is_empty() {
            output.selected.insert(*id);
            input.add(&pod, &ways, &mut known, &mut output);
        }
    }
    input.add_others(&gateways, &mut known, &mut output);
    output
}

impl Input<'_> {
    /// Other nodes' pods whose gateway this node is.
    fn add_others<'a>(
        &self,
        gateways: &'a [(&'a EgressPolicy, Vec<choose::Candidate<'a>>)],
        known: &mut Known<'a>,
        output: &mut Output,
    ) {
        let is_here = |all: &[choose::Candidate<'_>]| all.iter().any(|it| it.is(self.this_node));
        let here: Vec<&EgressPolicy> =
            gateways.iter().filter(|(_, all)| is_here(all)).map(|(policy, _)| *policy).collect();
        if here.is_empty() {
            return;
        }
        // Most identities are selected by no policy; one look at the labels serves all their pods.
        let mut meant: BTreeMap<IdentityId, bool> = BTreeMap::new();
        let others = self.node_endpoints.iter().filter(|(name, _)| ***name != *self.this_node);
        for (name, published) in others {
            let Some(underlay) = self.nodes.get(name).and_then(|node| (self.underlay_of)(node)) else {
                continue;
            };
            for endpoint in &published.endpoints {
                let Some(labels) = self.identities.get(&endpoint.identity) else { continue };
                let is_meant = meant.entry(endpoint.identity).or_insert_with(|| {
                    here.iter().flat_map(|policy| &policy.pods).any(|pods| selects_labels(pods, labels))
                });
                let addresses = if *is_meant { self.believed(endpoint, underlay) } else { vec![] };
                if addresses.is_empty() {
                    continue;
                }
                let pod = Pod { key: &endpoint.pod, node: name, labels, addresses };
                let mut ways = self.ways(&pod, gateways);
                if ways.iter().any(|way| self.is_here(way)) {
                    // What goes elsewhere does not come here.
                    ways.iter_mut().filter(|way| !self.is_here(way)).for_each(|way| way.gateway = None);
                    self.add(&pod, &ways, known, output);
                }
            }
        }
    }

    /// A claim that was not believed has no rules either.
    fn believed(&self, endpoint: &PublishedEndpoint, underlay: IpAddr) -> Vec<IpAddr> {
        let is_its = |address: &IpAddr| {
            self.addresses.get(address).is_some_and(|it| {
                it.kind == AddressKind::Pod && it.node == Some(underlay) && it.identity == endpoint.identity
            })
        };
        endpoint.addresses.iter().map(IpAddr::to_canonical).filter(is_its).collect()
    }

    fn is_here(&self, way: &Way<'_>) -> bool {
        way.gateway.is_some_and(|(node, _)| node.name == self.this_node)
    }

    fn ways<'a>(
        &self,
        pod: &Pod<'_>,
        policies: &'a [(&'a EgressPolicy, Vec<choose::Candidate<'a>>)],
    ) -> Vec<Way<'a>> {
        let selects = |policy: &EgressPolicy| policy.pods.iter().any(|pods| self.selects(pods, pod));
        let selecting = policies.iter().filter(|(policy, _)| selects(policy));
        selecting
            .map(|(policy, candidates)| Way { policy, gateway: choose::gateway(candidates, pod.key) })
            .collect()
    }

    fn selects(&self, pods: &EgressPods, pod: &Pod<'_>) -> bool {
        let node_labels = self.nodes.get(pod.node).map(|node| &node.labels);
        // A node that is not known yet may be one of them: the pod waits for the gateway then.
        let is_on =
            pods.nodes.requirements.is_empty() || node_labels.is_none_or(|labels| pods.nodes.matches(labels));
        is_on && selects_labels(pods, pod.labels)
    }

    fn add<'a>(&self, pod: &Pod<'_>, ways: &[Way<'a>], known: &mut Known<'a>, output: &mut Output) {
        for address in &pod.addresses {
            let of =
                |way: &Way<'a>| (&raw const *way.policy, way.gateway.map(|(_, gateway)| &raw const *gateway));
            let key = (address.is_ipv4(), ways.iter().map(of).collect());
            let table = known.entry(key).or_insert_with(|| Arc::new(self.table(ways, address.is_ipv4())));
            output.tables.insert(*address, table.clone());
        }
        output.rows.extend(ways.iter().map(|way| self.row(pod, way)));
    }

    fn table(&self, ways: &[Way<'_>], is_ipv4: bool) -> EgressTable {
        let mut table: EgressTable = [(everything(is_ipv4), EgressRoute::Ordinary)].into();
        for (prefix, way) in prefixes(ways, is_ipv4) {
            table.insert(prefix, way.map_or(EgressRoute::Ordinary, |way| self.route(way, is_ipv4)));
        }
        table
    }

    fn route(&self, way: &Way<'_>, is_ipv4: bool) -> EgressRoute {
        match way.gateway {
            None => EgressRoute::Closed,
            Some((node, gateway)) if node.name == self.this_node => {
                EgressRoute::Here(self.exit(gateway, is_ipv4))
            }
            Some((node, _)) => (self.underlay_of)(node).map_or(EgressRoute::Closed, EgressRoute::Away),
        }
    }

    /// An address that the node lacks is none: packets would not come back.
    fn exit(&self, gateway: &EgressGateway, is_ipv4: bool) -> EgressExit {
        if let Some(address) = gateway.address {
            if address.is_ipv4() != is_ipv4 || !self.own_addresses.contains_key(&address) {
                return EgressExit::Nowhere;
            }
            let device = self.devices.iter().find(|(_, device)| device.addresses.contains(&address));
            return EgressExit::With(address, device.map_or(0, |(index, _)| *index));
        }
        let Some(name) = &gateway.interface else { return EgressExit::OfDevice };
        let device = self.devices.iter().find(|(_, device)| device.name == *name);
        let found = device.and_then(|(index, device)| {
            let source = match is_ipv4 {
                true => device.sources.ipv4.map(IpAddr::V4),
                false => device.sources.ipv6.map(IpAddr::V6),
            };
            Some(EgressExit::With(source?, *index))
        });
        found.unwrap_or(EgressExit::Nowhere)
    }

    fn row(&self, pod: &Pod<'_>, way: &Way<'_>) -> EgressRow {
        let of_family = |gateway: &EgressGateway, is_ipv4| match self.exit(gateway, is_ipv4) {
            EgressExit::With(address, _) => Some(address.to_string()),
            EgressExit::OfDevice => Some("of its device".to_owned()),
            EgressExit::Nowhere => None,
        };
        let address = match way.gateway {
            None => None,
            Some((node, gateway)) if node.name == self.this_node => {
                let mut both: Vec<String> =
                    [true, false].into_iter().filter_map(|is_ipv4| of_family(gateway, is_ipv4)).collect();
                both.dedup();
                (!both.is_empty()).then(|| both.join(", "))
            }
            Some((_, gateway)) => Some(match (&gateway.address, &gateway.interface) {
                (Some(address), _) => address.to_string(),
                (None, Some(name)) => format!("of {name}"),
                (None, None) => "of its device".to_owned(),
            }),
        };
        EgressRow {
            policy: way.policy.key.name.to_string(),
            pod: pod.key.clone(),
            node: pod.node.to_owned(),
            gateway: way.gateway.map(|(node, _)| node.name.clone()),
            address,
            destinations: way.policy.destinations.clone(),
            excluded: way.policy.excluded.clone(),
        }
    }
}

fn selects_labels(pods: &EgressPods, labels: &IdentityLabels) -> bool {
    pods.namespaces.matches(&labels.namespace_labels) && pods.pods.matches_by(|key| labels.pod_label(key))
}

/// What each prefix that a policy names is for a pod: a way, or the ordinary one.
fn prefixes<'a, 'b>(ways: &'b [Way<'a>], is_ipv4: bool) -> BTreeMap<IpNet, Option<&'b Way<'a>>> {
    let is_family = |prefix: &&IpNet| prefix.addr().is_ipv4() == is_ipv4;
    let named = ways.iter().flat_map(|way| way.policy.destinations.iter().chain(&way.policy.excluded));
    let all = everything(is_ipv4);
    let partial = ways.iter().any(|way| way.policy.is_partial).then_some(&all);
    let named: BTreeSet<IpNet> = named.chain(partial).filter(is_family).map(IpNet::trunc).collect();
    named.into_iter().map(|prefix| (prefix, decide(ways, &prefix, &all))).collect()
}

fn everything(is_ipv4: bool) -> IpNet {
    let address: IpAddr = if is_ipv4 { [0, 0, 0, 0].into() } else { [0_u16; 8].into() };
    IpNet::new_assert(address, 0)
}

/// Of the policies that are about the whole prefix the one with the longest destination. In a policy the longest of
/// destinations and exclusions counts, and of equal ones the exclusion, as upstream's rows do.
fn decide<'a, 'b>(ways: &'b [Way<'a>], prefix: &IpNet, all: &IpNet) -> Option<&'b Way<'a>> {
    let longest =
        |cidrs: &[IpNet]| cidrs.iter().filter(|cidr| cidr.contains(prefix)).map(IpNet::prefix_len).max();
    let length = |way: &Way<'_>| {
        let partial = way.policy.is_partial.then(|| all.prefix_len()).filter(|_| all.contains(prefix));
        let named = longest(&way.policy.destinations).max(partial)?;
        (longest(&way.policy.excluded) < Some(named)).then_some(named)
    };
    // The first of equal ones: `max_by_key` takes the last.
    let found = ways.iter().rev().filter_map(|way| Some((length(way)?, way)));
    found.max_by_key(|(length, _)| *length).map(|(_, way)| way)
}
