//! Flows between pods: verdicts, what is remembered, what ends a verdict.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sched::{CpuSet, sched_getcpu, sched_setaffinity};
use nix::unistd::Pid;
use weir::datapath::abi::{Connection, Event};
use weir::datapath::types::{connection_flags, event_flags, event_type};

use super::frame::{ACK, FIN, Packet, RST, SYN, echo, echo_reply, tcp, udp};
use super::world::{
    A, ANSWER, Arrival, B, Cast, EGRESS, INGRESS, MARK, Outcome, PASS, REDIRECT, SHOT, World,
    in_both_families,
};
use crate::require::require_lab;

pub(super) const NEW: u8 = event_type::EVENT_FLOW_NEW.0 as u8;
pub(super) const UPDATE: u8 = event_type::EVENT_FLOW_UPDATE.0 as u8;
pub(super) const END: u8 = event_type::EVENT_FLOW_END.0 as u8;

/// Verdicts are kept by processor.
fn stay_on_one_cpu() -> Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(sched_getcpu()?)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &cpus)?)
}

fn forward(cast: &Cast, flags: u8) -> Packet {
    tcp((cast.a, 40000), (cast.b, 80), flags).by(1)
}

fn backward(cast: &Cast, flags: u8) -> Packet {
    tcp((cast.b, 80), (cast.a, 40000), flags).by(2)
}

pub(super) fn expect(world: &mut World, packet: &Packet, action: u32) -> Result<Outcome> {
    let outcome = world.send("from_pod", packet)?;
    ensure!(
        outcome.action == action,
        "the action is {}, not {action}: counted {:?}, {packet:?}",
        outcome.action,
        outcome.counted
    );
    Ok(outcome)
}

pub(super) fn only_flow(world: &World) -> Result<Connection> {
    let flows = world.connections(0)?;
    ensure!(flows.len() == 1, "the flows are {flows:?}");
    Ok(flows[0].1)
}

pub(super) fn types(events: &[Event]) -> Vec<u8> {
    events.iter().map(|event| event.r#type).collect()
}

#[test]
fn a_tcp_connection_is_one_entry_and_few_events() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let mut events = Vec::new();
        let segments = [
            forward(&cast, SYN),
            backward(&cast, SYN | ACK),
            forward(&cast, ACK),
            forward(&cast, ACK).payload(b"GET / HTTP/1.0\r\n\r\n"),
            backward(&cast, ACK).payload(b"HTTP/1.0 200 OK\r\n\r\n"),
            backward(&cast, FIN | ACK),
            forward(&cast, FIN | ACK),
            backward(&cast, ACK),
        ];
        let mut pass = |world: &mut World, segment: &Packet| -> Result<()> {
            let outcome = expect(world, segment, REDIRECT)?;
            ensure!(outcome.frame == segment.bytes(), "the frame is changed");
            ensure!(outcome.counted == [(0, EGRESS as u8)], "counted {:?}", outcome.counted);
            events.extend(outcome.events);
            Ok(())
        };
        let (last, others) = segments.split_last().expect("there are some");
        others.iter().try_for_each(|segment| pass(world, segment))?;
        let flow = only_flow(world)?;
        assert_eq!((flow.packets, flow.tcp_flags), ([4, 3], [SYN | ACK | FIN, SYN | ACK | FIN]));
        let length = |packet: &Packet| packet.bytes().len() as u64;
        assert_eq!(flow.bytes[0], [0, 2, 3, 6].map(|i| length(&segments[i])).iter().sum::<u64>());
        assert_eq!((flow.identity, flow.endpoint), ([A, B], [1, 2]));
        let closing = connection_flags::CONNECTION_CLOSING.0 | connection_flags::CONNECTION_REPLIED.0;
        assert_eq!(u32::from(flow.flags) & closing, closing);
        pass(world, last)?;
        assert_eq!(types(&events), [NEW, END]);
        assert_eq!(world.connections(0)?.len(), 0, "what has ended makes room");
        let [_, last] = &events[..] else { unreachable!("there are two") };
        let told_by = |event: &Event| u32::from(event.flags) & event_flags::EVENT_REPLY.0 != 0;
        assert_eq!(
            events.iter().map(told_by).collect::<Vec<_>>(),
            [false, true],
            "who has sent the last packet"
        );
        assert_eq!((last.source_identity, last.destination_identity), (A, B));
        assert_eq!(u16::from_be(last.source_port), 40000);
        assert_eq!(last.packets, [4, 4]);
        // A straggler brings it back, begins nothing, and is not reported.
        let straggler = expect(world, &backward(&cast, ACK), REDIRECT)?;
        assert!(straggler.events.is_empty());
        assert_eq!(only_flow(world)?.packets, [4, 5]);
        // The same ports again are another connection.
        let again = expect(world, &segments[0], REDIRECT)?;
        assert_eq!(types(&again.events), [NEW]);
        assert_eq!(only_flow(world)?.packets, [1, 0]);
        Ok(())
    })
}

/// From the last SYN to its answer, whatever the ticks of the clock are; nothing without an answer.
#[test]
fn the_handshake_says_how_long_a_round_trip_takes() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let end = |world: &mut World| -> Result<u8> {
            let outcome = expect(world, &forward(&cast, RST), REDIRECT)?;
            let event = outcome.events.last().context("an end")?;
            world.forget_flows()?;
            Ok(event.round_trip)
        };
        for wait in [0, 3, 40, 150].map(Duration::from_millis) {
            let mut began = Instant::now();
            expect(world, &forward(&cast, SYN), REDIRECT)?;
            if !wait.is_zero() {
                std::thread::sleep(Duration::from_millis(90));
                began = Instant::now();
                expect(world, &forward(&cast, SYN), REDIRECT)?;
            }
            std::thread::sleep(wait);
            expect(world, &backward(&cast, SYN | ACK), REDIRECT)?;
            // With the time that the calls themselves take.
            let most = began.elapsed() + Duration::from_micros(10);
            expect(world, &forward(&cast, ACK), REDIRECT)?;
            // Another answer is none.
            expect(world, &backward(&cast, SYN | ACK), REDIRECT)?;
            let measured = weir::flow::round_trip(end(world)?).context("a time")?;
            ensure!(
                measured >= wait * 9 / 10 && measured <= most * 11 / 10,
                "{measured:?}, at least {wait:?}, at most {most:?}"
            );
        }
        expect(world, &forward(&cast, SYN), REDIRECT)?;
        ensure!(end(world)? == 0, "nobody has answered");
        Ok(())
    })
}

#[test]
fn connections_that_have_ended_make_room() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let mut ended = 0;
        for port in 1..=200 {
            let (client, server) = ((cast.a, 40000 + port), (cast.b, 80));
            for segment in [
                tcp(client, server, SYN).by(1),
                tcp(server, client, SYN | ACK).by(2),
                tcp(client, server, FIN | ACK).by(1),
                tcp(server, client, FIN | ACK).by(2),
                tcp(client, server, ACK).by(1),
            ] {
                let outcome = expect(world, &segment, REDIRECT)?;
                ended += types(&outcome.events).iter().filter(|kind| **kind == END).count();
            }
            // The first one's ports are in use again.
            if port == 2 {
                expect(world, &tcp((cast.a, 40001), server, SYN).by(1), REDIRECT)?;
            }
        }
        assert_eq!(ended, 200, "each end is told once");
        let left = world.connections(0)?;
        assert_eq!(left.len(), 1, "{left:?}");
        assert_eq!(left[0].1.packets, [1, 0], "the one that began anew goes on");
        Ok(())
    })
}

#[test]
fn the_initiator_is_the_same_whichever_address_is_lower() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        for (from, to, id) in [(cast.a, cast.b, 1), (cast.b, cast.a, 2)] {
            world.forget_flows()?;
            let outcome = expect(world, &udp((from, 5000), (to, 53)).by(id), REDIRECT)?;
            let event = outcome.events[0];
            assert_eq!((event.source_endpoint, event.destination_endpoint), (id, 3 - id));
            let answer = expect(world, &udp((to, 53), (from, 5000)).by(3 - id), REDIRECT)?;
            ensure!(answer.events.is_empty());
            assert_eq!(only_flow(world)?.packets, [1, 1]);
        }
        Ok(())
    })
}

#[test]
fn replies_need_no_rule() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        world.enforce(1, &[EGRESS, INGRESS])?;
        world.enforce(2, &[EGRESS, INGRESS])?;
        world.allow(1, EGRESS, B, (6, 80))?;
        world.allow(2, INGRESS, A, (6, 80))?;
        expect(world, &backward(&cast, SYN), SHOT)?;
        let outcome = expect(world, &forward(&cast, SYN), REDIRECT)?;
        assert_eq!(outcome.events[0].rule_id, 1080);
        expect(world, &backward(&cast, SYN | ACK), REDIRECT)?;
        expect(world, &forward(&cast, ACK), REDIRECT)?;
        // Of its own accord the server may not.
        expect(world, &tcp((cast.b, 80), (cast.a, 40001), SYN).by(2), SHOT)?;
        Ok(())
    })
}

#[test]
fn a_reply_port_does_not_let_the_responder_begin() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        world.enforce(1, &[INGRESS])?;
        expect(world, &forward(&cast, SYN), REDIRECT)?;
        expect(world, &backward(&cast, SYN | ACK), REDIRECT)?;
        expect(world, &backward(&cast, SYN), SHOT)?;
        // And the connection goes on.
        expect(world, &forward(&cast, ACK), REDIRECT)?;
        assert_eq!(only_flow(world)?.packets, [2, 1]);
        Ok(())
    })
}

#[test]
fn bypass_8_a_tightened_policy_stops_a_running_connection_both_ways() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        for first_is_reply in [false, true] {
            world.reset()?;
            world.enforce(2, &[INGRESS])?;
            world.allow(2, INGRESS, A, (6, 80))?;
            expect(world, &forward(&cast, SYN), REDIRECT)?;
            expect(world, &backward(&cast, SYN | ACK), REDIRECT)?;
            world.forget_rules()?;
            // The rows alone do not matter to what is running; the epoch does.
            expect(world, &forward(&cast, ACK), REDIRECT)?;
            world.enforce(2, &[INGRESS])?;
            for _ in 0..2 {
                let (one, other) = (forward(&cast, ACK), backward(&cast, ACK));
                let order = if first_is_reply { [other, one] } else { [one, other] };
                for packet in order {
                    let outcome = expect(world, &packet, SHOT)?;
                    let event = outcome.events[0];
                    assert_eq!((event.reason, event.direction), (133, INGRESS as u8));
                    assert_eq!((event.source_identity, event.destination_identity), (A, B));
                }
            }
            // Loosened again, it goes on.
            world.allow(2, INGRESS, A, (6, 80))?;
            expect(world, &backward(&cast, ACK), REDIRECT)?;
            expect(world, &forward(&cast, ACK), REDIRECT)?;
        }
        Ok(())
    })
}

#[test]
fn a_changed_identity_is_judged_again() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        world.enforce(2, &[INGRESS])?;
        world.allow(2, INGRESS, A, (17, 53))?;
        let question = udp((cast.a, 5000), (cast.b, 53)).by(1);
        expect(world, &question, REDIRECT)?;
        world.address(cast.a, 999, 1, 0b101, None)?;
        world.raise_address_epoch()?;
        expect(world, &question, SHOT)?;
        Ok(())
    })
}

#[test]
fn a_verdict_serves_the_flows_that_follow_until_something_changes() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        stay_on_one_cpu()?;
        let mut port = 5000;
        let mut ask = |world: &mut World, action| {
            port += 1;
            expect(world, &udp((cast.a, port), (cast.b, 53)).by(1), action)
        };
        world.enforce(2, &[INGRESS])?;
        world.allow(2, INGRESS, A, (17, 53))?;
        let first = ask(world, REDIRECT)?.events;
        world.forget_rules()?;
        // Rules of a policy never change: it is not asked again, and the record is the same.
        let second = ask(world, REDIRECT)?.events;
        let told = |event: &Event| (event.r#type, event.rule_id, event.ingress_rule_id, event.direction);
        assert_eq!(told(&first[0]), told(&second[0]));
        assert_eq!(
            (second[0].source_identity, second[0].destination_identity, second[0].destination_endpoint),
            (A, B, 2)
        );
        let other = expect(world, &udp((cast.a, 5000), (cast.b, 54)).by(1), SHOT)?;
        assert_eq!(other.events[0].reason, 133, "another port is another question");

        world.change_endpoint(2, |row| row.epoch += 1)?;
        ask(world, SHOT)?;
        world.allow(2, INGRESS, A, (17, 53))?;
        ask(world, REDIRECT)?;
        world.address(cast.a, 999, 1, 0b101, None)?;
        world.raise_address_epoch()?;
        ask(world, SHOT)?;
        Ok(())
    })
}

#[test]
fn verdicts_on_different_pods_are_kept_side_by_side() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        stay_on_one_cpu()?;
        world.enforce(2, &[INGRESS])?;
        world.allow(2, INGRESS, A, (17, 53))?;
        expect(world, &udp((cast.a, 5000), (cast.b, 53)).by(1), REDIRECT)?;
        expect(world, &udp((cast.a, 5000), (cast.elsewhere, 53)).by(1), REDIRECT)?;
        // Rules of a policy never change: who is asked again now has been forgotten.
        world.forget_rules()?;
        expect(world, &udp((cast.a, 5001), (cast.b, 53)).by(1), REDIRECT)?;
        Ok(())
    })
}

#[test]
fn a_verdict_on_a_sender_serves_no_other() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        stay_on_one_cpu()?;
        world.enforce(2, &[INGRESS])?;
        world.allow(2, INGRESS, A, (17, 53))?;
        // Nobody knows this address yet: the tunnel's word counts.
        let sender = cast.nobody;
        let mut port = 5000;
        for (identity, action) in [(A, REDIRECT), (A, REDIRECT), (B, SHOT), (A, REDIRECT)] {
            port += 1;
            let tunnel = Arrival { tunnel: Some((Some(cast.other_node), identity)), ..Arrival::default() };
            let outcome = world.send_as("from_overlay", &udp((sender, port), (cast.b, 53)), tunnel)?;
            ensure!(outcome.action == action, "as {identity}: {outcome:?}");
        }
        // By another way he is nobody's.
        let outcome = world.send("from_network", &udp((sender, 6000), (cast.b, 53)))?;
        ensure!(outcome.action == SHOT, "{outcome:?}");
        Ok(())
    })
}

#[test]
fn a_pod_that_took_over_an_id_inherits_no_verdict() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let question = udp((cast.a, 5000), (cast.b, 53)).by(1);
        expect(world, &question, REDIRECT)?;
        // Endpoint 2 is another pod now, with another address, and the same epoch.
        let map = world.datapath.typed::<u32, weir::datapath::abi::Endpoint>("endpoints")?;
        let mut row = map.get(&2)?.expect("an array has every row");
        row.ipv4 = Default::default();
        row.ipv6 = Default::default();
        map.insert(&2, &row)?;
        world.forget_address(cast.b)?;
        let outcome = expect(world, &question, SHOT)?;
        assert_eq!(outcome.events[0].reason, 151);
        Ok(())
    })
}

#[test]
fn an_expired_flow_begins_anew() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        world.enforce(1, &[INGRESS])?;
        expect(world, &udp((cast.a, 5000), (cast.b, 53)).by(1), REDIRECT)?;
        expect(world, &udp((cast.b, 53), (cast.a, 5000)).by(2), REDIRECT)?;
        world.change_connections(|_, row| row.last_seen_jiffies -= 1_000_000)?;
        // Too late for an answer: this is the server's own attempt.
        expect(world, &udp((cast.b, 53), (cast.a, 5000)).by(2), SHOT)?;
        let outcome = expect(world, &udp((cast.a, 5000), (cast.b, 53)).by(1), REDIRECT)?;
        assert_eq!(types(&outcome.events), [END, NEW]);
        assert_eq!(only_flow(world)?.packets, [1, 0]);
        Ok(())
    })
}

#[test]
fn a_port_is_used_again_after_the_end() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        for end in [vec![forward(&cast, RST)], vec![forward(&cast, FIN | ACK), backward(&cast, FIN | ACK)]] {
            world.forget_flows()?;
            expect(world, &forward(&cast, SYN), REDIRECT)?;
            for packet in &end {
                expect(world, packet, REDIRECT)?;
            }
            let outcome = expect(world, &forward(&cast, SYN), REDIRECT)?;
            assert_eq!(types(&outcome.events), [END, NEW]);
            let flow = only_flow(world)?;
            assert_eq!((flow.packets, flow.tcp_flags), ([1, 0], [SYN, 0]));
            // A SYN that is sent again is no new connection.
            let outcome = expect(world, &forward(&cast, SYN), REDIRECT)?;
            ensure!(outcome.events.is_empty(), "reported {:?}", outcome.events);
        }
        Ok(())
    })
}

#[test]
fn a_long_flow_is_reported_every_few_seconds() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let packet = udp((cast.a, 5000), (cast.b, 53)).by(1);
        assert_eq!(types(&expect(world, &packet, REDIRECT)?.events), [NEW]);
        assert_eq!(types(&expect(world, &packet, REDIRECT)?.events), [0; 0]);
        // Time is looked at once a tick.
        world.change_connections(|_, row| {
            row.last_report_jiffies = row.last_report_jiffies.wrapping_sub(100_000);
            row.last_seen_jiffies -= 1;
        })?;
        let events = expect(world, &packet, REDIRECT)?.events;
        assert_eq!(types(&events), [UPDATE]);
        assert_eq!(events[0].packets, [3, 0]);
        assert_eq!(types(&expect(world, &packet, REDIRECT)?.events), [0; 0]);
        Ok(())
    })
}

#[test]
fn ping_is_a_flow_for_each_asker() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        world.enforce(1, &[INGRESS])?;
        expect(world, &echo(cast.a, cast.b, 7).by(1), REDIRECT)?;
        expect(world, &echo_reply(cast.b, cast.a, 7).by(2), REDIRECT)?;
        // The same identifier does not make a request an answer.
        let outcome = expect(world, &echo(cast.b, cast.a, 7).by(2), SHOT)?;
        assert_eq!(outcome.events[0].reason, 133);
        expect(world, &echo_reply(cast.b, cast.a, 8).by(2), SHOT)?;
        // Only a rule for any port is one for ICMP.
        let icmp = if cast.a.is_ipv4() { 1 } else { 58 };
        world.allow(1, INGRESS, B, (0, 0))?;
        expect(world, &echo(cast.b, cast.a, 9).by(2), REDIRECT)?;
        world.forget_rules()?;
        world.allow(1, INGRESS, B, (icmp, 0))?;
        expect(world, &echo(cast.b, cast.a, 10).by(2), REDIRECT)?;
        Ok(())
    })
}

#[test]
fn the_pods_own_node_is_always_let_in() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        world.enforce(2, &[INGRESS, EGRESS])?;
        let probe = tcp((cast.node, 50000), (cast.b, 8080), SYN);
        let from_stack = Arrival { is_from_stack: true, ..Arrival::default() };
        let outcome = world.send_as("to_pod", &probe, from_stack)?;
        ensure!(outcome.action == PASS, "{outcome:?}");
        assert_eq!(outcome.events[0].source_identity, 1);
        let answer = tcp((cast.b, 8080), (cast.node, 50000), SYN | ACK).by(2);
        expect(world, &answer, PASS)?;
        // Of its own accord the pod may not.
        expect(world, &tcp((cast.b, 8080), (cast.node, 22), SYN).by(2), SHOT)?;
        // Nobody else may put packets into that flow.
        let forged = tcp((cast.node, 50000), (cast.b, 8080), ACK);
        let outcome = world.send("from_network", &forged)?;
        ensure!(outcome.action == SHOT, "{outcome:?}");
        // netfilter can put any mark on any packet: no mark opens the way into a pod.
        let stranger = tcp((cast.world, 50000), (cast.b, 8080), SYN);
        for mark in [MARK, ANSWER, 0x5765_6900, u32::MAX] {
            let outcome = world.send_as("to_pod", &stranger, Arrival { mark, ..Arrival::default() })?;
            ensure!(outcome.action == SHOT && outcome.counted == [(133, INGRESS as u8)], "{outcome:?}");
        }
        Ok(())
    })
}

#[test]
fn bypass_8_nobody_puts_packets_into_a_flow_between_pods() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        expect(world, &forward(&cast, SYN), REDIRECT)?;
        expect(world, &backward(&cast, SYN | ACK), REDIRECT)?;
        let tunnel = Arrival { tunnel: Some((Some(cast.other_node), A)), ..Arrival::default() };
        for (program, arrival) in [("from_network", Arrival::default()), ("from_overlay", tunnel)] {
            let outcome = world.send_as(program, &forward(&cast, ACK), arrival)?;
            ensure!(outcome.action == SHOT && outcome.counted == [(132, INGRESS as u8)], "{outcome:?}");
        }
        Ok(())
    })
}

#[test]
fn a_connection_that_rests_is_reported_once() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        for segment in [forward(&cast, SYN), backward(&cast, SYN | ACK), forward(&cast, ACK)] {
            expect(world, &segment, REDIRECT)?;
        }
        let (_, events) = world.collect_garbage()?;
        assert!(events.is_empty(), "{events:?}");
        // Minutes: more than the interval of reports, less than what ends a connection.
        world.change_connections(|_, row| {
            row.last_seen_jiffies -= 100_000;
            row.last_report_jiffies = row.last_report_jiffies.wrapping_sub(100_000);
        })?;
        let (_, events) = world.collect_garbage()?;
        assert_eq!(types(&events), [UPDATE]);
        assert_eq!((events[0].packets, events[0].tcp_flags), ([2, 1], SYN | ACK));
        let (_, events) = world.collect_garbage()?;
        assert!(events.is_empty(), "{events:?}");
        Ok(())
    })
}

#[test]
fn what_has_expired_is_collected_and_reported() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        expect(world, &udp((cast.a, 5000), (cast.b, 53)).by(1), REDIRECT)?;
        expect(world, &udp((cast.a, 5001), (cast.b, 53)).by(1), REDIRECT)?;
        world.change_connections(|key, row| {
            if key.port.contains(&5000_u16.to_be()) {
                row.last_seen_jiffies -= 1_000_000;
            }
        })?;
        let (report, events) = world.collect_garbage()?;
        assert_eq!(report.connections, 1);
        assert_eq!(types(&events), [END]);
        assert_eq!((events[0].packets, u16::from_be(events[0].source_port)), ([1, 0], 5000));
        only_flow(world)?;
        Ok(())
    })
}
