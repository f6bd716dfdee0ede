use super::*;
use crate::model::{MacAddress, PublishedEndpoint};

#[derive(Default)]
struct World {
    nodes: Snapshot<Arc<str>, Arc<Node>>,
    node_endpoints: Snapshot<Arc<str>, Arc<NodeEndpoints>>,
    endpoints: BTreeMap<EndpointId, (Arc<Endpoint>, IdentityId)>,
    internal: Vec<IpAddr>,
}

impl World {
    fn node(mut self, name: &str, addresses: &[&str], pod_cidr: &str) -> Self {
        let node = Node {
            name: name.to_owned(),
            labels: BTreeMap::new(),
            addresses: addresses.iter().map(|text| ip(text)).collect(),
            pod_cidrs: vec![pod_cidr.parse().expect("a prefix")],
        };
        self.nodes.insert(name.into(), Arc::new(node));
        self
    }

    fn published(mut self, node: &str, internal: &[&str], pods: &[(&str, &str, u32)]) -> Self {
        let endpoint = |(name, address, identity): &(&str, &str, u32)| PublishedEndpoint {
            pod: ObjectKey::new("shop", *name),
            addresses: vec![ip(address)],
            identity: IdentityId(*identity),
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
        };
        self.endpoints.insert(EndpointId(id), (Arc::new(endpoint), IdentityId(identity)));
        self
    }

    /// `address identity kind @node #endpoint`, then the conflicts, seen from node "a".
    fn shown(&self) -> (Vec<String>, Vec<String>) {
        let output = addresses(&Input {
            this_node: "a",
            internal_addresses: &self.internal,
            endpoints: &self.endpoints,
            nodes: &self.nodes,
            node_endpoints: &self.node_endpoints,
        });
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
    let world = World::default()
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
