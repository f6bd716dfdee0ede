//! Malformed objects of every kind: refused by the API server, or reported on the object.

use anyhow::{Result, ensure};
use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::events::v1::Event;
use kube::api::{ListParams, Patch, PatchParams};

use super::*;

/// What the API server takes although Weir cannot use all of it; kind, name, reason, part of the note.
const TAKEN: &[(&str, &str, &str, &str)] = &[
    (
        "Service",
        "sticky",
        "PartlyIgnored",
        "metadata.annotations.weir.dev/algorithm: \"least\" is not random or maglev",
    ),
    ("Service", "outer", "PartlyIgnored", "spec.ports[1].protocol: Weir serves TCP and UDP only"),
    (
        "Service",
        "rival",
        "AddressConflict",
        "Service default/rival has port 80 of the external IP 203.0.113.9, which is Service default/eldest's",
    ),
    ("EndpointSlice", "names", "PartlyIgnored", "addressType: FQDN names no addresses"),
    (
        "NetworkPolicy",
        "revision",
        "PartlyIgnored",
        "spec.ingress[0].from[0].podSelector: whether a pod is without pod-template-hash",
    ),
    ("NodeEndpoints", "ghost-0", "Malformed", "spec.endpoints[0].addresses[0]"),
    ("WeirNode", "ghost", "Malformed", "spec.podCIDRs[0]"),
    ("Identity", "300", "Malformed", "spec.serviceAccount"),
    ("Node", "odd", "Malformed", "status.addresses[0].address"),
];

const DOCUMENTS: &[&str] = &[
    "{apiVersion: v1, kind: Service, metadata: {name: sticky, namespace: default, annotations: {weir.dev/algorithm: least}}, \
      spec: {sessionAffinity: ClientIP, ports: [{port: 80}]}}",
    "{apiVersion: v1, kind: Service, metadata: {name: outer, namespace: default}, \
      spec: {type: NodePort, ports: [{name: a, port: 80}, {name: b, port: 81, protocol: SCTP}]}}",
    "{apiVersion: v1, kind: Service, metadata: {name: eldest, namespace: default}, \
      spec: {externalIPs: [203.0.113.9], ports: [{port: 80}]}}",
    "{apiVersion: v1, kind: Service, metadata: {name: rival, namespace: default}, \
      spec: {externalIPs: [203.0.113.9], ports: [{port: 80}]}}",
    "{apiVersion: v1, kind: Service, metadata: {name: good, namespace: default}, spec: {ports: [{port: 80}]}}",
    "{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: FQDN, endpoints: [{addresses: [a.example]}], \
      metadata: {name: names, namespace: default, labels: {kubernetes.io/service-name: good}}, ports: []}",
    "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: revision, namespace: default}, \
      spec: {podSelector: {}, ingress: [{from: [{podSelector: {matchExpressions: \
      [{key: pod-template-hash, operator: DoesNotExist}]}}]}]}}",
    "{apiVersion: weir.dev/v1alpha1, kind: NodeEndpoints, metadata: {name: ghost-0}, \
      spec: {node: ghost, endpoints: [{namespace: a, name: b, addresses: [999.0.0.1], identity: 300}]}}",
    "{apiVersion: weir.dev/v1alpha1, kind: WeirNode, metadata: {name: ghost}, spec: {podCIDRs: [10.0.0.0/99]}}",
    "{apiVersion: weir.dev/v1alpha1, kind: Identity, metadata: {name: '300'}, \
      spec: {namespace: default, serviceAccount: ''}}",
];

/// What the definitions refuse, and the field that the refusal must name.
const REFUSED: &[(&str, &str)] = &[
    ("kind: Identity, metadata: {name: '255'}, spec: {namespace: a, serviceAccount: b}", "256 to 16777215"),
    (
        "kind: Identity, metadata: {name: '99999999'}, spec: {namespace: a, serviceAccount: b}",
        "256 to 16777215",
    ),
    ("kind: Identity, metadata: {name: web}, spec: {namespace: a, serviceAccount: b}", "256 to 16777215"),
    ("kind: Identity, metadata: {name: '300'}, spec: {namespace: a}", "spec.serviceAccount"),
    (
        "kind: Identity, metadata: {name: '300'}, \
         spec: {namespace: a, serviceAccount: b, namedPorts: {http: [{port: 0, protocol: TCP}]}}",
        "spec.namedPorts",
    ),
    (
        "kind: Identity, metadata: {name: '300'}, \
         spec: {namespace: a, serviceAccount: b, namedPorts: {http: [{port: 80, protocol: QUIC}]}}",
        "protocol",
    ),
    (
        "kind: NodeEndpoints, metadata: {name: a-0}, spec: {node: b, endpoints: []}",
        "the name must be the node's",
    ),
    (
        "kind: NodeEndpoints, metadata: {name: a-0}, spec: {node: a, internalAddresses: [here]}",
        "internalAddresses",
    ),
    (
        "kind: NodeEndpoints, metadata: {name: a-0}, \
         spec: {node: a, endpoints: [{namespace: a, name: b, addresses: [not-an-address], identity: 300}]}",
        "addresses",
    ),
    (
        "kind: NodeEndpoints, metadata: {name: a-0}, \
         spec: {node: a, endpoints: [{namespace: a, name: b, addresses: [10.0.0.1], identity: 1}]}",
        "identity",
    ),
    ("kind: WeirNode, metadata: {name: a}, spec: {podCIDRs: [10.0.0.0]}", "podCIDRs"),
    (
        "kind: WeirNode, metadata: {name: a}, spec: {podCIDRs: [10.0.0.0/24, 10.0.1.0/24]}",
        "at most one of each family",
    ),
];

#[test]
fn malformed_objects_are_refused_or_reported_on_the_object() -> Result<()> {
    with_plane("malformed_objects_are_refused_or_reported_on_the_object", async |plane| {
        plane.apply_base().await?;
        let client = plane.client().await?;
        let operator = Replica::start(&plane, "one", &[]).await?;
        until("the operator to look after nodes", || async {
            Ok(operator.log().contains("looking after nodes").then_some(()))
        })
        .await?;
        for (document, field) in REFUSED {
            let document = format!("{{apiVersion: weir.dev/v1alpha1, {document}}}");
            let error = until("an answer", || async {
                Ok(match plane.apply(&document).await {
                    Ok(()) => Some("it was taken".to_owned()),
                    // The definition is not served yet.
                    Err(error) if format!("{error:#}").contains("404") => None,
                    Err(error) => Some(format!("{error:#}")),
                })
            })
            .await?;
            ensure!(error.contains(field), "{document}: {error}");
        }
        for document in DOCUMENTS {
            plane.apply(document).await.with_context(|| (*document).to_owned())?;
        }
        create_node(&client, "odd", json!({})).await?;
        let nodes: Api<Node> = Api::all(client.clone());
        let address = json!({"status": {"addresses": [{"type": "InternalIP", "address": "nowhere"}]}});
        nodes.patch_status("odd", &PatchParams::default(), &Patch::Merge(address)).await?;

        let events: Api<Event> = Api::all(client.clone());
        for (kind, name, reason, note) in TAKEN {
            until(&format!("an event on {kind} {name} of {note:?}"), || async {
                let said = events.list(&ListParams::default()).await?.items.into_iter().any(|event| {
                    let regarding = event.regarding.unwrap_or_default();
                    regarding.kind.as_deref() == Some(kind)
                        && regarding.name.as_deref() == Some(name)
                        && regarding.uid.is_some()
                        && event.reason.as_deref() == Some(reason)
                        && event.note.is_some_and(|said| said.contains(note))
                });
                Ok(said.then_some(()))
            })
            .await?;
        }
        let all = events.list(&ListParams::default()).await?.items;
        // The API server has something to say of Services, too (ClusterIPNotAllocated).
        let of_good = all.iter().find(|event| {
            event.reporting_controller.as_deref() == Some("weir-operator")
                && event.regarding.as_ref().is_some_and(|regarding| regarding.name.as_deref() == Some("good"))
        });
        ensure!(of_good.is_none(), "{of_good:?}");

        // What is mended is no longer counted.
        let services = "weir_operator_objects_reported{kind=\"Service\"}";
        ensure!(operator.metric(services).await? == 2.0);
        let sticky: Api<Service> = Api::namespaced(client.clone(), "default");
        let patch = Patch::Merge(json!({"metadata": {"annotations": {"weir.dev/algorithm": null}}}));
        sticky.patch("sticky", &PatchParams::default(), &patch).await?;
        sticky.delete("outer", &Default::default()).await?;
        until("both Services to be well", || async {
            Ok((operator.metric(services).await? == 0.0).then_some(()))
        })
        .await
    })
}

#[test]
fn a1_a_policy_that_a_node_cannot_enforce_gets_an_event() -> Result<()> {
    with_plane("a1_a_policy_that_a_node_cannot_enforce_gets_an_event", |plane| async move {
        plane.apply_base().await?;
        let client = plane.client().await?;
        let operator = Replica::start(&plane, "one", &[]).await?;
        until("the operator to look after nodes", || async {
            Ok(operator.log().contains("looking after nodes").then_some(()))
        })
        .await?;
        let policy = "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, \
                      metadata: {name: many, namespace: default}, spec: {podSelector: {}}}";
        plane.apply(policy).await?;
        until("the definition to be served", || async {
            Ok(plane
                .apply("{apiVersion: weir.dev/v1alpha1, kind: WeirNode, metadata: {name: n1}, spec: {}}")
                .await
                .ok())
        })
        .await?;
        let reason = "is not enforced for default/web: 46000 rows, and one policy may have 16384";
        let closed = |kind: &str, name: &str| json!({"kind": kind, "namespace": "default", "name": name, "reason": reason});
        // One that is gone, and a kind that is none: said by nobody.
        let all =
            [closed("NetworkPolicy", "many"), closed("NetworkPolicy", "gone"), closed("Secret", "many")];
        let nodes: Api<WeirNode> = Api::all(client.clone());
        let status = Patch::Merge(json!({"status": {"ready": true, "closedPolicies": all}}));
        nodes.patch_status("n1", &PatchParams::default(), &status).await?;
        let events: Api<Event> = Api::all(client.clone());
        until("the event", || async {
            let said = events.list(&ListParams::default()).await?.items.into_iter().any(|event| {
                let regarding = event.regarding.unwrap_or_default();
                regarding.name.as_deref() == Some("many")
                    && regarding.uid.is_some()
                    && event.reason.as_deref() == Some("NotEnforced")
                    && event.note.is_some_and(|note| note == format!("Node n1: {reason}"))
            });
            Ok(said.then_some(()))
        })
        .await?;
        let all = events.list(&ListParams::default()).await?.items;
        let not_enforced = all.iter().filter(|event| event.reason.as_deref() == Some("NotEnforced"));
        ensure!(not_enforced.count() == 1, "{all:?}");
        Ok(())
    })
}
