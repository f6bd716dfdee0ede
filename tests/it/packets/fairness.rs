//! What one pod may have of what all share: floods cost nobody else a connection or a record.

use anyhow::{Context, Result, ensure};
use weir::datapath::abi;
use weir::datapath::types::{address_flags, egress_flags};
use weir::datapath::{Quotas, Settings, Usage, addr_of};
use weir::model::EndpointId;

use super::flows::expect;
use super::frame::{ACK, FIN, Packet, SYN, tcp, udp};
use super::world::{
    Arrival, Cast, EGRESS, INGRESS, PASS, R, REDIRECT, SHOT, World, casts, in_both_families,
    in_both_families_with, settings, within,
};
use crate::require::require_lab;

/// Flows of the flooder: many times what the map holds.
const FLOOD: u16 = 9000;
/// Connections of others that rest meanwhile.
const IDLE: u16 = 200;

fn by_tunnel(world: &mut World, cast: Cast, packet: &Packet) -> Result<u32> {
    let tunnel = Some((Some(cast.other_node), R));
    Ok(world.send_as("from_overlay", packet, Arrival { tunnel, ..Arrival::default() })?.action)
}

/// A packet, without looking at what becomes of it.
fn act(world: &World, program: &str, bytes: &[u8]) -> Result<()> {
    world.actor(program, Arrival::default())?(bytes)?;
    Ok(())
}

/// Packets without looking at what becomes of each.
fn flood(world: &mut World, program: &str, packets: impl IntoIterator<Item = Packet>) -> Result<()> {
    for packet in packets {
        let bytes = packet.bytes();
        // Twice: what the map's eviction takes for active.
        act(world, program, &bytes)?;
        act(world, program, &bytes)?;
    }
    world.forget_events()
}

fn usage(world: &World, endpoint: u16) -> Result<Usage> {
    world.datapath.usage()?.get(&EndpointId(endpoint)).copied().context("a row for each endpoint")
}

/// Connections of b with the other node's pod, begun by either; `world` knows of somebody who collects.
fn idle_connections(world: &mut World, cast: Cast) -> Result<()> {
    world.collect_garbage()?;
    // Only those begin who may: what has lost its connection is denied.
    world.enforce(2, &[INGRESS, EGRESS])?;
    world.allow(2, EGRESS, R, (6, 443))?;
    world.allow(2, INGRESS, R, (6, 80))?;
    for port in 1000..1000 + IDLE / 2 {
        for flags in [SYN, ACK] {
            expect(world, &tcp((cast.b, port), (cast.remote, 443), flags).by(2), REDIRECT)?;
            let other = tcp((cast.remote, port), (cast.b, 80), flags);
            ensure!(by_tunnel(world, cast, &other)? == REDIRECT, "b's client on port {port}");
            if flags == SYN {
                let answer = tcp((cast.remote, 443), (cast.b, port), SYN | ACK);
                ensure!(by_tunnel(world, cast, &answer)? == REDIRECT, "b's server, to port {port}");
                expect(world, &tcp((cast.b, 80), (cast.remote, port), SYN | ACK).by(2), REDIRECT)?;
            }
        }
    }
    Ok(())
}

/// How many of them are broken, whoever speaks first.
fn broken(world: &mut World, cast: Cast) -> Result<usize> {
    let mut broken = 0;
    for port in 1000..1000 + IDLE / 2 {
        let pushed = by_tunnel(world, cast, &tcp((cast.remote, 443), (cast.b, port), ACK))?;
        let pushing = world.send("from_pod", &tcp((cast.b, 80), (cast.remote, port), ACK).by(2))?.action;
        broken += usize::from(pushed != REDIRECT) + usize::from(pushing != REDIRECT);
    }
    Ok(broken)
}

#[test]
fn bypass_14_a_flood_by_one_pod_evicts_nobody_elses_connections() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        idle_connections(world, cast)?;
        let datagrams = (0..FLOOD).map(|port| udp((cast.a, 1024 + port), (cast.remote, 53)).by(1));
        flood(world, "from_pod", datagrams)?;
        let of_a = usage(world, 1)?;
        assert_eq!(broken(world, cast)?, 0, "of {IDLE}; the flooder has {of_a:?}");
        ensure!(of_a.opening < 2200 && of_a.connections == of_a.opening, "{of_a:?}");
        // The newest still count: their answers arrive.
        let answer = udp((cast.remote, 53), (cast.a, 1023 + FLOOD));
        assert_eq!(by_tunnel(world, cast, &answer)?, REDIRECT);
        // And others begin as before.
        expect(world, &tcp((cast.b, 999), (cast.remote, 443), SYN).by(2), REDIRECT)?;
        Ok(())
    })
}

#[test]
fn a_flood_from_outside_is_the_share_of_the_pod_that_it_goes_to() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        idle_connections(world, cast)?;
        world.host_port((cast.node, 8000, 6), 90, (cast.a, 80))?;
        for port in 0..FLOOD {
            let syn = tcp((cast.world, 1024 + port), (cast.node, 8000), SYN).bytes();
            act(world, "from_network", &syn)?;
            // The pod answers, and nobody ever acknowledges that.
            let answer = tcp((cast.a, 80), (cast.world, 1024 + port), SYN | ACK).by(1).bytes();
            act(world, "from_pod", &answer)?;
        }
        let of_a = usage(world, 1)?;
        assert_eq!(broken(world, cast)?, 0, "of {IDLE}; the pod has {of_a:?}");
        ensure!(of_a.opening < 2200 && of_a.refused[1] > 5000, "{of_a:?}");
        // Who means it still gets in.
        let network = |world: &mut World, flags| {
            let packet = tcp((cast.world, 1000), (cast.node, 8000), flags);
            let outcome = world.send("from_network", &packet)?;
            ensure!(outcome.action == REDIRECT, "{outcome:?}");
            Ok(())
        };
        let before = usage(world, 1)?;
        network(world, SYN)?;
        // There is no route to the world here, but the flow is known.
        world.send("from_pod", &tcp((cast.a, 80), (cast.world, 1000), SYN | ACK).by(1))?;
        network(world, ACK)?;
        let after = usage(world, 1)?;
        assert_eq!(after.connections - after.opening, before.connections - before.opening + 1);
        Ok(())
    })
}

#[test]
fn what_is_closed_or_expired_is_given_back() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        for port in 1000..1010 {
            let (client, server) = ((cast.a, port), (cast.b, 80));
            expect(world, &tcp(client, server, SYN).by(1), REDIRECT)?;
            assert_eq!(usage(world, 1)?.opening, 1);
            expect(world, &tcp(server, client, SYN | ACK).by(2), REDIRECT)?;
            assert_eq!(usage(world, 1)?.opening, 1, "an answer alone is no handshake");
            expect(world, &tcp(client, server, ACK).by(1), REDIRECT)?;
            let row = usage(world, 1)?;
            assert_eq!((row.opening, row.connections), (0, 1));
            expect(world, &tcp(client, server, FIN | ACK).by(1), REDIRECT)?;
            expect(world, &tcp(server, client, FIN | ACK).by(2), REDIRECT)?;
            expect(world, &tcp(client, server, ACK).by(1), REDIRECT)?;
            assert_eq!(usage(world, 1)?.connections, 0);
        }
        for port in 1000..1020 {
            // Every second one by a service, which takes two rows.
            expect(world, &udp((cast.a, port), (cast.service, 80)).by(1), REDIRECT)?;
            expect(world, &udp((cast.a, port), (cast.remote, 53)).by(1), REDIRECT)?;
        }
        let row = usage(world, 1)?;
        assert_eq!((row.opening, row.connections, usage(world, 2)?.connections), (40, 60, 0));
        // The same again begins nothing; what has expired begins anew and takes no second row.
        expect(world, &udp((cast.a, 1000), (cast.remote, 53)).by(1), REDIRECT)?;
        world.change_connections(|_, row| row.last_seen_jiffies = 1)?;
        expect(world, &udp((cast.a, 1000), (cast.remote, 53)).by(1), REDIRECT)?;
        let row = usage(world, 1)?;
        assert_eq!((row.opening, row.connections), (40, 60));
        world.change_connections(|_, row| row.last_seen_jiffies = 1)?;
        world.collect_garbage()?;
        assert_eq!(usage(world, 1)?, Usage { limits: row.limits, ..Usage::default() });
        Ok(())
    })
}

#[test]
fn a_count_that_is_off_is_corrected() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        for port in 1000..1010 {
            expect(world, &udp((cast.a, port), (cast.remote, 53)).by(1), REDIRECT)?;
        }
        let map = world.datapath.typed::<u32, abi::Usage>("usage")?;
        for wrong in [0, 5000, u32::MAX - 3] {
            let mut row = map.get(&1)?.context("endpoint 1")?;
            row.in_use[0] = wrong;
            row.in_use[1] = wrong;
            map.insert(&1, &row)?;
            world.collect_garbage()?;
            let row = usage(world, 1)?;
            assert_eq!((row.connections, row.opening), (10, 10), "after {wrong}");
        }
        // The pod goes, and another one gets its number: it does not pay for what is left.
        world.change_endpoint(1, |row| {
            (row.ipv4, row.ipv6) = (abi::addr_of(casts()[0].nobody), abi::addr_of(casts()[1].nobody));
        })?;
        for _ in 0..2 {
            world.collect_garbage()?;
        }
        assert_eq!((usage(world, 1)?.connections, world.connections(0)?.len()), (0, 0));
        Ok(())
    })
}

#[test]
fn who_has_his_share_of_connections_gets_no_more() -> Result<()> {
    require_lab!();
    let quotas = Quotas { connections: Some(20), ..Quotas::default() };
    in_both_families_with(Settings { quotas, ..settings() }, |world, cast| {
        let ask = |port| udp((cast.a, port), (cast.remote, 53)).by(1);
        // Nobody collects what has expired: so nobody is refused for it.
        for port in 1000..1030 {
            expect(world, &ask(port), REDIRECT)?;
        }
        world.forget_flows()?;
        for _ in 0..2 {
            world.collect_garbage()?;
        }
        for port in 1000..1020 {
            expect(world, &ask(port), REDIRECT)?;
        }
        let outcome = expect(world, &ask(1020), SHOT)?;
        assert_eq!(outcome.counted, [(198, EGRESS as u8)]);
        assert_eq!(outcome.events.iter().map(|event| event.reason).collect::<Vec<_>>(), [198]);
        assert_eq!(usage(world, 1)?.refused_total(), 1);
        assert_eq!(world.datapath.refused()?, [1, 0, 0]);
        // What runs goes on, and others begin.
        expect(world, &ask(1000), REDIRECT)?;
        expect(world, &udp((cast.b, 1000), (cast.remote, 53)).by(2), REDIRECT)?;
        expect(world, &udp((cast.b, 1000), (cast.a, 53)).by(2), REDIRECT)?;
        Ok(())
    })
}

/// What an egress gateway gives pods of other nodes, which have no endpoint here.
#[test]
fn a_pod_of_another_node_gets_no_more_than_its_share_of_its_gateways_ports() -> Result<()> {
    require_lab!();
    let quotas = Quotas { nat_ports: Some(20), ..Quotas::default() };
    let settings = Settings { quotas, nat_ports: 20_000..=20_099, ..settings() };
    in_both_families_with(settings, |world, cast| {
        world.collect_garbage()?;
        let flags = (egress_flags::EGRESS_HERE.0 | egress_flags::EGRESS_OF_DEVICE.0) as _;
        world.address(cast.nobody, R, 0, address_flags::ADDRESS_POD.0 as u16, Some(cast.other_node))?;
        let rules = world.datapath.typed::<abi::EgressRuleKey, abi::EgressRule>("egress_rules")?;
        let pods = world.datapath.typed::<abi::Addr, u32>("egress_pods")?;
        let key = abi::EgressRuleKey { prefix_length: 160, set: 1, destination: addr_of(cast.world) };
        rules.insert(&key, &abi::EgressRule { flags, ..abi::EgressRule::default() })?;
        for pod in [cast.remote, cast.nobody] {
            pods.insert(&addr_of(pod), &1)?;
        }
        let ask = |pod, port| udp((pod, port), (cast.world, 53));
        for port in 1000..1020 {
            let outcome = world.send("to_network", &ask(cast.remote, port))?;
            ensure!(outcome.action == PASS, "{outcome:?}");
        }
        let outcome = world.send("to_network", &ask(cast.remote, 1020))?;
        assert_eq!((outcome.action, outcome.counted), (SHOT, vec![(240, EGRESS as u8)]));
        // What runs goes on, and others get ports: the gateway's pods, and those of other nodes.
        for (pod, port) in [(cast.remote, 1000), (cast.a, 1000), (cast.nobody, 1000)] {
            ensure!(world.send("to_network", &ask(pod, port))?.action == PASS, "{pod}");
        }
        // The count is right, and what is over is given back.
        world.collect_garbage()?;
        let outcome = world.send("to_network", &ask(cast.remote, 1020))?;
        assert_eq!((outcome.action, outcome.counted), (SHOT, vec![(240, EGRESS as u8)]));
        world.change_mappings(|row| row.last_seen_jiffies = 1)?;
        world.collect_garbage()?;
        for port in 2000..2020 {
            let outcome = world.send("to_network", &ask(cast.remote, port))?;
            ensure!(outcome.action == PASS, "{outcome:?}");
        }
        Ok(())
    })
}

#[test]
fn who_has_his_share_of_ports_gets_no_more() -> Result<()> {
    require_lab!();
    let quotas = Quotas { nat_ports: Some(20), ..Quotas::default() };
    let settings = Settings { quotas, nat_ports: 20_000..=20_099, ..settings() };
    in_both_families_with(settings, |world, cast| {
        world.collect_garbage()?;
        let ask = |pod, port| udp((pod, port), (cast.world, 53));
        for port in 1000..1020 {
            let outcome = world.send("to_network", &ask(cast.a, port))?;
            ensure!(outcome.action == PASS, "{outcome:?}");
        }
        let outcome = world.send("to_network", &ask(cast.a, 1020))?;
        assert_eq!((outcome.action, outcome.counted), (SHOT, vec![(240, EGRESS as u8)]));
        assert_eq!(outcome.events.iter().map(|event| event.reason).collect::<Vec<_>>(), [240]);
        let row = usage(world, 1)?;
        assert_eq!((row.nat_ports, row.refused_total()), (20, 1));
        // What runs goes on, and others get ports.
        for (pod, port) in [(cast.a, 1000), (cast.b, 1000)] {
            ensure!(world.send("to_network", &ask(pod, port))?.action == PASS, "{pod}");
        }
        world.collect_garbage()?;
        assert_eq!((usage(world, 1)?.nat_ports, usage(world, 2)?.nat_ports), (20, 1));
        world.change_mappings(|row| row.last_seen_jiffies = 1)?;
        world.collect_garbage()?;
        assert_eq!((usage(world, 1)?.nat_ports, usage(world, 2)?.nat_ports), (0, 0));
        let outcome = world.send("to_network", &ask(cast.a, 1020))?;
        ensure!(outcome.action == PASS, "{outcome:?}");
        Ok(())
    })
}

#[test]
fn the_last_rows_are_never_one_pods() -> Result<()> {
    require_lab!();
    // Limits that allow everything: then what is left decides.
    let quotas = Quotas { connections: Some(16_777_216), opening: Some(16_777_216), ..Quotas::default() };
    in_both_families_with(Settings { quotas, ..settings() }, |world, cast| {
        idle_connections(world, cast)?;
        world.change_endpoint(4, |row| row.ifindex = 1)?;
        for ((client, asks), (server, answers)) in
            [((cast.a, 1), (cast.elsewhere, 4)), ((cast.elsewhere, 4), (cast.a, 1))]
        {
            for port in 0..FLOOD / 2 {
                let (client, server) = ((client, 1024 + port), (server, 53));
                act(world, "from_pod", &udp(client, server).by(asks).bytes())?;
                act(world, "from_pod", &udp(server, client).by(answers).bytes())?;
            }
        }
        let (first, second) = (usage(world, 1)?, usage(world, 4)?);
        assert_eq!(broken(world, cast)?, 0, "of {IDLE}; {first:?}, {second:?}");
        ensure!(first.connections > 1500 && second.connections > 700, "{first:?}, {second:?}");
        expect(world, &tcp((cast.b, 999), (cast.remote, 443), SYN).by(2), REDIRECT)?;
        Ok(())
    })
}

#[test]
fn one_pods_drops_take_nobody_elses_records() -> Result<()> {
    require_lab!();
    within(settings(), |world| {
        let cast = casts()[0];
        world.enforce(1, &[EGRESS])?;
        world.enforce(2, &[EGRESS])?;
        let before = world.datapath.event_counts()?;
        let denied = udp((cast.a, 1), (cast.remote, 53)).by(1);
        world.repeat("from_pod", &denied.bytes(), 100_000)?;
        // And some with an address that is not the pod's, and that nobody can read.
        world.repeat("from_pod", &udp((cast.world, 1), (cast.remote, 53)).by(1).bytes(), 5000)?;
        let mut malformed = denied.bytes();
        malformed[14] = 0x51;
        world.repeat("from_pod", &malformed, 5000)?;
        act(world, "from_pod", &udp((cast.b, 1), (cast.remote, 53)).by(2).bytes())?;
        let mut records = Vec::new();
        world.read_events(|event| records.push((event.source_endpoint, event.reason)))?;
        assert_eq!(records.last(), Some(&(2, 133)), "of {}", records.len());
        let counts = world.datapath.event_counts()?;
        let offered = counts.offered - before.offered;
        assert_eq!((offered, counts.lost), (110_001, 0));
        assert_eq!(records.len() as u64 + counts.suppressed, offered);
        ensure!(counts.suppressed > 90_000, "{counts:?}");
        assert_eq!(usage(world, 1)?.records_suppressed + usage_of_nobody(world)?, counts.suppressed);
        Ok(())
    })
}

/// Records that were suppressed of what no endpoint answers for.
fn usage_of_nobody(world: &World) -> Result<u64> {
    let rows = world.datapath.typed::<u32, abi::Usage>("usage")?.rows()?;
    Ok(rows.iter().filter(|(index, _)| index.0 >= 4096).map(|(_, row)| row.records_suppressed).sum())
}
