//! Pods among themselves, with their nodes and with the world.

use anyhow::{Result, ensure};

use crate::kubernetes::prober::{Outcome, Via};
use crate::world::{HOST_PORT, PORT, Row, UDP_PORT, World, both, outside};

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
