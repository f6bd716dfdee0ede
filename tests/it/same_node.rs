//! Pods of one node: with one another, with their node, and with the world outside.

use std::net::SocketAddr;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::lab::{
    Lab, Node, OUTSIDE, Outcome, PATIENCE, Server, Setup, Via, ping, probe_udp, socket_address, wait_for,
};
use crate::require::require_lab;
use crate::verdicts::{Expected, Row, expect_all, expect_full_mesh};

#[test]
fn pods_of_a_node_reach_one_another_and_are_seen_as_themselves() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup::default())?;
    let (a, b) = (lab.pod(1, "shop/a").create()?, lab.pod(1, "shop/b").create()?);
    expect_full_mesh(&[&a, &b])?;
    for via in [Via::Tcp, Via::Udp] {
        for is_ipv4 in [true, false] {
            let outcome = a.probe(via, SocketAddr::new(b.address(is_ipv4), 80));
            assert_eq!(outcome.seen_as(), Some(a.address(is_ipv4)), "{outcome}");
        }
    }
    let closed = SocketAddr::new(b.address(true), 4444);
    assert_eq!(a.probe(Via::Tcp, closed), Outcome::Refused, "a closed port of a pod is refused by the pod");
    assert_eq!(a.probe(Via::Udp, closed), Outcome::Refused, "ICMP errors find their way back");
    Ok(())
}

#[test]
fn pods_and_their_node_reach_each_other() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup::default())?;
    let pod = lab.pod(1, "shop/a").create()?;
    let node = lab.node(1);
    let server = Server::start(node.space(), "node1", node.addresses(), &[8080])?;
    let mut rows = Vec::new();
    for via in [Via::Tcp, Via::Udp, Via::Ping] {
        for (node_address, pod_address) in node.addresses().iter().zip(pod.addresses()) {
            rows.push(Row::new(&pod, via, SocketAddr::new(*node_address, 8080), Expected::Answered));
            let target = SocketAddr::new(*pod_address, 8080);
            rows.push(Row::from_space(node.space(), "node1", via, target, Expected::Answered));
        }
    }
    expect_all(&rows)?;
    drop(server);
    Ok(())
}

#[test]
fn traffic_that_leaves_the_cluster_is_masqueraded() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup::default())?;
    let pod = lab.pod(1, "shop/a").create()?;
    let node = lab.node(1).addresses();
    let mut rows = Vec::new();
    for target in OUTSIDE {
        for via in [Via::Tcp, Via::Udp, Via::Ping] {
            rows.push(Row::new(&pod, via, socket_address(target, 80), Expected::Answered));
        }
    }
    expect_all(&rows)?;
    for target in OUTSIDE {
        let target = socket_address(target, 80);
        let outcome = pod.probe(Via::Tcp, target);
        assert_eq!(outcome.seen_as(), Some(node[usize::from(target.is_ipv6())]), "{outcome}");
    }
    let closed = pod.probe(Via::Udp, socket_address(OUTSIDE[0], 4444));
    assert_eq!(closed, Outcome::Refused, "an ICMP error about a masqueraded packet is translated back");
    Ok(())
}

/// What a firewall of the node calls invalid is what its connection tracking saw one direction of.
#[test]
fn traffic_that_leaves_the_cluster_passes_the_nodes_stack_in_neither_direction() -> Result<()> {
    require_lab!();
    for routing in ["tunnel", "native"] {
        let lab = Lab::start(Setup { routing: routing.to_owned(), ..Setup::default() })?;
        let pod = lab.pod(1, "shop/client").create()?;
        let before = forwarded(lab.node(1))?;
        for address in OUTSIDE {
            for via in [Via::Tcp, Via::Udp, Via::Ping] {
                let outcome = pod.probe(via, socket_address(address, 80));
                ensure!(outcome.is_answered(), "{routing} {via:?} {address}: {outcome}");
            }
        }
        let after = forwarded(lab.node(1))?;
        ensure!(before == after, "{routing}: the stack forwarded {before:?} packets before, {after:?} after");
        // But where the node has IPsec policies, only its stack applies them.
        let policy = "src 198.51.100.0/25 dst 198.51.100.128/25 dir out action block";
        lab.node(1).space().ip(&format!("xfrm policy add {policy}"))?;
        let _other = lab.pod(1, "shop/other").create()?;
        for address in &OUTSIDE[..2] {
            let outcome = pod.probe(Via::Tcp, socket_address(address, 80));
            ensure!(outcome.is_answered(), "{routing} {address}: {outcome}");
        }
        let by_stack = forwarded(lab.node(1))?;
        ensure!(by_stack[0] > after[0] && by_stack[1] > after[1], "{routing}: {after:?}, then {by_stack:?}");
    }
    Ok(())
}

/// Where clouds have their metadata services, and nodes the rules of who guards them.
#[test]
fn traffic_with_link_local_addresses_passes_the_nodes_stack_in_both_directions() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup::default())?;
    let metadata: SocketAddr = "169.254.169.254:80".parse()?;
    lab.outside().ip("address add 169.254.169.254/32 dev lo")?;
    let _server = Server::start(lab.outside(), "metadata", &[metadata.ip()], &[metadata.port()])?;
    let pod = lab.pod(1, "shop/client").create()?;
    let [before, _] = forwarded(lab.node(1))?;
    for via in [Via::Tcp, Via::Udp, Via::Ping] {
        let outcome = pod.probe(via, metadata);
        ensure!(outcome.is_answered(), "{via:?}: {outcome}");
        let seen = outcome.seen_as();
        ensure!(via == Via::Ping || seen == Some(lab.node(1).addresses()[0]), "{via:?}: {outcome}");
    }
    let [after, _] = forwarded(lab.node(1))?;
    // A datagram and an echo with their answers, and a TCP connection.
    ensure!(after >= before + 4 + 6, "the stack forwarded {before} packets before, {after} after");
    Ok(())
}

/// Packets that the node's stack has forwarded, by family.
fn forwarded(node: &Node) -> Result<[u64; 2]> {
    let read = |file: &str| {
        let mut command = Command::new("cat");
        command.arg(format!("/proc/thread-self/net/{file}"));
        node.space().command(command, "")
    };
    let ipv4 = read("snmp")?;
    let mut rows = ipv4.lines().filter(|line| line.starts_with("Ip: ")).map(str::split_whitespace);
    let names = rows.next().context("no names")?;
    let count = names.zip(rows.next().context("no counts")?).find(|(name, _)| *name == "ForwDatagrams");
    let ipv6 = read("snmp6")?;
    let count6 = ipv6.lines().find_map(|line| line.strip_prefix("Ip6OutForwDatagrams"));
    Ok([count.context("no IPv4 count")?.1.parse()?, count6.context("no IPv6 count")?.trim().parse()?])
}

#[test]
fn large_packets_and_fragments_arrive_whole() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup::default())?;
    let (a, b) = (lab.pod(1, "shop/a").create()?, lab.pod(1, "shop/b").create()?);
    for address in b.addresses().to_vec() {
        let outcome = a.space().run(move || probe_udp(SocketAddr::new(address, 80), &[b'f'; 4000]))?;
        assert!(outcome.is_answered(), "UDP {address}: {outcome}");
        let outcome = a.space().run(move || ping(address, 3000))?;
        assert!(outcome.is_answered(), "ping {address}: {outcome}");
    }
    Ok(())
}

#[test]
fn a_pod_cannot_send_from_an_address_that_is_not_its_own() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup::default())?;
    let (a, b) = (lab.pod(1, "shop/a").create()?, lab.pod(1, "shop/b").create()?);
    expect_full_mesh(&[&a, &b])?;
    let drops = || lab.node(1).metric("weir_dropped_packets_total", &["INVALID_SOURCE_IP"]);
    let before = drops()?;
    a.space()
        .configure(&["addr add 10.1.1.250/32 dev eth0", "addr add fd00:1:0:1::250/128 dev eth0 nodad"])?;
    for (own, target) in [("10.1.1.250", b.address(true)), ("fd00:1:0:1::250", b.address(false))] {
        let from = socket_address(own, 0);
        let answer = a.space().run(move || {
            let socket = std::net::UdpSocket::bind(from)?;
            socket.set_read_timeout(Some(PATIENCE))?;
            socket.send_to(b"spoofed", (target, 80))?;
            socket.recv_from(&mut [0; 64])
        });
        assert!(answer.is_err(), "{own} was answered");
    }
    wait_for("two drops for the source address", || Ok(drops()? >= before + 2.0))
}

#[test]
fn a_pod_has_its_addresses_at_once_and_its_route_through_the_gateway() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup::default())?;
    let pod = lab.pod(1, "shop/a").create()?;
    let addresses: serde_json::Value = serde_json::from_str(&pod.space().ip("-j addr show dev eth0")?)?;
    let rows = addresses[0]["addr_info"].as_array().context("addr_info")?;
    for (address, length) in [(pod.address(true), 32), (pod.address(false), 128)] {
        let row =
            rows.iter().find(|row| row["local"] == address.to_string()).context("the pod's own address")?;
        assert_eq!(row["prefixlen"], length);
        assert!(row["tentative"].is_null(), "duplicate-address detection delays {address}");
    }
    assert!(pod.space().ip("-4 route show default")?.contains("via 169.254.1.1"));
    assert!(pod.space().ip("-6 route show default")?.contains("via fe80::1"));
    pod.check(lab.node(1))?;
    Ok(())
}

#[test]
fn delete_may_be_repeated_and_gives_everything_back() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup::default())?;
    let links = || lab.node(1).space().ip("-o link show");
    let before = links()?.lines().count();
    let pod = lab.pod(1, "shop/a").create()?;
    ensure!(links()?.lines().count() == before + 1, "one device a pod");
    pod.delete(lab.node(1))?;
    pod.delete(lab.node(1))?;
    assert_eq!(links()?.lines().count(), before);
    assert!(
        pod.space().command(Command::new("ip"), "").is_err() || pod.space().ip("link show eth0").is_err()
    );
    Ok(())
}
