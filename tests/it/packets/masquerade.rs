//! Ports of the node: whose they are, how they are found, when they are free again.

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};

use anyhow::{Context, Result, ensure};
use weir::datapath::abi::{Nat, NatKey};
use weir::datapath::{Settings, TypedMap};

use super::frame::{ACK, FIN, Packet, RST, SYN, echo, echo_reply, tcp, udp};
use super::network::ip;
use super::world::{Cast, EGRESS, INGRESS, PASS, REDIRECT, SHOT, World, in_both_families_with, settings};
use crate::require::require_lab;

const NO_MAPPING: u8 = 167;

fn with_ports(ports: std::ops::RangeInclusive<u16>) -> Settings {
    Settings { nat_ports: ports, ..settings() }
}

/// Every address of the test's namespace, of the cast's family.
fn everywhere(cast: &Cast, port: u16) -> SocketAddr {
    let any: IpAddr = if cast.node.is_ipv4() { [0, 0, 0, 0].into() } else { [0_u16; 8].into() };
    SocketAddr::new(any, port)
}

/// The source port, or identifier, that a packet leaves the node with; `None` if no port is left.
fn leaves_by(world: &mut World, packet: &Packet) -> Result<Option<u16>> {
    let outcome = world.send("to_network", packet)?;
    if outcome.action == SHOT {
        ensure!(outcome.counted == [(NO_MAPPING, EGRESS as u8)], "{outcome:?}");
        return Ok(None);
    }
    let layer4 = if packet.source.is_ipv4() { 34 } else { 54 };
    let protocol = outcome.frame[if packet.source.is_ipv4() { 23 } else { 20 }];
    let offset = layer4 + if matches!(protocol, 1 | 58) { 4 } else { 0 };
    Ok(Some(u16::from_be_bytes([outcome.frame[offset], outcome.frame[offset + 1]])))
}

/// The ports that flows from these source ports get, as far as they get one.
fn ports_of(world: &mut World, flows: impl Iterator<Item = Packet>) -> Result<Vec<u16>> {
    let mut ports = Vec::new();
    for packet in flows {
        ports.extend(leaves_by(world, &packet)?);
    }
    ports.sort_unstable();
    Ok(ports)
}

/// Drops the rows of one direction.
fn lose(world: &World, direction: u32) -> Result<()> {
    let map = world.datapath.typed::<NatKey, Nat>("nat")?;
    let mut rows = map.rows()?;
    rows.retain(|key, _| u32::from(key.0.direction) != direction);
    map.sync(&rows)?;
    Ok(())
}

/// As when so many seconds had passed; no kernel has more than 1,000 jiffies a second.
fn wait(world: &World, seconds: u64) -> Result<()> {
    world.change_mappings(|row| row.last_seen_jiffies -= seconds * 1000)
}

#[test]
fn a_port_that_a_socket_of_the_node_has_is_no_flows() -> Result<()> {
    require_lab!();
    in_both_families_with(with_ports(20000..=20003), |world, cast| {
        let _listener = TcpListener::bind(everywhere(&cast, 20001))?;
        let _datagrams = UdpSocket::bind(everywhere(&cast, 20002))?;
        world.host_port((cast.node, 20003, 6), 50, (cast.b, 80))?;
        let to = (cast.world, 443);
        let streams = ports_of(world, (0..4).map(|port| tcp((cast.a, 7000 + port), to, SYN)))?;
        ensure!(streams == [20000, 20002], "TCP: {streams:?}");
        let datagrams = ports_of(world, (0..4).map(|port| udp((cast.a, 7000 + port), to)))?;
        ensure!(datagrams == [20000, 20001, 20003], "UDP: {datagrams:?}");
        Ok(())
    })
}

#[test]
fn a_connection_of_the_node_keeps_its_port_from_flows_to_its_peer_alone() -> Result<()> {
    require_lab!();
    in_both_families_with(with_ports(20000..=20000), |world, cast| {
        // The namespace has no peers: the node connects to itself.
        for line in ["link set lo up", &format!("address add {} dev lo nodad", cast.node)] {
            let line = if cast.node.is_ipv4() { line.replace(" nodad", "") } else { line.to_owned() };
            ip(&line)?;
        }
        std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", "20000 20000")?;
        let server = TcpListener::bind((cast.node, 443))?;
        let connection = TcpStream::connect((cast.node, 443))?;
        let flow = |to| tcp((cast.a, 7000), to, SYN);
        ensure!(leaves_by(world, &flow((cast.world, 443)))? == Some(20000));
        ensure!(leaves_by(world, &flow((cast.node, 443)))?.is_none());
        drop((server, connection));
        Ok(())
    })
}

#[test]
fn a_syn_from_outside_is_the_nodes() -> Result<()> {
    require_lab!();
    in_both_families_with(with_ports(10250..=10250), |world, cast| {
        let (pod, outside, node) = ((cast.a, 40000), (cast.other_node, 45000), (cast.node, 10250));
        ensure!(world.send("from_pod", &tcp(pod, outside, SYN).by(1))?.action == PASS);
        ensure!(leaves_by(world, &tcp(pod, outside, SYN))? == Some(10250));
        let comes = |world: &mut World, flags| -> Result<u32> {
            Ok(world.send("from_network", &tcp(outside, node, flags))?.action)
        };
        ensure!(comes(world, SYN)? == PASS, "the pod gets a SYN");
        // Nobody of the node answers it but with an RST: the pod's flow goes on.
        ensure!(leaves_by(world, &tcp(node, outside, RST | ACK))? == Some(10250));
        ensure!(comes(world, SYN | ACK)? == REDIRECT);
        // Somebody does: what follows is his.
        ensure!(comes(world, SYN)? == PASS);
        ensure!(leaves_by(world, &tcp(node, outside, SYN | ACK))? == Some(10250));
        ensure!(comes(world, ACK)? == PASS, "the pod gets a connection of the node");
        wait(world, 1)?;
        ensure!(leaves_by(world, &tcp(pod, outside, ACK))?.is_none(), "the pod answers in the node's name");
        ensure!(comes(world, ACK)? == PASS);
        Ok(())
    })
}

#[test]
fn a_socket_that_came_after_the_mapping_gets_its_datagrams() -> Result<()> {
    require_lab!();
    in_both_families_with(with_ports(20000..=20000), |world, cast| {
        let (pod, outside, node) = ((cast.a, 7000), (cast.world, 53), (cast.node, 20000));
        ensure!(world.send("from_pod", &udp(pod, outside).by(1))?.action == PASS);
        ensure!(leaves_by(world, &udp(pod, outside))? == Some(20000));
        ensure!(world.send("from_network", &udp(outside, node))?.action == REDIRECT);
        let _socket = UdpSocket::bind(everywhere(&cast, 20000))?;
        wait(world, 1)?;
        ensure!(world.send("from_network", &udp(outside, node))?.action == PASS);
        ensure!(leaves_by(world, &udp(pod, outside))?.is_none());
        Ok(())
    })
}

#[test]
fn what_the_node_sends_without_a_socket_keeps_its_port() -> Result<()> {
    require_lab!();
    in_both_families_with(with_ports(20000..=20001), |world, cast| {
        // A ping has no socket that could be found, and so has what netfilter masquerades.
        let asks: [(Packet, Packet); 2] = [
            (echo(cast.node, cast.world, 20000), echo_reply(cast.world, cast.node, 20000)),
            (udp((cast.node, 20000), (cast.world, 53)), udp((cast.world, 53), (cast.node, 20000))),
        ];
        let pods: [fn(Cast, u16) -> Packet; 2] =
            [|cast, id| echo(cast.a, cast.world, id), |cast, port| udp((cast.a, port), (cast.world, 53))];
        for ((ask, answer), pod) in asks.iter().zip(pods) {
            world.forget_flows()?;
            ensure!(world.send("from_pod", &pod(cast, 7000).by(1))?.action == PASS);
            let taken = (7000..7002).map(|port| pod(cast, port));
            ensure!(ports_of(world, taken)? == [20000, 20001]);
            // The node is asked by nobody: it takes the port, and the answer is its own.
            ensure!(world.send("to_network", ask)?.frame == ask.bytes());
            ensure!(world.send("from_network", answer)?.action == PASS);
            wait(world, 1)?;
            let left = (7000..7002).map(|port| pod(cast, port));
            ensure!(ports_of(world, left)? == [20001]);
            ensure!(world.send("from_network", answer)?.action == PASS);
            // Until it has been silent for long.
            wait(world, 100)?;
            world.collect_garbage()?;
            ensure!(ports_of(world, (7005..7007).map(|port| pod(cast, port)))? == [20000, 20001]);
        }
        Ok(())
    })
}

#[test]
fn half_a_mapping_heals() -> Result<()> {
    require_lab!();
    in_both_families_with(with_ports(20000..=20999), |world, cast| {
        let (pod, outside) = ((cast.a, 40000), (cast.world, 443));
        ensure!(world.send("from_pod", &tcp(pod, outside, SYN).by(1))?.action == PASS);
        let port = leaves_by(world, &tcp(pod, outside, SYN))?.context("no port")?;
        let answer = tcp(outside, (cast.node, port), ACK);
        for direction in [EGRESS, INGRESS] {
            lose(world, direction)?;
            wait(world, 1)?;
            let kept = leaves_by(world, &tcp(pod, outside, ACK))?;
            ensure!(kept == Some(port), "without the rows of direction {direction}: {port} became {kept:?}");
            ensure!(world.send("from_network", &answer)?.action == REDIRECT);
        }
        // Both: the tuple has the same port, as long as nobody else took it.
        world.datapath.typed::<NatKey, Nat>("nat")?.sync(&Default::default())?;
        ensure!(leaves_by(world, &tcp(pod, outside, ACK))? == Some(port));
        Ok(())
    })
}

#[test]
fn a_mapping_that_is_used_stays_without_its_connection() -> Result<()> {
    require_lab!();
    in_both_families_with(with_ports(20000..=20999), |world, cast| {
        let (pod, outside) = ((cast.a, 40000), (cast.world, 443));
        ensure!(world.send("from_pod", &tcp(pod, outside, SYN).by(1))?.action == PASS);
        let port = leaves_by(world, &tcp(pod, outside, SYN))?.context("no port")?;
        let answer = tcp(outside, (cast.node, port), SYN | ACK);
        ensure!(world.send("from_network", &answer)?.action == REDIRECT);
        leaves_by(world, &tcp(pod, outside, ACK))?;
        // As under the pressure of other flows.
        world.forget_flows_of_kind(0)?;
        wait(world, 120)?;
        assert_eq!(world.collect_garbage()?.0.nat, 0);
        leaves_by(world, &tcp(pod, outside, FIN | ACK))?;
        let answer = tcp(outside, (cast.node, port), FIN | ACK);
        ensure!(world.send("from_network", &answer)?.counted.len() == 1);
        assert_eq!(world.collect_garbage()?.0.nat, 0);
        wait(world, 11)?;
        assert_eq!(world.collect_garbage()?.0.nat, 2);
        Ok(())
    })
}

#[test]
fn the_port_of_a_connection_that_has_ended_serves_again() -> Result<()> {
    require_lab!();
    in_both_families_with(with_ports(20000..=20003), |world, cast| {
        let outside = (cast.world, 443);
        let mut ports = Vec::new();
        for source in 7000..7004 {
            let pod = (cast.a, source);
            ensure!(world.send("from_pod", &tcp(pod, outside, SYN).by(1))?.action == PASS);
            let port = leaves_by(world, &tcp(pod, outside, SYN))?.context("no port")?;
            let answer = tcp(outside, (cast.node, port), SYN | ACK);
            ensure!(world.send("from_network", &answer)?.action == REDIRECT);
            ports.push(port);
        }
        let next = tcp((cast.b, 9000), outside, SYN);
        ensure!(leaves_by(world, &next)?.is_none());
        // An RST does not end what goes on after it, nor one FIN a connection.
        for (source, flags) in [(7000, RST), (7000, ACK), (7001, FIN | ACK), (7002, RST)] {
            leaves_by(world, &tcp((cast.a, source), outside, flags))?;
        }
        ensure!(leaves_by(world, &next)?.is_none(), "its last packets may be on their way");
        wait(world, 3)?;
        ensure!(leaves_by(world, &next)? == Some(ports[2]));
        ensure!(leaves_by(world, &tcp((cast.b, 9001), outside, SYN))?.is_none());
        Ok(())
    })
}

#[test]
fn every_port_of_a_small_range_is_found() -> Result<()> {
    require_lab!();
    in_both_families_with(with_ports(20000..=20299), |world, cast| {
        let flows = (0..300).map(|port| udp((cast.a, 7000 + port), (cast.world, 443)));
        let ports = ports_of(world, flows)?;
        ensure!(ports == (20000..=20299).collect::<Vec<_>>(), "{} of 300: {ports:?}", ports.len());
        ensure!(leaves_by(world, &udp((cast.a, 6999), (cast.world, 443)))?.is_none());
        Ok(())
    })
}

#[test]
fn the_secret_decides_which_port_a_flow_gets() -> Result<()> {
    require_lab!();
    let mut seen = std::collections::BTreeSet::new();
    for secret in [[0, 0], [1, 0], [0, 1]] {
        let settings = Settings { secret, ..with_ports(12288..=28671) };
        let (send, receive) = std::sync::mpsc::channel();
        super::world::within(settings, move |world| {
            let cast = super::world::casts()[0];
            send.send(leaves_by(world, &udp((cast.a, 7000), (cast.world, 53)))?)?;
            Ok(())
        })?;
        seen.insert(receive.recv()?);
    }
    assert_eq!(seen.len(), 3, "{seen:?}");
    Ok(())
}

/// Takes ports for other flows to the same peer, as the row of one that is there has its own.
fn take_ports(map: &TypedMap<NatKey, Nat>, like: (NatKey, Nat), ports: &[u16]) -> Result<()> {
    let (key, row) = like;
    for port in ports {
        let taken = NatKey { local_port: port.to_be(), ..key };
        map.insert(&taken, &Nat { port: port.to_be(), ..row })?;
    }
    Ok(())
}

/// What searches there were: how many, how many that found nothing, and tries.
fn searched(world: &World) -> Result<[u64; 3]> {
    let rows = world.datapath.nat_searches()?;
    let failed = rows.iter().filter(|row| row.most_tries.is_none()).map(|row| row.searches).sum();
    Ok([rows.iter().map(|row| row.searches).sum(), failed, rows.iter().map(|row| row.tries).sum()])
}

/// A number without any likeness to `number` (the end of SplitMix64).
fn mixed(number: u64) -> u64 {
    let once = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let twice = (once ^ once >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    twice ^ twice >> 31
}

/// The table of docs/performance.md: run it with --nocapture.
#[test]
fn a_new_flow_finds_a_port_however_many_are_taken() -> Result<()> {
    require_lab!();
    super::world::within(with_ports(12288..=28671), |world| {
        let [cast, _] = super::world::casts();
        let map = world.datapath.typed::<NatKey, Nat>("nat")?;
        let first = leaves_by(world, &udp((cast.b, 999), (cast.world, 443)))?.context("a port")?;
        let is_back = |key: &NatKey| u32::from(key.direction) == INGRESS;
        let like = map.rows()?.into_iter().find(|(key, _)| is_back(&key.0)).context("a row back")?;
        let like = (like.0.0, like.1);
        // In an order without steps: the search goes by steps, and must not meet ports that were taken so.
        let mut ports: Vec<u16> = (12288..=28671).filter(|port| *port != first).collect();
        ports.sort_by_key(|port| mixed(u64::from(*port)));
        let mut taken = 1;
        println!("| ports in use | new flows | without a port | tries for one |");
        let levels = [(50, 400), (80, 400), (90, 400), (95, 400), (99, 1000)];
        for ((percent, flows), first_port) in levels.into_iter().zip((1000..).step_by(1000)) {
            let wanted = 16384 * percent / 100;
            take_ports(&map, like, &ports[taken - 1..wanted - 1])?;
            taken = wanted;
            let before = searched(world)?;
            for flow in 0..flows {
                let Some(port) = leaves_by(world, &udp((cast.a, first_port + flow), (cast.world, 443)))?
                else {
                    continue;
                };
                let back = NatKey { local_port: port.to_be(), ..like.0 };
                ensure!(map.remove(&back)?, "no row for port {port}");
            }
            let after = searched(world)?;
            let [searches, failed, tries] = [0, 1, 2].map(|at| after[at] - before[at]);
            let share = failed as f64 * 100.0 / searches as f64;
            println!("| {percent} % | {searches} | {share:.2} % | {:.1} |", tries as f64 / searches as f64);
            ensure!(searches == u64::from(flows), "{searches} of {flows}");
            ensure!(
                if percent < 99 { failed == 0 } else { failed * 100 <= searches * 3 },
                "{percent}: {failed}"
            );
        }
        Ok(())
    })
}
