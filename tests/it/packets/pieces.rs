//! Fragments, options and extension headers; what a pod asks its link.

use std::net::IpAddr;

use anyhow::{Result, ensure};

use super::frame::{POD_MAC, Packet, SYN, checksum, host_mac, icmp, solicitation, tcp, udp};
use super::world::{
    A, ANSWER, Arrival, INGRESS, PASS, REDIRECT, SHOT, casts, in_both_families, settings, within,
};
use crate::require::require_lab;

/// A datagram in three pieces.
pub fn pieces(from: (IpAddr, u16), to: (IpAddr, u16), id: u32) -> [Packet; 3] {
    let whole = udp(from, to).payload(&[7; 1000]);
    let part = |offset: u16, more, length| {
        let piece = whole.clone().payload(&vec![7; length]).fragment(id, offset, more);
        piece.by(1)
    };
    [part(0, true, 504), part(512, true, 256), part(768, false, 232)]
}

#[test]
fn bypass_1_fragments_are_judged_like_their_first() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        world.enforce(2, &[INGRESS])?;
        world.allow(2, INGRESS, A, (17, 80))?;
        for (port, action) in [(80, REDIRECT), (81, SHOT)] {
            let [first, second, last] = pieces((cast.a, 9), (cast.b, port), u32::from(port));
            // Before the first one nobody knows where they belong.
            let outcome = world.send("from_pod", &last)?;
            ensure!(outcome.counted[0].0 == 175, "{outcome:?}");
            // Nor after one that was dropped.
            for (piece, reason) in [(&first, 133), (&last, 175), (&second, 175)] {
                let outcome = world.send("from_pod", piece)?;
                ensure!(outcome.action == action, "{outcome:?}");
                ensure!(outcome.action != SHOT || outcome.counted[0].0 == reason, "{outcome:?}");
                ensure!(outcome.action == SHOT || outcome.frame == piece.bytes());
            }
        }
        assert_eq!(world.connections(0)?.len(), 1);
        Ok(())
    })
}

#[test]
fn fragments_are_translated_like_their_first() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let before = pieces((cast.a, 9), (cast.service, 80), 5);
        let after = pieces((cast.a, 9), (cast.b, 8080), 5);
        for (before, after) in before.iter().zip(&after) {
            let outcome = world.send("from_pod", before)?;
            ensure!(outcome.action == REDIRECT && outcome.frame == after.bytes(), "{outcome:?}");
        }
        Ok(())
    })
}

#[test]
fn fragments_are_masqueraded_like_their_first() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let out = pieces((cast.a, 9), (cast.world, 80), 6);
        let mut port = 0;
        for piece in &out {
            let outcome = world.send("to_network", piece)?;
            ensure!(outcome.action == PASS, "{outcome:?}");
            if port == 0 {
                let offset = if cast.a.is_ipv4() { 34 } else { 62 };
                port = u16::from_be_bytes([outcome.frame[offset], outcome.frame[offset + 1]]);
            }
            let index = out.iter().position(|other| other.fragment == piece.fragment).expect("is one");
            let expected = pieces((cast.node, port), (cast.world, 80), 6)[index].bytes();
            ensure!(outcome.frame == expected, "{:02x?}\n{expected:02x?}", outcome.frame);
        }
        Ok(())
    })
}

#[test]
fn bypass_3_options_and_extension_headers_do_not_hide_ports() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        world.enforce(2, &[INGRESS])?;
        world.allow(2, INGRESS, A, (6, 80))?;
        for (port, action) in [(80, REDIRECT), (81, SHOT)] {
            let mut packet = tcp((cast.a, 9), (cast.b, port), SYN).by(1);
            if cast.a.is_ipv4() {
                // Router alert, padding.
                packet.options = vec![148, 4, 0, 0, 1, 1, 1, 0];
            } else {
                packet = packet.extension(0, &[1, 4, 0, 0, 0, 0]).extension(60, &[1, 4, 0, 0, 0, 0]);
            }
            let outcome = world.send("from_pod", &packet)?;
            ensure!(outcome.action == action, "{outcome:?}");
        }
        Ok(())
    })
}

#[test]
fn bypass_3_other_protocols_pass_only_by_rules_for_any_port() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let packet = Packet::new(cast.a, cast.b, super::frame::Layer4::Other(47)).by(1).payload(&[0; 40]);
        ensure!(world.send("from_pod", &packet)?.action == REDIRECT);
        world.enforce(2, &[INGRESS])?;
        ensure!(world.send("from_pod", &packet)?.action == SHOT);
        world.allow(2, INGRESS, A, (0, 0))?;
        ensure!(world.send("from_pod", &packet)?.action == REDIRECT);
        Ok(())
    })
}

#[test]
fn arp_is_answered_with_the_host_side() -> Result<()> {
    require_lab!();
    within(settings(), |world| {
        let arp = |operation: u8, (from_mac, from): ([u8; 6], [u8; 4]), (to_mac, to): ([u8; 6], [u8; 4])| {
            [&[0, 1, 8, 0, 6, 4, 0, operation][..], &from_mac, &from, &to_mac, &to].concat()
        };
        let frame =
            |to: [u8; 6], from: [u8; 6], content: Vec<u8>| [&to[..], &from, &[0x08, 0x06], &content].concat();
        for asked in [[169, 254, 1, 1], [10, 1, 0, 2]] {
            let question = arp(1, (POD_MAC, [10, 1, 0, 1]), ([0; 6], asked));
            let outcome =
                world.send_bytes("from_pod", &frame([0xff; 6], POD_MAC, question), Arrival::default())?;
            ensure!(outcome.action == REDIRECT && outcome.mark == ANSWER, "{outcome:?}");
            let answer = arp(2, (host_mac(1), asked), (POD_MAC, [10, 1, 0, 1]));
            assert_eq!(outcome.frame, frame(POD_MAC, host_mac(1), answer));
        }
        // Nobody needs to hear that a pod has its own address, or another's.
        for claimed in [[10, 1, 0, 1], [10, 1, 0, 2], [169, 254, 1, 1]] {
            let announcement = arp(1, (POD_MAC, claimed), ([0; 6], claimed));
            let outcome =
                world.send_bytes("from_pod", &frame([0xff; 6], POD_MAC, announcement), Arrival::default())?;
            ensure!(outcome.action == SHOT && outcome.events.is_empty(), "{outcome:?}");
        }
        // Who claims the address of a pod on another device learns nothing of that pod.
        let question = arp(1, (POD_MAC, [10, 1, 0, 4]), ([0; 6], [169, 254, 1, 1]));
        let outcome =
            world.send_bytes("from_pod", &frame([0xff; 6], POD_MAC, question), Arrival::default())?;
        ensure!(outcome.action == SHOT && outcome.events.is_empty(), "{outcome:?}");
        Ok(())
    })
}

#[test]
fn neighbours_are_answered_with_the_host_side() -> Result<()> {
    require_lab!();
    within(settings(), |world| {
        let IpAddr::V6(pod) = casts()[1].a else { unreachable!("the second cast is IPv6's") };
        let target = "fd01::99".parse()?;
        let outcome = world.send("from_pod", &solicitation(pod, target))?;
        ensure!(outcome.action == REDIRECT && outcome.mark == ANSWER, "{outcome:?}");
        let payload = [&target.octets()[..], &[2, 1], &host_mac(1)].concat();
        let mut answer = icmp(target.into(), pod.into(), 136, 0).payload(&payload);
        answer.macs = (POD_MAC, host_mac(1));
        answer.ttl = 255;
        let mut expected = answer.bytes();
        // Solicited, override: where an echo has its identifier.
        expected[58] = 0x60;
        expected[56..58].copy_from_slice(&[0, 0]);
        let mut sum = u32::from(58_u8) + 32;
        sum += expected[22..54].chunks(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]]))).sum::<u32>();
        let check = checksum(&expected[54..], sum);
        expected[56..58].copy_from_slice(&check.to_be_bytes());
        assert_eq!(outcome.frame, expected);
        // Its own address is the pod's business.
        let outcome = world.send("from_pod", &solicitation(pod, pod))?;
        ensure!(outcome.action == SHOT && outcome.events.is_empty(), "{outcome:?}");
        Ok(())
    })
}
