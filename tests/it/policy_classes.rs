//! What was wrong in others' policy engines, each as a property of ours: clusters that are made to meet the
//! mistake, judged by the model or by what must never happen.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ipnet::IpNet;
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use serde_json::{Value, json};
use weir::model::l7::{HttpRule, L7Rules};
use weir::model::{
    Action, CidrGroup, CompiledDirection, EndpointId, GroupSelector, IdentityId, IpProtocol, L7Set,
    ObjectKey, Peer, Policy, PolicyDirection, PolicyKind, PolicyRef, PolicyRule, PortMatch, PortSelector,
    Protocol, SERVICE_ACCOUNT_KEY, Selector, Subject, Tier,
};
use weir::policy::{References, Resolver, Sources};

use crate::model::{Cluster, ClusterPod, Payload, random};
use crate::policy_model::{Facts, cases, compare, compiler, is_delivered};

const TCP: IpProtocol = IpProtocol::TCP;

fn net(text: &str) -> IpNet {
    text.parse().expect("the prefixes here are well-formed")
}

fn range(from: u16, to: u16) -> PortMatch {
    PortMatch { protocol: TCP, port: PortSelector::Range(from.min(to), from.max(to)) }
}

/// A policy of a namespace for all its pods, of what comes in and goes out.
fn policy(namespace: &str, name: &str, rules: Vec<PolicyRule>) -> Policy {
    let kind = PolicyKind::CiliumNetworkPolicy;
    let direction = PolicyDirection { default: Action::Deny, rules };
    Policy {
        reference: PolicyRef::new(kind, &ObjectKey::new(namespace, name)),
        subject: Subject::Pods { namespaces: Selector::default(), pods: Selector::default() },
        tier: Tier::Namespaced,
        priority: 0,
        ingress: Some(direction.clone()),
        egress: Some(direction),
        marks: Default::default(),
        others: Vec::new(),
        doubts: Vec::new(),
    }
}

/// What both nodes have compiled says what the model says.
fn check(cluster: &Cluster) -> Result<(), TestCaseError> {
    compare(&[0, 1].map(|node| Facts::new(cluster, node).compile(&mut compiler())), cluster)
}

/// A prefix, and one within it.
fn nested() -> impl Strategy<Value = (IpNet, IpNet)> {
    let pairs = [
        ("0.0.0.0/0", "10.0.0.0/24"),
        ("0.0.0.0/0", "203.0.113.9/32"),
        ("10.0.0.0/8", "10.0.1.2/31"),
        ("10.0.0.0/8", "10.9.9.9/32"),
        ("192.168.0.0/24", "192.168.0.99/32"),
        ("::/0", "fd00::2/127"),
        ("fd00::/16", "fd00:0:0:1::/64"),
        ("2001:db8::/32", "2001:db8::9/128"),
    ];
    select(pairs.to_vec()).prop_map(|(wide, narrow)| (net(wide), net(narrow)))
}

fn block(cidr: IpNet, is_outside: bool) -> Peer {
    let except = Vec::new();
    if is_outside { Peer::Outside { cidr, except } } else { Peer::Block { cidr, except } }
}

fn port() -> impl Strategy<Value = u16> {
    select(vec![53_u16, 80, 81, 443, 8080, 8081])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(128), failure_persistence: None, ..ProptestConfig::default() })]

    /// CVE-2024-47825: of two prefixes the longer one was asked, whatever it said.
    #[test]
    fn bypass_13_no_narrower_allow_opens_what_a_deny_closes(
        mut cluster in random::cilium_cluster(),
        (wide, narrow) in nested(),
        is_outside in any::<bool>(),
        (denied, allowed) in (proptest::option::of((port(), port())), port()),
    ) {
        let ports = denied.map(|(from, to)| vec![range(from, to)]);
        let closed = ports.clone();
        let deny = PolicyRule::new(Action::Deny, Some(vec![block(wide, is_outside)]), ports);
        let narrower = PolicyRule::new(Action::Allow, Some(vec![block(narrow, is_outside)]), Some(vec![range(allowed, allowed)]));
        let everything = PolicyRule::new(Action::Allow, Some(vec![block(narrow, is_outside)]), None);
        cluster.policies.retain(|policy| policy.tier != Tier::Admin);
        cluster.policies.push(policy("red", "narrower", vec![narrower, everything]));
        cluster.policies.push(policy("red", "deny", vec![deny]));
        check(&cluster)?;
        let outputs = [0, 1].map(|node| Facts::new(&cluster, node).compile(&mut compiler()));
        for is_ipv4 in [true, false] {
            let sides = cluster.sides(is_ipv4);
            let red = sides.iter().filter(|side| side.pod.is_some_and(|pod| &*pod.pod.key.namespace == "red"));
            for pod in red {
                for other in sides.iter().filter(|other| other.address != pod.address && wide.contains(&other.address)) {
                    // Cilium's rules on prefixes do not speak of pods and nodes.
                    if is_outside && (other.pod.is_some() || cluster.nodes.contains(&other.address)) {
                        continue;
                    }
                    for payload in random::payloads() {
                        let is_closed = match (&closed, payload) {
                            (None, _) => true,
                            (Some(ports), Payload::Port(Protocol::Tcp, port)) => ports.iter().any(|closed| {
                                matches!(closed.port, PortSelector::Range(from, to) if (from..=to).contains(&port))
                            }),
                            _ => false,
                        };
                        prop_assert!(!is_closed || !is_delivered(&outputs, &cluster, *pod, *other, payload),
                            "{} -> {}, {payload:?}", pod.address, other.address);
                    }
                }
            }
        }
    }

    /// CVE-2025-64715: a group that stood for nobody became everybody.
    #[test]
    fn bypass_13_a_group_of_nobody_lets_nobody_in(
        cluster in random::cluster(),
        groups in btree_map(select(vec!["office", "partner"]), subsequence(vec!["203.0.113.0/24", "10.0.0.0/8", "2001:db8::/32", "192.168.0.0/24"], 0..=3), 0..=2),
        named in vec(select(vec!["office", "partner", "gone"]), 1..=2),
        action in select(vec![Action::Allow, Action::Deny]),
        ports in proptest::option::of((port(), port())),
    ) {
        let ports = ports.map(|(from, to)| vec![range(from, to)]);
        let of_group = |name: &&str| Peer::Groups { groups: GroupSelector::Named((*name).into()), except: Vec::new() };
        let rules = |peers| vec![PolicyRule::new(action, Some(peers), ports.clone())];
        let written = policy("red", "groups", rules(named.iter().map(of_group).collect()));
        let mut references = References::default();
        for (name, cidrs) in &groups {
            let cidrs = cidrs.iter().map(|text| net(text)).collect();
            let group = CidrGroup { cidrs, ..CidrGroup::default() };
            references.groups.insert(ObjectKey::new("", *name), Arc::new(group));
        }
        let sources = Sources::default().with(vec![written]);
        let resolved = Resolver::default().update(sources, references);
        let resolved: Vec<Policy> = resolved.values().map(|policy| Policy::clone(policy)).collect();
        // The specification, literally: the prefixes of those groups that there are.
        let prefixes = named.iter().filter_map(|name| groups.get(name)).flatten().map(|text| block(net(text), true));
        let meant = policy("red", "groups", rules(prefixes.collect()));
        let (mut ours, mut model) = (cluster.clone(), cluster);
        ours.policies.extend(resolved);
        model.policies.push(meant);
        compare(&[0, 1].map(|node| Facts::new(&ours, node).compile(&mut compiler())), &model)?;
    }

    /// CVE-2024-52529: of a range of ports with rules of layer 7 these rules were left out.
    #[test]
    fn bypass_13_a_range_of_ports_keeps_the_rules_on_top_of_it(
        ranges in vec((1_u16..200, 1_u16..200, 0_usize..5), 1..6),
    ) {
        // 0 denies, 1 allows anything, the others allow a method.
        let rule = |(from, to, kind): &(u16, u16, usize)| {
            let action = if *kind == 0 { Action::Deny } else { Action::Allow };
            let method = ["", "", "GET", "PUT", "HEAD"][*kind];
            let http = HttpRule { method: Some(method.to_owned()), ..HttpRule::default() };
            let l7 = (*kind > 1).then(|| Arc::new(L7Rules::Http(vec![http])));
            PolicyRule { l7, ..PolicyRule::new(action, None, Some(vec![range(*from, *to)])) }
        };
        let mut cluster = random::sample(0);
        cluster.policies = vec![policy(&cluster.pods[0].pod.key.namespace, "ranges", ranges.iter().map(rule).collect())];
        let output = Facts::new(&cluster, 0).compile(&mut compiler());
        let compiled = &output.policies[&output.of_endpoint[&EndpointId(1)]];
        let ingress = compiled.ingress.as_ref().expect("it speaks of what comes in");
        for port in 0..=201_u16 {
            let kinds: BTreeSet<usize> = ranges.iter()
                .filter(|(from, to, _)| (*from.min(to)..=*from.max(to)).contains(&port))
                .map(|(_, _, kind)| *kind)
                .collect();
            let found = decided(ingress, port);
            let methods: BTreeSet<&str> = kinds.iter().filter(|kind| **kind > 1).map(|kind| ["", "", "GET", "PUT", "HEAD"][*kind]).collect();
            if kinds.is_empty() || kinds.contains(&0) {
                prop_assert!(found.is_none(), "port {port}: {found:?}");
                continue;
            }
            let Some(set) = found else { return Err(TestCaseError::fail(format!("port {port} is closed"))) };
            match set {
                None => prop_assert!(kinds.contains(&1), "port {port} is left without rules"),
                Some(set) => {
                    prop_assert_eq!(set.visibility_only, kinds.contains(&1));
                    let L7Rules::Http(rules) = &set.rules else { return Err(TestCaseError::fail("not HTTP")) };
                    let of_set: BTreeSet<&str> = rules.iter().filter_map(|rule| rule.method.as_deref()).collect();
                    prop_assert_eq!(of_set, methods, "port {}", port);
                }
            }
        }
    }

    /// CVE-2023-41333 and CVE-2023-39347: selectors and labels that name another namespace.
    #[test]
    fn bypass_13_neither_selectors_nor_labels_leave_their_namespace(
        cluster in random::cluster(),
        stolen in vec(crafted_label(), 0..=3),
        subject in crafted_selector(),
        from in crafted_selector(),
        is_empty_list in any::<bool>(),
    ) {
        let mut cluster = cluster;
        for (pod, (key, value)) in cluster.pods.iter_mut().zip(&stolen) {
            pod.pod.labels.insert(key.clone(), value.clone());
        }
        let crafted = from.clone();
        let peers = if is_empty_list { json!([]) } else { json!([from]) };
        let object = json!({
            "apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy",
            "metadata": {"namespace": "red", "name": "crafted"},
            "spec": {"endpointSelector": subject, "ingress": [{"fromEndpoints": peers}]},
        });
        let text = object.to_string();
        let Ok(policies) = weir::kube::read_policies(&text) else { return Ok(()) };
        cluster.policies = policies;
        for node in [0, 1] {
            let facts = Facts::new(&cluster, node);
            let output = facts.compile(&mut compiler());
            for (endpoint, selecting) in &output.selected_by {
                let pod = &cluster.pods[usize::from(endpoint.0) - 1];
                prop_assert!(selecting.is_empty() || &*pod.pod.key.namespace == "red",
                    "it selects {} of {}: {text}", pod.pod.key.name, pod.pod.key.namespace);
            }
        }
        let outputs = [0, 1].map(|node| Facts::new(&cluster, node).compile(&mut compiler()));
        for is_ipv4 in [true, false] {
            let sides = cluster.sides(is_ipv4);
            for (from, to) in sides.iter().flat_map(|from| sides.iter().map(move |to| (from, to))) {
                let Some(receiver) = to.pod.filter(|_| from.address != to.address) else { continue };
                let is_selected = outputs[receiver.node].selected_by.iter().any(|(endpoint, selecting)| {
                    !selecting.is_empty() && cluster.pods[usize::from(endpoint.0) - 1].pod.key == receiver.pod.key
                });
                let is_meant = !is_empty_list && from.pod.is_some_and(|pod| means(&crafted, pod, &cluster));
                let payload = Payload::Port(Protocol::Tcp, 80);
                prop_assert!(!is_selected || is_meant || !is_delivered(&outputs, &cluster, *from, *to, payload),
                    "{} of {:?} comes in: {text}", from.address, from.pod.map(|pod| &pod.pod));
            }
        }
    }

    /// CVE-2026-25804: the order of rules was inverted when a priority did not fit into its number.
    #[test]
    fn bypass_13_priorities_keep_their_order_up_to_the_largest(
        mut cluster in random::tiered_cluster(),
        priorities in Just(vec![0, 1, 999, 1000, 0x7fff_ffff, 0x8000_0000, u32::MAX - 1, u32::MAX]).prop_shuffle(),
    ) {
        for (policy, priority) in cluster.policies.iter_mut().zip(priorities) {
            if policy.tier.is_ordered() {
                policy.priority = priority;
            }
        }
        check(&cluster)?;
    }
}

/// What a class-less direction says of a TCP port: nothing is allowed, or what the proxy is to judge by.
fn decided(direction: &CompiledDirection, port: u16) -> Option<Option<&Arc<L7Set>>> {
    let class = direction.peers.get(&IdentityId::WORLD).copied().unwrap_or(0);
    let matches = direction.rules.iter().filter(|(key, _)| {
        key.class == class
            && key.protocol.is_none_or(|protocol| protocol == TCP.0)
            && u32::from(key.port ^ port) >> (16 - key.port_prefix_length) == 0
    });
    let (_, rule) = matches.max_by_key(|(key, _)| (key.protocol, key.port_prefix_length))?;
    (rule.action == Action::Allow).then_some(rule.l7.as_ref())
}

/// Whether a selector of `red`'s policy means a pod, as Cilium's documentation says.
fn means(selector: &Value, pod: &ClusterPod, cluster: &Cluster) -> bool {
    let namespace = &*pod.pod.key.namespace;
    let value = |key: &str| -> Option<String> {
        let (source, key) = key.split_once(':').unwrap_or(("any", key));
        if !matches!(source, "any" | "k8s") {
            return None;
        }
        if key == NAMESPACE {
            return Some(namespace.to_owned());
        }
        if let Some(label) = key.strip_prefix(NAMESPACE_LABELS) {
            let is_name = label == "kubernetes.io/metadata.name";
            return if is_name {
                Some(namespace.to_owned())
            } else {
                cluster.namespaces[namespace].get(label).cloned()
            };
        }
        if key == SERVICE_ACCOUNT_KEY {
            return Some(pod.pod.service_account.clone());
        }
        let is_reserved =
            key.starts_with("io.cilium") || key.starts_with("io.kubernetes") || key.contains(':');
        pod.pod.labels.get(key).filter(|_| !is_reserved).cloned()
    };
    let labels = selector["matchLabels"].as_object().expect("an object");
    let expressions = selector["matchExpressions"].as_array().expect("a list");
    let keys = labels
        .keys()
        .cloned()
        .chain(expressions.iter().filter_map(|it| Some(it["key"].as_str()?.to_owned())));
    let says_where = |key: String| key.ends_with(NAMESPACE) || key.contains(NAMESPACE_LABELS);
    let own = keys.map(says_where).all(|says| !says);
    (!own || namespace == "red")
        && labels.iter().all(|(key, wanted)| value(key).as_deref() == wanted.as_str())
        && expressions.iter().all(|expression| {
            let found = value(expression["key"].as_str().expect("a key"));
            let wanted = expression["values"][0].as_str();
            match expression["operator"].as_str() {
                Some("In") => found.is_some() && found.as_deref() == wanted,
                Some("NotIn") => found.is_none() || found.as_deref() != wanted,
                Some("Exists") => found.is_some(),
                _ => found.is_none(),
            }
        })
}

const NAMESPACE: &str = "io.kubernetes.pod.namespace";
const NAMESPACE_LABELS: &str = "io.cilium.k8s.namespace.labels.";

const RESERVED: [&str; 8] = [
    "io.kubernetes.pod.namespace",
    "kubernetes.io/metadata.name",
    "io.cilium.k8s.namespace.labels.tier",
    "io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name",
    "io.cilium.k8s.policy.serviceaccount",
    "reserved:host",
    "reserved.host",
    "k8s:io.kubernetes.pod.namespace",
];

/// A label with which a pod says that it is another's.
fn crafted_label() -> impl Strategy<Value = (String, String)> {
    (select(RESERVED.to_vec()), select(vec!["red", "green", "blue", "", "a"]))
        .prop_map(|(key, value)| (key.to_owned(), value.to_owned()))
}

fn crafted_selector() -> impl Strategy<Value = Value> {
    let source = || select(vec!["", "k8s:", "any:", "k8s.", "any."]);
    let key = move || {
        let keys = RESERVED.iter().copied().chain(["app", "tier"]).collect::<Vec<_>>();
        (source(), select(keys)).prop_map(|(source, key)| format!("{source}{key}"))
    };
    let value = || select(vec!["red", "green", "blue", "a", ""]);
    let labels = btree_map(key(), value(), 0..=2);
    let expression = (key(), select(vec!["In", "NotIn", "Exists", "DoesNotExist"]), value()).prop_map(
        |(key, operator, value)| match operator {
            "In" | "NotIn" => json!({"key": key, "operator": operator, "values": [value]}),
            _ => json!({"key": key, "operator": operator}),
        },
    );
    (labels, vec(expression, 0..=1)).prop_map(|(labels, expressions): (BTreeMap<String, &str>, Vec<Value>)| {
        json!({"matchLabels": labels, "matchExpressions": expressions})
    })
}
