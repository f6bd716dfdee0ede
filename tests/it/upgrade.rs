//! An agent of the former ABI version goes, and this one comes, while pods talk.

use std::net::SocketAddr;
use std::path::Path;

use anyhow::{Context, Result};

use crate::lab::{Lab, OUTSIDE, Pod, ServicePort, Setup, Traffic, Via, socket_address};
use crate::require::{require_lab, say_skipped};
use crate::verdicts::{Expected, Row, expect_all};

/// Clients let nobody in: without its row in `connections` no answer reaches them.
const DENY_CLIENTS: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny, namespace: shop}
spec: {podSelector: {matchLabels: {app: client}}, policyTypes: [Ingress]}
";

/// Where `scripts/previous` has put the agent of the former version.
fn previous() -> Option<&'static Path> {
    let directory = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/target/previous"));
    directory.join("commit").exists().then_some(directory)
}

/// Streams and datagrams to pods here and elsewhere, to a service, and to the world by masquerade.
fn start_traffic(client: &Pod, near: &Pod, far: &Pod) -> Vec<Traffic> {
    let target = |pod: &Pod, v4: bool| SocketAddr::new(pod.address(v4), 80);
    let tcp = |to: SocketAddr| Traffic::tcp(client.space(), to);
    let udp = |to: SocketAddr| Traffic::udp(client.space(), to);
    let service = socket_address("10.96.0.20", 80);
    let world = OUTSIDE.map(|address| socket_address(address, 80));
    vec![
        tcp(target(near, true)),
        udp(target(far, true)),
        tcp(target(far, false)),
        tcp(service),
        udp(service),
        tcp(world[0]),
        udp(world[2]),
        tcp(world[1]),
    ]
}

fn all_answer(running: &[Traffic], more: u64) -> Result<()> {
    // In the order of start_traffic, once a client.
    let mut each = running.iter().enumerate();
    each.try_for_each(|(number, traffic)| {
        traffic.wait_for_answers(more).with_context(|| format!("traffic {number}"))
    })
}

fn upgrade(routing: &str) -> Result<()> {
    let Some(previous) = previous() else {
        say_skipped("needs the agent of the former ABI version: make upgrade");
        return Ok(());
    };
    let lab = Lab::start(Setup {
        nodes: 2,
        routing: routing.to_owned(),
        starts_agents: false,
        ..Setup::default()
    })?;
    lab.node(1).use_programs(Some(previous));
    lab.start_agents()?;
    lab.manifests().apply(DENY_CLIENTS)?;
    let near = lab.pod(1, "shop/near").create()?;
    let far = lab.pod(2, "shop/far").create()?;
    let socket = lab.pod(1, "shop/socket").label("app", "client").create()?;
    let packets = lab.pod(1, "shop/packets").label("app", "client").outside_cgroup().create()?;
    let ports = [("stream", "TCP", 80, 81), ("datagram", "UDP", 80, 81)].map(ServicePort::from);
    lab.service("shop/both", &["10.96.0.20"], &ports, &[&near, &far])?;
    let service = socket_address("10.96.0.20", 80);
    let closed = |pod: &Pod| SocketAddr::new(pod.address(true), 80);
    expect_all(&[
        Row::new(&socket, Via::Udp, service, Expected::Answered),
        Row::new(&packets, Via::Tcp, service, Expected::Answered),
        Row::new(&near, Via::Tcp, closed(&packets), Expected::Denied),
    ])?;
    let mut running = start_traffic(&socket, &near, &far);
    running.extend(start_traffic(&packets, &near, &far));
    all_answer(&running, 50)?;
    let mapped = lab.node(1).map("nat")?.len();
    lab.node(1).stop_agent()?;
    all_answer(&running, 20)?;

    lab.node(1).use_programs(None);
    lab.node(1).start_agent()?;
    lab.node(1).wait_ready()?;
    all_answer(&running, 100)?;
    assert!(lab.node(1).map("nat")?.len() >= mapped, "mappings were carried over");
    let versions: Vec<_> = std::fs::read_dir(lab.node(1).directory().join("bpf/weir"))?
        .map(|entry| Ok(entry?.file_name()))
        .collect::<Result<_>>()?;
    assert_eq!(versions.len(), 1, "the pins of the former version are gone: {versions:?}");
    expect_all(&[
        Row::new(&near, Via::Tcp, closed(&packets), Expected::Denied),
        Row::new(&socket, Via::Udp, service, Expected::Answered),
    ])?;
    running.into_iter().try_for_each(|traffic| {
        let report = traffic.stop().context("traffic during the upgrade")?;
        report.check_nothing_lost()
    })
}

#[test]
fn an_upgrade_from_the_former_layout_loses_no_packet_by_tunnel() -> Result<()> {
    require_lab!();
    upgrade("tunnel")
}

#[test]
fn an_upgrade_from_the_former_layout_loses_no_packet_by_native_routing() -> Result<()> {
    require_lab!();
    upgrade("native")
}
