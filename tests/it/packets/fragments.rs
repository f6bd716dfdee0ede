//! First fragments: whom they serve, and who may say what of whom.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use weir::datapath::Settings;

use super::frame::{Layer4, Packet, icmp, udp};
use super::pieces::pieces;
use super::world::{
    A, Arrival, INGRESS, R, REDIRECT, SHOT, World, in_both_families, in_both_families_with, settings,
};
use crate::require::require_lab;

fn native() -> Settings {
    Settings { tunnel_ifindex: None, ..settings() }
}

/// The first and the last fragment of a datagram.
fn ends(from: (IpAddr, u16), to: (IpAddr, u16), id: u32) -> [Packet; 2] {
    let [first, _, last] = pieces(from, to, id);
    [first, last]
}

#[test]
fn bypass_1_a_first_fragment_that_is_dropped_serves_nobody() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        world.enforce(2, &[INGRESS])?;
        world.allow(2, INGRESS, A, (17, 80))?;
        let [first, last] = ends((cast.a, 9), (cast.b, 80), 7);
        ensure!(world.send("from_pod", &first)?.action == REDIRECT);
        let part = |from, port| udp((from, 9), (cast.b, port)).fragment(7, 0, true);
        let dropped = [
            ("denied", part(cast.a, 81).by(1), Arrival::default(), 133),
            ("spoofed", part(cast.elsewhere, 80).by(1), Arrival::default(), 132),
            ("spoofed", part(cast.a, 81).by(2), Arrival::default(), 132),
            ("not ready", part(cast.unready, 80).by(3), Arrival::default(), 203),
            ("tagged", part(cast.a, 81).by(1), Arrival { vlan: 5, ..Arrival::default() }, 166),
        ];
        for (why, packet, arrival, reason) in dropped {
            let outcome = world.send_as("from_pod", &packet, arrival)?;
            ensure!(outcome.counted[0].0 == reason, "{why}: {outcome:?}");
            assert_eq!(world.fragments()?.len(), 1, "{why}");
            ensure!(world.send("from_pod", &last)?.action == REDIRECT, "{why}");
        }
        Ok(())
    })
}

#[test]
fn a_flood_of_fragments_costs_nobody_else_a_datagram() -> Result<()> {
    require_lab!();
    in_both_families_with(native(), |world, cast| {
        let [first, last] = ends((cast.a, 9), (cast.b, 80), 7);
        ensure!(world.send("from_pod", &first)?.action == REDIRECT);
        // A pod's, and everybody's outside.
        let pod = world.actor("from_pod", Arrival::default())?;
        let network = world.actor("from_network", Arrival::default())?;
        for id in 0..6000 {
            let flood = udp((cast.b, 9), (cast.a, 80)).fragment(id, 0, true).by(2);
            ensure!(pod(&flood.bytes())?.0 == REDIRECT);
            let flood = udp((cast.world, 9), (cast.a, 80)).fragment(id, 0, true);
            ensure!(network(&flood.bytes())?.0 == REDIRECT);
        }
        drop((pod, network));
        ensure!(world.send("from_pod", &last)?.action == REDIRECT);
        Ok(())
    })
}

#[test]
fn a_first_fragment_serves_those_that_come_by_its_way() -> Result<()> {
    require_lab!();
    in_both_families_with(native(), |world, cast| {
        let [first, last] = ends((cast.remote, 9), (cast.a, 80), 7);
        ensure!(world.send("from_network", &first)?.action == REDIRECT);
        let outcome = world.send("to_pod", &last)?;
        ensure!(outcome.counted[0].0 == 175, "{outcome:?}");
        ensure!(world.send("from_network", &last)?.action == REDIRECT);
        Ok(())
    })
}

/// The first fragment's header of layer 4 is behind an option, the others say that option.
#[test]
fn options_behind_the_fragment_header_do_not_hide_the_first() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        if cast.a.is_ipv4() {
            return Ok(());
        }
        world.enforce(2, &[INGRESS])?;
        world.allow(2, INGRESS, A, (17, 80))?;
        for (port, action) in [(80, REDIRECT), (81, SHOT)] {
            let datagram = &udp((cast.a, 9), (cast.b, port)).payload(&[7; 496]).bytes()[54..];
            let options = Packet::new(cast.a, cast.b, Layer4::Other(60)).by(1);
            let first = options.clone().payload(&[&[17, 0, 1, 4, 0, 0, 0, 0], datagram].concat());
            let last = options.payload(&[7; 200]);
            let id = u32::from(port);
            let outcome = world.send("from_pod", &first.fragment(id, 0, true))?;
            ensure!(outcome.action == action, "{outcome:?}");
            let outcome = world.send("from_pod", &last.fragment(id, 512, false))?;
            ensure!(outcome.action == action, "{outcome:?}");
        }
        Ok(())
    })
}

#[test]
fn errors_and_neighbour_discovery_do_not_come_in_fragments() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let kinds = if cast.a.is_ipv4() { &[3][..] } else { &[1, 135] };
        for kind in kinds {
            let packet = icmp(cast.a, cast.b, *kind, 0).payload(&[7; 64]).fragment(7, 0, true).by(1);
            let outcome = world.send("from_pod", &packet)?;
            ensure!(outcome.counted[0].0 == 157, "{outcome:?}");
        }
        assert!(world.fragments()?.is_empty());
        Ok(())
    })
}

/// `MARK_WAITS`.
const WAITS: u32 = 0x30;

/// Sends a fragment that must wait; as it comes back.
fn waits(world: &mut World, program: &str, frame: &[u8], arrival: Arrival) -> Result<Vec<u8>> {
    let outcome = world.send_bytes(program, frame, arrival)?;
    ensure!(outcome.action == REDIRECT && outcome.mark == WAITS && outcome.counted.is_empty(), "{outcome:?}");
    ensure!(outcome.frame[12..] == frame[12..], "only the Ethernet addresses change");
    Ok(outcome.frame)
}

fn waiting() -> Settings {
    Settings { wait_ifindex: Some(1), ..settings() }
}

const WAITED: Arrival = Arrival {
    mark: WAITS,
    is_from_stack: false,
    tunnel: None,
    tunnel_to: None,
    is_for_another_machine: false,
    vlan: 0,
    gso_size: 0,
};

#[test]
fn a_fragment_waits_for_the_first_one_and_no_longer_than_it_may() -> Result<()> {
    require_lab!();
    in_both_families_with(waiting(), |world, cast| {
        let [first, last] = ends((cast.a, 9), (cast.b, 80), 7);
        let mut frame = waits(world, "from_pod", &last.bytes(), Arrival::default())?;
        for _ in 0..3 {
            // The far end gives it back to its device.
            let outcome = world.send_bytes("from_wait", &frame, WAITED)?;
            ensure!(outcome.action == REDIRECT && outcome.frame == frame, "{outcome:?}");
            frame = waits(world, "from_pod", &frame, WAITED)?;
        }
        ensure!(world.send("from_pod", &first)?.action == REDIRECT);
        let outcome = world.send_bytes("from_pod", &frame, WAITED)?;
        ensure!(outcome.action == REDIRECT && outcome.mark == 0, "{outcome:?}");
        assert_eq!(outcome.counted, [(0, 2)]);

        let [_, last] = ends((cast.a, 9), (cast.b, 80), 8);
        let frame = waits(world, "from_pod", &last.bytes(), Arrival::default())?;
        std::thread::sleep(Duration::from_millis(80));
        let outcome = world.send_bytes("from_pod", &frame, WAITED)?;
        ensure!(outcome.action == SHOT && outcome.counted[0].0 == 175, "{outcome:?}");
        // Nobody else sends by the devices of those that wait.
        ensure!(world.send("from_wait", &last)?.action == SHOT);
        Ok(())
    })
}

#[test]
fn a_fragment_that_waits_keeps_the_identity_of_its_tunnel() -> Result<()> {
    require_lab!();
    in_both_families_with(waiting(), |world, cast| {
        world.enforce(2, &[INGRESS])?;
        world.allow(2, INGRESS, R, (17, 80))?;
        for (vni, action) in [(R, REDIRECT), (999, SHOT)] {
            world.forget_flows_of_kind(0)?;
            let by = Arrival { tunnel: Some((Some(cast.other_node), vni)), ..Arrival::default() };
            let [_, last] = ends((cast.nobody, 9), (cast.b, 80), vni);
            let frame = waits(world, "from_overlay", &last.bytes(), by)?;
            let [first, _] = ends((cast.nobody, 9), (cast.b, 80), vni);
            ensure!(world.send_as("from_overlay", &first, by)?.action == action);
            world.forget_flows_of_kind(0)?;
            let outcome = world.send_bytes("from_overlay", &frame, WAITED)?;
            // After a first one that was dropped it goes on waiting.
            ensure!(outcome.action == REDIRECT, "{outcome:?}");
            ensure!((outcome.mark == WAITS) == (action == SHOT), "{outcome:?}");
            let identities: Vec<u32> = outcome.events.iter().map(|event| event.source_identity).collect();
            ensure!(action == SHOT || identities == [vni], "{identities:?}");
        }
        Ok(())
    })
}

#[test]
fn one_sender_of_fragments_does_not_fill_the_queue() -> Result<()> {
    require_lab!();
    in_both_families_with(waiting(), |world, cast| {
        let pod = world.actor("from_pod", Arrival::default())?;
        let mut waiting = 0;
        for id in 0..1000 {
            let [_, last] = ends((cast.a, 9), (cast.b, 80), id);
            waiting += u32::from(pod(&last.bytes())?.0 == REDIRECT);
        }
        ensure!((128..=512).contains(&waiting), "{waiting} wait");
        // Another pod's may.
        let last = udp((cast.b, 9), (cast.a, 80)).payload(&[7; 64]).fragment(1, 512, false).by(2);
        ensure!(pod(&last.bytes())?.0 == REDIRECT);
        Ok(())
    })
}
