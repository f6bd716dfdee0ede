//! What another set of policies would change: which pairs may speak that may not now, and the other way.
//!
//! Both sets are compiled, and their rows are asked for every peer that either of them tells apart.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{Compiler, Error, Input, Output};
use crate::identity::LabelFilter;
use crate::model::{
    Action, CompiledDirection, CompiledPolicy, CompiledRuleKey, EndpointId, IdentityId, IpProtocol, Policy,
    PolicyId, PolicyRef,
};
use crate::tables::Snapshot;

/// So many changes are listed.
pub const CHANGES_MAX: usize = 1000;

/// Ports of one pair that would be judged otherwise.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Change {
    /// The pods whose policy it is.
    pub pods: String,
    /// `egress` or `ingress`.
    pub direction: String,
    /// Whom they speak to, or who speaks to them.
    pub peer: String,
    /// As `TCP/80-89`.
    pub ports: String,
    /// It would be allowed, and is not now.
    pub is_allowed: bool,
}

/// Compares `after` with `before` for the endpoints of an input. `name` says who an identity is.
pub fn differences(
    before: &Snapshot<PolicyRef, Arc<Policy>>,
    after: &Snapshot<PolicyRef, Arc<Policy>>,
    given: &Input<'_>,
    filter: &Arc<LabelFilter>,
    name: impl Fn(IdentityId) -> String,
) -> Result<Vec<Change>, Error> {
    let compile = |policies| {
        let input = Input {
            policies,
            identities: given.identities,
            endpoints: given.endpoints,
            audited: given.audited,
            shown: given.shown,
            host: given.host,
            addresses: given.addresses,
            pod_cidrs: given.pod_cidrs,
            heard: given.heard,
        };
        Compiler::new(PolicyId(1), IdentityId::FIRST_LOCAL, filter.clone()).compile(&input)
    };
    let (before, after) = (compile(before)?, compile(after)?);
    let peers = peers(&before, &after, given, &name);
    let mut changes = BTreeSet::new();
    let mut seen = BTreeSet::new();
    for (endpoint, identity) in given.endpoints {
        if !seen.insert(*identity) {
            continue;
        }
        let (old, new) = (policy_of(&before, *endpoint), policy_of(&after, *endpoint));
        let sides: [(&str, Side); 2] =
            [("egress", |policy| policy.egress.as_ref()), ("ingress", |policy| policy.ingress.as_ref())];
        for (direction, side) in sides {
            let (old, new) = (old.and_then(side), new.and_then(side));
            let mut known: BTreeMap<(u32, u32), Vec<(String, bool)>> = BTreeMap::new();
            for ((before, after), peer) in &peers {
                let classes = (class_of(old, *before), class_of(new, *after));
                let ports =
                    known.entry(classes).or_insert_with(|| changed_ports((old, classes.0), (new, classes.1)));
                changes.extend(ports.iter().map(|(ports, is_allowed)| Change {
                    pods: name(*identity),
                    direction: direction.to_owned(),
                    peer: peer.clone(),
                    ports: ports.clone(),
                    is_allowed: *is_allowed,
                }));
                if changes.len() > CHANGES_MAX {
                    return Ok(changes.into_iter().take(CHANGES_MAX).collect());
                }
            }
        }
    }
    Ok(changes.into_iter().collect())
}

type Side = fn(&CompiledPolicy) -> Option<&CompiledDirection>;

fn policy_of(output: &Output, endpoint: EndpointId) -> Option<&CompiledPolicy> {
    output.policies.get(output.of_endpoint.get(&endpoint)?).map(AsRef::as_ref)
}

fn class_of(direction: Option<&CompiledDirection>, identity: IdentityId) -> u32 {
    direction.and_then(|direction| direction.peers.get(&identity)).copied().unwrap_or(0)
}

/// Everyone whom either output tells apart, with his number in each.
fn peers(
    before: &Output,
    after: &Output,
    given: &Input<'_>,
    name: &impl Fn(IdentityId) -> String,
) -> BTreeMap<(IdentityId, IdentityId), String> {
    let mut peers = BTreeMap::new();
    let everywhere = [IdentityId::WORLD, IdentityId::HOST, IdentityId::REMOTE_NODE];
    for id in everywhere.into_iter().chain(given.identities.keys().copied()) {
        peers.insert((id, id), name(id));
    }
    for (address, owner) in given.addresses {
        let pair = (identity_of(before, *address), identity_of(after, *address));
        peers.entry(pair).or_insert_with(|| format!("{} ({address})", name(owner.identity)));
    }
    for net in before.prefixes.keys().chain(after.prefixes.keys()) {
        let address = net.addr();
        if !given.addresses.contains_key(&address) {
            let pair = (identity_of(before, address), identity_of(after, address));
            peers.entry(pair).or_insert_with(|| net.to_string());
        }
    }
    peers
}

fn identity_of(output: &Output, address: IpAddr) -> IdentityId {
    if let Some(entry) = output.addresses.get(&address) {
        return entry.identity;
    }
    let covers = |net: &&IpNet| net.contains(&address);
    let longest = output.prefixes.keys().filter(covers).max_by_key(|net| net.prefix_len());
    longest.map_or(IdentityId::WORLD, |net| output.prefixes[net].identity)
}

/// The ranges of ports that the rows of two classes judge differently, and what the second says.
fn changed_ports(
    before: (Option<&CompiledDirection>, u32),
    after: (Option<&CompiledDirection>, u32),
) -> Vec<(String, bool)> {
    let keys = [before, after].into_iter().flat_map(|(direction, class)| {
        direction.into_iter().flat_map(move |direction| rows(direction, class)).map(|(key, _)| *key)
    });
    let keys: Vec<CompiledRuleKey> = keys.collect();
    let mut protocols: BTreeSet<u8> = keys.iter().filter_map(|key| key.protocol).collect();
    protocols.extend([6, 17, 1]);
    let mut changed = Vec::new();
    for protocol in protocols {
        let mut starts: BTreeSet<u32> = BTreeSet::from([0]);
        for key in keys.iter().filter(|key| key.protocol == Some(protocol)) {
            let length = 1 << (16 - u32::from(key.port_prefix_length));
            starts.extend([u32::from(key.port), u32::from(key.port) + length]);
        }
        starts.insert(0x1_0000);
        let starts: Vec<u32> = starts.into_iter().filter(|start| *start <= 0x1_0000).collect();
        let mut ranges: Vec<(u32, u32, bool)> = Vec::new();
        for pair in starts.windows(2) {
            let port = u16::try_from(pair[0]).unwrap_or(u16::MAX);
            let (old, new) = (verdict(before, protocol, port), verdict(after, protocol, port));
            if old == new {
                continue;
            }
            match ranges.last_mut() {
                Some((_, end, is)) if *end == pair[0] && *is == new => *end = pair[1],
                _ => ranges.push((pair[0], pair[1], new)),
            }
        }
        let protocol = IpProtocol(protocol);
        changed.extend(ranges.into_iter().map(|(from, to, is_allowed)| {
            let ports = match (from, to - 1) {
                (0, 0xffff) => protocol.to_string(),
                (from, last) if from == last => format!("{protocol}/{from}"),
                (from, last) => format!("{protocol}/{from}-{last}"),
            };
            (ports, is_allowed)
        }));
    }
    changed
}

fn rows(
    direction: &CompiledDirection,
    class: u32,
) -> impl Iterator<Item = (&CompiledRuleKey, &crate::model::CompiledRule)> {
    direction.rules.iter().filter(move |(key, _)| key.class == class)
}

fn verdict((direction, class): (Option<&CompiledDirection>, u32), protocol: u8, port: u16) -> bool {
    let Some(direction) = direction else { return true };
    let matches = |key: &CompiledRuleKey| {
        key.protocol.is_none_or(|known| known == protocol)
            && u32::from(key.port ^ port) >> (16 - key.port_prefix_length) == 0
    };
    let found = rows(direction, class).filter(|(key, _)| matches(key));
    found
        .max_by_key(|(key, _)| (key.protocol, key.port_prefix_length))
        .is_some_and(|(_, rule)| rule.action == Action::Allow)
}
