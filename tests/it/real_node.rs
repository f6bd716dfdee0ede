//! A node's agent against a real API server: what happens to the Node and to the node's own objects.

use anyhow::{Result, ensure};
use k8s_openapi::api::core::v1::Node as NodeObject;
use kube::api::{Api, DeleteParams, ListParams};
use serde_json::json;
use weir::kube::crd::{NodeEndpoints, WeirNode};

use crate::lab::{METRICS, Node, Plugin, wait_for};
use crate::require::require_lab;
use crate::sinks::{many_ports, repairs};
use crate::world::{World, node_object};

/// A world of one node, unless the machine has no API server.
fn world(test: &str) -> Result<Option<World>> {
    if crate::control_plane::find("kube-apiserver").is_none() || crate::control_plane::find("etcd").is_none()
    {
        crate::control_plane::start(test)?;
        return Ok(None);
    }
    let world = World::start(test, 1)?;
    world.namespace("shop")?;
    Ok(Some(world))
}

/// The addresses that the node's objects in the API server show.
fn shown(world: &World) -> Result<Vec<String>> {
    let api: Api<NodeEndpoints> = Api::all(world.client.clone());
    let objects = world.runtime.block_on(api.list(&ListParams::default()))?.items;
    objects.iter().map(|object| Ok(serde_json::to_string(&object.spec)?)).collect()
}

fn shows(world: &World, address: &str) -> Result<bool> {
    Ok(shown(world)?.iter().any(|text| text.contains(&format!("\"{address}\""))))
}

/// As the node IPAM controller does it after a Node was deleted: the same name, other pod CIDRs.
fn renew(world: &World, node: &Node, cidrs: &[String]) -> Result<()> {
    let api: Api<NodeObject> = Api::all(world.client.clone());
    world.runtime.block_on(async {
        api.delete(node.name(), &DeleteParams::default()).await?;
        let object = serde_json::from_value(node_object(node.name(), node.addresses(), cidrs))?;
        api.create(&Default::default(), &object).await?;
        Ok(())
    })
}

#[test]
fn a2_a_node_made_anew_with_another_pod_cidr_on_a_real_api_server() -> Result<()> {
    require_lab!();
    let Some(world) = world("a2_a_node_made_anew_with_another_pod_cidr_on_a_real_api_server")? else {
        return Ok(());
    };
    let node = world.lab.node(1);
    world.start_agent(1)?;
    node.wait_ready()?;
    let old = world.pod(1, "shop", "old", &json!({}))?;
    let cidrs = ["10.1.9.0/24", "fd00:1:0:9::/64"].map(str::to_owned);
    renew(&world, node, &cidrs)?;
    wait_for("the node not to be ready", || {
        let (status, body) = node.space().http_get(METRICS.parse()?, "/readyz")?;
        Ok(status == 503 && body.contains("delete shop/old"))
    })?;
    ensure!(Plugin::of(node).call(node, "STATUS", &[]).is_err(), "STATUS says that pods can be connected");
    let new = world.pod(1, "shop", "new", &json!({}))?;
    let is_of_the_new = |address: &std::net::IpAddr| {
        let text = address.to_string();
        text.starts_with("10.1.9.") || text.starts_with("fd00:1:0:9:")
    };
    ensure!(new.addresses().iter().all(is_of_the_new), "{:?}", new.addresses());
    world.end_pod(1, old)?;
    node.wait_ready()?;
    Ok(())
}

#[test]
fn a3_own_objects_that_somebody_deletes_are_put_back_on_a_real_api_server() -> Result<()> {
    require_lab!();
    let Some(world) = world("a3_own_objects_that_somebody_deletes_are_put_back_on_a_real_api_server")? else {
        return Ok(());
    };
    let node = world.lab.node(1);
    world.start_agent(1)?;
    node.wait_ready()?;
    let pod = world.pod(1, "shop", "web", &json!({}))?;
    let address = pod.address(true).to_string();
    wait_for("the pod's address to be published", || shows(&world, &address))?;
    let api: Api<NodeEndpoints> = Api::all(world.client.clone());
    world.runtime.block_on(api.delete_collection(&DeleteParams::default(), &ListParams::default()))?;
    wait_for("the objects to be put back", || shows(&world, &address))?;
    wait_for("the repair to be counted", || Ok(repairs(node, "publishing")? > 0))?;
    // The routine way there: the Node is deleted and registered again, with the same pod CIDRs.
    renew(&world, node, &crate::lab::pod_cidrs(1))?;
    node.wait_ready()?;
    wait_for("the address still to be published", || shows(&world, &address))?;
    world.end_pod(1, pod)
}

#[test]
fn a1_a_node_reports_the_policy_that_it_cannot_enforce_to_a_real_api_server() -> Result<()> {
    require_lab!();
    let Some(world) = world("a1_a_node_reports_the_policy_that_it_cannot_enforce_to_a_real_api_server")?
    else {
        return Ok(());
    };
    let node = world.lab.node(1);
    let kubeconfig = world.runtime.block_on(world.plane.as_account("weir-agent", node.name()))?;
    node.start_agent_with(&["--kubeconfig", &kubeconfig.display().to_string(), "--policy-rows-max", "64"])?;
    node.wait_ready()?;
    let pod = world.pod(1, "shop", "web", &json!({}))?;
    world.runtime.block_on(world.plane.apply(&many_ports("shop", 500)))?;
    let api: Api<WeirNode> = Api::all(world.client.clone());
    let closed = || -> Result<String> {
        let status = world.runtime.block_on(api.get(node.name()))?.status;
        Ok(serde_json::to_string(&status.map(|status| status.closed_policies))?)
    };
    wait_for("the policy to be reported", || {
        let closed = closed()?;
        Ok(closed.contains("\"name\":\"many\"") && closed.contains("is not enforced for shop/web"))
    })?;
    let policies: Api<k8s_openapi::api::networking::v1::NetworkPolicy> =
        Api::namespaced(world.client.clone(), "shop");
    world.runtime.block_on(policies.delete("many", &DeleteParams::default()))?;
    wait_for("nothing to be reported", || Ok(closed()? == "[]"))?;
    world.end_pod(1, pod)
}
