//! Backends that are chosen per packet: how long a choice holds, and for whom.

use std::net::IpAddr;

use anyhow::{Result, ensure};
use weir::datapath::abi::{Slot, SlotKey};

use super::frame::{ACK, FIN, Packet, RST, SYN, sctp, tcp, udp};
use super::services::{becomes, destination_of};
use super::world::{INGRESS, REDIRECT, SHOT, World, in_both_families};
use crate::require::require_lab;

/// More than what is left to a connection that is over, less than what ends one that rests,
/// whatever a tick is.
const SILENCE: u64 = 12_000;

/// Sends a pod's packet to a service: the backend that it goes to.
fn backend_of(world: &mut World, packet: &Packet) -> Result<IpAddr> {
    let outcome = world.send("from_pod", packet)?;
    ensure!(outcome.action == REDIRECT, "counted {:?} for {packet:?}", outcome.counted);
    Ok(destination_of(&outcome.frame))
}

#[test]
fn a_half_closed_connection_keeps_its_backend() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let (service, ports) = ((cast.service, 80), 40000..40020);
        world.service((cast.service, 80, 6), 500, 1, &[(cast.b, 8080), (cast.elsewhere, 8080)])?;
        for port in ports.clone() {
            let send =
                |world: &mut World, flags| backend_of(world, &tcp((cast.a, port), service, flags).by(1));
            let chosen = send(world, SYN)?;
            assert_eq!(send(world, ACK)?, chosen);
            assert_eq!(send(world, FIN | ACK)?, chosen);
            // The server takes its time; what it then sends is acknowledged.
            world.change_connections(|_, row| row.last_seen_jiffies -= SILENCE)?;
            assert_eq!(send(world, ACK)?, chosen, "port {port}");
        }
        Ok(())
    })
}

#[test]
fn a_choice_goes_with_its_connection() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let (client, service, backend) = ((cast.a, 40000), (cast.service, 80), (cast.b, 8080));
        for last in [FIN | ACK, RST] {
            world.forget_flows()?;
            for (flags, answer) in [(SYN, SYN | ACK), (FIN | ACK, last)] {
                becomes(world, &tcp(client, service, flags).by(1), &tcp(client, backend, flags))?;
                becomes(world, &tcp(backend, client, answer).by(2), &tcp(service, client, answer))?;
            }
            if last != RST {
                becomes(world, &tcp(client, service, ACK).by(1), &tcp(client, backend, ACK))?;
                assert_eq!(world.connections(0)?.len(), 0, "it has ended");
            }
            for _ in 0..2 {
                world.change_connections(|_, row| row.last_seen_jiffies -= SILENCE)?;
                world.collect_garbage()?;
            }
            assert_eq!(world.connections(0)?.len() + world.connections(1)?.len(), 0, "after {last}");
        }
        // To itself a pod speaks by another name.
        let (service, backend, stand_in) = ((cast.service, 81), (cast.a, 8081), (cast.loopback, 40000));
        for (flags, answer) in [(SYN, SYN | ACK), (FIN | ACK, FIN | ACK)] {
            becomes(world, &tcp(client, service, flags).by(1), &tcp(stand_in, backend, flags))?;
            becomes(world, &tcp(backend, stand_in, answer).by(1), &tcp(service, client, answer))?;
        }
        becomes(world, &tcp(client, service, ACK).by(1), &tcp(stand_in, backend, ACK))?;
        world.change_connections(|_, row| row.last_seen_jiffies -= SILENCE)?;
        assert_eq!(world.collect_garbage()?.0.connections, 1);
        Ok(())
    })
}

#[test]
fn a_row_of_another_service_is_no_backend() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let (client, service) = ((cast.a, 40000), (cast.service, 80));
        world.service((cast.service, 80, 17), 500, 1, &[(cast.b, 8080)])?;
        backend_of(world, &udp(client, service).by(1))?;
        // As if the row had been freed and taken by another one.
        let slots = world.datapath.typed::<SlotKey, Slot>("slots")?;
        let key = SlotKey { service_id: 500, generation: 1, slot: 0 };
        let row = slots.get(&key)?.expect("it was written");
        slots.insert(&key, &Slot { service_id: 501, ..row })?;
        world.forget_flows()?;
        let outcome = world.send("from_pod", &udp(client, service).by(1))?;
        ensure!(outcome.counted[0].0 == 158, "{outcome:?}");
        Ok(())
    })
}

#[test]
fn sctps_checksum_follows_its_ports() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let (client, service) = ((cast.a, 40000), (cast.service, 80));
        world.enforce(2, &[INGRESS])?;
        world.allow(2, INGRESS, 301, (0, 0))?;
        for (generation, port) in [(1, 8080), (2, 80)] {
            let backend = (cast.b, port);
            world.service((cast.service, 80, 132), 500, generation, &[backend])?;
            world.forget_flows()?;
            for chunk in [&b""[..], b"data", &[7; 777]] {
                becomes(world, &sctp(client, service, chunk).by(1), &sctp(client, backend, chunk))?;
                becomes(world, &sctp(backend, client, chunk).by(2), &sctp(service, client, chunk))?;
            }
        }
        // Of the first of several fragments nobody knows where the packet ends.
        world.service((cast.service, 80, 132), 500, 3, &[(cast.b, 8080)])?;
        world.forget_flows()?;
        let first = sctp(client, service, &[7; 12]).by(1).fragment(5, 0, true);
        let outcome = world.send("from_pod", &first)?;
        ensure!(outcome.action == SHOT && outcome.counted[0].0 == 141, "{outcome:?}");
        Ok(())
    })
}

#[test]
fn a_backend_that_speaks_first_again_has_the_services_name() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let (client, service, backend) = ((cast.a, 40000), (cast.service, 80), (cast.b, 8080));
        for is_evicted in [false, true] {
            world.forget_flows()?;
            becomes(world, &udp(client, service).by(1), &udp(client, backend))?;
            becomes(world, &udp(backend, client).by(2), &udp(service, client))?;
            if is_evicted {
                // Nobody remembers the service: it is the backend's own flow.
                world.forget_flows_of_kind(0)?;
                becomes(world, &udp(backend, client).by(2), &udp(backend, client))?;
            } else {
                world.change_connections(|_, row| row.last_seen_jiffies -= 1_000_000)?;
                becomes(world, &udp(backend, client).by(2), &udp(service, client))?;
            }
            // In any case from the client's next word on.
            for _ in 0..2 {
                becomes(world, &udp(client, service).by(1), &udp(client, backend))?;
                becomes(world, &udp(backend, client).by(2), &udp(service, client))?;
            }
            assert_eq!(world.connections(0)?.len(), 1);
        }
        Ok(())
    })
}

#[test]
fn a_backend_that_speaks_first_again_is_judged_as_who_begins() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let (client, service, backend) = ((cast.a, 40000), (cast.service, 80), (cast.b, 8080));
        becomes(world, &udp(client, service).by(1), &udp(client, backend))?;
        becomes(world, &udp(backend, client).by(2), &udp(service, client))?;
        world.enforce(1, &[INGRESS])?;
        world.change_connections(|_, row| row.last_seen_jiffies -= 1_000_000)?;
        let outcome = world.send("from_pod", &udp(backend, client).by(2))?;
        ensure!(outcome.action == SHOT && outcome.events[0].reason == 133, "{outcome:?}");
        becomes(world, &udp(client, service).by(1), &udp(client, backend))?;
        becomes(world, &udp(backend, client).by(2), &udp(service, client))?;
        Ok(())
    })
}

#[test]
fn what_a_client_has_answered_itself_stays_apart_from_the_service() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let (client, service, backend) = ((cast.a, 40000), (cast.service, 80), (cast.b, 8080));
        becomes(world, &udp(backend, client).by(2), &udp(backend, client))?;
        becomes(world, &udp(client, backend).by(1), &udp(client, backend))?;
        let outcome = world.send("from_pod", &udp(client, service).by(1))?;
        ensure!(outcome.action == REDIRECT, "{outcome:?}");
        assert_eq!(world.connections(0)?.len(), 2, "the service's has a port of its own");
        becomes(world, &udp(backend, client).by(2), &udp(backend, client))?;
        becomes(world, &udp(client, backend).by(1), &udp(client, backend))?;
        Ok(())
    })
}
