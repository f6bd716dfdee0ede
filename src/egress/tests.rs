use std::collections::BTreeMap;

use super::*;
use crate::model::{AddressPair, Labels, MacAddress, PublishedEndpoint, Requirement, Selector};

fn is(key: &str, value: &str) -> Selector {
    Selector::new(vec![Requirement::In(key.to_owned(), [value.to_owned()].into())])
}

fn cidrs(text: &str) -> Vec<IpNet> {
    text.split_whitespace().map(|cidr| cidr.parse().expect("a CIDR")).collect()
}

fn gateway(role: &str, address: Option<&str>) -> EgressGateway {
    let address = address.map(|address| address.parse().expect("an address"));
    EgressGateway { nodes: is("role", role), interface: None, address }
}

fn policy(name: &str, destinations: &str, excluded: &str, gateways: Vec<EgressGateway>) -> EgressPolicy {
    EgressPolicy {
        key: ObjectKey::new("", name),
        pods: vec![EgressPods { pods: is("app", "web"), ..EgressPods::default() }],
        destinations: cidrs(destinations),
        excluded: cidrs(excluded),
        gateways,
        is_partial: false,
    }
}

fn snapshot(nodes: &[Node]) -> Snapshot<Arc<str>, Arc<Node>> {
    nodes.iter().map(|node| (Arc::from(node.name.as_str()), Arc::new(node.clone()))).collect()
}

struct World {
    policies: Vec<EgressPolicy>,
    nodes: Vec<Node>,
    /// Addresses that node4 says pods of an identity have.
    claims: Vec<(IpAddr, IdentityId)>,
}

impl World {
    fn new(policies: Vec<EgressPolicy>) -> Self {
        let node = |number: u8, role: &str| Node {
            name: format!("node{number}"),
            labels: Labels::from([("role".to_owned(), role.to_owned())]),
            addresses: vec![[192, 0, 2, number].into()],
            pod_cidrs: vec![],
            is_leaving: false,
            is_unready: false,
        };
        Self {
            policies,
            nodes: vec![node(1, "worker"), node(2, "out"), node(3, "out"), node(4, "spare")],
            claims: vec![],
        }
    }

    /// As node `number` sees it; the pod shop/web is on node1, and node2 has an address more.
    fn seen_by(&self, number: u8) -> Output {
        let labels = |app: &str| IdentityLabels {
            namespace: "shop".to_owned(),
            pod_labels: Labels::from([("app".to_owned(), app.to_owned())]),
            ..IdentityLabels::default()
        };
        let identities = [(300, "web"), (301, "db")].map(|(id, app)| (IdentityId(id), Arc::new(labels(app))));
        let pod = |name: &str, last: u8, identity| PublishedEndpoint {
            pod: ObjectKey::new("shop", name),
            addresses: vec![[10, 1, 1, last].into(), format!("fd00:1::{last}").parse().expect("an address")],
            identity: IdentityId(identity),
            workload: None,
            host_ports: vec![],
        };
        let published = [pod("web", 5, 300), pod("db", 6, 301)];
        let endpoint = |pod: &PublishedEndpoint, id| Endpoint {
            id: EndpointId(id),
            container_id: String::new(),
            interface: String::new(),
            netns: "/".into(),
            pod: pod.pod.clone(),
            pod_uid: None,
            ipv4: Some([10, 1, 1, if id == 1 { 5 } else { 6 }].into()),
            ipv6: Some(format!("fd00:1::{}", if id == 1 { 5 } else { 6 }).parse().expect("an address")),
            host_interface: String::new(),
            host_ifindex: 7,
            mac: MacAddress([0; 6]),
            port_mappings: vec![],
        };
        let own: BTreeMap<EndpointId, (Arc<Endpoint>, IdentityId)> = published
            .iter()
            .zip(1..)
            .map(|(pod, id)| (EndpointId(id), (Arc::new(endpoint(pod, id)), pod.identity)))
            .collect();
        let node_endpoints = NodeEndpoints {
            node: "node1".to_owned(),
            internal_addresses: vec![],
            endpoints: published.into(),
        };
        let believed = |pod: &PublishedEndpoint| {
            let entry = BaseAddress {
                identity: pod.identity,
                node: Some([192, 0, 2, 1].into()),
                endpoint: None,
                kind: AddressKind::Pod,
            };
            pod.addresses.iter().map(|address| (*address, entry.clone())).collect::<Vec<_>>()
        };
        let addresses = node_endpoints.endpoints.iter().flat_map(believed).collect();
        let claim = |(address, identity): &(IpAddr, IdentityId)| PublishedEndpoint {
            addresses: vec![*address],
            ..pod("claimed", 9, identity.0)
        };
        let claimed = NodeEndpoints {
            node: "node4".to_owned(),
            internal_addresses: vec![],
            endpoints: self.claims.iter().map(claim).collect(),
        };
        let published = [("node1", node_endpoints), ("node4", claimed)];
        let published = published.map(|(name, of)| (Arc::from(name), Arc::new(of)));
        let own_addresses: Vec<IpAddr> = match number {
            2 => vec![[192, 0, 2, 2].into(), [198, 51, 100, 9].into()],
            _ => vec![[192, 0, 2, number].into()],
        };
        let device = NetworkDevice {
            name: "eth0".to_owned(),
            sources: AddressPair::first_of(own_addresses.iter().copied()),
            addresses: own_addresses.clone(),
        };
        let name = format!("node{number}");
        rules(&Input {
            this_node: &name,
            policies: &self.policies.iter().map(|it| (it.key.clone(), Arc::new(it.clone()))).collect(),
            identities: &identities.into_iter().collect(),
            endpoints: &if number == 1 { own } else { BTreeMap::new() },
            node_endpoints: &published.into_iter().collect(),
            addresses: &addresses,
            nodes: &snapshot(&self.nodes),
            devices: &[(3_u32, device)].into_iter().collect(),
            own_addresses: &own_addresses.iter().map(|address| (*address, ())).collect(),
            underlay_of: &|node| node.addresses.first().copied(),
        })
    }
}

/// The rules for the IPv4 address of shop/web, by prefix; the one for everything else is left out.
fn of_web(output: &Output) -> BTreeMap<String, EgressRoute> {
    let web: IpAddr = [10, 1, 1, 5].into();
    let rules = output.tables.get(&web).into_iter().flat_map(|table| table.iter());
    let is_meant = |(prefix, route): &(&IpNet, &EgressRoute)| {
        prefix.prefix_len() > 0 || **route != EgressRoute::Ordinary
    };
    rules.filter(is_meant).map(|(prefix, route)| (prefix.to_string(), *route)).collect()
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

#[test]
fn the_pods_node_sends_to_the_gateway_and_the_gateway_knows_the_address() {
    let world = World::new(vec![policy(
        "a",
        "203.0.113.0/24",
        "203.0.113.7/32",
        vec![gateway("out", Some("198.51.100.9"))],
    )]);
    let seen = world.seen_by(1);
    assert_eq!(seen.selected, [EndpointId(1)].into());
    assert_eq!(
        of_web(&seen),
        [
            ("203.0.113.0/24".to_owned(), EgressRoute::Away(ip("192.0.2.2"))),
            ("203.0.113.7/32".to_owned(), EgressRoute::Ordinary)
        ]
        .into()
    );
    assert_eq!(seen.tables.len(), 2, "nothing of shop/db");
    let exit = EgressExit::With(ip("198.51.100.9"), 3);
    assert_eq!(of_web(&world.seen_by(2))["203.0.113.0/24"], EgressRoute::Here(exit));
    assert_eq!(world.seen_by(2).selected.len(), 0);
    assert_eq!(world.seen_by(3), Output::default());
    let row = &seen.rows[0];
    let shown = (row.gateway.as_deref(), row.address.as_deref());
    assert_eq!(shown, (Some("node2"), Some("198.51.100.9")));
}

#[test]
fn an_address_that_the_gateway_lacks_or_of_another_family_is_none() {
    let lacks =
        World::new(vec![policy("a", "203.0.113.0/24", "", vec![gateway("out", Some("198.51.100.1"))])]);
    assert_eq!(of_web(&lacks.seen_by(2))["203.0.113.0/24"], EgressRoute::Here(EgressExit::Nowhere));
    let family = World::new(vec![policy("a", "::/0", "", vec![gateway("out", Some("198.51.100.9"))])]);
    let all: Vec<EgressTable> =
        family.seen_by(2).tables.into_values().map(|table| (*table).clone()).collect();
    let nowhere = EgressRoute::Here(EgressExit::Nowhere);
    let everything = |text: &str, route| EgressTable::from([(text.parse().expect("a CIDR"), route)]);
    assert!(all.contains(&everything("::/0", nowhere)), "{all:?}");
}

#[test]
fn without_a_gateway_that_is_ready_nothing_leaves_and_the_next_one_takes_over() {
    let mut world = World::new(vec![policy("a", "0.0.0.0/0", "", vec![gateway("out", None)])]);
    world.nodes[1].is_unready = true;
    assert_eq!(of_web(&world.seen_by(1))["0.0.0.0/0"], EgressRoute::Away(ip("192.0.2.3")));
    world.nodes[2].is_leaving = true;
    assert_eq!(of_web(&world.seen_by(1))["0.0.0.0/0"], EgressRoute::Closed);
    assert_eq!(world.seen_by(1).rows[0].gateway, None);
}

#[test]
fn what_one_policy_excludes_another_one_may_still_lead() {
    let world = World::new(vec![
        policy("a", "203.0.113.0/24", "203.0.113.0/25 203.0.113.7/32", vec![gateway("out", None)]),
        policy("b", "203.0.0.0/16", "203.0.113.7/32", vec![gateway("spare", None)]),
    ]);
    let (out, spare) = (EgressRoute::Away(ip("192.0.2.2")), EgressRoute::Away(ip("192.0.2.4")));
    let expected = [
        ("203.0.0.0/16", spare),
        ("203.0.113.0/24", out),
        ("203.0.113.0/25", spare),
        ("203.0.113.7/32", EgressRoute::Ordinary),
    ];
    let expected: BTreeMap<String, EgressRoute> =
        expected.into_iter().map(|(prefix, route)| (prefix.to_owned(), route)).collect();
    assert_eq!(of_web(&world.seen_by(1)), expected);
    // The gateway of one of them lets nothing of the other one pass.
    assert_eq!(of_web(&world.seen_by(2))["203.0.0.0/16"], EgressRoute::Closed);
}

#[test]
fn of_a_policy_that_cannot_be_read_to_its_end_the_rest_is_closed() {
    let mut doubtful = policy("a", "203.0.113.0/24", "", vec![gateway("out", None)]);
    doubtful.is_partial = true;
    doubtful.gateways.clear();
    let open = policy("b", "198.51.100.0/24", "", vec![gateway("spare", None)]);
    let routes = of_web(&World::new(vec![doubtful, open]).seen_by(1));
    assert_eq!(routes["0.0.0.0/0"], EgressRoute::Closed);
    assert_eq!(routes["198.51.100.0/24"], EgressRoute::Away(ip("192.0.2.4")));
}

#[test]
fn a_gateway_that_goes_moves_its_own_pods_alone() {
    let ways = vec![gateway("worker", None), gateway("out", None), gateway("spare", None)];
    let policy = policy("a", "0.0.0.0/0", "", ways);
    let choices = |world: &World| -> Vec<String> {
        let nodes = snapshot(&world.nodes);
        let candidates = choose::candidates(&policy, &nodes);
        let of = |number: u32| choose::gateway(&candidates, &ObjectKey::new("shop", format!("web-{number}")));
        (0..300).filter_map(|number| Some(of(number)?.0.name.clone())).collect()
    };
    let mut world = World::new(vec![]);
    let before = choices(&world);
    for name in ["node1", "node2", "node4"] {
        let share = before.iter().filter(|chosen| *chosen == name).count();
        assert!((60..140).contains(&share), "{name} has {share} of 300 pods");
    }
    world.nodes[3].is_unready = true;
    let moved = before.iter().zip(choices(&world)).filter(|(before, after)| **before != *after);
    assert!(moved.map(|(before, _)| before).all(|before| before == "node4"));
    world.nodes[3].is_unready = false;
    assert_eq!(choices(&world), before);
}

#[test]
fn a_node_that_claims_anothers_pod_changes_nothing_of_it() {
    let of_db = EgressPolicy {
        pods: vec![EgressPods { pods: is("app", "db"), ..EgressPods::default() }],
        ..policy("b", "203.0.113.0/24", "203.0.113.7/32", vec![gateway("out", None)])
    };
    let of_web = policy("a", "203.0.113.0/24", "", vec![gateway("out", Some("198.51.100.9"))]);
    let mut world = World::new(vec![of_web, of_db]);
    let before = world.seen_by(2);
    world.claims = vec![([10, 1, 1, 5].into(), IdentityId(301)), ([10, 9, 9, 9].into(), IdentityId(301))];
    assert_eq!(world.seen_by(2), before);
}

#[test]
fn the_longest_of_destinations_and_exclusions_counts() {
    let gateways = || vec![gateway("out", Some("198.51.100.9"))];
    let rules = |destinations: &str, excluded: &str| {
        of_web(&World::new(vec![policy("a", destinations, excluded, gateways())]).seen_by(2))
    };
    let here = EgressRoute::Here(EgressExit::With(ip("198.51.100.9"), 3));
    let texts = |rows: &[(&str, EgressRoute)]| {
        rows.iter().map(|(prefix, route)| ((*prefix).to_owned(), *route)).collect::<BTreeMap<_, _>>()
    };
    let ordinary = EgressRoute::Ordinary;
    assert_eq!(rules("10.1.2.0/24", "10.0.0.0/8"), texts(&[("10.0.0.0/8", ordinary), ("10.1.2.0/24", here)]));
    assert_eq!(
        rules("0.0.0.0/0 10.1.2.0/24", "10.0.0.0/8 10.1.2.0/24"),
        texts(&[("0.0.0.0/0", here), ("10.0.0.0/8", ordinary), ("10.1.2.0/24", ordinary)])
    );
}
