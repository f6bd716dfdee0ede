//! The policy compiler against the model: compiled rows are asked exactly as the kernel
//! asks the maps, for random clusters, and along random histories of changes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use proptest::prelude::*;
use weir::identity::{self, LabelFilter};
use weir::model::{
    Action, AddressKind, BaseAddress, CompiledDirection, EndpointId, IdentityId, IdentityLabels,
    LocalIdentity, Namespace, Policy, PolicyId, PolicyRef,
};
use weir::policy::{Compiler, Input, Output};
use weir::tables::Snapshot;

use crate::model::{Cluster, ClusterPod, Payload, Side, random};

/// What the compilers of one node are given.
pub struct Facts {
    policies: Snapshot<PolicyRef, Arc<Policy>>,
    identities: Snapshot<IdentityId, Arc<IdentityLabels>>,
    /// The pods of this node.
    pub endpoints: BTreeMap<EndpointId, IdentityId>,
    /// Who has which address.
    pub addresses: Snapshot<IpAddr, BaseAddress>,
    pod_cidrs: Vec<IpNet>,
}

impl Facts {
    /// What the node with this number knows of a cluster.
    pub fn new(cluster: &Cluster, node: usize) -> Self {
        let mut facts = Self {
            policies: cluster
                .policies
                .iter()
                .map(|policy| (policy.reference.clone(), Arc::new(policy.clone())))
                .collect(),
            identities: Snapshot::new(),
            endpoints: BTreeMap::new(),
            addresses: Snapshot::new(),
            pod_cidrs: random::pod_cidrs(),
        };
        for (index, pod) in cluster.pods.iter().enumerate() {
            let namespace = &cluster.namespaces[&*pod.pod.key.namespace];
            let labels = LabelFilter::default().labels_of(
                &pod.pod,
                Some(&Namespace { labels: namespace.clone(), is_partial: false, ..Namespace::default() }),
                &Default::default(),
            );
            let id = identity::number(&labels, 0);
            facts.identities.insert(id, Arc::new(labels));
            let endpoint = (pod.node == node).then_some(EndpointId(index as u16 + 1));
            facts.endpoints.extend(endpoint.map(|endpoint| (endpoint, id)));
            for address in pod.addresses {
                let entry = BaseAddress { identity: id, node: None, endpoint, kind: AddressKind::Pod };
                facts.addresses.insert(address, entry);
            }
        }
        for address in &cluster.nodes {
            let (identity, kind) = (IdentityId::REMOTE_NODE, AddressKind::Node);
            facts.addresses.insert(*address, BaseAddress { identity, node: None, endpoint: None, kind });
        }
        facts
    }

    /// Compiles it all.
    pub fn compile(&self, compiler: &mut Compiler) -> Output {
        let input = Input {
            policies: &self.policies,
            identities: &self.identities,
            endpoints: &self.endpoints,
            audited: &Default::default(),
            shown: &Default::default(),
            host: &Default::default(),
            addresses: &self.addresses,
            pod_cidrs: &self.pod_cidrs,
            heard: &Default::default(),
        };
        compiler.compile(&input).expect("numbers are left")
    }
}

/// One that knows nothing yet.
pub fn compiler() -> Compiler {
    Compiler::new(PolicyId(1), IdentityId::FIRST_LOCAL, Arc::default())
}

/// Looks up an address as the datapath does: exactly, else by the longest prefix over
/// 128 bits with IPv4 mapped, else it is the world's.
fn identity_of(output: &Output, address: IpAddr) -> IdentityId {
    if let Some(entry) = output.addresses.get(&address) {
        return entry.identity;
    }
    let mapped = |address: IpAddr| match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().to_bits(),
        IpAddr::V6(address) => address.to_bits(),
    };
    let length = |net: &IpNet| u32::from(net.prefix_len()) + if net.addr().is_ipv4() { 96 } else { 0 };
    let is_match =
        |net: &IpNet| length(net) == 0 || (mapped(net.addr()) ^ mapped(address)) >> (128 - length(net)) == 0;
    let longest = output.prefixes.iter().filter(|(net, _)| is_match(net)).max_by_key(|(net, _)| length(net));
    longest.map_or(IdentityId::WORLD, |(_, entry)| entry.identity)
}

/// The kernel's two lookups: peer to class in the hash, then the longest match of the trie.
fn verdict(direction: &CompiledDirection, peer: IdentityId, payload: Payload, is_ipv4: bool) -> bool {
    let class = direction.peers.get(&peer).copied().unwrap_or(0);
    let (protocol, port) = payload.numbers(is_ipv4);
    let is_match = |key: &&weir::model::CompiledRuleKey| {
        key.class == class
            && key.protocol.is_none_or(|known| known == protocol)
            && u32::from(key.port ^ port) >> (16 - key.port_prefix_length) == 0
    };
    let length = |key: &&weir::model::CompiledRuleKey| match key.protocol {
        None => 72,
        Some(_) => 80 + key.port_prefix_length,
    };
    let longest = direction.rules.keys().filter(is_match).max_by_key(length);
    longest.is_some_and(|key| direction.rules[key].action == Action::Allow)
}

/// What the rows of both ends' nodes say of a packet.
pub fn is_delivered(
    outputs: &[Output; 2],
    cluster: &Cluster,
    from: Side,
    to: Side,
    payload: Payload,
) -> bool {
    let policy_of = |pod: &ClusterPod| {
        let index = cluster.pods.iter().position(|known| known.pod.key == pod.pod.key).expect("a pod of it");
        let output = &outputs[pod.node];
        let id = output.of_endpoint[&EndpointId(index as u16 + 1)];
        (output, output.policies.get(&id))
    };
    let egress = from.pod.is_none_or(|pod| {
        let (output, policy) = policy_of(pod);
        let direction = policy.and_then(|policy| policy.egress.as_ref());
        direction.is_none_or(|direction| {
            verdict(direction, identity_of(output, to.address), payload, to.address.is_ipv4())
        })
    });
    let ingress = to.pod.is_none_or(|pod| {
        let (output, policy) = policy_of(pod);
        let direction = policy.and_then(|policy| policy.ingress.as_ref());
        direction.is_none_or(|direction| {
            verdict(direction, identity_of(output, from.address), payload, to.address.is_ipv4())
        })
    });
    egress && ingress
}

/// Asks for every pair of ends and every payload.
pub fn compare(outputs: &[Output; 2], cluster: &Cluster) -> Result<(), TestCaseError> {
    for is_ipv4 in [true, false] {
        let sides = cluster.sides(is_ipv4);
        for from in &sides {
            for to in sides.iter().filter(|to| to.address != from.address) {
                for payload in random::payloads() {
                    prop_assert_eq!(
                        is_delivered(outputs, cluster, *from, *to, payload),
                        cluster.allows(*from, *to, payload),
                        "{} -> {}, {:?}",
                        from.address,
                        to.address,
                        payload
                    );
                }
            }
        }
    }
    Ok(())
}

/// What may change under one number: nothing but new classes and peers (K4).
fn check_stable(before: &Output, after: &Output, facts: [&Facts; 2]) -> Result<(), TestCaseError> {
    for (id, old) in &before.policies {
        let Some(new) = after.policies.get(id) else { continue };
        for (old, new) in [(&old.ingress, &new.ingress), (&old.egress, &new.egress)] {
            prop_assert_eq!(old.is_some(), new.is_some());
            let Some((old, new)) = old.as_ref().zip(new.as_ref()) else { continue };
            for (key, rule) in &old.rules {
                prop_assert_eq!(new.rules.get(key), Some(rule), "a row of policy {:?} changed", id);
            }
            let classes: BTreeSet<u32> = old.rules.keys().map(|key| key.class).collect();
            let added = new.rules.keys().filter(|key| !old.rules.contains_key(*key));
            for key in added {
                prop_assert!(!classes.contains(&key.class), "a row was added to a class of {:?}", id);
            }
            for peer in old.peers.keys().chain(new.peers.keys()) {
                let base = |output: &Output| match output.local_identities.get(peer) {
                    Some(local) => local.base,
                    None => (!peer.is_local()).then_some(*peer),
                };
                let is_there = |output: &Output, facts: &Facts| {
                    (!peer.is_local() || output.local_identities.contains_key(peer))
                        && base(output)
                            .is_none_or(|base| facts.identities.contains_key(&base) || base.is_reserved())
                };
                if is_there(before, facts[0]) && is_there(after, facts[1]) {
                    prop_assert_eq!(old.peers.get(peer), new.peers.get(peer), "class of {:?}", peer);
                }
            }
        }
    }
    Ok(())
}

/// One change of a cluster.
#[derive(Clone, Debug)]
enum Step {
    Replace(usize, Box<Cluster>),
    DropPolicy(usize),
    DropPod(usize),
    Everything(Box<Cluster>),
}

fn step() -> impl Strategy<Value = Step> {
    let other = || random::cluster().prop_map(Box::new);
    prop_oneof![
        6 => (0_usize..4, other()).prop_map(|(what, cluster)| Step::Replace(what, cluster)),
        1 => (0_usize..5).prop_map(Step::DropPolicy),
        1 => (0_usize..6).prop_map(Step::DropPod),
        1 => other().prop_map(Step::Everything),
    ]
}

fn take(cluster: &mut Cluster, step: Step) {
    match step {
        // Some part from another random cluster.
        Step::Replace(0, other) => {
            let Some(pod) = other.pods.into_iter().next_back() else { return };
            match cluster.pods.iter_mut().find(|known| known.addresses == pod.addresses) {
                Some(known) => *known = pod,
                None => cluster.pods.push(pod),
            }
        }
        Step::Replace(1, other) => cluster.namespaces = other.namespaces,
        Step::Replace(_, other) => {
            let Some(policy) = other.policies.into_iter().next_back() else { return };
            cluster.policies.retain(|known| known.reference != policy.reference);
            cluster.policies.push(policy);
        }
        Step::DropPolicy(index) if index < cluster.policies.len() => drop(cluster.policies.remove(index)),
        Step::DropPod(index) if index < cluster.pods.len() => drop(cluster.pods.remove(index)),
        Step::DropPolicy(_) | Step::DropPod(_) => {}
        Step::Everything(other) => *cluster = *other,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(256), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn compiled_rows_say_what_the_specification_says(cluster in random::cluster()) {
        let outputs = [0, 1].map(|node| Facts::new(&cluster, node).compile(&mut compiler()));
        compare(&outputs, &cluster)?;
    }

    #[test]
    fn compiled_rows_say_what_tiers_denies_and_passes_say(cluster in random::tiered_cluster()) {
        let outputs = [0, 1].map(|node| Facts::new(&cluster, node).compile(&mut compiler()));
        compare(&outputs, &cluster)?;
    }

    #[test]
    fn compiled_rows_say_what_peers_and_messages_of_cilium_say(cluster in random::cilium_cluster()) {
        let outputs = [0, 1].map(|node| Facts::new(&cluster, node).compile(&mut compiler()));
        compare(&outputs, &cluster)?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(64), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn changes_end_where_a_fresh_start_would(first in random::cluster(), steps in prop::collection::vec(step(), 1..6)) {
        let mut cluster = first;
        let mut compilers = [compiler(), compiler()];
        let mut facts = [0, 1].map(|node| Facts::new(&cluster, node));
        let mut outputs = [0, 1].map(|node: usize| facts[node].compile(&mut compilers[node]));
        let mut meanings: [BTreeMap<IdentityId, LocalIdentity>; 2] = Default::default();
        for step in steps {
            take(&mut cluster, step);
            let new_facts = [0, 1].map(|node| Facts::new(&cluster, node));
            let new_outputs = [0, 1].map(|node: usize| new_facts[node].compile(&mut compilers[node]));
            compare(&new_outputs, &cluster)?;
            for node in [0, 1] {
                check_stable(&outputs[node], &new_outputs[node], [&facts[node], &new_facts[node]])?;
                for (id, local) in new_outputs[node].local_identities.iter() {
                    let known = meanings[node].entry(*id).or_insert_with(|| local.clone());
                    prop_assert_eq!(&*known, local);
                }
            }
            (facts, outputs) = (new_facts, new_outputs);
        }
    }
}

/// PROPTEST_CASES overrides.
pub fn cases(default: u32) -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// The generator's manifests are what a user would write: the source reads the same
/// namespaces and policies from them.
#[tokio::test]
async fn manifests_of_random_clusters_read_back() {
    for seed in 0..20 {
        let cluster = random::sample(seed);
        let directory = tempfile::tempdir().expect("making a directory");
        let documents: Vec<String> =
            random::manifests(&cluster).iter().map(serde_json::Value::to_string).collect();
        std::fs::write(directory.path().join("cluster.yaml"), documents.join("\n---\n")).expect("writing it");
        let tables = Arc::new(weir::kube::Tables::new());
        let source = weir::kube::Source::Manifests(directory.path().to_owned());
        tokio::select! {
            () = weir::kube::run(source, tables.clone(), Arc::default()) => unreachable!("it never returns"),
            () = tables.wait_synced() => {}
        }
        let facts = Facts::new(&cluster, 0);
        assert_eq!(tables.policies.snapshot(), facts.policies, "seed {seed}");
        let namespaces = tables.namespaces.snapshot();
        for (name, labels) in &cluster.namespaces {
            let mut labels = labels.clone();
            labels.insert("kubernetes.io/metadata.name".to_owned(), name.clone());
            assert_eq!(namespaces.get(&**name).map(|namespace| &namespace.labels), Some(&labels));
        }
    }
}
