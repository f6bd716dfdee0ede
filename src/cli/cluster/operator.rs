//! How the operator is, and what it says of nodes.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::coordination::v1::Lease;
use kube::ResourceExt;
use kube::api::{Api, ListParams};
use serde::Serialize;

use super::{Cluster, explained};
use crate::kube::crd::WeirNode;

/// The Deployment, and the Lease of its leader.
const OPERATOR: &str = "weir-operator";

/// The operator as `-o json` shows it.
#[derive(Debug, Default, Serialize)]
pub(super) struct OperatorStatus {
    /// Replicas that are ready.
    pub ready: i32,
    /// Replicas that there should be.
    pub wanted: i32,
    /// Who leads; none: nobody has renewed the Lease in time.
    pub leader: Option<String>,
    /// What a person should look at.
    pub problems: Vec<String>,
}

impl OperatorStatus {
    /// One sentence.
    pub fn line(&self) -> String {
        let leader = self.leader.as_deref().map_or("nobody leads".to_owned(), |name| format!("{name} leads"));
        format!("operator: {} of {} ready, {leader}", self.ready, self.wanted)
    }
}

/// Asks for the operator's Deployment and its Lease. Pods need no operator, so nothing of it is an error.
pub(super) async fn ask(cluster: &Cluster) -> OperatorStatus {
    let mut operator = OperatorStatus::default();
    let deployments: Api<Deployment> = Api::namespaced(cluster.client.clone(), &cluster.namespace);
    match deployments.get_opt(OPERATOR).await {
        Ok(Some(deployment)) => {
            operator.wanted = deployment.spec.and_then(|spec| spec.replicas).unwrap_or(1);
            operator.ready = deployment.status.and_then(|status| status.ready_replicas).unwrap_or(0);
        }
        Ok(None) => {
            operator.problems.push("there is none: no pod CIDRs from pools, no identity goes".to_owned())
        }
        Err(error) => operator.problems.push(format!("reading its Deployment: {:#}", explained(error))),
    }
    let leases: Api<Lease> = Api::namespaced(cluster.client.clone(), &cluster.namespace);
    match leases.get_opt(OPERATOR).await {
        Ok(lease) => operator.leader = lease.as_ref().and_then(|lease| leader(lease, jiff::Timestamp::now())),
        Err(error) => operator.problems.push(format!("reading its Lease: {:#}", explained(error))),
    }
    if operator.wanted > 0 && operator.ready < operator.wanted {
        operator.problems.push(format!(
            "{} of {} replicas are not ready",
            operator.wanted - operator.ready,
            operator.wanted
        ));
    }
    if operator.wanted > 0 && operator.leader.is_none() {
        operator.problems.push("nobody leads: nodes that come wait for what it gives them".to_owned());
    }
    operator
}

/// Who holds a Lease that has not run out.
fn leader(lease: &Lease, now: jiff::Timestamp) -> Option<String> {
    let spec = lease.spec.as_ref()?;
    let holder = spec.holder_identity.as_ref().filter(|holder| !holder.is_empty())?;
    let seconds = i64::from(spec.lease_duration_seconds?);
    let renewed = spec.renew_time.as_ref()?.0;
    (now.as_second() - renewed.as_second() <= seconds).then(|| holder.clone())
}

/// What the operator says is wrong with nodes, by name.
pub(super) async fn complaints(cluster: &Cluster) -> Result<BTreeMap<String, Vec<String>>> {
    let nodes: Api<WeirNode> = Api::all(cluster.client.clone());
    let nodes =
        nodes.list(&ListParams::default()).await.map_err(explained).context("listing the WeirNodes")?;
    let of_node = |node: &WeirNode| {
        let conditions = node.status.iter().flat_map(|status| &status.conditions);
        let wrong = conditions.filter(|condition| condition.status == "False");
        wrong.map(|condition| format!("{}: {}", condition.reason, condition.message)).collect::<Vec<_>>()
    };
    let all = nodes.iter().map(|node| (node.name_any(), of_node(node)));
    Ok(all.filter(|(_, complaints)| !complaints.is_empty()).collect())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_lease_that_has_run_out_has_no_leader() {
        let lease = |holder: &str| -> Lease {
            let spec = json!({
                "holderIdentity": holder, "leaseDurationSeconds": 15, "renewTime": "2026-01-01T00:00:00.000000Z",
            });
            serde_json::from_value(json!({"metadata": {}, "spec": spec})).expect("a Lease")
        };
        let at = |text: &str| text.parse::<jiff::Timestamp>().expect("a time");
        assert_eq!(leader(&lease("one"), at("2026-01-01T00:00:15Z")).as_deref(), Some("one"));
        assert_eq!(leader(&lease("one"), at("2026-01-01T00:00:16Z")), None);
        assert_eq!(leader(&lease(""), at("2026-01-01T00:00:01Z")), None);
    }
}
