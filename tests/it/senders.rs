//! Who a packet is from, across real nodes: tunnel packets of a pod's own making, neighbour discovery
//! from elsewhere, what a node forwards for others, and what its NAT makes of packets.

use std::io::IoSliceMut;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, recvmsg, sendto, setsockopt,
    socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use serde_json::Value;

use crate::lab::{
    Lab, Node, OUTSIDE, Pod, Running, Server, Setup, Space, Via, probe, route_to_pods, wait_for,
};
use crate::packets::frame;
use crate::require::{require_lab, say_skipped};
use crate::verdicts::{Expected, Row, expect_all};

/// Where nobody of the lab listens but these tests.
const PORT: u16 = 7000;
/// Addresses of node 2 that no Node lists.
const VIRTUAL: [&str; 2] = ["10.200.0.250", "fd00:200::250"];

fn only_from_client(app: &str) -> String {
    format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: {app}, namespace: shop}}\n\
         spec: {{podSelector: {{matchLabels: {{app: {app}}}}}, \
         ingress: [{{from: [{{podSelector: {{matchLabels: {{app: client}}}}}}]}}]}}\n"
    )
}

fn drops(node: &Node, reason: &str) -> Result<usize> {
    let flows = node.flows(&["--verdict", "dropped"])?;
    Ok(flows.iter().filter(|flow| flow["drop_reason_desc"] == reason).count())
}

/// A datagram in a tunnel packet of number `vni`.
fn tunnel_packet(vni: u32, from: IpAddr, to: IpAddr) -> Vec<u8> {
    let inner = frame::udp((from, 5353), (to, PORT)).payload(b"forged").bytes();
    [&[8, 0, 0, 0][..], &(vni << 8).to_be_bytes(), &inner].concat()
}

#[test]
fn bypass_5_a_pod_makes_no_tunnel_packets_whatever_the_address() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup { nodes: 2, ..Setup::default() })?;
    let victim = lab.pod(2, "shop/victim").label("app", "victim").create()?;
    let client = lab.pod(1, "shop/client").label("app", "client").create()?;
    let evil = lab.pod(1, "shop/evil").create()?;
    lab.manifests().apply(&only_from_client("victim"))?;
    for address in VIRTUAL {
        let nodad = if address.contains(':') { " nodad" } else { "" };
        lab.node(2).space().ip(&format!("address add {address} dev eth0{nodad}"))?;
    }
    let web = |address: &IpAddr| SocketAddr::new(*address, 80);
    let rows = victim.addresses().iter().flat_map(|address| {
        [
            Row::new(&client, Via::Tcp, web(address), Expected::Answered),
            Row::new(&evil, Via::Tcp, web(address), Expected::Denied),
        ]
    });
    expect_all(&rows.collect::<Vec<_>>())?;

    let received = victim.space().run(|| UdpSocket::bind(("::", PORT)))?;
    received.set_read_timeout(Some(Duration::from_millis(100)))?;
    let virtual_addresses = VIRTUAL.map(|address| address.parse().expect("an address"));
    let nodes: Vec<IpAddr> = lab.node(2).addresses().iter().chain(&virtual_addresses).copied().collect();
    let mut packets = Vec::new();
    for (from, to) in client.addresses().iter().zip(victim.addresses()) {
        let nobody: IpAddr = if from.is_ipv4() { "203.0.113.99" } else { "2001:db8:ffff::99" }.parse()?;
        packets.extend(
            [(6, *from), (300, *from), (300, nobody)].map(|(vni, from)| tunnel_packet(vni, from, *to)),
        );
    }
    for node in nodes {
        let packets = packets.clone();
        evil.space().run(move || -> Result<()> {
            let any: IpAddr = if node.is_ipv4() { "0.0.0.0" } else { "::" }.parse()?;
            let socket = UdpSocket::bind((any, 0))?;
            packets.iter().try_for_each(|packet| Ok(socket.send_to(packet, (node, 8472)).map(drop)?))
        })?;
    }
    let mut datagram = [0; 2048];
    let got = received.recv_from(&mut datagram);
    ensure!(got.is_err(), "the victim received {got:?}");
    wait_for("the drops to be reported", || {
        Ok(drops(lab.node(1), "ENCAPSULATION_TRAFFIC_IS_PROHIBITED")? >= 4)
    })
}

/// What an ICMPv6 socket of the space gets in the next moments that holds `text`.
fn listen_icmpv6(space: &Space, text: &'static [u8]) -> Running<Result<Vec<Vec<u8>>>> {
    space.start(move || {
        let socket =
            socket(AddressFamily::Inet6, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::IcmpV6)?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::milliseconds(50))?;
        let deadline = Instant::now() + Duration::from_secs(2);
        let (mut found, mut received) = (Vec::new(), vec![0; 2048]);
        while Instant::now() < deadline {
            let mut parts = [IoSliceMut::new(&mut received)];
            let message = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, None, MsgFlags::empty());
            let Ok(length) = message.map(|message| message.bytes) else { continue };
            if received[..length].windows(text.len()).any(|window| window == text) {
                found.push(received[..length].to_vec());
            }
        }
        Ok(found)
    })
}

#[test]
fn bypass_4_neighbour_discovery_from_elsewhere_reaches_no_pod() -> Result<()> {
    require_lab!();
    const TEXT: &[u8] = b"what no policy has let in";
    for routing in ["tunnel", "native"] {
        let lab = Lab::start(Setup { nodes: 2, routing: routing.to_owned(), ..Setup::default() })?;
        let pod = lab.pod(1, "shop/victim").label("app", "victim").create()?;
        lab.manifests().apply(&only_from_client("victim"))?;
        let pod_address = pod.address(false);
        let web = SocketAddr::new(pod_address, 80);
        expect_all(&[
            Row::from_space(lab.outside(), "outside", Via::Tcp, web, Expected::Denied),
            // Its node finds it by neighbour discovery of its own.
            Row::from_space(lab.node(1).space(), "node1", Via::Tcp, web, Expected::Answered),
        ])?;
        // Straight, and through the other node.
        let own_way = lab.node(1).addresses()[1];
        for way in [lab.node(2).addresses()[1], own_way] {
            lab.outside().ip(&format!("route replace {pod_address} via {way}"))?;
            let heard = listen_icmpv6(pod.space(), TEXT);
            let deadline = Instant::now() + Duration::from_secs(1);
            while Instant::now() < deadline {
                for kind in (130..=137).chain([143]) {
                    lab.outside().run(move || send_icmpv6(pod_address, kind, TEXT))?;
                }
                std::thread::sleep(Duration::from_millis(100));
            }
            let heard = heard.wait()?;
            ensure!(heard.is_empty(), "{routing} by {way}: the pod received {heard:02x?}");
        }
        wait_for("the drops to be reported", || Ok(drops(lab.node(1), "FORBIDDEN_ICMPV6_MESSAGE")? >= 9))?;
    }
    Ok(())
}

fn send_icmpv6(to: IpAddr, kind: u8, text: &[u8]) -> Result<()> {
    let socket = socket(AddressFamily::Inet6, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::IcmpV6)?;
    setsockopt(&socket, sockopt::Ipv6Ttl, &255)?;
    let message = [&[kind, 0, 0, 0, 0, 0, 0, 0][..], &[0; 16], text].concat();
    let address = SockaddrStorage::from(SocketAddr::new(to, 0));
    sendto(socket.as_raw_fd(), &message, &address, MsgFlags::empty())?;
    Ok(())
}

#[test]
fn whom_a_node_forwards_for_is_the_world_and_is_answered() -> Result<()> {
    require_lab!();
    for routing in ["tunnel", "native"] {
        let lab = Lab::start(Setup { nodes: 2, routing: routing.to_owned(), ..Setup::default() })?;
        let pod = lab.pod(2, "shop/server").create()?;
        // By the node that the pod is not on.
        route_to_pods(lab.outside(), &crate::lab::pod_cidrs(2), lab.node(1).addresses())?;
        let mut rows = Vec::new();
        for via in [Via::Tcp, Via::Udp, Via::Ping] {
            for address in pod.addresses() {
                let target = SocketAddr::new(*address, 80);
                rows.push(Row::from_space(lab.outside(), "outside", via, target, Expected::Answered));
            }
        }
        expect_all(&rows)?;
        for source in &OUTSIDE[..2] {
            wait_for("the flow of the world", || {
                let flows = lab.node(2).flows(&["--to-pod", "shop/server"])?;
                let mut flows = flows.iter().filter(|flow| flow["IP"]["source"] == **source).peekable();
                let is_there = flows.peek().is_some();
                Ok(is_there && flows.all(|flow| flow["source"]["identity"].as_u64().unwrap_or(2) == 2))
            })
            .with_context(|| format!("{routing}: {source}"))?;
        }
    }
    Ok(())
}

/// Runs iptables or ip6tables on a node; false, after saying so, where the machine has none.
fn netfilter(node: &Node, address: &IpAddr, rule: &str) -> Result<bool> {
    let program = if address.is_ipv4() { "iptables" } else { "ip6tables" };
    let mut command = Command::new(program);
    command.arg("-w").args(rule.split(' '));
    match node.space().command(command, "") {
        Ok(_) => Ok(true),
        Err(error) => {
            say_skipped(&format!("needs {program} and its modules: {error:#}"));
            Ok(false)
        }
    }
}

fn translate(node: &Node, address: &IpAddr, rule: &str) -> Result<bool> {
    netfilter(node, address, &format!("-t nat {rule}"))
}

#[test]
fn bypass_6_the_nodes_rules_guard_the_servers_of_clouds() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup::default())?;
    let node = lab.node(1);
    let guarded: Vec<IpAddr> = ["168.63.129.16", "100.100.100.200", "fd00:ec2::254", "fd20:ce::254"]
        .iter()
        .map(|address| address.parse().expect("an address"))
        .collect();
    for address in &guarded {
        let nodad = if address.is_ipv6() { " nodad" } else { "" };
        lab.outside().ip(&format!("address add {address} dev lo{nodad}"))?;
    }
    let _server = Server::start(lab.outside(), "metadata", &guarded, &[8080])?;
    let pod = lab.pod(1, "shop/client").create()?;
    let rows = |expected| {
        let row = |address: &IpAddr| Row::new(&pod, Via::Tcp, SocketAddr::new(*address, 8080), expected);
        guarded.iter().map(row).collect::<Vec<_>>()
    };
    expect_all(&rows(Expected::Answered))?;
    ensure!(!node.weir(&["status"])?.contains("drop what is forwarded"), "there are no rules yet");
    for address in &guarded {
        if !netfilter(node, address, &format!("-A FORWARD -d {address} -j DROP"))? {
            return Ok(());
        }
    }
    expect_all(&rows(Expected::Denied))?;
    let status = node.weir(&["status"])?;
    ensure!(status.contains("4 rules and policies drop what is forwarded"), "{status}");
    Ok(())
}

/// What kube-proxy does for a NodePort: another destination, and the node as the source.
fn node_port(node: &Node, port: u16, pod: &Pod) -> Result<bool> {
    for own in node.addresses() {
        let backend = SocketAddr::new(pod.address(own.is_ipv4()), 80);
        for protocol in ["tcp", "udp"] {
            let rule = format!("-p {protocol} -d {own} --dport {port} -j DNAT --to-destination {backend}");
            if !translate(node, own, &format!("-A PREROUTING {rule}"))?
                || !translate(node, own, &format!("-A OUTPUT {rule}"))?
            {
                return Ok(false);
            }
        }
        if !translate(
            node,
            own,
            &format!("-A POSTROUTING -d {} -m conntrack --ctstate DNAT -j MASQUERADE", backend.ip()),
        )? {
            return Ok(false);
        }
    }
    Ok(true)
}

#[test]
fn the_nodes_own_node_ports_lead_to_local_and_remote_pods() -> Result<()> {
    require_lab!();
    for routing in ["tunnel", "native"] {
        let lab = Lab::start(Setup { nodes: 2, routing: routing.to_owned(), ..Setup::default() })?;
        let near = lab.pod(1, "shop/near").label("app", "near").create()?;
        let far = lab.pod(2, "shop/far").label("app", "far").create()?;
        let client = lab.pod(1, "shop/client").label("app", "client").create()?;
        if !node_port(lab.node(1), 30080, &near)? || !node_port(lab.node(1), 30081, &far)? {
            return Ok(());
        }
        let rows = |expected| {
            let clients =
                [(lab.outside(), "outside"), (lab.node(2).space(), "node2"), (client.space(), "client")];
            let mut rows = Vec::new();
            for (space, name) in clients {
                for address in lab.node(1).addresses() {
                    for (via, port) in
                        [(Via::Tcp, 30080), (Via::Udp, 30080), (Via::Tcp, 30081), (Via::Udp, 30081)]
                    {
                        let target = SocketAddr::new(*address, port);
                        rows.push(Row::from_space(
                            space,
                            &format!("{routing}: {name}"),
                            via,
                            target,
                            expected,
                        ));
                    }
                }
            }
            rows
        };
        expect_all(&rows(Expected::Answered))?;
        // Behind the node's address is the world, which no rule for pods lets in.
        lab.manifests().apply(&only_from_client("near"))?;
        lab.manifests().apply(&only_from_client("far"))?;
        expect_all(&rows(Expected::Denied))?;
        let target = SocketAddr::new(near.address(true), 80);
        let outcome = lab.node(1).space().run(move || probe(Via::Tcp, target));
        ensure!(outcome.is_answered(), "the node reaches its pod whatever the policy says: {outcome}");
    }
    Ok(())
}

#[test]
fn the_nodes_every_address_is_the_host() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup::default())?;
    let node = lab.node(1);
    for address in VIRTUAL {
        let nodad = if address.contains(':') { " nodad" } else { "" };
        node.space().ip(&format!("address add {address} dev eth0{nodad}"))?;
    }
    let own = VIRTUAL.map(|address| address.parse().expect("an address"));
    let _server = Server::start(node.space(), "node1", &own, &[8080])?;
    let pod = lab.pod(1, "shop/client").create()?;
    for (number, address) in own.into_iter().enumerate() {
        wait_for("a flow to the host", || {
            let outcome = pod.probe(Via::Tcp, SocketAddr::new(address, 8080));
            ensure!(outcome.answered_by() == Some("node1"), "{outcome}");
            let flows = node.flows(&["--from-pod", "shop/client"])?;
            let to = |flow: &&Value| flow["IP"]["destination"] == *VIRTUAL[number];
            Ok(flows.iter().rfind(to).is_some_and(|flow| flow["destination"]["identity"] == 1))
        })?;
    }
    Ok(())
}
