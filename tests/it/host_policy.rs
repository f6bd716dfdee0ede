//! Policies of the host: who reaches the node's own ports, what stays open, and one that is suspended.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::lab::{Backend, Lab, OUTSIDE, Pod, Server, ServicePort, Setup, Space, Traffic, Via, wait_for};
use crate::require::require_lab;
use crate::verdicts::{Expected, Row, expect_all};

/// Where the API server is: in the slices of its Service.
fn api_server(lab: &Lab, addresses: &[IpAddr], port: u16) -> Result<()> {
    let ports = [ServicePort::from(("https", "TCP", 443, port))];
    let backend = Backend { addresses: addresses.to_vec(), is_ready: true, node: "node1".to_owned() };
    lab.manifests().slices(("default", "kubernetes"), &ports, &[backend])
}

/// A policy of node1 alone.
fn policy(lab: &Lab, rules: &str) -> Result<()> {
    lab.manifests().write(&object(rules)?)
}

fn object(rules: &str) -> Result<serde_json::Value> {
    let mut spec: serde_json::Value = weir::yaml::read(rules)?;
    spec["nodeSelector"] = json!({"matchLabels": {"kubernetes.io/hostname": "node1"}});
    Ok(json!({
        "apiVersion": "cilium.io/v2", "kind": "CiliumClusterwideNetworkPolicy",
        "metadata": {"name": "host"}, "spec": spec,
    }))
}

struct World {
    near: Pod,
    lab: Lab,
    _servers: [Server; 2],
}

impl World {
    fn start(routing: &str) -> Result<Self> {
        let lab = Lab::start(Setup { nodes: 2, routing: routing.to_owned(), ..Setup::default() })?;
        let servers = [
            // Of each address by itself: an answer must come from the address that was asked.
            Server::start(lab.node(1).space(), "node1", lab.node(1).addresses(), &[22, 23, 6443])?,
            Server::start(lab.node(2).space(), "node2", lab.node(2).addresses(), &[22])?,
        ];
        let near = lab.pod(1, "shop/near").label("app", "near").create()?;
        api_server(&lab, lab.node(1).addresses(), 6443)?;
        Ok(Self { near, lab, _servers: servers })
    }

    fn space(&self, name: &str) -> &Space {
        match name {
            "near" => self.near.space(),
            "node1" => self.lab.node(1).space(),
            "node2" => self.lab.node(2).space(),
            _ => self.lab.outside(),
        }
    }

    fn addresses(&self, name: &str) -> Result<Vec<IpAddr>> {
        Ok(match name {
            "near" => self.near.addresses().to_vec(),
            "node1" => self.lab.node(1).addresses().to_vec(),
            "node2" => self.lab.node(2).addresses().to_vec(),
            _ => vec![OUTSIDE[0].parse()?, OUTSIDE[1].parse()?],
        })
    }

    /// Probes as `outside > node1:22/tcp`, in both families.
    fn expect(&self, answered: &[&str], denied: &[&str]) -> Result<()> {
        let mut rows = Vec::new();
        let all = answered.iter().map(|it| (it, Expected::Answered));
        for (probe, expected) in all.chain(denied.iter().map(|it| (it, Expected::Denied))) {
            let (from, rest) = probe.split_once(" > ").context("a probe")?;
            let (to, via) = rest.rsplit_once('/').context("a protocol")?;
            let (to, port) = to.split_once(':').unwrap_or((to, "0"));
            let via = match via {
                "tcp" => Via::Tcp,
                "udp" => Via::Udp,
                _ => Via::Ping,
            };
            for address in self.addresses(to)? {
                let target = SocketAddr::new(address, port.parse()?);
                rows.push(Row::from_space(self.space(from), from, via, target, expected).named(probe));
            }
        }
        expect_all(&rows)
    }
}

const EVERYTHING: [&str; 7] = [
    "outside > node1:22/tcp",
    "outside > node1:22/udp",
    "outside > node1/ping",
    "node2 > node1:22/tcp",
    "near > node1:23/tcp",
    "near > node1:23/udp",
    "node1 > outside:80/tcp",
];

fn ports_of_the_node(routing: &str) -> Result<()> {
    let world = World::start(routing)?;
    world.expect(&EVERYTHING, &[])?;
    let session = SocketAddr::new(world.lab.node(1).addresses()[0], 22);
    let session = Traffic::tcp(world.lab.outside(), session);
    session.wait_for_answers(10)?;
    policy(
        &world.lab,
        "{ingress: [{fromEntities: [remote-node], toPorts: [{ports: [{port: '23', protocol: TCP}]}]}, \
          {fromEndpoints: [{matchLabels: {app: near}}], toPorts: [{ports: [{port: '22'}]}]}, \
          {fromEntities: [remote-node], icmps: [{fields: [{type: 8}, {type: 128, family: IPv6}]}]}]}",
    )?;
    world.expect(
        &[
            "node2 > node1:23/tcp",
            "node2 > node1/ping",
            "near > node1:22/tcp",
            "near > node1:22/udp",
            // The API server of this node, whoever asks.
            "outside > node1:6443/tcp",
            // kubelet's probes; what the node asks, and its answers.
            "node1 > near:80/tcp",
            "node1 > near:80/udp",
            "node1 > outside:80/tcp",
            "node1 > outside:80/udp",
            "node1 > outside/ping",
            // Pods and other nodes have no part in it.
            "outside > near:80/tcp",
            "near > outside:80/udp",
            "outside > node2:22/tcp",
        ],
        &[
            "outside > node1:22/tcp",
            "outside > node1:22/udp",
            "outside > node1:6443/udp",
            "outside > node1/ping",
            "node2 > node1:22/tcp",
            "node2 > node1:23/udp",
            "near > node1:23/tcp",
            "near > node1/ping",
        ],
    )?;
    session.wait_for_answers(20)?;
    policy(&world.lab, "{egress: [{toEntities: [cluster]}]}")?;
    world.expect(
        &[
            "node1 > node2:22/tcp",
            "node1 > node2:22/udp",
            "node1 > near:80/tcp",
            "outside > node1:22/tcp",
            "outside > node1:22/udp",
            "outside > node1/ping",
        ],
        &["node1 > outside:80/tcp", "node1 > outside:80/udp", "node1 > outside/ping"],
    )?;
    session.wait_for_answers(20)?;
    world.lab.manifests().remove(&object("{}")?)?;
    world.expect(&EVERYTHING, &[])?;
    session.stop().map(drop)
}

#[test]
fn bypass_6_ports_of_the_node_are_closed_by_policy_and_what_must_stay_open_does() -> Result<()> {
    require_lab!();
    ports_of_the_node("tunnel")
}

#[test]
fn with_native_routing_ports_of_the_node_are_closed_by_policy() -> Result<()> {
    require_lab!();
    ports_of_the_node("native")
}

/// Whether a socket of node1 hears what somebody sends to an address that is no device's.
fn is_heard(from: &Space, socket: &UdpSocket, target: SocketAddr) -> Result<bool> {
    let word = target.to_string();
    let sent = word.clone();
    from.run(move || -> Result<()> {
        let any: IpAddr = if target.is_ipv4() { [0; 4].into() } else { [0_u16; 8].into() };
        let sender = UdpSocket::bind((any, 0))?;
        sender.set_broadcast(true)?;
        // Who may not is told so by some kernels.
        let _ = sender.send_to(sent.as_bytes(), target);
        Ok(())
    })?;
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    let mut heard = [0; 64];
    while let Ok((length, _)) = socket.recv_from(&mut heard) {
        if heard[..length] == *word.as_bytes() {
            return Ok(true);
        }
    }
    Ok(false)
}

#[test]
fn a_pod_does_not_get_past_the_policy_by_an_address_that_the_node_shares() -> Result<()> {
    require_lab!();
    let world = World::start("tunnel")?;
    let node = world.lab.node(1).space();
    // Everyone's of the wire's subnet, its routers', and one that a route alone makes the node's.
    node.configure(&["route add local 10.77.0.0/16 dev lo"])?;
    let shared = ["10.200.0.255", "10.77.0.1", "fd00:200::"];
    let sockets = [
        node.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 9053)))?,
        node.run(|| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 9054)))?,
    ];
    let heard = |address: &str| -> Result<bool> {
        let target: IpAddr = address.parse()?;
        let (socket, port) = if target.is_ipv4() { (&sockets[0], 9053) } else { (&sockets[1], 9054) };
        is_heard(world.near.space(), socket, SocketAddr::new(target, port))
    };
    // A frame for node1 alone.
    let node1 = world.lab.node(1).addresses()[0];
    world.lab.outside().configure(&[&format!("route add 10.77.0.0/16 via {node1}")])?;
    let from_outside = || {
        is_heard(world.lab.outside(), &sockets[0], SocketAddr::new(Ipv4Addr::new(10, 77, 0, 1).into(), 9053))
    };
    wait_for("the outside host to be heard without a policy", from_outside)?;
    for address in shared {
        wait_for(&format!("{address} to be heard without a policy"), || heard(address))?;
    }
    policy(&world.lab, "{ingress: [{fromEntities: [remote-node]}]}")?;
    for address in shared {
        wait_for(&format!("{address} to be denied"), || Ok(!heard(address)?))?;
        // It stays so.
        for _ in 0..3 {
            ensure!(!heard(address)?, "{address} was heard");
        }
    }
    ensure!(!from_outside()?, "the outside host was heard");
    policy(&world.lab, "{ingress: [{fromEndpoints: [{matchLabels: {app: near}}]}]}")?;
    for address in shared {
        wait_for(&format!("{address} to be allowed"), || heard(address))?;
    }
    Ok(())
}

#[test]
fn a_policy_under_which_the_api_server_is_not_reached_is_suspended_until_it_changes() -> Result<()> {
    require_lab!();
    let agent_arguments = vec!["--host-policy-confirm-seconds".to_owned(), "3".to_owned()];
    let lab = Lab::start(Setup { agent_arguments, ..Setup::default() })?;
    let node = lab.node(1);
    let _server = Server::start(node.space(), "node1", node.addresses(), &[22])?;
    let target = SocketAddr::new(node.addresses()[0], 22);
    let port_is =
        |expected| expect_all(&[Row::from_space(lab.outside(), "outside", Via::Tcp, target, expected)]);
    let is_suspended =
        || Ok(node.status()?.to_string().contains("CiliumClusterwideNetworkPolicy host suspended"));
    // Nobody answers there.
    api_server(&lab, &[OUTSIDE[2].parse()?], 6443)?;
    policy(&lab, "{ingress: [{}]}")?;
    port_is(Expected::Denied)?;
    wait_for("the suspension", is_suspended)?;
    port_is(Expected::Answered)?;
    assert!(node.log()?.contains("suspended the host's policies"));
    // The API server is back, the policy as it was.
    api_server(&lab, &[OUTSIDE[2].parse()?], 80)?;
    node.stop_agent()?;
    node.start_agent()?;
    node.wait_ready()?;
    wait_for("the suspension after a restart", is_suspended)?;
    port_is(Expected::Answered)?;
    policy(&lab, "{ingress: [{toPorts: [{ports: [{port: '23'}]}]}]}")?;
    port_is(Expected::Denied)?;
    wait_for("the end of the suspension", || Ok(!is_suspended()?))?;
    port_is(Expected::Denied)
}
