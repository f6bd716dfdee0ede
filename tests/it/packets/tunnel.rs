//! VXLAN past the kernel's device: outer headers that from_pod puts on, and those that from_network
//! takes off. Whatever is not plain must come out untouched, for the device.

use std::net::IpAddr;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::frame::{ACK, Packet, RST, SYN, checksum, passed_on, tcp, udp};
use super::network;
use super::world::{
    A, Arrival, Cast, EGRESS, INGRESS, MARK, PASS, R, REDIRECT, World, casts, settings, within,
};
use crate::require::{require_lab, takes_ipv6_out_of_ipv4};

const PORT: u16 = 8472;
/// Behind the outer Ethernet header: IP, UDP, VXLAN, the inner Ethernet header.
const OUTER: usize = 20 + 8 + 8 + 14;
/// Longer than what comes behind a merged packet goes by the device.
const QUEUE: Duration = Duration::from_millis(100);

/// The families that this kernel takes out of the tunnel.
fn casts_taken_off() -> impl Iterator<Item = Cast> {
    casts().into_iter().filter(|cast| cast.a.is_ipv4() || takes_ipv6_out_of_ipv4())
}

/// Runs `work` for each of these families, where packets may go past the stack.
fn past_the_stack(
    casts: impl IntoIterator<Item = Cast>,
    work: impl Fn(&mut World, Cast) -> Result<()> + Copy + Send + 'static,
) -> Result<()> {
    for cast in casts {
        within(settings(), move |world| {
            world.past_stack(true)?;
            work(world, cast)
        })?;
    }
    Ok(())
}

/// `inner` on its way from the other node to this one.
fn tunnelled(vni: u32, inner: &Packet) -> Packet {
    let [nodes, _] = casts();
    let mut payload = vec![8, 0, 0, 0];
    payload.extend((vni << 8).to_be_bytes());
    payload.extend(inner.bytes());
    let mut outer = udp((nodes.other_node, 40000), (nodes.node, PORT)).payload(&payload);
    if let super::frame::Layer4::Udp { has_checksum, .. } = &mut outer.layer4 {
        *has_checksum = false;
    }
    // The device's own, as BPF_PROG_TEST_RUN's has it: for nobody else.
    outer.macs.0 = [0; 6];
    outer
}

/// What the pod gets of it: the inner packet behind the outer Ethernet header.
fn taken_off(outer: &Packet, inner: &Packet) -> Vec<u8> {
    Packet { macs: outer.macs, ..inner.clone() }.bytes()
}

/// A running flow of each protocol from the remote pod to b, and its next packet.
fn running_flows(world: &mut World, cast: Cast) -> Result<Vec<Packet>> {
    let (from, to) = ((cast.remote, 40000), (cast.b, 80));
    let [nodes, _] = casts();
    world.address(cast.remote, R, 0, 1, Some(nodes.other_node))?;
    let arrival = Arrival { tunnel: Some((Some(nodes.other_node), R)), ..Arrival::default() };
    for first in [tcp(from, to, SYN), udp(from, to)] {
        ensure!(world.send_as("from_overlay", &first, arrival)?.action == REDIRECT);
    }
    Ok(vec![tcp(from, to, ACK).payload(b"GET / HTTP/1.1"), udp(from, to)])
}

fn packets(world: &World) -> Result<u64> {
    Ok(world.connections(0)?.iter().map(|(_, flow)| flow.packets[0] + flow.packets[1]).sum())
}

#[test]
fn running_flows_leave_the_tunnel_where_they_come_in() -> Result<()> {
    require_lab!();
    past_the_stack(casts_taken_off(), |world, cast| {
        for inner in running_flows(world, cast)? {
            let before = packets(world)?;
            let outer = tunnelled(R, &inner);
            let outcome = world.send("from_network", &outer)?;
            ensure!(outcome.action == REDIRECT, "{outcome:?}");
            ensure!(outcome.frame == taken_off(&outer, &inner), "{:02x?}", outcome.frame);
            assert_eq!(outcome.counted, [(0, INGRESS as u8)]);
            assert_eq!(packets(world)?, before + 1);
        }
        Ok(())
    })
}

#[test]
fn what_is_not_plain_comes_by_the_device() -> Result<()> {
    require_lab!();
    for cast in casts() {
        within(settings(), move |world| {
            let inners = running_flows(world, cast)?;
            let inner = inners[0].clone();
            let (from, to) = ((cast.remote, 40000), (cast.b, 80));
            let outer = tunnelled(R, &inner);
            let changed = |at: usize, byte: u8| {
                let mut frame = outer.bytes();
                frame[at] = byte;
                frame
            };
            let with = |change: fn(&mut Packet)| {
                let mut outer = outer.clone();
                change(&mut outer);
                outer.bytes()
            };
            let [nodes, _] = casts();
            let mut rows = vec![
                ("a SYN", tunnelled(R, &tcp(from, to, SYN)).bytes()),
                ("an RST", tunnelled(R, &tcp(from, to, RST)).bytes()),
                ("a flow that nobody knows", tunnelled(R, &tcp((cast.remote, 7), to, ACK)).bytes()),
                ("no identity", tunnelled(0, &inner).bytes()),
                ("an identity that nobody may have", tunnelled(100, &inner).bytes()),
                ("another version of VXLAN", changed(42, 0)),
                (
                    "a checksum",
                    with(|outer| {
                        *outer = udp((outer.source, 4), (outer.destination, PORT)).payload(&outer.payload)
                    }),
                ),
                ("another port", changed(37, 1)),
                ("congestion", changed(15, 3)),
                ("options", with(|outer| outer.options = vec![1; 4])),
                ("a fragment", with(|outer| outer.fragment = Some((1, 0, true)))),
                ("another node's", changed(33, 9)),
                ("another machine's frame", changed(0, 2)),
                ("from ourselves", with(|outer| outer.source = outer.destination)),
                ("from a node that has not the pod", with(|outer| outer.source = casts()[0].third_node)),
                ("from outside", with(|outer| outer.source = "198.51.100.9".parse().expect("an address"))),
                ("cut off", outer.bytes()[..90].to_vec()),
            ];
            ensure!(nodes.node == outer.destination);
            rows.push(("an echo", tunnelled(R, &super::frame::echo(cast.remote, cast.b, 7)).bytes()));
            let before = packets(world)?;
            for (what, frame) in &rows {
                for is_direct in [true, false] {
                    world.past_stack(is_direct)?;
                    let outcome = world.send_bytes("from_network", frame, Arrival::default())?;
                    ensure!(outcome.action == PASS && outcome.frame == *frame, "{what}: {outcome:?}");
                }
            }
            // Plain, but it may not.
            let outcome = world.send("from_network", &outer)?;
            ensure!(outcome.action == PASS && outcome.frame == outer.bytes(), "{outcome:?}");
            world.past_stack(true)?;
            let tagged = Arrival { vlan: 7, ..Arrival::default() };
            ensure!(world.send_as("from_network", &outer, tagged)?.action == PASS);
            // Judged again: by whoever sees all of it.
            world.raise_address_epoch()?;
            ensure!(world.send("from_network", &outer)?.action == PASS);
            assert_eq!(packets(world)?, before);
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn nothing_overtakes_a_merged_packet() -> Result<()> {
    require_lab!();
    past_the_stack(casts_taken_off(), |world, cast| {
        let [tcp, udp] = running_flows(world, cast)?.try_into().expect("two flows");
        let (outer, other) = (tunnelled(R, &tcp), tunnelled(R, &udp));
        sleep(QUEUE);
        ensure!(world.send("from_network", &outer)?.action == REDIRECT);
        let merged = Arrival { gso_size: 100, ..Arrival::default() };
        // A machine that does something else in between may need longer than a packet waits.
        let is_behind = (0..50).any(|_| {
            let merged = world.send_as("from_network", &outer, merged);
            let next = world.send("from_network", &outer);
            matches!((merged, next), (Ok(merged), Ok(next)) if merged.action == PASS && next.action == PASS)
        });
        ensure!(is_behind, "it overtook");
        ensure!(world.send("from_network", &other)?.action == REDIRECT, "another flow waits, too");
        sleep(QUEUE);
        ensure!(world.send("from_network", &outer)?.action == REDIRECT, "it waits for ever");
        Ok(())
    })
}

/// A device with this node's address, and a way to the other node.
fn connect(mtu: u32) -> Result<()> {
    network::connect(&casts()[0], mtu)
}

/// Checks the outer headers around `inner`, whose TOS, or traffic class, bears `ecn`.
fn check_outer(frame: &[u8], inner: &[u8], vni: u32, ecn: u8) -> Result<()> {
    let [nodes, _] = casts();
    let octets = |address: IpAddr| match address {
        IpAddr::V4(address) => address.octets(),
        IpAddr::V6(_) => unreachable!("nodes are reached by IPv4"),
    };
    let (ip, udp, vxlan) = (&frame[14..34], &frame[34..42], &frame[42..50]);
    let length = (frame.len() - 14) as u16;
    ensure!(ip[..2] == [0x45, ecn], "{ip:02x?}");
    ensure!(ip[2..4] == length.to_be_bytes() && ip[6..10] == [0, 0, 64, 17], "{ip:02x?}");
    ensure!(checksum(ip, 0) == 0, "the checksum is wrong: {ip:02x?}");
    ensure!(ip[12..16] == octets(nodes.node) && ip[16..20] == octets(nodes.other_node), "{ip:02x?}");
    let source = u16::from_be_bytes([udp[0], udp[1]]);
    ensure!((32768..61000).contains(&source) && udp[2..4] == PORT.to_be_bytes(), "{udp:02x?}");
    ensure!(udp[4..6] == (length - 20).to_be_bytes() && udp[6..8] == [0, 0], "{udp:02x?}");
    ensure!(vxlan[..4] == [8, 0, 0, 0] && vxlan[4..8] == (vni << 8).to_be_bytes(), "{vxlan:02x?}");
    ensure!(frame[OUTER..] == *inner, "the inner frame changed: {frame:02x?}");
    Ok(())
}

#[test]
fn what_pods_send_to_other_nodes_gets_its_outer_headers_at_once() -> Result<()> {
    require_lab!();
    past_the_stack(casts(), |world, cast| {
        let [nodes, _] = casts();
        world.address(cast.remote, R, 0, 1, Some(nodes.other_node))?;
        let (from, to) = ((cast.a, 40000), (cast.remote, 80));
        let inner = tcp(from, to, SYN).by(1);
        // No way there: the device says so.
        let outcome = world.send("from_pod", &inner)?;
        ensure!(outcome.action == REDIRECT && outcome.frame == passed_on(&inner.bytes()), "{outcome:?}");
        connect(1500)?;
        for (sent, expected) in [(0, 0), (1, 1), (2, 2), (3, 2)] {
            for inner in [tcp(from, to, ACK).by(1), udp(from, to).by(1)] {
                let mut inner = inner.bytes();
                inner[15] = if cast.a.is_ipv4() { sent } else { sent << 4 };
                let outcome = world.send_bytes("from_pod", &inner, Arrival::default())?;
                ensure!(outcome.action == REDIRECT && outcome.mark == MARK, "{outcome:?}");
                assert_eq!(outcome.counted, [(0, EGRESS as u8)]);
                check_outer(&outcome.frame, &passed_on(&inner), A, expected)?;
            }
        }
        // Not where it may not.
        world.past_stack(false)?;
        let outcome = world.send("from_pod", &inner)?;
        ensure!(outcome.action == REDIRECT && outcome.frame == passed_on(&inner.bytes()), "{outcome:?}");
        Ok(())
    })
}

#[test]
fn what_the_way_is_too_narrow_for_goes_by_the_device() -> Result<()> {
    require_lab!();
    past_the_stack(casts(), |world, cast| {
        let [nodes, _] = casts();
        world.address(cast.remote, R, 0, 1, Some(nodes.other_node))?;
        connect(1400)?;
        let header = if cast.a.is_ipv4() { 20 } else { 40 };
        for (total, is_direct) in [(1350, true), (1351, false)] {
            let payload = vec![7; total - header - 8];
            let inner = udp((cast.a, 5), (cast.remote, 53)).payload(&payload).by(1);
            let outcome = world.send("from_pod", &inner)?;
            let length = inner.bytes().len() + if is_direct { OUTER } else { 0 };
            ensure!(outcome.action == REDIRECT && outcome.frame.len() == length, "{total}: {outcome:?}");
        }
        Ok(())
    })
}
