//! Beyond the node: masquerade, tunnels, direct routes.

use std::net::IpAddr;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use weir::datapath::Settings;

use super::frame::{ACK, FIN, Packet, SYN, echo, echo_reply, quoting, tcp, udp, unreachable};
use super::world::{
    Arrival, Cast, EGRESS, INGRESS, MARK, PASS, R, REDIRECT, SHOT, World, casts, in_both_families, settings,
    within,
};
use crate::lab::wait_for;
use crate::require::require_lab;

fn native() -> Settings {
    Settings { tunnel_ifindex: None, ..settings() }
}

/// Sends through a program; what comes out must be `expected`, byte by byte.
fn becomes(world: &mut World, program: &str, packet: &Packet, action: u32, expected: &Packet) -> Result<()> {
    let outcome = world.send(program, packet)?;
    ensure!(outcome.action == action, "{} by {program}: {:?}", outcome.action, outcome.counted);
    let expected = Packet { macs: packet.macs, ..expected.clone() }.bytes();
    ensure!(outcome.frame == expected, "came out  {:02x?}\nexpected {expected:02x?}", outcome.frame);
    Ok(())
}

/// The source port, or identifier, that a packet leaves the node with.
fn leaves_by(world: &mut World, packet: &Packet) -> Result<u16> {
    let outcome = world.send("to_network", packet)?;
    ensure!(outcome.action == PASS, "counted {:?}", outcome.counted);
    let layer4 = if packet.source.is_ipv4() { 34 } else { 54 };
    let protocol = outcome.frame[if packet.source.is_ipv4() { 23 } else { 20 }];
    let offset = layer4 + if matches!(protocol, 1 | 58) { 4 } else { 0 };
    Ok(u16::from_be_bytes([outcome.frame[offset], outcome.frame[offset + 1]]))
}

#[test]
fn what_leaves_the_cluster_bears_the_nodes_address_and_finds_back() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        type Make = fn((IpAddr, u16), (IpAddr, u16)) -> Packet;
        let questions: [(Make, Make); 3] = [
            (|from, to| tcp(from, to, SYN), |from, to| tcp(from, to, SYN | ACK)),
            (udp, udp),
            (|from, to| echo(from.0, to.0, from.1), |from, to| echo_reply(from.0, to.0, to.1)),
        ];
        for (question, answer) in questions {
            world.forget_flows()?;
            let (pod, world_end) = ((cast.a, 40000), (cast.world, 53));
            ensure!(world.send("from_pod", &question(pod, world_end).by(1))?.action == PASS);
            let port = leaves_by(world, &question(pod, world_end))?;
            ensure!((20000..=20003).contains(&port), "the port is {port}");
            let node = (cast.node, port);
            becomes(world, "to_network", &question(pod, world_end), PASS, &question(node, world_end))?;
            becomes(world, "from_network", &answer(world_end, node), REDIRECT, &answer(world_end, pod))?;
            // From anywhere else that port is nobody's.
            let stranger = (cast.other_node, 53);
            becomes(world, "from_network", &answer(stranger, node), PASS, &answer(stranger, node))?;
        }
        Ok(())
    })
}

#[test]
fn each_flow_has_a_port_of_its_own_and_keeps_it() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let mut ports = Vec::new();
        for source in 0..4 {
            let packet = udp((cast.a, 7000 + source), (cast.world, 53));
            let port = leaves_by(world, &packet)?;
            assert_eq!(leaves_by(world, &packet)?, port);
            ports.push(port);
        }
        ports.sort_unstable();
        assert_eq!(ports, [20000, 20001, 20002, 20003]);
        // Towards another remote end they are all free again.
        leaves_by(world, &udp((cast.a, 7009), (cast.world, 54)))?;
        Ok(())
    })
}

#[test]
fn the_nodes_own_packets_are_left_alone() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let out = tcp((cast.node, 20001), (cast.world, 443), SYN);
        becomes(world, "to_network", &out, PASS, &out)?;
        for port in [22, 20001] {
            let back = tcp((cast.world, 443), (cast.node, port), ACK);
            becomes(world, "from_network", &back, PASS, &back)?;
        }
        let tunnel = udp((cast.other_node, 50000), (cast.node, 8472));
        becomes(world, "from_network", &tunnel, PASS, &tunnel)?;
        let error = unreachable(cast.world, &out);
        becomes(world, "from_network", &error, PASS, &error)?;
        assert_eq!(world.connections(0)?.len(), 0);
        Ok(())
    })
}

#[test]
fn the_cluster_is_not_masqueraded() -> Result<()> {
    require_lab!();
    for cast in casts() {
        for (settings, is_native) in [(settings(), false), (native(), true)] {
            within(settings, move |world| {
                let to_pod = udp((cast.a, 5), (cast.remote, 53));
                // What from_pod sends leaves by the tunnel, or marked: this packet has missed the tunnel.
                becomes(world, "to_network", &to_pod, if is_native { PASS } else { SHOT }, &to_pod)?;
                let to_node = udp((cast.a, 5), (cast.other_node, 53));
                let outcome = world.send("to_network", &to_node)?;
                ensure!((outcome.frame == to_node.bytes()) == is_native, "{outcome:?}");
                Ok(())
            })?;
        }
    }
    Ok(())
}

#[test]
fn a_masqueraded_connection_that_has_ended_is_found_by_late_packets() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let (pod, outside) = ((cast.a, 40000), (cast.world, 443));
        let mut node = None;
        for (flags, answer) in [(SYN, SYN | ACK), (FIN | ACK, FIN | ACK)] {
            ensure!(world.send("from_pod", &tcp(pod, outside, flags).by(1))?.action == PASS);
            let port = leaves_by(world, &tcp(pod, outside, flags))?;
            let to = *node.insert((cast.node, port));
            becomes(world, "from_network", &tcp(outside, to, answer), REDIRECT, &tcp(outside, pod, answer))?;
        }
        let node = node.context("it went out")?;
        let last = world.send("from_pod", &tcp(pod, outside, ACK).by(1))?;
        ensure!(last.action == PASS && world.connections(0)?.is_empty(), "{last:?}");
        // Its port stays its own while its packets may come, however long it ran.
        assert_eq!(world.collect_garbage()?.0.nat, 0);
        let (late, arrives) = (tcp(outside, node, FIN | ACK), tcp(outside, pod, FIN | ACK));
        becomes(world, "from_network", &late, REDIRECT, &arrives)?;
        // And is free when they would have come by now.
        world.change_mappings(|row| row.last_seen_jiffies -= 1_000_000)?;
        world.change_connections(|_, row| row.last_seen_jiffies -= 1_000_000)?;
        world.change_ended(|row| row.connection.last_seen_jiffies -= 1_000_000)?;
        let (report, _) = world.collect_garbage()?;
        assert_eq!((report.connections, report.nat), (1, 2));
        becomes(world, "from_network", &late, PASS, &late)?;
        Ok(())
    })
}

#[test]
fn errors_about_masqueraded_flows_find_back() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let (pod, outside) = ((cast.a, 40000), (cast.world, 53));
        ensure!(world.send("from_pod", &udp(pod, outside).by(1))?.action == PASS);
        let node = (cast.node, leaves_by(world, &udp(pod, outside))?);

        // A router on the way, quoting what left the node.
        let router = cast.other_node;
        let quoted = udp(node, outside);
        let arrives = quoting(&unreachable(cast.world, &udp(pod, outside)), &quoted);
        becomes(world, "from_network", &unreachable(cast.world, &quoted), REDIRECT, &arrives)?;
        let about_another = udp((cast.node, node.1 ^ 1), outside);
        let error = unreachable(router, &about_another);
        becomes(world, "from_network", &error, PASS, &error)?;

        // The pod, quoting what reached it.
        let answer = udp(outside, pod);
        let error = unreachable(cast.a, &answer);
        ensure!(world.send("from_pod", &error.clone().by(1))?.action == PASS);
        let leaves = quoting(&unreachable(cast.node, &udp(outside, node)), &answer);
        becomes(world, "to_network", &error, PASS, &leaves)?;
        Ok(())
    })
}

#[test]
fn other_nodes_pods_come_by_the_tunnel_with_their_identity() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        world.enforce(2, &[INGRESS])?;
        world.allow(2, INGRESS, R, (17, 80))?;
        let known = udp((cast.remote, 1000), (cast.b, 80));
        let unknown = udp((cast.nobody, 1000), (cast.b, 80));
        let by = |vni| Arrival { tunnel: Some((Some(cast.other_node), vni)), ..Arrival::default() };
        // Our own table decides; the sender's word counts only where it says nothing.
        for (packet, vni, identity, action) in [
            (&known, R, R, REDIRECT),
            (&known, 999, R, REDIRECT),
            (&unknown, R, R, REDIRECT),
            (&unknown, 999, 999, SHOT),
            (&unknown, 1, 6, SHOT),
        ] {
            world.forget_flows()?;
            let outcome = world.send_as("from_overlay", packet, by(vni))?;
            ensure!(outcome.action == action, "VNI {vni}: {outcome:?}");
            assert_eq!(outcome.events[0].source_identity, identity);
        }
        Ok(())
    })
}

#[test]
fn what_the_tunnel_has_for_the_node_is_its_stacks() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let by_tunnel = Arrival { tunnel: Some((Some(cast.other_node), R)), ..Arrival::default() };
        let asked = tcp((cast.node, 40000), (cast.remote, 80), SYN);
        for packet in [
            tcp((cast.remote, 80), (cast.node, 40000), SYN | ACK),
            echo_reply(cast.remote, cast.node, 5),
            unreachable(cast.remote, &asked),
        ] {
            let outcome = world.send_as("from_overlay", &packet, by_tunnel)?;
            ensure!(outcome.action == PASS && outcome.frame == packet.bytes(), "{outcome:?}");
        }
        assert_eq!(world.connections(0)?.len(), 0);
        Ok(())
    })
}

#[test]
fn packets_for_other_nodes_pods_go_by_the_tunnel() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        for _ in 0..2 {
            let outcome = world.send("from_pod", &udp((cast.a, 5), (cast.remote, 53)).by(1))?;
            ensure!(outcome.action == REDIRECT && outcome.mark == MARK, "{outcome:?}");
        }
        // to_overlay has nothing to add, and takes the mark off.
        let marked = Arrival { mark: MARK, ..Arrival::default() };
        let outcome = world.send_as("to_overlay", &udp((cast.a, 5), (cast.remote, 53)), marked)?;
        ensure!(outcome.action == PASS && outcome.mark == 0, "{outcome:?}");
        let outcome = world.send("to_overlay", &udp((cast.node, 5), (cast.remote, 53)))?;
        ensure!(outcome.action == PASS && outcome.counted == [(0, EGRESS as u8)], "{outcome:?}");
        // The answer to a tunnelled packet comes by the tunnel, too.
        let answer = udp((cast.remote, 53), (cast.a, 5));
        ensure!(world.send("from_network", &answer)?.action == SHOT);
        let by_tunnel = Arrival { tunnel: Some((Some(cast.other_node), R)), ..Arrival::default() };
        ensure!(world.send_as("from_overlay", &answer, by_tunnel)?.action == REDIRECT);
        assert_eq!(world.connections(0)?[0].1.packets, [2, 1]);
        Ok(())
    })
}

#[test]
fn native_routing_needs_a_route() -> Result<()> {
    require_lab!();
    for cast in casts() {
        within(native(), move |world| {
            let packet = udp((cast.a, 5), (cast.remote, 53)).by(1);
            let outcome = world.send("from_pod", &packet)?;
            ensure!(outcome.action == SHOT && outcome.counted == [(169, EGRESS as u8)], "{outcome:?}");
            connect(&cast, 1500)?;
            change_route("add", &cast)?;
            let outcome = world.send("from_pod", &packet)?;
            ensure!(outcome.action == REDIRECT && outcome.mark == MARK, "{outcome:?}");
            // to_network does not look at it again.
            let marked = Arrival { mark: MARK, ..Arrival::default() };
            let outcome = world.send_as("to_network", &packet, marked)?;
            ensure!(outcome.action == PASS && outcome.counted.is_empty(), "{outcome:?}");
            let answer = udp((cast.remote, 53), (cast.a, 5));
            becomes(world, "from_network", &answer, REDIRECT, &answer)?;
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn what_a_pod_asks_outside_is_masqueraded_past_the_stack_too() -> Result<()> {
    require_lab!();
    for cast in casts() {
        // The two ends of the link that `connect` makes.
        within(settings(), move |world| {
            connect(&cast, 1500)?;
            ip(&format!("route add {} via {}", cast.world, cast.other_node))?;
            world.past_stack(true)?;
            let (pod, outside) = ((cast.a, 5), (cast.world, 53));
            let outcome = world.send("from_pod", &udp(pod, outside).by(1))?;
            ensure!(outcome.action == REDIRECT && outcome.mark == 0, "{outcome:?}");
            leaves_by(world, &udp(pod, outside))?;
            // Who asks the pod by its own address is answered by it.
            let (asker, server) = ((cast.world, 40000), (cast.a, 80));
            world.send("from_network", &udp(asker, server))?;
            let outcome = world.send("from_pod", &udp(server, asker).by(1))?;
            ensure!(outcome.action == REDIRECT && outcome.mark == MARK, "{outcome:?}");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_running_flow_to_another_node_leaves_while_it_may() -> Result<()> {
    require_lab!();
    for cast in casts() {
        within(native(), move |world| {
            connect(&cast, 1500)?;
            change_route("add", &cast)?;
            let (pod, peer) = ((cast.a, 40000), (cast.remote, 80));
            let asks = tcp(pod, peer, ACK).payload(b"more").by(1);
            let leaves = |world: &mut World| -> Result<()> {
                let passed_on = Packet { ttl: asks.ttl - 1, ..asks.clone() };
                becomes(world, "from_pod", &asks, REDIRECT, &passed_on)?;
                let outcome = world.send("from_pod", &asks)?;
                ensure!(outcome.mark == MARK && outcome.counted == [(0, EGRESS as u8)], "{outcome:?}");
                Ok(())
            };
            ensure!(world.send("from_pod", &tcp(pod, peer, SYN).by(1))?.action == REDIRECT);
            leaves(world)?;
            assert_eq!(world.connections(0)?[0].1.packets, [3, 0]);

            world.enforce(1, &[EGRESS])?;
            let outcome = world.send("from_pod", &asks)?;
            ensure!(outcome.action == SHOT && outcome.counted == [(133, EGRESS as u8)], "{outcome:?}");
            world.allow(1, EGRESS, R, (6, 80))?;
            leaves(world)?;

            change_route("del", &cast)?;
            // A way that was found serves until the next tick.
            let deadline = Instant::now() + Duration::from_secs(5);
            let outcome = loop {
                let outcome = world.send("from_pod", &asks)?;
                if outcome.action != REDIRECT || Instant::now() > deadline {
                    break outcome;
                }
            };
            ensure!(outcome.action == SHOT && outcome.counted == [(169, EGRESS as u8)], "{outcome:?}");
            change_route("add", &cast)?;
            leaves(world)?;

            world.forget_address(cast.remote)?;
            world.raise_address_epoch()?;
            let outcome = world.send("from_pod", &asks)?;
            ensure!(outcome.action == SHOT, "it goes to a pod that is gone: {outcome:?}");
            Ok(())
        })?;
    }
    Ok(())
}

/// A device with this node's address, and a way to the other node.
pub fn connect(cast: &Cast, mtu: u32) -> Result<()> {
    let (prefix, flags) = if cast.node.is_ipv4() { (24, "") } else { (64, " nodad") };
    for line in [
        "link set lo up",
        &format!("link add uplink mtu {mtu} type veth peer name wire"),
        "link set uplink up",
        "link set wire up",
        &format!("address add {}/{prefix} dev uplink{flags}", cast.node),
    ] {
        ip(line)?;
    }
    set_forwarding()
}

/// Of the other node's pod.
pub fn change_route(verb: &str, cast: &Cast) -> Result<()> {
    ip(&format!("route {verb} {} via {}", cast.remote, cast.other_node))
}

/// Runs `ip LINE`. An address of IPv6 is one of this node only when a work queue of the kernel has written
/// its route (addrconf_dad_work in net/ipv6/addrconf.c), a moment after `ip` has ended.
pub fn ip(line: &str) -> Result<()> {
    let words: Vec<&str> = line.split(' ').collect();
    ensure!(Command::new("ip").args(&words).status()?.success(), "ip {line}");
    if !words.contains(&"nodad") {
        return Ok(());
    }
    let address = words[2].split('/').next().unwrap_or_default();
    wait_for(&format!("the route of {address}"), || {
        let shown = Command::new("ip").args(["-6", "route", "show", "table", "local", address]).output()?;
        Ok(!shown.stdout.is_empty())
    })
}

/// The routing table refuses to be asked on behalf of a device that does not forward.
pub fn set_forwarding() -> Result<()> {
    for name in ["ipv4/conf/all/forwarding", "ipv6/conf/all/forwarding", "ipv4/ip_forward_use_pmtu"] {
        std::fs::write(format!("/proc/sys/net/{name}"), "1")?;
    }
    Ok(())
}

#[test]
fn a_host_port_leads_to_its_pod_and_nothing_else_does() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let (client, host, pod) = ((cast.world, 40000), (cast.node, 8000), (cast.a, 80));
        world.host_port((cast.node, 8000, 6), 50, pod)?;
        let asked = tcp(client, host, SYN);
        becomes(world, "from_network", &asked, REDIRECT, &tcp(client, pod, SYN))?;
        becomes(world, "from_network", &tcp(client, host, ACK), REDIRECT, &tcp(client, pod, ACK))?;
        // Another port, and another protocol, stay the stack's.
        for other in [tcp(client, (cast.node, 8001), SYN), udp(client, host)] {
            becomes(world, "from_network", &other, PASS, &other)?;
        }
        // What a client quotes of the answer names the pod again; without a flow it is nobody's.
        let answer = udp((cast.node, 8000), client);
        let error = unreachable(cast.world, &answer);
        becomes(world, "from_network", &error, PASS, &error)?;
        world.host_port((cast.node, 8000, 17), 51, pod)?;
        let datagram = udp(client, host);
        becomes(world, "from_network", &datagram, REDIRECT, &udp(client, pod))?;
        let arrives = quoting(&unreachable(cast.world, &udp(pod, client)), &answer);
        becomes(world, "from_network", &error, REDIRECT, &arrives)?;
        // Nobody outside reaches a loopback address.
        let loopback: IpAddr = if cast.node.is_ipv4() { "127.0.0.1".parse()? } else { "::1".parse()? };
        world.host_port((loopback, 8000, 6), 52, pod)?;
        for program in ["from_network", "from_pod"] {
            let from = if program == "from_pod" { (cast.b, 40000) } else { client };
            let packet = tcp(from, (loopback, 8000), SYN).by(2);
            let outcome = world.send(program, &packet)?;
            ensure!(outcome.action != REDIRECT && outcome.frame == packet.bytes(), "{program}: {outcome:?}");
        }
        // The pod's policy judges, and sees the client; a denied packet leaves nothing.
        world.forget_flows()?;
        world.enforce(1, &[INGRESS])?;
        let denied = world.send("from_network", &asked)?;
        ensure!(denied.action == SHOT, "{denied:?}");
        assert_eq!(world.connections(0)?.len() + world.connections(1)?.len(), 0);
        Ok(())
    })
}
