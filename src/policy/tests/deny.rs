//! What denies, and whom a peer is: rows asked as the kernel asks them.

use super::*;
use crate::model::{
    CidrGroup, EndpointSlice, Entity, GroupSelector, Node, NodeEndpoints, PolicyKind, ServiceName,
    ServiceSelector,
};

/// An address of the world, one of a node of the cluster, and two pods of which one has no labels yet.
fn cluster() -> World {
    World::default()
        .identity(300, "shop", "web")
        .identity(301, "shop", "client")
        .endpoint(1, 300)
        .pod_cidr("10.0.0.0/16")
        .address("10.0.0.1", 300, AddressKind::Pod)
        .address("10.0.0.2", 301, AddressKind::Pod)
        .address("10.0.0.3", 302, AddressKind::Pod)
        .address("192.168.0.2", 6, AddressKind::Node)
}

fn rule(action: Action, peers: Vec<Peer>, ports: Option<Vec<PortMatch>>) -> PolicyRule {
    PolicyRule::new(action, Some(peers), ports)
}

fn cilium(name: &str, default: Action, rules: Vec<PolicyRule>) -> Policy {
    let ingress = Some(PolicyDirection { default, rules });
    Policy { ingress, ..policy(name, app("web")) }
}

fn outside(cidr: &str) -> Peer {
    Peer::Outside { cidr: net(cidr), except: vec![] }
}

/// Who may come in to TCP port 80, of these addresses.
fn admitted<'a>(output: &Output, addresses: &[&'a str]) -> Vec<&'a str> {
    let policy = &output.policies[&output.of_endpoint[&EndpointId(1)]];
    let Some(direction) = &policy.ingress else { return addresses.to_vec() };
    let is_admitted = |address: &&&str| {
        let address = ip(address);
        let covers = |net: &&IpNet| net.contains(&address);
        let prefix = || output.prefixes.keys().filter(covers).max_by_key(|net| net.prefix_len());
        let identity = match output.addresses.get(&address) {
            Some(entry) => entry.identity,
            None => prefix().map_or(IdentityId::WORLD, |net| output.prefixes[net].identity),
        };
        let class = direction.peers.get(&identity).copied().unwrap_or(0);
        let matches = |key: &&CompiledRuleKey| {
            key.class == class
                && key.protocol.is_none_or(|protocol| protocol == 6)
                && u32::from(key.port ^ 80) >> (16 - key.port_prefix_length) == 0
        };
        let longest = |key: &&CompiledRuleKey| (key.protocol, key.port_prefix_length);
        let found = direction.rules.keys().filter(matches).max_by_key(longest);
        found.is_some_and(|key| direction.rules[key].action == Action::Allow)
    };
    addresses.iter().filter(is_admitted).copied().collect()
}

const ALL: [&str; 5] = ["10.0.0.2", "10.0.0.3", "10.0.0.9", "192.168.0.2", "203.0.113.9"];

#[test]
fn bypass_13_a_deny_beats_a_narrower_allow() {
    use Action::{Allow, Deny};
    let world = cluster().policy(cilium(
        "web",
        Deny,
        vec![
            rule(Allow, vec![outside("203.0.113.9/32")], Some(vec![tcp(80)])),
            rule(Deny, vec![outside("203.0.0.0/8")], None),
            rule(Allow, vec![outside("198.51.100.0/24")], None),
        ],
    ));
    let output = world.compile(&mut compiler());
    assert_eq!(admitted(&output, &["203.0.113.9", "203.1.1.1", "198.51.100.7"]), ["198.51.100.7"]);
}

#[test]
fn cidrs_of_cilium_do_not_speak_of_pods_and_nodes_and_entities_do() {
    use Action::{Allow, Deny};
    let of = |peer: Peer| {
        let world = cluster().policy(cilium("web", Deny, vec![rule(Allow, vec![peer], None)]));
        admitted(&world.compile(&mut compiler()), &ALL)
    };
    assert_eq!(of(outside("0.0.0.0/0")), ["203.0.113.9"]);
    assert_eq!(of(block("0.0.0.0/0", &[])), ALL);
    assert_eq!(of(Peer::Entity(Entity::World)), ["10.0.0.9", "203.0.113.9"]);
    assert_eq!(of(Peer::Entity(Entity::RemoteNode)), ["192.168.0.2"]);
    assert_eq!(of(Peer::Entity(Entity::Cluster)), ["10.0.0.2", "10.0.0.3", "192.168.0.2"]);
    assert_eq!(of(Peer::Entity(Entity::Nobody)), [""; 0]);
    // The address alone is not enough: a pod that has a node's address is no node.
    let nodes = BTreeSet::from([net("192.168.0.2/32"), net("10.0.0.2/32")]);
    assert_eq!(of(Peer::NodeAddresses(nodes)), ["192.168.0.2"]);
}

#[test]
fn bypass_12_who_has_no_labels_yet_is_denied_what_anyone_is_denied() {
    use Action::{Allow, Deny, Pass};
    let denying = cilium("web", Pass, vec![rule(Deny, vec![pods("client")], None)]);
    let world = cluster().policy(denying);
    let mut compiler = compiler();
    let output = world.compile(&mut compiler);
    // Nobody isolates: others are let in. Of 10.0.0.3 only the identity's number is known.
    assert_eq!(admitted(&output, &ALL), ["10.0.0.9", "192.168.0.2", "203.0.113.9"]);
    let policy = &output.policies[&output.of_endpoint[&EndpointId(1)]];
    assert!(policy.ingress.as_ref().is_some_and(|direction| direction.refuses_strangers));
    let known = world.clone().identity(302, "shop", "other");
    let output = known.compile(&mut compiler);
    assert_eq!(admitted(&output, &ALL), ["10.0.0.3", "10.0.0.9", "192.168.0.2", "203.0.113.9"]);
    assert_eq!(admitted(&world.compile(&mut compiler), &["10.0.0.3"]), [""; 0], "its labels are gone again");
    // Who only allows needs none of it.
    let allowing = cilium("web", Deny, vec![rule(Allow, vec![pods("client")], None)]);
    let output = cluster().policy(allowing).compile(&mut self::compiler());
    let policy = &output.policies[&output.of_endpoint[&EndpointId(1)]];
    assert!(policy.ingress.as_ref().is_some_and(|direction| !direction.refuses_strangers));
}

#[test]
fn bypass_13_a_service_account_is_no_label_that_a_pod_may_have() {
    let asked =
        Requirement::In(crate::model::SERVICE_ACCOUNT_KEY.into(), BTreeSet::from(["root".to_owned()]));
    let peer = Peer::Pods { namespaces: None, pods: Selector { requirements: vec![asked] } };
    let world = cluster().label(301, crate::model::SERVICE_ACCOUNT_KEY, "root").policy(cilium(
        "web",
        Action::Deny,
        vec![rule(Action::Allow, vec![peer], None)],
    ));
    assert_eq!(admitted(&world.compile(&mut compiler()), &ALL), [""; 0]);
}

fn key(name: &str) -> ObjectKey {
    ObjectKey::new("", name)
}

/// The peers of the one rule, resolved.
fn resolved(resolver: &mut Resolver, action: Action, peer: Peer, references: &References) -> PolicyRule {
    let policy = cilium("web", Action::Deny, vec![rule(action, vec![peer], None)]);
    let network = Snapshot::from_iter([(policy.reference.clone(), Arc::new(policy.clone()))]);
    let sources = Sources { network, others: vec![] };
    let all = resolver.update(sources, references.clone());
    all[&policy.reference].ingress.as_ref().expect("ingress").rules[0].clone()
}

#[test]
fn names_stand_for_what_is_there_now_and_bypass_13_an_empty_group_is_nobody() {
    let mut resolver = Resolver::default();
    let mut references = References::default();
    let group =
        Peer::Groups { groups: GroupSelector::Named("office".into()), except: vec![net("10.1.0.0/16")] };
    let peers = |rule: PolicyRule| rule.peers.expect("never everyone");
    let allow = |resolver: &mut Resolver, references: &References, peer: &Peer| {
        peers(resolved(resolver, Action::Allow, peer.clone(), references))
    };
    assert_eq!(allow(&mut resolver, &references, &group), []);
    let office = |is_partial| {
        let cidrs = vec![net("10.0.0.0/8"), net("192.0.2.0/24")];
        Arc::new(CidrGroup { cidrs, is_partial, ..CidrGroup::default() })
    };
    references.groups.insert(key("office"), office(false));
    let holed = Peer::Outside { cidr: net("10.0.0.0/8"), except: vec![net("10.1.0.0/16")] };
    assert_eq!(allow(&mut resolver, &references, &group), [holed, outside("192.0.2.0/24")]);
    // What was not read of it may be denied.
    references.groups.insert(key("office"), office(true));
    assert_eq!(resolved(&mut resolver, Action::Deny, group.clone(), &references).peers, None);

    let node = |name: &str, zone: &str, address: &str| {
        let labels = Labels::from([("zone".to_owned(), zone.to_owned())]);
        let node = Node {
            name: name.into(),
            labels,
            addresses: vec![ip(address)],
            pod_cidrs: vec![],
            is_leaving: false,
            is_unready: false,
        };
        (Arc::from(name), Arc::new(node))
    };
    references.nodes.extend([node("a", "one", "192.168.0.1"), node("b", "two", "192.168.0.2")]);
    let zone = Requirement::In("zone".to_owned(), BTreeSet::from(["two".to_owned()]));
    let nodes = Peer::Nodes(Selector { requirements: vec![zone] });
    let expected = Peer::NodeAddresses(BTreeSet::from([net("192.168.0.2/32")]));
    assert_eq!(allow(&mut resolver, &references, &nodes), [expected]);
    // Through the tunnel it speaks from its address in the pod network.
    let published =
        NodeEndpoints { node: "b".to_owned(), internal_addresses: vec![ip("10.0.2.1")], endpoints: vec![] };
    references.node_endpoints.insert("b".into(), Arc::new(published));
    let expected = Peer::NodeAddresses(BTreeSet::from([net("10.0.2.1/32"), net("192.168.0.2/32")]));
    assert_eq!(allow(&mut resolver, &references, &nodes), [expected]);

    let services = ServiceName::Named("kubernetes".into());
    let named = Peer::Services(ServiceSelector { namespace: Some("default".into()), services });
    assert_eq!(allow(&mut resolver, &references, &named), []);
    let backend = |address| crate::model::SliceBackend {
        address: ip(address),
        ready: false,
        serving: false,
        terminating: false,
        node: None,
        zone: None,
        hints: None,
        weight: 1,
    };
    let service = ObjectKey::new("default", "kubernetes");
    references.services.insert(service.clone(), Arc::new(crate::model::Service::new(service.clone())));
    let slice = EndpointSlice {
        key: service.clone(),
        service,
        ports: vec![],
        backends: vec![backend("192.168.0.1")],
    };
    references.slices.insert(slice.key.clone(), Arc::new(slice));
    assert_eq!(allow(&mut resolver, &references, &named), [block("192.168.0.1/32", &[])]);
    let api = allow(&mut resolver, &references, &Peer::Entity(Entity::KubeApiServer));
    assert_eq!(api, [block("192.168.0.1/32", &[])]);
}

#[test]
fn a_node_that_turns_ready_or_not_costs_no_policy_anything() {
    let mut resolver = Resolver::default();
    let mut references = References::default();
    let node = |is_unready, address: &str, cidr: &str| {
        let node = Node {
            name: "a".into(),
            labels: Labels::from([("zone".to_owned(), "one".to_owned())]),
            addresses: vec![ip(address)],
            pod_cidrs: vec![net(cidr)],
            is_leaving: false,
            is_unready,
        };
        (Arc::from("a"), Arc::new(node))
    };
    let named = Peer::Nodes(Selector::default());
    references.nodes.extend([node(false, "192.168.0.1", "10.0.1.0/24")]);
    let policy = cilium("web", Action::Deny, vec![rule(Action::Allow, vec![named], None)]);
    let network = Snapshot::from_iter([(policy.reference.clone(), Arc::new(policy))]);
    let sources = Sources { network, others: vec![] };
    let (rows, before) = (resolver.update(sources.clone(), references.clone()), resolver.resolutions());
    for is_unready in [true, false, true] {
        references.nodes.extend([node(is_unready, "192.168.0.1", "10.0.2.0/24")]);
        assert!(resolver.update(sources.clone(), references.clone()).ptr_eq(&rows));
    }
    // Nor do the slices of a Service that is not the API server's.
    let service = ObjectKey::new("shop", "web");
    let slice = EndpointSlice { key: service.clone(), service, ports: vec![], backends: vec![] };
    references.slices.insert(slice.key.clone(), Arc::new(slice));
    assert!(resolver.update(sources.clone(), references.clone()).ptr_eq(&rows));
    assert_eq!(resolver.resolutions(), before);
    references.nodes.extend([node(false, "192.168.0.2", "10.0.2.0/24")]);
    assert!(!resolver.update(sources, references).ptr_eq(&rows), "another address is another peer");
    assert_eq!(resolver.resolutions(), before + 1);
}

#[test]
fn every_spec_of_an_object_is_a_row_and_goes_with_it() {
    let mut resolver = Resolver::default();
    let mut first = ingress(policy("web", app("web")), None, None);
    let mut second = ingress(policy("web", app("client")), None, None);
    second.reference.spec = 1;
    first.others = vec![second];
    let sources = |policy: &Policy| Sources {
        network: Snapshot::new(),
        others: vec![Snapshot::from_iter([(key("web"), Arc::new(policy.clone()))])],
    };
    let both = resolver.update(sources(&first), References::default());
    assert_eq!(both.keys().map(|reference| reference.spec).collect::<Vec<_>>(), [0, 1]);
    assert!(both.values().all(|policy| policy.others.is_empty()));
    first.others.clear();
    assert_eq!(resolver.update(sources(&first), References::default()).len(), 1);
    assert!(resolver.update(Sources::default(), References::default()).is_empty());
}

#[test]
fn a_difference_is_said_by_pair_and_ports() {
    let before =
        cluster().policy(cilium("web", Action::Deny, vec![rule(Action::Allow, vec![pods("client")], None)]));
    let ports = Some(vec![PortMatch { protocol: Protocol::Tcp.into(), port: PortSelector::Range(80, 89) }]);
    let after = cluster().policy(cilium(
        "web",
        Action::Deny,
        vec![
            rule(Action::Allow, vec![pods("client")], ports),
            rule(Action::Allow, vec![outside("203.0.113.0/24")], Some(vec![tcp(443)])),
        ],
    ));
    let input = Input {
        policies: &before.policies,
        identities: &before.identities,
        endpoints: &before.endpoints,
        audited: &before.audited,
        host: &before.host,
        addresses: &before.addresses,
        pod_cidrs: &before.pod_cidrs,
        heard: &before.heard,
        shown: &before.shown,
    };
    let changes =
        super::super::diff::differences(&before.policies, &after.policies, &input, &Arc::default(), |id| {
            id.to_string()
        });
    let said: Vec<String> = changes
        .expect("numbers are left")
        .iter()
        .map(|it| format!("{} {} {} {} {}", it.pods, it.direction, it.peer, it.ports, it.is_allowed))
        .collect();
    assert_eq!(
        said,
        [
            "300 ingress 203.0.113.0/24 TCP/443 true",
            "300 ingress 301 ICMP false",
            "300 ingress 301 TCP/0-79 false",
            "300 ingress 301 TCP/90-65535 false",
            "300 ingress 301 UDP false",
        ]
    );
}

#[test]
fn a_namespace_that_is_being_deleted_keeps_its_policies_until_it_is_gone() {
    let of = |policies: Vec<Policy>| {
        Sources { others: vec![Snapshot::new()], ..Sources::default() }.with(policies)
    };
    let lock = |kind: PolicyKind, name: &str| {
        let mut policy = policy(name, Selector::default());
        policy.reference.kind = kind;
        policy.ingress = Some(PolicyDirection { default: Action::Deny, rules: Vec::new() });
        policy
    };
    let both = || vec![lock(PolicyKind::NetworkPolicy, "a"), lock(PolicyKind::CiliumNetworkPolicy, "b")];
    let mut before = of(both());
    // `with` adds kinds behind the tables: the same places in both.
    before.others.swap(0, 1);
    let now = || Sources { others: vec![Snapshot::new(); 2], ..Sources::default() };
    let count = |sources: &Sources| sources.all().count();
    let leaving = now().kept_from(&before, |namespace| namespace == "shop");
    assert_eq!(count(&leaving), 2, "its pods may run");
    assert_eq!(count(&now().kept_from(&leaving, |namespace| namespace == "shop")), 2, "round after round");
    assert_eq!(count(&now().kept_from(&leaving, |_| false)), 0, "the namespace is gone");
    assert_eq!(count(&now().kept_from(&before, |namespace| namespace == "other")), 0, "a policy was deleted");
}

#[test]
fn what_an_audited_policy_or_pod_is_denied_is_let_through_and_said() {
    use Action::{Allow, Deny};
    let web = || cilium("web", Deny, vec![rule(Allow, vec![pods("client")], None)]);
    let audited = |world: World| {
        let output = world.compile(&mut compiler());
        let policy = &output.policies[&output.of_endpoint[&EndpointId(1)]];
        let rows = policy.ingress.as_ref().expect("enforced").rules.values();
        let said: BTreeSet<String> = rows
            .filter(|row| row.is_audit)
            .flat_map(|row| row.origins.iter().map(ToString::to_string))
            .collect();
        (admitted(&output, &ALL).len(), said.into_iter().collect::<Vec<_>>())
    };
    assert_eq!(audited(cluster().policy(web())), (1, vec![]));
    let mut policy = web();
    policy.marks.audit = true;
    let name = "NetworkPolicy shop/web".to_owned();
    assert_eq!(audited(cluster().policy(policy.clone())), (ALL.len(), vec![name.clone()]));
    // Another policy that isolates is not audited by that.
    let mut other = web();
    other.reference.name = "other".into();
    assert_eq!(audited(cluster().policy(policy).policy(other)), (1, vec![]));
    let mut world = cluster().policy(web());
    world.audited.insert(EndpointId(1));
    assert_eq!(audited(world), (ALL.len(), vec![name]));
}
