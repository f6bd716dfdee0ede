//! One packet for every reason that a program can drop one for.

use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use weir::datapath::types::policy_verdict;

use super::frame::{
    ACK, Layer4, Packet, RST, SYN, echo, echo_reply, icmp, solicitation, tcp, udp, unreachable,
};
use super::world::{
    A, Arrival, Cast, EGRESS, INGRESS, OUTSIDE, REDIRECT, SHOT, World, casts, settings, within,
};
use crate::require::require_lab;

struct Row {
    name: &'static str,
    program: &'static str,
    reason: u8,
    direction: u32,
    packet: fn(&Cast) -> Packet,
    given: fn(&mut World, &Cast) -> Result<()>,
    arrival: fn(&Cast) -> Arrival,
    /// What everybody's kernel sends all the time is counted, not reported.
    is_quiet: bool,
    /// The pod is told at once.
    is_answered: bool,
    /// Was let pass, and then could not be sent.
    is_judged: bool,
    /// What is done to the frame's bytes.
    edit: fn(&mut Vec<u8>),
    /// `Some`: makes sense in one family only.
    is_ipv4: Option<bool>,
}

impl Row {
    fn new(name: &'static str, program: &'static str, reason: u8, packet: fn(&Cast) -> Packet) -> Self {
        let direction =
            if matches!(program, "from_pod" | "to_network" | "to_overlay") { EGRESS } else { INGRESS };
        Self {
            name,
            program,
            reason,
            direction,
            packet,
            given: |_, _| Ok(()),
            arrival: |_| Arrival::default(),
            is_quiet: false,
            is_answered: false,
            is_judged: false,
            edit: |_| (),
            is_ipv4: None,
        }
    }

    fn given(self, given: fn(&mut World, &Cast) -> Result<()>) -> Self {
        Self { given, ..self }
    }

    fn arrival(self, arrival: fn(&Cast) -> Arrival) -> Self {
        Self { arrival, ..self }
    }

    /// By a tunnel from the other node, with a pod's identity.
    fn tunnelled(self) -> Self {
        self.arrival(|cast| Arrival { tunnel: Some((Some(cast.other_node), 303)), ..Arrival::default() })
    }

    fn ingress(self) -> Self {
        Self { direction: INGRESS, ..self }
    }

    fn quiet(self) -> Self {
        Self { is_quiet: true, ..self }
    }

    fn answered(self) -> Self {
        Self { is_answered: true, ..self }
    }

    fn judged(self) -> Self {
        Self { is_judged: true, ..self }
    }

    fn edit(self, edit: fn(&mut Vec<u8>)) -> Self {
        Self { edit, ..self }
    }

    fn ipv4(self) -> Self {
        Self { is_ipv4: Some(true), ..self }
    }

    fn ipv6(self) -> Self {
        Self { is_ipv4: Some(false), ..self }
    }
}

/// That of the family.
fn address(cast: &Cast, [four, six]: [&str; 2]) -> IpAddr {
    let address = if cast.a.is_ipv4() { four } else { six };
    address.parse().expect("an address of the table")
}

fn syn(cast: &Cast) -> Packet {
    tcp((cast.a, 40000), (cast.b, 80), SYN).by(1)
}

#[rustfmt::skip]
fn rows() -> Vec<Row> {
    let row = Row::new;
    vec![
        row("another pod's address", "from_pod", 132, |c| tcp((c.b, 1), (c.a, 80), SYN).by(1)),
        row("another pod's address and MAC address, from the wrong device", "from_pod", 132,
            |c| tcp((c.elsewhere, 1), (c.a, 80), SYN).by(4)),
        row("an address outside", "from_pod", 132, |c| tcp((c.world, 1), (c.a, 80), SYN).by(1)),
        row("the node's address", "from_pod", 132, |c| udp((c.node, 1), (c.a, 80)).by(1)),
        row("a pod's address from the network", "from_network", 132, |c| udp((c.a, 1), (c.b, 80))),
        row("the node's address from the network", "from_network", 132, |c| udp((c.node, 1), (c.b, 80))),
        row("another node's pod, but not by the tunnel", "from_network", 132, |c| udp((c.remote, 1), (c.b, 80))),
        row("an unknown pod, not by the tunnel", "from_network", 132, |c| udp((c.nobody, 1), (c.b, 80))),
        row("our own pod's address by the tunnel", "from_overlay", 132, |c| udp((c.a, 1), (c.b, 80))).tunnelled(),
        row("the node's address by the tunnel, to the node", "from_overlay", 132, |c| {
            udp((c.b, 1), (c.node, 80))
        })
        .tunnelled(),
        row("the node's address by the tunnel", "from_overlay", 132, |c| udp((c.node, 1), (c.b, 80))).tunnelled(),

        row("a group's address", "from_network", 132, |c| udp((address(c, ["224.0.0.1", "ff02::1"]), 1), (c.b, 80))),
        row("a loopback address", "from_network", 132, |c| udp((address(c, ["127.0.0.1", "::1"]), 1), (c.b, 80))),
        row("no address", "from_network", 132, |c| udp((address(c, ["0.0.0.0", "::"]), 1), (c.b, 80))),
        row("an address of one link", "from_network", 132, |c| udp((address(c, ["0.0.0.1", "fe80::1"]), 1), (c.b, 80))),
        row("no address, from a pod that has none", "from_pod", 132, |c| udp((address(c, ["0.0.0.0", "::"]), 1), (c.b, 80)).by(1))
            .given(|w, _| w.change_endpoint(1, |row| (row.ipv4, row.ipv6) = Default::default())),
        row("a pod's address in what the stack forwards for another device", "to_pod", 132,
            |c| udp((c.elsewhere, 1), (c.b, 80))),
        row("a pod's address from the network, through this node into the tunnel", "from_network", 132,
            |c| udp((c.a, 1), (c.remote, 80))),
        row("a pod's address from another device, into the tunnel", "to_overlay", 132, |c| udp((c.elsewhere, 1), (c.remote, 80))),
        row("another node's address, into the tunnel", "to_overlay", 132, |c| udp((c.third_node, 1), (c.remote, 80))),
        row("an unknown pod of another node than the sender", "from_overlay", 132, |c| udp((c.nobody, 1), (c.b, 80)))
            .arrival(|c| Arrival { tunnel: Some((Some(c.third_node), 303)), ..Arrival::default() }),
        row("an unknown pod of this node, by the tunnel", "from_overlay", 132,
            |c| udp((address(c, ["10.1.0.99", "fd01::99"]), 1), (c.b, 80))).tunnelled(),
        row("a pod's identity for what is no pod", "from_overlay", 132, |c| udp((c.world, 1), (c.b, 80))).tunnelled(),
        row("the world in a pod CIDR", "from_overlay", 132, |c| udp((c.nobody, 1), (c.b, 80)))
            .arrival(|c| Arrival { tunnel: Some((Some(c.other_node), OUTSIDE)), ..Arrival::default() }),

        row("no rule for the egress", "from_pod", 133, syn).given(|w, _| w.enforce(1, &[EGRESS])),
        row("no rule for the ingress", "from_pod", 133, syn).given(|w, _| w.enforce(2, &[INGRESS])).ingress(),
        row("a rule for another port", "from_pod", 133, syn).given(|w, _| {
            w.enforce(2, &[INGRESS])?;
            w.allow(2, INGRESS, A, (6, 81))
        }).ingress(),
        row("a rule for another protocol", "from_pod", 133, syn).given(|w, _| {
            w.enforce(2, &[INGRESS])?;
            w.allow(2, INGRESS, A, (17, 80))
        }).ingress(),
        row("a port rule does not allow ping", "from_pod", 133, |c| echo(c.a, c.b, 80).by(1)).given(|w, _| {
            w.enforce(2, &[INGRESS])?;
            w.allow(2, INGRESS, A, (6, 80))
        }).ingress(),
        row("from another node", "from_overlay", 133, |c| udp((c.remote, 1), (c.b, 80)))
            .given(|w, _| w.enforce(2, &[INGRESS])).tunnelled(),
        row("from outside, to a pod", "from_network", 133, |c| udp((c.world, 1), (c.b, 80)))
            .given(|w, _| w.enforce(2, &[INGRESS])),
        row("from outside, by the stack", "to_pod", 133, |c| udp((c.world, 1), (c.b, 80)))
            .given(|w, _| w.enforce(2, &[INGRESS])),
        row("to the node", "from_pod", 133, |c| tcp((c.a, 1), (c.node, 22), SYN).by(1))
            .given(|w, _| w.enforce(1, &[EGRESS])),

        row("half a header", "from_pod", 134, |c| {
            let mut packet = Packet::new(c.a, c.b, Layer4::Other(6)).by(1);
            packet.payload = vec![0; 12];
            packet
        }),
        row("a loose source route", "from_pod", 134, |c| {
            let mut packet = udp((c.a, 1), (c.b, 2)).by(1);
            packet.options = vec![131, 3, 4, 0];
            packet
        }).ipv4(),
        row("a length beyond the frame, in a fragment", "from_pod", 134,
            |c| udp((c.a, 1), (c.b, 2)).by(1).fragment(1, 0, true)).edit(|frame| frame.truncate(70)),
        row("a strict source route", "from_pod", 134, |c| {
            let mut packet = udp((c.a, 1), (c.b, 2)).by(1);
            packet.options = vec![1, 137, 3, 4];
            packet
        }).ipv4(),
        row("an IPv4 address in IPv6", "from_pod", 134, |_| {
            let mapped = "::ffff:10.1.0.1".parse().expect("an address");
            let other = "::ffff:10.1.0.2".parse().expect("an address");
            udp((mapped, 1), (other, 2)).by(1)
        }).ipv6(),

        row("neither IPv4 nor IPv6", "from_pod", 139, |c| udp((c.a, 1), (c.b, 80)).by(1))
            .edit(|frame| frame[12..14].copy_from_slice(&[0x88, 0xcc])),
        row("neither, by the tunnel", "from_overlay", 139, |c| udp((c.remote, 1), (c.b, 80)))
            .edit(|frame| frame[12..14].copy_from_slice(&[0x88, 0xcc])),
        row("neither, into the tunnel", "to_overlay", 139, |c| udp((c.node, 1), (c.remote, 80)))
            .edit(|frame| frame[12..14].copy_from_slice(&[0x88, 0xcc])),

        row("IPv4's ICMP in IPv6", "from_pod", 142, |c| {
            let mut packet = echo(c.a, c.b, 1).by(1);
            packet.protocol = Some(if c.a.is_ipv4() { 58 } else { 1 });
            packet
        }),
        row("masquerading what has no ports", "to_network", 142,
            |c| Packet::new(c.a, c.world, Layer4::Other(47)).payload(&[0; 16])),

        row("an error about nothing known", "from_pod", 143,
            |c| unreachable(c.a, &tcp((c.b, 80), (c.a, 40000), ACK)).by(1)),
        row("an error from outside about nothing known", "from_network", 143,
            |c| unreachable(c.world, &tcp((c.b, 80), (c.world, 40000), ACK))),
        row("an error about others", "from_pod", 143,
            |c| unreachable(c.a, &tcp((c.remote, 80), (c.b, 40000), ACK)).by(1)),
        row("an answer that nobody asked for", "from_pod", 143, |c| echo_reply(c.a, c.b, 5).by(1)),
        row("a redirect", "from_pod", 143, |c| icmp(c.a, c.b, 5, 1).by(1).payload(&[0; 28])).ipv4(),

        row("an address of the cluster that nobody has", "from_pod", 151, |c| tcp((c.a, 1), (c.nobody, 80), SYN).by(1)),
        row("a group", "from_pod", 151, |c| {
            let group = if c.a.is_ipv4() { "224.0.0.251" } else { "ff02::fb" };
            udp((c.a, 5353), (group.parse().expect("an address"), 5353)).by(1)
        }),
        row("a loopback address", "from_pod", 151, |c| udp((c.a, 1), (address(c, ["127.0.0.1", "::1"]), 80)).by(1)),
        row("no address", "from_pod", 151, |c| udp((c.a, 1), (address(c, ["0.0.0.0", "::"]), 80)).by(1)),
        row("an address of the link", "from_pod", 151, |c| udp((c.a, 1), (address(c, ["255.255.255.255", "fe80::1"]), 80)).by(1)),
        row("from another node's pod to the world", "from_overlay", 194, |c| udp((c.remote, 1), (c.world, 53))).tunnelled(),
        row("from the world to the world by the tunnel", "from_overlay", 151, |c| udp((c.world, 1), (c.world, 53)))
            .arrival(|c| Arrival { tunnel: Some((Some(c.other_node), OUTSIDE)), ..Arrival::default() }),
        row("what stands for a pod itself", "from_pod", 151, |c| udp((c.a, 1), (c.loopback, 1)).by(1)),
        row("a pod by another pod's device", "to_pod", 151, |c| udp((c.node, 1), (c.elsewhere, 80)))
            .arrival(|_| Arrival { is_from_stack: true, ..Arrival::default() }),
        row("through this node to another", "from_overlay", 151, |c| udp((c.remote, 1), (c.remote, 80))).tunnelled(),
        row("an unknown pod on the way out", "to_network", 151, |c| udp((c.a, 1), (c.nobody, 80))),

        row("too many extension headers", "from_pod", 156, |c| {
            (0..7).fold(udp((c.a, 1), (c.b, 2)).by(1), |packet, _| packet.extension(60, &[1, 4, 0, 0, 0, 0]))
        }).ipv6(),
        row("routing header type 2", "from_pod", 156, |c| udp((c.a, 1), (c.b, 2)).by(1).extension(43, &[2, 1, 0, 0, 0, 0])).ipv6(),
        row("routing header type 4, from the network", "from_network", 156,
            |c| udp((c.world, 1), (c.b, 2)).extension(43, &[4, 1, 0, 0, 0, 0])).ipv6(),
        row("routing header type 0", "from_pod", 156, |c| udp((c.a, 1), (c.b, 2)).by(1).extension(43, &[0, 1, 0, 0, 0, 0])).ipv6(),

        row("a fragment that would overwrite ports", "from_pod", 157,
            |c| udp((c.a, 1), (c.b, 2)).by(1).fragment(7, 8, false)),

        row("a service without backends", "from_pod", 158, |c| tcp((c.a, 1), (c.service, 82), SYN).by(1)).answered(),
        row("a service without backends", "from_pod", 158, |c| udp((c.a, 1), (c.service, 82)).by(1)).answered(),
        row("a reset to a service without backends", "from_pod", 158,
            |c| tcp((c.a, 1), (c.service, 82), RST).by(1)),

        row("a node that the tunnel does not know", "to_overlay", 160, |c| udp((c.node, 1), (c.nobody, 80))),
        row("a pod whose node is not known", "from_pod", 160, |c| udp((c.a, 1), (c.remote, 80)).by(1))
            .given(|w, c| w.address(c.remote, 303, 0, 1, None)).judged(),

        row("an ARP for nobody", "from_pod", 166, |c| udp((c.a, 1), (c.b, 1)).by(1)).quiet()
            .edit(|frame| frame[12..14].copy_from_slice(&[0x08, 0x06])),
        row("a VLAN tag", "from_pod", 166, |c| udp((c.a, 1), (c.b, 1)).by(1))
            .arrival(|_| Arrival { vlan: 5, ..Arrival::default() }),

        row("no port left", "to_network", 167, |c| udp((c.a, 5), (c.world, 53))).given(|w, c| {
            for port in 0..5 {
                w.send("to_network", &udp((c.a, 100 + port), (c.world, 53)))?;
            }
            Ok(())
        }),
        row("an error about what is not masqueraded", "to_network", 167,
            |c| unreachable(c.a, &udp((c.world, 9), (c.a, 9)))),

        row("tunnel packets of a pod's own making", "from_pod", 170, |c| udp((c.a, 1), (c.node, 8472)).by(1)),
        row("tunnel packets to another node", "from_pod", 170, |c| udp((c.a, 1), (c.other_node, 8472)).by(1)),
        row("tunnel packets to an address of a node that nobody lists", "from_pod", 170,
            |c| udp((c.a, 1), (c.world, 8472)).by(1)),
        row("tunnel packets as the answer of a host port", "from_pod", 170, |c| udp((c.a, 80), (c.world, 8472)).by(1))
            .given(|w, c| {
                w.host_port((c.node, 8000, 17), 60, (c.a, 80))?;
                let asked = w.send("from_network", &udp((c.world, 8472), (c.node, 8000)))?;
                ensure!(asked.action == REDIRECT, "{asked:?}");
                Ok(())
            }),
        row("masqueraded tunnel packets", "to_network", 170, |c| udp((c.a, 1), (c.world, 8472))),
        row("tunnel packets that the node's NAT has made its own", "to_network", 170, |c| udp((c.node, 1), (c.other_node, 8472))),
        row("a tunnel in the tunnel", "from_overlay", 170, |c| udp((c.remote, 1), (c.node, 8472))).tunnelled(),
        row("a tunnel to another address of the node", "from_overlay", 170, |c| udp((c.remote, 1), (c.b, 80)))
            .arrival(|c| Arrival {
                tunnel: Some((Some(c.other_node), 303)),
                tunnel_to: Some(c.third_node),
                ..Arrival::default()
            }),

        row("a tunnel identity that does not exist", "from_overlay", 171, |c| udp((c.remote, 1), (c.b, 80)))
            .arrival(|c| Arrival { tunnel: Some((Some(c.other_node), 100)), ..Arrival::default() }),
        row("a tunnel from outside", "from_overlay", 172, |c| udp((c.remote, 1), (c.b, 80)))
            .arrival(|c| Arrival { tunnel: Some((Some(c.world), 303)), ..Arrival::default() }),
        row("a tunnel of another node", "from_overlay", 172, |c| udp((c.remote, 1), (c.b, 80)))
            .arrival(|c| Arrival { tunnel: Some((Some(c.third_node), 303)), ..Arrival::default() }),
        row("a tunnel of another node, in a running flow", "from_overlay", 172, |c| udp((c.remote, 1), (c.b, 80)))
            .given(|w, c| {
                let by_its_node = Arrival { tunnel: Some((Some(c.other_node), 303)), ..Arrival::default() };
                let first = w.send_as("from_overlay", &udp((c.remote, 1), (c.b, 80)), by_its_node)?;
                ensure!(first.action == REDIRECT, "{first:?}");
                Ok(())
            })
            .arrival(|c| Arrival { tunnel: Some((Some(c.third_node), 303)), ..Arrival::default() }),
        row("a tunnel from ourselves", "from_overlay", 172, |c| udp((c.remote, 1), (c.b, 80)))
            .arrival(|c| Arrival { tunnel: Some((Some(c.node), 303)), ..Arrival::default() }),
        row("no tunnel at all", "from_overlay", 172, |c| udp((c.remote, 1), (c.b, 80))),
        row("a tunnel without identity", "from_overlay", 183, |c| udp((c.remote, 1), (c.b, 80)))
            .arrival(|c| Arrival { tunnel: Some((Some(c.other_node), 0)), ..Arrival::default() }),

        row("a port that a service does not have", "from_pod", 174,
            |c| tcp((c.a, 1), (c.service, 99), SYN).by(1)).answered(),
        row("ping to a service", "from_pod", 174, |c| echo(c.a, c.service, 9).by(1)),

        row("a client's packet to a backend elsewhere, at its last hop", "from_network", 196,
            |c| Packet { ttl: 1, ..tcp((c.world, 1), (c.node, 30080), SYN) })
            .given(|w, c| w.outside((c.node, 30080, 6), 900, 1, &[(c.remote, 8080)]))
            .answered(),

        row("a fragment whose first was not seen", "from_pod", 175,
            |c| udp((c.a, 1), (c.b, 2)).by(1).fragment(99, 1480, false)),

        row("a router advertisement", "from_pod", 176, |c| icmp(c.a, c.b, 134, 0).by(1).payload(&[0; 8])).ipv6(),
        row("a redirect", "from_pod", 176, |c| icmp(c.a, c.b, 137, 0).by(1).payload(&[0; 32])).ipv6(),
        row("a router solicitation", "from_pod", 176, |c| icmp(c.a, c.b, 133, 0).by(1)).ipv6().quiet(),
        row("a group report", "from_pod", 176, |c| icmp(c.a, c.b, 143, 0).by(1).payload(&[0; 20])).ipv6().quiet(),
        row("is this address free", "from_pod", 176,
            |_| solicitation("::".parse().expect("an address"), "fd01::1".parse().expect("an address")))
            .ipv6().quiet(),
        row("neighbour discovery for another node's pod", "to_overlay", 176, |c| icmp(c.world, c.remote, 135, 0).payload(&[0; 16])).ipv6(),
        row("neighbour discovery that the stack forwards", "to_pod", 176, |c| {
            let mut packet = icmp(c.world, c.a, 133, 0).payload(&[0x41; 400]);
            packet.ttl = 255;
            packet
        }).ipv6(),
        row("neighbour discovery of the node's own from beyond the link", "to_pod", 176,
            |c| icmp(c.node, c.a, 135, 0).payload(&[0; 16])).ipv6()
            .arrival(|_| Arrival { is_from_stack: true, ..Arrival::default() }),
        row("a group query from the network", "from_network", 176, |c| icmp(c.world, c.a, 130, 0).payload(&[0x41; 400])).ipv6(),
        row("neighbour discovery by the tunnel", "from_overlay", 176, |c| icmp(c.remote, c.b, 135, 0).payload(&[0; 16]))
            .ipv6().tunnelled(),

        row("a rule that denies", "from_pod", 181, syn).given(|w, _| {
            w.enforce(2, &[INGRESS])?;
            w.allow(2, INGRESS, A, (0, 0))?;
            w.rule(2, INGRESS, A, (6, 80), policy_verdict::POLICY_DENY)
        }).ingress(),

        row("from a pod that is not ready", "from_pod", 203, |c| udp((c.unready, 1), (c.b, 80)).by(3)),
        row("to a pod that is not ready", "from_pod", 203, |c| udp((c.a, 1), (c.unready, 80)).by(1)).ingress(),
        row("to a pod that is not ready, by its node", "to_pod", 203, |c| udp((c.node, 1), (c.unready, 80)))
            .arrival(|_| Arrival { is_from_stack: true, ..Arrival::default() }),
    ]
}

/// Reasons that other tests cause, or that only a kernel out of memory does.
const ELSEWHERE: [(u8, &str); 10] = [
    (204, "egress::an_address_that_the_gateway_lacks_lets_nothing_leave"),
    (195, "encryption::what_has_to_be_encrypted_does_not_come_in_plain"),
    (141, "rewriting a header that was just read fails only without memory"),
    (155, "an LRU map takes every entry as long as there is memory"),
    (177, "outside::a_service_serves_whom_its_source_ranges_name"),
    (198, "fairness::who_has_his_share_of_connections_gets_no_more"),
    (240, "fairness::who_has_his_share_of_ports_gets_no_more"),
    (169, "network::native_routing_needs_a_route"),
    (244, "layer7::without_a_proxy_nothing_passes_that_it_must_judge"),
    (245, "dns::an_answer_needs_its_question"),
];

fn check(world: &mut World, cast: &Cast, row: &Row) -> Result<()> {
    world.forget_flows()?;
    (row.given)(world, cast)?;
    let flows = world.connections(0)?.len();
    let mut bytes = (row.packet)(cast).bytes();
    (row.edit)(&mut bytes);
    let outcome = world.send_bytes(row.program, &bytes, (row.arrival)(cast))?;
    let expected = if row.is_answered { REDIRECT } else { SHOT };
    ensure!(outcome.action == expected, "the action is {}, counted {:?}", outcome.action, outcome.counted);
    ensure!(
        outcome.counted == [(row.reason, row.direction as u8)],
        "counted reason and direction: {:?}",
        outcome.counted
    );
    ensure!(row.is_judged || world.connections(0)?.len() == flows, "it left an entry in connections");
    if row.is_quiet {
        ensure!(outcome.events.is_empty(), "reported {:?}", outcome.events);
        return Ok(());
    }
    ensure!(outcome.events.len() == 1 + usize::from(row.is_judged), "reported {:?}", outcome.events);
    let event = outcome.events[outcome.events.len() - 1];
    ensure!(
        (event.r#type, event.reason, event.direction) == (4, row.reason, row.direction as u8),
        "reported {event:?}"
    );
    Ok(())
}

#[test]
fn every_drop_is_counted_and_reported_and_leaves_no_entry() -> Result<()> {
    require_lab!();
    let mut wrong = Vec::new();
    for cast in casts() {
        let family = if cast.a.is_ipv4() { "IPv4" } else { "IPv6" };
        wrong.extend(run_rows(cast)?.into_iter().map(|message| format!("{family}: {message}")));
    }
    ensure!(wrong.is_empty(), "{} rows are wrong:\n{}", wrong.len(), wrong.join("\n"));
    Ok(())
}

fn run_rows(cast: Cast) -> Result<Vec<String>> {
    let (sender, receiver) = std::sync::mpsc::channel();
    within(settings(), move |world| {
        for row in rows().iter().filter(|row| row.is_ipv4.is_none_or(|only| only == cast.a.is_ipv4())) {
            world.reset()?;
            if let Err(error) = check(world, &cast, row) {
                sender.send(format!("{} {}: {error:#}", row.program, row.name))?;
            }
        }
        Ok(())
    })?;
    Ok(receiver.into_iter().collect())
}

#[test]
fn every_reason_that_the_programs_know_has_a_packet() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("bpf");
    let numbers = reason_numbers(&fs::read_to_string(root.join("abi.h"))?)?;
    let mut used = BTreeSet::new();
    for directory in [root.clone(), root.join("lib")] {
        for file in directory.read_dir()? {
            let path = file?.path();
            let is_code = path.extension().is_some_and(|extension| extension == "c" || extension == "h");
            if !is_code || path.ends_with("abi.h") {
                continue;
            }
            let text = fs::read_to_string(&path)?;
            for word in text.split(|character: char| !character.is_ascii_alphanumeric() && character != '_') {
                if let Some((_, number)) = numbers.iter().find(|(name, _)| name == word) {
                    used.insert(*number);
                }
            }
        }
    }
    let covered: BTreeSet<u8> =
        rows().iter().map(|row| row.reason).chain(ELSEWHERE.map(|(reason, _)| reason)).chain([0]).collect();
    assert_eq!(used, covered, "reasons in bpf/ (left), reasons with a packet (right)");
    Ok(())
}

/// The names and numbers of `enum drop_reason`.
fn reason_numbers(abi: &str) -> Result<Vec<(String, u8)>> {
    let body = abi.split_once("enum drop_reason {").and_then(|(_, rest)| rest.split_once('}'));
    let (body, _) = body.context("abi.h has no enum drop_reason")?;
    body.split(',')
        .filter_map(|line| line.split_once('='))
        .map(|(name, number)| Ok((name.trim().to_owned(), number.trim().parse()?)))
        .collect()
}
