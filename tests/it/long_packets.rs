//! Ways that are narrower than the client's link: what passes a node between a client outside and a backend
//! elsewhere is too long for them, its sender hears so, and everything arrives.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};

use anyhow::{Context, Result, ensure};

use crate::lab::{OUTSIDE, Via, patience, probe_udp, wait_for};
use crate::node_ports::World;
use crate::require::require_lab;

const MTU: u32 = 1300;

/// Makes node1's way to an address narrow.
fn narrow(world: &World, to: IpAddr, via: Option<IpAddr>) -> Result<()> {
    let by = via.map_or_else(|| "dev eth0".to_owned(), |via| format!("via {via}"));
    world.lab.node(1).space().configure(&[&format!("route replace {to} {by} mtu lock {MTU}")])
}

/// Sends a server so much that several segments are merged, and gets all of it back.
fn exchange(target: SocketAddr) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&target, patience())?;
    stream.set_read_timeout(Some(patience()))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    reader.read_line(&mut String::new()).context("who answers")?;
    let sent: Vec<u8> = (0..15_000_u32).map(|number| number as u8).collect();
    for round in 0..3 {
        stream.write_all(&sent)?;
        let mut received = vec![0; sent.len()];
        reader.read_exact(&mut received).with_context(|| format!("round {round}"))?;
        ensure!(received == sent, "round {round} is not the echo");
    }
    Ok(())
}

/// Everything arrives, by both protocols and in both families.
fn all_arrives(world: &World) -> Result<()> {
    for (via, target) in world.node_ports(1) {
        if via == Via::Tcp {
            world.lab.outside().run(move || exchange(target)).with_context(|| target.to_string())?;
            continue;
        }
        // What was too long is lost; the next ones are cut where they are sent.
        wait_for(&format!("the echo of a long datagram from {target}"), || {
            let outcome = world.lab.outside().run(move || probe_udp(target, &[b'w'; 1420]));
            Ok(outcome.is_ok_and(|outcome| outcome.is_answered()))
        })?;
    }
    Ok(())
}

fn start(routing: &str) -> Result<World> {
    let world = World::start(routing)?;
    world.serve("Cluster", &[&world.far])?;
    wait_for("the service", || {
        let [(_, tcp), ..] = world.node_ports(1)[..] else { return Ok(false) };
        Ok(world.lab.outside().run(move || exchange(tcp)).is_ok())
    })?;
    Ok(world)
}

/// Why something was dropped: too long for its way.
fn dropped(world: &World) -> Result<f64> {
    let labels = ["reason=\"IP_FRAGMENTATION_NOT_SUPPORTED\""];
    world.lab.node(1).metric("weir_dropped_packets_total", &labels)
}

#[test]
fn a_way_to_the_backend_that_is_narrower_than_the_clients_link_is_told() -> Result<()> {
    require_lab!();
    let world = start("native")?;
    let nodes = world.lab.node(2).addresses();
    for (pod, node) in world.far.addresses().iter().zip(nodes) {
        narrow(&world, *pod, Some(*node))?;
    }
    all_arrives(&world)?;
    ensure!(dropped(&world)? > 0.0, "nothing was too long");
    Ok(())
}

#[test]
fn a_way_to_the_client_that_is_narrower_than_the_pods_link_is_told() -> Result<()> {
    require_lab!();
    for routing in ["native", "tunnel"] {
        let world = start(routing)?;
        for client in &OUTSIDE[..2] {
            narrow(&world, client.parse()?, None)?;
        }
        all_arrives(&world).with_context(|| routing.to_owned())?;
        ensure!(dropped(&world)? > 0.0, "{routing}: nothing was too long");
    }
    Ok(())
}
