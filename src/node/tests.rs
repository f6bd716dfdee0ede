use super::*;
use crate::model::{MacAddress, PublishedEndpoint};

#[derive(Default)]
struct World {
    nodes: Snapshot<Arc<str>, Arc<Node>>,
    node_endpoints: Snapshot<Arc<str>, Arc<NodeEndpoints>>,
    endpoints: BTreeMap<EndpointId, (Arc<Endpoint>, IdentityId)>,
    internal: Vec<IpAddr>,
    believes: bool,
    devices: BTreeSet<IpAddr>,
}

impl World {
    fn node(mut self, name: &str, addresses: &[&str], pod_cidr: &str) -> Self {
        let node = Node {
            name: name.to_owned(),
            labels: BTreeMap::new(),
            addresses: addresses.iter().map(|text| ip(text)).collect(),
            pod_cidrs: vec![pod_cidr.parse().expect("a prefix")],
            is_leaving: false,
            is_unready: false,
        };
        self.nodes.insert(name.into(), Arc::new(node));
        self
    }

    fn published(mut self, node: &str, internal: &[&str], pods: &[(&str, &str, u32)]) -> Self {
        let endpoint = |(name, address, identity): &(&str, &str, u32)| PublishedEndpoint {
            pod: ObjectKey::new("shop", *name),
            addresses: vec![ip(address)],
            identity: IdentityId(*identity),
            workload: None,
            host_ports: Vec::new(),
        };
        let published = NodeEndpoints {
            node: node.to_owned(),
            internal_addresses: internal.iter().map(|text| ip(text)).collect(),
            endpoints: pods.iter().map(endpoint).collect(),
        };
        self.node_endpoints.insert(node.into(), Arc::new(published));
        self
    }

    fn endpoint(mut self, id: u16, pod: &str, address: &str, identity: u32) -> Self {
        let endpoint = Endpoint {
            id: EndpointId(id),
            container_id: "c".to_owned(),
            interface: "eth0".to_owned(),
            netns: "/run/netns/x".into(),
            pod: ObjectKey::new("shop", pod),
            pod_uid: None,
            ipv4: Some(address.parse().expect("an IPv4 address")),
            ipv6: None,
            host_interface: "weir0".to_owned(),
            host_ifindex: 7,
            mac: MacAddress::default(),
            port_mappings: Vec::new(),
        };
        self.endpoints.insert(EndpointId(id), (Arc::new(endpoint), IdentityId(identity)));
        self
    }

    /// As node "a" sees it.
    fn input(&self) -> Input<'_> {
        Input {
            this_node: "a",
            internal_addresses: &self.internal,
            device_addresses: &self.devices,
            endpoints: &self.endpoints,
            nodes: &self.nodes,
            node_endpoints: &self.node_endpoints,
            believes_any_address: self.believes,
        }
    }

    /// `address identity kind @node #endpoint`, then the conflicts, seen from node "a".
    fn shown(&self) -> (Vec<String>, Vec<String>) {
        let output = addresses(&self.input());
        let show = |(address, entry): (&IpAddr, &BaseAddress)| {
            let node = entry.node.map(|node| format!(" @{node}")).unwrap_or_default();
            let endpoint = entry.endpoint.map(|id| format!(" #{id}")).unwrap_or_default();
            format!("{address} {} {:?}{node}{endpoint}", entry.identity, entry.kind)
        };
        let conflict = |conflict: &Conflict| {
            let pod = conflict.pod.as_ref().map(|pod| format!(" {pod}")).unwrap_or_default();
            format!("{} {}{pod} {:?}", conflict.address, conflict.node, conflict.reason)
        };
        (output.addresses.iter().map(show).collect(), output.conflicts.iter().map(conflict).collect())
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

#[test]
fn own_pods_are_local_and_others_are_behind_their_node() {
    let mut world = World::default()
        .node("a", &["fd99::1", "192.168.0.1"], "10.0.0.0/24")
        .node("b", &["fd99::2", "192.168.0.2"], "10.0.1.0/24")
        .endpoint(4, "web", "10.0.0.4", 300)
        .published("a", &["10.0.0.77"], &[("stale", "10.0.0.9", 300)])
        .published("b", &["10.0.1.1"], &[("db", "10.0.1.4", 301)]);
    world.internal.push(ip("10.0.0.1"));
    let (addresses, conflicts) = world.shown();
    assert_eq!(
        addresses,
        [
            "10.0.0.1 1 NodeInternal",
            "10.0.0.4 300 Pod #4",
            "10.0.1.1 6 NodeInternal @192.168.0.2",
            "10.0.1.4 301 Pod @192.168.0.2",
            "192.168.0.1 1 Node",
            "192.168.0.2 6 Node @192.168.0.2",
            "fd99::1 1 Node",
            "fd99::2 6 Node @192.168.0.2",
        ]
    );
    assert_eq!(conflicts, [""; 0]);
}

#[test]
fn every_address_of_this_nodes_devices_is_the_hosts() {
    let mut world = World::default().node("a", &["192.168.0.1"], "10.0.0.0/24").node(
        "b",
        &["192.168.0.2"],
        "10.0.1.0/24",
    );
    world.devices = ["172.17.0.1", "192.168.0.1", "192.168.0.200"].map(ip).into();
    let expected = ["172.17.0.1 1 Node", "192.168.0.1 1 Node", "192.168.0.2 6 Node @192.168.0.2"];
    let mut following = Addresses::default();
    for has_virtual in [true, false] {
        if !has_virtual {
            world.devices.remove(&ip("192.168.0.200"));
        }
        let (addresses, conflicts) = world.shown();
        let added = has_virtual.then_some("192.168.0.200 1 Node");
        assert_eq!(addresses, expected.into_iter().chain(added).collect::<Vec<_>>());
        assert_eq!(conflicts, [""; 0]);
        let output = following.update(&world.input());
        assert_eq!(output.addresses.len(), addresses.len());
    }
}

#[test]
fn a_node_without_object_or_common_family_is_skipped() {
    let world = World::default()
        .node("a", &["fd99::1"], "10.0.0.0/24")
        .node("b", &["192.168.0.2"], "10.0.1.0/24")
        .published("b", &[], &[("db", "10.0.1.4", 301)])
        .published("c", &[], &[("db", "10.0.2.4", 301)]);
    assert_eq!(world.shown(), (vec!["fd99::1 1 Node".to_owned()], vec![]));
}

#[test]
fn one_address_has_one_owner() {
    let world = World { believes: true, ..World::default() }
        .node("a", &["192.168.0.1"], "10.0.0.0/24")
        .node("b", &["192.168.0.2"], "10.0.1.0/24")
        .node("c", &["192.168.0.3"], "10.0.2.0/24")
        .endpoint(4, "web", "10.0.0.4", 300)
        .published(
            "b",
            &[],
            &[
                ("local", "10.0.0.4", 301),
                ("mapped", "::ffff:10.0.0.4", 301),
                ("outside", "10.0.9.9", 301),
                ("theirs", "10.0.2.5", 301),
                ("node", "192.168.0.3", 301),
            ],
        )
        .published("c", &[], &[("outside", "10.0.9.9", 302), ("ours", "10.0.2.5", 302)]);
    let (addresses, conflicts) = world.shown();
    assert_eq!(
        addresses,
        [
            "10.0.0.4 300 Pod #4",
            "10.0.2.5 302 Pod @192.168.0.3",
            "10.0.9.9 301 Pod @192.168.0.2",
            "192.168.0.1 1 Node",
            "192.168.0.2 6 Node @192.168.0.2",
            "192.168.0.3 6 Node @192.168.0.3",
        ]
    );
    assert_eq!(
        conflicts,
        [
            "10.0.0.4 b shop/local OwnedBy(\"a\")",
            "10.0.0.4 b shop/mapped OwnedBy(\"a\")",
            "10.0.2.5 b shop/theirs OwnedBy(\"c\")",
            "10.0.9.9 c shop/outside OwnedBy(\"b\")",
            "192.168.0.3 b shop/node OwnedBy(\"c\")",
        ]
    );
}

#[test]
fn a6_a_claim_outside_of_the_nodes_pod_cidrs_is_not_believed() {
    let world = World::default()
        .node("a", &["192.168.0.1"], "10.0.0.0/24")
        .node("b", &["192.168.0.2"], "10.0.1.0/24")
        .published(
            "b",
            &["10.0.1.1", "172.16.0.1"],
            &[("db", "10.0.1.4", 301), ("evil", "203.0.113.9", 301), ("mapped", "::ffff:10.0.1.5", 301)],
        );
    let (addresses, conflicts) = world.shown();
    assert_eq!(
        addresses,
        [
            "10.0.1.1 6 NodeInternal @192.168.0.2",
            "10.0.1.4 301 Pod @192.168.0.2",
            "10.0.1.5 301 Pod @192.168.0.2",
            "192.168.0.1 1 Node",
            "192.168.0.2 6 Node @192.168.0.2",
        ]
    );
    assert_eq!(conflicts, ["172.16.0.1 b OutsidePodCidrs", "203.0.113.9 b shop/evil OutsidePodCidrs"]);
    let (addresses, conflicts) = World { believes: true, ..world }.shown();
    assert_eq!((addresses.len(), conflicts.len()), (7, 0));
}

#[test]
fn nobody_may_claim_a_reserved_identity_for_a_pod() {
    let world = World::default()
        .node("a", &["192.168.0.1"], "10.0.0.0/24")
        .node("b", &["192.168.0.2"], "10.0.1.0/24")
        .published("b", &[], &[("root", "10.0.1.4", 1), ("local", "10.0.1.5", 0x100_0000)]);
    let (addresses, conflicts) = world.shown();
    assert_eq!(addresses, ["192.168.0.1 1 Node", "192.168.0.2 6 Node @192.168.0.2"]);
    assert_eq!(
        conflicts,
        [
            "10.0.1.4 b shop/root ForeignIdentity(IdentityId(1))",
            "10.0.1.5 b shop/local ForeignIdentity(IdentityId(16777216))",
        ]
    );
}

/// What a node publishes at one time, or the pods of this node (`None`): name, last byte of the address, identity.
type Step = (Option<usize>, Vec<(u8, u8, u32)>);

fn steps() -> impl proptest::strategy::Strategy<Value = Vec<Step>> {
    use proptest::prelude::*;
    // Few addresses, so that claims meet now and then; the last identity is nobody's to claim.
    let pod = (0..4_u8, 0..12_u8, prop_oneof![9 => 300..303_u32, 1 => Just(2)]);
    prop::collection::vec((prop::option::weighted(0.8, 0..3_usize), prop::collection::vec(pod, 0..4)), 1..25)
}

proptest::proptest! {
    #[test]
    fn differences_add_up_to_the_whole(steps in steps(), believes in proptest::bool::ANY) {
        const NODES: [&str; 3] = ["b", "c", "d"];
        let mut world = World { believes, ..World::default() }.node("a", &["192.168.0.1"], "10.0.0.0/30");
        for (number, name) in NODES.iter().enumerate() {
            let (address, cidr) = (format!("192.168.0.{}", number + 2), format!("10.0.0.{}/30", 4 * number));
            world = world.node(name, &[&address], &cidr);
        }
        let mut following = Addresses::default();
        for (node, pods) in steps {
            let pods: Vec<_> = pods.iter().map(|(pod, byte, id)| (format!("p{pod}"), format!("10.0.0.{byte}"), *id)).collect();
            world = match node {
                Some(node) => {
                    let pods: Vec<_> = pods.iter().map(|(pod, address, id)| (&**pod, &**address, *id)).collect();
                    world.published(NODES[node], &["10.0.0.13"], &pods)
                }
                None => {
                    world.endpoints.clear();
                    (1..).zip(&pods).fold(world, |world, (number, (pod, address, id))| world.endpoint(number, pod, address, *id))
                }
            };
            let input = Input {
                this_node: "a",
                internal_addresses: &world.internal,
                device_addresses: &world.devices,
                endpoints: &world.endpoints,
                nodes: &world.nodes,
                node_endpoints: &world.node_endpoints,
                believes_any_address: world.believes,
            };
            proptest::prop_assert_eq!(following.update(&input), &addresses(&input));
        }
    }
}

#[test]
fn a_pod_that_comes_and_goes_costs_its_own_addresses() {
    let world = World::default()
        .node("a", &["192.168.0.1"], "10.0.0.0/24")
        .node("b", &["192.168.0.2"], "10.0.1.0/24")
        .published("b", &["10.0.1.1"], &[("db", "10.0.1.4", 301)]);
    let mut following = Addresses::default();
    let mut update = |world: &World| -> Option<usize> {
        let input = Input {
            this_node: "a",
            internal_addresses: &[],
            device_addresses: &BTreeSet::new(),
            endpoints: &world.endpoints,
            nodes: &world.nodes,
            node_endpoints: &world.node_endpoints,
            believes_any_address: world.believes,
        };
        let length = following.difference(&input).map(|addresses| addresses.len());
        following.update(&input);
        length
    };
    assert_eq!(update(&world), None);
    let world = world.published("b", &["10.0.1.1"], &[("db", "10.0.1.4", 301), ("web", "10.0.1.5", 300)]);
    assert_eq!(update(&world), Some(5));
    let world = world.endpoint(4, "web", "10.0.0.4", 300);
    assert_eq!(update(&world), Some(6));
    let world = world.published("b", &["10.0.1.1"], &[("thief", "10.0.0.4", 301)]);
    assert_eq!(update(&world), None);
}
