//! The walls of encryption on the devices that lead out.

use std::net::IpAddr;

use anyhow::{Result, ensure};
use weir::datapath::Settings;
use weir::datapath::types::{address_flags, prefix_flags};

use super::frame::{Packet, icmp, tcp, udp};
use super::world::{Arrival, Cast, PASS, REDIRECT, SHOT, World, in_both_families_with, settings};
use crate::require::require_lab;

const UNENCRYPTED: u8 = 195;

fn encrypted(routing_is_native: bool) -> Settings {
    let tunnel_ifindex = if routing_is_native { None } else { settings().tunnel_ifindex };
    Settings { tunnel_ifindex, encrypt_ifindex: Some(1), ..settings() }
}

/// The other node has a key; the third one has none.
fn flag(world: &World, cast: &Cast) -> Result<()> {
    let flags = |kind: address_flags| (kind.0 | address_flags::ADDRESS_ENCRYPT.0) as u16;
    world.address(cast.remote, 303, 0, flags(address_flags::ADDRESS_POD), Some(cast.other_node))?;
    world.address(cast.other_node, 6, 0, flags(address_flags::ADDRESS_NODE), Some(cast.other_node))?;
    let (prefix, length): (IpAddr, u32) =
        if cast.a.is_ipv4() { ("10.2.0.0".parse()?, 96 + 16) } else { ("fd02::".parse()?, 16) };
    let flags = prefix_flags(prefix_flags::PREFIX_POD_CIDR.0 | prefix_flags::PREFIX_ENCRYPT.0);
    world.prefix((prefix, length), flags, Some(cast.other_node))
}

/// An address in the other node's pod CIDR that nobody has told of.
fn untold(cast: &Cast) -> Result<IpAddr> {
    Ok(if cast.a.is_ipv4() { "10.2.200.9" } else { "fd02::200:9" }.parse()?)
}

#[test]
fn what_is_for_a_pod_of_a_node_with_a_key_leaves_by_the_device_that_encrypts() -> Result<()> {
    require_lab!();
    for is_native in [true, false] {
        in_both_families_with(encrypted(is_native), |world, cast| {
            flag(world, &cast)?;
            let untold = untold(&cast)?;
            let mut leaves = |packet: &Packet, action: u32, why: &str| -> Result<()> {
                let outcome = world.send("to_network", packet)?;
                ensure!(outcome.action == action, "{why}: {outcome:?}");
                Ok(())
            };
            for (source, why) in
                [(cast.node, "of the node"), (cast.a, "of a pod"), (cast.world, "of anybody")]
            {
                leaves(&tcp((source, 1), (cast.remote, 80), 2), REDIRECT, why)?;
                leaves(&udp((source, 1), (untold, 80)), REDIRECT, &format!("{why}, to an untold pod"))?;
            }
            leaves(&icmp(cast.node, cast.remote, 3, 1).payload(&[0; 28]), REDIRECT, "an ICMP error")?;
            leaves(&udp((cast.a, 1), (cast.other_node, 80)), REDIRECT, "a pod to the node")?;
            leaves(&udp((cast.node, 1), (cast.other_node, 80)), PASS, "node to node")?;
            leaves(&udp((cast.node, 1), (cast.other_node, 51871)), PASS, "WireGuard itself")?;
            leaves(&udp((cast.node, 1), (cast.world, 80)), PASS, "to the world")?;
            leaves(&udp((cast.node, 1), (cast.third_node, 80)), PASS, "to a node without a key")
        })?;
    }
    in_both_families_with(encrypted(false), |world, cast| {
        flag(world, &cast)?;
        let tunnel = udp((cast.node, 40000), (cast.other_node, 8472));
        for packet in [tunnel.clone(), tunnel.clone().fragment(9, 0, true), tunnel.fragment(9, 1480, false)] {
            let own = Arrival { is_from_stack: true, ..Arrival::default() };
            let outcome = world.send_as("to_network", &packet, own)?;
            ensure!(outcome.action == REDIRECT, "a tunnel packet, or a part of one: {outcome:?}");
        }
        Ok(())
    })
}

#[test]
fn what_has_to_be_encrypted_does_not_come_in_plain() -> Result<()> {
    require_lab!();
    for is_native in [true, false] {
        in_both_families_with(encrypted(is_native), |world, cast| {
            flag(world, &cast)?;
            for source in [cast.remote, untold(&cast)?] {
                for packet in [udp((source, 1), (cast.b, 80)), tcp((source, 1), (cast.node, 80), 2)] {
                    let outcome = world.send("from_network", &packet)?;
                    let reasons: Vec<u8> = outcome.counted.iter().map(|(reason, _)| *reason).collect();
                    ensure!(outcome.action == SHOT && reasons == [UNENCRYPTED], "{outcome:?}");
                }
            }
            let outcome = world.send("from_network", &udp((cast.other_node, 1), (cast.node, 80)))?;
            ensure!(outcome.action == PASS, "node to node: {outcome:?}");
            Ok(())
        })?;
    }
    in_both_families_with(encrypted(false), |world, cast| {
        flag(world, &cast)?;
        let tunnel = udp((cast.other_node, 1), (cast.node, 8472));
        let mut packets = vec![tunnel.clone()];
        if !cast.a.is_ipv4() {
            // An empty destination option hides the port from nobody.
            packets.push(tunnel.extension(60, &[0; 6]));
        }
        for packet in packets {
            let outcome = world.send("from_network", &packet)?;
            ensure!(outcome.action == SHOT, "a tunnel packet: {outcome:?}");
            let reasons: Vec<u8> = outcome.counted.iter().map(|(reason, _)| *reason).collect();
            ensure!(reasons == [UNENCRYPTED], "a tunnel packet: {outcome:?}");
        }
        Ok(())
    })
}

#[test]
fn while_a_cluster_changes_plain_packets_come_in() -> Result<()> {
    require_lab!();
    let lenient = Settings { encrypt_strict: false, ..encrypted(true) };
    in_both_families_with(lenient, |world, cast| {
        flag(world, &cast)?;
        let outcome = world.send("from_network", &udp((cast.remote, 1), (cast.b, 80)))?;
        ensure!(outcome.action == REDIRECT, "{outcome:?}");
        let outcome = world.send("to_network", &udp((cast.node, 1), (cast.remote, 80)))?;
        ensure!(outcome.action == REDIRECT, "who has a key hears nothing in plain: {outcome:?}");
        Ok(())
    })
}
