//! The host's policy, packet by packet: every way to the node's own addresses and from them, and what the
//! policy does not speak of.

use std::net::IpAddr;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use weir::datapath::Settings;
use weir::datapath::types::policy_verdict;

use super::frame::{
    ACK, Layer4, Packet, RST, SYN, echo, echo_reply, icmp, solicitation, tcp, udp, unreachable,
};
use super::network::connect;
use super::world::{
    A, Arrival, Cast, EGRESS, INGRESS, OUTSIDE, PASS, R, REDIRECT, SHOT, World, casts, settings, within,
};
use crate::lab::wait_for;
use crate::require::require_lab;

/// Row 0 of `endpoints`.
const HOST: u32 = 0;
const REMOTE_NODE: u32 = 6;
/// No rule, a rule that denies.
const DENIED: [u8; 2] = [133, 181];
const TUNNEL: u16 = 8472;

type Make = fn(&Cast) -> Packet;

/// A packet that the host's policy judges.
struct Judged {
    name: &'static str,
    program: &'static str,
    packet: Make,
    arrival: fn(&Cast) -> Arrival,
    given: fn(&mut World, &Cast) -> Result<()>,
    /// Whom a rule must name, and what.
    peer: u32,
    what: (u8, u16),
}

fn arrives(_: &Cast) -> Arrival {
    Arrival::default()
}

fn by_stack(_: &Cast) -> Arrival {
    Arrival { is_from_stack: true, ..Arrival::default() }
}

fn by_tunnel(cast: &Cast) -> Arrival {
    Arrival { tunnel: Some((Some(cast.other_node), R)), ..Arrival::default() }
}

fn nothing(_: &mut World, _: &Cast) -> Result<()> {
    Ok(())
}

/// The node has its address by a device, and all that the kernel keeps for itself with it.
fn is_connected(_: &mut World, cast: &Cast) -> Result<()> {
    if nix::net::if_::if_nametoindex("uplink").is_ok() {
        return Ok(());
    }
    connect(cast, 1500)?;
    wait_for("the addresses that the device shares", || {
        let family = if cast.node.is_ipv4() { "-4" } else { "-6" };
        let address = shared(cast).to_string();
        let arguments = [family, "route", "show", "table", "local", &address];
        Ok(!Command::new("ip").args(arguments).output()?.stdout.is_empty())
    })
}

/// An address that no device has, and that the node's stack delivers to the node: of everyone in the subnet, of
/// its routers.
fn shared(cast: &Cast) -> IpAddr {
    match cast.node {
        IpAddr::V4(_) => IpAddr::from([192, 0, 2, 255]),
        IpAddr::V6(_) => IpAddr::from([0x2001, 0xdb8, 1, 0, 0, 0, 0, 0]),
    }
}

fn to_all(mut packet: Packet, mac: [u8; 6]) -> Packet {
    packet.macs.0 = mac;
    packet
}

/// The group of every host on the link.
fn everyone(cast: &Cast) -> IpAddr {
    if cast.a.is_ipv4() { IpAddr::from([224, 0, 0, 1]) } else { IpAddr::from([0xff02, 0, 0, 0, 0, 0, 0, 1]) }
}

fn group_mac(cast: &Cast) -> [u8; 6] {
    if cast.a.is_ipv4() { [1, 0, 0x5e, 0, 0, 1] } else { [0x33, 0x33, 0, 0, 0, 1] }
}

fn to_group(cast: &Cast, layer4: Layer4) -> Packet {
    to_all(Packet::new(cast.world, everyone(cast), layer4).payload(&[0; 24]), group_mac(cast))
}

#[rustfmt::skip]
fn ways_in(is_ipv4: bool, is_tunnel: bool) -> Vec<Judged> {
    let row = |name, program, packet: Make, peer, what| {
        Judged { name, program, packet, arrival: arrives, given: nothing, peer, what }
    };
    let ping = if is_ipv4 { (1, 8) } else { (58, 128) };
    let mut rows = vec![
        row("a pod opens a connection to its node", "from_pod", |c| tcp((c.a, 40000), (c.node, 22), SYN).by(1), A, (6, 22)),
        row("a pod sends its node a datagram", "from_pod", |c| udp((c.a, 40000), (c.node, 53)).by(1), A, (17, 53)),
        row("a pod pings its node", "from_pod", |c| echo(c.a, c.node, 7).by(1), A, ping),
        row("another node opens a connection", "from_network", |c| tcp((c.other_node, 40000), (c.node, 10250), SYN), REMOTE_NODE, (6, 10250)),
        row("another node sends a datagram", "from_network", |c| udp((c.other_node, 40000), (c.node, 53)), REMOTE_NODE, (17, 53)),
        row("another node pings", "from_network", |c| echo(c.other_node, c.node, 7), REMOTE_NODE, ping),
        row("somebody outside opens a connection", "from_network", |c| tcp((c.world, 40000), (c.node, 22), SYN), OUTSIDE, (6, 22)),
        row("a SYN with other flags", "from_network", |c| tcp((c.world, 40000), (c.node, 22), SYN | RST), OUTSIDE, (6, 22)),
        row("somebody outside sends a datagram", "from_network", |c| udp((c.world, 40000), (c.node, 53)), OUTSIDE, (17, 53)),
        row("somebody outside pings", "from_network", |c| echo(c.world, c.node, 7), OUTSIDE, ping),
        row("an answer that nobody asked for", "from_network", |c| echo_reply(c.world, c.node, 7), OUTSIDE, ping),
        row("a protocol without ports", "from_network", |c| Packet::new(c.world, c.node, Layer4::Other(47)).payload(&[0; 16]), OUTSIDE, (47, 0)),
        row("somebody outside, to the port of tunnels", "from_network", |c| udp((c.world, 40000), (c.node, TUNNEL)), OUTSIDE, (17, TUNNEL)),
        row("the first fragment of several", "from_network", |c| udp((c.world, 40000), (c.node, 53)).fragment(7, 0, true), OUTSIDE, (17, 53)),
        Judged {
            given: is_connected,
            ..row("a pod sends everyone of the subnet a datagram", "from_pod", |c| udp((c.a, 40000), (shared(c), 53)).by(1), A, (17, 53))
        },
        Judged {
            given: is_connected,
            ..row("a frame for the node alone, to everyone of the subnet", "from_network", |c| udp((c.world, 40000), (shared(c), 53)), OUTSIDE, (17, 53))
        },
        row("everyone of a group is sent a datagram", "from_network",
            |c| to_all(udp((c.world, 40000), (everyone(c), 53)), group_mac(c)), OUTSIDE, (17, 53)),
        Judged {
            given: |w, c| w.outside((c.node, 30080, 6), 100, 1, &[(c.node, 8080)]),
            ..row("a node port that the node itself serves", "from_network", |c| tcp((c.world, 40000), (c.node, 30080), SYN), OUTSIDE, (6, 8080))
        },
    ];
    if is_ipv4 {
        rows.push(row("everyone on the link is sent a datagram", "from_network",
            |c| to_all(udp((c.world, 40000), (IpAddr::from([255; 4]), 53)), [0xff; 6]), OUTSIDE, (17, 53)));
        rows.push(row("everyone of the subnet is sent a datagram", "from_network",
            |c| to_all(udp((c.world, 40000), (IpAddr::from([192, 0, 2, 255]), 53)), [0xff; 6]), OUTSIDE, (17, 53)));
        rows.push(row("everyone of the subnet is pinged", "from_network",
            |c| to_all(echo(c.world, IpAddr::from([192, 0, 2, 255]), 7), [0xff; 6]), OUTSIDE, ping));
    }
    let of_remote: Vec<Judged> = vec![
        row("another node's pod opens a connection", "from_overlay", |c| tcp((c.remote, 40000), (c.node, 22), SYN), R, (6, 22)),
        row("another node's pod sends a datagram", "from_overlay", |c| udp((c.remote, 40000), (c.node, 53)), R, (17, 53)),
        row("another node's pod pings", "from_overlay", |c| echo(c.remote, c.node, 7), R, ping),
    ];
    rows.extend(of_remote.into_iter().map(|row| match is_tunnel {
        true => Judged { arrival: by_tunnel, ..row },
        false => Judged { program: "from_network", ..row },
    }));
    rows
}

#[rustfmt::skip]
fn ways_out(is_ipv4: bool) -> Vec<Judged> {
    let row = |name, program, packet: Make, peer, what| {
        Judged { name, program, packet, arrival: by_stack, given: nothing, peer, what }
    };
    let ping = if is_ipv4 { (1, 8) } else { (58, 128) };
    vec![
        row("the node opens a connection to the world", "to_network", |c| tcp((c.node, 40000), (c.world, 443), SYN), OUTSIDE, (6, 443)),
        row("the node sends the world a datagram", "to_network", |c| udp((c.node, 40000), (c.world, 53)), OUTSIDE, (17, 53)),
        row("the node pings the world", "to_network", |c| echo(c.node, c.world, 7), OUTSIDE, ping),
        row("the node opens a connection to another node", "to_network", |c| tcp((c.node, 40000), (c.other_node, 10250), SYN), REMOTE_NODE, (6, 10250)),
        row("the node sends another node a datagram", "to_network", |c| udp((c.node, 40000), (c.other_node, 53)), REMOTE_NODE, (17, 53)),
        row("the node sends the world a tunnel's packet", "to_network", |c| udp((c.node, 40000), (c.world, TUNNEL)), OUTSIDE, (17, TUNNEL)),
        row("the node opens a connection to another node's pod", "to_overlay", |c| tcp((c.node, 40000), (c.remote, 80), SYN), R, (6, 80)),
        row("the node sends another node's pod a datagram", "to_overlay", |c| udp((c.node, 40000), (c.remote, 53)), R, (17, 53)),
    ]
}

/// The packet of another flow.
fn of_flow(mut packet: Packet, number: u16) -> Packet {
    match &mut packet.layer4 {
        Layer4::Tcp { ports, .. } | Layer4::Udp { ports, .. } => ports.0 = 40_000 + number,
        Layer4::Icmp { rest, .. } => rest[..2].copy_from_slice(&number.to_be_bytes()),
        // One flow between two addresses: what was let in under the last epoch must ask again.
        Layer4::Other(_) => {}
    }
    packet
}

/// Open without a policy, closed by one without rules, open by a rule, and closed by one that denies.
fn judge(world: &mut World, cast: &Cast, row: &Judged, direction: u32, flow: u16) -> Result<()> {
    (row.given)(world, cast)?;
    let (packet, arrival) = ((row.packet)(cast), (row.arrival)(cast));
    let passes = |world: &World, number: u16, state: &str| -> Result<()> {
        let (action, _) = world.act(row.program, &of_flow(packet.clone(), flow + number), arrival)?;
        ensure!(action == PASS, "{state}: {action}");
        Ok(())
    };
    let is_denied = |world: &mut World, number: u16, reason: u8, state: &str| -> Result<()> {
        let outcome = world.send_as(row.program, &of_flow(packet.clone(), flow + number), arrival)?;
        let expected = [(reason, direction as u8)];
        ensure!(outcome.action == SHOT && outcome.counted == expected, "{state}: {outcome:?}");
        Ok(())
    };
    passes(world, 0, "without a policy")?;
    world.enforce(HOST, &[if direction == INGRESS { EGRESS } else { INGRESS }])?;
    passes(world, 1, "under one for the other direction")?;
    world.enforce(HOST, &[direction])?;
    is_denied(world, 2, DENIED[0], "without a rule")?;
    world.allow(HOST, direction, row.peer, row.what)?;
    passes(world, 3, "with a rule")?;
    world.rule(HOST, direction, row.peer, row.what, policy_verdict::POLICY_DENY)?;
    world.enforce(HOST, &[direction])?;
    is_denied(world, 4, DENIED[1], "with a rule that denies")
}

fn judge_all(settings: &Settings, direction: u32, rows: fn(bool, bool) -> Vec<Judged>) -> Result<()> {
    let is_tunnel = settings.tunnel_ifindex.is_some();
    for cast in casts() {
        within(settings.clone(), move |world| {
            let mut wrong = Vec::new();
            for (number, row) in (0..).zip(rows(cast.a.is_ipv4(), is_tunnel)) {
                world.forget_rules()?;
                world.enforce(HOST, &[])?;
                if let Err(error) = judge(world, &cast, &row, direction, 10 * number) {
                    wrong.push(format!("{} {}: {error:#}", row.program, row.name));
                }
            }
            ensure!(wrong.is_empty(), "of {} {} are wrong:\n{}", cast.node, wrong.len(), wrong.join("\n"));
            Ok(())
        })?;
    }
    Ok(())
}

fn native() -> Settings {
    Settings { tunnel_ifindex: None, ..settings() }
}

#[test]
fn bypass_6_every_way_to_the_node_is_judged_by_its_policy() -> Result<()> {
    require_lab!();
    judge_all(&settings(), INGRESS, ways_in)?;
    judge_all(&native(), INGRESS, ways_in)
}

#[test]
fn bypass_6_every_way_from_the_node_is_judged_by_its_policy() -> Result<()> {
    require_lab!();
    judge_all(&settings(), EGRESS, |is_ipv4, _| ways_out(is_ipv4))
}

/// Of what a policy of the host that closes everything does not speak.
struct Beyond {
    name: &'static str,
    program: &'static str,
    packet: Make,
    arrival: fn(&Cast) -> Arrival,
    given: fn(&mut World, &Cast) -> Result<()>,
    action: u32,
    is_ipv4: Option<bool>,
}

#[rustfmt::skip]
fn beyond() -> Vec<Beyond> {
    let row = |name, program, packet: Make| {
        let arrival = if program == "to_network" || program == "to_pod" { by_stack } else { arrives };
        Beyond { name, program, packet, arrival, given: nothing, action: PASS, is_ipv4: None }
    };
    vec![
        row("a running session", "from_network", |c| tcp((c.world, 40000), (c.node, 22), ACK)),
        row("the end of a session", "from_network", |c| tcp((c.world, 40000), (c.node, 22), RST)),
        row("the answer to the node's own SYN", "from_network", |c| tcp((c.world, 443), (c.node, 40000), SYN | ACK)),
        row("a running session, outward", "to_network", |c| tcp((c.node, 22), (c.world, 40000), ACK)),
        row("an error about what the node sent", "from_network", |c| unreachable(c.world, &udp((c.node, 40000), (c.world, 53)))),
        row("an error that the node sends", "to_network", |c| unreachable(c.node, &udp((c.world, 40000), (c.node, 53)))),
        row("another node's tunnel", "from_network", |c| udp((c.other_node, 40000), (c.node, TUNNEL))),
        row("the node's tunnel to another node", "to_network", |c| udp((c.node, 40000), (c.other_node, TUNNEL))),
        row("the node asks its own pod", "to_pod", |c| tcp((c.node, 40000), (c.a, 80), SYN)),
        row("what the node forwards for others", "to_network", |c| udp((c.third_node, 40000), (c.world, 53))),
        row("the node speaks to a group", "to_network", |c| udp((c.node, 5353), (everyone(c), 5353))),
        row("a group's own protocol", "from_network", |c| to_group(c, Layer4::Other(if c.a.is_ipv4() { 2 } else { 89 }))),
        Beyond {
            given: is_connected,
            ..row("what is for nobody here", "from_network", |c| udp((c.world, 40000), (c.third_node, 53)))
        },
        Beyond {
            given: |w, c| w.outside((c.node, 30080, 6), 100, 1, &[(c.b, 8080)]),
            action: REDIRECT,
            ..row("a node port that a pod serves", "from_network", |c| tcp((c.world, 40000), (c.node, 30080), SYN))
        },
        Beyond {
            given: |w, c| w.outside((c.node, 30080, 6), 100, 1, &[(c.remote, 8080)]),
            action: REDIRECT,
            ..row("a node port that another node's pod serves", "from_network", |c| tcp((c.world, 40000), (c.node, 30080), SYN))
        },
        Beyond {
            given: |w, c| w.host_port((c.node, 8000, 6), 60, (c.a, 80)),
            action: REDIRECT,
            ..row("a host port", "from_network", |c| tcp((c.world, 40000), (c.node, 8000), SYN))
        },
        Beyond {
            is_ipv4: Some(false),
            ..row("neighbour discovery", "from_network", |_| {
                let [_, six] = casts();
                match (six.other_node, six.node) {
                    (IpAddr::V6(from), IpAddr::V6(to)) => solicitation(from, to),
                    _ => unreachable!("the second cast is of IPv6"),
                }
            })
        },
        Beyond {
            is_ipv4: Some(false),
            ..row("a router advertisement", "from_network", |c| {
                let mut packet = to_all(icmp("fe80::1".parse().expect("an address"), everyone(c), 134, 0), group_mac(c));
                packet.ttl = 255;
                packet.payload(&[0; 8])
            })
        },
    ]
}

#[test]
fn what_the_hosts_policy_does_not_speak_of_passes_a_closed_node() -> Result<()> {
    require_lab!();
    for cast in casts() {
        within(settings(), move |world| {
            let mut wrong = Vec::new();
            for row in beyond().iter().filter(|row| row.is_ipv4.is_none_or(|only| only == cast.a.is_ipv4())) {
                world.forget_flows()?;
                world.enforce(HOST, &[INGRESS, EGRESS])?;
                (row.given)(world, &cast)?;
                let outcome = world.send_as(row.program, &(row.packet)(&cast), (row.arrival)(&cast))?;
                if outcome.action != row.action {
                    let (action, counted) = (outcome.action, outcome.counted);
                    wrong.push(format!("{} {}: {action}, counted {counted:?}", row.program, row.name));
                }
            }
            ensure!(wrong.is_empty(), "of {} {} are wrong:\n{}", cast.node, wrong.len(), wrong.join("\n"));
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn answers_to_what_the_node_asks_come_in_and_no_others() -> Result<()> {
    require_lab!();
    for cast in casts() {
        within(settings(), move |world| {
            world.enforce(HOST, &[INGRESS])?;
            let questions = [
                (udp((cast.node, 40000), (cast.world, 53)), udp((cast.world, 53), (cast.node, 40000))),
                (echo(cast.node, cast.world, 7), echo_reply(cast.world, cast.node, 7)),
            ];
            for (question, answer) in questions {
                let action = |world: &mut World, packet: &Packet| -> Result<u32> {
                    Ok(world.send("from_network", packet)?.action)
                };
                ensure!(action(world, &answer)? == SHOT, "before it was asked: {answer:?}");
                ensure!(world.send_as("to_network", &question, by_stack(&cast))?.action == PASS);
                ensure!(action(world, &answer)? == PASS, "{answer:?}");
                // From another, or to another port.
                let stranger = Packet { source: cast.other_node, ..answer.clone() };
                ensure!(action(world, &stranger)? == SHOT, "{stranger:?}");
            }
            let other_port = udp((cast.world, 53), (cast.node, 40001));
            ensure!(world.send("from_network", &other_port)?.action == SHOT);
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn bypass_6_a_changed_policy_of_the_host_stops_who_began_under_the_old_one() -> Result<()> {
    require_lab!();
    for cast in casts() {
        within(settings(), move |world| {
            world.enforce(HOST, &[INGRESS])?;
            world.allow(HOST, INGRESS, OUTSIDE, (17, 53))?;
            let question = udp((cast.world, 40000), (cast.node, 53));
            let answer = udp((cast.node, 53), (cast.world, 40000));
            ensure!(world.send("from_network", &question)?.action == PASS);
            world.enforce(HOST, &[INGRESS, EGRESS])?;
            ensure!(world.send_as("to_network", &answer, by_stack(&cast))?.action == PASS, "it may answer");
            world.rule(HOST, INGRESS, OUTSIDE, (17, 53), policy_verdict::POLICY_DENY)?;
            world.enforce(HOST, &[INGRESS, EGRESS])?;
            ensure!(world.send("from_network", &question)?.action == SHOT, "the new policy denies it");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn bypass_2_a_query_to_the_node_that_is_allowed_opens_no_other_type() -> Result<()> {
    require_lab!();
    for cast in casts() {
        within(settings(), move |world| {
            let (protocol, other, allowed) = if cast.a.is_ipv4() { (1, 8, 13) } else { (58, 128, 160) };
            world.enforce(HOST, &[INGRESS])?;
            world.allow(HOST, INGRESS, OUTSIDE, (protocol, allowed))?;
            let query = |kind: u16| of_flow(icmp(cast.world, cast.node, kind as u8, 0), 7);
            ensure!(world.send("from_network", &query(allowed))?.action == PASS);
            ensure!(world.send("from_network", &query(other))?.action == SHOT);
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn bypass_4_nobody_comes_in_under_the_nodes_own_address() -> Result<()> {
    require_lab!();
    for cast in casts() {
        within(settings(), move |world| {
            world.enforce(HOST, &[INGRESS])?;
            // Rules for the host itself, and for a pod that comes by the tunnel alone.
            for peer in [1, R] {
                world.allow(HOST, INGRESS, peer, (0, 0))?;
            }
            for source in [cast.node, cast.remote] {
                let outcome = world.send("from_network", &tcp((source, 40000), (cast.node, 22), SYN))?;
                ensure!(outcome.action == SHOT, "from {source}: {outcome:?}");
            }
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn bypass_1_a_later_fragment_for_the_node_is_judged_like_its_first() -> Result<()> {
    require_lab!();
    for cast in casts() {
        within(settings(), move |world| {
            world.enforce(HOST, &[INGRESS])?;
            world.allow(HOST, INGRESS, OUTSIDE, (17, 53))?;
            for (port, id, is_open) in [(53, 7, true), (54, 9, false)] {
                let parts = super::pieces::pieces((cast.world, 40000), (cast.node, port), id);
                let [first, _, last] = &parts;
                let found = [first, last].map(|part| world.send("from_network", part));
                for (outcome, part) in found.into_iter().zip(["first", "last"]) {
                    let action = outcome.context("a fragment")?.action;
                    ensure!((action == PASS) == is_open, "the {part} to port {port}: {action}");
                }
            }
            Ok(())
        })?;
    }
    Ok(())
}
