//! Who a packet is from: what its address says, by the way it came.

use std::net::IpAddr;
use std::os::fd::AsFd;

use anyhow::{Context, Result, ensure};
use libbpf_rs::{TC_EGRESS, TcHook};
use weir::datapath::Settings;
use weir::datapath::types::{address_flags, prefix_flags};

use super::frame::{ACK, Packet, SYN, icmp, solicitation, tcp, udp, unreachable};
use super::network::{connect, set_forwarding};
use super::world::{
    A, Arrival, B, EGRESS, INGRESS, OUTSIDE, PASS, REDIRECT, SHOT, World, casts, in_both_families,
    in_both_families_with, settings, within,
};
use crate::require::require_lab;

const REMOTE_NODE: u32 = 6;
const HOST: u32 = 1;
/// Nobody else's identity.
const OTHER: u32 = 399;

fn from_stack() -> Arrival {
    Arrival { is_from_stack: true, ..Arrival::default() }
}

fn by_tunnel(node: IpAddr, vni: u32) -> Arrival {
    Arrival { tunnel: Some((Some(node), vni)), ..Arrival::default() }
}

/// Sends; the action must be `action`, and the sender of the flow that begins `identity`.
fn is_judged_as(
    world: &mut World,
    program: &str,
    (packet, arrival): (&Packet, Arrival),
    action: u32,
    identity: u32,
) -> Result<()> {
    let outcome = world.send_as(program, packet, arrival)?;
    ensure!(outcome.action == action, "{program}: {outcome:?}");
    let event = outcome.events.first().map(|event| event.source_identity);
    ensure!(event == Some(identity), "{program}: {:?}", outcome.events);
    Ok(())
}

#[test]
fn whom_a_node_forwards_for_is_the_world_by_the_tunnel_too() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        world.enforce(2, &[INGRESS])?;
        world.allow(2, INGRESS, REMOTE_NODE, (17, 53))?;
        let (stranger, pod) = ((cast.world, 5), (cast.b, 53));
        // Whatever its node says of it.
        for vni in [HOST, OUTSIDE, REMOTE_NODE] {
            let packet = (&udp(stranger, pod), by_tunnel(cast.other_node, vni));
            is_judged_as(world, "from_overlay", packet, SHOT, OUTSIDE)?;
        }
        world.allow(2, INGRESS, OUTSIDE, (17, 53))?;
        let packet = (&udp(stranger, pod), by_tunnel(cast.other_node, OUTSIDE));
        is_judged_as(world, "from_overlay", packet, REDIRECT, OUTSIDE)?;
        // The answer goes by the stack, and is not masqueraded.
        let answer = world.send("from_pod", &udp(pod, stranger).by(2))?;
        ensure!(answer.action == PASS, "{answer:?}");
        let again =
            world.send_as("from_overlay", &udp(stranger, pod), by_tunnel(cast.other_node, OUTSIDE))?;
        ensure!(again.action == REDIRECT, "{again:?}");
        Ok(())
    })
}

#[test]
fn behind_a_nodes_address_is_the_world_where_the_node_says_so() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        world.enforce(2, &[INGRESS])?;
        world.allow(2, INGRESS, REMOTE_NODE, (17, 53))?;
        let packet = udp((cast.other_node, 5), (cast.b, 53));
        let by = |vni| (&packet, by_tunnel(cast.other_node, vni));
        is_judged_as(world, "from_overlay", by(OUTSIDE), SHOT, OUTSIDE)?;
        is_judged_as(world, "from_overlay", by(REMOTE_NODE), REDIRECT, REMOTE_NODE)
    })
}

#[test]
fn what_the_nodes_nat_sends_to_its_pods_is_judged_as_the_world() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let (node, pod) = ((cast.node, 1234), (cast.a, 80));
        let asked = tcp(node, pod, SYN);
        is_judged_as(world, "to_pod", (&asked, Arrival::default()), PASS, OUTSIDE)?;
        // The answer passes the stack, whose NAT makes another packet of it.
        let answer = world.send("from_pod", &tcp(pod, node, SYN | ACK).by(1))?;
        ensure!(answer.action == PASS, "{answer:?}");
        ensure!(world.send("to_pod", &tcp(node, pod, ACK))?.action == PASS);
        world.forget_flows()?;
        world.enforce(1, &[INGRESS])?;
        is_judged_as(world, "to_pod", (&asked, Arrival::default()), SHOT, OUTSIDE)?;
        // The node itself always may.
        is_judged_as(world, "to_pod", (&asked, from_stack()), PASS, HOST)?;
        // Then its flow is the node's own, and nobody else's.
        let data = tcp(node, pod, ACK).payload(b"forwarded");
        is_judged_as(world, "to_pod", (&data, Arrival::default()), SHOT, OUTSIDE)
    })
}

/// Runs to_pod on what leaves by the device.
fn attach_to_pod(world: &World, ifindex: u32) -> Result<()> {
    let program = world.datapath.program("to_pod")?;
    let mut hook = TcHook::new(program.as_fd());
    hook.ifindex(ifindex.try_into()?).attach_point(TC_EGRESS).handle(1).priority(1);
    hook.create().context("adding clsact")?;
    hook.attach().context("attaching to_pod")?;
    Ok(())
}

/// IPv6 packets that the node forwards lose their device when it cuts them again.
#[test]
fn what_came_by_no_device_and_is_of_no_socket_is_not_the_hosts() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        connect(&cast, 1500)?;
        let ifindex = nix::net::if_::if_nametoindex("uplink")?;
        attach_to_pod(world, ifindex)?;
        world.change_endpoint(1, |row| row.ifindex = ifindex)?;
        let packet = udp((cast.world, 5), (cast.a, 53));
        assert_eq!(world.send_without_socket(ifindex, &packet)?, [(0, INGRESS as u8)]);
        world.forget_flows()?;
        world.enforce(1, &[INGRESS])?;
        assert_eq!(world.send_without_socket(ifindex, &packet)?, [(133, INGRESS as u8)]);
        // Nor under the node's own address.
        let packet = udp((cast.node, 5), (cast.a, 53));
        assert_eq!(world.send_without_socket(ifindex, &packet)?, [(133, INGRESS as u8)]);
        Ok(())
    })
}

#[test]
fn what_the_node_translates_of_a_pods_packet_stays_that_pods() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        world.enforce(1, &[INGRESS])?;
        let (client, server) = ((cast.b, 40000), (cast.a, 80));
        let asked = tcp(client, server, SYN);
        is_judged_as(world, "to_pod", (&asked, Arrival::default()), SHOT, B)?;
        world.allow(1, INGRESS, B, (6, 80))?;
        is_judged_as(world, "to_pod", (&asked, Arrival::default()), PASS, B)?;
        // Not straight to the client, who has asked another address.
        let answer = world.send("from_pod", &tcp(server, client, SYN | ACK).by(1))?;
        ensure!(answer.action == PASS, "{answer:?}");
        Ok(())
    })
}

#[test]
fn what_a_pod_asked_the_node_is_answered_by_whomever_the_node_asks() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        world.enforce(1, &[INGRESS])?;
        let (pod, node) = ((cast.a, 40000), (cast.node, 30080));
        ensure!(world.send("from_pod", &tcp(pod, node, SYN).by(1))?.action == PASS);
        let answer = world.send("to_pod", &tcp(node, pod, SYN | ACK))?;
        ensure!(answer.action == PASS, "{answer:?}");
        Ok(())
    })
}

#[test]
fn the_host_stays_the_host_at_addresses_that_nobody_lists() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        world.enforce(1, &[INGRESS])?;
        let unlisted: IpAddr = if cast.a.is_ipv4() { "172.17.0.1" } else { "fd17::1" }.parse()?;
        for host in [unlisted, cast.node] {
            let (host, pod) = ((host, 5000), (cast.a, 80));
            is_judged_as(world, "to_pod", (&udp(host, pod), from_stack()), PASS, HOST)?;
            world.raise_address_epoch()?;
            let answer = world.send("from_pod", &udp(pod, host).by(1))?;
            ensure!(answer.action == PASS, "{answer:?}");
            ensure!(world.connections(0)?.iter().all(|(_, flow)| flow.identity == [HOST, A]));
        }
        // Another's answer is judged as ever.
        world.address(unlisted, OTHER, 0, address_flags::ADDRESS_POD.0 as u16, Some(cast.other_node))?;
        world.raise_address_epoch()?;
        let answer = world.send("from_pod", &udp((cast.a, 80), (unlisted, 5000)).by(1))?;
        ensure!(answer.action == SHOT, "{answer:?}");
        Ok(())
    })
}

#[test]
fn a_pod_is_itself_before_its_address_is_known() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let sends = |world: &mut World, port, identity| {
            world.raise_address_epoch()?;
            let packet = udp((cast.a, port), (cast.b, 53)).by(1);
            is_judged_as(world, "from_pod", (&packet, Arrival::default()), REDIRECT, identity)
        };
        world.forget_address(cast.a)?;
        sends(world, 1, A)?;
        // Or while it is still somebody else's.
        world.address(cast.a, OTHER, 0, address_flags::ADDRESS_POD.0 as u16, Some(cast.other_node))?;
        sends(world, 2, A)?;
        // A number of this node's own, for what prefixes of rules cover, is in that row alone.
        world.address(cast.a, 0x100_0001, 1, 0b101, None)?;
        sends(world, 3, 0x100_0001)
    })
}

#[test]
fn the_nodes_own_neighbour_discovery_reaches_pods() -> Result<()> {
    require_lab!();
    within(settings(), |world| {
        let [_, cast] = casts();
        let (IpAddr::V6(node), IpAddr::V6(pod)) = (cast.node, cast.a) else { unreachable!("IPv6") };
        let mut report = icmp(cast.node, "ff02::16".parse()?, 143, 0).payload(&[0; 20]);
        report.ttl = 1;
        for packet in [solicitation(node, pod), report] {
            let outcome = world.send_as("to_pod", &packet, from_stack())?;
            ensure!(outcome.action == PASS && outcome.counted.is_empty(), "{outcome:?}");
        }
        // What is for the node's own stack stays the stack's.
        let outcome =
            world.send("from_network", &icmp(cast.other_node, cast.node, 135, 0).payload(&[0; 16]))?;
        ensure!(outcome.action == PASS && outcome.counted.is_empty(), "{outcome:?}");
        Ok(())
    })
}

#[test]
fn guarded_destinations_are_the_stacks_in_both_directions() -> Result<()> {
    require_lab!();
    for cast in casts() {
        within(settings(), move |world| {
            connect(&cast, 1500)?;
            set_forwarding()?;
            std::process::Command::new("ip")
                .args(["route", "add", &cast.world.to_string(), "via", &cast.other_node.to_string()])
                .status()?;
            world.past_stack(true)?;
            let (pod, server) = ((cast.a, 40000), (cast.world, 80));
            let asks = tcp(pod, server, SYN).by(1);
            ensure!(world.send("from_pod", &asks)?.action == REDIRECT, "it passes the stack");
            world.forget_flows()?;
            world.prefix((cast.world, 128), prefix_flags::PREFIX_GUARDED, None)?;
            for _ in 0..2 {
                let outcome = world.send("from_pod", &asks)?;
                ensure!(outcome.action == PASS && outcome.mark == 0, "{outcome:?}");
            }
            // The answer passes the stack, too.
            let answer = world.send("from_network", &tcp(server, pod, SYN | ACK))?;
            ensure!(answer.action == PASS, "{answer:?}");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn bypass_4_frames_with_a_tag_and_frames_for_others_are_not_taken() -> Result<()> {
    require_lab!();
    for tunnel_ifindex in [Some(1), None] {
        in_both_families_with(Settings { tunnel_ifindex, ..settings() }, |world, cast| {
            let (client, pod) = ((cast.world, 40000), (cast.a, 80));
            let tagged = Arrival { vlan: 5, ..Arrival::default() };
            let others = Arrival { is_for_another_machine: true, ..Arrival::default() };
            for flags in [SYN, ACK] {
                let packet = tcp(client, pod, flags);
                for arrival in [tagged, others] {
                    let outcome = world.send_as("from_network", &packet, arrival)?;
                    ensure!(outcome.action == PASS && outcome.counted.is_empty(), "{outcome:?}");
                }
                ensure!(world.send("from_network", &packet)?.action == REDIRECT);
            }
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn an_error_from_the_stack_about_what_a_pod_asked_the_node_arrives() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        world.enforce(1, &[INGRESS])?;
        let asked = udp((cast.a, 40000), (cast.node, 30080));
        ensure!(world.send("from_pod", &asked.clone().by(1))?.action == PASS);
        // Also about what the node has forwarded.
        for arrival in [from_stack(), Arrival::default()] {
            let outcome = world.send_as("to_pod", &unreachable(cast.node, &asked), arrival)?;
            ensure!(outcome.action == PASS, "{outcome:?}");
        }
        Ok(())
    })
}

#[test]
fn egress_to_the_node_by_any_of_its_addresses_is_egress_to_the_host() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        world.enforce(1, &[EGRESS])?;
        world.allow(1, EGRESS, OUTSIDE, (0, 0))?;
        let vip = (cast.world, 10250);
        let asks = |port| tcp((cast.a, port), vip, SYN).by(1);
        ensure!(world.send("from_pod", &asks(1))?.action == PASS);
        let flags = address_flags::ADDRESS_NODE.0 | address_flags::ADDRESS_LOCAL.0;
        world.address(cast.world, HOST, 0, flags as u16, None)?;
        world.raise_address_epoch()?;
        for port in [1, 2] {
            let outcome = world.send("from_pod", &asks(port))?;
            ensure!(outcome.action == SHOT && outcome.counted == [(133, EGRESS as u8)], "{outcome:?}");
        }
        Ok(())
    })
}
