//! What is tried: every way that Kubernetes promises, by both families, on one node and between
//! nodes. Pure: what the cluster is like goes in, a list comes out.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use super::objects::{CLIENT, CONFINED, PORT, SERVICE_PORT, STRANGER, guarded, server};
use super::probe::Probe;
use super::report::{Row, Verdict};

/// For an answer that should come.
const SECONDS: u64 = 5;
/// For one that must not.
const DENIED_SECONDS: u64 = 2;

/// A node that takes part.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    pub node: String,
    pub addresses: Vec<IpAddr>,
    pub kubelet_port: u16,
}

/// The cluster as the test finds it, its own pods included.
#[derive(Clone, Debug, Default)]
pub struct World {
    pub namespace: String,
    /// The first one's pods ask.
    pub places: Vec<Place>,
    pub pods: BTreeMap<String, Vec<IpAddr>>,
    pub services: BTreeMap<String, Vec<IpAddr>>,
    /// Addresses and port of the `kubernetes` service.
    pub kubernetes: Vec<SocketAddr>,
    /// Why DNS cannot be tried, where that is so.
    pub no_dns: Option<String>,
    pub external: Vec<SocketAddr>,
}

/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Asker {
    /// A pod of the test, on the first node.
    Pod(&'static str),
    /// The agent of the first node, in the node's own network.
    Node,
}

/// What should become of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expected {
    /// One of these answers; any when there is none.
    Answer(Vec<String>),
    /// A policy drops it.
    Denied,
}

/// One thing to try.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    pub test: &'static str,
    pub asker: Asker,
    pub to: String,
    /// The place of whoever answers, by its number, where it is one of them.
    pub place: Option<usize>,
    pub protocol: &'static str,
    pub is_ipv6: bool,
    pub probe: Probe,
    pub expected: Expected,
}

impl Check {
    pub fn family(&self) -> &'static str {
        family(self.is_ipv6)
    }

    /// The address that it asks.
    pub fn target(&self) -> Option<SocketAddr> {
        match &self.probe {
            Probe::TcpEcho { target, .. }
            | Probe::TcpConnect { target, .. }
            | Probe::TcpHangUp { target, .. }
            | Probe::UdpEcho { target, .. } => Some(*target),
            Probe::Dns { .. } => None,
        }
    }

    fn denied(mut self) -> Self {
        self.expected = Expected::Denied;
        match &mut self.probe {
            Probe::TcpEcho { seconds, .. }
            | Probe::TcpConnect { seconds, .. }
            | Probe::TcpHangUp { seconds, .. }
            | Probe::UdpEcho { seconds, .. }
            | Probe::Dns { seconds, .. } => *seconds = DENIED_SECONDS,
        }
        self
    }
}

/// Checks, and what cannot be tried here, with the reason.
#[derive(Default)]
pub struct Plan {
    pub checks: Vec<Check>,
    pub skipped: Vec<Row>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Transport {
    Tcp,
    Udp,
}

/// Without policies: everything reaches everything.
pub fn open(world: &World) -> Plan {
    let mut plan = Plan::default();
    for is_ipv6 in world.families(&mut plan.skipped) {
        plan.pods(world, is_ipv6);
        plan.services(world, is_ipv6);
        plan.nodes(world, is_ipv6);
        plan.beyond(world, is_ipv6);
        plan.before_policies(world, is_ipv6);
    }
    if world.places.len() < 2 {
        for test in ["pod to pod", "pod to service", "pod to node", "node to pod"] {
            plan.skip(test, "another node", "no second node was found that can run pods");
        }
    }
    if world.external.is_empty() {
        plan.skip("outside", "the world", "give a server with --external IP:PORT");
    }
    if let Some(reason) = &world.no_dns {
        plan.skip("DNS", "a service's name", reason);
    }
    plan
}

/// With the policies in force.
pub fn closed(world: &World) -> Plan {
    let mut plan = Plan::default();
    let mut nobody_told = Vec::new();
    for is_ipv6 in world.families(&mut nobody_told) {
        for number in 1..=world.places.len() {
            let mut check = |test, pod, to: String, transport| {
                plan.checks.extend(world.to_pod(test, Asker::Pod(pod), &to, number, transport, is_ipv6));
            };
            check("policy allows", CLIENT, guarded(number), Transport::Tcp);
            check("policy denies", STRANGER, guarded(number), Transport::Tcp);
            check("policy denies", CLIENT, guarded(number), Transport::Udp);
            if number == 1 {
                check("egress policy allows", CONFINED, server(1), Transport::Tcp);
            }
        }
        // With one node there is no second server.
        let last = world.places.len();
        let to = if last > 1 { server(last) } else { guarded(1) };
        let check =
            world.to_pod("egress policy denies", Asker::Pod(CONFINED), &to, last, Transport::Tcp, is_ipv6);
        plan.checks.extend(check);
    }
    for check in &mut plan.checks {
        if check.test.ends_with("denies") {
            *check = check.clone().denied();
        }
    }
    plan
}

impl Plan {
    fn pods(&mut self, world: &World, is_ipv6: bool) {
        for number in 1..=world.places.len() {
            for transport in [Transport::Tcp, Transport::Udp] {
                let to = server(number);
                for (test, asker) in [("pod to pod", Asker::Pod(CLIENT)), ("node to pod", Asker::Node)] {
                    self.checks.extend(world.to_pod(test, asker, &to, number, transport, is_ipv6));
                }
            }
        }
    }

    fn services(&mut self, world: &World, is_ipv6: bool) {
        for number in 1..=world.places.len() {
            let name = server(number);
            let Some(ip) = pick(world.services.get(&name), is_ipv6) else {
                self.skipped.push(Row::skipped(
                    "pod to service",
                    family(is_ipv6),
                    &name,
                    "the service has no address of this family",
                ));
                continue;
            };
            let address = SocketAddr::new(ip, SERVICE_PORT);
            for transport in [Transport::Tcp, Transport::Udp] {
                for (test, asker) in
                    [("pod to service", Asker::Pod(CLIENT)), ("node to service", Asker::Node)]
                {
                    let to = format!("service {name}");
                    self.checks.push(echo(test, asker, to, Some(number), transport, address, &name));
                }
            }
        }
    }

    fn nodes(&mut self, world: &World, is_ipv6: bool) {
        for (index, place) in world.places.iter().enumerate() {
            let Some(ip) = pick(Some(&place.addresses), is_ipv6) else {
                let reason = "the node has no address of this family";
                self.skipped.push(Row::skipped("pod to node", family(is_ipv6), &place.node, reason));
                continue;
            };
            let address = SocketAddr::new(ip, place.kubelet_port);
            let to = format!("kubelet of {}", place.node);
            let probe = Probe::TcpHangUp { target: address, seconds: SECONDS };
            self.checks.push(connect("pod to node", to, Some(index + 1), address, probe));
        }
    }

    /// The API server, the world, names.
    fn beyond(&mut self, world: &World, is_ipv6: bool) {
        for address in world.kubernetes.iter().filter(|address| address.is_ipv6() == is_ipv6) {
            let probe = Probe::TcpHangUp { target: *address, seconds: SECONDS };
            let to = "service kubernetes".to_owned();
            self.checks.push(connect("pod to API server", to, None, *address, probe));
        }
        for address in world.external.iter().filter(|address| address.is_ipv6() == is_ipv6) {
            let probe = Probe::TcpConnect { target: *address, seconds: SECONDS };
            self.checks.push(connect("outside", address.to_string(), None, *address, probe));
        }
        if let (None, Some(ip)) = (&world.no_dns, pick(world.services.get(&server(1)), is_ipv6)) {
            let service = format!("{}.{}", server(1), world.namespace);
            self.checks.push(Check {
                test: "DNS",
                asker: Asker::Pod(CLIENT),
                to: service.clone(),
                place: None,
                protocol: "UDP",
                is_ipv6,
                probe: Probe::Dns { service, is_ipv6, seconds: SECONDS },
                expected: Expected::Answer(vec![ip.to_string()]),
            });
        }
    }

    /// What policies are to deny later has to work without them.
    fn before_policies(&mut self, world: &World, is_ipv6: bool) {
        let last = world.places.len();
        for number in 1..=last {
            let (asker, to) = (Asker::Pod(STRANGER), guarded(number));
            self.checks.extend(world.to_pod("before policies", asker, &to, number, Transport::Tcp, is_ipv6));
        }
        let to = if last > 1 { server(last) } else { guarded(1) };
        let asker = Asker::Pod(CONFINED);
        self.checks.extend(world.to_pod("before policies", asker, &to, last, Transport::Tcp, is_ipv6));
    }

    fn skip(&mut self, test: &'static str, to: &str, reason: &str) {
        self.skipped.push(Row::skipped(test, "", to, reason));
    }
}

impl World {
    /// The families that pods have; what they lack is said.
    fn families(&self, skipped: &mut Vec<Row>) -> Vec<bool> {
        let client = self.pods.get(CLIENT);
        let (has, lacks): (Vec<bool>, Vec<bool>) =
            [false, true].into_iter().partition(|is_ipv6| pick(client, *is_ipv6).is_some());
        for is_ipv6 in lacks {
            skipped.push(Row::skipped(
                "all",
                family(is_ipv6),
                "",
                "pods of this cluster have no address of this family",
            ));
        }
        has
    }

    fn to_pod(
        &self,
        test: &'static str,
        asker: Asker,
        pod: &str,
        number: usize,
        transport: Transport,
        is_ipv6: bool,
    ) -> Option<Check> {
        let ip = pick(self.pods.get(pod), is_ipv6)?;
        Some(echo(test, asker, pod.to_owned(), Some(number), transport, SocketAddr::new(ip, PORT), pod))
    }
}

fn echo(
    test: &'static str,
    asker: Asker,
    to: String,
    place: Option<usize>,
    transport: Transport,
    target: SocketAddr,
    name: &str,
) -> Check {
    let (protocol, probe) = match transport {
        Transport::Tcp => ("TCP", Probe::TcpEcho { target, seconds: SECONDS }),
        Transport::Udp => ("UDP", Probe::UdpEcho { target, seconds: SECONDS }),
    };
    let expected = Expected::Answer(vec![name.to_owned()]);
    Check { test, asker, to, place, protocol, is_ipv6: target.is_ipv6(), probe, expected }
}

fn connect(test: &'static str, to: String, place: Option<usize>, target: SocketAddr, probe: Probe) -> Check {
    Check {
        test,
        asker: Asker::Pod(CLIENT),
        to,
        place,
        protocol: "TCP",
        is_ipv6: target.is_ipv6(),
        probe,
        expected: Expected::Answer(Vec::new()),
    }
}

fn pick(addresses: Option<&Vec<IpAddr>>, is_ipv6: bool) -> Option<IpAddr> {
    addresses?.iter().copied().find(|address| address.is_ipv6() == is_ipv6)
}

fn family(is_ipv6: bool) -> &'static str {
    if is_ipv6 { "IPv6" } else { "IPv4" }
}

impl Row {
    fn skipped(test: &str, family: &str, to: &str, reason: &str) -> Self {
        Self {
            test: test.to_owned(),
            family: family.to_owned(),
            to: to.to_owned(),
            reason: reason.to_owned(),
            ..Self::new(Verdict::Skipped)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn world(nodes: usize, addresses: &[&str]) -> World {
        let ip = |prefix: &&str, number: usize| format!("{prefix}{number}").parse().expect("an address");
        let ips = |number: usize| addresses.iter().map(|prefix| ip(prefix, number)).collect::<Vec<_>>();
        let places = (1..=nodes).map(|number| Place {
            node: format!("node-{number}"),
            addresses: ips(number),
            kubelet_port: 10250,
        });
        let names = [CLIENT, STRANGER, CONFINED].map(str::to_owned).into_iter();
        let names = names.chain((1..=nodes).flat_map(|number| [server(number), guarded(number)]));
        World {
            namespace: "test".to_owned(),
            places: places.collect(),
            pods: names.enumerate().map(|(index, name)| (name, ips(index + 10))).collect(),
            services: (1..=nodes).map(|number| (server(number), ips(number + 50))).collect(),
            kubernetes: ips(99).into_iter().map(|ip| SocketAddr::new(ip, 443)).collect(),
            ..World::default()
        }
    }

    #[test]
    fn two_nodes_and_both_families_leave_out_the_world_only() {
        let plan = open(&world(2, &["10.0.0.", "fd00::"]));
        let skipped: Vec<_> = plan.skipped.iter().map(|row| row.test.as_str()).collect();
        assert_eq!(skipped, ["outside"]);
        let count = |test: &str, is_ipv6| {
            plan.checks.iter().filter(|check| check.test == test && check.is_ipv6 == is_ipv6).count()
        };
        for is_ipv6 in [false, true] {
            for (test, checks) in [
                ("pod to pod", 4),
                ("node to pod", 4),
                ("pod to service", 4),
                ("node to service", 4),
                ("pod to node", 2),
                ("pod to API server", 1),
                ("DNS", 1),
                ("before policies", 3),
            ] {
                assert_eq!(count(test, is_ipv6), checks, "{test}");
            }
        }
    }

    #[test]
    fn one_node_and_one_family_say_what_they_leave_out() {
        let mut world = world(1, &["10.0.0."]);
        world.no_dns = Some("no DNS here".to_owned());
        let plan = open(&world);
        assert!(plan.checks.iter().all(|check| !check.is_ipv6 && check.place.unwrap_or(1) == 1));
        let reasons: Vec<_> = plan.skipped.iter().map(|row| row.reason.as_str()).collect();
        assert!(reasons.contains(&"pods of this cluster have no address of this family"), "{reasons:?}");
        assert!(reasons.contains(&"no second node was found that can run pods"), "{reasons:?}");
        assert!(reasons.contains(&"no DNS here"), "{reasons:?}");
    }

    #[test]
    fn what_is_to_be_denied_works_before() {
        for nodes in [1, 2, 3] {
            let world = world(nodes, &["10.0.0.", "fd00::"]);
            let before = open(&world).checks;
            let denied: Vec<Check> = closed(&world)
                .checks
                .into_iter()
                .filter(|check| check.expected == Expected::Denied)
                .collect();
            assert_eq!(denied.len(), 2 * (2 * nodes + 1));
            for check in denied.iter().filter(|check| check.protocol == "TCP") {
                let same = |other: &&Check| other.asker == check.asker && other.target() == check.target();
                assert!(before.iter().any(|other| same(&other)), "{check:?}");
            }
        }
    }
}
