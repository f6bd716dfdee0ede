//! Services for clients outside: to backends here and elsewhere, and back.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use weir::datapath::Settings;
use weir::datapath::abi::{
    Affinity, AffinityKey, MaglevKey, MaglevPiece, Plain, Service, SourceRangeKey, addr_of, ip_of,
};
use weir::datapath::maglev;
use weir::datapath::types::{maglev_size, service_algorithm, service_flags};

use super::frame::{ACK, FIN, Layer4, Packet, RST, SYN, passed_on, quoting, sctp, tcp, udp, unreachable};
use super::network::{change_route, connect as connect_network, ip};
use super::services::destination_of;
use super::world::{
    Arrival, Cast, EXTERNAL, INGRESS, MARK, OUTSIDE, Outcome, PASS, R, REDIRECT, SHOT, World, casts,
    in_both_families, in_both_families_with, settings,
};
use crate::require::require_lab;

const PORT: u16 = 30080;

fn native() -> Settings {
    Settings { tunnel_ifindex: None, ..settings() }
}

/// The node is connected, and knows the way to everybody.
fn start(world: &mut World, cast: &Cast) -> Result<()> {
    connect_network(cast, 1500)?;
    ip(&format!("route add default via {}", cast.other_node))?;
    change_route("add", cast)?;
    world.forget_flows()
}

fn is_expected(outcome: &Outcome, packet: &Packet, expected: &Packet) -> Result<()> {
    ensure!(outcome.action == REDIRECT && outcome.mark == MARK, "{outcome:?}");
    let expected = passed_on(&Packet { macs: packet.macs, ..expected.clone() }.bytes());
    ensure!(outcome.frame == expected, "came out {:02x?}\nexpected {expected:02x?}", outcome.frame);
    Ok(())
}

/// The client's packet, which leaves for the remote backend; the port of the node that it leaves from.
fn leaves(world: &mut World, cast: &Cast, packet: &Packet, backend: (IpAddr, u16)) -> Result<u16> {
    let outcome = world.send("from_network", packet)?;
    ensure!(outcome.action == REDIRECT, "{outcome:?}");
    let offset = if cast.a.is_ipv4() { 34 } else { 54 };
    let port = u16::from_be_bytes([outcome.frame[offset], outcome.frame[offset + 1]]);
    let expected = Packet { source: cast.node, destination: backend.0, ..packet.clone() };
    let layer4 = match packet.layer4.clone() {
        Layer4::Tcp { sequence, acknowledgment, flags, .. } => {
            Layer4::Tcp { ports: (port, backend.1), sequence, acknowledgment, flags }
        }
        Layer4::Udp { has_checksum, .. } => Layer4::Udp { ports: (port, backend.1), has_checksum },
        other => other,
    };
    is_expected(&outcome, packet, &Packet { layer4, ..expected })?;
    Ok(port)
}

/// The backend's answer, by the tunnel or the network; what the client gets.
fn answer(world: &mut World, cast: &Cast, is_native: bool, packet: &Packet) -> Result<Outcome> {
    if is_native {
        return world.send("from_network", packet);
    }
    let arrival = Arrival { tunnel: Some((Some(cast.other_node), R)), ..Arrival::default() };
    world.send_as("from_overlay", packet, arrival)
}

fn both_ways(work: fn(&mut World, Cast, bool) -> Result<()>) -> Result<()> {
    for cast in casts() {
        for is_native in [false, true] {
            let settings = if is_native { native() } else { settings() };
            super::world::within(settings, move |world| {
                start(world, &cast)?;
                work(world, cast, is_native)
            })?;
        }
    }
    Ok(())
}

#[test]
fn a_backend_elsewhere_is_reached_from_the_nodes_address_and_answers_the_client() -> Result<()> {
    require_lab!();
    both_ways(|world, cast, is_native| {
        let (client, frontend, backend) = ((cast.world, 40000), (cast.node, PORT), (cast.remote, 8080));
        for protocol in [6, 17] {
            world.outside((cast.node, PORT, protocol), 100 + u32::from(protocol), 1, &[backend])?;
        }
        let mut ports = BTreeSet::new();
        for (flags, back) in [(SYN, SYN | ACK), (ACK, ACK), (FIN | ACK, FIN | ACK)] {
            let port = leaves(world, &cast, &tcp(client, frontend, flags), backend)?;
            ensure!((20000..=20003).contains(&port), "port {port}");
            ports.insert(port);
            let packet = tcp(backend, (cast.node, port), back);
            let outcome = answer(world, &cast, is_native, &packet)?;
            is_expected(&outcome, &packet, &tcp(frontend, client, back))?;
        }
        ensure!(ports.len() == 1, "one connection has one port: {ports:?}");
        let port = leaves(world, &cast, &udp(client, frontend), backend)?;
        let packet = udp(backend, (cast.node, port));
        let outcome = answer(world, &cast, is_native, &packet)?;
        is_expected(&outcome, &packet, &udp(frontend, client))?;
        // Nobody else gets through by that port.
        let stranger = tcp((cast.nobody, 8080), (cast.node, port), ACK);
        let outcome = answer(world, &cast, is_native, &stranger)?;
        ensure!(outcome.action != REDIRECT, "{outcome:?}");
        // One row leads there, one back, for each of the two flows; no verdict is kept here.
        assert_eq!((world.connections(0)?.len(), world.connections(1)?.len()), (0, 2));
        world.change_connections(|_, row| row.last_seen_jiffies -= 1_000_000)?;
        world.change_mappings(|row| row.last_seen_jiffies -= 1_000_000)?;
        let (report, _) = world.collect_garbage()?;
        assert_eq!((report.connections, report.nat), (2, 2));
        Ok(())
    })
}

#[test]
fn sctp_reaches_a_backend_elsewhere_by_a_port_of_its_own() -> Result<()> {
    require_lab!();
    both_ways(|world, cast, is_native| {
        let (client, frontend, backend) = ((cast.world, 40000), (cast.node, PORT), (cast.remote, 8080));
        world.outside((cast.node, PORT, 132), 132, 1, &[backend])?;
        for chunk in [&b"init"[..], b"a longer chunk"] {
            let packet = sctp(client, frontend, chunk);
            let outcome = world.send("from_network", &packet)?;
            let offset = if cast.a.is_ipv4() { 34 } else { 54 };
            let port = u16::from_be_bytes([outcome.frame[offset], outcome.frame[offset + 1]]);
            ensure!((20000..=20003).contains(&port), "port {port}: {outcome:?}");
            is_expected(&outcome, &packet, &sctp((cast.node, port), backend, chunk))?;
            let packet = sctp(backend, (cast.node, port), chunk);
            let outcome = answer(world, &cast, is_native, &packet)?;
            is_expected(&outcome, &packet, &sctp(frontend, client, chunk))?;
        }
        Ok(())
    })
}

#[test]
fn two_frontends_of_one_client_and_backend_are_kept_apart_elsewhere_too() -> Result<()> {
    require_lab!();
    both_ways(|world, cast, is_native| {
        let (client, backend) = ((cast.world, 40000), (cast.remote, 8080));
        let frontends = [(cast.node, PORT), (cast.node, PORT + 1), (cast.service, 80)];
        let mut ways = Vec::new();
        for (number, frontend) in (0..).zip(frontends) {
            world.outside((frontend.0, frontend.1, 6), 200 + number, 1, &[backend])?;
            ways.push((frontend, leaves(world, &cast, &tcp(client, frontend, SYN), backend)?));
        }
        for (frontend, way) in ways {
            assert_eq!(leaves(world, &cast, &tcp(client, frontend, ACK), backend)?, way);
            let packet = tcp(backend, (cast.node, way), ACK);
            let outcome = answer(world, &cast, is_native, &packet)?;
            is_expected(&outcome, &packet, &tcp(frontend, client, ACK))?;
        }
        Ok(())
    })
}

#[test]
fn when_no_port_is_left_it_is_said_why() -> Result<()> {
    require_lab!();
    both_ways(|world, cast, _| {
        let backend = (cast.remote, 8080);
        world.outside((cast.node, PORT, 6), 100, 1, &[backend])?;
        for source in 0..4 {
            leaves(world, &cast, &tcp((cast.world, 40000 + source), (cast.node, PORT), SYN), backend)?;
        }
        let outcome = world.send("from_network", &tcp((cast.world, 50000), (cast.node, PORT), SYN))?;
        ensure!(outcome.action == SHOT && outcome.counted == [(167, INGRESS as u8)], "{outcome:?}");
        assert_eq!(world.connections(1)?.len(), 4);
        Ok(())
    })
}

/// A client's packet becomes the pod's, with the client's address.
fn arrives(world: &mut World, packet: &Packet, pod: (IpAddr, u16)) -> Result<()> {
    let outcome = world.send("from_network", packet)?;
    ensure!(outcome.action == REDIRECT, "{outcome:?}");
    let mut expected = Packet { destination: pod.0, ..packet.clone() };
    match &mut expected.layer4 {
        Layer4::Tcp { ports, .. } | Layer4::Udp { ports, .. } => ports.1 = pod.1,
        _ => {}
    }
    ensure!(outcome.frame == expected.bytes(), "{outcome:?}");
    Ok(())
}

#[test]
fn a_backend_here_sees_the_client_and_answers_as_the_frontend() -> Result<()> {
    require_lab!();
    both_ways(|world, cast, _| {
        let (client, pod) = ((cast.world, 40000), (cast.b, 8080));
        // A node port, a load balancer's address.
        for (number, frontend) in (0..).zip([(cast.node, PORT), (cast.service, 80)]) {
            for protocol in [6, 17] {
                let id = 100 + number * 2 + u32::from(protocol == 6);
                world.outside((frontend.0, frontend.1, protocol), id, 1, &[pod])?;
            }
            world.forget_flows()?;
            for (flags, back) in [(SYN, SYN | ACK), (ACK, ACK), (FIN | ACK, FIN | ACK)] {
                arrives(world, &tcp(client, frontend, flags), pod)?;
                let packet = tcp(pod, client, back).by(2);
                let outcome = world.send("from_pod", &packet)?;
                is_expected(&outcome, &packet, &tcp(frontend, client, back))?;
            }
            arrives(world, &udp(client, frontend), pod)?;
            let packet = udp(pod, client).by(2);
            let outcome = world.send("from_pod", &packet)?;
            is_expected(&outcome, &packet, &udp(frontend, client))?;
        }
        Ok(())
    })
}

#[test]
fn the_backends_policy_sees_the_client_and_what_it_denies_costs_nothing() -> Result<()> {
    require_lab!();
    both_ways(|world, cast, _| {
        let backends = [(cast.a, 8080), (cast.b, 8080)];
        world.outside((cast.node, PORT, 6), 100, 1, &backends)?;
        world.enforce(1, &[INGRESS])?;
        world.enforce(2, &[INGRESS])?;
        let syn = tcp((cast.world, 40000), (cast.node, PORT), SYN);
        for _ in 0..8 {
            let outcome = world.send("from_network", &syn)?;
            ensure!(outcome.action == SHOT && outcome.events[0].reason == 133, "{outcome:?}");
            assert_eq!(outcome.events[0].source_identity, OUTSIDE);
        }
        assert_eq!(world.connections(0)?.len() + world.connections(1)?.len(), 0);
        world.allow(1, INGRESS, OUTSIDE, (6, 8080))?;
        world.allow(2, INGRESS, OUTSIDE, (6, 8080))?;
        ensure!(world.send("from_network", &syn)?.action == REDIRECT);
        assert_eq!((world.connections(0)?.len(), world.connections(1)?.len()), (1, 1));
        Ok(())
    })
}

#[test]
fn running_connections_keep_their_backend_when_the_set_changes() -> Result<()> {
    require_lab!();
    both_ways(|world, cast, _| {
        let frontend = (cast.node, PORT);
        let all = [(cast.a, 8080), (cast.b, 8080), (cast.remote, 8080)];
        world.outside((cast.node, PORT, 6), 100, 1, &all)?;
        let mut chosen = Vec::new();
        for source in 1..=12 {
            let client = (cast.world, source);
            let outcome = world.send("from_network", &tcp(client, frontend, SYN))?;
            // Four at most go elsewhere: there are four ports.
            if outcome.action == REDIRECT {
                world.send("from_network", &tcp(client, frontend, ACK))?;
                chosen.push((client, destination_of(&outcome.frame)));
            }
        }
        world.outside((cast.node, PORT, 6), 100, 2, &[(cast.a, 8080)])?;
        for (client, backend) in chosen {
            let outcome = world.send("from_network", &tcp(client, frontend, ACK))?;
            assert_eq!(destination_of(&outcome.frame), backend);
            let other = (client.0, client.1 + 1000);
            let outcome = world.send("from_network", &tcp(other, frontend, SYN))?;
            assert_eq!(destination_of(&outcome.frame), cast.a, "new ones go to who is there");
        }
        Ok(())
    })
}

#[test]
fn nobody_there_is_said_to_clients_outside_at_once() -> Result<()> {
    require_lab!();
    both_ways(|world, cast, _| {
        let (client, frontend) = ((cast.world, 40000), (cast.node, PORT));
        for protocol in [6, 17] {
            world.outside((cast.node, PORT, protocol), 100 + u32::from(protocol), 1, &[])?;
        }
        let syn = tcp(client, frontend, SYN);
        let reset = Layer4::Tcp { ports: (PORT, 40000), sequence: 0, acknowledgment: 1001, flags: RST | ACK };
        let datagram = udp(client, frontend);
        let answers = [
            (&syn, Packet::new(cast.node, cast.world, reset)),
            (&datagram, unreachable(cast.node, &datagram)),
        ];
        for (packet, answer) in answers {
            let outcome = world.send("from_network", packet)?;
            ensure!(outcome.action == REDIRECT && outcome.mark == MARK, "{outcome:?}");
            assert_eq!(outcome.events[0].reason, 158);
            let answer = Packet { is_unfragmentable: true, ..answer };
            ensure!(outcome.frame[12..] == answer.bytes()[12..], "{outcome:?}");
            assert_eq!(outcome.frame[..6], packet.bytes()[6..12], "to where it came from");
        }
        // Other nodes have backends: silence, and the client tries there.
        let has_others = service_flags::SERVICE_HAS_OTHERS.0 as u16;
        let row = Service { service_id: 106, generation: 1, flags: has_others, ..Service::default() };
        world.frontend((cast.node, PORT, 6), EXTERNAL, row, &[])?;
        let outcome = world.send("from_network", &syn)?;
        ensure!(outcome.action == SHOT && outcome.events[0].reason == 158, "{outcome:?}");
        Ok(())
    })
}

#[test]
fn a_service_serves_whom_its_source_ranges_name() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        start(world, &cast)?;
        let flags = service_flags::SERVICE_RANGES.0 as u16;
        let row = Service { service_id: 100, generation: 1, flags, ..Service::default() };
        world.frontend((cast.node, PORT, 6), EXTERNAL, row, &[(cast.b, 8080)])?;
        let syn = tcp((cast.world, 40000), (cast.node, PORT), SYN);
        let ranges = world.datapath.typed::<SourceRangeKey, u32>("source_ranges")?;
        let range = |address: IpAddr, service_id: u32| SourceRangeKey {
            prefix_length: if address.is_ipv4() { 128 + 24 } else { 32 + 64 },
            service_id: service_id.to_be(),
            addr: addr_of(address),
        };
        // Another service's, and somebody else.
        ranges.insert(&range(cast.world, 101), &1)?;
        ranges.insert(&range(cast.other_node, 100), &1)?;
        let outcome = world.send("from_network", &syn)?;
        ensure!(outcome.action == SHOT && outcome.events[0].reason == 177, "{outcome:?}");
        assert_eq!(world.connections(1)?.len(), 0);
        ranges.insert(&range(cast.world, 100), &1)?;
        arrives(world, &syn, (cast.b, 8080))
    })
}

#[test]
fn errors_find_the_client_and_the_backend() -> Result<()> {
    require_lab!();
    both_ways(|world, cast, is_native| {
        let (client, frontend) = ((cast.world, 40000), (cast.service, 80));
        let backend = (cast.remote, 8080);
        world.outside((cast.service, 80, 17), 100, 1, &[backend])?;
        let question = udp(client, frontend);
        let port = leaves(world, &cast, &question, backend)?;
        let way = (cast.node, port);
        // The backend has nobody at that port: the client hears it of the frontend.
        let error = unreachable(cast.remote, &udp(way, backend));
        let outcome = answer(world, &cast, is_native, &error)?;
        let expected = quoting(&unreachable(frontend.0, &question), &udp(way, backend));
        is_expected(&outcome, &error, &expected)?;
        // The client is gone: the backend hears it of the node.
        let packet = udp(backend, way);
        answer(world, &cast, is_native, &packet)?;
        let error = unreachable(cast.world, &udp(frontend, client));
        let outcome = world.send("from_network", &error)?;
        is_expected(&outcome, &error, &quoting(&unreachable(cast.node, &packet), &udp(frontend, client)))?;

        // The same of a backend here.
        world.outside((cast.service, 80, 17), 100, 2, &[(cast.b, 8080)])?;
        world.forget_flows()?;
        let pod = (cast.b, 8080);
        arrives(world, &question, pod)?;
        let error = unreachable(cast.world, &udp(frontend, client));
        let outcome = world.send("from_network", &error)?;
        let expected = quoting(&unreachable(cast.world, &udp(pod, client)), &udp(frontend, client));
        ensure!(outcome.action == REDIRECT, "{outcome:?}");
        assert_eq!(outcome.frame, Packet { macs: error.macs, ..expected }.bytes());
        Ok(())
    })
}

#[test]
fn fragments_follow_their_first_one() -> Result<()> {
    require_lab!();
    both_ways(|world, cast, is_native| {
        let (client, frontend, backend) = ((cast.world, 40000), (cast.node, PORT), (cast.remote, 8080));
        world.outside((cast.node, PORT, 17), 100, 1, &[backend])?;
        let [first, _, last] = super::pieces::pieces(client, frontend, 7);
        let outcome = world.send("from_network", &first)?;
        ensure!(outcome.action == REDIRECT, "{outcome:?}");
        let offset = if cast.a.is_ipv4() { 34 } else { 62 };
        let port = u16::from_be_bytes([outcome.frame[offset], outcome.frame[offset + 1]]);
        let outcome = world.send("from_network", &last)?;
        is_expected(
            &outcome,
            &last,
            &Packet { source: cast.node, destination: cast.remote, ..last.clone() },
        )?;
        let [first, _, last] = super::pieces::pieces(backend, (cast.node, port), 9);
        ensure!(answer(world, &cast, is_native, &first)?.action == REDIRECT);
        let outcome = answer(world, &cast, is_native, &last)?;
        is_expected(&outcome, &last, &Packet { source: cast.node, destination: cast.world, ..last.clone() })
    })
}

#[test]
fn one_client_stays_at_one_backend() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        start(world, &cast)?;
        let backends = [(cast.a, 8080), (cast.b, 8080), (cast.remote, 8080)];
        let row = Service { service_id: 100, generation: 1, affinity_seconds: 60, ..Service::default() };
        world.frontend((cast.node, PORT, 6), EXTERNAL, row, &backends)?;
        let from = |world: &mut World, client: IpAddr, source: u16| -> Result<IpAddr> {
            let outcome = world.send("from_network", &tcp((client, source), (cast.node, PORT), SYN))?;
            ensure!(outcome.action == REDIRECT, "{outcome:?}");
            Ok(destination_of(&outcome.frame))
        };
        let chosen = |world: &mut World, source: u16| from(world, cast.world, source);
        let affinity = world.datapath.typed::<AffinityKey, Affinity>("affinity")?;
        // Clients are even over the backends. One client's packets on two CPUs choose the same,
        // before the row of one of them is there.
        let mut seen = BTreeMap::<IpAddr, u32>::new();
        for number in 1..=60 {
            let client = match cast.world {
                IpAddr::V4(_) => IpAddr::from([198, 51, 100, number]),
                IpAddr::V6(_) => IpAddr::from([0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, u16::from(number)]),
            };
            world.forget_flows()?;
            let first = from(world, client, 1)?;
            affinity.sync(&Default::default())?;
            assert_eq!(from(world, client, 2)?, first);
            *seen.entry(first).or_default() += 1;
        }
        ensure!(seen.len() == 3 && seen.values().all(|clients| *clients >= 5), "{seen:?}");
        // It stays where it was last, until it was silent for long enough.
        world.forget_flows()?;
        affinity.sync(&Default::default())?;
        let first = chosen(world, 1000)?;
        let other = backends.into_iter().find(|(address, _)| *address != first).context("another one")?;
        let (key, row_of_first) = affinity.rows()?.into_iter().next().context("a row of affinity")?;
        let moved = Affinity { backend: world.backend(other, 6)?, ..row_of_first };
        affinity.insert(&key.0, &moved)?;
        assert_eq!(chosen(world, 1001)?, other.0);
        affinity.insert(&key.0, &Affinity { used_jiffies: moved.used_jiffies - 1_000_000, ..moved })?;
        assert_eq!(chosen(world, 1002)?, first);
        // Its backend is gone: it gets another one and stays there.
        let gone = chosen(world, 2000)?;
        let rest: Vec<_> = backends.into_iter().filter(|(address, _)| *address != gone).collect();
        world.frontend((cast.node, PORT, 6), EXTERNAL, Service { generation: 2, ..row }, &rest)?;
        let next = chosen(world, 2001)?;
        ensure!(next != gone && chosen(world, 2002)? == next);
        Ok(())
    })
}

/// Writes the table of a service, as the agent does.
fn write_table(world: &World, row: &Service, backends: &[(IpAddr, u16)]) -> Result<Vec<u32>> {
    let weighted: Vec<_> = backends.iter().map(|(ip, port)| (SocketAddr::new(*ip, *port), 1)).collect();
    let table = maglev::table(&weighted, maglev::TABLE_SIZE);
    let map = world.datapath.typed::<MaglevKey, MaglevPiece>("maglev")?;
    for (piece, places) in (0..).zip(table.chunks(maglev_size::MAGLEV_PIECE.0 as usize)) {
        let mut value = MaglevPiece { service_id: row.service_id, ..MaglevPiece::default() };
        for (entry, index) in value.backends.iter_mut().zip(places) {
            *entry = world.backend(backends[*index as usize], 6)?;
        }
        let key = MaglevKey { service_id: row.service_id, generation: row.generation, piece };
        map.insert(&key, &value)?;
    }
    Ok(table)
}

#[test]
fn maglev_chooses_in_the_kernel_as_in_the_agent() -> Result<()> {
    require_lab!();
    in_both_families_with(Settings { nat_ports: 20000..=20999, ..settings() }, |world, cast| {
        start(world, &cast)?;
        let mut backends = [(cast.a, 8080), (cast.b, 8080), (cast.remote, 8080)];
        backends.sort();
        let algorithm = service_algorithm::SERVICE_MAGLEV.0 as u8;
        let row = Service { service_id: 100, generation: 1, algorithm, ..Service::default() };
        world.frontend((cast.node, PORT, 6), EXTERNAL, row, &backends)?;
        let table = write_table(world, &row, &backends)?;
        let frontend = SocketAddr::new(cast.node, PORT);
        let mut seen = BTreeSet::new();
        for source in 1..=100 {
            let outcome = world.send("from_network", &tcp((cast.world, source), (cast.node, PORT), SYN))?;
            let expected = maglev::choose(&table, (cast.world, Some(source)), frontend, 6);
            let (expected, _) = backends[expected.context("the table has backends")? as usize];
            assert_eq!(destination_of(&outcome.frame), expected, "port {source}");
            seen.insert(expected);
        }
        assert_eq!(seen.len(), 3);
        // With affinity the client alone counts, so every node comes to the same.
        world.frontend((cast.node, PORT, 6), EXTERNAL, Service { affinity_seconds: 60, ..row }, &backends)?;
        world.forget_flows()?;
        let expected = maglev::choose(&table, (cast.world, None), frontend, 6).context("a backend")?;
        let outcome = world.send("from_network", &tcp((cast.world, 5), (cast.node, PORT), SYN))?;
        assert_eq!(destination_of(&outcome.frame), backends[expected as usize].0);
        let rows = world.datapath.typed::<AffinityKey, Affinity>("affinity")?.rows()?;
        assert_eq!(rows.keys().map(|key| ip_of(key.0.client)).collect::<Vec<_>>(), [cast.world]);
        ensure!(rows.keys().all(|key| key.0.as_bytes().len() == 24));
        Ok(())
    })
}

#[test]
fn a_cluster_ip_is_not_for_the_network() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        for port in [80, 99] {
            let outcome = world.send("from_network", &tcp((cast.world, 1), (cast.service, port), SYN))?;
            ensure!(outcome.action == SHOT && outcome.events[0].reason == 174, "{outcome:?}");
        }
        // The same of an address of the node's own is the node's.
        world.service((cast.node, 0, 0), 300, 1, &[])?;
        ensure!(world.send("from_network", &tcp((cast.world, 1), (cast.node, 99), SYN))?.action == PASS);
        Ok(())
    })
}

/// What names the frontend, put behind the IP header of a packet to its backend.
fn with_option(packet: &Packet, (address, port): (IpAddr, u16)) -> Packet {
    let mut packet = packet.clone();
    match address {
        IpAddr::V4(address) => {
            packet.options = [&[0x9a, 8], &port.to_be_bytes()[..], &address.octets()].concat();
        }
        IpAddr::V6(address) => {
            let content = [&[0x1b, 20], &port.to_be_bytes()[..], &[0, 0], &address.octets()].concat();
            packet = packet.extension(60, &content);
        }
    }
    packet
}

#[test]
fn with_dsr_the_backends_node_answers_the_client() -> Result<()> {
    require_lab!();
    both_ways(|world, cast, is_native| {
        let (client, frontend, backend) = ((cast.world, 40000), (cast.other_node, PORT), (cast.remote, 8080));
        let flags = service_flags::SERVICE_DSR.0 as u16;
        for protocol in [6, 17] {
            let row = Service { service_id: protocol, generation: 1, flags, ..Service::default() };
            world.frontend((cast.node, PORT, protocol as u8), EXTERNAL, row, &[backend])?;
        }
        // As the node that the client has asked.
        let asked = (cast.node, PORT);
        for (packet, has_option) in [
            (tcp(client, asked, SYN), true),
            (tcp(client, asked, ACK), false),
            (tcp(client, asked, FIN | ACK), false),
            (udp(client, asked), true),
            (udp(client, asked), true),
        ] {
            let outcome = world.send("from_network", &packet)?;
            let mut expected = match packet.layer4 {
                Layer4::Tcp { flags, .. } => tcp(client, backend, flags),
                _ => udp(client, backend),
            };
            if has_option {
                expected = with_option(&expected, asked);
            }
            is_expected(&outcome, &packet, &expected)?;
        }
        assert_eq!(world.connections(1)?.len(), 2);
        // As the backend's node: the client asked the other node.
        world.forget_flows()?;
        let pod = (cast.b, 8080);
        world.service((frontend.0, frontend.1, 6), 400, 1, &[pod])?;
        world.enforce(2, &[INGRESS])?;
        world.allow(2, INGRESS, OUTSIDE, (6, 8080))?;
        let by_tunnel = Arrival { tunnel: Some((Some(cast.other_node), OUTSIDE)), ..Arrival::default() };
        let arrive = |world: &mut World, packet: &Packet| match is_native {
            true => world.send("from_network", packet),
            false => world.send_as("from_overlay", packet, by_tunnel),
        };
        let syn = with_option(&tcp(client, pod, SYN), frontend);
        let outcome = arrive(world, &syn)?;
        ensure!(outcome.action == REDIRECT && outcome.events[0].source_identity == OUTSIDE, "{outcome:?}");
        for (flags, back) in [(SYN, SYN | ACK), (ACK, ACK), (FIN | ACK, FIN | ACK)] {
            if flags != SYN {
                let outcome = arrive(world, &tcp(client, pod, flags))?;
                ensure!(outcome.action == REDIRECT, "{outcome:?}");
            }
            let packet = tcp(pod, client, back).by(2);
            let outcome = world.send("from_pod", &packet)?;
            is_expected(&outcome, &packet, &tcp(frontend, client, back))?;
        }
        // An option that names no frontend is nobody's word.
        world.forget_flows()?;
        let forged = with_option(&tcp(client, pod, SYN), (cast.third_node, 53));
        ensure!(arrive(world, &forged)?.action == REDIRECT);
        let packet = tcp(pod, client, SYN | ACK).by(2);
        let outcome = world.send("from_pod", &packet)?;
        ensure!(outcome.frame[26..30] == packet.bytes()[26..30], "{outcome:?}");
        Ok(())
    })
}
