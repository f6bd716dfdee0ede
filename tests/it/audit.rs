//! `weir.dev/audit` and `weir.dev/deny-response` on policies, namespaces and pods of a running node.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::lab::{Lab, Pod, Setup, Via, wait_for};
use crate::require::require_lab;
use crate::verdicts::{Expected, Row, expect_all};

/// Isolates the server for what comes in, and the client for what goes out.
fn isolate(lab: &Lab, annotations: &Value) -> Result<()> {
    for (name, kind) in [("server", "Ingress"), ("client", "Egress")] {
        lab.manifests().write(&json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"name": format!("lock-{name}"), "namespace": "shop", "annotations": annotations},
            "spec": {"podSelector": {"matchLabels": {"app": name}}, "policyTypes": [kind]},
        }))?;
    }
    Ok(())
}

fn annotate_namespace(lab: &Lab, annotations: &Value) -> Result<()> {
    lab.manifests().write(&json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": {"name": "shop", "annotations": annotations, "labels": {"kubernetes.io/metadata.name": "shop"}},
    }))
}

fn annotate_pod(lab: &Lab, pod: &Pod, annotations: &Value) -> Result<()> {
    lab.manifests().write(&json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": pod.name(), "namespace": "shop", "labels": {"app": pod.name()}, "annotations": annotations,
        },
        "spec": {"nodeName": pod.node(), "containers": [{"name": "main", "image": "none"}]},
    }))
}

fn from_to<'a>(client: &'a Pod, server: &Pod, expected: Expected) -> Vec<Row<'a>> {
    let address = |is_ipv4| SocketAddr::new(server.address(is_ipv4), 80);
    let row = |(via, is_ipv4)| Row::new(client, via, address(is_ipv4), expected);
    [(Via::Tcp, true), (Via::Tcp, false), (Via::Udp, true), (Via::Udp, false)].map(row).into()
}

/// Flows with this verdict towards the server.
fn audited(lab: &Lab, node: usize) -> Result<Vec<Value>> {
    let arguments = [
        "observe",
        "--all",
        "-o",
        "json",
        "--verdict",
        "audit",
        "--to-pod",
        "shop/server",
        "--protocol",
        "tcp",
    ];
    let written = lab.node(node).weir(&arguments)?;
    let flow = |line: &str| -> Result<Value> {
        let item: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
        Ok(item["flow"].clone())
    };
    written.lines().map(flow).collect()
}

#[test]
fn what_is_audited_passes_and_is_reported_with_the_policies_that_deny_it() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup { nodes: 2, ..Setup::default() })?;
    let server = lab.pod(1, "shop/server").label("app", "server").create()?;
    let client = lab.pod(2, "shop/client").label("app", "client").create()?;
    isolate(&lab, &json!({}))?;
    expect_all(&from_to(&client, &server, Expected::Denied))?;
    for node in [1, 2] {
        assert_eq!(audited(&lab, node)?, Vec::<Value>::new(), "nothing is audited yet");
    }
    // Both ends have to be audited: each denies for itself.
    annotate_pod(&lab, &client, &json!({"weir.dev/audit": "true"}))?;
    wait_for("the audit of what the client sends", || {
        client.probe(Via::Tcp, SocketAddr::new(server.address(true), 80));
        Ok(audited(&lab, 2)?.iter().any(|flow| flow.to_string().contains("lock-client")))
    })?;
    expect_all(&from_to(&client, &server, Expected::Denied))?;
    annotate_pod(&lab, &server, &json!({"weir.dev/audit": "true"}))?;
    expect_all(&from_to(&client, &server, Expected::Answered))?;
    let mut flow = Value::Null;
    wait_for("the audit of what the server gets", || {
        flow = audited(&lab, 1)?.pop().unwrap_or_default();
        Ok(!flow.is_null())
    })?;
    assert_eq!(flow["verdict"], "AUDIT");
    assert_eq!(flow["ingress_denied_by"][0]["name"], "lock-server", "{flow}");
    assert!(flow["ingress_allowed_by"].is_null(), "no policy lets it in: {flow}");
    annotate_pod(&lab, &client, &json!({}))?;
    annotate_pod(&lab, &server, &json!({"weir.dev/audit": "maybe"}))?;
    expect_all(&from_to(&client, &server, Expected::Denied))?;
    for (policies, namespace, expected) in [
        (json!({}), json!({"weir.dev/audit": "true"}), Expected::Answered),
        (json!({}), json!({}), Expected::Denied),
        (json!({"weir.dev/audit": "true"}), json!({}), Expected::Answered),
    ] {
        annotate_namespace(&lab, &namespace)?;
        isolate(&lab, &policies)?;
        expect_all(&from_to(&client, &server, expected))
            .with_context(|| format!("policies {policies}, namespace {namespace}"))?;
    }
    Ok(())
}

#[test]
fn a_denied_pod_is_told_where_the_cluster_its_namespace_or_its_policy_says_so() -> Result<()> {
    require_lab!();
    let arguments = vec!["--deny-response".to_owned(), "reject".to_owned()];
    let lab = Lab::start(Setup { nodes: 2, agent_arguments: arguments, ..Setup::default() })?;
    let server = lab.pod(1, "shop/server").create()?;
    let client = lab.pod(2, "shop/client").label("app", "client").create()?;
    let says = |response: &str| json!({"weir.dev/deny-response": response});
    for (policies, namespace, expected) in [
        (json!({}), json!({}), Expected::Refused),
        (json!({}), says("drop"), Expected::Denied),
        (says("reject"), says("drop"), Expected::Refused),
        (says("drop"), says("reject"), Expected::Denied),
        // What is not read says nothing.
        (says("rst"), json!({}), Expected::Refused),
    ] {
        annotate_namespace(&lab, &namespace)?;
        isolate(&lab, &policies)?;
        expect_all(&from_to(&client, &server, expected))
            .with_context(|| format!("policies {policies}, namespace {namespace}"))?;
    }
    Ok(())
}
