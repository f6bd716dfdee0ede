//! Pods of two nodes, by VXLAN and by native routing.

use std::net::SocketAddr;

use anyhow::Result;

use crate::lab::{Lab, OUTSIDE, Outcome, Server, Setup, Traffic, Via, ping, probe_udp, socket_address};
use crate::require::require_lab;
use crate::verdicts::{Expected, Row, expect_all, expect_full_mesh};

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

fn nodes_reach_pods(lab: &Lab, a: &crate::lab::Pod, b: &crate::lab::Pod) -> Result<()> {
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
