//! ICMP messages that ask and are answered: each side's questions are flows of their own.

use anyhow::{Result, ensure};

use super::flows::expect;
use super::frame::{Layer4, Packet, echo, echo_reply, icmp};
use super::world::{A, INGRESS, PASS, REDIRECT, SHOT, in_both_families};
use crate::require::require_lab;

fn with_id(mut packet: Packet, id: u16) -> Packet {
    if let Layer4::Icmp { rest, .. } = &mut packet.layer4 {
        rest[..2].copy_from_slice(&id.to_be_bytes());
    }
    packet
}

#[test]
fn bypass_2_who_answers_a_query_may_not_ask_one() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        // Echo, timestamp, information, address mask, extended echo.
        let kinds: &[(u8, u8)] = match cast.a.is_ipv4() {
            true => &[(8, 0), (13, 14), (15, 16), (17, 18), (42, 43)],
            false => &[(128, 129), (160, 161)],
        };
        world.enforce(1, &[INGRESS])?;
        for (question, answer) in kinds {
            for id in [0, 1, 2, 0x100, 0xffff] {
                world.forget_flows()?;
                let from_a = |kind| with_id(icmp(cast.a, cast.b, kind, 0), id).by(1);
                let from_b = |kind| with_id(icmp(cast.b, cast.a, kind, 0), id).by(2);
                expect(world, &from_b(*answer), SHOT)?;
                expect(world, &from_a(*question), REDIRECT)?;
                expect(world, &from_b(*answer), REDIRECT)?;
                for (other, _) in kinds {
                    let outcome = expect(world, &from_b(*other), SHOT)?;
                    ensure!(outcome.events[0].reason == 133, "{other} with {id}: {outcome:?}");
                }
                assert_eq!(world.connections(0)?.len(), 1);
            }
        }
        Ok(())
    })
}

#[test]
fn bypass_2_a_query_that_is_allowed_opens_no_other_type() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        // Echo, timestamp; echo, extended echo.
        let (protocol, types) = if cast.a.is_ipv4() { (1, [8, 13]) } else { (58, [128, 160]) };
        for (allowed, other) in [(types[0], types[1]), (types[1], types[0])] {
            world.forget_flows()?;
            world.forget_rules()?;
            world.enforce(2, &[INGRESS])?;
            world.allow(2, INGRESS, A, (protocol, u16::from(allowed)))?;
            let query = |kind, id| with_id(icmp(cast.a, cast.b, kind, 0), id).by(1);
            expect(world, &query(allowed, 7), REDIRECT)?;
            // Neither the flow of the identifier nor the verdict on the two pods is of the other type.
            for id in [7, 8] {
                let outcome = expect(world, &query(other, id), SHOT)?;
                ensure!(outcome.events[0].reason == 133, "{other} with {id}: {outcome:?}");
            }
            expect(world, &query(allowed, 8), REDIRECT)?;
        }
        Ok(())
    })
}

#[test]
fn what_has_no_identifier_is_no_answer() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        // Experimental types: nobody answers them.
        let kind = if cast.a.is_ipv4() { 253 } else { 200 };
        world.enforce(1, &[INGRESS])?;
        expect(world, &icmp(cast.a, cast.b, kind, 0).by(1), REDIRECT)?;
        expect(world, &icmp(cast.b, cast.a, kind, 0).by(2), SHOT)?;
        Ok(())
    })
}

#[test]
fn an_identifier_of_zero_is_masqueraded_like_any_other() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        for id in [0, 7] {
            world.forget_flows()?;
            let asked = echo(cast.a, cast.world, id).by(1);
            expect(world, &asked, PASS)?;
            let outcome = world.send("to_network", &asked)?;
            let offset = 14 + if cast.a.is_ipv4() { 20 } else { 40 } + 4;
            let way = u16::from_be_bytes([outcome.frame[offset], outcome.frame[offset + 1]]);
            ensure!((20000..20004).contains(&way), "{id} leaves as {way}");
            let macs = asked.macs;
            let expected = Packet { macs, ..echo(cast.node, cast.world, way) };
            ensure!(outcome.frame == expected.bytes(), "{outcome:?}");
            let answer = echo_reply(cast.world, cast.node, way);
            let outcome = world.send("from_network", &answer)?;
            ensure!(outcome.action == REDIRECT, "{outcome:?}");
            ensure!(outcome.frame == echo_reply(cast.world, cast.a, id).bytes(), "{outcome:?}");
            // While the flow lives its mapping is kept.
            world.change_mappings(|row| row.last_seen_jiffies -= 1000)?;
            assert_eq!(world.collect_garbage()?.0.nat, 0);
        }
        Ok(())
    })
}
