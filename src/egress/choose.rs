//! Which gateway a pod has.

use std::sync::Arc;

use crate::model::{EgressGateway, EgressPolicy, Node, ObjectKey};
use crate::tables::Snapshot;

/// A gateway that is there, and the node that it is.
#[derive(Clone, Copy)]
pub struct Candidate<'a> {
    node: &'a Node,
    gateway: &'a EgressGateway,
    /// Of the node, and of the way out among those of the node.
    hashes: [u64; 2],
}

impl Candidate<'_> {
    /// True if the node has this name.
    pub fn is(&self, node: &str) -> bool {
        self.node.name == node
    }
}

/// The ways out of a policy that are there: of each the first node by name that is ready.
pub fn candidates<'a>(
    policy: &'a EgressPolicy,
    nodes: &'a Snapshot<Arc<str>, Arc<Node>>,
) -> Vec<Candidate<'a>> {
    let first = |gateway: &'a EgressGateway| {
        let is_ready =
            |node: &&Arc<Node>| !node.is_unready && !node.is_leaving && gateway.nodes.matches(&node.labels);
        let node = nodes.values().find(is_ready)?;
        let address = gateway.address.map(|address| address.to_string()).unwrap_or_default();
        let interface = gateway.interface.as_deref().unwrap_or_default();
        let hashes = [hash(&[&node.name]), hash(&[&address, interface])];
        Some(Candidate { node, gateway, hashes })
    };
    policy.gateways.iter().filter_map(first).collect()
}

/// The pod's, by rendezvous: as long as a pod's gateway is there, no other one's coming or going moves the pod, but for
/// those that a new one takes.
pub fn gateway<'a>(candidates: &[Candidate<'a>], pod: &ObjectKey) -> Option<(&'a Node, &'a EgressGateway)> {
    let pod = hash(&[&pod.namespace, &pod.name]);
    // By the node first: policies of both families that name the same nodes lead by the same one.
    let best = candidates.iter().max_by_key(|candidate| candidate.hashes.map(|hash| mix(hash ^ pod)));
    best.map(|candidate| (candidate.node, candidate.gateway))
}

/// FNV-1a: the same on every node and in every version.
fn hash(parts: &[&str]) -> u64 {
    let bytes = parts.iter().flat_map(|part| part.bytes().chain([0xff]));
    mix(bytes
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)))
}

/// Every bit of the outcome depends on every bit of the number.
fn mix(number: u64) -> u64 {
    let mut mixed = number;
    for factor in [0xff51_afd7_ed55_8ccd_u64, 0xc4ce_b9fe_1a85_ec53] {
        mixed = (mixed ^ (mixed >> 33)).wrapping_mul(factor);
    }
    mixed ^ (mixed >> 33)
}
