//! Random small clusters: few labels, ports and prefixes, so that rules meet often.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use proptest::collection::{btree_map, btree_set, vec};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use serde_json::{Value, json};
use weir::model::{
    Action, Entity, IpProtocol, Labels, NamedPort, ObjectKey, Peer, Pod, Policy, PolicyDirection, PolicyKind,
    PolicyRef, PolicyRule, PortMatch, PortSelector, Protocol, Requirement, Selector, Subject, Tier,
};

use super::{Cluster, ClusterPod, Payload};

const NAMESPACES: [&str; 3] = ["red", "green", "blue"];
const PROTOCOLS: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
const PORTS: [u16; 6] = [53, 80, 81, 443, 8080, 8081];
const PORT_NAMES: [&str; 2] = ["http", "dns"];

/// Every prefix that a rule may name, wider ones first, by family.
const BLOCKS: [&[&str]; 2] = [
    &["0.0.0.0/0", "10.0.0.0/8", "10.0.0.0/23", "10.0.0.0/24", "10.0.1.0/24", "10.0.1.2/31", "10.0.0.3/32"],
    &["::/0", "fd00::/16", "fd00:0:0:1::/64", "fd00::/64", "fd00::2/127", "2001:db8::/32"],
];
const ELSEWHERE: [&[&str]; 2] =
    [&["203.0.113.0/24", "192.168.0.0/24", "192.168.0.7/32"], &["2001:db8::/64", "fd77::7/128"]];

/// Each packet that is worth a look: every port and its neighbours, and ICMP.
pub fn payloads() -> Vec<Payload> {
    let ports = PORTS.iter().flat_map(|port| [port - 1, *port, port + 1]).chain([1, 65535]);
    let ports: BTreeSet<u16> = ports.collect();
    let of_protocol = |protocol| ports.iter().map(move |port| Payload::Port(protocol, *port));
    let mut payloads: Vec<Payload> = of_protocol(Protocol::Tcp)
        .chain(of_protocol(Protocol::Udp))
        .chain(of_protocol(Protocol::Sctp))
        .collect();
    payloads.extend([Payload::Icmp, Payload::OtherQuery]);
    payloads
}

/// The pod CIDRs of the two nodes that run the pods.
pub fn pod_cidrs() -> Vec<IpNet> {
    ["10.0.0.0/24", "10.0.1.0/24", "fd00::/64", "fd00:0:0:1::/64"].map(net).into()
}

/// A cluster that depends on nothing but `seed`.
pub fn sample(seed: u64) -> Cluster {
    sample_of(cluster(), seed)
}

/// The same of Cilium's kinds and every tier.
pub fn sample_of_cilium(seed: u64) -> Cluster {
    sample_of(cilium_cluster(), seed)
}

fn sample_of(clusters: impl Strategy<Value = Cluster>, seed: u64) -> Cluster {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let random = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let mut runner = TestRunner::new_with_rng(Config::default(), random);
    clusters.new_tree(&mut runner).expect("the strategies refuse nothing").current()
}

/// Random clusters with two nodes, two to six pods and up to five policies.
pub fn cluster() -> impl Strategy<Value = Cluster> {
    let namespaces = vec(labels(), NAMESPACES.len());
    (namespaces, vec(pod(), 2..=6), vec(policy(), 0..=5)).prop_map(|(labels, pods, policies)| Cluster {
        namespaces: NAMESPACES.map(str::to_owned).into_iter().zip(labels).collect(),
        pods: pods.into_iter().enumerate().map(|(index, pod)| place(index, pod)).collect(),
        nodes: vec![address("192.168.0.7"), address("fd77::7")],
        own: Vec::new(),
        outside: vec![
            address("203.0.113.9"),
            address("192.168.0.99"),
            address("10.9.9.9"),
            address("2001:db8::9"),
            address("2001:db8:9::9"),
        ],
        policies: policies.into_iter().enumerate().map(|(index, policy)| name(index, policy)).collect(),
    })
}

/// Pods alternate between the nodes; their addresses follow from their place.
fn place(index: usize, (namespace, labels, named_ports): (&str, Labels, Ports)) -> ClusterPod {
    let node = index % 2;
    let (third, last) = (node as u8, index as u8 + 2);
    let pod = Pod {
        key: ObjectKey::new(namespace, format!("pod-{index}")),
        uid: String::new(),
        labels,
        service_account: "default".to_owned(),
        node: Some(format!("node-{node}")),
        host_network: false,
        is_terminal: false,
        is_ready: true,
        named_ports,
        marks: Default::default(),
        workload: None,
    };
    let addresses = [
        IpAddr::V4(Ipv4Addr::new(10, 0, third, last)),
        IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, u16::from(third), 0, 0, 0, u16::from(last))),
    ];
    ClusterPod { pod, addresses, node }
}

fn name(index: usize, mut policy: Policy) -> Policy {
    policy.reference.name = format!("policy-{index}").into();
    policy
}

/// The same with policies of every tier, with denies and passes, in namespaces and of the cluster.
pub fn tiered_cluster() -> impl Strategy<Value = Cluster> {
    let tier = prop_oneof![2 => Just(Tier::Namespaced), 1 => Just(Tier::Admin), 1 => Just(Tier::Baseline)];
    let action = prop_oneof![3 => Just(Action::Allow), 2 => Just(Action::Deny), 1 => Just(Action::Pass)];
    let change = (tier, any::<bool>(), any::<bool>(), namespace_selector(), vec(action, 4));
    let priorities = Just((0..5).collect::<Vec<u32>>()).prop_shuffle();
    (cluster(), vec(change, 5), priorities).prop_map(|(mut cluster, changes, priorities)| {
        let changes = changes.into_iter().zip(priorities);
        for (policy, ((tier, is_of_cluster, isolates, selected, actions), priority)) in
            cluster.policies.iter_mut().zip(changes)
        {
            policy.tier = tier;
            if tier.is_ordered() {
                policy.priority = priority;
            }
            if is_of_cluster || tier.is_ordered() {
                policy.reference.kind = PolicyKind::ClusterNetworkPolicy;
                policy.reference.namespace = None;
                let Subject::Pods { namespaces, .. } = &mut policy.subject else { continue };
                *namespaces = selected;
            }
            let mut actions = actions.into_iter();
            for direction in policy.ingress.iter_mut().chain(&mut policy.egress) {
                let isolates = isolates && !tier.is_ordered();
                direction.default = if isolates { Action::Deny } else { Action::Pass };
                for (rule, action) in direction.rules.iter_mut().zip(&mut actions) {
                    let is_known = tier.is_ordered() || action != Action::Pass;
                    rule.action = if is_known { action } else { Action::Deny };
                }
            }
        }
        cluster
    })
}

/// The same with the peers and the messages that Cilium's kinds name.
pub fn cilium_cluster() -> impl Strategy<Value = Cluster> {
    let more = (option::of(vec(cilium_peer(), 1..=2)), option::of(message()));
    (tiered_cluster(), vec(more, 20)).prop_map(|(mut cluster, more)| {
        let mut more = more.into_iter();
        for policy in &mut cluster.policies {
            for direction in policy.ingress.iter_mut().chain(&mut policy.egress) {
                for (rule, (peers, message)) in direction.rules.iter_mut().zip(&mut more) {
                    if let Some(peers) = peers {
                        rule.peers.get_or_insert_default().extend(peers);
                    }
                    if let Some(ports) = &mut rule.ports {
                        ports.extend(message);
                    }
                }
            }
        }
        cluster
    })
}

fn cilium_peer() -> impl Strategy<Value = Peer> {
    let outside = block().prop_map(|block| match block {
        Peer::Block { cidr, except } => Peer::Outside { cidr, except },
        other => other,
    });
    let entities =
        [Entity::World, Entity::Cluster, Entity::Host, Entity::RemoteNode, Entity::Nobody].map(Peer::Entity);
    let nodes = ["192.168.0.7/32", "fd77::7/128"].map(net).to_vec();
    prop_oneof![
        2 => outside,
        2 => select(entities.to_vec()),
        1 => subsequence(nodes, 0..=2).prop_map(|nodes| Peer::NodeAddresses(nodes.into_iter().collect())),
    ]
}

/// An echo request, another message, all of ICMP, all of a protocol that has no ports.
fn message() -> impl Strategy<Value = PortMatch> {
    let one = |protocol, kind| PortMatch { protocol, port: PortSelector::Range(kind, kind) };
    let all = |protocol| PortMatch { protocol, port: PortSelector::Any };
    let (four, six) = (IpProtocol::ICMP, IpProtocol::ICMPV6);
    select(vec![
        one(four, 8),
        one(six, 128),
        one(four, 13),
        one(six, 160),
        all(four),
        all(six),
        all(IpProtocol(47)),
    ])
}

type Ports = BTreeMap<String, Vec<NamedPort>>;

fn pod() -> impl Strategy<Value = (&'static str, Labels, Ports)> {
    let named = (select(&PROTOCOLS[..]), select(&PORTS[..]))
        .prop_map(|(protocol, port)| NamedPort { protocol, port });
    let ports = btree_map(select(&PORT_NAMES[..]).prop_map(str::to_owned), vec(named, 1..=2), 0..=2);
    let labels = (labels(), option::of("[a-f]{4}")).prop_map(|(mut labels, hash)| {
        labels.extend(hash.map(|hash| ("pod-template-hash".to_owned(), hash)));
        labels
    });
    (select(&NAMESPACES[..]), labels, ports)
}

fn labels() -> impl Strategy<Value = Labels> {
    btree_map(key(), value(), 0..=2)
}

fn key() -> impl Strategy<Value = String> {
    select(&["app", "tier"][..]).prop_map(str::to_owned)
}

fn value() -> impl Strategy<Value = String> {
    select(&["a", "b", "c"][..]).prop_map(str::to_owned)
}

fn selector() -> impl Strategy<Value = Selector> {
    let values = || btree_set(value(), 1..=2);
    let requirement = prop_oneof![
        4 => (key(), values()).prop_map(|(key, values)| Requirement::In(key, values)),
        1 => (key(), values()).prop_map(|(key, values)| Requirement::NotIn(key, values)),
        1 => key().prop_map(Requirement::Exists),
        1 => key().prop_map(Requirement::DoesNotExist),
    ];
    prop_oneof![
        2 => Just(Selector::default()),
        3 => vec(requirement, 1..=2).prop_map(|mut requirements| {
            // In the one order that sources give them.
            requirements.sort_unstable();
            requirements.dedup();
            Selector { requirements }
        }),
    ]
}

fn namespace_selector() -> impl Strategy<Value = Selector> {
    let by_name = btree_set(select(&NAMESPACES[..]).prop_map(str::to_owned), 1..=2).prop_map(|names| {
        Selector { requirements: vec![Requirement::In("kubernetes.io/metadata.name".to_owned(), names)] }
    });
    prop_oneof![2 => selector(), 1 => by_name]
}

fn policy() -> impl Strategy<Value = Policy> {
    let rules = || option::of(vec(rule(), 0..=2));
    (select(&NAMESPACES[..]), selector(), rules(), rules()).prop_map(|(namespace, pods, ingress, egress)| {
        let isolating = |rules| PolicyDirection { default: Action::Deny, rules };
        // A policy without policyTypes isolates for ingress.
        let ingress = ingress.or_else(|| egress.is_none().then(Vec::new));
        Policy {
            reference: PolicyRef::network_policy(&ObjectKey::new(namespace, "")),
            subject: Subject::Pods { namespaces: Selector::default(), pods },
            tier: Tier::Namespaced,
            priority: 0,
            ingress: ingress.map(isolating),
            egress: egress.map(isolating),
            marks: Default::default(),
            others: Vec::new(),
            doubts: Vec::new(),
        }
    })
}

fn rule() -> impl Strategy<Value = PolicyRule> {
    let peers = prop_oneof![1 => Just(None), 4 => vec(peer(), 1..=2).prop_map(Some)];
    let ports = prop_oneof![1 => Just(None), 3 => vec(port(), 1..=2).prop_map(Some)];
    (peers, ports).prop_map(|(peers, ports)| PolicyRule::new(Action::Allow, peers, ports))
}

fn peer() -> impl Strategy<Value = Peer> {
    let pods = (option::of(namespace_selector()), selector());
    prop_oneof![
        3 => pods.prop_map(|(namespaces, pods)| Peer::Pods { namespaces, pods }),
        2 => block(),
    ]
}

fn block() -> impl Strategy<Value = Peer> {
    let family = prop_oneof![2 => Just(0), 1 => Just(1)];
    family.prop_flat_map(|family: usize| {
        let all: Vec<IpNet> = BLOCKS[family].iter().chain(ELSEWHERE[family]).map(|text| net(text)).collect();
        select(all.clone()).prop_flat_map(move |cidr| {
            let inside = |hole: &&IpNet| cidr.contains(*hole) && cidr != **hole;
            let holes: Vec<IpNet> = all.iter().filter(inside).copied().collect();
            let count = holes.len().min(2);
            subsequence(holes, 0..=count).prop_map(move |except| Peer::Block { cidr, except })
        })
    })
}

fn port() -> impl Strategy<Value = PortMatch> {
    let selector = prop_oneof![
        1 => Just(PortSelector::Any),
        3 => select(&PORTS[..]).prop_map(|port| PortSelector::Range(port, port)),
        2 => (select(&PORTS[..]), select(&PORTS[..]))
            .prop_map(|(a, b)| PortSelector::Range(a.min(b), a.max(b))),
        2 => select(&PORT_NAMES[..]).prop_map(|name| PortSelector::Named(name.to_owned())),
    ];
    (select(&PROTOCOLS[..]), selector)
        .prop_map(|(protocol, port)| PortMatch { protocol: protocol.into(), port })
}

fn net(text: &str) -> IpNet {
    text.parse().expect("the prefixes above are well-formed")
}

fn address(text: &str) -> IpAddr {
    text.parse().expect("the addresses above are well-formed")
}

/// The namespaces and policies as a user writes them: for whole systems under test.
pub fn manifests(cluster: &Cluster) -> Vec<Value> {
    let namespaces = cluster.namespaces.iter().map(|(name, labels)| {
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
    });
    namespaces.chain(cluster.policies.iter().map(policy_manifest)).collect()
}

fn policy_manifest(policy: &Policy) -> Value {
    let Subject::Pods { pods, .. } = &policy.subject else { panic!("only pods are made") };
    let rules = |direction: &Option<PolicyDirection>, side: &str| {
        direction.as_ref().map(|direction| {
            direction
                .rules
                .iter()
                .map(|rule| {
                    json!({side: rule.peers.as_ref().map(|peers| {
                        peers.iter().map(peer_manifest).collect::<Vec<_>>()
                    }), "ports": rule.ports.as_ref().map(|ports| {
                        ports.iter().map(port_manifest).collect::<Vec<_>>()
                    })})
                })
                .collect::<Vec<_>>()
        })
    };
    let mut types = Vec::new();
    types.extend(policy.ingress.as_ref().map(|_| "Ingress"));
    types.extend(policy.egress.as_ref().map(|_| "Egress"));
    json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"namespace": policy.reference.namespace, "name": policy.reference.name},
        "spec": {
            "podSelector": selector_manifest(pods),
            "policyTypes": types,
            "ingress": rules(&policy.ingress, "from"),
            "egress": rules(&policy.egress, "to"),
        },
    })
}

fn peer_manifest(peer: &Peer) -> Value {
    match peer {
        Peer::Pods { namespaces: None, pods } => json!({"podSelector": selector_manifest(pods)}),
        Peer::Pods { namespaces: Some(namespaces), pods } => {
            json!({"namespaceSelector": selector_manifest(namespaces), "podSelector": selector_manifest(pods)})
        }
        Peer::Block { cidr, except } => json!({"ipBlock": {"cidr": cidr, "except": except}}),
        other => panic!("no peer of a NetworkPolicy: {other:?}"),
    }
}

fn port_manifest(port: &PortMatch) -> Value {
    let protocol = port.protocol;
    match &port.port {
        PortSelector::Any => json!({"protocol": protocol}),
        PortSelector::Range(from, to) if from == to => json!({"protocol": protocol, "port": from}),
        PortSelector::Range(from, to) => json!({"protocol": protocol, "port": from, "endPort": to}),
        PortSelector::Named(name) => json!({"protocol": protocol, "port": name}),
    }
}

fn selector_manifest(selector: &Selector) -> Value {
    let line = |requirement: &Requirement| match requirement {
        Requirement::In(key, values) => json!({"key": key, "operator": "In", "values": values}),
        Requirement::NotIn(key, values) => json!({"key": key, "operator": "NotIn", "values": values}),
        Requirement::Exists(key) => json!({"key": key, "operator": "Exists"}),
        Requirement::DoesNotExist(key) => json!({"key": key, "operator": "DoesNotExist"}),
    };
    json!({"matchExpressions": selector.requirements.iter().map(line).collect::<Vec<_>>()})
}
