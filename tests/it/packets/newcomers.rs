//! Another node's new pod, of whose address this node has not heard yet.

use anyhow::{Result, ensure};
use weir::datapath::Settings;

use super::frame::{ACK, SYN, tcp, udp};
use super::network::{connect, ip};
use super::world::{
    Arrival, EGRESS, INGRESS, MARK, R, REDIRECT, SHOT, casts, in_both_families, settings, within,
};
use crate::require::require_lab;

#[test]
fn answers_go_back_by_the_tunnel_before_the_news() -> Result<()> {
    require_lab!();
    in_both_families(|world, cast| {
        let by_tunnel = Arrival { tunnel: Some((Some(cast.other_node), R)), ..Arrival::default() };
        let (client, server) = ((cast.nobody, 40000), (cast.b, 80));
        world.enforce(2, &[INGRESS, EGRESS])?;
        world.allow(2, INGRESS, R, (6, 80))?;
        let question = tcp(client, server, SYN);
        ensure!(world.send_as("from_overlay", &question, by_tunnel)?.action == REDIRECT);
        for flags in [SYN | ACK, ACK] {
            let outcome = world.send("from_pod", &tcp(server, client, flags).by(2))?;
            ensure!(outcome.action == REDIRECT && outcome.mark == MARK, "{outcome:?}");
            // News of others: every verdict is looked for again.
            world.raise_address_epoch()?;
        }
        // What nobody asked for goes nowhere, and a tightened policy stops the answers.
        let own = world.send("from_pod", &udp((cast.b, 53), client).by(2))?;
        ensure!(own.action == SHOT && own.counted == [(151, EGRESS as u8)], "{own:?}");
        world.forget_rules()?;
        world.enforce(2, &[INGRESS])?;
        let outcome = world.send("from_pod", &tcp(server, client, ACK).by(2))?;
        ensure!(outcome.action == SHOT && outcome.counted == [(133, INGRESS as u8)], "{outcome:?}");
        Ok(())
    })
}

#[test]
fn answers_go_back_by_the_route_before_the_news() -> Result<()> {
    require_lab!();
    for cast in casts() {
        within(Settings { tunnel_ifindex: None, ..settings() }, move |world| {
            connect(&cast, 1500)?;
            ip(&format!("route add {} via {}", cast.nobody, cast.other_node))?;
            let (client, server) = ((cast.nobody, 40000), (cast.b, 80));
            for (flags, answer) in [(SYN, SYN | ACK), (ACK, ACK)] {
                ensure!(world.send("from_network", &tcp(client, server, flags))?.action == REDIRECT);
                let outcome = world.send("from_pod", &tcp(server, client, answer).by(2))?;
                ensure!(outcome.action == REDIRECT && outcome.mark == MARK, "{outcome:?}");
                world.raise_address_epoch()?;
            }
            let own = world.send("from_pod", &udp((cast.b, 53), client).by(2))?;
            ensure!(own.action == SHOT && own.counted == [(151, EGRESS as u8)], "{own:?}");
            Ok(())
        })?;
    }
    Ok(())
}
