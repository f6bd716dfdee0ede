//! The host's own policies: which select this node, and what stays open whatever they say.
//!
//! A policy that takes the API server from the node would take away the way to mend it. So policies of the
//! host are confirmed first (`confirm`).

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use crate::model::{
    Action, Endpoint, EndpointEntry, EndpointId, EndpointSlice, Entity, IdentityId, IdentityLabels,
    IpProtocol, MacAddress, Marks, Node, ObjectKey, Peer, Policy, PolicyDirection, PolicyId, PolicyKind,
    PolicyRef, PolicyRule, PortMatch, PortSelector, Protocol, Selector, Subject, Tier,
};
use crate::policy::Sources;
use crate::tables::Snapshot;

const ESP: IpProtocol = IpProtocol(50);
/// DHCP: what servers send to, what they are sent to.
const DHCP: [[u16; 2]; 2] = [[68, 546], [67, 547]];

/// The policies of the host, as they were read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostPolicies {
    /// The node's labels.
    pub labels: Arc<IdentityLabels>,
    /// Stands for what the policies say.
    pub definition: u64,
    /// Their names.
    pub names: Vec<PolicyRef>,
    /// Whether any speaks of what comes in, and of what goes out.
    directions: [bool; 2],
}

/// Those of `sources` that select `node`; `None`: none does, and the host has no policy.
pub fn find(node: &Node, sources: &Sources) -> Option<HostPolicies> {
    let selects = |policy: &&Policy| match &policy.subject {
        Subject::Nodes(selector) => selector.matches(&node.labels),
        Subject::Pods { .. } => false,
    };
    let labels = IdentityLabels { pod_labels: node.labels.clone(), ..IdentityLabels::default() };
    let mut found = HostPolicies { labels: Arc::new(labels), ..HostPolicies::default() };
    let mut said = Vec::new();
    for policy in sources.all().filter(|policy| policy.reference.namespace.is_none()) {
        for spec in std::iter::once(policy).chain(&policy.others).filter(selects) {
            found.directions[0] |= spec.ingress.is_some();
            found.directions[1] |= spec.egress.is_some();
            said.push(format!("{:?} {:?} {:?}", spec.reference, spec.ingress, spec.egress));
            found.names.push(policy.reference.clone());
        }
    }
    said.sort_unstable();
    found.names.sort_unstable();
    found.names.dedup();
    let mut hasher = DefaultHasher::new();
    said.hash(&mut hasher);
    found.definition = hasher.finish();
    (!found.names.is_empty()).then_some(found)
}

/// Where the API server answers.
pub fn api_servers(slices: &Snapshot<ObjectKey, Arc<EndpointSlice>>) -> BTreeSet<SocketAddr> {
    let of_api = slices.values().filter(|slice| slice.service == ObjectKey::new("default", "kubernetes"));
    let pairs = of_api.flat_map(|slice| {
        let ports = slice.ports.iter().filter(|port| port.protocol == Protocol::Tcp);
        ports.flat_map(|port| slice.backends.iter().map(|it| SocketAddr::new(it.address, port.port)))
    });
    pairs.collect()
}

/// The policy that counts before those of the host: what an administrator must not lose.
/// `wireguard`: the ports that nodes have published.
pub fn always_open(
    of: &HostPolicies,
    servers: &BTreeSet<SocketAddr>,
    own: &[IpAddr],
    wireguard: &BTreeSet<u16>,
) -> Policy {
    let reference = PolicyRef {
        kind: PolicyKind::CiliumClusterwideNetworkPolicy,
        namespace: None,
        name: "weir:always-open".into(),
        spec: 0,
    };
    let allow =
        |peers: Option<Vec<Peer>>, ports| PolicyRule { action: Action::Allow, peers, ports, l7: None };
    let port = |protocol, port| PortMatch { protocol, port: PortSelector::Range(port, port) };
    let udp = |number| port(Protocol::Udp.into(), number);
    let block = |server: &SocketAddr| Peer::Block { cidr: server.ip().into(), except: Vec::new() };
    let api = || (!servers.is_empty()).then(|| allow(Some(servers.iter().map(block).collect()), None));
    let between_nodes = || {
        let esp = PortMatch { protocol: ESP, port: PortSelector::Any };
        let ports = std::iter::once(esp).chain(wireguard.iter().map(|port| udp(*port)));
        allow(Some(vec![Peer::Entity(Entity::RemoteNode)]), Some(ports.collect()))
    };
    let here = servers.iter().filter(|server| own.contains(&server.ip()));
    let here: BTreeSet<PortMatch> = here.map(|server| port(Protocol::Tcp.into(), server.port())).collect();
    let direction = |side: usize| {
        let dhcp = allow(None, Some(DHCP[side].map(udp).to_vec()));
        let mut rules: Vec<PolicyRule> = api().into_iter().chain([between_nodes(), dhcp]).collect();
        if side == 0 && !here.is_empty() {
            rules.push(allow(None, Some(here.iter().cloned().collect())));
        }
        of.directions[side].then_some(PolicyDirection { default: Action::Pass, rules })
    };
    Policy {
        reference,
        subject: Subject::Nodes(Selector::default()),
        tier: Tier::Admin,
        priority: 0,
        ingress: direction(0),
        egress: direction(1),
        marks: Marks::default(),
        others: Vec::new(),
        doubts: Vec::new(),
    }
}

/// The row of the host, without a policy yet.
pub fn entry(node: &str) -> EndpointEntry {
    let endpoint = Endpoint {
        id: EndpointId::HOST,
        container_id: String::new(),
        interface: String::new(),
        netns: PathBuf::new(),
        pod: ObjectKey::new("", node),
        pod_uid: None,
        ipv4: None,
        ipv6: None,
        host_interface: String::new(),
        host_ifindex: 0,
        mac: MacAddress([0; 6]),
        port_mappings: Vec::new(),
    };
    EndpointEntry {
        endpoint: Arc::new(endpoint),
        identity: IdentityId::HOST,
        policy: PolicyId::default(),
        enforces_ingress: false,
        enforces_egress: false,
        refuses_strangers: false,
        rejects: false,
        has_gateway: false,
        shaping: Default::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Labels, Requirement};

    fn node(zone: &str) -> Node {
        let labels = Labels::from([("zone".to_owned(), zone.to_owned())]);
        let addresses = vec![[192, 0, 2, 1].into()];
        Node {
            name: "a".to_owned(),
            labels,
            addresses,
            pod_cidrs: vec![],
            is_leaving: false,
            is_unready: false,
        }
    }

    fn policy(name: &str, zone: &str) -> Policy {
        let wanted = Requirement::In("zone".to_owned(), BTreeSet::from([zone.to_owned()]));
        let key = ObjectKey::new("", name);
        Policy {
            reference: PolicyRef::new(PolicyKind::CiliumClusterwideNetworkPolicy, &key),
            subject: Subject::Nodes(Selector::new(vec![wanted])),
            tier: Tier::Namespaced,
            priority: 0,
            ingress: Some(PolicyDirection { default: Action::Deny, rules: Vec::new() }),
            egress: None,
            marks: Marks::default(),
            others: Vec::new(),
            doubts: Vec::new(),
        }
    }

    fn sources(policies: Vec<Policy>) -> Sources {
        Sources::default().with(policies)
    }

    #[test]
    fn a_host_has_a_policy_where_one_selects_it_and_a_definition_is_what_it_says() {
        assert_eq!(find(&node("one"), &sources(vec![policy("two", "two")])), None);
        let found = find(&node("one"), &sources(vec![policy("one", "one"), policy("two", "two")]));
        let found = found.expect("one selects it");
        assert_eq!(found.names, [policy("one", "one").reference]);
        let again = find(&node("one"), &sources(vec![policy("one", "one")])).expect("it does");
        assert_eq!(again.definition, found.definition, "what others say is no change");
        let mut changed = policy("one", "one");
        changed.egress = changed.ingress.clone();
        let changed = find(&node("one"), &sources(vec![changed])).expect("it does");
        assert_ne!(changed.definition, found.definition);
    }

    #[test]
    fn the_api_server_stays_open_also_where_this_node_has_it() {
        let found = find(&node("one"), &sources(vec![policy("one", "one")])).expect("it selects the node");
        let server: SocketAddr = "192.0.2.1:6443".parse().expect("an address");
        let open =
            always_open(&found, &BTreeSet::from([server]), &node("one").addresses, &BTreeSet::from([51871]));
        assert!(open.egress.is_none(), "nobody speaks of what goes out");
        let ingress = open.ingress.expect("rules");
        assert_eq!(ingress.default, Action::Pass);
        let everyone = ingress.rules.iter().filter(|rule| rule.peers.is_none());
        let ports: Vec<&PortSelector> =
            everyone.flat_map(|rule| &rule.ports).flatten().map(|it| &it.port).collect();
        assert!(ports.contains(&&PortSelector::Range(6443, 6443)), "{ports:?}");
        let elsewhere = always_open(&found, &BTreeSet::from([server]), &[], &BTreeSet::new());
        assert_eq!(elsewhere.ingress.expect("rules").rules.len(), ingress.rules.len() - 1);
    }

    /// What the compiled rows of the host let pass: `side` 0 is from an address, 1 is to it.
    fn lets(output: &crate::policy::Output, side: usize, address: &str, protocol: u8, port: u16) -> bool {
        let compiled = &output.policies[&output.of_endpoint[&EndpointId::HOST]];
        let direction = [&compiled.ingress, &compiled.egress][side].as_ref().expect("both are spoken of");
        let address: IpAddr = address.parse().expect("an address");
        let longest = output.prefixes.iter().filter(|(net, _)| net.contains(&address));
        let identity = match output.addresses.get(&address) {
            Some(entry) => entry.identity,
            None => longest
                .max_by_key(|(net, _)| net.prefix_len())
                .map_or(IdentityId::WORLD, |(_, entry)| entry.identity),
        };
        let class = direction.peers.get(&identity).copied().unwrap_or(0);
        let matches = direction.rules.iter().filter(|(key, _)| {
            key.class == class
                && key.protocol.is_none_or(|known| known == protocol)
                && u32::from(key.port ^ port) >> (16 - key.port_prefix_length) == 0
        });
        let row = matches.max_by_key(|(key, _)| (key.protocol, key.port_prefix_length));
        row.is_some_and(|(_, rule)| rule.action == Action::Allow)
    }

    #[test]
    fn bypass_6_what_must_stay_open_and_nothing_else_passes_a_policy_that_closes_everything() {
        let mut closed = policy("closed", "one");
        closed.egress = closed.ingress.clone();
        let found = find(&node("one"), &sources(vec![closed.clone()])).expect("it selects the node");
        let servers = ["192.0.2.1:6443", "198.51.100.9:443"].map(|text| text.parse().expect("an address"));
        let open =
            always_open(&found, &BTreeSet::from(servers), &node("one").addresses, &BTreeSet::from([51871]));
        let policies = [closed, open].map(|policy| (policy.reference.clone(), Arc::new(policy)));
        let address = |text: &str, identity, kind| {
            let entry = crate::model::BaseAddress { identity, node: None, endpoint: None, kind };
            (text.parse::<IpAddr>().expect("an address"), entry)
        };
        let kind = crate::model::AddressKind::Node;
        let output = crate::policy::Compiler::new(PolicyId(1), IdentityId::FIRST_LOCAL, Arc::default())
            .compile(&crate::policy::Input {
                policies: &Snapshot::from_iter(policies),
                identities: &Snapshot::new(),
                endpoints: &std::collections::BTreeMap::from([(EndpointId::HOST, IdentityId::HOST)]),
                audited: &BTreeSet::new(),
                host: &found.labels,
                addresses: &Snapshot::from_iter([address("192.0.2.2", IdentityId::REMOTE_NODE, kind)]),
                pod_cidrs: &[],
                heard: &crate::policy::Heard::new(),
                shown: &std::collections::BTreeMap::new(),
            })
            .expect("numbers are left");
        let (world, other, server) = ("203.0.113.7", "192.0.2.2", "198.51.100.9");
        let (tcp, udp, esp) = (6, 17, ESP.0);
        for (side, address, protocol, port, is_open) in [
            // The API server: what it sends and is sent, and the one that this node has.
            (0, server, tcp, 10250, true),
            (1, server, tcp, 443, true),
            (0, world, tcp, 6443, true),
            (0, world, udp, 6443, false),
            (0, world, tcp, 22, false),
            (1, world, tcp, 443, false),
            // DHCP, from whoever has a server.
            (0, world, udp, 68, true),
            (0, other, udp, 546, true),
            (0, world, udp, 67, false),
            (1, world, udp, 67, true),
            (1, world, udp, 547, true),
            (1, world, udp, 68, false),
            // Encryption, between nodes alone.
            (0, other, udp, 51871, true),
            (1, other, udp, 51871, true),
            (0, world, udp, 51871, false),
            (0, other, esp, 0, true),
            (0, world, esp, 0, false),
            (0, other, tcp, 10250, false),
            (0, other, 1, 8, false),
        ] {
            let found = lets(&output, side, address, protocol, port);
            assert_eq!(found, is_open, "{side} {address} {protocol}/{port}");
        }
    }
}
