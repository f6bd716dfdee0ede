//! Pods of two nodes, by VXLAN and by native routing.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::lab::{Lab, OUTSIDE, Outcome, Server, Setup, Traffic, Via, ping, probe_udp, socket_address};
use crate::require::{require_lab, takes_ipv6_out_of_ipv4};
use crate::verdicts::{Expected, Row, expect_all, expect_full_mesh};

/// News from the kernel, well before the agent would look by itself.
const AT_ONCE: Duration = Duration::from_secs(2);

#[test]
fn pods_of_two_nodes_reach_one_another_by_vxlan() -> Result<()> {
    require_lab!();
    reach_across("tunnel")
}

#[test]
fn pods_of_two_nodes_reach_one_another_by_native_routing() -> Result<()> {
    require_lab!();
    reach_across("native")
}

#[test]
fn a_change_to_native_routing_removes_the_tunnel_device_and_back_makes_it() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup { nodes: 2, ..Setup::default() })?;
    let (a, b) = (lab.pod(1, "shop/a").create()?, lab.pod(2, "shop/b").create()?);
    expect_full_mesh(&[&a, &b])?;
    for (routing, has_tunnel) in [("native", false), ("tunnel", true)] {
        for node in lab.nodes() {
            node.stop_agent()?;
            node.start_agent_with(&["--routing", routing])?;
        }
        for node in lab.nodes() {
            node.wait_ready()?;
            let devices = node.space().ip("-brief link")?;
            assert_eq!(devices.contains("weir_vxlan"), has_tunnel, "{routing}: {devices}");
        }
        expect_full_mesh(&[&a, &b])?;
    }
    Ok(())
}

#[test]
fn a9_tunnel_packets_pass_by_the_device_and_an_ipsec_policy_ends_that_at_once() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup { nodes: 2, ..Setup::default() })?;
    let (a, b) = (lab.pod(1, "shop/a").create()?, lab.pod(2, "shop/b").create()?);
    let families = if takes_ipv6_out_of_ipv4() { &[true, false][..] } else { &[true] };
    let stream = |is_ipv4: &bool| Traffic::tcp(a.space(), SocketAddr::new(b.address(*is_ipv4), 80));
    let streams: Vec<Traffic> = families.iter().map(stream).collect();
    let expect_way = |is_direct: bool| -> Result<()> {
        let way = if is_direct { "direct" } else { "by weir_vxlan" };
        let asked = Instant::now();
        while !lab.node(1).weir(&["status"])?.contains(way) {
            ensure!(asked.elapsed() < AT_ONCE, "not {way} after {AT_ONCE:?}");
        }
        let before = device_packets(&lab)?;
        for stream in &streams {
            stream.wait_for_answers(200)?;
        }
        let [sent, received] = [0, 1].map(|end| device_packets(&lab).map(|now| now[end] - before[end]));
        let (sent, received) = (sent?, received?);
        // A first packet, or one after a lull, may go the other way.
        let is_as_expected = if is_direct { sent + received < 40 } else { sent >= 200 };
        ensure!(is_as_expected, "{way}, but the device sent {sent} packets and received {received}");
        Ok(())
    };
    expect_way(true)?;
    // A policy that concerns nobody here: who has IPsec decides in the kernel.
    let policy = "src 198.51.100.0/25 dst 198.51.100.128/25 dir out";
    lab.node(1).space().ip(&format!("xfrm policy add {policy} action block"))?;
    expect_way(false)?;
    lab.node(1).space().ip(&format!("xfrm policy delete {policy}"))?;
    expect_way(true)?;
    for node in lab.nodes() {
        node.stop_agent()?;
        node.start_agent_with(&["--tunnel-direct", "false"])?;
        node.wait_ready()?;
    }
    expect_way(false)?;
    for stream in streams {
        stream.stop()?.check_nothing_lost()?;
    }
    Ok(())
}

#[test]
fn a_pod_is_answered_by_a_node_that_has_not_heard_of_it() -> Result<()> {
    require_lab!();
    for routing in ["tunnel", "native"] {
        let lab = Lab::start(Setup { nodes: 2, routing: routing.to_owned(), ..Setup::default() })?;
        let (known, b) = (lab.pod(1, "shop/known").create()?, lab.pod(2, "shop/b").create()?);
        expect_full_mesh(&[&known, &b])?;
        lab.node(2).stop_agent()?;
        let a = lab.pod(1, "shop/a").create()?;
        let mut rows = Vec::new();
        for via in [Via::Tcp, Via::Udp, Via::Ping] {
            let to = |address: &_| Row::new(&a, via, SocketAddr::new(*address, 80), Expected::Answered);
            rows.extend(b.addresses().iter().map(to));
        }
        expect_all(&rows).with_context(|| routing.to_owned())?;
        lab.node(2).start_agent_with(&["--routing", routing])?;
        lab.node(2).wait_ready()?;
        expect_full_mesh(&[&a, &b])?;
    }
    Ok(())
}

/// Packets that the tunnel devices sent on node 1 and received on node 2.
fn device_packets(lab: &Lab) -> Result<[u64; 2]> {
    let count = |number: usize, way: &str| -> Result<u64> {
        let shown = lab.node(number).space().ip("-json -statistics link show weir_vxlan")?;
        let shown: serde_json::Value = serde_json::from_str(&shown)?;
        shown[0]["stats64"][way]["packets"].as_u64().context("no such counter")
    };
    Ok([count(1, "tx")?, count(2, "rx")?])
}

#[test]
fn much_data_arrives_whole_through_the_tunnel() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup { nodes: 2, ..Setup::default() })?;
    let (a, b) = (lab.pod(1, "shop/a").create()?, lab.pod(2, "shop/b").create()?);
    for address in b.addresses().to_vec() {
        let target = SocketAddr::new(address, 5000);
        let receive = b.space().run(move || std::net::TcpListener::bind(target))?;
        let received = b.space().start(move || -> Result<Vec<u8>> {
            let mut bytes = Vec::new();
            let (mut stream, _) = receive.accept()?;
            stream.read_to_end(&mut bytes)?;
            // The answer goes the other way, in parts of all sizes.
            for part in bytes.chunks(70_001) {
                stream.write_all(part)?;
            }
            Ok(bytes)
        });
        let sent: Vec<u8> =
            (0..20_000_000_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let expected = sent.clone();
        let answer = a.space().run(move || -> Result<Vec<u8>> {
            let mut stream = std::net::TcpStream::connect(target)?;
            stream.set_nodelay(true)?;
            for part in sent.chunks(33_333) {
                stream.write_all(part)?;
            }
            stream.shutdown(std::net::Shutdown::Write)?;
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer)?;
            Ok(answer)
        })?;
        ensure!(received.wait()? == expected, "{target} got something else");
        ensure!(answer == expected, "{target} answered something else");
    }
    Ok(())
}

fn reach_across(routing: &str) -> Result<()> {
    let lab = Lab::start(Setup { nodes: 2, routing: routing.to_owned(), ..Setup::default() })?;
    let (a, b) = (lab.pod(1, "shop/a").create()?, lab.pod(2, "shop/b").create()?);
    let c = lab.pod(2, "shop/c").create()?;
    expect_full_mesh(&[&a, &b, &c])?;
    for is_ipv4 in [true, false] {
        let outcome = a.probe(Via::Tcp, SocketAddr::new(b.address(is_ipv4), 80));
        assert_eq!(outcome.seen_as(), Some(a.address(is_ipv4)), "{outcome}");
    }
    nodes_reach_pods(&lab, &a, &b)?;
    large_packets(&a, &b)?;
    let closed = SocketAddr::new(b.address(true), 4444);
    assert_eq!(a.probe(Via::Udp, closed), Outcome::Refused, "ICMP errors cross nodes");
    let outside = b.probe(Via::Tcp, socket_address(OUTSIDE[0], 80));
    assert_eq!(outside.seen_as(), Some(lab.node(2).addresses()[0]), "{outside}");
    let stream = Traffic::tcp(a.space(), SocketAddr::new(b.address(false), 80));
    stream.wait_for_answers(200)?;
    stream.stop()?.check_nothing_lost()
}

/// Each reaches the other by every protocol: a node the other node's pod, and a pod the other node.
pub fn nodes_reach_pods(lab: &Lab, a: &crate::lab::Pod, b: &crate::lab::Pod) -> Result<()> {
    let _server = Server::start(lab.node(2).space(), "node2", lab.node(2).addresses(), &[8080])?;
    let mut rows = Vec::new();
    for via in [Via::Tcp, Via::Udp, Via::Ping] {
        for address in b.addresses() {
            let target = SocketAddr::new(*address, 80);
            rows.push(Row::from_space(lab.node(1).space(), "node1", via, target, Expected::Answered));
        }
        for address in lab.node(2).addresses() {
            rows.push(Row::new(a, via, SocketAddr::new(*address, 8080), Expected::Answered));
        }
    }
    expect_all(&rows)
}

fn large_packets(a: &crate::lab::Pod, b: &crate::lab::Pod) -> Result<()> {
    for address in b.addresses().to_vec() {
        let outcome = a.space().run(move || probe_udp(SocketAddr::new(address, 80), &[b'f'; 4000]))?;
        assert!(outcome.is_answered(), "UDP {address}: {outcome}");
        let outcome = a.space().run(move || ping(address, 3000))?;
        assert!(outcome.is_answered(), "ping {address}: {outcome}");
    }
    Ok(())
}
