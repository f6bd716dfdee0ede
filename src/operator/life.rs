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
use kube::runtime::events::Recorder;
use kube::{Client, Resource, ResourceExt};
use serde_json::json;
use tokio::time::Instant;
use tracing::{info, warn};

use super::events::warning;
use super::metrics::{Metrics, StateLabel};
use super::nodes::{Heartbeats, Life, View};
use super::{is_conflict, merge};
use crate::kube::crd::{NodeEndpoints, WeirNode};
use crate::kube::{announcer_name, heartbeat_name};

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
    recorder: Recorder,
    heard: Heartbeats,
    forget_after: Duration,
    gone: HashMap<Arc<str>, Instant>,
    is_braking: bool,
    metrics: Metrics,
}

fn is_tainted(node: &Node) -> bool {
    let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
    taints.into_iter().any(|taint| taint.key == TAINT)
}

/// The network of the node was said to work.
fn was_ready(node: &Node) -> bool {
    let conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let network = conditions.into_iter().find(|condition| condition.type_ == NETWORK_UNAVAILABLE);
    network.is_some_and(|condition| condition.status == "False")
}

/// Whether tainting stops: of `nodes`, `tainted` have the taint and `unwell` would get it, which is more
/// than a third. One node may always be tainted.
fn brakes(nodes: usize, tainted: usize, unwell: usize) -> bool {
    unwell > 0 && tainted + unwell > (nodes / 3).max(1)
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
    pub fn new(
        client: &Client,
        recorder: Recorder,
        heard: Heartbeats,
        forget_after: Duration,
        metrics: Metrics,
    ) -> Self {
        Self {
            nodes: Api::all(client.clone()),
            weir_nodes: Api::all(client.clone()),
            endpoints: Api::all(client.clone()),
            heartbeats: Api::default_namespaced(client.clone()),
            recorder,
            heard,
            forget_after,
            gone: HashMap::new(),
            is_braking: false,
            metrics,
        }
    }

    /// Writes taints and conditions that are not as they should be; returns the nodes
    /// that were forgotten.
    pub async fn round(&mut self, view: &View) -> Result<Vec<Arc<str>>> {
        let mut outcome = Ok(());
        let mut counts =
            [(State::Ready, "ready", 0), (State::NotReady, "not ready", 0), (State::Silent, "silent", 0)];
        let nodes: Vec<_> = view
            .nodes
            .iter()
            .filter_map(|(name, node)| Some((name, node, self.state(view, name)?)))
            .collect();
        let unwell = nodes.iter().filter(|(_, _, state)| *state != State::Ready);
        let (tainted, well): (Vec<_>, Vec<_>) = unwell.partition(|(_, node, _)| is_tainted(node));
        let was_well = well.iter().filter(|(_, node, _)| was_ready(node)).count();
        let brakes = brakes(view.nodes.len(), tainted.len(), was_well);
        self.say_whether_it_brakes(brakes, tainted.len() + was_well, view.nodes.len());
        for (name, node, state) in nodes {
            counts.iter_mut().filter(|(of, _, _)| *of == state).for_each(|(_, _, count)| *count += 1);
            if brakes && state != State::Ready && !is_tainted(node) && was_ready(node) {
                continue;
            }
            let written = async {
                let message = view.message(name);
                self.taint(name, node, state, &message).await?;
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

    /// Once, when it begins and when it ends.
    fn say_whether_it_brakes(&mut self, brakes: bool, unwell: usize, nodes: usize) {
        if std::mem::replace(&mut self.is_braking, brakes) == brakes {
            return;
        }
        self.metrics.taint_brake.set(brakes.into());
        match brakes {
            true => warn!(
                unwell,
                nodes,
                "more than a third of all nodes would be tainted: tainting no further one, because the cause is \
                 rather a common one, as an API server that loses heartbeats"
            ),
            false => info!(unwell, nodes, "nodes are tainted again as their agents are"),
        }
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
    async fn taint(&self, name: &str, node: &Node, state: State, message: &str) -> Result<()> {
        let mut taints = node.spec.as_ref().and_then(|spec| spec.taints.clone()).unwrap_or_default();
        let is_tainted = is_tainted(node);
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
                warn!(node = name, ?state, message, "the agent is not ready: tainted the node");
                self.say(name, node, state, message).await;
                Ok(())
            }
            Err(error) if is_conflict(&error) => Ok(()),
            Err(error) => Err(error).context("writing the taint"),
        }
    }

    /// An event on the Node: who looks at the node reads why.
    async fn say(&self, name: &str, node: &Node, state: State, message: &str) {
        let note = match state {
            State::Silent => "Weir's agent has said nothing for too long".to_owned(),
            _ => format!("Weir's agent is not ready: {message}"),
        };
        let event = warning("WeirIsNotReady", "Taint", &note);
        if let Err(error) = self.recorder.publish(&event, &node.object_ref(&())).await {
            self.metrics.errors.inc();
            warn!(node = name, %error, "publishing an event");
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
            // What a living agent has is in use: its node may register again.
            if since.elapsed() < self.forget_after || self.heard.life(view, name) != Life::Silent {
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

    /// The heartbeat first: one that came meanwhile is another version, and then nothing is deleted. The
    /// WeirNode last: it is what the rest is found by. True when all is gone.
    async fn clean(&self, name: &str, weir_node: &WeirNode) -> Result<bool> {
        if self.nodes.get_metadata_opt(name).await?.is_some() {
            return Ok(false);
        }
        let heard = self.heard.version(name);
        if heard.is_some() {
            let preconditions = Preconditions { uid: None, resource_version: heard };
            let parameters = DeleteParams::default().preconditions(preconditions);
            match self.heartbeats.delete(&heartbeat_name(name), &parameters).await {
                Ok(_) => {}
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                Err(error) if is_conflict(&error) => return Ok(false),
                Err(error) => return Err(error).context("deleting the heartbeat"),
            }
        }
        match self.heartbeats.delete(&announcer_name(name), &DeleteParams::default()).await {
            Ok(_) => {}
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => return Err(error).context("deleting the Lease by which it announced"),
        }
        // They are numbered without a gap.
        for number in 0.. {
            let object = format!("{name}-{number}");
            let Some(there) = self.endpoints.get_metadata_opt(&object).await? else { break };
            let preconditions =
                Preconditions { uid: there.uid(), resource_version: there.resource_version() };
            let parameters = DeleteParams::default().preconditions(preconditions);
            match self.endpoints.delete(&object, &parameters).await {
                Ok(_) => {}
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                Err(error) if is_conflict(&error) => return Ok(false),
                Err(error) => return Err(error).with_context(|| format!("deleting NodeEndpoints {object}")),
            }
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

#[cfg(test)]
mod tests {
    use super::brakes;

    #[test]
    fn a13_no_more_than_a_third_of_all_nodes_is_tainted_and_one_always_may_be() {
        for (nodes, tainted, unwell, expected) in [
            (1, 0, 1, false),
            (2, 0, 1, false),
            (2, 0, 2, true),
            (3, 1, 1, true),
            (9, 0, 3, false),
            (9, 2, 1, false),
            (9, 2, 2, true),
            (1000, 333, 0, false),
            (1000, 333, 1, true),
        ] {
            assert_eq!(brakes(nodes, tainted, unwell), expected, "{nodes} {tainted} {unwell}");
        }
    }
}
