//! Packets that come after the end of their connection: what brings it back, and what does not.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use weir::datapath::Settings;
use weir::datapath::abi::Ended;

use super::flows::{END, expect, types};
use super::frame::{ACK, FIN, Packet, SYN, tcp};
use super::world::{
    Arrival, EGRESS, INGRESS, Outcome, R, REDIRECT, SHOT, World, casts, in_both_families,
    in_both_families_with, settings,
};
use crate::require::require_lab;

/// A pod's connection with another node's pod, from its first packet to its last: how often its end was told.
fn connect_and_close(world: &mut World, client: (IpAddr, u16), server: (IpAddr, u16)) -> Result<usize> {
    for flags in [SYN, FIN] {
        expect(world, &tcp(client, server, flags).by(1), REDIRECT)?;
        let outcome = by_tunnel(world, &tcp(server, client, flags | ACK))?;
        ensure!(outcome.action == REDIRECT, "{outcome:?}");
    }
    let outcome = expect(world, &tcp(client, server, ACK).by(1), REDIRECT)?;
    Ok(types(&outcome.events).iter().filter(|kind| **kind == END).count())
}

fn by_tunnel(world: &mut World, packet: &Packet) -> Result<Outcome> {
    let node = casts().into_iter().find(|cast| cast.remote == packet.source).map(|cast| cast.other_node);
    let tunnel = Some((Some(node.context("a packet of the other node's pod")?), R));
    world.send_as("from_overlay", packet, Arrival { tunnel, ..Arrival::default() })
}

#[test]
fn what_comes_late_belongs_to_the_connection_that_has_ended() -> Result<()> {
    require_lab!();
    // A slow machine takes longer than connections that have ended are otherwise good for.
    let patient = Settings { tcp_closing: Duration::from_secs(3600), ..settings() };
    in_both_families_with(patient, |world, cast| {
        // A may ask R; nobody may ask A.
        world.enforce(1, &[INGRESS, EGRESS])?;
        world.allow(1, EGRESS, R, (6, 80))?;
        let (server, ports) = ((cast.remote, 80), 30001..30301);
        let mut told = 0;
        for port in ports.clone() {
            told += connect_and_close(world, (cast.a, port), server)?;
        }
        assert_eq!((told, world.connections(0)?.len()), (300, 0), "each end is told once");

        // The last acknowledgements got lost: the FINs come again. Few slots were wanted twice.
        let mut known = 0;
        for port in ports {
            let outcome = by_tunnel(world, &tcp(server, (cast.a, port), FIN | ACK))?;
            if outcome.action == REDIRECT {
                ensure!(outcome.events.is_empty(), "told {:?}", outcome.events);
                known += 1;
            }
        }
        ensure!(known > 280, "{known} of 300 were known");
        assert_eq!(world.connections(0)?.len(), known);

        // Nobody else gets in that way, and no SYN.
        let outcome = by_tunnel(world, &tcp(server, (cast.a, 29999), FIN | ACK))?;
        ensure!(outcome.action == SHOT, "{outcome:?}");
        world.forget_flows()?;
        connect_and_close(world, (cast.a, 30001), server)?;
        let outcome = by_tunnel(world, &tcp(server, (cast.a, 30001), SYN))?;
        ensure!(outcome.action == SHOT, "{outcome:?}");
        let outcome = world.send("from_network", &tcp(server, (cast.a, 30001), FIN | ACK))?;
        ensure!(outcome.action == SHOT, "not by the tunnel: {outcome:?}");
        Ok(())
    })
}

#[test]
fn late_packets_obey_the_policy_in_force() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let (client, server) = ((cast.a, 30001), (cast.remote, 80));
        connect_and_close(world, client, server)?;
        world.enforce(1, &[EGRESS])?;
        for packet in [tcp(server, client, FIN | ACK), tcp(server, client, ACK)] {
            let outcome = by_tunnel(world, &packet)?;
            ensure!(outcome.action == SHOT, "{outcome:?}");
        }
        expect(world, &tcp(client, server, ACK).by(1), SHOT)?;
        Ok(())
    })
}

#[test]
fn a_connection_that_is_written_down_torn_does_not_return() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let (client, server) = ((cast.a, 30001), (cast.remote, 80));
        let late = tcp(server, client, FIN | ACK);
        world.enforce(1, &[INGRESS])?;
        let tears: [fn(&mut Ended); 4] = [
            |_| {},
            |row| row.check ^= 1,
            |row| row.connection.endpoint = [1, 2],
            |row| row.connection.last_seen_jiffies += 1,
        ];
        for (number, tear) in tears.into_iter().enumerate() {
            world.forget_flows()?;
            connect_and_close(world, client, server)?;
            world.change_ended(tear)?;
            let outcome = by_tunnel(world, &late)?;
            ensure!(outcome.action == if number == 0 { REDIRECT } else { SHOT }, "{number}: {outcome:?}");
        }
        Ok(())
    })
}

#[test]
fn a_connection_that_ended_long_ago_does_not_return() -> Result<()> {
    require_lab!();
    let hasty = Settings { tcp_closing: Duration::from_secs(1), ..settings() };
    in_both_families_with(hasty, |world, cast| {
        let (client, server) = ((cast.a, 30001), (cast.remote, 80));
        world.enforce(1, &[INGRESS])?;
        connect_and_close(world, client, server)?;
        std::thread::sleep(Duration::from_millis(1100));
        let outcome = by_tunnel(world, &tcp(server, client, FIN | ACK))?;
        ensure!(outcome.action == SHOT, "{outcome:?}");
        Ok(())
    })
}
