//! Host ports: a port of the node that leads to its pod, for everybody who reaches the node.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::lab::{Lab, OUTSIDE, Pod, Setup, Space, Traffic, Via, probe, wait_for};
use crate::require::require_lab;
use crate::verdicts::{Expected, Row, expect_all};

const LOOPBACK: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

struct World {
    /// Has 8000/TCP and 8001/UDP of node 1.
    web: Pod,
    near: Pod,
    /// Its sockets are outside the node's cgroup.
    packets: Pod,
    far: Pod,
    lab: Lab,
}

impl World {
    fn start(routing: &str) -> Result<Self> {
        let lab = Lab::start(Setup { nodes: 2, routing: routing.to_owned(), ..Setup::default() })?;
        let web = lab
            .pod(1, "shop/web")
            .label("app", "web")
            .host_port("tcp", "", 8000, 80)
            .host_port("UDP", "", 8001, 81)
            .create()?;
        let near = lab.pod(1, "shop/near").label("app", "near").create()?;
        let packets = lab.pod(1, "shop/packets").outside_cgroup().create()?;
        let far = lab.pod(2, "shop/far").label("app", "far").create()?;
        Ok(Self { web, near, packets, far, lab })
    }

    /// Everybody who is not the node itself.
    fn clients(&self) -> [(&Space, &str); 5] {
        [
            (self.lab.outside(), "outside"),
            (self.near.space(), "near"),
            (self.packets.space(), "packets"),
            (self.far.space(), "far"),
            (self.lab.node(2).space(), "node2"),
        ]
    }

    fn targets(&self) -> impl Iterator<Item = (Via, SocketAddr)> {
        let addresses = self.lab.node(1).addresses().iter();
        addresses.flat_map(|address| {
            [(Via::Tcp, SocketAddr::new(*address, 8000)), (Via::Udp, SocketAddr::new(*address, 8001))]
        })
    }

    fn rows(&self, expected: Expected) -> Vec<Row<'_>> {
        let row = |(space, name)| {
            self.targets().map(move |(via, target)| Row::from_space(space, name, via, target, expected))
        };
        self.clients().into_iter().flat_map(row).collect()
    }
}

#[test]
fn everybody_who_reaches_the_node_reaches_the_pod() -> Result<()> {
    require_lab!();
    for routing in ["tunnel", "native"] {
        let world = World::start(routing)?;
        let node = world.lab.node(1);
        let mut rows = world.rows(Expected::Answered);
        let own = world.targets().map(|(via, target)| (via, target, Expected::Answered));
        let loopback = LOOPBACK.map(|address| (Via::Tcp, SocketAddr::new(address, 8000), Expected::Answered));
        for (via, target, expected) in own.chain(loopback) {
            rows.push(Row::from_space(node.space(), "node1", via, target, expected));
        }
        for address in node.addresses() {
            // A port that no pod has, and the protocol that it has not.
            for (via, port) in [(Via::Tcp, 8001), (Via::Udp, 8000), (Via::Tcp, 80)] {
                let target = SocketAddr::new(*address, port);
                rows.push(Row::from_space(world.lab.outside(), "outside", via, target, Expected::Refused));
            }
        }
        // A pod's loopback address is its own.
        for address in LOOPBACK {
            let target = SocketAddr::new(address, 8000);
            rows.push(Row::new(&world.near, Via::Tcp, target, Expected::Refused));
        }
        expect_all(&rows)?;
        for (via, target) in world.targets() {
            let space = world.lab.outside();
            let outcome = space.run(move || probe(via, target));
            ensure!(outcome.answered_by() == Some("web"), "{routing} {target}: {outcome}");
            let outside = OUTSIDE[usize::from(target.is_ipv6())].parse()?;
            ensure!(outcome.seen_as() == Some(outside), "{routing} {target}: {outcome}");
        }
    }
    Ok(())
}

#[test]
fn the_pods_policy_judges() -> Result<()> {
    require_lab!();
    let world = World::start("tunnel")?;
    expect_all(&world.rows(Expected::Answered))?;
    world.lab.manifests().apply(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n\
         metadata: {name: near-only, namespace: shop}\n\
         spec: {podSelector: {matchLabels: {app: web}}, ingress: [{from: [{podSelector: {matchLabels: {app: near}}}]}]}\n",
    )?;
    let mut rows = Vec::new();
    for (space, name) in world.clients() {
        let expected = if name == "near" { Expected::Answered } else { Expected::Denied };
        for (via, target) in world.targets() {
            rows.push(Row::from_space(space, name, via, target, expected));
        }
    }
    // The node reaches its pods whatever the policy says.
    for (via, target) in world.targets() {
        rows.push(Row::from_space(world.lab.node(1).space(), "node1", via, target, Expected::Answered));
    }
    expect_all(&rows)
}

#[test]
fn a_pod_of_another_node_is_judged_as_itself() -> Result<()> {
    require_lab!();
    let world = World::start("tunnel")?;
    let packets = world.lab.pod(2, "shop/far-packets").label("app", "far").outside_cgroup().create()?;
    let node2 = world.lab.node(2).space();
    let rows = |of_pods, of_node| {
        let row = |(via, target)| {
            [
                Row::new(&world.far, via, target, of_pods),
                Row::new(&packets, via, target, of_pods),
                Row::from_space(node2, "node2", via, target, of_node),
            ]
        };
        world.targets().flat_map(row).collect::<Vec<_>>()
    };
    expect_all(&rows(Expected::Answered, Expected::Answered))?;
    let policy = |from: &str| {
        format!(
            "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {{name: web, namespace: shop}}\n\
             spec: {{endpointSelector: {{matchLabels: {{app: web}}}}, ingress: [{from}]}}\n"
        )
    };
    world.lab.manifests().apply(&policy("{fromEndpoints: [{matchLabels: {app: far}}]}"))?;
    expect_all(&rows(Expected::Answered, Expected::Denied))?;
    world.lab.manifests().apply(&policy("{fromEntities: [remote-node]}"))?;
    expect_all(&rows(Expected::Denied, Expected::Answered))
}

#[test]
fn a_host_port_survives_a_restart_and_ends_with_its_pod() -> Result<()> {
    require_lab!();
    let world = World::start("tunnel")?;
    let node = world.lab.node(1);
    expect_all(&world.rows(Expected::Answered))?;
    let target = SocketAddr::new(node.addresses()[0], 8000);
    let stream = Traffic::tcp(world.lab.outside(), target);
    stream.wait_for_answers(50)?;
    node.kill_agent()?;
    node.start_agent()?;
    node.wait_ready()?;
    stream.wait_for_answers(50)?;
    stream.stop()?.check_nothing_lost()?;
    world.web.check(node)?;

    // Somebody who has it keeps it, and is named.
    let refused = world.lab.pod(1, "shop/greedy").host_port("tcp", "127.0.0.1", 8000, 80).create();
    let error = format!("{:#}", refused.err().unwrap_or_else(|| anyhow::anyhow!("connected")));
    ensure!(
        error.contains("another pod of this node has the host port") && error.contains("shop/web"),
        "{error}"
    );
    world.web.delete(node)?;
    wait_for("the port to be the node's again", || {
        let outcome = world.lab.outside().run(move || probe(Via::Tcp, target));
        Ok(outcome.is_refused())
    })?;
    let next = world.lab.pod(1, "shop/next").host_port("tcp", "127.0.0.1", 8000, 80).create()?;
    let loopback = SocketAddr::new(LOOPBACK[0], 8000);
    expect_all(&[
        Row::from_space(node.space(), "node1", Via::Tcp, loopback, Expected::Answered),
        Row::from_space(world.lab.outside(), "outside", Via::Tcp, target, Expected::Refused),
        Row::new(&world.near, Via::Tcp, target, Expected::Refused),
        Row::new(&next, Via::Tcp, SocketAddr::new(world.near.address(true), 80), Expected::Answered),
    ])
}

/// Addresses on the nodes' link that move between them.
const VIRTUAL: [&str; 2] = ["10.200.0.200/32", "fd00:200::200/128"];

#[test]
fn host_ports_follow_the_nodes_addresses() -> Result<()> {
    require_lab!();
    for routing in ["tunnel", "native"] {
        let world = World::start(routing)?;
        let (outside, node) = (world.lab.outside(), world.lab.node(1));
        let give = |number: usize, verb: &str| -> Result<()> {
            for address in VIRTUAL {
                let nodad = if address.contains(':') && verb == "add" { " nodad" } else { "" };
                world.lab.node(number).space().ip(&format!("address {verb} {address} dev eth0{nodad}"))?;
            }
            // Nobody announces the move here.
            outside.ip("neighbour flush dev eth0").or_else(|_| outside.ip("neighbour flush all"))?;
            Ok(())
        };
        let targets: Vec<(Via, SocketAddr)> = VIRTUAL
            .iter()
            .flat_map(|address| {
                let address: IpAddr =
                    address.split('/').next().unwrap_or_default().parse().expect("an address");
                [(Via::Tcp, SocketAddr::new(address, 8000)), (Via::Udp, SocketAddr::new(address, 8001))]
            })
            .collect();
        let wait_for_web = || {
            targets.iter().try_for_each(|(via, target)| {
                let (via, target) = (*via, *target);
                wait_for("the pod to answer at an address that came", || {
                    Ok(outside.run(move || probe(via, target)).answered_by() == Some("web"))
                })
            })
        };
        give(1, "add")?;
        wait_for_web()?;
        let mut rows = Vec::new();
        for (via, target) in &targets {
            for (space, name) in world.clients().into_iter().chain([(node.space(), "node1")]) {
                rows.push(Row::from_space(space, name, *via, *target, Expected::Answered));
            }
        }
        expect_all(&rows)?;
        let stream = Traffic::tcp(outside, targets[0].1);
        stream.wait_for_answers(50)?;
        node.kill_agent()?;
        node.start_agent()?;
        node.wait_ready()?;
        stream.wait_for_answers(50)?;
        stream.stop()?.check_nothing_lost()?;
        expect_all(&rows)?;

        give(1, "delete")?;
        give(2, "add")?;
        wait_for("the node that has the address now to refuse", || {
            Ok(targets.iter().all(|(via, target)| {
                let (via, target) = (*via, *target);
                outside.run(move || probe(via, target)).is_refused()
            }))
        })?;
        // What it was is not kept: the node itself asks the other one.
        expect_all(&[Row::from_space(node.space(), "node1", Via::Tcp, targets[0].1, Expected::Refused)])?;
        give(2, "delete")?;
        give(1, "add")?;
        wait_for_web()?;
    }
    Ok(())
}

#[test]
fn host_ports_that_cannot_be_served_are_refused() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup::default())?;
    let rows: [(&str, &str, u16, u16, &str); 5] = [
        ("sctp", "", 8000, 80, "TCP and UDP only"),
        ("icmp", "", 8000, 80, "protocol of portMappings"),
        ("tcp", "10.0.0.300", 8000, 80, "hostIP of portMappings"),
        ("tcp", "", 8000, 0, "is 0"),
        ("udp", "", 8472, 80, "tunnels use"),
    ];
    for (number, (protocol, host_ip, host_port, container_port, expected)) in rows.into_iter().enumerate() {
        let name = format!("shop/bad{number}");
        let pod = lab.pod(1, &name).host_port(protocol, host_ip, host_port, container_port).create();
        let error = pod.err().map(|error| format!("{error:#}")).unwrap_or_default();
        ensure!(error.contains(expected), "{protocol} {host_ip} {host_port} {container_port}: {error:?}");
    }
    let twice =
        lab.pod(1, "shop/twice").host_port("tcp", "", 8000, 80).host_port("tcp", "", 8000, 81).create();
    ensure!(twice.is_err(), "the same host port twice");
    // Port 0 of the node: none.
    lab.pod(1, "shop/none").host_port("tcp", "", 0, 80).create().map(drop)
}

#[test]
fn the_nodes_own_connections_from_a_host_port_are_answered() -> Result<()> {
    require_lab!();
    for routing in ["tunnel", "native"] {
        let world = World::start(routing)?;
        expect_all(&world.rows(Expected::Answered))?;
        for (number, address) in world.lab.node(1).addresses().iter().enumerate() {
            let outside = OUTSIDE[number].parse()?;
            let pairs = [
                (SocketAddr::new(*address, 8000), SocketAddr::new(outside, 80)),
                (SocketAddr::new(*address, 8001), SocketAddr::new(outside, 80)),
            ];
            let [tcp, udp] = pairs;
            let node = world.lab.node(1).space();
            node.run(move || ask_from(tcp.0, tcp.1))
                .with_context(|| format!("{routing}: TCP from {}", tcp.0))?;
            node.run(move || ask_by_datagram(udp.0, udp.1))
                .with_context(|| format!("{routing}: UDP from {}", udp.0))?;
        }
        // And the host ports are the pod's still.
        expect_all(&world.rows(Expected::Answered))?;
    }
    Ok(())
}

/// One line each way by TCP, with a source port that is a host port.
fn ask_from(source: SocketAddr, target: SocketAddr) -> Result<()> {
    let family = if source.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, SockType::Stream, SockFlag::empty(), None)?;
    setsockopt(&socket, sockopt::SendTimeout, &TimeVal::seconds(5))?;
    bind(socket.as_raw_fd(), &SockaddrStorage::from(source))?;
    connect(socket.as_raw_fd(), &SockaddrStorage::from(target))?;
    let mut stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(b"hello\n")?;
    ensure!(stream.read(&mut [0; 100])? > 0, "closed without an answer");
    Ok(())
}

fn ask_by_datagram(source: SocketAddr, target: SocketAddr) -> Result<()> {
    let socket = UdpSocket::bind(source)?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    socket.connect(target)?;
    socket.send(b"hello\n")?;
    socket.recv(&mut [0; 100])?;
    Ok(())
}
