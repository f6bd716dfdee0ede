//! Random policies, judged by the model and by the loaded programs: random clusters are
//! compiled, written by the real writers, and asked with packets. Compared is not only
//! whether a packet passes but how: which way it leaves, and of each cluster how often which
//! end's policy denies.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use weir::datapath::Writers;
use weir::model::{
    AddressKind, BaseAddress, Endpoint, EndpointEntry, EndpointId, IdentityId, MacAddress, Protocol,
};
use weir::policy::Output;

use crate::model::{Cluster, Payload, Side, random};
use crate::packets::frame::{Layer4, POD_MAC, Packet, SYN, echo, icmp, tcp, udp};
use crate::packets::world::{
    Arrival, EGRESS, INGRESS, MARK, PASS, REDIRECT, SHOT, World, casts, settings, within_empty,
};
use crate::policy_model::{Facts, compiler};
use crate::require::require_lab;

/// Half of them have NetworkPolicies alone, half every kind and tier: together 105,600 probes.
/// WEIR_POLICY_SEEDS overrides.
const SEEDS: u64 = 160;
/// Of each cluster and family.
const PROBES: usize = 330;

/// The drop reasons of policy: no rule, and a rule that denies.
const DENIED: [u8; 2] = [133, 181];

/// How a probe comes to the programs of this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    Pod,
    Overlay,
    Network,
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Verdict {
    ToEndpoint,
    ToOtherNode,
    ToStack,
    EgressDenied,
    IngressDenied,
}

struct Probe<'a> {
    way: Way,
    from: Side<'a>,
    to: Side<'a>,
    payload: Payload,
    source_port: u16,
}

/// Tunnels of the other node come from here, by either family.
fn other_node(cluster: &Cluster) -> IpAddr {
    cluster.nodes[0]
}

fn facts(cluster: &Cluster) -> Facts {
    let mut facts = Facts::new(cluster, 0);
    let there = |(address, entry): (IpAddr, BaseAddress)| match entry.endpoint {
        Some(_) => (address, entry),
        None => (address, BaseAddress { node: Some(other_node(cluster)), ..entry }),
    };
    facts.addresses = facts.addresses.into_iter().map(there).collect();
    let kind = AddressKind::Node;
    for address in own_addresses() {
        let entry = BaseAddress { identity: IdentityId::HOST, node: None, endpoint: None, kind };
        facts.addresses.insert(address, entry);
    }
    facts
}

/// This node's.
fn own_addresses() -> impl Iterator<Item = IpAddr> {
    casts().into_iter().map(|cast| cast.node)
}

fn endpoint_entry(cluster: &Cluster, id: EndpointId, identity: IdentityId, output: &Output) -> EndpointEntry {
    let pod = &cluster.pods[usize::from(id.0) - 1];
    let [IpAddr::V4(ipv4), IpAddr::V6(ipv6)] = pod.addresses else { unreachable!("one of each family") };
    let endpoint = Endpoint {
        id,
        container_id: pod.pod.key.to_string(),
        interface: "eth0".to_owned(),
        netns: "/run/netns/none".into(),
        pod: pod.pod.key.clone(),
        pod_uid: None,
        ipv4: Some(ipv4),
        ipv6: Some(ipv6),
        host_interface: "lo".to_owned(),
        // Where test runs come from.
        host_ifindex: 1,
        mac: MacAddress(POD_MAC),
        port_mappings: Vec::new(),
    };
    let policy = output.of_endpoint[&id];
    let rules = output.policies.get(&policy);
    EndpointEntry {
        endpoint: Arc::new(endpoint),
        identity,
        policy,
        enforces_ingress: rules.is_some_and(|rules| rules.ingress.is_some()),
        enforces_egress: rules.is_some_and(|rules| rules.egress.is_some()),
        refuses_strangers: rules
            .and_then(|rules| rules.ingress.as_ref())
            .is_some_and(|ingress| ingress.refuses_strangers),
        rejects: false,
        has_gateway: false,
        shaping: Default::default(),
    }
}

/// Writes and prunes in the order of the agent's rounds.
fn write(writers: &mut Writers, cluster: &Cluster, facts: &Facts) -> Result<()> {
    let output = facts.compile(&mut compiler());
    let endpoints: BTreeMap<EndpointId, EndpointEntry> = facts
        .endpoints
        .iter()
        .map(|(id, identity)| (*id, endpoint_entry(cluster, *id, *identity, &output)))
        .collect();
    let refused = writers.policies.write(&output.policies, &BTreeSet::new());
    anyhow::ensure!(refused.is_empty(), "{refused:?}");
    writers.addresses.write(&output.addresses, &output.prefixes)?;
    writers.endpoints.write(&endpoints)?;
    writers.endpoints.prune(&endpoints)?;
    writers.addresses.prune(&output.addresses, &output.prefixes)?;
    Ok(writers.policies.prune(&output.policies, &BTreeSet::new())?)
}

fn is_here(side: &Side<'_>) -> bool {
    side.pod.is_some_and(|pod| pod.node == 0)
}

/// Every pair of ends whose packets pass this node's programs.
fn pairs(cluster: &Cluster, is_ipv4: bool) -> Vec<(Way, Side<'_>, Side<'_>)> {
    let sides = cluster.sides(is_ipv4);
    let own = own_addresses().filter(|address| address.is_ipv4() == is_ipv4);
    let own: Vec<Side<'_>> = own.map(|address| Side { address, pod: None }).collect();
    let mut pairs = Vec::new();
    for from in &sides {
        let way = match from.pod {
            Some(pod) if pod.node == 0 => Way::Pod,
            Some(_) => Way::Overlay,
            None => Way::Network,
        };
        for to in sides.iter().chain(&own).filter(|to| to.address != from.address) {
            if way == Way::Pod || is_here(to) {
                pairs.push((way, *from, *to));
            }
        }
    }
    pairs
}

/// What the model says; the sender's node has judged what comes from elsewhere.
fn expected(cluster: &Cluster, probe: &Probe<'_>) -> Verdict {
    let Probe { way, from, to, payload, .. } = *probe;
    if way == Way::Pod && !cluster.allows_egress(from, to, payload) {
        Verdict::EgressDenied
    } else if is_here(&to) && !cluster.allows_ingress(from, to, payload) {
        Verdict::IngressDenied
    } else if is_here(&to) {
        Verdict::ToEndpoint
    } else if to.pod.is_some() {
        Verdict::ToOtherNode
    } else {
        Verdict::ToStack
    }
}

fn packet(probe: &Probe<'_>) -> Packet {
    let Probe { from, to, payload, source_port, .. } = *probe;
    let ends = |port| ((from.address, source_port), (to.address, port));
    match payload {
        Payload::Port(Protocol::Tcp, port) => tcp(ends(port).0, ends(port).1, SYN),
        Payload::Port(Protocol::Udp, port) => udp(ends(port).0, ends(port).1),
        Payload::Port(Protocol::Sctp, port) => {
            let ports = [source_port.to_be_bytes(), port.to_be_bytes()].concat();
            Packet::new(from.address, to.address, Layer4::Other(132))
                .payload(&[&ports[..], &[0; 28]].concat())
        }
        Payload::Icmp => echo(from.address, to.address, source_port),
        Payload::OtherQuery => {
            let (_, kind) = payload.numbers(from.address.is_ipv4());
            let mut packet = icmp(from.address, to.address, kind as u8, 0);
            if let Layer4::Icmp { rest, .. } = &mut packet.layer4 {
                rest[..2].copy_from_slice(&source_port.to_be_bytes());
            }
            packet
        }
    }
}

fn send(world: &World, cluster: &Cluster, facts: &Facts, probe: &Probe<'_>) -> Result<(u32, u32)> {
    let packet = packet(probe);
    let index = cluster.pods.iter().position(|pod| pod.addresses.contains(&probe.from.address));
    match probe.way {
        Way::Pod => {
            let index = index.context("a pod of this node sends it")?;
            world.act("from_pod", &packet.by(index as u16 + 1), Arrival::default())
        }
        Way::Overlay => {
            let identity = facts.addresses[&probe.from.address].identity.0;
            let tunnel = Some((Some(other_node(cluster)), identity));
            world.act("from_overlay", &packet, Arrival { tunnel, ..Arrival::default() })
        }
        Way::Network => world.act("from_network", &packet, Arrival::default()),
    }
}

/// Whether the programs did what follows from a verdict.
fn is_done(verdict: Verdict, (action, mark): (u32, u32)) -> bool {
    match verdict {
        Verdict::ToEndpoint => action == REDIRECT && mark != MARK,
        Verdict::ToOtherNode => action == REDIRECT && mark == MARK,
        Verdict::ToStack => action == PASS,
        Verdict::EgressDenied | Verdict::IngressDenied => action == SHOT,
    }
}

/// What the programs have counted: denials of policy by direction, and what was dropped for other reasons.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Denials {
    egress: u64,
    ingress: u64,
    other: u64,
}

fn denials(world: &World) -> Result<Denials> {
    let mut denials = Denials::default();
    for row in world.datapath.metrics()?.iter().filter(|row| row.reason != 0) {
        match (DENIED.contains(&row.reason), u32::from(row.direction)) {
            (true, EGRESS) => denials.egress += row.packets,
            (true, INGRESS) => denials.ingress += row.packets,
            _ => denials.other += row.packets,
        }
    }
    Ok(denials)
}

/// The cluster as a reader of a failed test needs it.
fn describe(cluster: &Cluster) -> String {
    let pods = cluster.pods.iter().map(|pod| {
        let (key, labels, ports) = (&pod.pod.key, &pod.pod.labels, &pod.pod.named_ports);
        format!("node {} {:?} {key} {labels:?} {ports:?}", pod.node, pod.addresses)
    });
    let objects = cluster.policies.iter().map(|policy| format!("{policy:?}"));
    pods.chain(objects).collect::<Vec<_>>().join("\n")
}

/// xorshift64*: the same probes every time.
fn below(state: &mut u64, end: usize) -> usize {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % end
}

fn ask(world: &mut World, seed: u64, cluster: &Cluster, facts: &Facts, seen: &mut Seen) -> Result<()> {
    let payloads = random::payloads();
    let mut state = 0x5745_4952 + seed;
    // Never a port of a policy, and another for each probe: no probe is of an earlier one's flow.
    let mut source_port = 20_000;
    // Which end denies is compared in sum: reading the counters costs more than twenty probes.
    let mut counted = denials(world)?;
    for is_ipv4 in [true, false] {
        let pairs = pairs(cluster, is_ipv4);
        for _ in 0..PROBES {
            let (way, from, to) = pairs[below(&mut state, pairs.len())];
            let payload = match below(&mut state, 8) {
                0 => [Payload::Icmp, Payload::OtherQuery][below(&mut state, 2)],
                _ => payloads[below(&mut state, payloads.len())],
            };
            source_port += 1;
            let probe = Probe { way, from, to, payload, source_port };
            let (model, programs) = (expected(cluster, &probe), send(world, cluster, facts, &probe)?);
            ensure!(
                is_done(model, programs),
                "seed {seed}: {way:?} {} -> {}, {payload:?} from port {source_port}\n\
                 the model says {model:?}, the programs answer {programs:?}\n{}",
                from.address,
                to.address,
                describe(cluster)
            );
            counted.egress += u64::from(model == Verdict::EgressDenied);
            counted.ingress += u64::from(model == Verdict::IngressDenied);
            *seen.entry((way, model)).or_default() += 1;
        }
    }
    world.forget_events()?;
    let found = denials(world)?;
    ensure!(
        found == counted,
        "seed {seed}: the programs have counted {found:?}, the model {counted:?}\n{}",
        describe(cluster)
    );
    Ok(())
}

/// How often each verdict was seen, by the way the packet came.
type Seen = BTreeMap<(Way, Verdict), usize>;

#[test]
fn the_programs_say_what_the_model_says() -> Result<()> {
    require_lab!();
    within_empty(settings(), |world| {
        world.be_this_node()?;
        let mut writers = world.datapath.writers()?;
        let mut seen = Seen::new();
        let seeds = std::env::var("WEIR_POLICY_SEEDS").ok().and_then(|text| text.parse().ok());
        for seed in 0..seeds.unwrap_or(SEEDS) {
            let mut cluster = match seed % 2 {
                0 => random::sample(seed),
                _ => random::sample_of_cilium(seed),
            };
            cluster.own = own_addresses().collect();
            let facts = facts(&cluster);
            world.forget_flows()?;
            write(&mut writers, &cluster, &facts)
                .with_context(|| format!("writing the rows of seed {seed}"))?;
            ask(world, seed, &cluster, &facts, &mut seen)?;
        }
        println!("{seen:?}");
        // Every verdict that a way can end with, and none of them by chance only.
        let rare: BTreeSet<_> = seen.iter().filter(|(_, count)| **count < 40).collect();
        ensure!(seen.len() == 9 && rare.is_empty(), "the probes are too much alike: {seen:?}");
        Ok(())
    })
}
