//! Addresses of load balancers, from a real API server and with the operator's own rights.

use anyhow::{Result, ensure};
use k8s_openapi::api::core::v1::Service;
use kube::api::DeleteParams;
use weir::kube::crd::LoadBalancerPool;

use super::*;

const CONDITION: &str = "weir.dev/LoadBalancerAddress";

/// The addresses of a Service, and what its condition says.
async fn state(client: &Client, name: &str) -> Result<(Vec<String>, Option<String>)> {
    let services: Api<Service> = Api::namespaced(client.clone(), "default");
    let status = services.get(name).await?.status.unwrap_or_default();
    let ingress = status.load_balancer.and_then(|balancer| balancer.ingress).unwrap_or_default();
    let conditions = status.conditions.unwrap_or_default();
    let ours = conditions.into_iter().find(|condition| condition.type_ == CONDITION);
    Ok((ingress.into_iter().filter_map(|it| it.ip).collect(), ours.map(|ours| ours.reason)))
}

async fn until_state(client: &Client, name: &str, addresses: &[&str], reason: Option<&str>) -> Result<()> {
    let what = format!("{name} with {addresses:?} {reason:?}");
    until(&what, || async {
        let (has, says) = state(client, name).await?;
        if has == addresses && says.as_deref() == reason {
            return Ok(Some(()));
        }
        anyhow::bail!("{name} has {has:?} {says:?}")
    })
    .await
}

fn balancer(name: &str, port: u16, annotations: &str) -> String {
    format!(
        "{{apiVersion: v1, kind: Service, metadata: {{name: {name}, namespace: default, annotations: {{{annotations}}}}}, \
         spec: {{type: LoadBalancer, allocateLoadBalancerNodePorts: false, ports: [{{port: {port}}}]}}}}"
    )
}

#[test]
fn load_balancers_get_addresses_keep_them_and_are_told_why_not() -> Result<()> {
    with_plane("load_balancers_get_addresses_keep_them_and_are_told_why_not", async |plane| {
        plane.apply_base().await?;
        let client = plane.client().await?;
        let first = Replica::start(&plane, "one", &[]).await?;
        plane.apply(&balancer("early", 80, "")).await?;
        let pool = "{apiVersion: weir.dev/v1alpha1, kind: LoadBalancerPool, metadata: {name: a}, \
                    spec: {blocks: [{cidr: 198.51.100.0/31}]}}";
        until("the definition", || async { Ok(plane.apply(pool).await.ok()) }).await?;
        until_state(&client, "early", &["198.51.100.0"], Some("Assigned")).await?;
        plane.apply(&balancer("asks", 80, "weir.dev/load-balancer-ips: 198.51.100.0")).await?;
        until_state(&client, "asks", &[], Some("AddressInUse")).await?;
        let key = "lbipam.cilium.io/sharing-key: k, lbipam.cilium.io/ips: 198.51.100.1";
        plane.apply(&balancer("one", 80, key)).await?;
        plane.apply(&balancer("two", 81, key)).await?;
        until_state(&client, "one", &["198.51.100.1"], Some("Assigned")).await?;
        until_state(&client, "two", &["198.51.100.1"], Some("Assigned")).await?;
        plane.apply(&balancer("late", 80, "")).await?;
        until_state(&client, "late", &[], Some("PoolExhausted")).await?;
        // Another leader finds everything as it is.
        first.kill()?;
        let _second = Replica::start(&plane, "two", &[]).await?;
        until("another leader", || async {
            Ok((leader(&client).await?.as_deref() == Some("two")).then_some(()))
        })
        .await?;
        let services: Api<Service> = Api::namespaced(client.clone(), "default");
        services.delete("early", &DeleteParams::default()).await?;
        until("the address to be somebody else's", || async {
            let states = [state(&client, "late").await?, state(&client, "asks").await?];
            Ok(states.iter().any(|(has, _)| has == &["198.51.100.0"]).then_some(()))
        })
        .await?;
        until_state(&client, "one", &["198.51.100.1"], Some("Assigned")).await?;
        // With the pool everything goes that was given of it; the pool says how much that was.
        let pools: Api<LoadBalancerPool> = Api::all(client.clone());
        let used = until("the pool's word", || async {
            let status = pools.get("a").await?.status.unwrap_or_default();
            Ok((status.in_use == 2).then_some(status))
        })
        .await?;
        ensure!(used.conditions.iter().any(|it| it.type_ == "Ready" && it.status == "True"), "{used:?}");
        pools.delete("a", &DeleteParams::default()).await?;
        until_state(&client, "one", &[], Some("NotInPool")).await?;
        Ok(())
    })
}
