//! What a packet pays for policy in `from_pod`: the same at ten identities and at ten thousand, and nothing
//! where its flow runs.

use anyhow::Result;
use weir::datapath::abi::{PolicyPeer, PolicyPeerKey, PolicyRule, PolicyRuleKey};
use weir::datapath::types::policy_verdict;

use crate::from_pod::{established, measure_packets, new};
use crate::row::Row;
use crate::world::{A, B, Cast, EGRESS, INGRESS, World, casts, settings, within};

const FEW: u32 = 10;
const MANY: u32 = 10_000;
/// Peers are in so many classes, each with these ports.
const CLASSES: u32 = 100;
const PORTS: u16 = 20;
/// Above every identity of the cast.
const FIRST: u32 = 1_000;
/// More than what the same case differs by from one measurement to the next.
const NOISE: f64 = 1.1;

/// New flows against the number of identities, established ones against no policy.
pub fn rows() -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for cast in casts() {
        let family = if cast.a.is_ipv4() { "ipv4" } else { "ipv6" };
        let (sender, receiver) = std::sync::mpsc::channel();
        within(settings(), move |world| {
            let few = nanoseconds(world, &cast, Some(FEW), new)?;
            let many = nanoseconds(world, &cast, Some(MANY), new)?;
            let again = nanoseconds(world, &cast, Some(FEW), new)?;
            let noise = (again / few - 1.0).abs();
            let few = few.min(again);
            let row = Row::new(format!("policy/packet/new_at_{MANY}_identities/{family}"), "ns", many);
            sender.send(row.against(few, None).noise(noise).at_most(NOISE))?;
            let with = nanoseconds(world, &cast, Some(MANY), established)?;
            let without = nanoseconds(world, &cast, None, established)?;
            let row = Row::new(format!("policy/packet/established_vs_no_policy/{family}"), "ns", with);
            sender.send(row.against(without, None).noise(noise).at_most(NOISE))?;
            Ok(())
        })?;
        rows.extend(receiver);
    }
    Ok(rows)
}

/// Of a packet from a to b, both under policies with so many peers; `None`: under none.
fn nanoseconds(
    world: &mut World,
    cast: &Cast,
    identities: Option<u32>,
    packets: fn(&Cast) -> Vec<crate::frame::Packet>,
) -> Result<f64> {
    world.reset()?;
    for (id, peer, direction) in [(1, B, EGRESS), (2, A, INGRESS)] {
        world.enforce(id, if identities.is_some() { &[EGRESS, INGRESS] } else { &[] })?;
        for direction in [EGRESS, INGRESS] {
            world.allow(id, direction, peer, (6, 80))?;
        }
        fill(world, 10 + id, direction, identities.unwrap_or(0))?;
    }
    measure_packets(world, &packets(cast))
}

fn fill(world: &World, policy_id: u32, direction: u32, identities: u32) -> Result<()> {
    let peers = world.datapath.typed::<PolicyPeerKey, PolicyPeer>("policy_peers")?;
    for number in 0..identities {
        let key = PolicyPeerKey { policy_id, identity: FIRST + number, direction };
        peers.insert(&key, &PolicyPeer { class: FIRST + number % CLASSES })?;
    }
    let rules = world.datapath.typed::<PolicyRuleKey, PolicyRule>("policy_rules")?;
    for class in 0..CLASSES.min(identities) {
        for port in 0..PORTS {
            let key = PolicyRuleKey {
                prefix_length: 96,
                policy_id: policy_id.to_be(),
                class: (FIRST + class).to_be(),
                direction: direction as u8,
                protocol: 6,
                port: (8000 + port).to_be(),
            };
            let verdict = policy_verdict::POLICY_ALLOW.0 as u8;
            rules.insert(&key, &PolicyRule { rule_id: 1, verdict, ..PolicyRule::default() })?;
        }
    }
    Ok(())
}
