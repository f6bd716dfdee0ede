//! Services per packet, for pods whose sockets the hooks do not see.

use std::net::IpAddr;

use anyhow::{Result, ensure};
use weir::datapath::ip_of;
use weir::datapath::types::connection_flags;

use super::frame::{ACK, FIN, Layer4, Packet, RST, SYN, host_mac, tcp, udp, unreachable};
use super::world::{
    A, ANSWER, Arrival, B, EGRESS, INGRESS, Outcome, REDIRECT, SHOT, World, in_both_families,
};
use crate::require::require_lab;

/// Sends through from_pod; what comes out must be `expected`, byte by byte.
pub(super) fn becomes(world: &mut World, packet: &Packet, expected: &Packet) -> Result<()> {
    let outcome = world.send("from_pod", packet)?;
    ensure!(outcome.action == REDIRECT, "counted {:?} for {packet:?}", outcome.counted);
    let expected = Packet { macs: packet.macs, ..expected.clone() }.bytes();
    ensure!(outcome.frame == expected, "came out  {:02x?}\nexpected {expected:02x?}", outcome.frame);
    Ok(())
}

#[test]
fn a_service_leads_to_its_backend_and_back() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let (client, service, backend) = ((cast.a, 40000), (cast.service, 80), (cast.b, 8080));
        for (flags, answer) in [(SYN, SYN | ACK), (ACK, ACK), (FIN | ACK, FIN | ACK)] {
            becomes(world, &tcp(client, service, flags).by(1), &tcp(client, backend, flags))?;
            becomes(world, &tcp(backend, client, answer).by(2), &tcp(service, client, answer))?;
        }
        let flows = world.connections(0)?;
        ensure!(flows.len() == 1, "{flows:?}");
        let flow = flows[0].1;
        assert_eq!((ip_of(flow.service), u16::from_be(flow.service_port)), service);
        ensure!(u32::from(flow.flags) & connection_flags::CONNECTION_TRANSLATED.0 != 0);
        assert_eq!(world.connections(1)?.len(), 1);
        Ok(())
    })
}

#[test]
fn datagrams_are_translated_with_and_without_checksum() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let (client, service, backend) = ((cast.a, 40000), (cast.service, 80), (cast.b, 8080));
        becomes(world, &udp(client, service).by(1), &udp(client, backend))?;
        becomes(world, &udp(backend, client).by(2), &udp(service, client))?;
        if cast.a.is_ipv4() {
            let without = |packet: Packet| match packet.layer4 {
                Layer4::Udp { ports, .. } => {
                    Packet { layer4: Layer4::Udp { ports, has_checksum: false }, ..packet }
                }
                _ => packet,
            };
            becomes(world, &without(udp(client, service).by(1)), &without(udp(client, backend)))?;
        }
        Ok(())
    })
}

#[test]
fn policy_sees_the_backend_and_its_port() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        world.enforce(1, &[EGRESS])?;
        world.enforce(2, &[INGRESS])?;
        let syn = tcp((cast.a, 40000), (cast.service, 80), SYN).by(1);
        ensure!(world.send("from_pod", &syn)?.action == SHOT);
        world.allow(1, EGRESS, B, (6, 80))?;
        world.allow(2, INGRESS, A, (6, 80))?;
        let outcome = world.send("from_pod", &syn)?;
        ensure!(outcome.action == SHOT);
        let event = outcome.events[0];
        assert_eq!(ip_of(event.service), cast.service);
        assert_eq!((ip_of(event.destination), u16::from_be(event.destination_port)), (cast.b, 8080));
        world.allow(1, EGRESS, B, (6, 8080))?;
        world.allow(2, INGRESS, A, (6, 8080))?;
        ensure!(world.send("from_pod", &syn)?.action == REDIRECT);
        Ok(())
    })
}

#[test]
fn a_pod_reaches_itself_through_its_service() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        // Whatever policy says: it is the pod itself.
        world.enforce(1, &[EGRESS, INGRESS])?;
        let (client, service, backend) = ((cast.a, 40000), (cast.service, 81), (cast.a, 8081));
        let stand_in = (cast.loopback, 40000);
        for (flags, answer) in [(SYN, SYN | ACK), (ACK, ACK)] {
            becomes(world, &tcp(client, service, flags).by(1), &tcp(stand_in, backend, flags))?;
            becomes(world, &tcp(backend, stand_in, answer).by(1), &tcp(service, client, answer))?;
        }
        Ok(())
    })
}

#[test]
fn a_change_of_policy_does_not_break_what_a_pod_says_to_itself() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let (client, service, backend) = ((cast.a, 40000), (cast.service, 81), (cast.a, 8081));
        let stand_in = (cast.loopback, 40000);
        becomes(world, &tcp(client, service, SYN).by(1), &tcp(stand_in, backend, SYN))?;
        for _ in 0..2 {
            world.enforce(1, &[EGRESS, INGRESS])?;
            let answer = |from, to| tcp(from, to, SYN | ACK);
            becomes(world, &answer(backend, stand_in).by(1), &answer(service, client))?;
        }
        // But nobody else is the stand-in, and it is nobody.
        let outcome = world.send("from_network", &tcp(stand_in, backend, ACK))?;
        ensure!(outcome.action == SHOT, "{outcome:?}");
        Ok(())
    })
}

#[test]
fn a_service_does_not_open_the_way_to_tunnels() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        world.service((cast.service, 53, 17), 700, 1, &[(cast.other_node, 8472)])?;
        let outcome = world.send("from_pod", &udp((cast.a, 5), (cast.service, 53)).by(1))?;
        ensure!(outcome.counted == [(170, EGRESS as u8)], "{outcome:?}");
        Ok(())
    })
}

#[test]
fn new_connections_spread_over_the_backends() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let backends = [(cast.b, 8080), (cast.remote, 8080), (cast.other_node, 9090)];
        world.service((cast.service, 80, 6), 500, 1, &backends)?;
        for port in 0..300 {
            let outcome =
                world.send("from_pod", &tcp((cast.a, 1000 + port), (cast.service, 80), SYN).by(1))?;
            ensure!(outcome.action != SHOT, "counted {:?}", outcome.counted);
        }
        let chosen: Vec<IpAddr> = world.connections(1)?.iter().map(|(_, flow)| ip_of(flow.service)).collect();
        for (backend, _) in backends {
            let count = chosen.iter().filter(|address| **address == backend).count();
            ensure!((60..=140).contains(&count), "{backend} was chosen {count} times of 300");
        }
        Ok(())
    })
}

#[test]
fn a_removed_backend_gets_nothing_new() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let service = (cast.service, 80);
        let to = |world: &mut World, packet: &Packet| -> Result<IpAddr> {
            let outcome = world.send("from_pod", packet)?;
            ensure!(outcome.action != SHOT, "counted {:?}", outcome.counted);
            Ok(destination_of(&outcome.frame))
        };
        for protocol in [6, 17] {
            world.service((cast.service, 80, protocol), 600, 1, &[(cast.b, 8080)])?;
            assert_eq!(to(world, &tcp((cast.a, 4000), service, SYN).by(1)).ok(), Some(cast.b));
            assert_eq!(to(world, &udp((cast.a, 4000), service).by(1))?, cast.b);
        }
        // Still there among others: everything stays where it is.
        for protocol in [6, 17] {
            let backends = [(cast.remote, 8080), (cast.b, 8080)];
            world.service((cast.service, 80, protocol), 600, 2, &backends)?;
        }
        for _ in 0..20 {
            assert_eq!(to(world, &tcp((cast.a, 4000), service, SYN).by(1))?, cast.b);
            assert_eq!(to(world, &udp((cast.a, 4000), service).by(1))?, cast.b);
        }
        // Gone: what is established stays, the rest goes elsewhere.
        assert_eq!(to(world, &tcp((cast.a, 4000), service, ACK).by(1))?, cast.b);
        for protocol in [6, 17] {
            world.service((cast.service, 80, protocol), 600, 3, &[(cast.remote, 8080)])?;
        }
        assert_eq!(to(world, &tcp((cast.a, 4000), service, ACK).by(1))?, cast.b);
        assert_eq!(to(world, &udp((cast.a, 4000), service).by(1))?, cast.remote);
        assert_eq!(to(world, &tcp((cast.a, 4001), service, SYN).by(1))?, cast.remote);
        // The same port again is a new connection.
        assert_eq!(to(world, &tcp((cast.a, 4000), service, SYN).by(1))?, cast.remote);
        Ok(())
    })
}

#[test]
fn a_socket_keeps_its_backend_among_thousands() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let near = |offset: i32| match cast.remote {
            IpAddr::V4(address) => IpAddr::from(u32::from(address).wrapping_add_signed(offset).to_be_bytes()),
            IpAddr::V6(address) => {
                IpAddr::from(u128::from(address).wrapping_add_signed(offset.into()).to_be_bytes())
            }
        };
        // Before it and behind it.
        let others = |count: i32| {
            (1..=count).map(move |number| (near(if number % 3 == 0 { number } else { -number }), 53))
        };
        let frontend = (cast.service, 53, 17);
        let question = udp((cast.a, 4000), (cast.service, 53)).by(1);
        for port in [52, 53, 54] {
            world.service(frontend, 700, 1, &[(cast.remote, port)])?;
            let outcome = world.send("from_pod", &question)?;
            ensure!(outcome.action != SHOT, "counted {:?}", outcome.counted);
            for (generation, count) in [(2, 1), (3, 255), (4, 300), (5, 2999), (6, 0)] {
                let backends: Vec<_> = others(count).chain([(cast.remote, port)]).collect();
                world.service(frontend, 700, generation, &backends)?;
                let outcome = world.send("from_pod", &question)?;
                ensure!(
                    outcome.action != SHOT && destination_of(&outcome.frame) == cast.remote,
                    "{count} others beside port {port}: counted {:?}",
                    outcome.counted
                );
            }
            // Gone, and the flow with it.
            world.service(frontend, 700, 7, &[(cast.b, 53)])?;
            let outcome = world.send("from_pod", &question)?;
            ensure!(destination_of(&outcome.frame) == cast.b, "port {port} is gone: {:?}", outcome.counted);
        }
        Ok(())
    })
}

pub(super) fn destination_of(frame: &[u8]) -> IpAddr {
    if frame[12..14] == [0x08, 0] {
        IpAddr::from(<[u8; 4]>::try_from(&frame[30..34]).expect("four bytes"))
    } else {
        IpAddr::from(<[u8; 16]>::try_from(&frame[38..54]).expect("sixteen bytes"))
    }
}

#[test]
fn nobody_there_is_said_at_once() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        for port in [82, 99] {
            let (client, service) = ((cast.a, 40000), (cast.service, port));
            let syn = tcp(client, service, SYN).by(1).payload(b"abc");
            let reset =
                Layer4::Tcp { ports: (port, 40000), sequence: 0, acknowledgment: 1004, flags: RST | ACK };
            answers(world, &syn, Packet::new(cast.service, cast.a, reset.clone()))?;
            // What pads the frame is no part of the segment.
            let padded = [syn.bytes(), vec![0; 9]].concat();
            let outcome = world.send_bytes("from_pod", &padded, Arrival::default())?;
            check_answer(&outcome, &syn, Packet::new(cast.service, cast.a, reset))?;

            let mut late = tcp(client, service, ACK).by(1).payload(&[9; 1200]);
            late.layer4 = Layer4::Tcp { ports: (40000, port), sequence: 5, acknowledgment: 77, flags: ACK };
            let reset = Layer4::Tcp { ports: (port, 40000), sequence: 77, acknowledgment: 0, flags: RST };
            answers(world, &late, Packet::new(cast.service, cast.a, reset))?;

            let datagram = udp(client, service).by(1);
            answers(world, &datagram, unreachable(cast.service, &datagram))?;
        }
        assert_eq!(world.connections(0)?.len() + world.connections(1)?.len(), 0);
        Ok(())
    })
}

/// The packet is turned into this answer, and sent back with the MAC addresses swapped.
pub(super) fn answers(world: &mut World, packet: &Packet, answer: Packet) -> Result<()> {
    check_answer(&world.send("from_pod", packet)?, packet, answer)
}

fn check_answer(outcome: &Outcome, packet: &Packet, answer: Packet) -> Result<()> {
    ensure!(outcome.action == REDIRECT && outcome.mark == ANSWER, "{outcome:?}");
    let answer = Packet { macs: (packet.macs.1, host_mac(1)), is_unfragmentable: true, ..answer };
    ensure!(
        outcome.frame == answer.bytes(),
        "answered {:02x?}\nexpected {:02x?}",
        outcome.frame,
        answer.bytes()
    );
    Ok(())
}

#[test]
fn an_error_from_the_backend_seems_to_be_about_the_service() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let (client, service, backend) = ((cast.a, 40000), (cast.service, 80), (cast.b, 8080));
        let question = udp(client, service).by(1);
        becomes(world, &question, &udp(client, backend))?;
        let error = unreachable(cast.b, &udp(client, backend)).by(2);
        let outcome = world.send("from_pod", &error)?;
        ensure!(outcome.action == REDIRECT, "{outcome:?}");
        let mut expected = unreachable(cast.service, &question);
        expected.macs = error.macs;
        // The quoted checksum of layer 4 covers what is not quoted: it is left as it was.
        let check = expected.payload.len() - 2..;
        expected.payload[check.clone()].copy_from_slice(&error.payload[check]);
        ensure!(
            outcome.frame == expected.bytes(),
            "came out {:02x?}\nexpected {:02x?}",
            outcome.frame,
            expected.bytes()
        );
        Ok(())
    })
}

#[test]
fn one_source_port_towards_a_service_and_its_backend_is_two_flows() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let (client, service, backend) = ((cast.a, 40000), (cast.service, 80), (cast.b, 8080));
        let other_service = another_service_of(world, backend)?;
        // The first has the port on the way, each that follows another one; the answers find back.
        let mut ways = Vec::new();
        for target in [service, backend, other_service] {
            let way = (cast.a, on_the_way(world, &tcp(client, target, SYN).by(1))?);
            becomes(world, &tcp(backend, way, SYN | ACK).by(2), &tcp(target, client, SYN | ACK))?;
            ways.push((target, way));
        }
        ensure!(ways[0].1 == client, "{ways:?}");
        let ports: std::collections::BTreeSet<u16> = ways.iter().map(|(_, (_, port))| *port).collect();
        ensure!(ports.len() == 3, "{ways:?}");
        for (target, way) in &ways {
            for flags in [ACK, ACK | FIN] {
                becomes(world, &tcp(client, *target, flags).by(1), &tcp(*way, backend, flags))?;
                becomes(world, &tcp(backend, *way, flags).by(2), &tcp(*target, client, flags))?;
            }
        }
        // A flow keeps its port when the one that it gave way to is forgotten.
        let (target, way) = ways[1];
        world.forget_flows_of_kind(0)?;
        becomes(world, &tcp(client, target, ACK).by(1), &tcp(way, backend, ACK))?;
        Ok(())
    })
}

#[test]
fn a_port_whose_flow_has_just_ended_is_another_one_on_the_way_of_the_next() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let (client, service, backend) = ((cast.a, 40000), (cast.service, 80), (cast.b, 8080));
        let other_service = another_service_of(world, backend)?;
        // The backend's socket may not have closed yet, and would not answer the SYN of another flow.
        for first in [service, backend, other_service] {
            for second in [service, backend, other_service] {
                world.forget_flows()?;
                for (flags, answer) in [(SYN, SYN | ACK), (FIN | ACK, FIN | ACK)] {
                    becomes(world, &tcp(client, first, flags).by(1), &tcp(client, backend, flags))?;
                    becomes(world, &tcp(backend, client, answer).by(2), &tcp(first, client, answer))?;
                }
                becomes(world, &tcp(client, first, ACK).by(1), &tcp(client, backend, ACK))?;
                assert_eq!(world.connections(0)?.len(), 0, "it has ended");

                let way = (cast.a, on_the_way(world, &tcp(client, second, SYN).by(1))?);
                ensure!((way == client) == (first == second), "{first:?}, then {second:?} by {way:?}");
                becomes(world, &tcp(backend, way, SYN | ACK).by(2), &tcp(second, client, SYN | ACK))?;
                becomes(world, &tcp(client, second, ACK).by(1), &tcp(way, backend, ACK))?;
                assert_eq!(world.connections(0)?.len(), 1, "the first does not come back by it");
                // What comes late of the first still is the first's.
                becomes(world, &tcp(backend, client, FIN | ACK).by(2), &tcp(first, client, FIN | ACK))?;
            }
        }
        Ok(())
    })
}

#[test]
fn datagrams_of_one_socket_to_a_service_and_its_backend_are_answered_by_name() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let (client, service, backend) = ((cast.a, 40000), (cast.service, 80), (cast.b, 8080));
        for first in [service, backend] {
            world.forget_flows()?;
            let second = if first == service { backend } else { service };
            for target in [first, second, first] {
                let way = (cast.a, on_the_way(world, &udp(client, target).by(1))?);
                ensure!((way == client) == (target == first), "{target:?} by {way:?}");
                becomes(world, &udp(backend, way).by(2), &udp(target, client))?;
                // What the backend's host says of it names what the client knows.
                let error = unreachable(cast.b, &udp(way, backend));
                let outcome = world.send("from_pod", &error.by(2))?;
                ensure!(outcome.action == REDIRECT, "{outcome:?}");
                let quote = &outcome.frame[if cast.a.is_ipv4() { 14 + 20 + 8 } else { 14 + 40 + 8 }..];
                let ports = if cast.a.is_ipv4() { &quote[20..24] } else { &quote[40..44] };
                let quoted = [client.1.to_be_bytes(), target.1.to_be_bytes()].concat();
                ensure!(ports == quoted, "{target:?}: {ports:?}, not {quoted:?}");
            }
        }
        Ok(())
    })
}

/// Another service that leads to the backend.
fn another_service_of(world: &mut World, backend: (IpAddr, u16)) -> Result<(IpAddr, u16)> {
    let address = if backend.0.is_ipv4() { "10.96.0.99" } else { "fd00:96::99" }.parse()?;
    world.service((address, 80, 6), 900, 1, &[backend])?;
    Ok((address, 80))
}

/// The source port with which a packet leaves from_pod.
fn on_the_way(world: &mut World, packet: &Packet) -> Result<u16> {
    let outcome = world.send("from_pod", packet)?;
    ensure!(outcome.action == REDIRECT, "counted {:?} for {packet:?}", outcome.counted);
    let offset = if packet.source.is_ipv4() { 34 } else { 54 };
    Ok(u16::from_be_bytes([outcome.frame[offset], outcome.frame[offset + 1]]))
}
