//! Who has which address: pods and nodes, from Node objects, what nodes publish, and
//! this node's own endpoints.
//!
//! Every address has one owner. What this node knows of itself comes first, then Node
//! objects, then what other nodes claim within their pod CIDRs. A claim on any other address is not
//! believed: a node could take the traffic of everybody to it, a host of the Internet included. Where a setting
//! allows such claims, they come last. Of equal claims the one of the node whose name sorts first
//! is believed. The claim that lost is reported.
//!
//! [`addresses`] says who has what; [`Addresses`] says the same again and again at the cost
//! of what changed.

mod prefixes;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use imbl::ordmap::DiffItem;
use serde::Serialize;

use crate::model::{
    AddressKind, BaseAddress, Endpoint, EndpointId, IdentityId, Node, NodeEndpoints, ObjectKey,
};
use crate::tables::Snapshot;

pub use prefixes::Prefixes;

/// What addresses come from.
pub struct Input<'a> {
    /// This node's name.
    pub this_node: &'a str,
    /// This node's own addresses in the pod network.
    pub internal_addresses: &'a [IpAddr],
    /// The addresses that this node's devices have, listed by its Node object or not: no service's.
    pub device_addresses: &'a BTreeSet<IpAddr>,
    /// This node's pods whose identity is known; none of a pod that has ended.
    pub endpoints: &'a BTreeMap<EndpointId, (Arc<Endpoint>, IdentityId)>,
    /// Every node.
    pub nodes: &'a Snapshot<Arc<str>, Arc<Node>>,
    /// What every node publishes; this node's own is not read.
    pub node_endpoints: &'a Snapshot<Arc<str>, Arc<NodeEndpoints>>,
    /// Believe claims on addresses outside of the node's pod CIDRs where nobody else claims them.
    pub believes_any_address: bool,
}

/// Every known address, and what could not be believed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Output {
    /// One owner an address.
    pub addresses: Snapshot<IpAddr, BaseAddress>,
    /// Claims that lost or make no sense, in order of address.
    pub conflicts: Vec<Conflict>,
}

/// A claim that was not believed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Conflict {
    /// The address.
    pub address: IpAddr,
    /// The node whose claim was not believed.
    pub node: Arc<str>,
    /// The pod that it would have been.
    pub pod: Option<ObjectKey>,
    /// Why.
    pub reason: ConflictReason,
}

/// Why a claim was not believed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum ConflictReason {
    /// That node has it.
    OwnedBy(Arc<str>),
    /// The claimed identity is reserved or another node's own.
    ForeignIdentity(IdentityId),
    /// The address is in none of the node's pod CIDRs: whoever has it does not have it from there.
    OutsidePodCidrs,
}

/// Who has which address. Nodes without a Node object or without an address on the
/// underlay cannot be reached: nothing of theirs is there.
pub fn addresses(input: &Input<'_>) -> Output {
    let mut claims = Claims::new(input);
    let this_node: Arc<str> = input.this_node.into();
    if let Some(node) = input.nodes.get(input.this_node) {
        for address in &node.addresses {
            let entry = own(IdentityId::HOST, None, AddressKind::Node);
            claims.claim(*address, Rank::Own, &this_node, None, entry);
        }
    }
    for address in input.internal_addresses {
        let entry = own(IdentityId::HOST, None, AddressKind::NodeInternal);
        claims.claim(*address, Rank::Own, &this_node, None, entry);
    }
    for address in input.device_addresses {
        let entry = own(IdentityId::HOST, None, AddressKind::Node);
        claims.claim(*address, Rank::Own, &this_node, None, entry);
    }
    for (id, (endpoint, identity)) in input.endpoints {
        claims.claim_own(&this_node, *id, endpoint, *identity);
    }
    for (name, node) in input.nodes.iter().filter(|(name, _)| ***name != *input.this_node) {
        let Some(underlay) = input.underlay_of(node) else { continue };
        for address in &node.addresses {
            let entry = remote(underlay, IdentityId::REMOTE_NODE, AddressKind::Node);
            claims.claim(*address, Rank::NodeObject, name, None, entry);
        }
        if let Some(published) = input.node_endpoints.get(name) {
            claims.claim_remote(name, node, underlay, published);
        }
    }
    claims.conflicts.sort_unstable();
    Output {
        addresses: claims.owners.into_iter().map(|(address, owner)| (address, owner.entry)).collect(),
        conflicts: claims.conflicts,
    }
}

/// Remembers its last answer, and works out differences.
#[derive(Default)]
pub struct Addresses {
    output: Output,
    /// Addresses with more than one claim, or with one that makes no sense.
    contested: BTreeSet<IpAddr>,
    internal_addresses: Vec<IpAddr>,
    device_addresses: BTreeSet<IpAddr>,
    endpoints: BTreeMap<EndpointId, (Arc<Endpoint>, IdentityId)>,
    nodes: Snapshot<Arc<str>, Arc<Node>>,
    node_endpoints: Snapshot<Arc<str>, Arc<NodeEndpoints>>,
}

impl Addresses {
    /// What [`addresses`] says for `input`; one `Addresses` serves one node.
    pub fn update(&mut self, input: &Input<'_>) -> &Output {
        match self.difference(input) {
            Some(addresses) => self.output.addresses = addresses,
            None => {
                self.output = addresses(input);
                let contested = self.output.conflicts.iter().map(|conflict| conflict.address.to_canonical());
                self.contested = contested.collect();
            }
        }
        self.internal_addresses = input.internal_addresses.to_vec();
        self.device_addresses.clone_from(input.device_addresses);
        self.endpoints.clone_from(input.endpoints);
        self.nodes = input.nodes.clone();
        self.node_endpoints = input.node_endpoints.clone();
        &self.output
    }

    /// The addresses with what pods changed; `None` where more than pods did, or where an address
    /// that changed hands has, had or gets another claim: then all claims have to be weighed again.
    fn difference(&self, input: &Input<'_>) -> Option<Snapshot<IpAddr, BaseAddress>> {
        // Whether a node is ready says nothing of addresses.
        let is_alike = |item| match item {
            DiffItem::Update { old: (_, old), new: (_, new) } => {
                let (old, new): (&Arc<Node>, &Arc<Node>) = (old, new);
                Node { is_unready: new.is_unready, ..Node::clone(old) } == **new
            }
            _ => false,
        };
        if !(self.nodes.ptr_eq(input.nodes) || self.nodes.diff(input.nodes).all(is_alike))
            || self.internal_addresses != input.internal_addresses
            || self.device_addresses != *input.device_addresses
        {
            return None;
        }
        let (mut before, mut after) = (Claims::new(input), Claims::new(input));
        for item in self.node_endpoints.diff(input.node_endpoints) {
            let (old, new) = match item {
                DiffItem::Add(name, new) => (None, Some((name, new))),
                DiffItem::Update { old, new } => (Some(old), Some(new)),
                DiffItem::Remove(name, old) => (Some((name, old)), None),
            };
            for (claims, published) in [(&mut before, old), (&mut after, new)] {
                let Some((name, published)) = published else { continue };
                let Some(node) = input.nodes.get(name).filter(|_| **name != *input.this_node) else {
                    continue;
                };
                let Some(underlay) = input.underlay_of(node) else { continue };
                claims.claim_remote(name, node, underlay, published);
            }
        }
        let this_node: Arc<str> = input.this_node.into();
        for (claims, endpoints, others) in
            [(&mut before, &self.endpoints, input.endpoints), (&mut after, input.endpoints, &self.endpoints)]
        {
            for (id, (endpoint, identity)) in endpoints {
                if others.get(id) != Some(&(endpoint.clone(), *identity)) {
                    claims.claim_own(&this_node, *id, endpoint, *identity);
                }
            }
        }
        let is_contested = |address| self.contested.contains(address);
        if !before.conflicts.is_empty()
            || !after.conflicts.is_empty()
            || before.owners.keys().chain(after.owners.keys()).any(is_contested)
        {
            return None;
        }
        let is_same = |claims: &Claims, address, owner: &Owner| {
            claims.owners.get(address).is_some_and(|other| other.entry == owner.entry)
        };
        let mut addresses = self.output.addresses.clone();
        for (address, owner) in
            before.owners.iter().filter(|(address, owner)| !is_same(&after, address, owner))
        {
            if addresses.remove(address).as_ref() != Some(&owner.entry) {
                return None;
            }
        }
        for (address, owner) in
            after.owners.iter().filter(|(address, owner)| !is_same(&before, address, owner))
        {
            if addresses.insert(*address, owner.entry.clone()).is_some() {
                return None;
            }
        }
        Some(addresses)
    }
}

impl Input<'_> {
    fn underlay_of(&self, node: &Node) -> Option<IpAddr> {
        underlay_of(node, self.nodes, self.this_node)
    }
}

/// Where `this_node` sends to what is for `node`.
pub fn underlay_of(node: &Node, nodes: &Snapshot<Arc<str>, Arc<Node>>, this_node: &str) -> Option<IpAddr> {
    underlay_address(node, has_ipv4(nodes, this_node))
}

/// False if `this_node` is known to have no IPv4.
fn has_ipv4(nodes: &Snapshot<Arc<str>, Arc<Node>>, this_node: &str) -> bool {
    nodes.get(this_node).is_none_or(|node| node.addresses.iter().any(IpAddr::is_ipv4))
}

fn own(identity: IdentityId, endpoint: Option<EndpointId>, kind: AddressKind) -> BaseAddress {
    BaseAddress { identity, node: None, endpoint, kind }
}

fn remote(underlay: IpAddr, identity: IdentityId, kind: AddressKind) -> BaseAddress {
    BaseAddress { identity, node: Some(underlay), endpoint: None, kind }
}

/// Where to send what is for `node`: by IPv4 where both ends have it.
pub fn underlay_address(node: &Node, has_ipv4: bool) -> Option<IpAddr> {
    let of_family = |is_ipv4: bool| node.addresses.iter().copied().find(|a| a.is_ipv4() == is_ipv4);
    if has_ipv4 { of_family(true).or_else(|| of_family(false)) } else { of_family(false) }
}

/// How much a claim is believed: the first is believed most.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    Own,
    NodeObject,
    InPodCidr,
    Elsewhere,
}

struct Owner {
    rank: Rank,
    node: Arc<str>,
    pod: Option<ObjectKey>,
    entry: BaseAddress,
}

#[derive(Default)]
struct Claims {
    owners: BTreeMap<IpAddr, Owner>,
    conflicts: Vec<Conflict>,
    believes_any_address: bool,
}

impl Claims {
    fn new(input: &Input<'_>) -> Self {
        Self { believes_any_address: input.believes_any_address, ..Self::default() }
    }

    fn claim_own(&mut self, this_node: &Arc<str>, id: EndpointId, endpoint: &Endpoint, identity: IdentityId) {
        for address in endpoint.addresses() {
            let entry = own(identity, Some(id), AddressKind::Pod);
            self.claim(address, Rank::Own, this_node, Some(&endpoint.pod), entry);
        }
    }

    /// What a node publishes.
    fn claim_remote(&mut self, name: &Arc<str>, node: &Node, underlay: IpAddr, published: &NodeEndpoints) {
        let rank = |address: &IpAddr| {
            let is_inside = node.pod_cidrs.iter().any(|cidr| cidr.contains(&address.to_canonical()));
            if is_inside { Rank::InPodCidr } else { Rank::Elsewhere }
        };
        for address in &published.internal_addresses {
            let entry = remote(underlay, IdentityId::REMOTE_NODE, AddressKind::NodeInternal);
            self.claim(*address, rank(address), name, None, entry);
        }
        for endpoint in &published.endpoints {
            for address in &endpoint.addresses {
                if endpoint.identity.is_reserved() || endpoint.identity.is_local() {
                    let reason = ConflictReason::ForeignIdentity(endpoint.identity);
                    let (node, pod) = (name.clone(), Some(endpoint.pod.clone()));
                    self.conflicts.push(Conflict { address: *address, node, pod, reason });
                    continue;
                }
                let entry = remote(underlay, endpoint.identity, AddressKind::Pod);
                self.claim(*address, rank(address), name, Some(&endpoint.pod), entry);
            }
        }
    }

    /// Claims come in the order of node names: of equal rank the first stays.
    fn claim(
        &mut self,
        address: IpAddr,
        rank: Rank,
        node: &Arc<str>,
        pod: Option<&ObjectKey>,
        entry: BaseAddress,
    ) {
        // The maps hold IPv4 as mapped IPv6: both spellings are one address.
        let address = address.to_canonical();
        if rank == Rank::Elsewhere && !self.believes_any_address {
            let (node, pod, reason) = (node.clone(), pod.cloned(), ConflictReason::OutsidePodCidrs);
            self.conflicts.push(Conflict { address, node, pod, reason });
            return;
        }
        let new = Owner { rank, node: node.clone(), pod: pod.cloned(), entry };
        let loser = match self.owners.get_mut(&address) {
            None => {
                self.owners.insert(address, new);
                return;
            }
            Some(old) if new.rank < old.rank => std::mem::replace(old, new),
            Some(_) => new,
        };
        let owner = &self.owners[&address];
        if loser.node != owner.node || loser.pod != owner.pod {
            let reason = ConflictReason::OwnedBy(owner.node.clone());
            self.conflicts.push(Conflict { address, node: loser.node, pod: loser.pod, reason });
        }
    }
}
