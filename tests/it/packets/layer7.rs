//! Flows that policy leaves to the proxy: both ends speak to it, and hear from it.

use anyhow::{Result, ensure};
use weir::datapath::abi::ip_of;
use weir::datapath::types::connection_flags;

use super::flows::{expect, only_flow};
use super::frame::{ACK, FIN, Packet, SYN, tcp, udp};
use super::world::{A, B, Cast, EGRESS, INGRESS, REDIRECT, SHOT, World, in_both_families};
use crate::require::require_lab;

const NO_PROXY: u8 = 244;
const SET: u16 = 5;

fn to_server(cast: &Cast, flags: u8) -> Packet {
    tcp((cast.a, 40000), (cast.b, 80), flags).by(1)
}

fn to_client(cast: &Cast, flags: u8) -> Packet {
    tcp((cast.b, 80), (cast.a, 40000), flags).by(2)
}

fn by_proxy(world: &mut World, packet: &Packet) -> Result<u32> {
    Ok(world.send("from_proxy", packet)?.action)
}

fn is_proxied(world: &World) -> Result<bool> {
    Ok(u32::from(only_flow(world)?.flags) & connection_flags::CONNECTION_PROXY.0 != 0)
}

#[test]
fn without_a_proxy_nothing_passes_that_it_must_judge() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        world.enforce(2, &[INGRESS])?;
        world.leave_to_proxy(2, INGRESS, A, (6, 80), SET)?;
        let outcome = expect(world, &to_server(&cast, SYN), SHOT)?;
        ensure!(outcome.counted == [(NO_PROXY, EGRESS as u8)], "counted {:?}", outcome.counted);
        // What the proxy sends of its own accord is of no flow.
        world.proxy(Some(99))?;
        ensure!(by_proxy(world, &udp((cast.b, 53), (cast.a, 4000)))? == SHOT);
        Ok(())
    })
}

#[test]
fn both_ends_speak_to_the_proxy_and_the_client_is_counted() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        world.proxy(Some(99))?;
        world.enforce(1, &[EGRESS])?;
        world.allow(1, EGRESS, B, (6, 80))?;
        world.enforce(2, &[INGRESS])?;
        world.leave_to_proxy(2, INGRESS, A, (6, 80), SET)?;
        expect(world, &to_server(&cast, SYN), REDIRECT)?;
        let rows = world.l7_flows()?;
        let (key, row) = rows.first().expect("the proxy is told");
        ensure!((ip_of(key.client), u16::from_be(key.client_port)) == (cast.a, 40000), "{key:?}");
        ensure!((ip_of(key.server), u16::from_be(key.server_port)) == (cast.b, 80), "{key:?}");
        ensure!((row.client_identity, row.server_identity) == (A, B), "{row:?}");
        ensure!((row.client_endpoint, row.server_endpoint) == (1, 2), "{row:?}");
        ensure!((row.egress_set, row.ingress_set) == (0, SET), "{row:?}");

        ensure!(by_proxy(world, &to_client(&cast, SYN | ACK))? == REDIRECT, "to the client");
        ensure!(by_proxy(world, &to_server(&cast, SYN))? == REDIRECT, "to the server");
        expect(world, &to_client(&cast, SYN | ACK), REDIRECT)?;
        ensure!(only_flow(world)?.packets == [1, 1], "{:?}", only_flow(world)?);
        for flags in [ACK, FIN | ACK] {
            expect(world, &to_server(&cast, flags), REDIRECT)?;
            ensure!(by_proxy(world, &to_client(&cast, flags))? == REDIRECT);
        }
        expect(world, &to_server(&cast, ACK), REDIRECT)?;
        // The client has closed; the proxy has yet to tell the server.
        ensure!(by_proxy(world, &to_server(&cast, FIN | ACK))? == REDIRECT);
        expect(world, &to_client(&cast, FIN | ACK), REDIRECT)?;
        ensure!(by_proxy(world, &to_server(&cast, ACK))? == REDIRECT);
        ensure!(is_proxied(world)?);
        Ok(())
    })
}

#[test]
fn a_flow_is_the_proxys_from_its_beginning_to_its_end() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        world.proxy(Some(99))?;
        world.enforce(2, &[INGRESS])?;
        world.allow(2, INGRESS, A, (6, 80))?;
        expect(world, &to_server(&cast, SYN), REDIRECT)?;
        expect(world, &to_client(&cast, SYN | ACK), REDIRECT)?;
        ensure!(!is_proxied(world)?);
        // The rule comes later: the server's packets wait until the client's have begun the flow anew.
        world.leave_to_proxy(2, INGRESS, A, (6, 80), SET)?;
        world.raise_address_epoch()?;
        let outcome = expect(world, &to_client(&cast, ACK), SHOT)?;
        ensure!(outcome.counted.iter().any(|(reason, _)| *reason == NO_PROXY), "{:?}", outcome.counted);
        expect(world, &to_server(&cast, ACK), REDIRECT)?;
        ensure!(is_proxied(world)? && world.l7_flows()?[0].1.ingress_set == SET);
        // It stays the proxy's when nothing is left to judge, and the proxy knows that.
        world.allow(2, INGRESS, A, (6, 80))?;
        world.raise_address_epoch()?;
        expect(world, &to_server(&cast, ACK), REDIRECT)?;
        ensure!(is_proxied(world)? && world.l7_flows()?[0].1.ingress_set == 0);
        // What is denied does not come to the proxy.
        world.forget_rules()?;
        world.raise_address_epoch()?;
        expect(world, &to_server(&cast, ACK), SHOT)?;
        Ok(())
    })
}

/// Of a flow whose rules have changed nothing gets to the listener of the rules before: no packet again and again, none
/// after a SYN, and none of the server. Its sockets are to be ended.
#[test]
fn no_packet_gets_to_a_listener_of_other_rules() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        world.proxy(Some(99))?;
        world.enforce(2, &[INGRESS])?;
        world.leave_to_proxy(2, INGRESS, A, (6, 80), SET)?;
        expect(world, &to_server(&cast, SYN), REDIRECT)?;
        world.listens(SET)?;
        expect(world, &to_client(&cast, SYN | ACK), REDIRECT)?;
        expect(world, &to_server(&cast, ACK), REDIRECT)?;
        ensure!(world.flows_of_other_rules()? == 0);
        for (other, first) in [(SET + 1, ACK), (SET + 2, SYN)] {
            world.leave_to_proxy(2, INGRESS, A, (6, 80), other)?;
            world.raise_address_epoch()?;
            let action = if first == SYN { REDIRECT } else { SHOT };
            expect(world, &to_server(&cast, first), action)?;
            for _ in 0..2 {
                let outcome = expect(world, &to_server(&cast, ACK), SHOT)?;
                ensure!(outcome.counted == [(NO_PROXY, EGRESS as u8)], "counted {:?}", outcome.counted);
                expect(world, &to_client(&cast, ACK), SHOT)?;
            }
            let row = world.l7_flows()?[0].1;
            ensure!((row.ingress_set, row.alias) == (other, 7), "{row:?}");
            ensure!(world.flows_of_other_rules()? == 1, "nobody ends its sockets");
            // A connection with the same ports comes to a listener of the rules of now.
            expect(world, &to_server(&cast, SYN), REDIRECT)?;
            world.listens(other)?;
            expect(world, &to_client(&cast, SYN | ACK), REDIRECT)?;
            expect(world, &to_server(&cast, ACK), REDIRECT)?;
            ensure!(world.flows_of_other_rules()? == 0);
        }
        Ok(())
    })
}
