//! Definitions of others' kinds: made where there are none, left alone where somebody has made them; people's
//! policies are taken by ours as they are.

use anyhow::{Result, ensure};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{DynamicObject, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use weir::kube::crd::SCHEMA_VERSION_ANNOTATION;
use weir::kube::upstream::definitions;

use super::*;
use crate::api_server::CIDR_GROUPS;
use crate::policies::object_of;
use crate::published_policies::CASES;

/// What is refused, and what the refusal says.
const REFUSED: &[(&str, &str)] = &[
    ("CiliumNetworkPolicy x", "{ingress: [{}]}"),
    ("CiliumNetworkPolicy x", "{endpointSelector: {}, nodeSelector: {}}"),
    (
        "CiliumNetworkPolicy x",
        "{endpointSelector: {}, ingress: [{toPorts: [{ports: [{port: '80', endPort: 70000}]}]}]}",
    ),
    ("CiliumNetworkPolicy x", "{endpointSelector: {}, ingress: {}}"),
    (
        "CiliumNetworkPolicy x",
        "{endpointSelector: {}, ingress: [{icmps: [{fields: [{family: IPv5, type: 8}]}]}]}",
    ),
    ("ClusterNetworkPolicy", "{tier: Owner, priority: 1, subject: {namespaces: {}}}"),
    ("ClusterNetworkPolicy", "{tier: Admin, priority: 1001, subject: {namespaces: {}}}"),
    (
        "ClusterNetworkPolicy",
        "{tier: Admin, priority: 1, subject: {namespaces: {}}, ingress: [{action: Accept, from: []}]}",
    ),
];

/// What ours take and a definition that prunes would make wider.
const KEPT: (&str, &str) = (
    "CiliumNetworkPolicy x",
    "{endpointSelector: {}, ingress: [{fromEndpoints: [{}], toPort: [{ports: [{port: '80'}]}]}]}",
);

fn api_of(client: &Client, object: &Value) -> Result<Api<DynamicObject>> {
    let text = |field: &str| object[field].as_str().map(str::to_owned).context("an object says what it is");
    let (version, kind) = (text("apiVersion")?, text("kind")?);
    let (group, version) = version.split_once('/').context("a group")?;
    let plural = kind.to_lowercase().replace("policy", "policies");
    let resource = ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, &kind), &plural);
    Ok(match object["metadata"]["namespace"].as_str() {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    })
}

/// Creates an object and returns what the API server has made of it.
async fn created(client: &Client, object: &Value) -> Result<Value> {
    let api = api_of(client, object)?;
    let made = api.create(&PostParams::default(), &serde_json::from_value(object.clone())?).await?;
    let stored = api.get(&made.name_any()).await?;
    api.delete(&made.name_any(), &Default::default()).await?;
    Ok(serde_json::to_value(stored)?)
}

#[test]
fn definitions_of_others_are_made_where_there_are_none() -> Result<()> {
    with_plane("definitions_of_others_are_made_where_there_are_none", async |plane| {
        plane.apply_base().await?;
        for namespace in ["x", "y", "z"] {
            plane
                .apply(&format!("{{apiVersion: v1, kind: Namespace, metadata: {{name: {namespace}}}}}"))
                .await?;
        }
        // As somebody else has defined it, with a column that ours has not.
        let theirs = CIDR_GROUPS.replace(
            "    schema:",
            "    additionalPrinterColumns: [{name: Theirs, type: string, jsonPath: .metadata.name}]\n    schema:",
        );
        plane.apply(&theirs).await?;
        let client = plane.client().await?;
        let all: Api<CustomResourceDefinition> = Api::all(client.clone());
        let operator = Replica::start(&plane, "one", &[]).await?;
        for definition in definitions() {
            let name = definition.name_any();
            until(&name, || async { Ok(all.get_opt(&name).await?.filter(|it| it.status.is_some())) }).await?;
        }
        let theirs = all.get("ciliumcidrgroups.cilium.io").await?;
        ensure!(!theirs.annotations().contains_key(SCHEMA_VERSION_ANNOTATION), "{theirs:?}");
        let columns = theirs.spec.versions[0].additional_printer_columns.iter().flatten();
        ensure!(columns.map(|column| &*column.name).collect::<Vec<_>>() == ["Theirs"]);
        until("a word of theirs", || async {
            Ok(operator.log().contains("somebody else's definition is used as it is").then_some(()))
        })
        .await?;
        people_s_policies_are_taken_as_they_are(&client).await?;
        // Ours that somebody changes are his.
        let column = json!({"spec": {"versions": [{"name": "v2", "served": true, "storage": true,
            "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}}]}});
        let name = "ciliumnetworkpolicies.cilium.io";
        all.patch(name, &Default::default(), &kube::api::Patch::Merge(&column)).await?;
        let before = all.get(name).await?.metadata.generation;
        operator.kill()?;
        let next = Replica::start(&plane, "two", &[]).await?;
        until("the next leader", || async {
            Ok((next.log().matches("somebody else's definition").count() >= 2).then_some(()))
        })
        .await?;
        ensure!(all.get(name).await?.metadata.generation == before, "it was overwritten");
        Ok(())
    })
}

async fn people_s_policies_are_taken_as_they_are(client: &Client) -> Result<()> {
    let mut number = 0;
    let is_others = |(words, _): &&(&str, &str)| words.contains("Cilium") || words.contains("Cluster");
    let policies = CASES.iter().flat_map(|case| case.policies).filter(is_others).chain([&KEPT]);
    for (words, spec) in policies {
        let mut spec = (*spec).to_owned();
        for namespace in ["x", "y", "z"] {
            for pod in ["a", "b", "c"] {
                spec = spec.replace(&format!("${namespace}/{pod}.4"), "10.1.0.9");
                spec = spec.replace(&format!("${namespace}/{pod}.6"), "fd00:1::9");
            }
        }
        let object = object_of(number, words, &spec)?;
        number += 1;
        let stored =
            until(&format!("{words} {spec}"), || async { created(client, &object).await.map(Some) }).await?;
        for field in ["spec", "specs"] {
            ensure!(stored[field] == object[field], "{words} {spec}\nbecame {}", stored[field]);
        }
    }
    ensure!(number > 20, "only {number} policies");
    for (words, spec) in REFUSED {
        let refused = created(client, &object_of(number, words, spec)?).await;
        ensure!(
            refused.is_err_and(|error| format!("{error:#}").contains("invalid")),
            "{words} {spec} was taken"
        );
    }
    Ok(())
}
