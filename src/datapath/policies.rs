//! Writes `policy_rules` and `policy_peers`.
//!
//! A policy is written completely under an id that nobody points at yet: first
//! the rules of every class, then who is in which class. Only `prune` deletes.
//! What the map holds is remembered as the compiled policies themselves, which
//! the compiler shares, so this costs no copy of the rows.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::Result;
use imbl::OrdMap;
use imbl::ordmap::DiffItem;

use super::abi::{Plain, PolicyPeer, PolicyPeerKey, PolicyRule, PolicyRuleKey};
use super::map::{Bytes, MapError, TypedMap, first_free};
use super::mirror::Fill;
use super::rule_origins::RuleOrigins;
use super::rule_sets::RuleSets;
use super::types::{direction, policy_rule_prefix, policy_verdict};
use crate::model::l7::RuleSetId;
use crate::model::{
    Action, CompiledDirection, CompiledPolicy, CompiledRule, CompiledRuleKey, IdentityId, Origins, PolicyId,
};

/// The one writer of `policy_rules` and `policy_peers`.
pub struct PolicyWriter {
    rules: Counted<PolicyRuleKey, PolicyRule>,
    peers: Counted<PolicyPeerKey, PolicyPeer>,
    held: BTreeMap<PolicyId, Held>,
    inherited: Inherited,
    next_free: PolicyId,
    origins: RuleOrigins,
    sets: RuleSets,
}

/// The rows that the map may hold under one id.
#[derive(Default)]
struct Held {
    /// All its rows are in the map.
    complete: Option<Arc<CompiledPolicy>>,
    /// Some of these rows may be: replaced versions, and ones whose writing stopped half-way.
    partial: Vec<Arc<CompiledPolicy>>,
}

/// Rows that a former process wrote.
#[derive(Default)]
struct Inherited {
    rules: Vec<PolicyRuleKey>,
    peers: Vec<PolicyPeerKey>,
}

impl Inherited {
    fn has(&self, id: PolicyId) -> bool {
        self.rules.iter().any(|key| u32::from_be(key.policy_id) == id.0)
            || self.peers.iter().any(|key| key.policy_id == id.0)
    }
}

impl PolicyWriter {
    pub(super) fn new(
        rules: (TypedMap<PolicyRuleKey, PolicyRule>, Fill),
        peers: (TypedMap<PolicyPeerKey, PolicyPeer>, Fill),
        in_force: &BTreeSet<PolicyId>,
    ) -> Result<Self> {
        let (rules, peers) = (Counted::new(rules), Counted::new(peers));
        let mut inherited = Inherited::default();
        let mut in_use: BTreeSet<u32> = in_force.iter().map(|id| id.0).collect();
        let mut highest_rule = 0;
        let mut inherited_sets = BTreeSet::new();
        rules.map.for_each(|key, rule| {
            in_use.insert(u32::from_be(key.policy_id));
            highest_rule = highest_rule.max(rule.rule_id);
            inherited_sets.insert(rule.l7_set);
            inherited.rules.push(key);
        })?;
        peers.map.for_each(|key, _| {
            in_use.insert(key.policy_id);
            inherited.peers.push(key);
        })?;
        rules.set(inherited.rules.len());
        peers.set(inherited.peers.len());
        let next_free = PolicyId(first_free(&in_use, 1, PolicyId::CLOSED.0));
        let origins = RuleOrigins::starting_above(highest_rule);
        let sets = RuleSets::beside(inherited_sets);
        Ok(Self { rules, peers, held: BTreeMap::new(), inherited, next_free, origins, sets })
    }

    /// An id that was not in the maps at start, with the most free ones above it.
    pub fn next_free_id(&self) -> PolicyId {
        self.next_free
    }

    /// The node-local identities that a former process's rows name.
    pub(super) fn inherited_local_identities(&self) -> impl Iterator<Item = IdentityId> {
        let keys = self.inherited.peers.iter().map(|key| IdentityId(key.identity));
        keys.filter(|id| id.is_local())
    }

    /// What rule ids in events stand for; a handle that can be shared.
    pub fn rule_origins(&self) -> RuleOrigins {
        self.origins.clone()
    }

    /// The numbers of rules of layer 7; a handle that can be shared.
    pub fn rule_sets(&self) -> RuleSets {
        self.sets.clone()
    }

    /// The policies that a rule id of an event stands for.
    pub fn rule_origin(&self, rule_id: u32) -> Option<Origins> {
        self.origins.get(rule_id)
    }

    /// Rows that `policy_rules` and `policy_peers` can hold.
    pub fn capacity(&self) -> (usize, usize) {
        (self.rules.map.capacity() as usize, self.peers.map.capacity() as usize)
    }

    /// Writes what is not in the maps yet, and returns the policies that could not be written. Nothing
    /// of these stays behind. A policy's rules come before its peers, so that no identity is in a class
    /// without rules. When a map is full, what neither `policies` nor `in_force` names is deleted first.
    pub fn write(
        &mut self,
        policies: &BTreeMap<PolicyId, Arc<CompiledPolicy>>,
        in_force: &BTreeSet<PolicyId>,
    ) -> BTreeMap<PolicyId, MapError> {
        let mut refused = BTreeMap::new();
        let mut is_pruned = false;
        for (&id, policy) in policies {
            let mut written = self.write_if_new(id, policy);
            if matches!(written, Err(MapError::Full { .. })) && !is_pruned {
                is_pruned = true;
                written = self.prune_unused(policies, in_force).and_then(|()| self.write_if_new(id, policy));
            }
            if let Err(error) = written {
                refused.insert(id, error);
            }
        }
        refused
    }

    /// Walks the maps: by map, how many rows somebody else changed. Strange rows go at once, the next
    /// write puts the others back.
    pub fn compare(&mut self) -> Result<[(&'static str, u64); 2], MapError> {
        let (strange_rules, strange_peers) = (self.strange_rules()?, self.strange_peers()?);
        self.peers.remove(&strange_peers)?;
        self.rules.remove(&strange_rules)?;
        let ids: Vec<PolicyId> = self.held.keys().copied().collect();
        let (mut rules, mut peers) = (strange_rules.len() as u64, strange_peers.len() as u64);
        for id in ids {
            let Some(complete) = self.held.get(&id).and_then(|held| held.complete.clone()) else { continue };
            let (lost_rules, lost_peers) = self.lost(id, &complete)?;
            if lost_rules + lost_peers > 0 {
                let held = self.held.entry(id).or_default();
                held.partial.extend(held.complete.take());
            }
            rules += lost_rules;
            peers += lost_peers;
        }
        Ok([("map policy_rules", rules), ("map policy_peers", peers)])
    }

    fn strange_rules(&self) -> Result<Vec<PolicyRuleKey>, MapError> {
        let inherited: BTreeSet<_> = self.inherited.rules.iter().map(|key| Bytes(*key)).collect();
        let (mut strange, mut count) = (Vec::new(), 0);
        self.rules.map.for_each(|key, _| {
            count += 1;
            let id = PolicyId(u32::from_be(key.policy_id));
            let is_ours = self.versions(id).any(|policy| {
                let side = direction_of(policy, key.direction);
                side.is_some_and(|side| side.rules.contains_key(&compiled_key(&key)))
            });
            if !is_ours && !inherited.contains(&Bytes(key)) {
                strange.push(key);
            }
        })?;
        self.rules.set(count);
        Ok(strange)
    }

    fn strange_peers(&self) -> Result<Vec<PolicyPeerKey>, MapError> {
        let inherited: BTreeSet<_> = self.inherited.peers.iter().map(|key| Bytes(*key)).collect();
        let (mut strange, mut count) = (Vec::new(), 0);
        self.peers.map.for_each(|key, _| {
            count += 1;
            let is_ours = self.versions(PolicyId(key.policy_id)).any(|policy| {
                let side = direction_of(policy, key.direction as u8);
                side.is_some_and(|side| side.peers.contains_key(&IdentityId(key.identity)))
            });
            if !is_ours && !inherited.contains(&Bytes(key)) {
                strange.push(key);
            }
        })?;
        self.peers.set(count);
        Ok(strange)
    }

    fn versions(&self, id: PolicyId) -> impl Iterator<Item = &CompiledPolicy> {
        let held = self.held.get(&id);
        held.into_iter().flat_map(|held| held.complete.iter().chain(&held.partial)).map(AsRef::as_ref)
    }

    /// How many rows of a policy are not in the maps as they were written.
    fn lost(&self, id: PolicyId, policy: &CompiledPolicy) -> Result<(u64, u64), MapError> {
        let (mut rules, mut peers) = (0, 0);
        for (side, rows) in directions(policy) {
            for (key, rule) in &rows.rules {
                let found = self.rules.map.get(&rule_key(id, side, key))?;
                // Who says so may have another number by now.
                let row = found.map(|found| rule_row(rule, found.rule_id, self.set_of(rule)));
                let is_same = found.zip(row).is_some_and(|(found, row)| found.as_bytes() == row.as_bytes());
                rules += u64::from(!is_same);
            }
            for (&identity, &class) in &rows.peers {
                let found = self.peers.map.get(&peer_key(id, side, identity))?;
                peers += u64::from(found.is_none_or(|found| found.class != class));
            }
        }
        Ok((rules, peers))
    }

    fn write_if_new(&mut self, id: PolicyId, policy: &Arc<CompiledPolicy>) -> Result<(), MapError> {
        let held = self.held.entry(id).or_default();
        if held.complete.as_ref().is_some_and(|old| Arc::ptr_eq(old, policy)) {
            return Ok(());
        }
        let old = held.complete.clone();
        if old.as_ref().is_some_and(|old| old == policy) {
            held.complete = Some(policy.clone());
            return Ok(());
        }
        let knows_all = held.partial.is_empty() && !self.inherited.has(id);
        held.partial.push(policy.clone());
        let last = old.clone().or_else(|| held.partial.iter().rev().nth(1).cloned());
        if let Err(error) = self.write_policy(id, policy, old.as_deref(), knows_all) {
            // Its rows would keep others out. Rows of the last version may have been replaced.
            self.delete_policy(id, policy, last.as_deref())?;
            let held = self.held.entry(id).or_default();
            held.partial.retain(|partial| !Arc::ptr_eq(partial, policy));
            held.partial.extend(held.complete.take());
            return Err(error);
        }
        let held = self.held.entry(id).or_default();
        held.partial.retain(|partial| !Arc::ptr_eq(partial, policy));
        held.partial.extend(old);
        held.complete = Some(policy.clone());
        Ok(())
    }

    /// Deletes the rows of policies that are neither desired nor `in_force`, and of the desired ones the
    /// rows that they had once. Only after every source is synced.
    pub fn prune(
        &mut self,
        policies: &BTreeMap<PolicyId, Arc<CompiledPolicy>>,
        in_force: &BTreeSet<PolicyId>,
    ) -> Result<(), MapError> {
        let with_rows = policies.values().chain(self.held.values().flat_map(|held| &held.complete));
        let sides = with_rows.flat_map(|policy| directions(policy));
        self.origins.forget(sides.flat_map(|(_, side)| side.rules.values().map(|rule| &rule.origins)));
        self.prune_unused(policies, in_force)?;
        for (&id, desired) in policies {
            let Some(held) = self.held.get(&id).filter(|held| !held.partial.is_empty()) else { continue };
            let is_complete = held.complete.as_ref() == Some(desired);
            let others = held.complete.iter().filter(|_| !is_complete);
            for version in held.partial.iter().chain(others).cloned().collect::<Vec<_>>() {
                self.delete_policy(id, &version, Some(desired))?;
            }
            // Nothing is left that is not desired, but perhaps not all that is.
            let held = match is_complete {
                true => Held { complete: Some(desired.clone()), partial: Vec::new() },
                false => Held { complete: None, partial: vec![desired.clone()] },
            };
            self.held.insert(id, held);
        }
        Ok(())
    }

    /// Deletes all rows of policies that are neither desired nor `in_force`.
    fn prune_unused(
        &mut self,
        policies: &BTreeMap<PolicyId, Arc<CompiledPolicy>>,
        in_force: &BTreeSet<PolicyId>,
    ) -> Result<(), MapError> {
        self.prune_inherited(policies, in_force)?;
        let is_used = |id: &PolicyId| policies.contains_key(id) || in_force.contains(id);
        let unused: Vec<PolicyId> = self.held.keys().filter(|id| !is_used(id)).copied().collect();
        for id in unused {
            let Some(held) = self.held.get(&id) else { continue };
            for version in held.partial.iter().chain(&held.complete).cloned().collect::<Vec<_>>() {
                self.delete_policy(id, &version, None)?;
            }
            self.held.remove(&id);
        }
        Ok(())
    }

    /// What the proxy judges the rule by; 0: nothing.
    fn set_of(&self, rule: &CompiledRule) -> RuleSetId {
        rule.l7.as_ref().map_or(RuleSetId(0), |set| self.sets.id_of(set))
    }

    fn write_policy(
        &mut self,
        id: PolicyId,
        policy: &CompiledPolicy,
        old: Option<&CompiledPolicy>,
        knows_all: bool,
    ) -> Result<(), MapError> {
        let (mut rules, mut peers) = (Difference::new(), Difference::new());
        for (side, now) in directions(policy) {
            let before = old.and_then(|old| direction_of(old, side));
            rules.add(before.map(|before| &before.rules), &now.rules, |key, rule| {
                let rule_id = self.origins.id_of(&rule.origins, rule.is_audit, key.match_type());
                (rule_key(id, side, key), rule_row(rule, rule_id, self.set_of(rule)))
            });
            peers.add(before.map(|before| &before.peers), &now.peers, |identity, class| {
                (peer_key(id, side, *identity), PolicyPeer { class: *class })
            });
        }
        rules.write(&self.rules, knows_all)?;
        peers.write(&self.peers, knows_all)
    }

    /// Deletes the rows of `version` that `kept` does not have: peers first.
    fn delete_policy(
        &mut self,
        id: PolicyId,
        version: &CompiledPolicy,
        kept: Option<&CompiledPolicy>,
    ) -> Result<(), MapError> {
        for (side, old) in directions(version) {
            let kept = kept.and_then(|kept| direction_of(kept, side));
            let peers = gone(&old.peers, kept.map(|kept| &kept.peers));
            let keys: Vec<_> = peers.into_iter().map(|identity| peer_key(id, side, identity)).collect();
            self.peers.remove(&keys)?;
            let rules = gone(&old.rules, kept.map(|kept| &kept.rules));
            self.rules.remove(&rules.iter().map(|key| rule_key(id, side, key)).collect::<Vec<_>>())?;
        }
        Ok(())
    }

    fn prune_inherited(
        &mut self,
        policies: &BTreeMap<PolicyId, Arc<CompiledPolicy>>,
        in_force: &BTreeSet<PolicyId>,
    ) -> Result<(), MapError> {
        let is_kept = |id: PolicyId| in_force.contains(&id) && !policies.contains_key(&id);
        let is_kept_peer = |key: &PolicyPeerKey| is_kept(PolicyId(key.policy_id));
        let is_kept_rule = |key: &PolicyRuleKey| is_kept(PolicyId(u32::from_be(key.policy_id)));
        let stale_peers = self.inherited.peers.iter().filter(|key| !is_kept_peer(key)).filter(|key| {
            let policy = policies.get(&PolicyId(key.policy_id));
            let side = policy.and_then(|policy| direction_of(policy, key.direction as u8));
            side.is_none_or(|side| !side.peers.contains_key(&IdentityId(key.identity)))
        });
        self.peers.remove(&stale_peers.copied().collect::<Vec<_>>())?;
        self.inherited.peers.retain(is_kept_peer);
        let stale_rules = self.inherited.rules.iter().filter(|key| !is_kept_rule(key)).filter(|key| {
            let policy = policies.get(&PolicyId(u32::from_be(key.policy_id)));
            let side = policy.and_then(|policy| direction_of(policy, key.direction));
            side.is_none_or(|side| !side.rules.contains_key(&compiled_key(key)))
        });
        self.rules.remove(&stale_rules.copied().collect::<Vec<_>>())?;
        self.inherited.rules.retain(is_kept_rule);
        Ok(())
    }
}

/// A map whose rows are counted, not remembered.
struct Counted<K, V> {
    map: TypedMap<K, V>,
    fill: Fill,
}

impl<K: Plain, V: Plain> Counted<K, V> {
    fn new((map, fill): (TypedMap<K, V>, Fill)) -> Self {
        Self { map, fill }
    }

    fn set(&self, rows: usize) {
        self.fill.store(rows, Ordering::Relaxed);
    }

    /// Rows of which none is there.
    fn insert_new(&self, rows: (Vec<K>, Vec<V>)) -> Result<(), MapError> {
        let (written, result) = self.map.insert_all(&rows.0, &rows.1);
        self.fill.fetch_add(written, Ordering::Relaxed);
        result
    }

    /// Rows that are there with another value.
    fn replace(&self, rows: (Vec<K>, Vec<V>)) -> Result<(), MapError> {
        self.map.insert_all(&rows.0, &rows.1).1
    }

    /// Rows that may be there: each is asked for, so that it counts once.
    fn insert(&self, rows: (Vec<K>, Vec<V>)) -> Result<(), MapError> {
        for (key, value) in rows.0.iter().zip(&rows.1) {
            let is_new = self.map.get(key)?.is_none();
            self.map.insert(key, value)?;
            self.fill.fetch_add(usize::from(is_new), Ordering::Relaxed);
        }
        Ok(())
    }

    fn remove(&self, keys: &[K]) -> Result<(), MapError> {
        let (removed, result) = self.map.remove_all(keys);
        self.fill.fetch_sub(removed, Ordering::Relaxed);
        result
    }
}

/// The rows of one map that a version of a policy has and the one before has not.
struct Difference<K, V> {
    new: (Vec<K>, Vec<V>),
    changed: (Vec<K>, Vec<V>),
}

impl<K: Plain, V: Plain> Difference<K, V> {
    fn new() -> Self {
        Self { new: (Vec::new(), Vec::new()), changed: (Vec::new(), Vec::new()) }
    }

    fn add<A: Ord, B: PartialEq>(
        &mut self,
        before: Option<&OrdMap<A, B>>,
        now: &OrdMap<A, B>,
        mut row: impl FnMut(&A, &B) -> (K, V),
    ) {
        let none = OrdMap::new();
        for item in before.unwrap_or(&none).diff(now) {
            let ((keys, values), (key, value)) = match item {
                DiffItem::Add(key, value) => (&mut self.new, row(key, value)),
                DiffItem::Update { new: (key, value), .. } => (&mut self.changed, row(key, value)),
                DiffItem::Remove(..) => continue,
            };
            keys.push(key);
            values.push(value);
        }
    }

    /// `knows_all`: the map has what the version before has, and nothing else of the policy.
    fn write(self, map: &Counted<K, V>, knows_all: bool) -> Result<(), MapError> {
        if knows_all {
            map.insert_new(self.new)?;
            return map.replace(self.changed);
        }
        map.insert(self.new)?;
        map.insert(self.changed)
    }
}

/// What `old` has and `kept` has not.
fn gone<A: Ord + Clone, B: PartialEq>(old: &OrdMap<A, B>, kept: Option<&OrdMap<A, B>>) -> Vec<A> {
    let Some(kept) = kept else { return old.keys().cloned().collect() };
    let items = old.diff(kept).filter_map(|item| match item {
        DiffItem::Remove(key, _) => Some(key.clone()),
        DiffItem::Add(..) | DiffItem::Update { .. } => None,
    });
    items.collect()
}

const INGRESS: u8 = direction::DIRECTION_INGRESS.0 as u8;
const EGRESS: u8 = direction::DIRECTION_EGRESS.0 as u8;

fn direction_of(policy: &CompiledPolicy, side: u8) -> Option<&CompiledDirection> {
    match side {
        INGRESS => policy.ingress.as_ref(),
        EGRESS => policy.egress.as_ref(),
        _ => None,
    }
}

fn directions(policy: &CompiledPolicy) -> impl Iterator<Item = (u8, &CompiledDirection)> {
    [INGRESS, EGRESS].into_iter().filter_map(|side| Some((side, direction_of(policy, side)?)))
}

fn peer_key(id: PolicyId, side: u8, identity: IdentityId) -> PolicyPeerKey {
    PolicyPeerKey { policy_id: id.0, identity: identity.0, direction: u32::from(side) }
}

fn rule_key(id: PolicyId, side: u8, key: &CompiledRuleKey) -> PolicyRuleKey {
    let (prefix_length, port) = match key.protocol {
        None => (policy_rule_prefix::POLICY_RULE_PREFIX_ANY.0, 0),
        Some(_) => {
            let length = key.port_prefix_length.min(16);
            let mask = u16::MAX.checked_shl(16 - u32::from(length)).unwrap_or(0);
            (policy_rule_prefix::POLICY_RULE_PREFIX_PROTOCOL.0 + u32::from(length), key.port & mask)
        }
    };
    PolicyRuleKey {
        prefix_length,
        policy_id: id.0.to_be(),
        class: key.class.to_be(),
        direction: side,
        protocol: key.protocol.unwrap_or(0),
        port: port.to_be(),
    }
}

fn compiled_key(key: &PolicyRuleKey) -> CompiledRuleKey {
    let has_protocol = key.prefix_length >= policy_rule_prefix::POLICY_RULE_PREFIX_PROTOCOL.0;
    let length = key.prefix_length.saturating_sub(policy_rule_prefix::POLICY_RULE_PREFIX_PROTOCOL.0);
    CompiledRuleKey {
        class: u32::from_be(key.class),
        protocol: has_protocol.then_some(key.protocol),
        port: u16::from_be(key.port),
        port_prefix_length: length as u8,
    }
}

fn rule_row(rule: &CompiledRule, rule_id: u32, set: RuleSetId) -> PolicyRule {
    let verdict = match rule.action {
        Action::Allow => policy_verdict::POLICY_ALLOW,
        Action::Deny | Action::Pass => policy_verdict::POLICY_DENY,
    };
    PolicyRule { rule_id, l7_set: set.0, verdict: verdict.0 as u8, reserved: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::abi::Plain;

    fn key(protocol: Option<u8>, port: u16, port_prefix_length: u8) -> CompiledRuleKey {
        CompiledRuleKey { class: 0x0102, protocol, port, port_prefix_length }
    }

    #[test]
    fn rule_keys_are_big_endian_behind_the_prefix_length() {
        let cases = [
            (key(None, 0, 0), 72, [0, 0, 0]),
            (key(Some(6), 0, 0), 80, [6, 0, 0]),
            (key(Some(6), 0x1f90, 16), 96, [6, 0x1f, 0x90]),
            (key(Some(17), 0x1f90, 8), 88, [17, 0x1f, 0]),
        ];
        for (compiled, prefix_length, tail) in cases {
            let row = rule_key(PolicyId(0x0a0b0c), EGRESS, &compiled);
            let mut bytes = u32::to_ne_bytes(prefix_length).to_vec();
            bytes.extend([0, 0x0a, 0x0b, 0x0c, 0, 0, 1, 2, EGRESS]);
            bytes.extend(tail);
            assert_eq!(row.as_bytes(), bytes);
        }
    }

    #[test]
    fn rule_keys_decode_to_what_they_were_made_of() {
        for compiled in [key(None, 0, 0), key(Some(6), 0, 0), key(Some(6), 443, 16), key(Some(17), 0x1f00, 8)]
        {
            assert_eq!(compiled_key(&rule_key(PolicyId(9), INGRESS, &compiled)), compiled);
        }
    }
}
