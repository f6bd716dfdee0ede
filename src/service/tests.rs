use std::net::SocketAddr;

use super::*;
use crate::model::{
    Algorithm, FrontendKind, Hints, Protocol, Scope, ServicePort, SliceBackend, SlicePort, TrafficPolicy,
};

fn service(name: &str, addresses: &[&str], ports: &[(&str, Protocol, u16)]) -> (ObjectKey, Arc<Service>) {
    let key = ObjectKey::new("shop", name);
    let addresses = addresses.iter().map(|text| ip(text)).collect();
    (key.clone(), Arc::new(Service { addresses, ports: ports_of(ports), ..Service::new(key) }))
}

fn slice(
    name: &str,
    service: &str,
    ports: &[(&str, Protocol, u16)],
    backends: &[SliceBackend],
) -> (ObjectKey, Arc<EndpointSlice>) {
    let key = ObjectKey::new("shop", name);
    let service = ObjectKey::new("shop", service);
    let (ports, backends) = (slice_ports(ports), backends.to_vec());
    (key.clone(), Arc::new(EndpointSlice { key, service, ports, backends }))
}

fn slice_ports(ports: &[(&str, Protocol, u16)]) -> Vec<SlicePort> {
    let port = |(name, protocol, port): &(&str, Protocol, u16)| SlicePort {
        name: name.to_string(),
        protocol: *protocol,
        port: *port,
    };
    ports.iter().map(port).collect()
}

fn ports_of(ports: &[(&str, Protocol, u16)]) -> Vec<ServicePort> {
    let port = |(name, protocol, port): &(&str, Protocol, u16)| ServicePort {
        name: name.to_string(),
        protocol: *protocol,
        port: *port,
        node_port: None,
    };
    ports.iter().map(port).collect()
}

fn ready(address: &str) -> SliceBackend {
    SliceBackend::ready(ip(address))
}

fn ending(address: &str, serving: bool) -> SliceBackend {
    SliceBackend { ready: false, serving, terminating: true, ..ready(address) }
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// Frontends as `address:port/protocol -> backends`.
fn shown(output: &Output) -> Vec<String> {
    let show = |(key, frontend): (&FrontendKey, &Frontend)| {
        let backends: Vec<String> = frontend.addresses().map(|address| address.to_string()).collect();
        format!("{key} {} [{}]", frontend.service, backends.join(" "))
    };
    output.frontends.iter().map(show).collect()
}

/// The node a of zone z, beside the node b.
fn place() -> Place {
    Place {
        node: "a".into(),
        zone: Some("z".into()),
        defaults: Defaults::default(),
        own: ["127.0.0.1", "192.0.2.1", "2001:db8::1"].map(ip).into(),
        others: ["192.0.2.2"].map(ip).into(),
        pod_cidrs: ["10.0.0.0/16".parse().expect("a CIDR")].into(),
        redirects: BTreeMap::new(),
    }
}

fn compiled(services: &[(ObjectKey, Arc<Service>)], slices: &[(ObjectKey, Arc<EndpointSlice>)]) -> Output {
    frontends(&services.iter().cloned().collect(), &slices.iter().cloned().collect(), &place())
}

fn said(output: &Output) -> Vec<String> {
    output.conflicts.values().flatten().map(ToString::to_string).collect()
}

/// `edit` to the Service of this name, address and port 80.
fn edited(name: &str, address: &str, edit: impl FnOnce(&mut Service)) -> (ObjectKey, Arc<Service>) {
    let (key, row) = service(name, &[address], &[("", TCP, 80)]);
    let mut row = Service::clone(&row);
    edit(&mut row);
    (key, Arc::new(row))
}

/// A backend on a node, with hints for zones and nodes.
fn on(address: &str, node: &str, zones: &[&str], nodes: &[&str]) -> SliceBackend {
    let list = |names: &[&str]| names.iter().map(|name| Arc::from(*name)).collect();
    let hints = Hints { zones: list(zones), nodes: list(nodes) };
    let hints = (hints != Hints::default()).then(|| Arc::new(hints));
    SliceBackend { node: Some(node.into()), hints, ..ready(address) }
}

/// Last numbers of the backends of a frontend, `drain` those that drain, `drop` where it has others.
fn cell(frontend: Option<&Frontend>) -> String {
    let Some(frontend) = frontend else { return "none".to_owned() };
    let last = |address: SocketAddr| address.ip().to_string().rsplit('.').next().map(str::to_owned);
    let numbers =
        |list: &mut dyn Iterator<Item = SocketAddr>| list.filter_map(last).collect::<Vec<_>>().join(" ");
    let mut text = numbers(&mut frontend.addresses());
    if !frontend.draining.is_empty() {
        text += &format!(" drain {}", numbers(&mut frontend.draining.iter().copied()));
    }
    text + if frontend.has_others { " drop" } else { "" }
}

const TCP: Protocol = Protocol::Tcp;
const UDP: Protocol = Protocol::Udp;

#[test]
fn ports_meet_by_name_and_protocol_in_each_family() {
    let services = [service("dns", &["10.96.0.10", "fd96::a"], &[("dns", UDP, 53), ("dns-tcp", TCP, 53)])];
    let ports = [("dns", UDP, 5353), ("dns-tcp", TCP, 5354), ("dns", TCP, 1)];
    let slices = [
        slice("dns-b", "dns", &ports, &[ready("10.0.0.3")]),
        slice("dns-a", "dns", &ports, &[ready("10.0.0.9"), ready("10.0.0.3")]),
        slice("dns-6", "dns", &ports, &[ready("fd00::3")]),
        slice("other", "web", &ports, &[ready("10.0.0.77")]),
    ];
    let output = compiled(&services, &slices);
    assert_eq!(
        shown(&output),
        [
            "10.96.0.10:0/any shop/dns []",
            "10.96.0.10:53/TCP shop/dns [10.0.0.3:5354 10.0.0.9:5354]",
            "10.96.0.10:53/UDP shop/dns [10.0.0.3:5353 10.0.0.9:5353]",
            "[fd96::a]:0/any shop/dns []",
            "[fd96::a]:53/TCP shop/dns [[fd00::3]:5354]",
            "[fd96::a]:53/UDP shop/dns [[fd00::3]:5353]",
        ]
    );
    assert!(output.conflicts.is_empty());
}

#[test]
fn ending_backends_serve_only_where_none_is_ready() {
    let web = || service("web", &["10.96.0.1"], &[("", TCP, 80)]);
    let of = |backends: &[SliceBackend]| {
        let slices = [slice("web", "web", &[("", TCP, 8080)], backends)];
        shown(&compiled(&[web()], &slices)).remove(1)
    };
    let not_ready = SliceBackend { ready: false, serving: false, ..ready("10.0.0.1") };
    let all = [not_ready.clone(), ending("10.0.0.2", true), ending("10.0.0.3", false), ready("10.0.0.4")];
    assert_eq!(of(&all), "10.96.0.1:80/TCP shop/web [10.0.0.4:8080]");
    assert_eq!(of(&all[..3]), "10.96.0.1:80/TCP shop/web [10.0.0.2:8080]");
    assert_eq!(of(&[not_ready]), "10.96.0.1:80/TCP shop/web []");
}

#[test]
fn headless_services_and_unusable_addresses_have_no_rows() {
    let services = [
        service("headless", &[], &[("", TCP, 80)]),
        service("loop", &["127.0.0.1"], &[("", TCP, 80)]),
        service("web", &["10.96.0.1"], &[("", TCP, 80)]),
    ];
    let hostile = ["127.0.0.1", "169.254.169.254", "0.0.0.0", "224.0.0.1"].map(ready);
    let slices = [slice("web", "web", &[("", TCP, 8080)], &hostile)];
    let output = compiled(&services, &slices);
    assert_eq!(shown(&output), ["10.96.0.1:0/any shop/web []", "10.96.0.1:80/TCP shop/web []"]);
}

#[test]
fn an_address_in_two_services_is_the_first_ones() {
    let services = [
        service("b", &["10.96.0.1", "10.96.0.2"], &[("", TCP, 80)]),
        service("a", &["10.96.0.1"], &[("", UDP, 53)]),
    ];
    let output = compiled(&services, &[]);
    assert_eq!(
        shown(&output),
        [
            "10.96.0.1:0/any shop/a []",
            "10.96.0.1:53/UDP shop/a []",
            "10.96.0.2:0/any shop/b []",
            "10.96.0.2:80/TCP shop/b []",
        ]
    );
    assert_eq!(said(&output), ["Service shop/b has the cluster IP 10.96.0.1, which is Service shop/a's"]);
}

/// Every kind of frontend, scope and policy, for backends here, elsewhere and nowhere.
#[test]
fn a18_who_gets_which_backends_by_kind_policy_and_place_external_addresses_included() {
    let here = on("10.0.0.1", "a", &[], &[]);
    let there = on("10.0.1.2", "b", &[], &[]);
    let ends_here = SliceBackend { ready: false, terminating: true, ..here.clone() };
    let backends = [
        ("both", vec![here.clone(), there.clone()]),
        ("there", vec![there.clone()]),
        ("ends here", vec![ends_here, there]),
        ("none", vec![]),
    ];
    let mut table = Vec::new();
    for (internal, external) in [
        (TrafficPolicy::Cluster, TrafficPolicy::Cluster),
        (TrafficPolicy::Local, TrafficPolicy::Cluster),
        (TrafficPolicy::Cluster, TrafficPolicy::Local),
        (TrafficPolicy::Local, TrafficPolicy::Local),
    ] {
        for (where_, backends) in &backends {
            let web = edited("web", "10.96.0.1", |web| {
                web.ports[0].node_port = Some(30080);
                web.balancer_addresses = vec![ip("203.0.113.1")];
                web.external_addresses = vec![ip("203.0.113.2")];
                (web.internal_policy, web.external_policy) = (internal, external);
            });
            let output = compiled(&[web], &[slice("web", "web", &[("", TCP, 8080)], backends)]);
            let of = |address: &str, port, scope| {
                cell(output.frontends.get(&FrontendKey::new(ip(address), port, TCP, scope)))
            };
            let cluster_ip = of("10.96.0.1", 80, Scope::Internal);
            let inside = of("192.0.2.1", 30080, Scope::Internal);
            let outside = of("192.0.2.1", 30080, Scope::External);
            // Pods and nodes get the same at every address but the cluster IP, and so does the network.
            for address in ["203.0.113.1", "203.0.113.2"] {
                assert_eq!(of(address, 80, Scope::Internal), inside);
                assert_eq!(of(address, 80, Scope::External), outside);
            }
            assert_eq!(of("127.0.0.1", 30080, Scope::Internal), inside);
            assert_eq!(of("192.0.2.2", 30080, Scope::Internal), inside);
            for nobodys in ["10.96.0.1", "127.0.0.1", "192.0.2.2"] {
                assert_eq!(
                    of(nobodys, if nobodys == "10.96.0.1" { 80 } else { 30080 }, Scope::External),
                    "none"
                );
            }
            table.push(format!("{internal:?} {external:?}, {where_}: {cluster_ip} | {inside} | {outside}"));
        }
    }
    assert_eq!(
        table,
        [
            "Cluster Cluster, both: 1 2 | 1 2 | 1 2",
            "Cluster Cluster, there: 2 | 2 | 2",
            "Cluster Cluster, ends here: 2 drain 1 | 2 drain 1 | 2 drain 1",
            "Cluster Cluster, none:  |  | ",
            "Local Cluster, both: 1 drain 2 | 1 2 | 1 2",
            "Local Cluster, there:  drain 2 drop | 2 | 2",
            "Local Cluster, ends here: 1 drain 2 | 2 drain 1 | 2 drain 1",
            "Local Cluster, none:  |  | ",
            "Cluster Local, both: 1 2 | 1 2 | 1 drain 2",
            "Cluster Local, there: 2 | 2 |  drain 2 drop",
            "Cluster Local, ends here: 2 drain 1 | 2 drain 1 | 1 drain 2",
            "Cluster Local, none:  |  | ",
            "Local Local, both: 1 drain 2 | 1 2 | 1 drain 2",
            "Local Local, there:  drain 2 drop | 2 |  drain 2 drop",
            "Local Local, ends here: 1 drain 2 | 2 drain 1 | 1 drain 2",
            "Local Local, none:  |  | ",
        ]
    );
}

#[test]
fn hints_count_only_where_every_ready_backend_has_one_and_one_is_for_here() {
    let rows = [
        // Zones.
        ("one here", vec![on("10.0.0.1", "a", &["z"], &[]), on("10.0.0.2", "b", &["y"], &[])], "1 drain 2"),
        ("none here", vec![on("10.0.0.1", "b", &["x"], &[]), on("10.0.0.2", "b", &["y"], &[])], "1 2"),
        ("one without", vec![on("10.0.0.1", "a", &["z"], &[]), on("10.0.0.2", "b", &[], &[])], "1 2"),
        // Nodes come first, and fall back to zones.
        (
            "this node",
            vec![on("10.0.0.1", "a", &["z"], &["a"]), on("10.0.0.2", "b", &["z"], &["b"])],
            "1 drain 2",
        ),
        (
            "this zone",
            vec![on("10.0.0.1", "c", &["z"], &["c"]), on("10.0.0.2", "b", &["y"], &["b"])],
            "1 drain 2",
        ),
        // Of what is not ready no hint counts, and what ends is taken wherever it is.
        (
            "not ready",
            vec![
                SliceBackend { ready: false, serving: false, ..on("10.0.0.1", "a", &[], &[]) },
                on("10.0.0.2", "b", &["z"], &[]),
            ],
            "2 drain 1",
        ),
        (
            "all end",
            vec![
                SliceBackend { ready: false, terminating: true, ..on("10.0.0.1", "a", &["z"], &[]) },
                SliceBackend { ready: false, terminating: true, ..on("10.0.0.2", "b", &["y"], &[]) },
            ],
            "1 2",
        ),
    ];
    for (name, backends, expected) in rows {
        let slices = [slice("web", "web", &[("", TCP, 8080)], &backends)];
        let output = compiled(&[service("web", &["10.96.0.1"], &[("", TCP, 80)])], &slices);
        let key = FrontendKey::new(ip("10.96.0.1"), 80, TCP, Scope::Internal);
        assert_eq!(cell(output.frontends.get(&key)), expected, "{name}");
    }
}

#[test]
fn what_a_service_asks_for_is_in_its_frontends() {
    let ranges: Arc<[ipnet::IpNet]> = ["198.51.100.0/24".parse().expect("a CIDR")].into();
    let web = edited("web", "10.96.0.1", |web| {
        web.ports[0].node_port = Some(30080);
        web.balancer_addresses = vec![ip("203.0.113.1")];
        (web.affinity, web.algorithm) = (Some(60), Some(Algorithm::Maglev));
        web.forwarding = Some(crate::model::Forwarding::Dsr);
        web.source_ranges = ranges.clone();
    });
    let output = compiled(&[web], &[]);
    for (key, frontend) in output.frontends.iter().filter(|(key, _)| key.protocol.is_some()) {
        assert_eq!((frontend.affinity, frontend.algorithm), (Some(60), Algorithm::Maglev), "{key}");
        let is_external = key.scope == Scope::External;
        assert_eq!(frontend.forwarding == crate::model::Forwarding::Dsr, is_external, "{key}");
        // Who may come by a load balancer; a node port is another door.
        let is_balancer = is_external && frontend.kind == FrontendKind::LoadBalancer;
        assert_eq!(
            frontend.source_ranges,
            if is_balancer { ranges.clone() } else { Arc::default() },
            "{key}"
        );
    }
}

/// No Service may get what is sent to pods, to other Services, or to another's port.
#[test]
fn addresses_from_outside_capture_nothing() {
    let at = |name: &str, address: &str, external: &str| {
        edited(name, address, |web| web.external_addresses = vec![ip(external)])
    };
    let node_port =
        |name: &str, address: &str, port| edited(name, address, |web| web.ports[0].node_port = Some(port));
    let services = [
        at("a", "10.96.0.1", "10.96.0.2"),
        at("b", "10.96.0.2", "10.0.7.7"),
        at("c", "10.96.0.3", "203.0.113.1"),
        at("d", "10.96.0.4", "203.0.113.1"),
        at("e", "10.96.0.5", "192.0.2.1"),
        node_port("f", "10.96.0.6", 80),
        node_port("g", "10.96.0.7", 80),
    ];
    let output = compiled(&services, &[]);
    assert_eq!(
        said(&output),
        [
            "Service shop/a has port 80 of the external IP 10.96.0.2, which is Service shop/b's",
            "Service shop/b has port 80 of the external IP 10.0.7.7, which is an address of pods: it is not served",
            "Service shop/d has port 80 of the external IP 203.0.113.1, which is Service shop/c's",
            "Service shop/e has port 80 of the external IP 192.0.2.1, which is Service shop/f's",
            "Service shop/g has the node port 80, which is Service shop/f's",
        ]
    );
    let owner = |address: &str| {
        let key = FrontendKey::new(ip(address), 80, TCP, Scope::External);
        output.frontends.get(&key).map(|frontend| frontend.service.name.to_string())
    };
    assert_eq!(owner("203.0.113.1").as_deref(), Some("c"));
    assert_eq!(owner("192.0.2.1").as_deref(), Some("f"));
    assert_eq!(owner("10.0.7.7"), None);
    assert_eq!(owner("10.96.0.2"), None);
}

#[test]
fn a_load_balancers_address_leads_nowhere_else_but_a_nodes_own_does() {
    let shared = |name: &str, address: &str, port| {
        let (key, row) = service(name, &[address], &[("", TCP, port)]);
        let balancer_addresses = vec![ip("203.0.113.1"), ip("192.0.2.1")];
        (key, Arc::new(Service { balancer_addresses, ..Service::clone(&row) }))
    };
    let all = [shared("a", "10.96.0.1", 80), shared("b", "10.96.0.2", 81)];
    let mut following = Frontends::default();
    let mut rest = |services: &[(ObjectKey, Arc<Service>)]| {
        let output = following.update(&services.iter().cloned().collect(), &Snapshot::new(), &place());
        assert_eq!(said(output), Vec::<String>::new());
        let row = output.frontends.get(&FrontendKey::rest_of(ip("203.0.113.1")));
        assert!(!output.frontends.contains_key(&FrontendKey::rest_of(ip("192.0.2.1"))), "a node's own");
        assert!(row.is_none_or(|row| row.backends.is_empty() && !row.has_others));
        row.map(|row| row.service.name.to_string())
    };
    assert_eq!(rest(&all).as_deref(), Some("a"));
    assert_eq!(rest(&all[1..]).as_deref(), Some("b"));
    assert_eq!(rest(&[]), None);
}

#[test]
fn a_trace_says_what_maglev_picks_and_where_a_redirection_leads() {
    let web = edited("web", "10.96.0.1", |web| web.algorithm = Some(crate::model::Algorithm::Maglev));
    let slices: Slices = [slice("web", "web", &[("", TCP, 8080)], &[ready("10.0.0.1"), ready("10.0.0.2")])]
        .into_iter()
        .collect();
    let services: Services = [web].into_iter().collect();
    let mut following = Frontends::default();
    following.update(&services, &slices, &place());
    let lines = traced(&following, Scope::Internal, Some("10.0.0.9"), "shop/web", "");
    let pick = "maglev: a new connection from 10.0.0.9:40000 goes to 10.0.0.2:8080, if its packets are \
                translated and not its socket";
    assert!(lines.contains(&pick.to_owned()), "{lines:?}");
    let lines = traced(&following, Scope::Internal, None, "shop/web", "");
    assert!(
        lines.contains(&"maglev: name the client as ADDRESS:PORT to learn which".to_owned()),
        "{lines:?}"
    );

    let policy = crate::model::LocalRedirect {
        key: ObjectKey::new("shop", "cache"),
        from: crate::model::RedirectFrom::Service(ObjectKey::new("shop", "web")),
        from_ports: vec![],
        selector: crate::model::Selector::default(),
        ports: vec![crate::model::RedirectPort { name: String::new(), port: 9090, protocol: TCP }],
    };
    let redirect = Redirect { policy: Arc::new(policy), pods: [ip("10.0.9.9")].into() };
    let redirected = Place { redirects: [(ObjectKey::new("shop", "web"), redirect)].into(), ..place() };
    following.update(&services, &slices, &redirected);
    let lines = traced(&following, Scope::Internal, Some("10.0.0.9"), "shop/web", "");
    assert_eq!(
        lines[lines.len() - 3..],
        [
            "+ 10.0.9.9:9090: a ready pod of this node that the policy selects",
            "- 10.0.0.1:8080: CiliumLocalRedirectPolicy shop/cache leads elsewhere",
            "- 10.0.0.2:8080: CiliumLocalRedirectPolicy shop/cache leads elsewhere",
        ]
    );
}

/// A trace as its verdict, its facts and its backends, a line each.
fn traced(
    following: &Frontends,
    scope: Scope,
    address: Option<&str>,
    service: &str,
    port: &str,
) -> Vec<String> {
    let question = crate::model::ServiceQuestion {
        client: String::new(),
        service: service.to_owned(),
        port: (!port.is_empty()).then(|| port.to_owned()),
        protocol: None,
    };
    match following.trace(
        Client { scope, address: address.map(ip), port: Some(40000) },
        &question,
        |of, _| of.addresses().last(),
    ) {
        Err(reason) => vec![reason],
        Ok(trace) => {
            let mut lines =
                vec![format!("{} {} {}: {}", trace.frontend, trace.kind, trace.service, trace.verdict)];
            lines.extend(trace.facts);
            let backend = |it: &crate::model::TracedBackend| {
                format!("{} {}: {}", if it.is_chosen { "+" } else { "-" }, it.address, it.why)
            };
            lines.extend(trace.backends.iter().map(backend));
            lines
        }
    }
}

#[test]
fn a_trace_says_which_backend_and_why() {
    let web = edited("web", "10.96.0.1", |web| {
        web.ports[0].node_port = Some(30080);
        web.balancer_addresses = vec![ip("203.0.113.1")];
        web.external_policy = TrafficPolicy::Local;
        web.affinity = Some(60);
        web.source_ranges = ["198.51.100.0/24".parse().expect("a CIDR")].into();
    });
    let backends = [
        on("10.0.0.1", "b", &["z"], &[]),
        on("10.0.0.2", "b", &["y"], &[]),
        SliceBackend { ready: false, serving: false, ..on("10.0.0.3", "a", &[], &[]) },
        SliceBackend { ready: false, terminating: true, ..on("10.0.0.4", "b", &[], &[]) },
    ];
    let slices = [slice("web", "web", &[("", TCP, 8080)], &backends)];
    let mut following = Frontends::default();
    following.update(&[web].into_iter().collect(), &slices.into_iter().collect(), &place());
    let asked = |scope, address, service, port| traced(&following, scope, address, service, port);
    assert_eq!(
        asked(Scope::Internal, None, "shop/web", ""),
        [
            "10.96.0.1:80/TCP ClusterIP shop/web: To 10.0.0.1:8080",
            "internalTrafficPolicy Cluster: backends of all nodes",
            "hints: every ready backend has one for zones, and one is for the zone z",
            "algorithm random: each connection gets any of them",
            "sessionAffinity ClientIP: a client keeps its backend until it was silent for 60 s",
            "+ 10.0.0.1:8080: ready",
            "- 10.0.0.2:8080: its hints are for zones y",
            "- 10.0.0.3:8080: not ready",
            "- 10.0.0.4:8080: it ends, and others are ready: running connections stay",
        ]
    );
    let outside = asked(Scope::External, Some("203.0.113.77"), "shop/web", "80");
    assert_eq!(
        outside[0],
        "192.0.2.1:30080/TCP NodePort shop/web: Dropped: no backend is on this node, and those of other nodes are \
         not for it"
    );
    assert_eq!(outside[4], "- 10.0.0.1:8080: on another node, and the policy is Local");
    let by_balancer = asked(Scope::External, Some("203.0.113.77"), "203.0.113.1", "80");
    let text = "203.0.113.1:80/TCP LoadBalancer shop/web: Dropped: 203.0.113.77 is in none of loadBalancerSourceRanges";
    assert_eq!(by_balancer[0], text);
    let refused = "10.96.0.1:0/any ClusterIP shop/web: The connection is refused";
    assert_eq!(asked(Scope::Internal, None, "10.96.0.1", "81")[0], refused);
    let only_inside = "10.96.0.1 port 80 leads to a service for pods and nodes only: for the network it is an address \
                       like any other";
    assert_eq!(asked(Scope::External, None, "10.96.0.1", "80"), [only_inside]);
    assert_eq!(
        asked(Scope::Internal, None, "shop/none", "80"),
        ["there is no Service shop/none that Weir serves"]
    );
    assert_eq!(asked(Scope::Internal, None, "shop/web", "http"), ["shop/web has no port http"]);
    let nobodys = "no service has 192.0.2.9 port 80: packets go where the routes say";
    assert_eq!(asked(Scope::Internal, None, "192.0.2.9", "80"), [nobodys]);
}

#[test]
fn health_counts_the_ready_backends_of_this_node() {
    let web = edited("web", "10.96.0.1", |web| web.health_port = Some(32000));
    let backends = [
        on("10.0.0.1", "a", &[], &[]),
        on("10.0.0.2", "a", &[], &[]),
        on("10.0.0.3", "b", &[], &[]),
        SliceBackend { ready: false, ..on("10.0.0.4", "a", &[], &[]) },
    ];
    let slices = [slice("web", "web", &[("", TCP, 8080)], &backends)];
    let health = compiled(&[web], &slices).health;
    assert_eq!(health.values().collect::<Vec<_>>(), [&Health { port: 32000, local_endpoints: 2 }]);
}

/// As for a DNS cache on each node: to the node's own pods as long as one is ready.
#[test]
fn a_redirected_service_leads_to_pods_of_this_node() {
    let port = |name: &str, port| crate::model::RedirectPort { name: name.to_owned(), port, protocol: UDP };
    let policy = crate::model::LocalRedirect {
        key: ObjectKey::new("shop", "cache"),
        from: crate::model::RedirectFrom::Service(ObjectKey::new("shop", "dns")),
        from_ports: vec![],
        selector: crate::model::Selector::default(),
        ports: vec![port("dns", 5353), port("other", 1)],
    };
    let redirect = Redirect { policy: Arc::new(policy), pods: [ip("10.0.9.9")].into() };
    let redirected = Place { redirects: [(ObjectKey::new("shop", "dns"), redirect)].into(), ..place() };
    let services: Services =
        [service("dns", &["10.96.0.10", "fd96::a"], &[("dns", UDP, 53), ("dns-tcp", TCP, 53)])]
            .into_iter()
            .collect();
    let ports = [("dns", UDP, 53), ("dns-tcp", TCP, 53)];
    let slices: Slices = [
        slice("dns", "dns", &ports, &[ready("10.0.0.3")]),
        slice("dns6", "dns", &ports, &[ready("fd00::3")]),
    ]
    .into_iter()
    .collect();
    let mut following = Frontends::default();
    let mut at = |place: &Place, address: &str, protocol| {
        let key = FrontendKey::new(ip(address), 53, protocol, Scope::Internal);
        cell(following.update(&services, &slices, place).frontends.get(&key))
    };
    assert_eq!(at(&place(), "10.96.0.10", UDP), "3");
    assert_eq!(at(&redirected, "10.96.0.10", UDP), "9 drain 3");
    // Neither a port nor a family that the pods have not.
    assert_eq!(at(&redirected, "10.96.0.10", TCP), "3");
    assert_eq!(at(&redirected, "fd96::a", UDP), "fd00::3");
    assert_eq!(at(&place(), "10.96.0.10", UDP), "3");
}

#[test]
fn rows_do_not_grow_with_nodes_times_node_ports() {
    let web = edited("web", "10.96.0.1", |web| web.ports[0].node_port = Some(30080));
    let rows = |nodes: u32| {
        let addresses = (0..nodes).map(|n| std::net::Ipv4Addr::from(0xc612_0000 + n).into());
        let place = Place { others: addresses.collect(), ..place() };
        frontends(&[web.clone()].into_iter().collect(), &Snapshot::new(), &place).frontends.len()
    };
    assert_eq!(rows(128) - rows(0), 128);
    assert_eq!(rows(129), rows(0));
}

#[derive(Clone, Debug)]
struct Step {
    what: u8,
    number: u8,
    of: u8,
    value: u8,
    more: u8,
}

fn steps() -> impl proptest::strategy::Strategy<Value = Vec<Step>> {
    use proptest::strategy::Strategy;
    let step = (0..8_u8, 0..5_u8, 0..5_u8, 0..4_u8, 0..16_u8);
    let step = step.prop_map(|(what, number, of, value, more)| Step { what, number, of, value, more });
    proptest::collection::vec(step, 1..40)
}

/// Few addresses, so that Services meet now and then.
fn take(step: &Step, services: &mut Services, slices: &mut Slices, place: &mut Place) {
    let Step { what, number, of, value, more } = step;
    let name = format!("s{number}");
    let key = ObjectKey::new("shop", name.as_str());
    match what {
        0 => drop(services.remove(&key)),
        1 => drop(slices.remove(&key)),
        2 => {
            place.zone = (more % 2 == 0).then(|| "z".into());
            place.own.insert(ip(&format!("10.96.0.{value}")));
            if more % 3 == 0 {
                place.own.remove(&ip("192.0.2.1"));
            } else {
                place.own.insert(ip("192.0.2.1"));
            }
            place.others = [ip(&format!("192.0.2.{}", 2 + value))].into();
        }
        3..=5 => {
            let (key, row) = edited(&name, &format!("10.96.0.{}", number + value / 2), |row| {
                row.addresses.push(ip(&format!("fd96::{number}")));
                row.ports[0].port = 80 + u16::from(*of) / 2;
                row.ports[0].node_port = (more % 2 == 0).then_some(80 + u16::from(*value) / 2);
                if more % 4 < 2 {
                    row.balancer_addresses = vec![ip(&format!("203.0.113.{}", value / 2))];
                }
                if more % 8 < 3 {
                    let external = ["192.0.2.1", "203.0.113.1", "10.96.0.1", "10.0.0.1"];
                    row.external_addresses = vec![ip(external[usize::from(*value)])];
                }
                row.external_policy =
                    if more % 3 == 0 { TrafficPolicy::Local } else { TrafficPolicy::Cluster };
            });
            services.insert(key, row);
        }
        _ => {
            let node = if more % 2 == 0 { "a" } else { "b" };
            let zones: &[&str] = if more % 4 == 0 { &["z"] } else { &[] };
            let backends =
                [on(&format!("10.0.0.{value}"), node, zones, &[]), ready(&format!("10.0.1.{value}"))];
            let (key, row) = slice(&name, &format!("s{of}"), &[("", TCP, 8080)], &backends);
            slices.insert(key, row);
        }
    }
}

proptest::proptest! {
    #[test]
    fn differences_add_up_to_the_whole(steps in steps()) {
        let (mut services, mut slices, mut place) = (Snapshot::new(), Snapshot::new(), place());
        let mut following = Frontends::default();
        for step in steps {
            take(&step, &mut services, &mut slices, &mut place);
            let fresh = frontends(&services, &slices, &place);
            proptest::prop_assert_eq!(following.update(&services, &slices, &place), &fresh);
        }
    }
}

/// One change costs what it changes, however many Services there are, conflicts or not.
#[test]
fn a_change_at_30_000_services_costs_what_it_changes() {
    let (mut services, mut slices) = (Snapshot::new(), Snapshot::new());
    for number in 0..30_000_u32 {
        let name = format!("s{number:05}");
        let address = std::net::Ipv4Addr::from(0x0a60_0000 + number / 2 * 2).to_string();
        let (key, row) = service(&name, &[&address], &[("", TCP, 80)]);
        services.insert(key, row);
        let backends =
            [1, 2, 3, 4].map(|n| ready(&std::net::Ipv4Addr::from(0x0a00_0000 + number * 4 + n).to_string()));
        let (key, row) = slice(&name, &name, &[("", TCP, 8080)], &backends);
        slices.insert(key, row);
    }
    let mut following = Frontends::default();
    let started = std::time::Instant::now();
    following.update(&services, &slices, &place());
    let whole = started.elapsed();
    assert_eq!(following.output.conflicts.len(), 15_000);
    let mut each = Vec::new();
    for number in 0..50_u8 {
        let (key, row) = slice("s20000", "s20000", &[("", TCP, 8080)], &[ready(&format!("10.9.9.{number}"))]);
        slices.insert(key, row);
        let started = std::time::Instant::now();
        following.update(&services, &slices, &place());
        each.push(started.elapsed());
    }
    each.sort();
    println!("30,000 Services: all {whole:?}, one change {:?}", each[25]);
    assert!(each[25] * 20 < whole, "one change {:?}, all {whole:?}", each[25]);
}

#[test]
fn a_policy_redirects_no_address_of_the_cluster_and_none_that_is_not_left_to_it() {
    let defaults = Defaults {
        redirect_cidrs: ["169.254.0.0/16".parse().expect("a CIDR")].into(),
        ..Defaults::default()
    };
    let place = Place {
        defaults,
        own: [ip("169.254.1.1")].into(),
        pod_cidrs: ["169.254.2.0/24".parse().expect("a CIDR")].into(),
        ..place()
    };
    let refused = |address: &str| place.keeps_from_redirects(&ip(address));
    assert_eq!(refused("169.254.169.254"), None);
    assert_eq!(refused("169.254.1.1"), Some("is a node's"));
    assert_eq!(refused("169.254.2.9"), Some("is within the pods' CIDRs"));
    assert_eq!(refused("192.0.2.1"), Some("is not within WEIR_REDIRECT_ADDRESSES"));
}
