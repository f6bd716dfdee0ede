//! Pod CIDRs from pools, taints and conditions, and what is left of deleted Nodes.

use std::sync::Arc;

use anyhow::{Result, ensure};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::events::v1::Event;
use weir::kube::crd::{NodeEndpoints as NodeEndpointsObject, POD_CIDRS_ALLOCATED, WeirNodeStatus};
use weir::kube::{Publisher, Source, Tables};
use weir::model::NodeEndpoints;
use weir::operator::TAINT;

use super::*;

const POOLS: &str = "10.0.0.0/19=24,10.9.0.0/19=24,fd00::/48=64";
/// What both IPv4 pools have, less the part that the cluster gave away.
const ROOM: usize = 63;

#[test]
fn pod_cidrs_are_given_once() -> Result<()> {
    with_plane("pod_cidrs_are_given_once", async |plane| {
        plane.apply_base().await?;
        let client = plane.client().await?;
        // The cluster gave it a part of the pool.
        create_node(&client, "foreign", json!({"podCIDR": "10.0.3.0/24", "podCIDRs": ["10.0.3.0/24"]}))
            .await?;
        let arguments = ["--pod-cidr-pools", POOLS];
        let mut leaders = vec![Replica::start(&plane, "one", &arguments).await?];
        // The leader is killed again and again while nodes come.
        for number in 0..50 {
            create_node(&client, &format!("node-{number:02}"), json!({})).await?;
            if number % 20 == 15 {
                until("some pod CIDRs", || async {
                    Ok((given(&client).await?.len() > number / 2).then_some(()))
                })
                .await?;
                let next = Replica::start(&plane, &format!("after-{number}"), &arguments).await?;
                leaders.drain(..).try_for_each(Replica::kill)?;
                leaders.push(next);
            }
        }
        until("50 nodes with pod CIDRs", || async { Ok((given(&client).await?.len() == 50).then_some(())) })
            .await?;
        let all = given(&client).await?;
        ensure_once(&all)?;
        ensure!(all.iter().all(|(_, cidrs)| cidrs.len() == 2), "one of each family: {all:?}");
        ensure!(all.iter().all(|(_, cidrs)| cidrs[0] != "10.0.3.0/24"), "the cluster gave 10.0.3.0/24");
        exhausted(&client, &leaders[0]).await
    })
}

/// More nodes than the pools have room for.
async fn exhausted(client: &Client, leader: &Replica) -> Result<()> {
    for number in 50..66 {
        create_node(client, &format!("node-{number:02}"), json!({})).await?;
    }
    until("full pools", || async { Ok((given(client).await?.len() == ROOM).then_some(())) }).await?;
    until("the metric", || async {
        Ok((leader.metric("weir_operator_nodes_without_pod_cidrs").await? == 3.0).then_some(()))
    })
    .await?;
    ensure!(leader.metric("weir_operator_pool_used{pool=\"10.9.0.0/19\"}").await? == 32.0, "full");
    let weir_nodes: Api<WeirNode> = Api::all(client.clone());
    let without = async || -> Result<Vec<String>> {
        let all = weir_nodes.list(&Default::default()).await?.items;
        let is_told = |node: &WeirNode| {
            node.status.iter().flat_map(|status| &status.conditions).any(|condition| {
                condition.type_ == POD_CIDRS_ALLOCATED
                    && condition.status == "False"
                    && condition.message.contains("every pod CIDR of 10.0.0.0/19, 10.9.0.0/19 is in use")
            })
        };
        Ok(all.iter().filter(|node| is_told(node)).map(ResourceExt::name_any).collect())
    };
    let told =
        until("three conditions", || async { Ok(Some(without().await?).filter(|names| names.len() == 3)) })
            .await?;
    // Some rounds later there is still one event for each.
    sleep(Duration::from_secs(3)).await;
    let events: Api<Event> = Api::all(client.clone());
    let events = events.list(&Default::default()).await?.items;
    for name in &told {
        let of_node =
            |event: &&Event| event.regarding.as_ref().is_some_and(|of| of.name.as_ref() == Some(name));
        let of_node: Vec<&Event> = events.iter().filter(of_node).collect();
        ensure!(of_node.len() == 1 && of_node[0].series.is_none(), "{name} has events {of_node:?}");
        ensure!(of_node[0].reason.as_deref() == Some("PodCIDRsExhausted"), "{of_node:?}");
    }
    // What a deleted node had is given to one that waits.
    let nodes: Api<Node> = Api::all(client.clone());
    nodes.delete("node-07", &Default::default()).await?;
    until("a freed pod CIDR to be given", || async {
        let all = given(client).await?;
        ensure_once(&all)?;
        Ok((all.len() == ROOM && all.iter().all(|(name, _)| name != "node-07")).then_some(()))
    })
    .await?;
    let left =
        until("two conditions", || async { Ok(Some(without().await?).filter(|names| names.len() == 2)) })
            .await?;
    ensure!(left.iter().all(|name| told.contains(name)), "{left:?} of {told:?}");
    Ok(())
}

/// What an agent says of its node.
struct Agent(Publisher);

impl Agent {
    async fn start(plane: &ControlPlane, name: &str) -> Result<Self> {
        let client = client_of(&plane.as_account("weir-agent", name).await?).await?;
        Ok(Self(Publisher::new(&Source::Kubernetes(client, name.to_owned()), name, Arc::new(Tables::new()))?))
    }

    async fn say(&self, ready: bool) -> Result<()> {
        self.0
            .publish_node(&WeirNodeStatus { version: "1".to_owned(), ready, ..WeirNodeStatus::default() })
            .await
    }
}

async fn node(client: &Client, name: &str) -> Result<(Vec<String>, Option<(String, String)>)> {
    let nodes: Api<Node> = Api::all(client.clone());
    let node = nodes.get(name).await?;
    let taints =
        node.spec.and_then(|spec| spec.taints).into_iter().flatten().map(|taint| taint.key).collect();
    let conditions = node.status.and_then(|status| status.conditions).into_iter().flatten();
    let condition = conditions
        .filter(|condition| condition.type_ == "NetworkUnavailable")
        .map(|condition| (condition.status, condition.reason.unwrap_or_default()))
        .next();
    Ok((taints, condition))
}

async fn wait_for(client: &Client, name: &str, taints: &[&str], status: &str, reason: &str) -> Result<()> {
    let wanted = (taints.to_vec(), Some((status, reason)));
    until(&format!("{name} to be {wanted:?}"), || async {
        let (taints, condition) = node(client, name).await?;
        let is = (taints.iter().map(String::as_str).collect::<Vec<_>>(), condition);
        let is = (is.0, is.1.as_ref().map(|(status, reason)| (status.as_str(), reason.as_str())));
        Ok((is == wanted).then_some(()))
    })
    .await
}

#[test]
fn nodes_are_as_their_agents_are_and_leave_nothing() -> Result<()> {
    with_plane("nodes_are_as_their_agents_are_and_leave_nothing", async |plane| {
        plane.apply_base().await?;
        let client = plane.client().await?;
        let taints = json!({"taints": [
            {"key": TAINT, "effect": "NoSchedule"}, {"key": "theirs", "value": "x", "effect": "NoSchedule"}]});
        create_node(&client, "a", taints.clone()).await?;
        create_node(&client, "stranger", taints).await?;
        let operator = Replica::start(&plane, "one", &[]).await?;
        until("the definitions", || async {
            Ok(operator.log().contains("looking after nodes").then_some(()))
        })
        .await?;

        let agent = Agent::start(&plane, "a").await?;
        agent.beat_and_say(true).await?;
        wait_for(&client, "a", &["theirs"], "False", "WeirIsUp").await?;
        agent.beat_and_say(false).await?;
        wait_for(&client, "a", &["theirs", TAINT], "True", "WeirIsNotReady").await?;
        agent.beat_and_say(true).await?;
        wait_for(&client, "a", &["theirs"], "False", "WeirIsUp").await?;
        // It says nothing any more.
        wait_for(&client, "a", &["theirs", TAINT], "True", "WeirIsSilent").await?;
        ensure!(operator.metric("weir_operator_taints_set_total").await? == 2.0, "two were set");
        // A new leader has heard of nobody, and leaves a silent node as it is.
        operator.kill()?;
        let operator = Replica::start(&plane, "two", &[]).await?;
        until("the new leader", || async {
            Ok(operator.log().contains("looking after nodes").then_some(()))
        })
        .await?;
        sleep(Duration::from_secs(1)).await;
        ensure!(node(&client, "a").await?.0 == ["theirs", TAINT], "the new leader took the taint away");
        agent.0.beat().await?;
        wait_for(&client, "a", &["theirs"], "False", "WeirIsUp").await?;

        ensure!(node(&client, "stranger").await? == (vec![TAINT.to_owned(), "theirs".to_owned()], None));
        agent
            .0
            .publish_endpoints(&NodeEndpoints {
                node: "a".to_owned(),
                internal_addresses: vec![],
                endpoints: vec![],
            })
            .await?;
        let nodes: Api<Node> = Api::all(client.clone());
        nodes.delete("a", &Default::default()).await?;
        let weir_nodes: Api<WeirNode> = Api::all(client.clone());
        let endpoints: Api<NodeEndpointsObject> = Api::all(client.clone());
        let leases: Api<Lease> = Api::namespaced(client.clone(), "weir-system");
        until("the objects of a deleted node to go", || async {
            let is_gone = weir_nodes.get_opt("a").await?.is_none()
                && endpoints.get_opt("a-0").await?.is_none()
                && leases.get_opt("node-a").await?.is_none();
            Ok(is_gone.then_some(()))
        })
        .await
    })
}

impl Agent {
    async fn beat_and_say(&self, ready: bool) -> Result<()> {
        self.say(ready).await?;
        self.0.beat().await
    }
}
