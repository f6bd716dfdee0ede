//! What passes this node between a client and a backend, and may not go on: its sender is told.

use std::net::IpAddr;

use anyhow::{Result, ensure};
use weir::datapath::Settings;
use weir::datapath::abi::Service;
use weir::datapath::types::service_flags;

use super::frame::{ACK, Layer4, Packet, SYN, icmp, passed_on, tcp, udp, unreachable};
use super::network::{change_route, connect, ip};
use super::world::{
    Arrival, Cast, EXTERNAL, MARK, Outcome, R, REDIRECT, SHOT, World, casts, settings, within,
};
use crate::require::require_lab;

const PORT: u16 = 30080;
const MTU: usize = 1400;
const TOO_LONG: u8 = 157;
const LAST_HOP: u8 = 196;

/// Runs `work` for each family on a node whose way to all has this MTU, with native routing or the tunnel.
fn routed(
    natives: &[bool],
    work: impl Fn(&mut World, Cast, bool) -> Result<()> + Copy + Send + 'static,
) -> Result<()> {
    for cast in casts() {
        for is_native in natives.iter().copied() {
            let tunnel_ifindex = if is_native { None } else { Some(1) };
            within(Settings { tunnel_ifindex, ..settings() }, move |world| {
                connect(&cast, MTU as u32)?;
                ip(&format!("route add default via {}", cast.other_node))?;
                change_route("add", &cast)?;
                work(world, cast, is_native)
            })?;
        }
    }
    Ok(())
}

/// With so much payload that it has this length from the IP header on.
fn sized(packet: Packet, bytes: usize) -> Packet {
    let headers = packet.clone().payload(&[]).bytes().len() - 14;
    packet.payload(&vec![7; bytes - headers])
}

/// What `source` tells the sender of a packet: its type with both families, and the MTU.
fn error(source: IpAddr, about: &Packet, kinds: [(u8, u8); 2], mtu: usize) -> Packet {
    let (kind, code) = kinds[usize::from(source.is_ipv6())];
    let fragment = if source.is_ipv6() && about.fragment.is_some() { 8 } else { 0 };
    let quoted = if source.is_ipv4() { 28 } else { 48 + fragment };
    let mut packet = icmp(source, about.source, kind, code).payload(&about.bytes()[14..14 + quoted]);
    let [high, low] = (mtu as u16).to_be_bytes();
    packet.layer4 = Layer4::Icmp { kind, code, rest: [0, 0, high, low] };
    packet.is_unfragmentable = true;
    packet
}

fn too_long(source: IpAddr, about: &Packet, mtu: usize) -> Packet {
    error(source, about, [(3, 4), (2, 0)], mtu)
}

fn last_hop(source: IpAddr, about: &Packet) -> Packet {
    error(source, about, [(11, 0), (3, 0)], 0)
}

/// The packet was dropped for this reason, and its sender gets `answer`.
fn is_told(outcome: &Outcome, packet: &Packet, reason: u8, answer: &Packet) -> Result<()> {
    let counted = &outcome.counted;
    ensure!(outcome.action == REDIRECT && outcome.mark == MARK, "{} {counted:?}", outcome.action);
    ensure!(counted[0].0 == reason, "{counted:?}");
    let answer = answer.bytes();
    ensure!(outcome.frame[12..] == answer[12..], "told {:02x?}\nnot  {answer:02x?}", outcome.frame);
    assert_eq!(outcome.frame[..6], packet.bytes()[6..12], "to where it came from");
    Ok(())
}

fn is_dropped(outcome: &Outcome, reason: u8) -> Result<()> {
    ensure!(outcome.action == SHOT && outcome.counted[0].0 == reason, "{outcome:?}");
    Ok(())
}

/// The port of the node by which a client's packet leaves.
fn port_of(outcome: &Outcome, cast: &Cast) -> Result<u16> {
    ensure!(outcome.action == REDIRECT && outcome.counted[0].0 == 0, "{outcome:?}");
    let at = if cast.a.is_ipv4() { 34 } else { 54 };
    Ok(u16::from_be_bytes([outcome.frame[at], outcome.frame[at + 1]]))
}

#[test]
fn a_client_hears_that_its_packet_is_too_long_for_the_way_to_the_backend() -> Result<()> {
    require_lab!();
    routed(&[true], |world, cast, _| {
        let client = (cast.world, 40000);
        for (number, frontend) in (0..).zip([(cast.node, PORT), (cast.service, 80)]) {
            for protocol in [6, 17] {
                let id = 100 + number * 2 + u32::from(protocol == 6);
                world.outside((frontend.0, frontend.1, protocol), id, 1, &[(cast.remote, 8080)])?;
            }
            world.forget_flows()?;
            world.send("from_network", &tcp(client, frontend, SYN))?;
            for packet in [udp(client, frontend), tcp(client, frontend, ACK)] {
                let long = sized(packet.clone(), MTU + 1);
                // Also with the first packet of a flow, and again.
                for _ in 0..2 {
                    let outcome = world.send("from_network", &long)?;
                    is_told(&outcome, &long, TOO_LONG, &too_long(frontend.0, &long, MTU))?;
                }
                port_of(&world.send("from_network", &sized(packet, MTU))?, &cast)?;
            }
            // Merged segments count one by one.
            let headers = if cast.a.is_ipv4() { 40 } else { 60 };
            let merged = sized(tcp(client, frontend, ACK), 2 * MTU);
            for (bytes, fits) in [(MTU, true), (MTU + 1, false)] {
                let arrival = Arrival { gso_size: (bytes - headers) as u32, ..Arrival::default() };
                let outcome = world.send_as("from_network", &merged, arrival)?;
                if fits {
                    port_of(&outcome, &cast)?;
                } else {
                    is_told(&outcome, &merged, TOO_LONG, &too_long(frontend.0, &merged, MTU))?;
                }
            }
        }
        Ok(())
    })
}

#[test]
fn of_fragments_the_first_one_is_told_of() -> Result<()> {
    require_lab!();
    routed(&[true], |world, cast, _| {
        let (client, frontend) = ((cast.world, 40000), (cast.node, PORT));
        world.outside((cast.node, PORT, 17), 100, 1, &[(cast.remote, 8080)])?;
        let first = udp(client, frontend).payload(&[7; 1408]).fragment(9, 0, true);
        let outcome = world.send("from_network", &first)?;
        is_told(&outcome, &first, TOO_LONG, &too_long(cast.node, &first, MTU))?;
        let last = udp(client, frontend).payload(&[7; 1408]).fragment(9, 1416, false);
        is_dropped(&world.send("from_network", &last)?, TOO_LONG)
    })
}

#[test]
fn with_dsr_there_must_be_room_for_the_option_too() -> Result<()> {
    require_lab!();
    routed(&[true], |world, cast, _| {
        let (client, frontend) = ((cast.world, 40000), (cast.node, PORT));
        let flags = service_flags::SERVICE_DSR.0 as u16;
        for protocol in [6, 17] {
            let row = Service { service_id: protocol, generation: 1, flags, ..Service::default() };
            world.frontend((cast.node, PORT, protocol as u8), EXTERNAL, row, &[(cast.remote, 8080)])?;
        }
        let room = MTU - if cast.a.is_ipv4() { 8 } else { 24 };
        let long = sized(udp(client, frontend), room + 1);
        let outcome = world.send("from_network", &long)?;
        is_told(&outcome, &long, TOO_LONG, &too_long(cast.node, &long, room))?;
        let outcome = world.send("from_network", &sized(udp(client, frontend), room))?;
        ensure!(outcome.action == REDIRECT && outcome.frame.len() == 14 + MTU, "{outcome:?}");
        // Of TCP the SYN alone has the option.
        world.send("from_network", &tcp(client, frontend, SYN))?;
        let outcome = world.send("from_network", &sized(tcp(client, frontend, ACK), MTU))?;
        ensure!(outcome.action == REDIRECT && outcome.frame.len() == 14 + MTU, "{outcome:?}");
        let long = sized(tcp(client, frontend, ACK), MTU + 1);
        let outcome = world.send("from_network", &long)?;
        is_told(&outcome, &long, TOO_LONG, &too_long(cast.node, &long, MTU))
    })
}

#[test]
fn the_last_hop_of_a_clients_packet_is_told() -> Result<()> {
    require_lab!();
    routed(&[true, false], |world, cast, _| {
        let (client, frontend) = ((cast.world, 40000), (cast.node, PORT));
        for protocol in [6, 17] {
            world.outside(
                (cast.node, PORT, protocol),
                100 + u32::from(protocol),
                1,
                &[(cast.remote, 8080)],
            )?;
        }
        for packet in [tcp(client, frontend, SYN), udp(client, frontend)] {
            let last = Packet { ttl: 1, ..packet.clone() };
            let outcome = world.send("from_network", &last)?;
            is_told(&outcome, &last, LAST_HOP, &last_hop(cast.node, &last))?;
            port_of(&world.send("from_network", &Packet { ttl: 2, ..packet })?, &cast)?;
        }
        // Errors are told of nothing.
        let port = port_of(&world.send("from_network", &udp(client, frontend))?, &cast)?;
        let mut about = unreachable(cast.other_node, &udp((cast.node, port), (cast.remote, 8080)));
        about.ttl = 1;
        is_dropped(&world.send("from_network", &about)?, LAST_HOP)
    })
}

#[test]
fn a_backend_hears_that_its_answer_is_too_long_for_the_way_to_the_client() -> Result<()> {
    require_lab!();
    routed(&[true, false], |world, cast, is_native| {
        let (client, frontend, backend) = ((cast.world, 40000), (cast.service, 80), (cast.remote, 8080));
        world.outside((cast.service, 80, 17), 100, 1, &[backend])?;
        let port = port_of(&world.send("from_network", &udp(client, frontend))?, &cast)?;
        let answer = |world: &mut World, packet: &Packet| match is_native {
            true => world.send("from_network", packet),
            false => {
                let arrival = Arrival { tunnel: Some((Some(cast.other_node), R)), ..Arrival::default() };
                world.send_as("from_overlay", packet, arrival)
            }
        };
        let way = (cast.node, port);
        let fits = sized(udp(backend, way), MTU);
        let outcome = answer(world, &fits)?;
        let expected = Packet { macs: fits.macs, ..sized(udp(frontend, client), MTU) };
        ensure!(outcome.frame == passed_on(&expected.bytes()), "{outcome:?}");
        let long = sized(udp(backend, way), MTU + 1);
        is_told(&answer(world, &long)?, &long, TOO_LONG, &too_long(cast.node, &long, MTU))?;
        let last = Packet { ttl: 1, ..udp(backend, way) };
        is_told(&answer(world, &last)?, &last, LAST_HOP, &last_hop(cast.node, &last))
    })
}
