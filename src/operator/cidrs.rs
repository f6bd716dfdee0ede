//! Pod CIDRs for nodes that the cluster gives none, written into their WeirNodes.
//!
//! Nothing is given twice: what any Node or WeirNode has, or an agent says that it uses, counts as in
//! use, and so does everything that this leader has tried to write, whatever came of it. A new leader begins
//! with full lists. Should a write of the leader before it arrive after that, two nodes have one
//! CIDR for a moment: the one that has not begun to use it gets another.

use std::collections::HashMap;
use std::sync::Arc;

use anyhow::{Context, Result};
use ipnet::IpNet;
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::api::{Api, Patch, PatchParams, PostParams};
use kube::runtime::events::Recorder;
use kube::{Client, Resource, ResourceExt};
use serde_json::json;
use tracing::{error, info, warn};

use super::events::warning;
use super::metrics::Metrics;
use super::nodes::View;
use super::pools::{Pool, Pools};
use super::{FIELD_MANAGER, is_conflict, merge, recorder};
use crate::kube::crd::{POD_CIDRS_ALLOCATED, WeirNode, WeirNodeSpec};

/// Gives pod CIDRs to nodes.
pub struct Cidrs {
    weir_nodes: Api<WeirNode>,
    recorder: Recorder,
    pools: Pools,
    /// What this leader wrote, or tried to.
    given: HashMap<Arc<str>, Vec<IpNet>>,
    /// What it said of a node that could not be helped.
    said: HashMap<Arc<str>, String>,
    metrics: Metrics,
}

impl Cidrs {
    /// Has given nothing yet.
    pub fn new(client: &Client, name: &str, pools: &[Pool], metrics: Metrics) -> Self {
        Self {
            weir_nodes: Api::all(client.clone()),
            recorder: recorder(client, name),
            pools: Pools::new(pools),
            given: HashMap::new(),
            said: HashMap::new(),
            metrics,
        }
    }

    /// Gives every node of `view` what it lacks.
    pub async fn round(&mut self, view: &View) -> Result<()> {
        self.learn(view);
        let mut outcome = Ok(());
        let mut without = 0;
        for name in view.nodes.keys() {
            let settled = self.settle(view, name).await;
            without += i64::from(matches!(settled, Ok(false)));
            outcome = outcome.and(settled.map(drop).with_context(|| format!("pod CIDRs of {name}")));
        }
        self.metrics.nodes_without_pod_cidrs.set(without);
        for (pool, used) in self.pools.usage() {
            self.metrics.pool_capacity.get_or_create(&(&pool).into()).set(pool.capacity());
            self.metrics.pool_used.get_or_create(&(&pool).into()).set(used);
        }
        outcome
    }

    /// A node is gone, and its WeirNode with it.
    pub fn forget(&mut self, name: &str) {
        self.given.remove(name);
        self.said.remove(name);
    }

    fn learn(&mut self, view: &View) {
        let mut names = view.names();
        names.extend(self.given.keys().cloned());
        let gone: Vec<_> = self.pools.owners().filter(|name| !names.contains(*name)).cloned().collect();
        gone.iter().for_each(|name| self.pools.release(name));
        for name in &names {
            let mut has = view.own_cidrs(name);
            has.extend(view.given_cidrs(name));
            has.extend(view.cidrs_in_use(name));
            has.extend(self.given.get(name).into_iter().flatten());
            self.pools.occupy(name, has);
        }
    }

    /// True if the node has pod CIDRs, or will have them when its WeirNode is seen again.
    async fn settle(&mut self, view: &View, name: &Arc<str>) -> Result<bool> {
        let there = view.weir_nodes.get(name);
        let in_use = view.cidrs_in_use(name);
        if !view.own_cidrs(name).is_empty() {
            // Given in the moment before the cluster did.
            if let Some(there) = there
                && !there.spec.pod_cidrs.is_empty()
                && in_use.is_empty()
            {
                self.write(Some(there), name, &[]).await?;
                self.given.remove(name);
            }
            return Ok(true);
        }
        let mut given = view.given_cidrs(name);
        if let Some((cidr, rival)) = self.pools.rival(name)
            && !given.is_empty()
        {
            match yields(view, name, &rival) {
                Some(true) => {
                    warn!(node = %name, %cidr, %rival, "a pod CIDR was given twice: this node gets another");
                    self.write(there, name, &[]).await?;
                    self.given.remove(name);
                    return Ok(false);
                }
                Some(false) => {}
                None => {
                    let text = format!("{cidr} is in use by {rival}, too: delete one of the two nodes");
                    return self.say(view, name, "PodCIDRConflict", &text).await.map(|()| true);
                }
            }
        }
        if !given.is_empty() {
            return self.unsay(view, name).await.map(|()| true);
        }
        if let Some(written) = self.given.get(name) {
            given.clone_from(written);
        } else if !in_use.is_empty() && self.pools.rival(name).is_none() {
            // Somebody deleted the WeirNode under its agent.
            given = in_use;
        } else {
            match self.pools.allocate(name) {
                Ok(new) => given = new,
                Err(why) => {
                    return self.say(view, name, "PodCIDRsExhausted", &why.to_string()).await.map(|()| false);
                }
            }
        }
        self.given.insert(name.clone(), given.clone());
        self.write(there, name, &given).await?;
        self.unsay(view, name).await.map(|()| true)
    }

    /// Writes over exactly the WeirNode that was seen; if it has changed, the next round looks again.
    async fn write(&self, there: Option<&Arc<WeirNode>>, name: &str, cidrs: &[IpNet]) -> Result<()> {
        let pod_cidrs: Vec<String> = cidrs.iter().map(ToString::to_string).collect();
        let written = match there {
            None => {
                let node = WeirNode::new(name, WeirNodeSpec { pod_cidrs: pod_cidrs.clone() });
                self.weir_nodes.create(&post(), &node).await
            }
            Some(there) => {
                let patch = Patch::Merge(json!({
                    "metadata": { "uid": there.uid(), "resourceVersion": there.resource_version() },
                    "spec": { "podCIDRs": pod_cidrs },
                }));
                self.weir_nodes.patch(name, &merge(), &patch).await
            }
        };
        match written {
            Ok(_) => {
                info!(node = name, pod_cidrs = pod_cidrs.join(","), "gave pod CIDRs");
                Ok(())
            }
            Err(error) if is_conflict(&error) => Ok(()),
            Err(error) => Err(error).context("writing the WeirNode"),
        }
    }

    /// Says on the WeirNode, and once in an event on the Node, why the node gets nothing.
    async fn say(&mut self, view: &View, name: &Arc<str>, reason: &str, text: &str) -> Result<()> {
        let there = condition(view, name);
        let is_there = there.is_some_and(|there| there.status == "False" && there.message == text);
        if is_there || self.said.get(name).is_some_and(|said| said == text) {
            return Ok(());
        }
        if !view.weir_nodes.contains_key(name) {
            let node = WeirNode::new(name, WeirNodeSpec::default());
            match self.weir_nodes.create(&post(), &node).await {
                Err(error) if !is_conflict(&error) => return Err(error).context("making the WeirNode"),
                _ => {}
            }
        }
        error!(node = %name, reason, "{text}");
        self.apply_condition(name, "False", reason, text).await?;
        self.said.insert(name.clone(), text.to_owned());
        let uid = view.nodes.get(name).and_then(|node| node.uid());
        let regarding = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Node".to_owned()),
            name: Some(name.to_string()),
            uid,
            ..ObjectReference::default()
        };
        let event = warning(reason, "AllocatePodCIDRs", text);
        self.recorder.publish(&event, &regarding).await.context("publishing an event")
    }

    /// What was said is no longer so.
    async fn unsay(&mut self, view: &View, name: &Arc<str>) -> Result<()> {
        let is_there = condition(view, name).is_some_and(|there| there.status == "False");
        if self.said.remove(name).is_none() && !is_there {
            return Ok(());
        }
        self.apply_condition(name, "True", "Allocated", "").await
    }

    async fn apply_condition(&self, name: &str, status: &str, reason: &str, message: &str) -> Result<()> {
        let condition = Condition {
            type_: POD_CIDRS_ALLOCATED.to_owned(),
            status: status.to_owned(),
            reason: reason.to_owned(),
            message: message.to_owned(),
            last_transition_time: Time(jiff::Timestamp::now()),
            observed_generation: None,
        };
        let object = json!({
            "apiVersion": WeirNode::api_version(&()),
            "kind": WeirNode::kind(&()),
            "metadata": { "name": name },
            "status": { "conditions": [condition] },
        });
        let parameters = PatchParams::apply(FIELD_MANAGER).force();
        let applied = self.weir_nodes.patch_status(name, &parameters, &Patch::Apply(&object)).await;
        applied.map(drop).context("writing a condition of the WeirNode")
    }
}

/// Of two nodes with one CIDR the one that does not use it yields; of two that do not, the second by
/// name. `None`: both use it.
fn yields(view: &View, name: &str, rival: &str) -> Option<bool> {
    let uses = |name: &str| !view.cidrs_in_use(name).is_empty() || !view.own_cidrs(name).is_empty();
    match (uses(name), uses(rival)) {
        (true, true) => None,
        (true, false) => Some(false),
        (false, true) => Some(true),
        (false, false) => Some(name > rival),
    }
}

fn condition<'a>(view: &'a View, name: &str) -> Option<&'a Condition> {
    let status = view.weir_nodes.get(name)?.status.as_ref()?;
    status.conditions.iter().find(|condition| condition.type_ == POD_CIDRS_ALLOCATED)
}

fn post() -> PostParams {
    PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() }
}
