//! ICMP errors whose quote is more than a plain packet.

use std::net::IpAddr;

use anyhow::{Result, ensure};
use weir::datapath::Settings;

use super::frame::{Layer4, Packet, icmp};
use super::world::{Arrival, PASS, REDIRECT, World, in_both_families, in_both_families_with, settings};
use crate::require::require_lab;

type End = (IpAddr, u16);

/// A datagram without a checksum, which no translation changes.
fn datagram(from: End, to: End) -> Packet {
    let layer4 = Layer4::Udp { ports: (from.1, to.1), has_checksum: false };
    Packet::new(from.0, to.0, layer4).payload(&[7; 504])
}

/// The first fragment of one.
fn first(from: End, to: End) -> Packet {
    datagram(from, to).fragment(7, 0, true)
}

/// "Packet too big" about a packet, as routers quote: as much as fits.
fn too_big(source: IpAddr, about: &Packet) -> Packet {
    let (kind, code) = if source.is_ipv4() { (3, 4) } else { (2, 0) };
    let mut packet = icmp(source, about.source, kind, code).payload(&about.bytes()[14..14 + 400]);
    packet.layer4 = Layer4::Icmp { kind, code, rest: [0, 0, 5, 20] };
    packet
}

/// Sends through a program; what comes out must be `expected`, byte by byte.
fn becomes(
    world: &mut World,
    (program, arrival): (&str, Arrival),
    packet: &Packet,
    action: u32,
    expected: &Packet,
) -> Result<()> {
    let outcome = world.send_as(program, packet, arrival)?;
    ensure!(outcome.action == action, "{} by {program}: {:?}", outcome.action, outcome.counted);
    let expected = Packet { macs: packet.macs, ..expected.clone() }.bytes();
    ensure!(outcome.frame == expected, "came out  {:02x?}\nexpected {expected:02x?}", outcome.frame);
    Ok(())
}

fn plainly(program: &str) -> (&str, Arrival) {
    (program, Arrival::default())
}

/// What senders put between the addresses and the ports.
fn with_more_headers(packet: &Packet) -> Packet {
    let mut packet = packet.clone();
    if packet.source.is_ipv4() {
        // Router alert, padding.
        packet.options = vec![148, 4, 0, 0, 1, 1, 1, 0];
        return packet;
    }
    packet.extension(0, &[1, 4, 0, 0, 0, 0]).extension(60, &[1, 4, 0, 0, 0, 0])
}

#[test]
fn errors_about_fragments_and_options_reach_the_pod() -> Result<()> {
    require_lab!();
    let native = Settings { tunnel_ifindex: None, ..settings() };
    in_both_families_with(native, |world, cast| {
        let (pod, remote) = ((cast.a, 9), (cast.remote, 53));
        ensure!(world.send("from_network", &datagram(remote, pod))?.action == REDIRECT);
        for sent in [
            datagram(pod, remote),
            first(pod, remote),
            with_more_headers(&datagram(pod, remote)),
            with_more_headers(&first(pod, remote)),
        ] {
            let error = too_big(cast.other_node, &sent);
            becomes(world, plainly("from_network"), &error, REDIRECT, &error)?;
        }
        // Nobody knows what a later fragment belongs to.
        let error = too_big(cast.other_node, &datagram(pod, remote).fragment(7, 512, true));
        let outcome = world.send("from_network", &error)?;
        ensure!(outcome.counted[0].0 == 143, "{outcome:?}");
        Ok(())
    })
}

#[test]
fn errors_about_fragments_come_by_the_tunnel() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let (pod, remote) = ((cast.a, 9), (cast.remote, 53));
        let by_tunnel = Arrival { tunnel: Some((Some(cast.other_node), 303)), ..Arrival::default() };
        ensure!(world.send_as("from_overlay", &datagram(remote, pod), by_tunnel)?.action == REDIRECT);
        let error = too_big(cast.remote, &first(pod, remote));
        becomes(world, ("from_overlay", by_tunnel), &error, REDIRECT, &error)
    })
}

#[test]
fn errors_about_masqueraded_fragments_find_back() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let (pod, outside) = ((cast.a, 40000), (cast.world, 53));
        ensure!(world.send("from_pod", &first(pod, outside).by(1))?.action == PASS);
        let left = world.send("to_network", &first(pod, outside))?;
        ensure!(left.action == PASS, "{left:?}");
        let layer4 = if cast.a.is_ipv4() { 34 } else { 62 };
        let node = (cast.node, u16::from_be_bytes([left.frame[layer4], left.frame[layer4 + 1]]));
        let error = too_big(cast.other_node, &first(node, outside));
        let arrives = too_big(cast.other_node, &first(pod, outside));
        becomes(world, plainly("from_network"), &error, REDIRECT, &arrives)
    })
}

#[test]
fn errors_about_fragments_name_the_service() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let (pod, service, backend) = ((cast.a, 40000), (cast.service, 80), (cast.b, 8080));
        ensure!(world.send("from_pod", &first(pod, service).by(1))?.action == REDIRECT);
        // The backend quotes what it received, the pod knows what it has sent.
        let error = too_big(cast.b, &first(pod, backend)).by(2);
        becomes(world, plainly("from_pod"), &error, REDIRECT, &too_big(cast.service, &first(pod, service)))?;
        // The pod quotes the service's answer, the backend knows its own.
        let error = too_big(cast.a, &first(service, pod)).by(1);
        becomes(world, plainly("from_pod"), &error, REDIRECT, &too_big(cast.a, &first(backend, pod)))?;
        // A service with which the pod does not speak has sent nothing.
        let error = too_big(cast.a, &first(service, (cast.a, 40001))).by(1);
        let outcome = world.send("from_pod", &error)?;
        ensure!(outcome.counted[0].0 == 143, "{outcome:?}");
        Ok(())
    })
}

#[test]
fn errors_about_fragments_of_a_host_port_find_the_pod() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let (client, host, pod) = ((cast.world, 40000), (cast.node, 8000), (cast.a, 80));
        world.host_port((cast.node, 8000, 17), 50, pod)?;
        let asked = datagram(client, host);
        becomes(world, plainly("from_network"), &asked, REDIRECT, &datagram(client, pod))?;
        let error = too_big(cast.other_node, &first(host, client));
        let arrives = too_big(cast.other_node, &first(pod, client));
        becomes(world, plainly("from_network"), &error, REDIRECT, &arrives)
    })
}
