//! What a pod gets that sends what its policy denies, where its policy wants it told (POLICY_REJECT).

use anyhow::{Result, ensure};
use weir::datapath::types::policy_bits;

use super::frame::{ACK, Layer4, Packet, RST, SYN, echo, icmp, tcp, udp, unreachable};
use super::services::answers;
use super::world::{Arrival, Cast, EGRESS, INGRESS, SHOT, World, in_both_families};
use crate::require::require_lab;

/// Pod 1 may send nothing and is told so.
fn reject(world: &mut World) -> Result<()> {
    world.enforce(1, &[EGRESS])?;
    world.change_endpoint(1, |row| row.policy |= policy_bits::POLICY_REJECT.0)
}

/// "Communication administratively prohibited", about this packet.
fn prohibited(cast: &Cast, about: &Packet) -> Packet {
    let code = if cast.a.is_ipv4() { (3, 13) } else { (1, 1) };
    let unreachable = unreachable(about.destination, about);
    icmp(about.destination, about.source, code.0, code.1).payload(&unreachable.payload)
}

fn is_silent(world: &mut World, program: &str, packet: &Packet) -> Result<()> {
    let outcome = world.send(program, packet)?;
    ensure!(outcome.action == SHOT, "{outcome:?}");
    Ok(())
}

#[test]
fn what_policy_denies_a_pod_is_told_at_once() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        reject(world)?;
        for target in [cast.b, cast.elsewhere, cast.remote, cast.world, cast.node] {
            let syn = tcp((cast.a, 40000), (target, 80), SYN).by(1);
            let reset =
                Layer4::Tcp { ports: (80, 40000), sequence: 0, acknowledgment: 1001, flags: RST | ACK };
            answers(world, &syn, Packet::new(target, cast.a, reset))?;
            let datagram = udp((cast.a, 40000), (target, 53)).by(1).payload(b"question");
            answers(world, &datagram, prohibited(&cast, &datagram))?;
        }
        let request = echo(cast.a, cast.b, 7).by(1);
        answers(world, &request, prohibited(&cast, &request))?;
        // Policy judges the backend; the pod knows the service.
        let syn = tcp((cast.a, 40001), (cast.service, 80), SYN).by(1);
        let reset = Layer4::Tcp { ports: (80, 40001), sequence: 0, acknowledgment: 1001, flags: RST | ACK };
        answers(world, &syn, Packet::new(cast.service, cast.a, reset))?;
        let datagram = udp((cast.a, 40001), (cast.service, 80)).by(1);
        answers(world, &datagram, prohibited(&cast, &datagram))?;
        ensure!(world.connections(0)?.is_empty(), "a denied flow left an entry");
        // A deny rule is told as a missing rule is.
        world.rule(1, EGRESS, 302, (17, 0), weir::datapath::types::policy_verdict::POLICY_DENY)?;
        let datagram = udp((cast.a, 40000), (cast.b, 53)).by(1);
        let outcome = world.send("from_pod", &datagram)?;
        ensure!(outcome.counted.iter().any(|(reason, _)| *reason == 181), "{outcome:?}");
        answers(world, &datagram, prohibited(&cast, &datagram))
    })
}

#[test]
fn only_the_pod_whose_policy_denies_is_told() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        // Another pod's policy tells nobody who asks it.
        world.enforce(2, &[INGRESS])?;
        world.change_endpoint(2, |row| row.policy |= policy_bits::POLICY_REJECT.0)?;
        is_silent(world, "from_pod", &tcp((cast.a, 40000), (cast.b, 80), SYN).by(1))?;
        is_silent(world, "from_network", &tcp((cast.world, 40000), (cast.b, 80), SYN))?;
        // Without the bit there is no answer.
        world.enforce(2, &[])?;
        world.enforce(1, &[EGRESS])?;
        is_silent(world, "from_pod", &tcp((cast.a, 40000), (cast.b, 80), SYN).by(1))?;
        // An RST is never answered, and a running flow that is denied now ends in silence for its answers.
        reject(world)?;
        is_silent(world, "from_pod", &tcp((cast.a, 40000), (cast.b, 80), RST).by(1))?;
        world.enforce(1, &[])?;
        let ask = udp((cast.b, 40000), (cast.a, 53)).by(2);
        let outcome = world.send("from_pod", &ask)?;
        ensure!(outcome.action != SHOT, "{outcome:?}");
        world.enforce(2, &[EGRESS])?;
        reject(world)?;
        let answer = udp((cast.a, 53), (cast.b, 40000)).by(1);
        let outcome = world.send_bytes("from_pod", &answer.bytes(), Arrival::default())?;
        ensure!(outcome.action == SHOT, "{outcome:?}");
        Ok(())
    })
}
