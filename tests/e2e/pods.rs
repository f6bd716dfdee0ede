//! Pods among themselves, with their nodes and with the world.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::kubernetes::prober::{Outcome, Via};
use crate::world::{HOST_PORT, PATIENCE, PORT, Row, UDP_PORT, World, both, outside};

const HOST_PORTS: &str = include_str!("host_ports.yaml");

/// Of the same node and of others, both families, as themselves; and outside, as their node.
pub fn pods_reach_one_another(world: &mut World) -> Result<()> {
    let (clients, servers) = (world.clients()?, world.servers()?);
    ensure!(clients.len() == 3 && servers.len() == 3, "a client and a server on each node");
    let mut rows = Vec::new();
    for client in &clients {
        for server in &servers {
            rows.extend(both(client, Via::Http, server, PORT, true));
            rows.extend(both(client, Via::Udp, server, UDP_PORT, true));
        }
        for to in outside(PORT) {
            rows.push(Row { from: client.clone(), via: Via::Http, to, is_allowed: true });
        }
    }
    world.expect(&rows)?;
    let (client, server) = (&clients[0], &servers[1]);
    for is_ipv4 in [true, false] {
        let seen = seen_as(world, client, server.at(is_ipv4, PORT))?;
        ensure!(seen == client.at(is_ipv4, 0).ip(), "{} saw {seen} instead of {client:?}", server.name);
        let seen = seen_as(world, client, outside(PORT)[usize::from(!is_ipv4)])?;
        ensure!(world.cluster.node(1).addresses().contains(&seen), "the outside host saw {seen}");
    }
    Ok(())
}

fn seen_as(world: &World, from: &crate::world::Pod, to: std::net::SocketAddr) -> Result<std::net::IpAddr> {
    let outcome = world.probe(from, &[(Via::ClientAddress, to)])?.remove(0);
    let Outcome::Answered(address) = &outcome else { anyhow::bail!("{to} answered {outcome:?}") };
    Ok(address.parse::<std::net::SocketAddr>()?.ip().to_canonical())
}

/// Pods on the host's network reach pods and are reached.
pub fn pods_on_the_hosts_network(world: &mut World) -> Result<()> {
    let (clients, servers, hosts) = (world.clients()?, world.servers()?, world.hosts()?);
    let mut rows = Vec::new();
    for host in &hosts {
        for server in &servers {
            rows.extend(both(host, Via::Http, server, PORT, true));
        }
        for client in &clients {
            rows.extend(both(client, Via::Http, host, HOST_PORT, true));
        }
    }
    world.expect(&rows)
}

/// As Kubernetes' own conformance test has it: one host port of three pods of a node, which differ by the
/// node's address or by the protocol; each is reached from the node, from others and from outside.
pub fn host_ports_by_address_and_protocol(world: &mut World) -> Result<()> {
    let hosts = world.hosts()?;
    let host = &hosts[1];
    let address = host.at(true, 0).ip();
    let manifests = HOST_PORTS.replace("NODE", &host.node).replace("ADDRESS", &address.to_string());
    world.cluster.apply(&manifests)?;
    world.cluster.wait("three pods with host ports", PATIENCE, || {
        Ok(world.pods("e2e", "app=host-port").is_ok_and(|pods| pods.len() == 3))
    })?;
    let (loopback, outer) =
        (SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 54323), SocketAddr::new(address, 54323));
    let mut rows = vec![(host, Via::Http, loopback, "host-port-loopback")];
    let (clients, hosts) = (world.clients()?, world.hosts()?);
    for from in clients.iter().chain(&hosts) {
        rows.push((from, Via::Http, outer, "host-port-tcp"));
        rows.push((from, Via::Udp, outer, "host-port-udp"));
    }
    for (from, via, to, expected) in rows {
        let outcome = world.probe(from, &[(via, to)])?.remove(0);
        ensure!(
            outcome == Outcome::Answered(expected.to_owned()),
            "{} on {} to {to} by {via:?}: {outcome:?}, not {expected}",
            from.name,
            from.node
        );
    }
    let name = world.cluster.wire().outside().run(move || http_host_name(outer))?;
    ensure!(name == "host-port-tcp", "outside: {name}");
    world.cluster.kubectl(&["delete", "--filename", "-"], &manifests).map(drop)
}

/// What a server of `agnhost netexec` says to `GET /hostname`.
fn http_host_name(server: SocketAddr) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&server, Duration::from_secs(3))?;
    stream.set_read_timeout(Some(Duration::from_secs(3)))?;
    stream.write_all(b"GET /hostname HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.rsplit("\r\n").next().unwrap_or_default().trim().to_owned())
}
