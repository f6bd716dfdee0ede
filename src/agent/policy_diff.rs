//! What the policies of a file would change, for this node's pods or for those of a directory.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::identity::{self, LabelFilter};
use crate::kube::{Tables, read_policies};
use crate::model::{BaseAddress, EndpointId, IdentityId, IdentityLabels};
use crate::policy::diff::{Change, differences};
use crate::policy::{Heard, Input, Resolver, asked_labels};
use crate::tables::Snapshot;

/// Whom a comparison is about.
pub struct Pods<'a> {
    /// Every identity that is known.
    pub identities: &'a Snapshot<IdentityId, Arc<IdentityLabels>>,
    /// The pods whose policies are compared.
    pub endpoints: &'a BTreeMap<EndpointId, IdentityId>,
    /// Who has which address.
    pub addresses: &'a Snapshot<IpAddr, BaseAddress>,
}

/// What the policies in `manifests`, beside and instead of those of `tables`, would change for `pods`.
pub fn of_endpoints(
    tables: &Tables,
    manifests: &str,
    pods: &Pods<'_>,
    filter: &Arc<LabelFilter>,
) -> Result<Vec<Change>, String> {
    let given = read_policies(manifests)?;
    let before = Resolver::default().update(tables.policy_sources(), tables.policy_references());
    let after = Resolver::default().update(tables.policy_sources().with(given), tables.policy_references());
    let nodes = tables.nodes.snapshot();
    let pod_cidrs: Vec<IpNet> = nodes.values().flat_map(|node| node.pod_cidrs.clone()).collect();
    let input = Input {
        policies: &before,
        identities: pods.identities,
        endpoints: pods.endpoints,
        audited: &BTreeSet::new(),
        shown: &BTreeMap::new(),
        host: &Arc::default(),
        addresses: pods.addresses,
        pod_cidrs: &pod_cidrs,
        heard: &Heard::new(),
    };
    let name = |id: IdentityId| match id {
        IdentityId::WORLD => "world".to_owned(),
        IdentityId::HOST => "host".to_owned(),
        IdentityId::REMOTE_NODE => "remote-node".to_owned(),
        id => pods.identities.get(&id).map_or_else(|| format!("identity {id}"), |labels| said(labels)),
    };
    differences(&before, &after, &input, filter, name).map_err(|error| error.to_string())
}

/// The same for every pod of a directory.
pub fn of_pods(tables: &Tables, manifests: &str) -> Result<Vec<Change>, String> {
    let filter = Arc::new(LabelFilter::default());
    let policies = Resolver::default().update(tables.policy_sources(), tables.policy_references());
    let asked: BTreeSet<String> = asked_labels(&policies, &filter);
    let mut identities: Snapshot<IdentityId, Arc<IdentityLabels>> = Snapshot::new();
    let mut endpoints = BTreeMap::new();
    let pods = tables.pods.snapshot();
    for pod in pods.values().filter(|pod| !pod.host_network && !pod.is_terminal) {
        let namespace = tables.namespaces.get(&pod.key.namespace);
        let labels = filter.labels_of(pod, namespace.as_deref(), &asked);
        let id = identity::number(&labels, 0);
        identities.insert(id, Arc::new(labels));
        // One pod of each identity is enough.
        if let Ok(number) = u16::try_from(endpoints.len() + 1) {
            endpoints.insert(EndpointId(number), id);
        }
    }
    let pods = Pods { identities: &identities, endpoints: &endpoints, addresses: &Snapshot::new() };
    of_endpoints(tables, manifests, &pods, &filter)
}

fn said(labels: &IdentityLabels) -> String {
    let pairs: Vec<String> = labels.pod_labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    format!("{}/{}", labels.namespace, pairs.join(","))
}
