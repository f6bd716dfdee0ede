//! This node for the operator and for people: its WeirNode, and a Lease as its heartbeat.
//!
//! What is said of the node is written when it changes. That the agent lives is said every
//! few seconds, in a Lease that only the operator watches: in the WeirNode, which every agent
//! watches, the heartbeats of 1,000 nodes would be 1,000 messages each to 1,000 agents. Kubelets
//! do the same for the same reason.

use anyhow::{Context, Result};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{Api, Patch, PatchParams};
use serde_json::json;

use super::{FIELD_MANAGER, Publisher, Target, to_yaml};
use crate::kube::crd::{WeirNode, WeirNodeSpec, WeirNodeStatus};

/// The name of the Lease that is the heartbeat of `node`'s agent.
pub fn heartbeat_name(node: &str) -> String {
    format!("node-{node}")
}

impl Publisher {
    /// True where somebody reads what is said of this node: not from a directory of manifests.
    pub fn has_operator(&self) -> bool {
        matches!(self.target, Target::Kubernetes { .. })
    }

    /// Says how this node is; makes its WeirNode when there is none.
    pub async fn publish_node(&self, status: &WeirNodeStatus) -> Result<()> {
        let nodes = match &self.target {
            Target::Kubernetes { nodes, .. } => nodes,
            Target::Manifests(files) => {
                // The key is what the others need; for the rest there is nobody to read it.
                let Some(encryption) = &status.encryption else { return Ok(()) };
                let object = json!({
                    "apiVersion": "weir.dev/v1alpha1",
                    "kind": "WeirNode",
                    "metadata": { "name": self.node },
                    "status": { "encryption": encryption },
                });
                let (files, text) = (files.clone(), to_yaml([object])?);
                return tokio::task::spawn_blocking(move || files.publish_node(&text)).await?;
            }
        };
        match self.apply_status(nodes, status).await {
            Err(kube::Error::Api(answer)) if answer.code == 404 => {}
            applied => return applied.map(drop).context("applying the status of this node's WeirNode"),
        }
        let node = WeirNode::new(&self.node, WeirNodeSpec::default());
        nodes
            .patch(&self.node, &PatchParams::apply(FIELD_MANAGER), &Patch::Apply(&node))
            .await
            .context("making this node's WeirNode")?;
        let applied = self.apply_status(nodes, status).await;
        applied.map(drop).context("applying the status of this node's WeirNode")
    }

    async fn apply_status(
        &self,
        nodes: &Api<WeirNode>,
        status: &WeirNodeStatus,
    ) -> Result<WeirNode, kube::Error> {
        let object = json!({
            "apiVersion": "weir.dev/v1alpha1",
            "kind": "WeirNode",
            "metadata": { "name": self.node },
            "status": status,
        });
        nodes
            .patch_status(&self.node, &PatchParams::apply(FIELD_MANAGER).force(), &Patch::Apply(&object))
            .await
    }

    /// The operator or somebody else took this node's WeirNode away.
    pub fn is_node_missing(&self) -> bool {
        self.tables.allocations.is_synced()
            && self.tables.allocations.get(&self.node.as_str().into()).is_none()
    }

    /// Says that this node's agent lives.
    pub async fn beat(&self) -> Result<()> {
        let Target::Kubernetes { heartbeats, .. } = &self.target else { return Ok(()) };
        let name = heartbeat_name(&self.node);
        let lease: Lease = serde_json::from_value(json!({
            "metadata": { "name": name },
            "spec": { "holderIdentity": self.node, "renewTime": MicroTime(jiff::Timestamp::now()) },
        }))
        .context("writing the heartbeat")?;
        heartbeats
            .patch(&name, &PatchParams::apply(FIELD_MANAGER).force(), &Patch::Apply(&lease))
            .await
            .context("sending the heartbeat")?;
        Ok(())
    }
}
