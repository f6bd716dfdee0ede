//! What is known of policies, and of the names that their rules mean.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::Known;
use crate::agent::ends::Ends;
use crate::agent::policy_diff;
use crate::api::answers::{NameAddress, NameRow, PolicyRow};
use crate::kube::foreign::ForeignPolicy;
use crate::model::{EndpointId, Peer, Policy, PolicyDirection, PolicyRef};
use crate::policy;
use crate::policy::diff::Change;
use crate::policy::explain::{Explanation, Packet, Question};
use crate::tables::Snapshot;

impl Known {
    pub(super) fn policy_rows(&self) -> Vec<PolicyRow> {
        let current = self.current.load();
        let selects = |policy: &PolicyRef| {
            let selected = current.selected_by.iter().filter(|(_, policies)| policies.contains(policy));
            selected.map(|(endpoint, _)| *endpoint).collect()
        };
        let rules = |direction: &Option<PolicyDirection>| direction.as_ref().map(|it| it.rules.len());
        let row = |policy: &Policy| PolicyRow {
            policy: policy.reference.clone(),
            tier: format!("{:?}", policy.tier),
            ingress_rules: rules(&policy.ingress),
            egress_rules: rules(&policy.egress),
            layer7: layer7_of(policy),
            endpoints: selects(&policy.reference),
            doubts: policy.doubts.clone(),
        };
        let sources = self.tables.policy_sources();
        sources.all().map(row).collect()
    }

    pub(super) fn foreign_policies(&self) -> Vec<ForeignPolicy> {
        let found = self.tables.foreign.snapshot();
        found.values().flat_map(|policies| policies.iter().cloned()).collect()
    }

    pub(super) fn explain(&self, from: &str, to: &str, packet: Packet) -> Result<Explanation, String> {
        let policies =
            policy::Resolver::default().update(self.tables.policy_sources(), self.tables.policy_references());
        let filter = &self.config.args.rules.identity_labels;
        let asked = policy::asked_labels(&policies, filter);
        let endpoints = self.endpoints.snapshot();
        let local = endpoints.values().map(|it| (it.pod.clone(), it.addresses().collect())).collect();
        let node = self.config.args.node_name.as_str();
        let named = self.current.load().named_addresses();
        let ends = Ends { tables: &self.tables, filter, asked: &asked, local, named, node };
        let (from, to) = (ends.find(from)?, ends.find(to)?);
        Ok(Question { policies: &policies, filter, from: &from, to: &to, packet }.answer())
    }

    pub(super) fn policy_diff(&self, manifests: &str) -> Result<Vec<Change>, String> {
        let current = self.current.load();
        let pods = current.endpoints.iter().filter(|(id, _)| **id != EndpointId::HOST);
        let endpoints = pods.map(|(id, entry)| (*id, entry.identity)).collect();
        let identities = self.tables.identities.snapshot();
        let addresses = Snapshot::new();
        let pods =
            policy_diff::Pods { identities: &identities, endpoints: &endpoints, addresses: &addresses };
        let filter = Arc::new(self.config.args.rules.identity_labels.clone());
        policy_diff::of_endpoints(&self.tables, manifests, &pods, &filter)
    }

    /// What pods were told, by pod and name.
    pub(super) fn name_rows(&self) -> Vec<NameRow> {
        let (current, endpoints) = (self.current.load(), self.endpoints.snapshot());
        let sources = self.tables.policy_sources();
        let policies: Vec<&Policy> =
            sources.all().flat_map(|policy| std::iter::once(policy).chain(&policy.others)).collect();
        let mut rows: Vec<NameRow> = Vec::new();
        for line in self.learned.lines() {
            let address = NameAddress { address: line.address, seconds_left: line.seconds_left };
            if let Some(row) = rows.last_mut()
                && row.endpoint == line.endpoint
                && *row.name == *line.name
            {
                row.addresses.push(address);
                continue;
            }
            let selecting = current.selected_by.get(&line.endpoint);
            let is_selecting = |policy: &PolicyRef| selecting.is_some_and(|all| all.contains(policy));
            let naming =
                policies.iter().filter(|it| is_selecting(&it.reference) && names_by_dns(it, &line.name));
            rows.push(NameRow {
                endpoint: line.endpoint,
                pod: endpoints.get(&line.endpoint).map(|endpoint| endpoint.pod.clone()),
                name: line.name.to_string(),
                policies: naming.map(|policy| policy.reference.clone()).collect(),
                addresses: vec![address],
            });
        }
        rows
    }
}

/// What of a policy goes beyond addresses and ports.
fn layer7_of(policy: &Policy) -> Vec<String> {
    let mut said = BTreeSet::new();
    for policy in std::iter::once(policy).chain(&policy.others) {
        let directions = policy.ingress.iter().chain(&policy.egress);
        for rule in directions.flat_map(|direction| &direction.rules) {
            said.extend(rule.l7.as_ref().map(|rules| rules.protocol().to_owned()));
            if rule.peers.iter().flatten().any(|peer| matches!(peer, Peer::Name(_))) {
                said.insert("names".to_owned());
            }
        }
    }
    said.into_iter().collect()
}

/// True if a rule of the policy means a name of DNS.
fn names_by_dns(policy: &Policy, name: &str) -> bool {
    let rules = policy.egress.iter().flat_map(|direction| &direction.rules);
    let mut peers = rules.flat_map(|rule| rule.peers.iter().flatten());
    peers.any(|peer| matches!(peer, Peer::Name(rule) if rule.pattern().matches_text(name)))
}
