//! The life of nodes: taint and condition as their agents are, and what is left of deleted ones.
//!
//! A node whose agent never spoke is left as it is: it may be none of Weir's. One that the operator
//! has not listened to for long enough keeps what it has.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, NodeCondition, Taint};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{Api, DeleteParams, Patch, Preconditions};
use kube::{Client, ResourceExt};
use serde_json::json;
use tokio::time::Instant;
use tracing::{info, warn};

use super::metrics::{Metrics, StateLabel};
use super::nodes::{Heartbeats, Life, View};
use super::{is_conflict, merge};
use crate::kube::crd::{NodeEndpoints, WeirNode};
use crate::kube::heartbeat_name;

/// Pods without a toleration of it do not start on a node while its agent is not ready.
pub const TAINT: &str = "node.weir.dev/agent-not-ready";
/// The condition of a Node that the network's plugin writes.
const NETWORK_UNAVAILABLE: &str = "NetworkUnavailable";

/// Keeps Nodes as their agents are.
pub struct Keeper {
    nodes: Api<Node>,
    weir_nodes: Api<WeirNode>,
    endpoints: Api<NodeEndpoints>,
    heartbeats: Api<Lease>,
    heard: Heartbeats,
    forget_after: Duration,
    gone: HashMap<Arc<str>, Instant>,
    metrics: Metrics,
}

/// How a node's agent is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Ready,
    NotReady,
    Silent,
}

impl Keeper {
    /// Begins to listen; `view` is what was there before.
    pub fn new(client: &Client, heard: Heartbeats, forget_after: Duration, metrics: Metrics) -> Self {
        Self {
            nodes: Api::all(client.clone()),
            weir_nodes: Api::all(client.clone()),
            endpoints: Api::all(client.clone()),
            heartbeats: Api::default_namespaced(client.clone()),
            heard,
            forget_after,
            gone: HashMap::new(),
            metrics,
        }
    }

    /// Writes taints and conditions that are not as they should be; returns the nodes
    /// that were forgotten.
    pub async fn round(&mut self, view: &View) -> Result<Vec<Arc<str>>> {
        let mut outcome = Ok(());
        let mut counts =
            [(State::Ready, "ready", 0), (State::NotReady, "not ready", 0), (State::Silent, "silent", 0)];
        for (name, node) in &view.nodes {
            let Some(state) = self.state(view, name) else { continue };
            counts.iter_mut().filter(|(of, _, _)| *of == state).for_each(|(_, _, count)| *count += 1);
            let written = async {
                self.taint(name, node, state).await?;
                self.set_condition(name, node, state).await
            };
            outcome = outcome.and(written.await.with_context(|| format!("node {name}")));
        }
        for (_, state, count) in counts {
            self.metrics.nodes.get_or_create(&StateLabel { state }).set(count);
        }
        let forgotten = self.forget_deleted(view).await;
        outcome.and(forgotten)
    }

    fn state(&mut self, view: &View, name: &Arc<str>) -> Option<State> {
        let life = self.heard.life(view, name);
        let status = view.weir_nodes.get(name)?.status.as_ref()?;
        // Only an agent has a version.
        if status.version.is_empty() {
            return None;
        }
        match (life, status.ready) {
            (Life::Silent, _) => Some(State::Silent),
            (_, false) => Some(State::NotReady),
            (Life::Alive, true) => Some(State::Ready),
            (Life::Unknown, true) => None,
        }
    }

    /// Only this taint, and only if nothing else of the Node has changed meanwhile.
    async fn taint(&self, name: &str, node: &Node, state: State) -> Result<()> {
        let mut taints = node.spec.as_ref().and_then(|spec| spec.taints.clone()).unwrap_or_default();
        let is_tainted = taints.iter().any(|taint| taint.key == TAINT);
        if is_tainted != (state == State::Ready) {
            return Ok(());
        }
        if is_tainted {
            taints.retain(|taint| taint.key != TAINT);
        } else {
            let effect = "NoSchedule".to_owned();
            taints.push(Taint { key: TAINT.to_owned(), effect, ..Taint::default() });
        }
        let patch = Patch::Merge(json!({
            "metadata": { "uid": node.uid(), "resourceVersion": node.resource_version() },
            "spec": { "taints": taints },
        }));
        match self.nodes.patch(name, &merge(), &patch).await {
            Ok(_) if is_tainted => {
                self.metrics.taints_removed.inc();
                info!(node = name, "the agent is ready: took the taint away");
                Ok(())
            }
            Ok(_) => {
                self.metrics.taints_set.inc();
                warn!(node = name, ?state, "the agent is not ready: tainted the node");
                Ok(())
            }
            Err(error) if is_conflict(&error) => Ok(()),
            Err(error) => Err(error).context("writing the taint"),
        }
    }

    async fn set_condition(&self, name: &str, node: &Node, state: State) -> Result<()> {
        let (status, reason, message) = match state {
            State::Ready => ("False", "WeirIsUp", "Weir's agent is ready"),
            State::NotReady => ("True", "WeirIsNotReady", "Weir's agent is not ready"),
            State::Silent => ("True", "WeirIsSilent", "Weir's agent has said nothing for too long"),
        };
        let conditions = node.status.as_ref().and_then(|status| status.conditions.as_ref());
        let there = conditions.into_iter().flatten().find(|there| there.type_ == NETWORK_UNAVAILABLE);
        if there.is_some_and(|there| there.status == status && there.reason.as_deref() == Some(reason)) {
            return Ok(());
        }
        let now = Time(jiff::Timestamp::now());
        let since =
            there.filter(|there| there.status == status).and_then(|there| there.last_transition_time.clone());
        let condition = NodeCondition {
            type_: NETWORK_UNAVAILABLE.to_owned(),
            status: status.to_owned(),
            reason: Some(reason.to_owned()),
            message: Some(message.to_owned()),
            last_heartbeat_time: Some(now.clone()),
            last_transition_time: Some(since.unwrap_or(now)),
        };
        let patch = Patch::Strategic(json!({ "status": { "conditions": [condition] } }));
        match self.nodes.patch_status(name, &merge(), &patch).await {
            Ok(_) => Ok(()),
            Err(error) if is_conflict(&error) => Ok(()),
            Err(error) => Err(error).context("writing the condition"),
        }
    }

    async fn forget_deleted(&mut self, view: &View) -> Result<Vec<Arc<str>>> {
        self.gone.retain(|name, _| !view.nodes.contains_key(name) && view.weir_nodes.contains_key(name));
        let mut forgotten = Vec::new();
        for (name, weir_node) in view.weir_nodes.iter().filter(|(name, _)| !view.nodes.contains_key(*name)) {
            let since = self.gone.entry(name.clone()).or_insert_with(Instant::now);
            if since.elapsed() < self.forget_after {
                continue;
            }
            if self.clean(name, weir_node).await.with_context(|| format!("cleaning up after {name}"))? {
                self.metrics.nodes_forgotten.inc();
                info!(node = %name, "the Node is gone: deleted its objects, its pod CIDRs are free");
                self.heard.forget(name);
                forgotten.push(name.clone());
            }
        }
        Ok(forgotten)
    }

    /// The WeirNode last: it is what the rest is found by. True when all is gone.
    async fn clean(&self, name: &str, weir_node: &WeirNode) -> Result<bool> {
        if self.nodes.get_metadata_opt(name).await?.is_some() {
            return Ok(false);
        }
        // They are numbered without a gap.
        for number in 0.. {
            let object = format!("{name}-{number}");
            match self.endpoints.delete(&object, &DeleteParams::default()).await {
                Ok(_) => {}
                Err(kube::Error::Api(status)) if status.code == 404 => break,
                Err(error) => return Err(error).with_context(|| format!("deleting NodeEndpoints {object}")),
            }
        }
        match self.heartbeats.delete(&heartbeat_name(name), &DeleteParams::default()).await {
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            deleted => drop(deleted.context("deleting the heartbeat")?),
        }
        let preconditions =
            Preconditions { uid: weir_node.uid(), resource_version: weir_node.resource_version() };
        match self.weir_nodes.delete(name, &DeleteParams::default().preconditions(preconditions)).await {
            Ok(_) => Ok(true),
            Err(error) if is_conflict(&error) => Ok(false),
            Err(error) => Err(error).context("deleting the WeirNode"),
        }
    }
}
