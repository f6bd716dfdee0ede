//! How TCP connections end: whose FIN and RST count, and what comes afterwards.

use anyhow::{Result, ensure};
use weir::datapath::Settings;

use super::flows::{END, NEW, UPDATE, expect, only_flow, types};
use super::frame::{ACK, FIN, Layer4, Packet, RST, SYN, tcp};
use super::world::{
    Cast, INGRESS, PASS, REDIRECT, SHOT, World, in_both_families, in_both_families_with, settings,
};
use crate::require::require_lab;

/// More than what is left to a connection that is over, less than what ends one that rests,
/// whatever a tick is.
const SILENCE: u64 = 11_000;

fn be_silent(world: &World) -> Result<()> {
    world.change_connections(|_, row| row.last_seen_jiffies -= SILENCE)
}

fn with_sequence(mut packet: Packet, number: u32) -> Packet {
    if let Layer4::Tcp { sequence, .. } = &mut packet.layer4 {
        *sequence = number;
    }
    packet
}

/// Pod a's connection with somebody outside, whom nobody lets in.
struct Outward(Cast);

impl Outward {
    fn begin(world: &mut World, cast: Cast) -> Result<Self> {
        world.forget_flows()?;
        world.enforce(1, &[INGRESS])?;
        let flow = Self(cast);
        ensure!(flow.asks(world, SYN)? == PASS);
        ensure!(flow.answers(world, SYN | ACK, 1000)? == REDIRECT);
        ensure!(flow.asks(world, ACK)? == PASS);
        Ok(flow)
    }

    fn asks(&self, world: &mut World, flags: u8) -> Result<u32> {
        Ok(world.send("from_pod", &tcp((self.0.a, 40000), (self.0.world, 443), flags).by(1))?.action)
    }

    fn answers(&self, world: &mut World, flags: u8, sequence: u32) -> Result<u32> {
        let packet = tcp((self.0.world, 443), (self.0.a, 40000), flags);
        Ok(world.send("from_network", &with_sequence(packet, sequence))?.action)
    }
}

#[test]
fn bypass_8_a_wrong_rst_ends_nothing() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        for sequence in [0, 999, 0x8000_0000, 0xffff_ffff] {
            let flow = Outward::begin(world, cast)?;
            // The pod may decide for itself.
            ensure!(flow.answers(world, RST, sequence)? == REDIRECT);
            be_silent(world)?;
            ensure!(flow.answers(world, ACK, 1001)? == REDIRECT, "after RST {sequence}");
        }
        // Nor one that is nearly right, when the pod answers it.
        let flow = Outward::begin(world, cast)?;
        ensure!(flow.answers(world, RST, 1020)? == REDIRECT);
        ensure!(flow.asks(world, ACK)? == PASS);
        be_silent(world)?;
        ensure!(flow.answers(world, ACK, 1001)? == REDIRECT);
        Ok(())
    })
}

#[test]
fn a_right_rst_makes_room_soon() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        for is_pods in [false, true] {
            let flow = Outward::begin(world, cast)?;
            if is_pods {
                flow.asks(world, RST)?;
            } else {
                flow.answers(world, RST, 1001)?;
            }
            be_silent(world)?;
            let (report, events) = world.collect_garbage()?;
            assert_eq!((report.connections, types(&events)), (1, vec![END]), "the pod's: {is_pods}");
            ensure!(flow.answers(world, ACK, 1001)? == SHOT);
        }
        // What is refused is over, too.
        world.forget_flows()?;
        let flow = Outward(cast);
        flow.asks(world, SYN)?;
        flow.answers(world, RST | ACK, 0)?;
        be_silent(world)?;
        assert_eq!(world.collect_garbage()?.0.connections, 1);
        Ok(())
    })
}

#[test]
fn a_wrong_fin_ends_nothing() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let flow = Outward::begin(world, cast)?;
        ensure!(flow.asks(world, FIN | ACK)? == PASS);
        ensure!(flow.answers(world, FIN | ACK, 0x8000_0000)? == REDIRECT);
        ensure!(flow.asks(world, ACK)? == PASS);
        be_silent(world)?;
        ensure!(flow.answers(world, ACK, 1001)? == REDIRECT);
        // And the right one does.
        ensure!(flow.answers(world, FIN | ACK, 1001)? == REDIRECT);
        ensure!(flow.asks(world, ACK)? == PASS);
        assert_eq!(world.connections(0)?.len(), 0);
        Ok(())
    })
}

#[test]
fn a_neighbour_on_the_network_ends_no_connection_between_pods() -> Result<()> {
    require_lab!();
    let native = Settings { tunnel_ifindex: None, ..settings() };
    in_both_families_with(native, |world, cast| {
        let (client, server) = ((cast.a, 40000), (cast.remote, 80));
        let answers = |world: &mut World, flags, sequence| -> Result<u32> {
            Ok(world.send("from_network", &with_sequence(tcp(server, client, flags), sequence))?.action)
        };
        world.enforce(1, &[INGRESS])?;
        for wrong in [FIN | ACK, RST] {
            world.forget_flows()?;
            world.send("from_pod", &tcp(client, server, SYN).by(1))?;
            ensure!(answers(world, SYN | ACK, 5000)? == REDIRECT);
            world.send("from_pod", &tcp(client, server, FIN | ACK).by(1))?;
            answers(world, wrong, 77)?;
            world.send("from_pod", &tcp(client, server, ACK).by(1))?;
            assert_eq!(only_flow(world)?.tcp_flags[1] & (FIN | RST), 0);
            be_silent(world)?;
            ensure!(answers(world, ACK, 5001)? == REDIRECT);
            ensure!(answers(world, FIN | ACK, 5001)? == REDIRECT);
            world.send("from_pod", &tcp(client, server, ACK).by(1))?;
            assert_eq!(world.connections(0)?.len(), 0);
        }
        Ok(())
    })
}

/// A connection of pod a with pod b, from its first packet to its last.
fn connect_and_close(world: &mut World, cast: &Cast) -> Result<()> {
    for packet in [
        forward(cast, SYN),
        backward(cast, SYN | ACK),
        forward(cast, FIN | ACK),
        backward(cast, FIN | ACK),
        forward(cast, ACK),
    ] {
        expect(world, &packet, REDIRECT)?;
    }
    assert_eq!(world.connections(0)?.len(), 0);
    Ok(())
}

fn forward(cast: &Cast, flags: u8) -> Packet {
    tcp((cast.a, 40000), (cast.b, 80), flags).by(1)
}

fn backward(cast: &Cast, flags: u8) -> Packet {
    tcp((cast.b, 80), (cast.a, 40000), flags).by(2)
}

#[test]
fn what_moves_after_the_end_is_reported() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let told = |world: &mut World, packet: &Packet| -> Result<Vec<u8>> {
            Ok(types(&expect(world, packet, REDIRECT)?.events))
        };
        for has_payload in [false, true] {
            world.forget_flows()?;
            connect_and_close(world, &cast)?;
            if has_payload {
                let packet = backward(&cast, ACK).payload(b"there is more");
                assert_eq!(told(world, &packet)?, [UPDATE]);
            } else {
                for number in 1..=4 {
                    let flags = if number % 2 == 0 { FIN | ACK } else { ACK };
                    assert_eq!(told(world, &forward(&cast, flags))?, [0; 0], "late packet {number}");
                }
                assert_eq!(told(world, &forward(&cast, ACK))?, [UPDATE]);
            }
            // What follows is counted, by the fast path too, and told at the next end.
            for _ in 0..10 {
                assert_eq!(told(world, &forward(&cast, ACK).payload(&[7; 1000]))?, [0; 0]);
            }
            let packets = only_flow(world)?.packets;
            be_silent(world)?;
            let (_, events) = world.collect_garbage()?;
            assert_eq!(types(&events), [END]);
            assert_eq!(events[0].packets, packets);
            assert_eq!(packets[0], if has_payload { 13 } else { 18 });
        }
        Ok(())
    })
}

#[test]
fn a_connection_that_another_one_replaces_is_told_of() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        for packet in [forward(&cast, SYN), backward(&cast, SYN | ACK), forward(&cast, RST)] {
            expect(world, &packet, REDIRECT)?;
        }
        let events = expect(world, &forward(&cast, SYN), REDIRECT)?.events;
        assert_eq!(types(&events), [END, NEW]);
        assert_eq!((events[0].packets, events[1].packets), ([2, 1], [1, 0]));
        Ok(())
    })
}
