use serde_json::Value;

use crate::kube::convert::{Field, identify};
use crate::kube::kind::{self, ObjectKind};
use crate::kube::kinds::{CiliumClusterwideNetworkPolicy, CiliumNetworkPolicy};
use crate::model::{
    Action, Peer, Policy, PolicyDirection, PortSelector, Requirement, Selector, ServiceName, Subject,
};

/// A policy of the namespace `shop` with this spec, as JSON in YAML's clothes.
fn read<K: ObjectKind<Row = Policy>>(spec: &str) -> Policy {
    let text = format!("{{metadata: {{name: web, namespace: shop}}, {spec}}}");
    let value: Value = crate::yaml::read(&text).expect("YAML");
    let id = identify(K::KIND, &Field::root(&value, false)).expect("a name");
    let read = kind::read::<K>(&id, &value, true).expect("it is always read");
    Policy::clone(&read.row.expect("a row"))
}

fn spec(text: &str) -> Policy {
    read::<CiliumNetworkPolicy>(&format!("spec: {{endpointSelector: {{}}, {text}}}"))
}

fn clusterwide(text: &str) -> Policy {
    read::<CiliumClusterwideNetworkPolicy>(&format!("spec: {{endpointSelector: {{}}, {text}}}"))
}

fn selector(selector: &Selector) -> String {
    let join =
        |values: &std::collections::BTreeSet<String>| values.iter().cloned().collect::<Vec<_>>().join("|");
    let one = |requirement: &Requirement| match requirement {
        Requirement::In(key, values) => format!("{key}={}", join(values)),
        Requirement::NotIn(key, values) => format!("{key}!={}", join(values)),
        Requirement::Exists(key) => key.clone(),
        Requirement::DoesNotExist(key) => format!("!{key}"),
    };
    selector.requirements.iter().map(one).collect::<Vec<_>>().join("&")
}

fn peer(peer: &Peer) -> String {
    match peer {
        Peer::Pods { namespaces: None, pods } => format!("pods({})", selector(pods)),
        Peer::Pods { namespaces: Some(spaces), pods } => {
            format!("pods({} in {})", selector(pods), selector(spaces))
        }
        Peer::Outside { cidr, except } if except.is_empty() => cidr.to_string(),
        Peer::Outside { cidr, except } => format!("{cidr} but {except:?}"),
        Peer::Nodes(nodes) => format!("nodes({})", selector(nodes)),
        other => format!("{other:?}"),
    }
}

fn direction(direction: &Option<PolicyDirection>) -> String {
    let Some(PolicyDirection { default, rules }) = direction else { return "-".to_owned() };
    let rule = |rule: &crate::model::PolicyRule| {
        let peers = rule
            .peers
            .as_ref()
            .map_or("everyone".to_owned(), |peers| peers.iter().map(peer).collect::<Vec<_>>().join(","));
        let ports = rule.ports.as_ref().map_or(String::new(), |ports| {
            let port = |port: &crate::model::PortMatch| match &port.port {
                PortSelector::Any => port.protocol.to_string(),
                PortSelector::Range(from, to) if from == to => format!("{}/{from}", port.protocol),
                PortSelector::Range(from, to) => format!("{}/{from}-{to}", port.protocol),
                PortSelector::Named(name) => format!("{}/{name}", port.protocol),
            };
            format!(" {}", ports.iter().map(port).collect::<Vec<_>>().join(","))
        });
        format!("{:?} {peers}{ports}", rule.action)
    };
    let rules: Vec<String> = rules.iter().map(rule).collect();
    let default = if *default == Action::Deny { "deny" } else { "pass" };
    format!("[{}] else {default}", rules.join("; "))
}

fn ingress(text: &str) -> String {
    direction(&spec(&format!("ingress: {text}")).ingress)
}

fn egress(text: &str) -> String {
    direction(&spec(&format!("egress: {text}")).egress)
}

#[test]
fn an_empty_list_is_nobody_and_no_list_is_everyone() {
    for (rules, read) in [
        // No rule is nothing said; an empty one isolates and allows nothing.
        ("[]", "-"),
        ("[{}]", "[] else deny"),
        ("[{fromEndpoints: []}]", "[] else deny"),
        ("[{fromEndpoints: [{}]}]", "[Allow pods()] else deny"),
        ("[{fromEndpoints: [], toPorts: [{ports: [{port: '80'}]}]}]", "[] else deny"),
        ("[{fromCIDRSet: []}]", "[] else deny"),
        ("[{fromGroups: [{aws: {region: x}}]}]", "[] else deny"),
        ("[{toPorts: [{ports: [{port: '80', protocol: TCP}]}]}]", "[Allow everyone TCP/80] else deny"),
        ("[{toPorts: []}]", "[] else deny"),
        ("[{toPorts: [{}], fromEndpoints: [{}]}]", "[] else deny"),
        ("[{fromEntities: [all]}]", "[Allow everyone] else deny"),
    ] {
        assert_eq!(ingress(rules), read, "{rules}");
    }
}

#[test]
fn namespaces_of_endpoints_are_the_policys_own_unless_a_key_says_otherwise() {
    let own = |key: &str| ingress(&format!("[{{fromEndpoints: [{{matchLabels: {{{key}}}}}]}}]"));
    for (labels, read) in [
        ("app: web", "pods(app=web)"),
        ("'k8s:app': web", "pods(app=web)"),
        ("'any:app': web", "pods(app=web)"),
        ("'container:app': web", "pods(=)"),
        ("'k8s:io.kubernetes.pod.namespace': dns", "pods( in kubernetes.io/metadata.name=dns)"),
        ("io.kubernetes.pod.namespace: dns, app: web", "pods(app=web in kubernetes.io/metadata.name=dns)"),
        ("'k8s:io.cilium.k8s.namespace.labels.team': red", "pods( in team=red)"),
        (
            "'k8s:io.cilium.k8s.policy.serviceaccount': robot",
            "pods(io.cilium.k8s.policy.serviceaccount=robot)",
        ),
        ("'k8s:io.cilium.k8s.policy.cluster': default", "pods()"),
        ("'k8s:io.cilium.k8s.policy.cluster': other", "pods(=)"),
        ("'reserved:host': ''", "Entity(Host)"),
        ("'reserved:kube-apiserver': ''", "Entity(KubeApiServer)"),
    ] {
        assert_eq!(own(labels), format!("[Allow {read}] else deny"), "{labels}");
    }
    // The cluster's policies speak of pods of all namespaces, and of pods only.
    let all = direction(&clusterwide("ingress: [{fromEndpoints: [{}]}]").ingress);
    assert_eq!(all, "[Allow pods( in )] else deny");
    let some = direction(&clusterwide("ingress: [{fromEndpoints: [{matchLabels: {app: web}}]}]").ingress);
    assert_eq!(some, "[Allow pods(app=web in )] else deny");
}

#[test]
fn bypass_13_a_policy_selects_in_its_own_namespace_only() {
    let subject = |selector: &str| {
        let policy = read::<CiliumNetworkPolicy>(&format!("spec: {{endpointSelector: {selector}}}"));
        let Subject::Pods { namespaces, pods } = &policy.subject else { panic!("pods") };
        (self::selector(namespaces), self::selector(pods), policy.doubts.len())
    };
    let owned = |a: &str, b: &str, doubts| (a.to_owned(), b.to_owned(), doubts);
    let own = "kubernetes.io/metadata.name=shop";
    assert_eq!(subject("{matchLabels: {'k8s:app': web}}"), owned("", "app=web", 0));
    assert_eq!(subject("{matchLabels: {io.kubernetes.pod.namespace: shop}}"), owned(own, "", 0));
    assert_eq!(subject("{matchLabels: {'k8s:io.kubernetes.pod.namespace': other}}"), owned("", "", 1));
    // By an expression it selects nobody: the own namespace is asked for in any case.
    let crafted =
        "{matchExpressions: [{key: 'k8s:io.kubernetes.pod.namespace', operator: In, values: [other]}]}";
    assert_eq!(subject(crafted), owned("kubernetes.io/metadata.name=other", "", 0));
    assert_eq!(spec("").reference.namespace.as_deref(), Some("shop"));
    assert_eq!(subject("{matchLabels: {'reserved:host': ''}}"), owned("", "=", 0));
    assert_eq!(subject("{matchLabels: {'a b': c}}"), owned("", "", 1));
}

#[test]
fn peers_of_every_kind() {
    for (rules, read) in [
        ("[{toCIDR: [10.0.0.0/8, 192.0.2.1, '2001:db8::1']}]", "10.0.0.0/8,192.0.2.1/32,2001:db8::1/128"),
        ("[{toCIDRSet: [{cidr: 10.0.0.0/8, except: [10.1.0.0/16]}]}]", "10.0.0.0/8 but [10.1.0.0/16]"),
        ("[{toEntities: [world, cluster]}]", "Entity(World),Entity(Cluster)"),
        ("[{toEntities: [world-ipv4]}]", "0.0.0.0/0"),
        ("[{toEntities: [none]}]", "Entity(Nobody)"),
        ("[{toNodes: [{matchLabels: {'node:zone': a}}]}]", "nodes(zone=a)"),
        (
            "[{toCIDRSet: [{cidrGroupRef: office, except: [10.1.0.0/16]}]}]",
            "Groups { groups: Named(\"office\"), except: [10.1.0.0/16] }",
        ),
    ] {
        assert_eq!(egress(rules), format!("[Allow {read}] else deny"), "{rules}");
    }
    let services = spec("egress: [{toServices: [{k8sService: {serviceName: db}}]}]").egress.expect("egress");
    let Some(Peer::Services(selector)) = services.rules[0].peers.as_ref().and_then(|peers| peers.first())
    else {
        panic!("a Service: {services:?}")
    };
    assert_eq!(selector.namespace.as_deref(), Some("shop"));
    assert_eq!(selector.services, ServiceName::Named("db".into()));
}

#[test]
fn ports_of_every_kind() {
    for (ports, read) in [
        ("{port: '80'}", "TCP/80,UDP/80,SCTP/80"),
        ("{port: '80', protocol: ANY}", "TCP/80,UDP/80,SCTP/80"),
        ("{port: '0', protocol: UDP}", "UDP"),
        ("{port: '8000', endPort: 8100, protocol: TCP}", "TCP/8000-8100"),
        ("{port: http, protocol: TCP}", "TCP/http"),
        ("{port: 443, protocol: tcp}", "TCP/443"),
        ("{protocol: GRE}", "GRE"),
        ("{protocol: VRRP}", "VRRP"),
    ] {
        let rules = format!("[{{toEntities: [all], toPorts: [{{ports: [{ports}]}}]}}]");
        assert_eq!(egress(&rules), format!("[Allow everyone {read}] else deny"), "{ports}");
    }
    for wrong in
        ["{port: '80', endPort: 79}", "{protocol: TCP}", "{port: '80', protocol: GRE}", "{port: '-1'}"]
    {
        let rules = format!("[{{toEntities: [all], toPorts: [{{ports: [{wrong}]}}]}}]");
        assert_eq!(egress(&rules), "[] else deny", "{wrong}");
    }
    let messages = "[{icmps: [{fields: [{type: 8}, {family: IPv6, type: EchoRequest}, {type: Nonsense}]}]}]";
    assert_eq!(egress(messages), "[Allow everyone ICMP/8,ICMPv6/128] else deny");
}

#[test]
fn names_of_dns_are_peers() {
    let names =
        "[{toFQDNs: [{matchName: Example.ORG.}, {matchPattern: '**.cdn.test'}, {matchPattern: '*'}]}]";
    let policy = spec(&format!("egress: {names}"));
    let rules = &policy.egress.as_ref().expect("egress is said").rules;
    let texts = rules[0].peers.iter().flatten().map(|peer| match peer {
        Peer::Name(rule) => rule.to_string(),
        other => format!("{other:?}"),
    });
    let texts: Vec<String> = texts.collect();
    assert_eq!(texts, ["matchName example.org", "matchPattern **.cdn.test", "matchPattern *"]);
    for nonsense in [
        "[{toFQDNs: [{matchName: '*.a'}]}]",
        "[{toFQDNs: [{}]}]",
        "[{toFQDNs: [{matchName: a.b, matchPattern: a.b}]}]",
        "[{toFQDNs: [{matchName: a.b}], toEndpoints: [{}]}]",
    ] {
        let policy = spec(&format!("egress: {nonsense}"));
        assert_eq!(direction(&policy.egress), "[] else deny", "{nonsense}");
        assert_eq!(policy.doubts.len(), 1, "{nonsense}: {:?}", policy.doubts);
    }
}

#[test]
fn what_is_not_enforced_allows_nothing_and_is_said() {
    for (rules, said) in [
        (
            "[{toPorts: [{ports: [{port: '80'}], rules: {l7proto: x, l7: []}}]}]",
            "spec.egress[0].toPorts[0].rules.l7proto",
        ),
        ("[{toEndpoints: [{}], authentication: {mode: required}}]", "spec.egress[0].authentication.mode"),
        (
            "[{toPorts: [{ports: [{port: '443'}], terminatingTLS: {secret: {name: a}}}]}]",
            "spec.egress[0].toPorts[0].terminatingTLS",
        ),
        (
            "[{toPorts: [{ports: [{port: '443'}], listener: {name: a}}]}]",
            "spec.egress[0].toPorts[0].listener",
        ),
    ] {
        let policy = spec(&format!("egress: {rules}"));
        assert_eq!(direction(&policy.egress), "[] else deny", "{rules}");
        assert_eq!(policy.doubts.len(), 1, "{:?}", policy.doubts);
        assert!(policy.doubts[0].starts_with(said), "{:?}", policy.doubts);
    }
    // What asks for nothing is not in the way.
    let plain = "[{toEndpoints: [{}], authentication: {mode: disabled}, toPorts: [{ports: [{port: '80', protocol: TCP}], rules: {}}]}]";
    assert_eq!(egress(plain), "[Allow pods() TCP/80] else deny");
}

#[test]
fn rules_of_layer_7_are_read_for_the_protocols_that_they_are_for() {
    let read = |rules: &str| {
        let policy = spec(&format!("ingress: [{{toPorts: [{rules}]}}]"));
        let rules = policy.ingress.iter().flat_map(|ingress| &ingress.rules);
        let line = |rule: &crate::model::PolicyRule| {
            let ports = rule.ports.iter().flatten().map(|port| format!("{}", port.protocol));
            let l7 = rule.l7.as_ref().map(|rules| serde_json::to_string(&**rules).expect("JSON"));
            format!("{} {}", ports.collect::<Vec<_>>().join(","), l7.unwrap_or_default())
        };
        (rules.map(line).collect::<Vec<_>>(), policy.doubts)
    };
    for (rules, wanted) in [
        (
            "{ports: [{port: '80'}], rules: {http: [{method: GET, path: /health}, {headers: ['X-A: 1']}]}}",
            r#"TCP {"http":[{"headers":[{"name":"X-A","value":"1","mismatch":"DENY"}]},{"method":"GET","path":"/health"}]}"#,
        ),
        ("{ports: [{port: '80', protocol: TCP}], rules: {http: [{}]}}", r#"TCP {"http":[{}]}"#),
        (
            "{ports: [{port: '443', protocol: TCP}], serverNames: [a.example]}",
            r#"TCP {"serverNames":["a.example"]}"#,
        ),
        ("{ports: [{port: '80', protocol: TCP}], rules: {http: []}}", "TCP "),
    ] {
        assert_eq!(read(rules), (vec![wanted.to_owned()], Vec::new()), "{rules}");
    }
    // One line that cannot be read allows nothing; none that can, nothing at all.
    let (rules, doubts) = read(
        "{ports: [{port: '80', protocol: TCP}], rules: {http: [{method: GET}, {path: '('}, {verb: GET}]}}",
    );
    assert_eq!(rules, [r#"TCP {"http":[{"method":"GET"}]}"#]);
    assert_eq!(doubts.len(), 2, "{doubts:?}");
    for rules in [
        "{ports: [{port: '80', protocol: TCP}], rules: {http: [{path: '('}]}}",
        "{ports: [{port: '80', protocol: UDP}], rules: {http: [{}]}}",
        "{ports: [{port: '0', protocol: TCP}], rules: {http: [{}]}}",
        "{ports: [{port: '80', protocol: TCP}], rules: {http: [{}], dns: [{matchPattern: '*'}]}}",
        "{ports: [{port: '80', protocol: TCP}], rules: {http: [{headerMatches: [{name: a, secret: {name: b}}]}]}}",
        "{ports: [{port: '9092', protocol: TCP}], rules: {kafka: [{role: produce, apiKey: fetch}]}}",
        "{ports: [{port: '9092', protocol: TCP}], rules: {kafka: [{role: produce, topic: 'a b'}]}}",
        "{ports: [{port: '53', protocol: ANY}], rules: {dns: [{matchName: 'a..b'}]}}",
    ] {
        let (rules, doubts) = read(rules);
        assert_eq!((rules, doubts.len()), (vec![], 1), "{doubts:?}");
    }
    let names = "{ports: [{port: '53', protocol: ANY}], rules: {dns: [{matchName: A.example.}, {matchPattern: '*.b'}]}}";
    let said = r#"{"dns":[{"matchName":"a.example"},{"matchPattern":"*.b"}]}"#;
    assert_eq!(read(names).0, [format!("TCP,UDP {said}")]);
    let topics = "{ports: [{port: '9092', protocol: TCP}], rules: {kafka: [{apiKey: produce, topic: t}]}}";
    assert_eq!(read(topics).0, [r#"TCP {"kafka":[{"apiKeys":[0],"topic":"t"}]}"#]);
    let both = read(
        "{ports: [{port: '81', protocol: TCP}]}, {ports: [{port: '80', protocol: TCP}], rules: {http: [{}]}}",
    );
    assert_eq!(both.0, ["TCP ", r#"TCP {"http":[{}]}"#]);
}

#[test]
fn what_denies_is_not_narrower_for_what_cannot_be_read() {
    let deny = |rules: &str| direction(&spec(&format!("ingressDeny: {rules}")).ingress);
    for (rules, read) in [
        ("[{fromEndpoints: [{}]}]", "[Deny pods()] else deny"),
        ("[{}]", "[] else deny"),
        ("[{fromEndpoints: [{matchLabels: {'a b': c}}]}]", "[Deny everyone] else deny"),
        ("[{fromCIDR: [nonsense]}]", "[Deny everyone] else deny"),
        ("[{fromEntities: [world], toPorts: [{ports: [{port: x y}]}]}]", "[Deny Entity(World)] else deny"),
        ("[{fromEntities: [world], strange: 1}]", "[Deny Entity(World)] else deny"),
    ] {
        assert_eq!(deny(rules), read, "{rules}");
    }
    let named = spec("egressDeny: [{toFQDNs: [{matchName: example.org}]}]");
    assert_eq!(direction(&named.egress), "[Deny everyone] else deny");
}

#[test]
fn default_deny_is_per_direction_and_can_be_switched_off() {
    let both = |text: &str| {
        let policy = spec(text);
        (direction(&policy.ingress), direction(&policy.egress))
    };
    let owned = |a: &str, b: &str| (a.to_owned(), b.to_owned());
    assert_eq!(both("ingress: [{fromEndpoints: [{}]}]"), owned("[Allow pods()] else deny", "-"));
    assert_eq!(
        both("egressDeny: [{toEntities: [world]}], enableDefaultDeny: {egress: false}"),
        owned("-", "[Deny Entity(World)] else pass")
    );
    assert_eq!(both("enableDefaultDeny: {ingress: true}"), owned("[] else deny", "-"));
    // What is not read may have been rules.
    assert_eq!(both("ingres: [{}]"), owned("[] else deny", "[] else deny"));
    assert_eq!(both("ingress: 7"), owned("[] else deny", "-"));
}

#[test]
fn every_spec_is_a_policy_by_itself() {
    let policy = read::<CiliumNetworkPolicy>(
        "specs: [{endpointSelector: {matchLabels: {app: a}}, ingress: [{}]}, \
         {endpointSelector: {matchLabels: {app: b}}, egress: [{}]}]",
    );
    assert_eq!((policy.reference.spec, policy.others[0].reference.spec), (0, 1));
    assert!(policy.ingress.is_some() && policy.egress.is_none());
    assert!(policy.others[0].ingress.is_none() && policy.others[0].egress.is_some());
    let neither = read::<CiliumNetworkPolicy>("description: nothing");
    assert_eq!(neither.doubts.len(), 2);
    assert_eq!((neither.ingress, neither.egress), (None, None));
}

#[test]
fn policies_of_the_cluster_may_select_nodes() {
    let policy = read::<CiliumClusterwideNetworkPolicy>(
        "spec: {nodeSelector: {matchLabels: {zone: a}}, ingress: [{fromEntities: [cluster]}]}",
    );
    assert!(matches!(&policy.subject, Subject::Nodes(nodes) if selector(nodes) == "zone=a"));
    assert!(policy.doubts.is_empty(), "{:?}", policy.doubts);
    assert_eq!(direction(&policy.ingress), "[Allow Entity(Cluster)] else deny");
}

#[test]
fn whom_nobody_meant_is_allowed_nothing() {
    let rules = "ingress: [{}, {fromEntities: [all]}], ingressDeny: [{fromEntities: [world]}]";
    for (selector, kept) in [
        ("{matchLabels: {app: web}}", "[Deny Entity(World); Allow everyone] else deny"),
        ("{matchLabels: {app: web, 'a b': c}}", "[Deny Entity(World)] else deny"),
        ("7", "[Deny Entity(World)] else deny"),
    ] {
        let policy = read::<CiliumNetworkPolicy>(&format!("spec: {{endpointSelector: {selector}, {rules}}}"));
        assert_eq!(direction(&policy.ingress), kept, "{selector}: {:?}", policy.doubts);
    }
    let everywhere =
        read::<CiliumClusterwideNetworkPolicy>(&format!("spec: {{endpointSelector: 7, {rules}}}"));
    assert_eq!((direction(&everywhere.ingress), everywhere.doubts.len()), ("-".to_owned(), 1));
}

#[test]
fn a_deny_rule_counts_whatever_else_it_says() {
    let policy = spec("ingressDeny: [{fromEntities: [world], authentication: {mode: required}}]");
    assert_eq!(direction(&policy.ingress), "[Deny Entity(World)] else deny");
    assert_eq!(policy.doubts.len(), 1, "{:?}", policy.doubts);
}
