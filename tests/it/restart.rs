//! The agent goes and comes back; pods do not notice.

use std::net::SocketAddr;

use anyhow::Result;

use crate::lab::{Lab, OUTSIDE, Pod, ServicePort, Setup, Traffic, Via, socket_address};
use crate::require::require_lab;
use crate::verdicts::{Expected, Row, expect_all, expect_full_mesh};

const DENY_SERVER: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny, namespace: shop}
spec: {podSelector: {matchLabels: {app: server}}, policyTypes: [Ingress]}
";

/// Streams and datagrams on every path: same node, across nodes, through a service, out of the cluster.
fn start_traffic(near: &Pod, far: &Pod, packets: &Pod) -> Vec<Traffic> {
    let service = socket_address("10.96.0.20", 80);
    let far_v4 = SocketAddr::new(far.address(true), 80);
    let far_v6 = SocketAddr::new(far.address(false), 80);
    vec![
        Traffic::tcp(near.space(), far_v4),
        Traffic::udp(near.space(), far_v6),
        Traffic::tcp(packets.space(), SocketAddr::new(near.address(false), 80)),
        Traffic::udp(packets.space(), SocketAddr::new(near.address(true), 80)),
        Traffic::tcp(packets.space(), service),
        Traffic::udp(near.space(), service),
        Traffic::tcp(near.space(), socket_address(OUTSIDE[2], 80)),
        Traffic::udp(packets.space(), socket_address(OUTSIDE[1], 80)),
    ]
}

#[test]
fn an_agent_killed_and_started_again_loses_no_packet() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup { nodes: 2, ..Setup::default() })?;
    let near = lab.pod(1, "shop/near").create()?;
    let far = lab.pod(2, "shop/far").create()?;
    let packets = lab.pod(1, "shop/packets").outside_cgroup().create()?;
    let ports = [("stream", "TCP", 80, 81), ("datagram", "UDP", 80, 81)].map(ServicePort::from);
    lab.service("shop/far", &["10.96.0.20"], &ports, &[&far])?;
    expect_full_mesh(&[&near, &far, &packets])?;
    let service = socket_address("10.96.0.20", 80);
    expect_all(&[
        Row::new(&near, Via::Udp, service, Expected::Answered),
        Row::new(&packets, Via::Tcp, service, Expected::Answered),
    ])?;
    let running = start_traffic(&near, &far, &packets);
    running.iter().try_for_each(|traffic| traffic.wait_for_answers(50))?;
    for _ in 0..3 {
        lab.node(1).kill_agent()?;
        running.iter().try_for_each(|traffic| traffic.wait_for_answers(50))?;
        lab.node(1).start_agent()?;
        lab.node(1).wait_ready()?;
        running.iter().try_for_each(|traffic| traffic.wait_for_answers(50))?;
    }
    running.into_iter().try_for_each(|traffic| traffic.stop()?.check_nothing_lost())
}

#[test]
fn a_policy_written_while_the_agent_is_away_is_in_force_when_it_is_ready() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup::default())?;
    let server = lab.pod(1, "shop/server").label("app", "server").create()?;
    let client = lab.pod(1, "shop/client").create()?;
    expect_full_mesh(&[&server, &client])?;
    let target = SocketAddr::new(server.address(true), 80);
    for _ in 0..3 {
        let running = Traffic::tcp(client.space(), target);
        running.wait_for_answers(50)?;
        lab.node(1).kill_agent()?;
        lab.manifests().apply(DENY_SERVER)?;
        running.wait_for_answers(50)?;
        lab.node(1).start_agent()?;
        lab.node(1).wait_ready()?;
        // At once: no poll, no second chance.
        let after = running.answered();
        let outcome = client.probe(Via::Tcp, target);
        assert!(!outcome.is_answered(), "{outcome}");
        assert!(running.answered() <= after + 1, "the running connection went on after the agent was ready");
        running.stop()?;
        lab.manifests().delete(DENY_SERVER)?;
        expect_all(&[Row::new(&client, Via::Tcp, target, Expected::Answered)])?;
    }
    Ok(())
}

#[test]
fn a_restarted_agent_gives_out_no_address_in_use() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup::default())?;
    let first = lab.pod(1, "shop/first").create()?;
    lab.node(1).kill_agent()?;
    lab.node(1).start_agent()?;
    lab.node(1).wait_ready()?;
    let second = lab.pod(1, "shop/second").create()?;
    assert!(first.addresses().iter().all(|address| !second.addresses().contains(address)));
    expect_full_mesh(&[&first, &second])
}

#[test]
fn without_an_agent_add_fails_at_once_and_delete_is_done_later() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup::default())?;
    let pod = lab.pod(1, "shop/a").create()?;
    let links = || lab.node(1).space().ip("-o link show");
    let with_pod = links()?.lines().count();
    lab.node(1).stop_agent()?;
    let Err(error) = lab.pod(1, "shop/b").create() else { panic!("ADD succeeded without an agent") };
    assert!(format!("{error:#}").contains("\"code\":11"), "{error:#}");
    pod.delete(lab.node(1))?;
    drop(pod);
    lab.node(1).start_agent()?;
    lab.node(1).wait_ready()?;
    crate::lab::wait_for("the queued DEL to be done", || {
        Ok(links()?.lines().count() == with_pod - 1 && lab.node(1).map("endpoints")?.is_empty())
    })
}
