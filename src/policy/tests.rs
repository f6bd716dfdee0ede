use super::*;
use crate::model::l7::DnsRule;
use crate::model::{
    Action, AddressKind, CompiledDirection, CompiledRule, CompiledRuleKey, Labels, NamedPort, ObjectKey,
    Peer, PolicyDirection, PolicyRule, PortMatch, PortSelector, Protocol, Requirement, Selector, Subject,
    Tier, Visibility,
};

mod deny;

/// A small cluster, from which compilers are fed.
#[derive(Clone, Default)]
struct World {
    policies: Snapshot<PolicyRef, Arc<Policy>>,
    identities: Snapshot<IdentityId, Arc<IdentityLabels>>,
    endpoints: BTreeMap<EndpointId, IdentityId>,
    audited: BTreeSet<EndpointId>,
    shown: BTreeMap<EndpointId, Visibility>,
    host: Arc<IdentityLabels>,
    addresses: Snapshot<IpAddr, BaseAddress>,
    pod_cidrs: Vec<IpNet>,
    heard: Heard,
}

impl World {
    fn policy(mut self, policy: Policy) -> Self {
        self.policies.insert(policy.reference.clone(), Arc::new(policy));
        self
    }

    fn identity(mut self, id: u32, namespace: &str, app: &str) -> Self {
        self.identities.insert(IdentityId(id), Arc::new(labels_of(namespace, app)));
        self
    }

    fn identity_with_port(mut self, id: u32, namespace: &str, app: &str, name: &str, port: u16) -> Self {
        let mut labels = labels_of(namespace, app);
        labels.named_ports.insert(name.to_owned(), vec![NamedPort { protocol: Protocol::Tcp, port }]);
        self.identities.insert(IdentityId(id), Arc::new(labels));
        self
    }

    fn label(mut self, id: u32, name: &str, value: &str) -> Self {
        let mut labels = IdentityLabels::clone(&self.identities[&IdentityId(id)]);
        labels.pod_labels.insert(name.to_owned(), value.to_owned());
        self.identities.insert(IdentityId(id), Arc::new(labels));
        self
    }

    fn endpoint(mut self, id: u16, identity: u32) -> Self {
        self.endpoints.insert(EndpointId(id), IdentityId(identity));
        self
    }

    fn address(mut self, text: &str, identity: u32, kind: AddressKind) -> Self {
        let entry = BaseAddress { identity: IdentityId(identity), node: None, endpoint: None, kind };
        self.addresses.insert(ip(text), entry);
        self
    }

    fn pod_cidr(mut self, text: &str) -> Self {
        self.pod_cidrs.push(net(text));
        self
    }

    fn compile(&self, compiler: &mut Compiler) -> Output {
        compiler
            .compile(&Input {
                policies: &self.policies,
                identities: &self.identities,
                endpoints: &self.endpoints,
                audited: &self.audited,
                shown: &self.shown,
                host: &self.host,
                addresses: &self.addresses,
                pod_cidrs: &self.pod_cidrs,
                heard: &self.heard,
            })
            .expect("numbers are left")
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn net(text: &str) -> IpNet {
    text.parse().expect("a prefix")
}

fn labels_of(namespace: &str, app: &str) -> IdentityLabels {
    IdentityLabels {
        namespace: namespace.to_owned(),
        namespace_labels: Labels::from([("kubernetes.io/metadata.name".to_owned(), namespace.to_owned())]),
        service_account: "default".to_owned(),
        pod_labels: Labels::from([("app".to_owned(), app.to_owned())]),
        named_ports: BTreeMap::new(),
    }
}

fn app(value: &str) -> Selector {
    let values = BTreeSet::from([value.to_owned()]);
    Selector { requirements: vec![Requirement::In("app".to_owned(), values)] }
}

fn reference(name: &str) -> PolicyRef {
    PolicyRef::network_policy(&ObjectKey::new("shop", name))
}

fn policy(name: &str, selector: Selector) -> Policy {
    Policy {
        reference: reference(name),
        subject: Subject::Pods { namespaces: Selector::default(), pods: selector },
        tier: Tier::Namespaced,
        priority: 0,
        ingress: None,
        egress: None,
        marks: Default::default(),
        others: vec![],
        doubts: vec![],
    }
}

fn isolating() -> PolicyDirection {
    PolicyDirection { default: Action::Deny, rules: Vec::new() }
}

fn ingress(mut policy: Policy, peers: Option<Vec<Peer>>, ports: Option<Vec<PortMatch>>) -> Policy {
    let rule = PolicyRule::new(Action::Allow, peers, ports);
    policy.ingress.get_or_insert_with(isolating).rules.push(rule);
    policy
}

fn egress(mut policy: Policy, peers: Option<Vec<Peer>>, ports: Option<Vec<PortMatch>>) -> Policy {
    let rule = PolicyRule::new(Action::Allow, peers, ports);
    policy.egress.get_or_insert_with(isolating).rules.push(rule);
    policy
}

fn pods(value: &str) -> Peer {
    Peer::Pods { namespaces: None, pods: app(value) }
}

fn block(cidr: &str, except: &[&str]) -> Peer {
    Peer::Block { cidr: net(cidr), except: except.iter().map(|hole| net(hole)).collect() }
}

fn tcp(port: u16) -> PortMatch {
    PortMatch { protocol: Protocol::Tcp.into(), port: PortSelector::Range(port, port) }
}

fn named(name: &str) -> PortMatch {
    PortMatch { protocol: Protocol::Tcp.into(), port: PortSelector::Named(name.to_owned()) }
}

/// By these policies, separated by commas.
fn allowed(origins: &str) -> CompiledRule {
    CompiledRule {
        action: Action::Allow,
        origins: origins.split(',').map(reference).collect(),
        is_audit: false,
        l7: None,
    }
}

fn row(class: u32, protocol: u8, port: u16, origin: &str) -> (CompiledRuleKey, CompiledRule) {
    let key = CompiledRuleKey { class, protocol: Some(protocol), port, port_prefix_length: 16 };
    (key, allowed(origin))
}

fn any(class: u32, origin: &str) -> (CompiledRuleKey, CompiledRule) {
    let key = CompiledRuleKey { class, protocol: None, port: 0, port_prefix_length: 0 };
    (key, allowed(origin))
}

fn direction<const P: usize, const R: usize>(
    peers: [(u32, u32); P],
    rules: [(CompiledRuleKey, CompiledRule); R],
) -> CompiledDirection {
    CompiledDirection {
        peers: peers.into_iter().map(|(id, class)| (IdentityId(id), class)).collect(),
        rules: rules.into_iter().collect(),
        ..CompiledDirection::default()
    }
}

fn compiler() -> Compiler {
    Compiler::new(PolicyId(1), IdentityId::FIRST_LOCAL, Arc::default())
}

const LOCAL: u32 = IdentityId::FIRST_LOCAL.0;

#[test]
fn no_policy_enforces_nothing() {
    let world = World::default().identity(300, "shop", "web").endpoint(1, 300);
    let output = world.compile(&mut compiler());
    assert_eq!(
        output,
        Output {
            of_endpoint: BTreeMap::from([(EndpointId(1), PolicyId(0))]),
            selected_by: BTreeMap::from([(EndpointId(1), Arc::from([]))]),
            ..Output::default()
        }
    );
}

#[test]
fn rules_add_up_in_classes() {
    let world = World::default()
        .identity(300, "shop", "database")
        .identity(301, "shop", "web")
        .identity(302, "shop", "admin")
        .identity(303, "other", "web")
        .endpoint(1, 300)
        .endpoint(2, 300)
        .policy(ingress(policy("web", app("database")), Some(vec![pods("web")]), Some(vec![tcp(5432)])))
        .policy(ingress(policy("metrics", Selector::default()), None, Some(vec![tcp(9090)])))
        .policy(ingress(policy("admin", app("database")), Some(vec![pods("admin")]), None));
    let output = world.compile(&mut compiler());
    let compiled = CompiledPolicy {
        ingress: Some(direction(
            [(301, 1), (302, 2)],
            [row(0, 6, 9090, "metrics"), row(1, 6, 5432, "web"), row(1, 6, 9090, "metrics"), any(2, "admin")],
        )),
        egress: None,
    };
    assert_eq!(output.policies, BTreeMap::from([(PolicyId(1), Arc::new(compiled))]));
    assert_eq!(
        output.of_endpoint,
        BTreeMap::from([(EndpointId(1), PolicyId(1)), (EndpointId(2), PolicyId(1))])
    );
    let selected: Vec<String> =
        output.selected_by[&EndpointId(2)].iter().map(|policy| policy.name.to_string()).collect();
    assert_eq!(selected, ["admin", "metrics", "web"]);
}

#[test]
fn empty_rules_deny_everything() {
    let mut deny = policy("deny", Selector::default());
    deny.ingress = Some(isolating());
    let world = World::default().identity(300, "shop", "web").endpoint(1, 300).policy(deny);
    let output = world.compile(&mut compiler());
    let compiled = CompiledPolicy { ingress: Some(CompiledDirection::default()), egress: None };
    assert_eq!(output.policies, BTreeMap::from([(PolicyId(1), Arc::new(compiled))]));
}

#[test]
fn a_new_identity_adds_a_peer_and_keeps_the_number() {
    let world = World::default().identity(300, "shop", "database").endpoint(1, 300).policy(ingress(
        policy("web", app("database")),
        Some(vec![pods("web")]),
        Some(vec![tcp(80)]),
    ));
    let mut compiler = compiler();
    let before = world.compile(&mut compiler);
    let grown = world.clone().identity(301, "shop", "web").identity(302, "shop", "admin");
    let after = grown.compile(&mut compiler);
    assert_eq!(before.of_endpoint, after.of_endpoint);
    let with_peer =
        CompiledPolicy { ingress: Some(direction([(301, 1)], [row(1, 6, 80, "web")])), egress: None };
    assert_eq!(*after.policies[&PolicyId(1)], with_peer);
    let shrunk = world.compile(&mut compiler);
    let without_peer = CompiledPolicy { ingress: Some(direction([], [row(1, 6, 80, "web")])), egress: None };
    assert_eq!(*shrunk.policies[&PolicyId(1)], without_peer);
    assert_eq!(grown.compile(&mut compiler), after);
}

#[test]
fn another_rule_is_another_number_and_a_wider_selector_is_not() {
    let narrow = ingress(policy("web", app("database")), None, Some(vec![tcp(80)]));
    let world = World::default().identity(300, "shop", "database").endpoint(1, 300).policy(narrow.clone());
    let mut compiler = compiler();
    world.compile(&mut compiler);
    let wide = Policy { subject: policy("", Selector::default()).subject, ..narrow.clone() };
    let output = world.clone().policy(wide).compile(&mut compiler);
    assert_eq!(output.of_endpoint[&EndpointId(1)], PolicyId(1));
    let other = ingress(narrow, None, Some(vec![tcp(81)]));
    let output = world.clone().policy(other).compile(&mut compiler);
    assert_eq!(output.of_endpoint[&EndpointId(1)], PolicyId(2));
    assert_eq!(output.policies.keys().copied().collect::<Vec<_>>(), [PolicyId(2)]);
    let back = world.compile(&mut compiler);
    assert_eq!(back.of_endpoint[&EndpointId(1)], PolicyId(3));
}

#[test]
fn ingress_port_names_are_the_selected_pods() {
    let world = World::default()
        .identity_with_port(300, "shop", "web", "http", 8080)
        .identity_with_port(301, "shop", "web", "http", 8081)
        .identity(302, "shop", "web")
        .endpoint(1, 300)
        .endpoint(2, 301)
        .endpoint(3, 302)
        .policy(ingress(policy("web", app("web")), None, Some(vec![named("http")])));
    let output = world.compile(&mut compiler());
    let compiled = |rules: &[(CompiledRuleKey, CompiledRule)]| {
        let rules = rules.iter().cloned().collect();
        CompiledPolicy {
            ingress: Some(CompiledDirection { rules, ..CompiledDirection::default() }),
            egress: None,
        }
    };
    let of = |endpoint: u16| &*output.policies[&output.of_endpoint[&EndpointId(endpoint)]];
    assert_eq!(*of(1), compiled(&[row(0, 6, 8080, "web")]));
    assert_eq!(*of(2), compiled(&[row(0, 6, 8081, "web")]));
    assert_eq!(*of(3), compiled(&[]));
}

#[test]
fn egress_port_names_are_the_peers() {
    let world = World::default()
        .identity(300, "shop", "client")
        .identity_with_port(301, "shop", "web", "http", 8080)
        .identity_with_port(302, "shop", "web", "http", 8081)
        .identity(303, "shop", "web")
        .identity_with_port(304, "other", "web", "http", 8080)
        .endpoint(1, 300)
        .policy(egress(
            policy("web", app("client")),
            Some(vec![pods("web")]),
            Some(vec![named("http"), tcp(443)]),
        ));
    let output = world.compile(&mut compiler());
    let expected = direction(
        [(301, 1), (302, 2), (303, 3)],
        [
            row(1, 6, 443, "web"),
            row(1, 6, 8080, "web"),
            row(2, 6, 443, "web"),
            row(2, 6, 8081, "web"),
            row(3, 6, 443, "web"),
        ],
    );
    assert_eq!(output.policies[&PolicyId(1)].egress, Some(expected));
    let to_anyone = world.policy(egress(policy("web", app("client")), None, Some(vec![named("http")])));
    let output = to_anyone.compile(&mut compiler());
    let expected =
        direction([(301, 1), (302, 2), (304, 1)], [row(1, 6, 8080, "web"), row(2, 6, 8081, "web")]);
    assert_eq!(output.policies[&PolicyId(1)].egress, Some(expected));
}

#[test]
fn blocks_cover_pods_nodes_and_the_world() {
    let world = World::default()
        .identity(300, "shop", "web")
        .endpoint(1, 300)
        .pod_cidr("10.0.0.0/16")
        .address("10.0.1.5", 300, AddressKind::Pod)
        .address("10.0.2.5", 300, AddressKind::Pod)
        .address("192.168.0.1", 1, AddressKind::Node)
        .address("fd00::5", 300, AddressKind::Pod)
        .policy(egress(
            policy("out", app("web")),
            Some(vec![block("10.0.0.0/8", &["10.0.1.0/24"]), pods("database")]),
            None,
        ));
    let output = world.compile(&mut compiler());
    let (one, two) = (net("10.0.0.0/8"), net("10.0.1.0/24"));
    let local = |base: Option<u32>, prefixes: &[IpNet]| LocalIdentity {
        base: base.map(IdentityId),
        prefixes: prefixes.into(),
        names: Arc::default(),
    };
    let expected: BTreeMap<IdentityId, LocalIdentity> = BTreeMap::from([
        (IdentityId(LOCAL), local(Some(300), &[one, two])),
        (IdentityId(LOCAL + 1), local(Some(300), &[one])),
        (IdentityId(LOCAL + 2), local(None, &[one])),
        (IdentityId(LOCAL + 3), local(Some(3), &[one, two])),
        (IdentityId(LOCAL + 4), local(Some(3), &[one])),
    ]);
    assert_eq!(*output.local_identities, expected);
    let entry = |identity, is_pod_cidr| PrefixEntry {
        identity: IdentityId(identity),
        is_pod_cidr,
        ..PrefixEntry::default()
    };
    assert_eq!(
        *output.prefixes,
        BTreeMap::from([
            (one, entry(LOCAL + 2, false)),
            (net("10.0.0.0/16"), entry(LOCAL + 4, true)),
            (two, entry(LOCAL + 3, true)),
        ])
    );
    let identities: Vec<u32> = output.addresses.values().map(|entry| entry.identity.0).collect();
    assert_eq!(identities, [LOCAL, LOCAL + 1, 1, 300]);
    assert_eq!(
        output.policies[&PolicyId(1)].egress,
        Some(direction([(LOCAL + 1, 1), (LOCAL + 2, 1), (LOCAL + 4, 1)], [any(1, "out")]))
    );
}

#[test]
fn short_ipv6_prefixes_do_not_speak_for_ipv4() {
    let world = World::default().identity(300, "shop", "web").endpoint(1, 300).policy(egress(
        policy("out", app("web")),
        Some(vec![block("::/0", &["::ffff:0:0/100"])]),
        None,
    ));
    let output = world.compile(&mut compiler());
    let entry = |identity| PrefixEntry { identity, ..PrefixEntry::default() };
    assert_eq!(
        *output.prefixes,
        BTreeMap::from([
            (net("0.0.0.0/0"), entry(IdentityId::WORLD)),
            (net("::/0"), entry(IdentityId::FIRST_LOCAL)),
        ])
    );
}

#[test]
fn a_late_identity_gives_its_addresses_labels() {
    let world = World::default()
        .identity(300, "shop", "web")
        .endpoint(1, 300)
        .address("10.0.1.5", 301, AddressKind::Pod)
        .policy(ingress(
            policy("in", app("web")),
            Some(vec![pods("client"), block("10.0.0.0/24", &[])]),
            None,
        ))
        .policy(ingress(
            policy("wide", app("web")),
            Some(vec![block("10.0.0.0/16", &["10.0.1.0/24"])]),
            None,
        ));
    let mut compiler = compiler();
    let before = world.compile(&mut compiler);
    let derived = before.addresses[&ip("10.0.1.5")].identity;
    assert!(derived.is_local());
    let peers = |output: &Output| output.policies[&PolicyId(1)].ingress.clone().expect("enforced").peers;
    assert!(!peers(&before).contains_key(&derived));
    let after = world.identity(301, "shop", "client").compile(&mut compiler);
    assert_eq!(after.addresses, before.addresses);
    assert_eq!(peers(&after)[&derived], peers(&after)[&IdentityId(301)]);
}

#[test]
fn another_prefix_is_another_local_number() {
    let world = World::default()
        .identity(300, "shop", "web")
        .endpoint(1, 300)
        .address("10.0.1.5", 300, AddressKind::Pod)
        .policy(egress(policy("one", app("web")), Some(vec![block("10.0.0.0/8", &[])]), None));
    let mut compiler = compiler();
    let before = world.compile(&mut compiler);
    let grown = world
        .clone()
        .policy(egress(policy("two", app("web")), Some(vec![block("10.0.0.0/16", &[])]), None))
        .compile(&mut compiler);
    let back = world.compile(&mut compiler);
    let of = |output: &Output| output.addresses[&ip("10.0.1.5")].identity;
    assert!(of(&before) < of(&grown));
    assert_eq!(of(&before), of(&back), "what comes again is the same");
}

#[test]
fn a_label_of_a_run_lets_in_who_has_it_and_nobody_who_is_without() {
    let in_night = Requirement::In("job-name".to_owned(), BTreeSet::from(["night".to_owned()]));
    let with_job = Selector { requirements: vec![in_night] };
    let world = World::default()
        .identity(300, "shop", "web")
        .identity(301, "shop", "job")
        .label(301, "job-name", "night")
        .endpoint(1, 300)
        .policy(ingress(
            policy("in", app("web")),
            Some(vec![Peer::Pods { namespaces: None, pods: with_job }]),
            None,
        ));
    let output = world.compile(&mut compiler());
    let ingress_of = output.policies[&PolicyId(1)].ingress.as_ref().expect("ingress");
    assert_eq!(ingress_of.peers.keys().copied().collect::<Vec<_>>(), [IdentityId(301)]);
    assert_eq!(
        asked_labels(&world.policies, &LabelFilter::default()),
        BTreeSet::from(["job-name".to_owned()])
    );

    let not_hash = Selector { requirements: vec![Requirement::DoesNotExist("pod-template-hash".to_owned())] };
    let world = World::default().identity(300, "shop", "web").endpoint(1, 300).policy(ingress(
        policy("in", app("web")),
        Some(vec![Peer::Pods { namespaces: None, pods: not_hash }]),
        None,
    ));
    let output = world.compile(&mut compiler());
    assert_eq!(output.policies[&PolicyId(1)].ingress, Some(CompiledDirection::default()));
}

#[test]
fn exhausted_numbers_are_an_error_and_then_a_fresh_start() {
    let world = World::default().identity(300, "shop", "web").endpoint(1, 300).policy(egress(
        policy("one", app("web")),
        Some(vec![block("10.0.0.0/8", &[])]),
        None,
    ));
    let mut compiler = Compiler::new(PolicyId::CLOSED, IdentityId::FIRST_LOCAL, Arc::default());
    let input = Input {
        policies: &world.policies,
        identities: &world.identities,
        endpoints: &world.endpoints,
        audited: &world.audited,
        host: &world.host,
        addresses: &world.addresses,
        pod_cidrs: &world.pod_cidrs,
        heard: &world.heard,
        shown: &world.shown,
    };
    assert_eq!(compiler.compile(&input), Err(Error::PoliciesExhausted));
    let quiet = World::default().identity(300, "shop", "web").endpoint(1, 300);
    assert_eq!(quiet.compile(&mut compiler).of_endpoint[&EndpointId(1)], PolicyId(0));
    assert_eq!(compiler.compile(&input), Err(Error::PoliciesExhausted));
}

#[test]
fn output_is_json() {
    let world = World::default()
        .identity(300, "shop", "web")
        .endpoint(1, 300)
        .address("10.0.1.5", 300, AddressKind::Pod)
        .policy(ingress(policy("in", app("web")), Some(vec![block("10.0.0.0/8", &[])]), Some(vec![tcp(80)])));
    let json = serde_json::to_value(world.compile(&mut compiler())).expect("every key is a string");
    assert_eq!(json["policies"]["1"]["ingress"]["rules"]["1/6/80/16"]["action"], "Allow");
}

proptest::proptest! {
    #[test]
    fn addresses_that_come_and_go_leave_nothing_behind(
        steps in proptest::collection::vec((0..6_u8, proptest::option::of(300..303_u32)), 1..30)
    ) {
        let mut world = World::default()
            .identity(300, "shop", "web")
            .identity(301, "shop", "client")
            .endpoint(1, 300)
            .pod_cidr("10.0.0.0/29")
            .policy(egress(
                policy("out", app("web")),
                Some(vec![block("10.0.0.0/30", &[]), block("10.0.0.2/31", &[]), pods("client")]),
                None,
            ));
        let mut following = compiler();
        for (byte, identity) in steps {
            let address = format!("10.0.0.{byte}");
            match identity {
                Some(identity) => world = world.address(&address, identity, AddressKind::Pod),
                None => drop(world.addresses.remove(&ip(&address))),
            }
            let (followed, fresh) = (world.compile(&mut following), world.compile(&mut compiler()));
            proptest::prop_assert_eq!(meanings(&followed), meanings(&fresh));
        }
    }
}

/// What numbers stand for, in place of the numbers: of addresses, of all that are in use, of the peers of the policy.
fn meanings(output: &Output) -> (Vec<(IpAddr, String)>, BTreeSet<String>, BTreeSet<String>) {
    let meaning = |id: &IdentityId| match output.local_identities.get(id) {
        Some(local) => format!("{local:?}"),
        None => id.to_string(),
    };
    let addresses = output.addresses.iter().map(|(address, entry)| (*address, meaning(&entry.identity)));
    let used = output.local_identities.keys().map(meaning);
    let directions = output.policies.values().filter_map(|policy| policy.egress.as_ref());
    let peers = directions.flat_map(|direction| direction.peers.keys().map(meaning));
    (addresses.collect(), used.collect(), peers.collect())
}

fn dns_name(name: &str) -> Peer {
    Peer::Name(DnsRule::MatchName(name.to_owned()))
}

#[test]
fn a_name_opens_its_addresses_to_those_with_the_rule_and_nothing_of_the_cluster() {
    let heard = |rows: &[(u16, &str, &[&str])]| -> Heard {
        let row = |(endpoint, name, addresses): &(u16, &str, &[&str])| {
            (
                (EndpointId(*endpoint), Arc::from(*name)),
                addresses.iter().map(|text| ip(text)).collect::<Arc<[IpAddr]>>(),
            )
        };
        rows.iter().map(row).collect()
    };
    let mut world = World::default()
        .identity(300, "shop", "web")
        .endpoint(1, 300)
        .pod_cidr("10.0.0.0/16")
        .address("192.168.0.1", 1, AddressKind::Node)
        .policy(egress(
            policy("out", app("web")),
            Some(vec![dns_name("a.test"), block("192.0.2.0/24", &[])]),
            None,
        ));
    let mut compiler = compiler();
    let before = world.compile(&mut compiler);
    assert_eq!(before.prefixes.len(), 2, "{:?}", before.prefixes);

    let told =
        [(1, "a.test", &["198.51.100.1", "192.0.2.7", "10.0.0.9", "::ffff:198.51.100.9", "192.168.0.1"][..])];
    world.heard = heard(&told);
    let output = world.compile(&mut compiler);
    assert_eq!(output.of_endpoint, before.of_endpoint, "the policy keeps its number");
    assert_eq!(output.addresses, before.addresses, "who has an address keeps its identity");
    let allowed = |output: &Output, text: &str| {
        let entry = output.prefixes.get(&net(text))?;
        let egress = output.policies.values().next()?.egress.clone()?;
        Some((egress.peers.contains_key(&entry.identity), entry.is_learned))
    };
    assert_eq!(allowed(&output, "198.51.100.1/32"), Some((true, true)));
    assert_eq!(allowed(&output, "192.0.2.7/32"), Some((true, true)));
    assert_eq!(allowed(&output, "10.0.0.9/32"), None, "a pod's address has no name");
    assert_eq!(allowed(&output, "::ffff:198.51.100.9/128"), None);
    // The same from the beginning, and the same numbers for the same meaning.
    let afresh = world.compile(&mut Compiler::new(PolicyId(1), IdentityId::FIRST_LOCAL, Arc::default()));
    assert_eq!(afresh.prefixes.keys().collect::<Vec<_>>(), output.prefixes.keys().collect::<Vec<_>>());
    world.heard = heard(&[(1, "a.test", &["198.51.100.1", "198.51.100.2"])]);
    let more = world.compile(&mut compiler);
    let identity = |output: &Output, text: &str| output.prefixes[&net(text)].identity;
    assert_eq!(identity(&more, "198.51.100.2/32"), identity(&output, "198.51.100.1/32"));
    assert_eq!(allowed(&more, "192.0.2.7/32"), None);

    world.heard = heard(&[(2, "a.test", &["198.51.100.1"]), (1, "b.test", &["198.51.100.2"])]);
    let others = world.compile(&mut compiler);
    assert_eq!(others.prefixes.len(), 2, "another pod, another name: {:?}", others.prefixes);
    assert_eq!(others.local_identities.len(), before.local_identities.len());
}
