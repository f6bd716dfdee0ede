//! Compiles policies of every kind into rows of the policy maps, and addresses into identities.
//!
//! ```text
//!  endpoints ──> select ──> definitions ──> value: rules x peers -> classes ──> policies
//!                  │                          ^
//!                  └─> prefixes in use        │ who matches what
//!                          v                  │
//!  addresses ────────> prefixes ──> members of peers <── identities
//! ```
//!
//! A compiled policy is a value: pods that the same policies select, with the same
//! meaning of the port names in them, share one number. Under one number rows are
//! only added, so nothing that runs with it ever sees half of a change; any other change
//! is another number. The compiler remembers its last answer and works out differences:
//! a new identity is held against each distinct peer once.

pub mod allow;
pub mod diff;
pub mod explain;
mod layer7;
mod named;
mod owners;
mod peers;
mod prefixes;
mod resolve;
mod rules;
mod select;
mod shown;
pub mod suggest;
#[cfg(test)]
mod tests;
mod value;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use imbl::ordmap::DiffItem;
use ipnet::IpNet;
use serde::Serialize;

use crate::identity::LabelFilter;
use crate::model::l7::DnsRule;
use crate::model::{
    AddressEntry, BaseAddress, CompiledPolicy, EndpointId, IdentityId, IdentityLabels, LocalIdentity,
    Origins, Policy, PolicyId, PolicyRef, PrefixEntry, Visibility,
};
use crate::tables::Snapshot;

use named::Named;
pub use named::{Heard, Told};
use owners::Owners;
use peers::{Member, Peers};
use prefixes::{Assigned, Locals, Tree};
pub use resolve::{References, Resolver, Sources};
pub use select::asked_labels;
use select::{Definition, Selected, Selections, Treatment};
use value::Value;

/// What policy depends on.
pub struct Input<'a> {
    /// Every policy.
    pub policies: &'a Snapshot<PolicyRef, Arc<Policy>>,
    /// Every cluster identity.
    pub identities: &'a Snapshot<IdentityId, Arc<IdentityLabels>>,
    /// The pods of this node, with their cluster identity.
    pub endpoints: &'a BTreeMap<EndpointId, IdentityId>,
    /// Those of them of which a denial is only reported.
    pub audited: &'a BTreeSet<EndpointId>,
    /// Those of them whose requests are shown.
    pub shown: &'a BTreeMap<EndpointId, Visibility>,
    /// The node's labels, as a pod's are: policies may select the endpoint of the host by them.
    pub host: &'a Arc<IdentityLabels>,
    /// Every address of a pod or node.
    pub addresses: &'a Snapshot<IpAddr, BaseAddress>,
    /// The pod CIDRs of every node.
    pub pod_cidrs: &'a [IpNet],
    /// What DNS told pods of this node.
    pub heard: &'a Heard,
}

/// What the maps should hold. Parts that did not change share memory with the last output.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Output {
    /// The policies in use.
    pub policies: BTreeMap<PolicyId, Arc<CompiledPolicy>>,
    /// The policy of each endpoint; 0 where none selects it. An endpoint whose identity
    /// has no labels yet is missing: what may reach it is not known.
    pub of_endpoint: BTreeMap<EndpointId, PolicyId>,
    /// The policies that select each endpoint, sorted.
    pub selected_by: BTreeMap<EndpointId, Arc<[PolicyRef]>>,
    /// Those of them that isolate it, for what comes in and for what goes out: what no rule allows they deny.
    pub isolated_by: BTreeMap<EndpointId, [Origins; 2]>,
    /// The names of DNS in the rules of each endpoint that has any.
    pub named_by: Arc<BTreeMap<EndpointId, Arc<[DnsRule]>>>,
    /// Rows of `addresses`.
    pub addresses: Snapshot<IpAddr, AddressEntry>,
    /// Rows of `prefixes`.
    pub prefixes: Arc<BTreeMap<IpNet, PrefixEntry>>,
    /// What the local numbers mean.
    pub local_identities: Arc<BTreeMap<IdentityId, LocalIdentity>>,
}

/// Why there is no output. The last one stays true until the agent starts again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// 2^24 local numbers are in use.
    #[error("every local identity number is in use: name fewer prefixes in policies")]
    LocalIdentitiesExhausted,
    /// Policy numbers are never used twice, and 2^28 were.
    #[error("every policy number has been used: restart the agent")]
    PoliciesExhausted,
}

/// Compiles again and again, and keeps numbers stable meanwhile.
pub struct Compiler {
    filter: Arc<LabelFilter>,
    next_policy: PolicyId,
    selections: Selections,
    endpoints: BTreeMap<EndpointId, IdentityId>,
    audited: BTreeSet<EndpointId>,
    shown: BTreeMap<EndpointId, Visibility>,
    host: Arc<IdentityLabels>,
    identities: Snapshot<IdentityId, Arc<IdentityLabels>>,
    prefixes: BTreeSet<IpNet>,
    tree: Tree,
    locals: Locals,
    addresses: Snapshot<IpAddr, BaseAddress>,
    owners: Owners,
    pod_cidrs: Vec<IpNet>,
    named: Named,
    assigned: Assigned,
    peers: Peers,
    values: BTreeMap<Definition, Value>,
}

impl Compiler {
    /// A compiler that gives out policy numbers from `first_policy` on, and local
    /// identities from `first_local` on: above all that the maps hold. Identities have the
    /// labels that `filter` says.
    pub fn new(first_policy: PolicyId, first_local: IdentityId, filter: Arc<LabelFilter>) -> Self {
        Self {
            filter: filter.clone(),
            next_policy: first_policy.max(PolicyId(1)),
            selections: Selections::default(),
            endpoints: BTreeMap::new(),
            audited: BTreeSet::new(),
            shown: BTreeMap::new(),
            host: Arc::default(),
            identities: Snapshot::new(),
            prefixes: BTreeSet::new(),
            tree: Tree::default(),
            locals: Locals::new(first_local),
            addresses: Snapshot::new(),
            owners: Owners::default(),
            pod_cidrs: Vec::new(),
            named: Named::default(),
            assigned: Assigned::default(),
            peers: Peers::new(filter),
            values: BTreeMap::new(),
        }
    }

    /// What the maps should hold for `input`. After an error the next call begins afresh.
    pub fn compile(&mut self, input: &Input<'_>) -> Result<Output, Error> {
        let output = self.compile_difference(input);
        if output.is_err() {
            let mut fresh = Self::new(self.next_policy, IdentityId::FIRST_LOCAL, self.filter.clone());
            std::mem::swap(&mut fresh.locals, &mut self.locals);
            fresh.locals.forget();
            *self = fresh;
        }
        output
    }

    fn compile_difference(&mut self, input: &Input<'_>) -> Result<Output, Error> {
        let relabelled = self.relabelled(input.identities);
        let is_selection_changed = self.select(input, &relabelled);
        let mut owners = self.owners.follow(&self.addresses, input.addresses);
        owners.extend(relabelled.keys());
        let mut changes = self.assign(input, is_selection_changed, &relabelled)?;
        changes.extend(owners.into_iter().map(|id| {
            // Who has an address and no labels yet is somebody all the same.
            let labels = input.identities.get(&id).cloned();
            let is_there = labels.is_some() || self.owners.has(id);
            (id, is_there.then(|| Member { base: Some(id), labels, ..Member::default() }))
        }));
        let touched = self.peers.apply(&changes);
        if is_selection_changed {
            self.drop_unused();
        }
        if !touched.is_empty() {
            self.values.values_mut().for_each(|value| value.update(&touched, &self.peers));
        }
        if is_selection_changed {
            self.add_missing(input.identities)?;
            let used: HashSet<_> = self.values.values().flat_map(Value::peers).collect();
            self.peers.retain(&used);
        }
        Ok(self.output())
    }

    /// The identities that are new, have other labels (a number claimed again), or are gone.
    fn relabelled(
        &mut self,
        identities: &Snapshot<IdentityId, Arc<IdentityLabels>>,
    ) -> BTreeMap<IdentityId, Option<Arc<IdentityLabels>>> {
        let before = std::mem::replace(&mut self.identities, identities.clone());
        before
            .diff(identities)
            .map(|item| match item {
                DiffItem::Add(id, labels) | DiffItem::Update { new: (id, labels), .. } => {
                    (*id, Some(labels.clone()))
                }
                DiffItem::Remove(id, _) => (*id, None),
            })
            .collect()
    }

    /// Renews what selects each identity of this node; true if that may have changed.
    fn select(
        &mut self,
        input: &Input<'_>,
        relabelled: &BTreeMap<IdentityId, Option<Arc<IdentityLabels>>>,
    ) -> bool {
        let mut is_changed = self.selections.update(input.policies);
        is_changed |= self.selections.forget(relabelled.keys());
        if *input.host != self.host {
            self.host = input.host.clone();
            is_changed |= self.selections.forget([IdentityId::HOST].iter());
        }
        is_changed |= *input.endpoints != self.endpoints
            || *input.audited != self.audited
            || *input.shown != self.shown;
        let treatment = |endpoint| Treatment {
            is_audit: input.audited.contains(endpoint),
            shown: input.shown.get(endpoint).copied().unwrap_or_default(),
        };
        let used = input.endpoints.iter().map(|(endpoint, id)| (*id, treatment(endpoint)));
        let used: BTreeSet<Selected> = used.collect();
        is_changed |= used.len() != self.selections.selected().len();
        if is_changed {
            self.endpoints.clone_from(input.endpoints);
            self.audited.clone_from(input.audited);
            self.shown.clone_from(input.shown);
            self.selections.select(&used, input.identities, &self.host);
        }
        is_changed
    }

    /// Renews the identities of addresses and prefixes; returns the local ones that are
    /// new, have a base with other labels, or are gone.
    fn assign(
        &mut self,
        input: &Input<'_>,
        is_selection_changed: bool,
        relabelled: &BTreeMap<IdentityId, Option<Arc<IdentityLabels>>>,
    ) -> Result<BTreeMap<IdentityId, Option<Member>>, Error> {
        let mut renamed = self.named.hear(input.heard);
        if is_selection_changed {
            renamed.extend(self.named.rule(self.dns_rules()));
        }
        let prefixes = is_selection_changed.then(|| self.selections.prefixes());
        let prefixes = prefixes.filter(|prefixes| *prefixes != self.prefixes);
        let is_same_tree = prefixes.is_none();
        if let Some(prefixes) = prefixes {
            self.tree = Tree::new(&prefixes);
            self.prefixes = prefixes;
        }
        let before = self.assigned.identities.clone();
        let addresses = std::mem::replace(&mut self.addresses, input.addresses.clone());
        if !is_same_tree || *input.pod_cidrs != self.pod_cidrs {
            self.pod_cidrs = input.pod_cidrs.to_vec();
            let named = self.named.by_address();
            self.assigned = self.locals.assign(&self.tree, input.addresses, input.pod_cidrs, named)?;
        } else {
            self.locals.follow(&self.tree, &addresses, input.addresses, &mut self.assigned)?;
            let named = self.named.by_address();
            self.locals.follow_names(&self.tree, named, renamed, &mut self.assigned)?;
        }
        if relabelled.is_empty() && Arc::ptr_eq(&before, &self.assigned.identities) {
            return Ok(BTreeMap::new());
        }
        let after = &self.assigned.identities;
        let gone = before.keys().filter(|id| !after.contains_key(*id)).map(|id| (*id, None));
        let changed = after.iter().filter(|(id, local)| {
            !before.contains_key(*id) || local.base.is_some_and(|base| relabelled.contains_key(&base))
        });
        let member = |local: &LocalIdentity| Member {
            base: local.base,
            labels: local.base.and_then(|base| input.identities.get(&base)).cloned(),
            prefixes: local.prefixes.clone(),
            names: local.names.clone(),
        };
        Ok(gone.chain(changed.map(|(id, local)| (*id, Some(member(local))))).collect())
    }

    fn treatment(&self, endpoint: &EndpointId) -> Treatment {
        Treatment {
            is_audit: self.audited.contains(endpoint),
            shown: self.shown.get(endpoint).copied().unwrap_or_default(),
        }
    }

    /// The names of DNS in the rules of each endpoint that has any.
    fn dns_rules(&self) -> BTreeMap<EndpointId, Arc<[DnsRule]>> {
        let rules = self.endpoints.iter().filter_map(|(endpoint, id)| {
            let key = (*id, self.treatment(endpoint));
            let rules = self.selections.dns_rules(self.selections.selected().get(&key)?);
            (!rules.is_empty()).then_some((*endpoint, rules))
        });
        rules.collect()
    }

    fn drop_unused(&mut self) {
        let selected = self.selections.selected().values();
        let used: BTreeSet<&Definition> =
            selected.filter_map(|selection| selection.definition.as_ref()).collect();
        self.values.retain(|definition, _| used.contains(definition));
    }

    fn add_missing(&mut self, identities: &Snapshot<IdentityId, Arc<IdentityLabels>>) -> Result<(), Error> {
        for ((id, treatment), selection) in self.selections.selected() {
            let Some(definition) = &selection.definition else { continue };
            let labels = if *id == IdentityId::HOST { Some(&self.host) } else { identities.get(id) };
            let Some(labels) = labels else { continue };
            if self.values.contains_key(definition) {
                continue;
            }
            let policy = self.next_policy;
            if policy >= PolicyId::CLOSED {
                return Err(Error::PoliciesExhausted);
            }
            self.next_policy = PolicyId(policy.0 + 1);
            let policies = self.selections.policies(selection);
            let value = Value::new(policy, &policies, labels, treatment, &mut self.peers);
            self.values.insert(definition.clone(), value);
        }
        Ok(())
    }

    fn output(&self) -> Output {
        let mut output = Output {
            policies: self.values.values().map(|value| (value.id, value.compiled.clone())).collect(),
            addresses: self.assigned.addresses.clone(),
            prefixes: self.assigned.prefixes.clone(),
            local_identities: self.assigned.identities.clone(),
            named_by: self.named.rules().clone(),
            ..Output::default()
        };
        for (endpoint, id) in &self.endpoints {
            let key = (*id, self.treatment(endpoint));
            let Some(selection) = self.selections.selected().get(&key) else { continue };
            let value = selection.definition.as_ref().and_then(|definition| self.values.get(definition));
            output.of_endpoint.insert(*endpoint, value.map_or(PolicyId::default(), |value| value.id));
            output.selected_by.insert(*endpoint, selection.policies.clone());
            if selection.isolating.iter().any(|isolating| !isolating.is_empty()) {
                output.isolated_by.insert(*endpoint, selection.isolating.clone());
            }
        }
        output
    }
}
