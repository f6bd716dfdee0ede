//! Documents to whole values, and broken documents to the words that say why.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde_json::Value;

use super::*;
use crate::kube::kind::{self, ObjectKind};
use crate::kube::kinds;
use crate::model::{
    Action, EndpointSlice, IdentityId, IdentityLabels, NamedPort, Namespace, Node, NodeEndpoints, Peer, Pod,
    Policy, PolicyDirection, PolicyRef, PolicyRule, PortMapping, PortMatch, PortSelector, Protocol,
    PublishedEndpoint, Requirement, Selector, Service, ServicePort, SliceBackend, SlicePort, Subject, Tier,
    Workload,
};

mod services;

fn value(yaml: &str) -> Value {
    crate::yaml::read(yaml).expect("the test's YAML is well formed")
}

fn converted<K: ObjectKind>(yaml: &str) -> Result<Converted<Arc<K::Row>>> {
    let document = value(yaml);
    let id = identify(K::KIND, &Field::root(&document, true))?;
    kind::read::<K>(&id, &document, true)
}

fn object<K: ObjectKind>(yaml: &str) -> K::Row {
    let converted = converted::<K>(yaml).unwrap_or_else(|error| panic!("{error} in {yaml}"));
    assert_eq!((&converted.warnings, &converted.doubts), (&vec![], &vec![]));
    Arc::into_inner(converted.row.expect("the object makes a row")).expect("nobody else has it")
}

fn any(kind: Kind, yaml: &str) -> Result<Converted<kind::Object>> {
    let document = value(yaml);
    identify(kind, &Field::root(&document, true)).and_then(|id| kind.read(&id, &document, true))
}

fn error(kind: Kind, yaml: &str) -> String {
    match any(kind, yaml) {
        Ok(converted) => format!("accepted: {converted:?}"),
        Err(error) => error.to_string(),
    }
}

fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect()
}

fn strings(values: &[&str]) -> BTreeSet<String> {
    values.iter().map(ToString::to_string).collect()
}

fn is(key: &str, value: &str) -> Requirement {
    Requirement::In(key.to_owned(), strings(&[value]))
}

fn select(requirements: &[Requirement]) -> Selector {
    Selector { requirements: requirements.to_vec() }
}

fn port(name: &str, protocol: Protocol, port: u16) -> ServicePort {
    ServicePort { name: name.to_owned(), protocol, port, node_port: None }
}

fn slice_port(name: &str, protocol: Protocol, port: u16) -> SlicePort {
    SlicePort { name: name.to_owned(), protocol, port }
}

fn policy(spec: &str) -> Policy {
    object::<kinds::NetworkPolicy>(&format!("{{metadata: {{name: p, namespace: shop}}, spec: {spec}}}"))
}

/// The policy as far as it could be read, and what could not.
fn doubtful(spec: &str, is_strict: bool) -> (Policy, Vec<String>) {
    let document = value(&format!("{{metadata: {{name: p, namespace: shop}}, spec: {spec}}}"));
    let id =
        identify(kinds::NetworkPolicy::KIND, &Field::root(&document, is_strict)).expect("the name is good");
    let converted = kind::read::<kinds::NetworkPolicy>(&id, &document, is_strict).expect("it is always read");
    let policy = Arc::unwrap_or_clone(converted.row.expect("there is a policy in any case"));
    (policy, converted.doubts.iter().map(ToString::to_string).collect())
}

fn selected_pods(policy: &Policy) -> &Selector {
    let Subject::Pods { pods, .. } = &policy.subject else { panic!("pods: {policy:?}") };
    pods
}

fn policy_error(spec: &str) -> String {
    doubtful(spec, true).1.join("; ")
}

/// The peers and ports of the only ingress rule.
fn ingress(rule: &str) -> PolicyRule {
    let policy = policy(&format!("{{podSelector: {{}}, ingress: [{rule}]}}"));
    let rules = policy.ingress.expect("ingress is enforced").rules;
    <[PolicyRule; 1]>::try_from(rules).map(|[rule]| rule).expect("one rule is given")
}

#[test]
fn policy_types_default_to_ingress_and_to_egress_with_rules() {
    let isolating = |rules| PolicyDirection { default: Action::Deny, rules };
    let policy_with = |ingress: Option<Vec<_>>, egress: Option<Vec<_>>| Policy {
        reference: PolicyRef::network_policy(&ObjectKey::new("shop", "p")),
        subject: Subject::Pods { namespaces: Selector::default(), pods: Selector::default() },
        tier: Tier::Namespaced,
        priority: 0,
        ingress: ingress.map(isolating),
        egress: egress.map(isolating),
        marks: Default::default(),
        others: vec![],
        doubts: vec![],
    };
    let all = || Some(vec![PolicyRule::new(Action::Allow, None, None)]);
    let nothing = || Some(vec![]);
    for (spec, expected) in [
        ("{}", policy_with(nothing(), None)),
        ("{podSelector: {}}", policy_with(nothing(), None)),
        ("{podSelector: null, policyTypes: []}", policy_with(nothing(), None)),
        ("{policyTypes: [Egress]}", policy_with(None, nothing())),
        ("{policyTypes: [Ingress, Egress]}", policy_with(nothing(), nothing())),
        ("{ingress: [{}]}", policy_with(all(), None)),
        ("{ingress: [{from: [], ports: []}]}", policy_with(all(), None)),
        ("{ingress: [{from: null}], egress: [{to: []}]}", policy_with(all(), all())),
        ("{egress: []}", policy_with(nothing(), None)),
        ("{policyTypes: [Ingress], egress: [{}]}", policy_with(nothing(), None)),
        ("{policyTypes: [Egress], ingress: [{}]}", policy_with(None, nothing())),
    ] {
        assert_eq!(policy(spec), expected, "{spec}");
    }
}

#[test]
fn selectors_have_all_four_operators() {
    let spec = "{podSelector: {matchLabels: {app: web, tier: front}, matchExpressions: [
        {key: zone, operator: In, values: [b, a]}, {key: role, operator: NotIn, values: [admin]},
        {key: x.io/seen, operator: Exists}, {key: gone, operator: DoesNotExist, values: []}]}}";
    let expected = select(&[
        is("app", "web"),
        is("tier", "front"),
        Requirement::In("zone".to_owned(), strings(&["a", "b"])),
        Requirement::NotIn("role".to_owned(), strings(&["admin"])),
        Requirement::Exists("x.io/seen".to_owned()),
        Requirement::DoesNotExist("gone".to_owned()),
    ]);
    assert_eq!(selected_pods(&policy(spec)), &expected);
}

#[test]
fn peers_tell_absent_selectors_from_empty_ones() {
    let pods = |namespaces: Option<&[Requirement]>, pods: &[Requirement]| Peer::Pods {
        namespaces: namespaces.map(select),
        pods: select(pods),
    };
    for (peer, expected) in [
        ("{podSelector: {}}", pods(None, &[])),
        ("{podSelector: {matchLabels: {a: b}}}", pods(None, &[is("a", "b")])),
        ("{namespaceSelector: {}}", pods(Some(&[]), &[])),
        ("{namespaceSelector: {matchLabels: {n: m}}, podSelector: null}", pods(Some(&[is("n", "m")]), &[])),
        (
            "{namespaceSelector: {matchLabels: {n: m}}, podSelector: {matchLabels: {a: b}}}",
            pods(Some(&[is("n", "m")]), &[is("a", "b")]),
        ),
    ] {
        assert_eq!(ingress(&format!("{{from: [{peer}]}}")).peers, Some(vec![expected]), "{peer}");
    }
}

#[test]
fn peers_that_must_be_without_the_label_of_a_run_are_reported() {
    let yaml = "{metadata: {name: a}, spec: {podSelector: {matchLabels: {job-name: b}}, ingress: [{from: [{podSelector: \
                {matchExpressions: [{key: job-name, operator: DoesNotExist}, {key: app, operator: DoesNotExist}]}}, \
                {podSelector: {matchLabels: {job-name: c}}}]}]}}";
    let warnings = converted::<kinds::NetworkPolicy>(yaml).expect("it is taken").warnings;
    let said: Vec<String> = warnings.iter().map(ToString::to_string).collect();
    let expected = "spec.ingress[0].from[0].podSelector: whether a pod is without job-name cannot be told: \
                    none is let in for that";
    assert_eq!(said, [expected]);
}

#[test]
fn blocks_are_canonical() {
    let block = |cidr: &str, except: &[&str]| {
        let net = |text: &str| text.parse().expect("the test's CIDR is well formed");
        Peer::Block { cidr: net(cidr), except: except.iter().map(|text| net(text)).collect() }
    };
    for (given, expected) in [
        ("{cidr: 10.0.0.0/8}", block("10.0.0.0/8", &[])),
        (
            "{cidr: 10.1.2.3/8, except: [10.1.2.3/16, 10.9.9.9/32]}",
            block("10.0.0.0/8", &["10.1.0.0/16", "10.9.9.9/32"]),
        ),
        ("{cidr: '::/0', except: ['2001:db8::/32']}", block("::/0", &["2001:db8::/32"])),
        ("{cidr: '::ffff:10.0.0.0/104'}", block("10.0.0.0/8", &[])),
    ] {
        assert_eq!(
            ingress(&format!("{{from: [{{ipBlock: {given}}}]}}")).peers,
            Some(vec![expected]),
            "{given}"
        );
    }
}

#[test]
fn ports_are_numbers_names_ranges_or_all() {
    let port = |protocol: Protocol, port| PortMatch { protocol: protocol.into(), port };
    for (given, expected) in [
        ("{}", port(Protocol::Tcp, PortSelector::Any)),
        ("{protocol: SCTP}", port(Protocol::Sctp, PortSelector::Any)),
        ("{port: 80}", port(Protocol::Tcp, PortSelector::Range(80, 80))),
        ("{port: 8000, endPort: 8000, protocol: UDP}", port(Protocol::Udp, PortSelector::Range(8000, 8000))),
        ("{port: 1, endPort: 65535}", port(Protocol::Tcp, PortSelector::Range(1, 65535))),
        ("{port: http-alt}", port(Protocol::Tcp, PortSelector::Named("http-alt".to_owned()))),
    ] {
        assert_eq!(ingress(&format!("{{ports: [{given}]}}")).ports, Some(vec![expected]), "{given}");
    }
}

#[test]
fn a_broken_policy_says_where_and_what_is_allowed() {
    for (spec, expected) in [
        ("[]", "spec: is a list, must be an object"),
        (
            "{podselector: {}}",
            "spec.podselector: unknown field; known are podSelector, policyTypes, ingress, egress",
        ),
        ("{policyTypes: [ingress]}", "spec.policyTypes[0]: \"ingress\" is not Ingress or Egress"),
        ("{ingress: {}}", "spec.ingress: is an object, must be a list"),
        ("{ingress: [{to: []}]}", "spec.ingress[0].to: unknown field; known are from, ports"),
        ("{ingress: [7]}", "spec.ingress[0]: is a number, must be an object"),
        (
            "{ingress: [{from: [{podSelector: {}}, {}]}]}",
            "spec.ingress[0].from[1]: is empty; one of podSelector, namespaceSelector and ipBlock is required",
        ),
        (
            "{ingress: [{from: [null]}]}",
            "spec.ingress[0].from[0]: is empty; one of podSelector, namespaceSelector and ipBlock is required",
        ),
        (
            "{ingress: [{from: [{podSelector: {}, ipBlock: {cidr: 10.0.0.0/8}}]}]}",
            "spec.ingress[0].from[0]: has ipBlock and a selector; a peer is either addresses or pods",
        ),
        ("{ingress: [{from: [{ipBlock: {}}]}]}", "spec.ingress[0].from[0].ipBlock.cidr: is required"),
        (
            "{ingress: [{from: [{podSelector: {}}, {ipBlock: {cidr: 10.0.0.0/33}}]}]}",
            "spec.ingress[0].from[1].ipBlock.cidr: \"10.0.0.0/33\" is not a CIDR such as 10.0.0.0/8 or 2001:db8::/32",
        ),
        (
            "{egress: [{to: [{ipBlock: {cidr: 10.0.0.0}}]}]}",
            "spec.egress[0].to[0].ipBlock.cidr: \"10.0.0.0\" is not a CIDR such as 10.0.0.0/8 or 2001:db8::/32",
        ),
        (
            "{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [11.0.0.0/16]}}]}]}",
            "spec.ingress[0].from[0].ipBlock.except[0]: 11.0.0.0/16 is not a part of cidr 10.0.0.0/8",
        ),
        (
            "{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.0.0/8]}}]}]}",
            "spec.ingress[0].from[0].ipBlock.except[0]: 10.0.0.0/8 is not a part of cidr 10.0.0.0/8",
        ),
        (
            "{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: ['::/0']}}]}]}",
            "spec.ingress[0].from[0].ipBlock.except[0]: ::/0 is not a part of cidr 10.0.0.0/8",
        ),
        (
            "{ingress: [{ports: [{port: 0}]}]}",
            "spec.ingress[0].ports[0].port: 0 is not a port number (1 to 65535)",
        ),
        (
            "{ingress: [{ports: [{port: 65536}]}]}",
            "spec.ingress[0].ports[0].port: 65536 is not a port number (1 to 65535)",
        ),
        (
            "{ingress: [{ports: [{port: 8.5}]}]}",
            "spec.ingress[0].ports[0].port: 8.5 is not a port number (1 to 65535)",
        ),
        (
            "{ingress: [{ports: [{port: true}]}]}",
            "spec.ingress[0].ports[0].port: is true or false, must be a port number (1 to 65535)",
        ),
        (
            "{ingress: [{ports: [{port: '80'}]}]}",
            "spec.ingress[0].ports[0].port: \"80\" is neither a number nor a port's name (at most 15 lower-case letters, \
             digits and single '-', at least one letter)",
        ),
        (
            "{ingress: [{ports: [{port: 90, endPort: 80}]}]}",
            "spec.ingress[0].ports[0].endPort: 80 is less than port 90",
        ),
        ("{ingress: [{ports: [{endPort: 80}]}]}", "spec.ingress[0].ports[0].endPort: needs port beside it"),
        (
            "{ingress: [{ports: [{port: http, endPort: 80}]}]}",
            "spec.ingress[0].ports[0].endPort: needs a numeric port beside it",
        ),
        (
            "{ingress: [{ports: [{protocol: ICMP}]}]}",
            "spec.ingress[0].ports[0].protocol: \"ICMP\" is not TCP, UDP or SCTP",
        ),
        (
            "{podSelector: {matchExpressions: [{key: a, operator: in, values: [b]}]}}",
            "spec.podSelector.matchExpressions[0].operator: \"in\" is not In, NotIn, Exists or DoesNotExist",
        ),
        (
            "{podSelector: {matchExpressions: [{key: a, operator: In}]}}",
            "spec.podSelector.matchExpressions[0].values: is required with operators In and NotIn",
        ),
        (
            "{podSelector: {matchExpressions: [{key: a, operator: Exists, values: [b]}]}}",
            "spec.podSelector.matchExpressions[0].values: must be empty with operators Exists and DoesNotExist",
        ),
        (
            "{podSelector: {matchExpressions: [{operator: Exists}]}}",
            "spec.podSelector.matchExpressions[0].key: is required",
        ),
        (
            "{podSelector: {matchExpressions: [{key: a, operator: In, values: [\"-\"]}]}}",
            "spec.podSelector.matchExpressions[0].values[0]: \"-\" is not a label value",
        ),
        (
            "{podSelector: {matchLabels: {app: 7}}}",
            "spec.podSelector.matchLabels.app: is a number, must be a string",
        ),
        (
            "{podSelector: {matchLabels: {a b: c}}}",
            "spec.podSelector.matchLabels: \"a b\" is not a label key",
        ),
    ] {
        assert_eq!(policy_error(spec), expected, "{spec}");
    }
}

/// `ingress`, `egress`: rules by their number of peers and ports, where `-` is "all".
fn shape(direction: Option<&PolicyDirection>) -> String {
    let count = |list: Option<usize>| list.map_or("-".to_owned(), |count| count.to_string());
    let rule = |rule: &PolicyRule| {
        format!("{}:{}", count(rule.peers.as_ref().map(Vec::len)), count(rule.ports.as_ref().map(Vec::len)))
    };
    direction
        .map_or("open".to_owned(), |direction| direction.rules.iter().map(rule).collect::<Vec<_>>().join(" "))
}

#[test]
fn a5_what_cannot_be_read_of_a_policy_is_closed_and_the_rest_stands() {
    for (spec, ingress, egress) in [
        // One of two ports, peers, rules.
        ("{ingress: [{ports: [{port: 80}, {port: '80'}]}]}", "-:1", "open"),
        ("{ingress: [{from: [{podSelector: {}}, {ipBlock: {cidr: here}}]}]}", "1:-", "open"),
        ("{ingress: [{ports: [{port: 80}]}, 7]}", "-:1", "open"),
        // All of them: nobody and nothing, not everybody and everything.
        ("{ingress: [{ports: [{port: '80'}]}]}", "-:0", "open"),
        ("{ingress: [{from: [{ipBlock: {cidr: here}}]}]}", "0:-", "open"),
        ("{ingress: [{from: 7}]}", "", "open"),
        ("{ingress: [{ports: {port: 80}}]}", "", "open"),
        ("{ingress: {}, policyTypes: [Ingress]}", "", "open"),
        // A hole that cannot be read is as large as its block.
        ("{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0]}}]}]}", "0:-", "open"),
        // A field that is not known may narrow what stands beside it.
        ("{ingress: [{from: [{podSelector: {}, mood: good}]}]}", "0:-", "open"),
        ("{ingress: [{form: [{podSelector: {}}]}]}", "", "open"),
        ("{ingress: [{ports: [{port: 80, mood: good}]}]}", "-:0", "open"),
        ("{ingress: [{from: [{podSelector: {matchExpressions: [{key: a, operator: Gt}]}}]}]}", "0:-", "open"),
        // Which directions it is about.
        ("{policyTypes: [Egress, Sideways]}", "", ""),
        ("{policyTypes: 7, egress: [{}]}", "", "-:-"),
        ("{egres: [{}]}", "", ""),
        ("{egress: 7}", "", ""),
        ("{policyTypes: [Egress], mood: good}", "open", ""),
        ("7", "", ""),
    ] {
        for is_strict in [true, false] {
            let (policy, doubts) = doubtful(spec, is_strict);
            assert_eq!(
                (shape(policy.ingress.as_ref()), shape(policy.egress.as_ref())),
                (ingress.to_owned(), egress.to_owned()),
                "{spec}"
            );
            assert!(!doubts.is_empty() && policy.doubts == doubts, "{spec}");
        }
    }
}

#[test]
fn a5_what_cannot_be_read_of_a_selector_narrows_nothing() {
    for (selector, expected) in [
        ("{matchLabels: {app: web, tier: 7}}", vec![is("app", "web")]),
        (
            "{matchLabels: {app: web}, matchExpressions: [{key: a, operator: Gt, values: ['1']}]}",
            vec![is("app", "web")],
        ),
        ("{matchLabels: {app: web}, mood: good}", vec![is("app", "web")]),
        ("{matchLabels: {app: web}, matchExpressions: 7}", vec![is("app", "web")]),
        ("{matchLabel: {app: web}}", vec![]),
        ("{matchLabels: [app]}", vec![]),
        ("web", vec![]),
    ] {
        let (policy, doubts) = doubtful(&format!("{{podSelector: {selector}, ingress: [{{}}]}}"), false);
        assert_eq!(selected_pods(&policy), &select(&expected), "{selector}");
        assert_eq!((shape(policy.ingress.as_ref()), doubts.len()), (String::new(), 1), "{selector}");
    }
}

#[test]
fn pods_have_defaults_and_the_ports_of_what_keeps_running() {
    let yaml = "{metadata: {name: web, uid: u, labels: {app: web}}, spec: {containers: [
        {ports: [{name: http, containerPort: 80}, {containerPort: 81}]},
        {ports: [{name: http, containerPort: 80}, {name: http, containerPort: 80, protocol: UDP}]}], initContainers: [
        {restartPolicy: Always, ports: [{name: side, containerPort: 9}]}, {ports: [{name: once, containerPort: 1}]}]}}";
    let named = |protocol, port| NamedPort { protocol, port };
    let expected = Pod {
        key: ObjectKey::new("default", "web"),
        uid: "u".to_owned(),
        labels: labels(&[("app", "web")]),
        service_account: "default".to_owned(),
        node: None,
        host_network: false,
        is_terminal: false,
        is_ready: true,
        named_ports: BTreeMap::from([
            ("http".to_owned(), vec![named(Protocol::Tcp, 80), named(Protocol::Udp, 80)]),
            ("side".to_owned(), vec![named(Protocol::Tcp, 9)]),
        ]),
        marks: Default::default(),
        workload: None,
    };
    assert_eq!(object::<kinds::Pod>(yaml), expected);
}

#[test]
fn pods_say_where_they_run_and_when_they_are_over() {
    let yaml = "{metadata: {name: web, namespace: shop}, spec: {serviceAccountName: sa, nodeName: a, hostNetwork: true},
        status: {phase: Failed}}";
    let expected = Pod {
        key: ObjectKey::new("shop", "web"),
        uid: String::new(),
        labels: Labels::new(),
        service_account: "sa".to_owned(),
        node: Some("a".to_owned()),
        host_network: true,
        is_terminal: true,
        is_ready: true,
        named_ports: BTreeMap::new(),
        marks: Default::default(),
        workload: None,
    };
    assert_eq!(object::<kinds::Pod>(yaml), expected);
}

#[test]
fn pods_say_what_made_them() {
    for (owner, expected) in [
        ("{controller: true, kind: ReplicaSet, name: web-7d9f}", Some("Deployment/web")),
        ("{controller: true, kind: ReplicaSet, name: web-other}", Some("ReplicaSet/web-other")),
        ("{controller: true, kind: Job, name: tidy-28373012}", Some("CronJob/tidy")),
        ("{controller: true, kind: Job, name: once-1}", Some("Job/once-1")),
        ("{controller: true, kind: StatefulSet, name: db}", Some("StatefulSet/db")),
        ("{kind: ReplicaSet, name: web-7d9f}", None),
        ("{controller: true, kind: 7}", None),
    ] {
        let yaml = format!(
            "{{metadata: {{name: web, namespace: shop, labels: {{pod-template-hash: 7d9f}}, ownerReferences: [{owner}]}}}}"
        );
        let workload = object::<kinds::Pod>(&yaml).workload.map(|workload| workload.to_string());
        assert_eq!(workload.as_deref(), expected, "{owner}");
    }
}

#[test]
fn namespaces_have_their_name_as_a_label_whatever_they_say() {
    for yaml in [
        "{metadata: {name: shop, labels: {team: red}}}",
        "{metadata: {name: shop, labels: {team: red, kubernetes.io/metadata.name: kube-system}}}",
    ] {
        let expected = Namespace {
            labels: labels(&[("team", "red"), ("kubernetes.io/metadata.name", "shop")]),
            is_partial: false,
            is_leaving: false,
            marks: Default::default(),
        };
        assert_eq!(object::<kinds::Namespace>(yaml), expected, "{yaml}");
    }
}

#[test]
fn a5_a_namespace_whose_labels_cannot_be_read_is_there_and_says_so() {
    let read =
        converted::<kinds::Namespace>("{metadata: {name: shop, labels: {team: 7}}}").expect("it is read");
    assert!(read.row.is_some_and(|row| row.is_partial));
    assert_eq!(read.doubts[0].to_string(), "metadata.labels.team: is a number, must be a string");
}

#[test]
fn nodes_have_internal_addresses_and_one_cidr_or_several() {
    let node = |cidrs: &[&str]| Node {
        name: "a".to_owned(),
        labels: labels(&[("zone", "one")]),
        addresses: vec!["10.0.0.1".parse().expect("an address"), "fd00::1".parse().expect("an address")],
        pod_cidrs: cidrs.iter().map(|cidr| cidr.parse().expect("a CIDR")).collect(),
        is_leaving: false,
        is_unready: false,
    };
    for (spec, expected) in [
        ("{podCIDR: 10.1.0.0/24, podCIDRs: [10.1.0.0/24, 'fd01::/64']}", node(&["10.1.0.0/24", "fd01::/64"])),
        ("{podCIDR: 10.1.0.0/24}", node(&["10.1.0.0/24"])),
        ("{}", node(&[])),
    ] {
        let yaml = format!(
            "{{metadata: {{name: a, labels: {{zone: one}}}}, spec: {spec}, status: {{addresses: [
             {{type: ExternalIP, address: 1.2.3.4}}, {{type: InternalIP, address: 10.0.0.1}},
             {{type: InternalIP, address: 'fd00::1'}}, {{type: Hostname, address: a}}]}}}}"
        );
        assert_eq!(object::<kinds::Node>(&yaml), expected, "{spec}");
    }
}

#[test]
fn broken_services_slices_nodes_and_pods_say_why() {
    let service = |spec: &str| format!("{{metadata: {{name: web}}, spec: {spec}}}");
    for (kind, yaml, expected) in [
        (
            kinds::Service::KIND,
            service("{}"),
            "spec.clusterIP: is required: an address, or None for a headless Service",
        ),
        (
            kinds::Service::KIND,
            service("{type: Best}"),
            "spec.type: \"Best\" is not a type of Service; known are ClusterIP, NodePort, LoadBalancer and ExternalName",
        ),
        (
            kinds::Service::KIND,
            service("{clusterIP: 10.0.0}"),
            "spec.clusterIP: \"10.0.0\" is not an IPv4 or IPv6 address",
        ),
        (
            kinds::Service::KIND,
            service("{clusterIP: 127.0.0.1}"),
            "spec.clusterIP: 127.0.0.1 is a loopback address",
        ),
        (
            kinds::Service::KIND,
            service("{clusterIPs: [10.0.0.1, 10.0.0.2]}"),
            "spec.clusterIPs[1]: is a second address of its family; at most one of each is allowed",
        ),
        (kinds::Service::KIND, service("{clusterIP: None, ports: [{}]}"), "spec.ports[0].port: is required"),
        (
            kinds::Service::KIND,
            service("{clusterIP: None, ports: [{port: 1}, {port: 2}]}"),
            "spec.ports[0].name: is required where a Service has several ports",
        ),
        (
            kinds::Service::KIND,
            service("{clusterIP: None, ports: [{name: a, port: 1}, {name: a, port: 2}]}"),
            "spec.ports[1].name: \"a\" is the name of another port of this Service",
        ),
        (
            kinds::Service::KIND,
            service("{clusterIP: None, ports: [{name: a, port: 1}, {name: b, port: 1}]}"),
            "spec.ports[1].port: TCP 1 is there already",
        ),
        (
            kinds::Service::KIND,
            service("{clusterIP: None, ports: [{name: A, port: 1}]}"),
            "spec.ports[0].name: \"A\" is not a port's name (lower-case letters, digits and '-', at most 63 characters)",
        ),
        (kinds::EndpointSlice::KIND, "{metadata: {name: a}}".to_owned(), "addressType: is required"),
        (
            kinds::EndpointSlice::KIND,
            "{metadata: {name: a}, addressType: IPv5}".to_owned(),
            "addressType: \"IPv5\" is not IPv4, IPv6 or FQDN",
        ),
        (
            kinds::Pod::KIND,
            "{metadata: {name: a, labels: {a: \"-\"}}}".to_owned(),
            "metadata.labels.a: \"-\" is not a label value (at most 63 letters, digits, '-', '_' and '.')",
        ),
        (
            kinds::Pod::KIND,
            "{metadata: {name: a, namespace: a.b}}".to_owned(),
            "metadata.namespace: \"a.b\" is not a namespace's name (lower-case letters, digits and '-', at most 63 characters)",
        ),
        (
            kinds::Pod::KIND,
            "{metadata: {name: a}, spec: {containers: [{ports: [{name: x}]}]}}".to_owned(),
            "spec.containers[0].ports[0].containerPort: is required",
        ),
        (
            kinds::Node::KIND,
            "{metadata: {name: a}, spec: {podCIDRs: [10.0.0.1]}}".to_owned(),
            "spec.podCIDRs[0]: \"10.0.0.1\" is not a CIDR such as 10.0.0.0/8 or 2001:db8::/32",
        ),
        (
            kinds::Node::KIND,
            "{metadata: {name: a}, status: {addresses: [{type: InternalIP, address: x}]}}".to_owned(),
            "status.addresses[0].address: \"x\" is not an IPv4 or IPv6 address",
        ),
        (
            kinds::Identity::KIND,
            "{metadata: {name: '255'}, spec: {}}".to_owned(),
            "metadata.name: \"255\" is not an identity's number (256 to 16777215)",
        ),
        (
            kinds::Identity::KIND,
            "{metadata: {name: '0300'}, spec: {}}".to_owned(),
            "metadata.name: \"0300\" is not an identity's number (256 to 16777215)",
        ),
        (
            kinds::Identity::KIND,
            "{metadata: {name: '300'}, spec: {namespace: a}}".to_owned(),
            "spec.serviceAccount: is required",
        ),
        (
            kinds::NodeEndpoints::KIND,
            "{metadata: {name: b-0}, spec: {node: a}}".to_owned(),
            "spec.node: \"a\" does not fit the object's name \"b-0\"; it must be a-NUMBER",
        ),
        (
            kinds::NodeEndpoints::KIND,
            "{metadata: {name: a-0}, spec: {node: a, endpoints: [{namespace: n, name: p, identity: 7}]}}"
                .to_owned(),
            "spec.endpoints[0].identity: must be an identity's number (256 to 16777215)",
        ),
    ] {
        assert_eq!(error(kind, &yaml), expected, "{yaml}");
    }
}

#[test]
fn own_kinds_are_read_as_they_are_written() {
    let identity = IdentityLabels {
        namespace: "shop".to_owned(),
        namespace_labels: labels(&[("team", "red")]),
        service_account: "web".to_owned(),
        pod_labels: labels(&[("app", "web")]),
        named_ports: BTreeMap::from([(
            "http".to_owned(),
            vec![NamedPort { protocol: Protocol::Tcp, port: 80 }],
        )]),
    };
    let written = crate::kube::crd::Identity::new("4711", (&identity).into());
    let written = crate::yaml::write(&written).expect("plain data");
    assert_eq!(
        object::<kinds::Identity>(&written),
        kinds::ClaimedIdentity { number: IdentityId(4711), labels: Arc::new(identity), is_unused: false }
    );

    let endpoints = NodeEndpoints {
        node: "a-0".to_owned(),
        internal_addresses: vec!["10.1.0.1".parse().expect("an address")],
        endpoints: vec![PublishedEndpoint {
            pod: ObjectKey::new("shop", "web"),
            addresses: vec!["10.1.0.2".parse().expect("an address"), "fd00::2".parse().expect("an address")],
            identity: IdentityId(4711),
            workload: Workload::parse("Deployment/web"),
            host_ports: vec![PortMapping {
                host_port: 8080,
                container_port: 80,
                protocol: Protocol::Udp,
                host_ip: Some("192.0.2.1".parse().expect("an address")),
            }],
        }],
    };
    let spec = crate::kube::crd::NodeEndpointsSpec {
        node: endpoints.node.clone(),
        internal_addresses: endpoints.internal_addresses.iter().map(ToString::to_string).collect(),
        endpoints: endpoints.endpoints.iter().map(Into::into).collect(),
    };
    let written =
        crate::yaml::write(&crate::kube::crd::NodeEndpoints::new("a-0-3", spec)).expect("plain data");
    assert_eq!(object::<kinds::NodeEndpoints>(&written), endpoints);
}

#[test]
fn annotations_of_policies_namespaces_and_pods_ask_for_audit_and_answers() {
    let marks = |annotations: &str| {
        let yaml = format!("{{metadata: {{name: shop, annotations: {annotations}}}}}");
        let read = converted::<kinds::Namespace>(&yaml).expect("it is taken");
        let marks = read.row.expect("a row").marks;
        (marks.audit, marks.reject, read.warnings.len())
    };
    assert_eq!(marks("{}"), (false, None, 0));
    assert_eq!(marks("{weir.dev/audit: 'true', weir.dev/deny-response: reject}"), (true, Some(true), 0));
    assert_eq!(marks("{weir.dev/audit: 'false', weir.dev/deny-response: drop}"), (false, Some(false), 0));
    // What is not read opens nothing.
    assert_eq!(marks("{weir.dev/audit: 'yes', weir.dev/deny-response: rst}"), (false, None, 2));
}
