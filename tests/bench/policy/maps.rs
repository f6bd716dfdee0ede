//! Many identities, many rules and many ports on one node: how many rows that is, and how soon one change of
//! them is written.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use nix::unistd::Pid;
use weir::datapath::{Datapath, MapSizes, Settings, Writers};
use weir::model::{
    Action, CompiledDirection, CompiledPolicy, Endpoint, EndpointEntry, EndpointId, IdentityId,
    IdentityLabels, MacAddress, ObjectKey, Peer, Policy, PolicyDirection, PolicyId, PolicyRef, PolicyRule,
    PortMatch, PortSelector, Protocol, Selector, Subject, Tier,
};
use weir::policy::{Compiler, Output};

use super::compile::{World, is, labels};
use super::quantiles;
use crate::cluster::world::memory;
use crate::row::Row;

/// Pods of other nodes, each with an identity of its own.
const IDENTITIES: u32 = 10_000;
/// Rules of a policy, each for a hundredth of the identities.
const RULES: u32 = 100;
/// Different ranges of ports in a policy.
const RANGES: u32 = 20;
/// Pods of this node, and how many different policies they have.
const PODS: u16 = 200;
const KINDS: u32 = 10;
/// Changes of each sort.
const CHANGES: u32 = 200;

/// Rows of the maps, and the time of a change to all maps written.
pub fn rows() -> Result<Vec<Row>> {
    let before = memory(Pid::this(), "VmRSS:")?;
    let mut world = world();
    let mut compiler = Compiler::new(PolicyId(1), IdentityId::FIRST_LOCAL, Arc::default());
    let output = world.compile(&mut compiler)?;
    let after = memory(Pid::this(), "VmRSS:")?;
    let mut rows = sizes(&output)?;
    rows.push(Row::new("policy/maps/compiled_mib", "MiB", after - before));
    let datapath = Datapath::open_private(&Settings::default(), &MapSizes::default())?;
    let mut maps = Maps { writers: datapath.writers()?, compiler, last: Output::default() };
    maps.write(&world)?;
    maps.prune(&world)?;
    let mut identity = Vec::new();
    for number in 0..CHANGES {
        world.add(remote(IDENTITIES + number));
        identity.push(maps.write(&world)?);
        maps.prune(&world)?;
    }
    rows.extend(quantiles("new_identity_written", &identity, 1.0, 10.0));
    let mut change = Vec::new();
    for number in 0..CHANGES {
        let policy = policy(number % KINDS, 1 + number as u16);
        world.policies.insert(policy.reference.clone(), Arc::new(policy));
        change.push(maps.write(&world)?);
        maps.prune(&world)?;
    }
    rows.extend(quantiles("changed_policy_written", &change, 10.0, 50.0));
    Ok(rows)
}

/// Beside them what a row for each identity and port would be, in a map for each pod.
fn sizes(output: &Output) -> Result<Vec<Row>> {
    let policies: Vec<&Arc<CompiledPolicy>> = output.policies.values().collect();
    ensure!(policies.len() == KINDS as usize, "{} different policies", policies.len());
    let entries: usize = policies.iter().map(|policy| policy.rule_rows() + policy.peer_rows()).sum();
    let directions = || policies.iter().flat_map(|policy| policy.ingress.iter().chain(&policy.egress));
    let allowed: usize = directions().map(bound).sum();
    let of_policy = |id: &PolicyId| output.policies[id].ingress.as_ref().map_or(0, identity_by_port);
    let each: usize = output.of_endpoint.values().map(of_policy).sum();
    Ok(vec![
        Row::new("policy/maps/entries", "rows", entries as f64).at_most(allowed as f64),
        Row::new("policy/maps/entries_by_identity_and_port_and_pod", "rows", each as f64),
    ])
}

/// Identities selected, and classes by ports.
fn bound(direction: &CompiledDirection) -> usize {
    let classes: BTreeSet<u32> = direction.rules.keys().map(|key| key.class).collect();
    let port = |key: &weir::model::CompiledRuleKey| (key.protocol, key.port, key.port_prefix_length);
    let ports: BTreeSet<_> = direction.rules.keys().map(port).collect();
    direction.peers.len() + classes.len() * ports.len()
}

fn identity_by_port(direction: &CompiledDirection) -> usize {
    let mut rows_of_class: BTreeMap<u32, usize> = BTreeMap::new();
    for key in direction.rules.keys() {
        *rows_of_class.entry(key.class).or_default() += 1;
    }
    direction.peers.values().map(|class| rows_of_class.get(class).copied().unwrap_or(0)).sum()
}

struct Maps {
    writers: Writers,
    compiler: Compiler,
    last: Output,
}

impl Maps {
    /// Compiles and writes in the order of the agent's rounds: how long until the last endpoint is flipped.
    fn write(&mut self, world: &World) -> Result<Duration> {
        let began = Instant::now();
        let output = world.compile(&mut self.compiler)?;
        let endpoints = entries(world, &output);
        let refused = self.writers.policies.write(&output.policies, &BTreeSet::new());
        ensure!(refused.is_empty(), "{refused:?}");
        self.writers.addresses.write(&output.addresses, &output.prefixes)?;
        self.writers.endpoints.write(&endpoints)?;
        let took = began.elapsed();
        self.last = output;
        Ok(took)
    }

    fn prune(&mut self, world: &World) -> Result<()> {
        self.writers.endpoints.prune(&entries(world, &self.last))?;
        self.writers.addresses.prune(&self.last.addresses, &self.last.prefixes)?;
        Ok(self.writers.policies.prune(&self.last.policies, &BTreeSet::new())?)
    }
}

fn world() -> World {
    let mut world = World::default();
    for number in 0..IDENTITIES {
        world.add(remote(number));
    }
    let kinds: Vec<IdentityId> = (0..KINDS).map(|kind| world.add(local(kind))).collect();
    for pod in 1..=PODS {
        world.endpoints.insert(EndpointId(pod), kinds[usize::from(pod) % KINDS as usize]);
    }
    for kind in 0..KINDS {
        let policy = policy(kind, 0);
        world.policies.insert(policy.reference.clone(), Arc::new(policy));
    }
    world
}

fn identity(pod_labels: [(&str, String); 2]) -> IdentityLabels {
    IdentityLabels {
        namespace: "load".to_owned(),
        namespace_labels: labels([("kubernetes.io/metadata.name", "load".to_owned())]),
        service_account: "default".to_owned(),
        pod_labels: labels(pod_labels),
        named_ports: BTreeMap::new(),
    }
}

fn remote(number: u32) -> IdentityLabels {
    identity([("group", format!("group-{}", number % RULES)), ("app", format!("app-{}", number / RULES))])
}

fn local(kind: u32) -> IdentityLabels {
    identity([("kind", format!("kind-{kind}")), ("app", "local".to_owned())])
}

/// The ranges move with `version`.
fn policy(kind: u32, version: u16) -> Policy {
    let rule = |number: u32| {
        let first = 1000 + (number % RANGES) as u16 * 500 + version;
        let port = PortSelector::Range(first, first + 99);
        let ports = vec![PortMatch { protocol: Protocol::Tcp.into(), port }];
        let peer = Peer::Pods { namespaces: None, pods: is("group", format!("group-{number}")) };
        PolicyRule::new(Action::Allow, Some(vec![peer]), Some(ports))
    };
    let rules = (0..RULES).map(rule).collect();
    Policy {
        reference: PolicyRef::network_policy(&ObjectKey::new("load", format!("kind-{kind}"))),
        subject: Subject::Pods { namespaces: Selector::default(), pods: is("kind", format!("kind-{kind}")) },
        tier: Tier::Namespaced,
        priority: 0,
        ingress: Some(PolicyDirection { default: Action::Deny, rules }),
        egress: None,
        marks: Default::default(),
        others: Vec::new(),
        doubts: Vec::new(),
    }
}

fn entries(world: &World, output: &Output) -> BTreeMap<EndpointId, EndpointEntry> {
    let entry = |(id, identity): (&EndpointId, &IdentityId)| {
        let endpoint = Endpoint {
            id: *id,
            container_id: id.0.to_string(),
            interface: "eth0".to_owned(),
            netns: "/run/netns/none".into(),
            pod: ObjectKey::new("load", id.0.to_string()),
            pod_uid: None,
            ipv4: Some(Ipv4Addr::from([10, 200, (id.0 / 250) as u8, (id.0 % 250 + 1) as u8])),
            ipv6: None,
            host_interface: "lo".to_owned(),
            host_ifindex: 1,
            mac: MacAddress::default(),
            port_mappings: Vec::new(),
        };
        let policy = output.of_endpoint[id];
        let entry = EndpointEntry {
            endpoint: Arc::new(endpoint),
            identity: *identity,
            policy,
            enforces_ingress: output.policies.get(&policy).is_some_and(|policy| policy.ingress.is_some()),
            enforces_egress: false,
            refuses_strangers: false,
            rejects: false,
            has_gateway: false,
            shaping: Default::default(),
        };
        (*id, entry)
    };
    world.endpoints.iter().map(entry).collect()
}
