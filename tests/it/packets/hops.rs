//! What leaves the node past its stack obeys TTL and MTU as the stack would.

use std::net::IpAddr;

use anyhow::{Result, ensure};
use weir::datapath::Settings;

use super::frame::{ACK, Packet, SYN, passed_on, tcp, udp};
use super::network::{change_route, connect, ip};
use super::world::{Arrival, Cast, MARK, PASS, R, REDIRECT, SHOT, World, casts, settings, within};
use crate::require::require_lab;

/// Runs `work` for each family on a node with a device of this MTU and routes to all.
fn routed(
    mtu: u32,
    tunnel: Option<u32>,
    work: impl Fn(&mut World, Cast) -> Result<()> + Copy + Send + 'static,
) -> Result<()> {
    for cast in casts() {
        let settings = Settings { tunnel_ifindex: tunnel, ..settings() };
        within(settings, move |world| {
            connect(&cast, mtu)?;
            change_route("add", &cast)?;
            ip(&format!("route add default via {}", cast.other_node))?;
            world.past_stack(true)?;
            work(world, cast)
        })?;
    }
    Ok(())
}

fn sized(packet: Packet, bytes: usize) -> Packet {
    let headers = packet.clone().payload(&[]).bytes().len() - 14;
    packet.payload(&vec![7; bytes - headers])
}

/// The packet leaves past the stack, or takes it as it is.
fn expect(world: &mut World, what: &str, packet: &Packet, gso_size: u32, leaves: bool) -> Result<()> {
    let outcome = world.send_as("from_pod", packet, Arrival { gso_size, ..Arrival::default() })?;
    let (action, frame) =
        if leaves { (REDIRECT, passed_on(&packet.bytes())) } else { (PASS, packet.bytes()) };
    ensure!(outcome.action == action, "{what}: {} {:?}", outcome.action, outcome.counted);
    ensure!(outcome.frame == frame, "{what}: {:02x?}", &outcome.frame[..80]);
    Ok(())
}

/// Two kinds of far ends: another node's pod, and the world.
fn far_ends(cast: &Cast) -> [IpAddr; 2] {
    [cast.remote, cast.world]
}

#[test]
fn each_packet_that_leaves_takes_a_hop() -> Result<()> {
    require_lab!();
    routed(1500, None, |world, cast| {
        for far in far_ends(&cast) {
            let (pod, far) = ((cast.a, 40000), (far, 80));
            for flags in [SYN, ACK, ACK] {
                expect(world, "TCP", &tcp(pod, far, flags).by(1), 0, true)?;
            }
            for ttl in [255, 2, 1, 0] {
                for packet in [tcp(pod, far, ACK), udp(pod, far)] {
                    let packet = Packet { ttl, ..packet }.by(1);
                    expect(world, &format!("TTL {ttl}"), &packet, 0, ttl > 1)?;
                }
            }
        }
        // Pods of one node are on one wire.
        let near = Packet { ttl: 1, ..udp((cast.a, 1), (cast.b, 2)) }.by(1);
        let outcome = world.send("from_pod", &near)?;
        ensure!(outcome.action == REDIRECT && outcome.frame == near.bytes(), "{outcome:?}");
        Ok(())
    })
}

#[test]
fn each_packet_that_goes_by_the_tunnel_takes_a_hop() -> Result<()> {
    require_lab!();
    for is_direct in [false, true] {
        for cast in casts() {
            within(settings(), move |world| {
                if is_direct {
                    let nodes = casts()[0];
                    world.address(cast.remote, R, 0, 1, Some(nodes.other_node))?;
                    connect(&nodes, 1500)?;
                    world.past_stack(true)?;
                }
                let packet = udp((cast.a, 1), (cast.remote, 2)).by(1);
                for _ in 0..2 {
                    let outcome = world.send("from_pod", &packet)?;
                    ensure!(outcome.action == REDIRECT && outcome.mark == MARK, "{outcome:?}");
                    let inner = if is_direct { 14 + 20 + 8 + 8 } else { 0 };
                    ensure!(outcome.frame[inner..] == passed_on(&packet.bytes()), "{:02x?}", outcome.frame);
                }
                expect(world, "TTL 1", &Packet { ttl: 1, ..packet }, 0, false)
            })?;
        }
    }
    Ok(())
}

#[test]
fn what_is_too_long_for_its_way_is_the_stacks() -> Result<()> {
    require_lab!();
    routed(1400, None, |world, cast| {
        for (index, far) in far_ends(&cast).into_iter().enumerate() {
            let (pod, far) = ((cast.a, 40000), (far, 80));
            for _ in 0..2 {
                for (bytes, leaves) in [(1400, true), (1401, false)] {
                    expect(world, &format!("{bytes}"), &sized(udp(pod, far).by(1), bytes), 0, leaves)?;
                    let merged = sized(tcp(pod, far, ACK).by(1), 2880);
                    let headers = if cast.a.is_ipv4() { 40 } else { 60 };
                    let gso_size = bytes as u32 - headers;
                    expect(world, &format!("merged {bytes}"), &merged, gso_size, leaves)?;
                }
            }
            // A route says it, too; with IPv6 the kernel's own forwarding obeys only a locked MTU.
            let route = if index == 0 { far.0.to_string() } else { "default".to_owned() };
            let mtu = if cast.a.is_ipv4() { "mtu 1300" } else { "mtu lock 1300" };
            ip(&format!("route replace {route} via {} {mtu}", cast.other_node))?;
            std::thread::sleep(std::time::Duration::from_millis(20));
            for (bytes, leaves) in [(1300, true), (1350, false)] {
                expect(world, &format!("route, {bytes}"), &sized(udp(pod, far).by(1), bytes), 0, leaves)?;
            }
        }
        Ok(())
    })
}

#[test]
fn what_a_host_port_may_not_answer_is_as_the_pod_sent_it() -> Result<()> {
    require_lab!();
    for tunnel in [None, Some(1)] {
        routed(1400, tunnel, |world, cast| {
            let (client, host, pod) = ((cast.world, 40000), (cast.node, 8000), (cast.a, 80));
            world.host_port((cast.node, 8000, 17), 50, pod)?;
            ensure!(world.send("from_network", &udp(client, host))?.action == REDIRECT);
            let answer = udp(pod, client).by(1);
            let outcome = world.send("from_pod", &answer)?;
            ensure!(outcome.action == REDIRECT, "{outcome:?}");
            let translated = Packet { macs: answer.macs, ..udp(host, client) };
            ensure!(outcome.frame == passed_on(&translated.bytes()), "{:02x?}", outcome.frame);
            expect(world, "TTL 1", &Packet { ttl: 1, ..answer.clone() }, 0, false)?;
            let mut long = sized(answer, 1401);
            long.is_unfragmentable = true;
            expect(world, "too long", &long, 0, false)?;
            // The stack would cut it, and nobody would translate the pieces.
            long.is_unfragmentable = false;
            let outcome = world.send("from_pod", &long)?;
            ensure!(outcome.action == if cast.a.is_ipv4() { SHOT } else { PASS }, "{outcome:?}");
            Ok(())
        })?;
    }
    Ok(())
}
