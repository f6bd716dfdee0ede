//! What a row of `prefixes` says beside its identity: which node has the pods of a pod CIDR, and
//! whether what pods send there passes the node's netfilter.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::{has_ipv4, underlay_address};
use crate::model::{IdentityId, Node, PrefixEntry};
use crate::tables::Snapshot;

type Rows = Arc<BTreeMap<IpNet, PrefixEntry>>;
type Nodes = Snapshot<Arc<str>, Arc<Node>>;

/// Completes the rows that the policy compiler makes; remembers its last answer.
#[derive(Default)]
pub struct Prefixes {
    guarded: BTreeSet<IpNet>,
    compiled: Rows,
    nodes: Nodes,
    completed: Option<Rows>,
}

impl Prefixes {
    /// `guarded`: what pods reach through the node's netfilter.
    pub fn new(guarded: impl IntoIterator<Item = IpNet>) -> Self {
        Self { guarded: guarded.into_iter().map(|net| net.trunc()).collect(), ..Self::default() }
    }

    /// `compiled` with the owners of pod CIDRs and the guarded prefixes.
    pub fn update(&mut self, this_node: &str, compiled: &Rows, nodes: &Nodes) -> Rows {
        if let Some(completed) = &self.completed
            && Arc::ptr_eq(compiled, &self.compiled)
            && nodes.ptr_eq(&self.nodes)
        {
            return completed.clone();
        }
        let completed = Arc::new(complete(compiled, &self.guarded, &owners(this_node, nodes)));
        (self.compiled, self.nodes) = (compiled.clone(), nodes.clone());
        self.completed = Some(completed.clone());
        completed
    }
}

/// The node of each pod CIDR by its underlay address, `None` for this node's own; of two nodes with one
/// pod CIDR the one whose name sorts first.
fn owners(this_node: &str, nodes: &Nodes) -> BTreeMap<IpNet, Option<IpAddr>> {
    let has_ipv4 = has_ipv4(nodes, this_node);
    let mut owners = BTreeMap::new();
    for (name, node) in nodes {
        let underlay = underlay_address(node, has_ipv4).filter(|_| **name != *this_node);
        for cidr in &node.pod_cidrs {
            owners.entry(cidr.trunc()).or_insert(underlay);
        }
    }
    owners
}

/// The longest match decides in the kernel: each row says what the prefixes around it say, too.
fn complete(
    compiled: &BTreeMap<IpNet, PrefixEntry>,
    guarded: &BTreeSet<IpNet>,
    owners: &BTreeMap<IpNet, Option<IpAddr>>,
) -> BTreeMap<IpNet, PrefixEntry> {
    let nets: BTreeSet<IpNet> = compiled.keys().chain(guarded).copied().collect();
    let mut rows = BTreeMap::new();
    // Sorted: what contains a prefix stands before it.
    let mut around: Vec<(IpNet, PrefixEntry)> = Vec::new();
    for net in nets {
        while around.last().is_some_and(|(outer, _)| !outer.contains(&net)) {
            around.pop();
        }
        let outside = PrefixEntry { identity: IdentityId::WORLD, ..PrefixEntry::default() };
        let outer = around.last().map_or(outside, |(_, entry)| *entry);
        let own = compiled.get(&net).copied().unwrap_or(outer);
        let entry = PrefixEntry {
            node: owners.get(&net).copied().unwrap_or(outer.node),
            is_guarded: outer.is_guarded || guarded.contains(&net),
            ..own
        };
        rows.insert(net, entry);
        around.push((net, entry));
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().expect("a prefix")
    }

    fn node(name: &str, address: &str, pod_cidr: &str) -> (Arc<str>, Arc<Node>) {
        let node = Node {
            name: name.to_owned(),
            labels: Default::default(),
            addresses: vec![address.parse().expect("an address")],
            pod_cidrs: vec![net(pod_cidr)],
            is_leaving: false,
            is_unready: false,
        };
        (name.into(), Arc::new(node))
    }

    #[test]
    fn every_row_says_what_the_prefixes_around_it_say() {
        let nodes = [node("a", "192.0.2.1", "10.1.0.0/24"), node("b", "192.0.2.2", "10.1.1.0/24")];
        let entry = |identity, is_pod_cidr| PrefixEntry {
            identity: IdentityId(identity),
            is_pod_cidr,
            ..PrefixEntry::default()
        };
        let compiled: Rows = Arc::new(BTreeMap::from([
            (net("10.0.0.0/8"), entry(7, false)),
            (net("10.1.0.0/24"), entry(7, true)),
            (net("10.1.1.0/24"), entry(7, true)),
            (net("10.1.1.128/25"), entry(8, true)),
            (net("169.254.169.0/24"), entry(9, false)),
        ]));
        let guarded = ["169.254.0.0/16", "10.9.0.1/32", "fd00:ec2::254/128"].map(net);
        let mut prefixes = Prefixes::new(guarded);
        let nodes = nodes.into_iter().collect();
        let rows = prefixes.update("a", &compiled, &nodes);
        let of_b = |identity| PrefixEntry { node: "192.0.2.2".parse().ok(), ..entry(identity, true) };
        let is_guarded = |identity| PrefixEntry { is_guarded: true, ..entry(identity, false) };
        let expected = BTreeMap::from([
            (net("10.0.0.0/8"), entry(7, false)),
            (net("10.1.0.0/24"), entry(7, true)),
            (net("10.1.1.0/24"), of_b(7)),
            (net("10.1.1.128/25"), of_b(8)),
            (net("10.9.0.1/32"), is_guarded(7)),
            (net("169.254.0.0/16"), is_guarded(IdentityId::WORLD.0)),
            (net("169.254.169.0/24"), is_guarded(9)),
            (net("fd00:ec2::254/128"), is_guarded(IdentityId::WORLD.0)),
        ]);
        assert_eq!(*rows, expected);
        assert!(Arc::ptr_eq(&rows, &prefixes.update("a", &compiled, &nodes)));
    }
}
