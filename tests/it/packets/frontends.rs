//! Frontends on the node's own addresses: whose packets they take, and by which name they answer.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Result, ensure};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, socket};

use super::frame::{ACK, FIN, Layer4, Packet, RST, SYN, passed_on, tcp, udp, unreachable};
use super::network::{connect as connect_network, ip};
use super::world::{Cast, PASS, REDIRECT, World, in_both_families};
use crate::require::require_lab;

fn second_address(cast: &Cast) -> Result<IpAddr> {
    Ok(if cast.a.is_ipv4() { "192.0.2.77" } else { "2001:db8:1::77" }.parse()?)
}

fn source_port(frame: &[u8]) -> u16 {
    let offset = if frame[12..14] == [0x08, 0] { 34 } else { 54 };
    u16::from_be_bytes([frame[offset], frame[offset + 1]])
}

/// Sends a client's packet, which must come out as it is but for the pod and the source port on the way.
fn arrives(world: &mut World, packet: &Packet, pod: (IpAddr, u16)) -> Result<u16> {
    let outcome = world.send("from_network", packet)?;
    ensure!(outcome.action == REDIRECT, "counted {:?} for {packet:?}", outcome.counted);
    let port = source_port(&outcome.frame);
    let expected = match packet.layer4 {
        Layer4::Tcp { flags, .. } => tcp((packet.source, port), pod, flags),
        _ => udp((packet.source, port), pod),
    };
    ensure!(outcome.frame == Packet { macs: packet.macs, ..expected }.bytes(), "{outcome:?}");
    Ok(port)
}

/// Sends the pod's answer, which must reach the client from the frontend.
fn answers(world: &mut World, answer: &Packet, expected: &Packet) -> Result<()> {
    let outcome = world.send("from_pod", answer)?;
    let expected = Packet { macs: answer.macs, ..expected.clone() }.bytes();
    // What leaves past the stack takes a hop.
    let expected = if outcome.action == REDIRECT { passed_on(&expected) } else { expected };
    ensure!(outcome.frame == expected, "{outcome:?}");
    Ok(())
}

#[test]
fn each_frontend_answers_by_its_own_name() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        connect_network(&cast, 1500)?;
        ip(&format!("route add default via {}", cast.other_node))?;
        let (client, pod) = ((cast.world, 40000), (cast.a, 80));
        let frontends = [(cast.node, 8000), (second_address(&cast)?, 8000), (cast.node, 8001)];
        for (number, (address, port)) in frontends.into_iter().enumerate() {
            world.host_port((address, port, 6), 50 + number as u32, pod)?;
            world.host_port((address, port, 17), 60 + number as u32, pod)?;
        }
        // And the pod's own address, which is routed in some networks.
        let targets: Vec<_> = frontends.into_iter().chain([pod]).collect();
        for first in 0..targets.len() {
            world.forget_flows()?;
            let mut ways = Vec::new();
            let order = targets.iter().cycle().skip(first).take(targets.len());
            for target in order {
                let way = arrives(world, &tcp(client, *target, SYN), pod)?;
                answers(
                    world,
                    &tcp(pod, (client.0, way), SYN | ACK).by(1),
                    &tcp(*target, client, SYN | ACK),
                )?;
                ways.push((*target, way));
            }
            assert_eq!(ways[0].1, client.1, "the first keeps its port");
            let different: BTreeSet<u16> = ways.iter().map(|(_, way)| *way).collect();
            assert_eq!(different.len(), targets.len(), "{ways:?}");
            for flags in [ACK, FIN | ACK] {
                for (target, way) in &ways {
                    assert_eq!(arrives(world, &tcp(client, *target, flags), pod)?, *way);
                    let answer = tcp(pod, (client.0, *way), flags).by(1);
                    answers(world, &answer, &tcp(*target, client, flags))?;
                }
            }
            // The last acknowledgement ends the first; the others go on under their names.
            arrives(world, &tcp(client, ways[0].0, ACK), pod)?;
            for (target, way) in &ways[1..] {
                assert_eq!(arrives(world, &tcp(client, *target, ACK), pod)?, *way);
            }
        }
        world.forget_flows()?;
        for target in &frontends {
            for _ in 0..2 {
                let way = arrives(world, &udp(client, *target), pod)?;
                answers(world, &udp(pod, (client.0, way)).by(1), &udp(*target, client))?;
            }
        }
        assert_eq!(world.connections(0)?.len(), frontends.len());
        Ok(())
    })
}

#[test]
fn a_pod_that_speaks_first_again_has_its_frontends_name_when_asked() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        connect_network(&cast, 1500)?;
        ip(&format!("route add default via {}", cast.other_node))?;
        let (client, host, pod) = ((cast.world, 40000), (cast.node, 8000), (cast.a, 80));
        world.host_port((cast.node, 8000, 6), 50, pod)?;
        arrives(world, &tcp(client, host, SYN), pod)?;
        answers(world, &tcp(pod, client, SYN | ACK).by(1), &tcp(host, client, SYN | ACK))?;
        // The row was wanted for another flow.
        world.forget_flows()?;
        let outcome = world.send("from_pod", &tcp(pod, client, ACK).by(1))?;
        ensure!(outcome.action == PASS, "{outcome:?}");
        arrives(world, &tcp(client, host, ACK), pod)?;
        answers(world, &tcp(pod, client, RST).by(1), &tcp(host, client, RST))?;
        Ok(())
    })
}

/// Gives this namespace's loopback device the node's address and the client's.
fn be_node_and_client(cast: &Cast) -> Result<()> {
    let length = if cast.node.is_ipv4() { 32 } else { 128 };
    ip("link set lo up")?;
    for address in [cast.node, cast.world] {
        let nodad = if address.is_ipv4() { "" } else { " nodad" };
        ip(&format!("addr add {address}/{length} dev lo{nodad}"))?;
    }
    Ok(())
}

/// A TCP connection with a source port of its own choice.
fn connect_from(source: SocketAddr, target: SocketAddr) -> Result<OwnedFd> {
    let family = if source.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, SockType::Stream, SockFlag::empty(), None)?;
    bind(socket.as_raw_fd(), &SockaddrStorage::from(source))?;
    connect(socket.as_raw_fd(), &SockaddrStorage::from(target))?;
    Ok(socket)
}

#[test]
fn a_connection_of_the_node_keeps_its_answers() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        be_node_and_client(&cast)?;
        let (host, server, pod) = ((cast.node, 8000), (cast.world, 443), (cast.a, 80));
        world.host_port((cast.node, 8000, 6), 50, pod)?;
        world.host_port((cast.node, 8000, 17), 51, pod)?;
        let stays = |world: &mut World, packet: &Packet| -> Result<()> {
            let outcome = world.send("from_network", packet)?;
            ensure!(outcome.action == PASS && outcome.frame == packet.bytes(), "{outcome:?}");
            Ok(())
        };
        // A listener on the same port changes nothing for who connects.
        let listener = TcpListener::bind(server)?;
        let socket = connect_from(host.into(), server.into())?;
        for flags in [SYN | ACK, ACK, FIN | ACK, RST] {
            stays(world, &tcp(server, host, flags))?;
        }
        let datagrams = UdpSocket::bind(host)?;
        arrives(world, &udp((cast.world, 53), host), pod)?;
        world.forget_flows()?;
        datagrams.connect((cast.world, 53))?;
        stays(world, &udp((cast.world, 53), host))?;
        let error = unreachable(cast.world, &udp(host, (cast.world, 53)));
        stays(world, &error)?;
        // Others reach the pod, and go on when their row was wanted for another flow.
        for flags in [SYN, ACK] {
            world.forget_flows()?;
            arrives(world, &tcp((cast.world, 444), host, flags), pod)?;
        }
        arrives(world, &udp((cast.world, 54), host), pod)?;
        drop((listener, socket));
        Ok(())
    })
}
