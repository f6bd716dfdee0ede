//! `weir policy validate`, `list`, `explain`, `diff` and `suggest`, asked of an agent that judges real traffic; and a
//! namespace that is being deleted.

use std::net::SocketAddr;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::lab::{Lab, Setup, Via, wait_for};
use crate::require::require_lab;
use crate::verdicts::{Expected, Row, expect_all};

const LET_CLIENT_IN: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: server, namespace: shop}
spec:
  podSelector: {matchLabels: {app: server}}
  ingress: [{from: [{podSelector: {matchLabels: {app: client}}}], ports: [{port: 80}]}]
";

#[test]
fn the_commands_answer_for_an_agent() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup::default())?;
    let node = lab.node(1);
    let server = lab.pod(1, "shop/server").label("app", "server").create()?;
    let client = lab.pod(1, "shop/client").label("app", "client").create()?;
    lab.manifests().apply(LET_CLIENT_IN)?;
    let target = |port| SocketAddr::new(server.address(true), port);
    expect_all(&[
        Row::new(&client, Via::Tcp, target(80), Expected::Answered),
        Row::new(&client, Via::Tcp, target(81), Expected::Denied),
    ])?;
    assert!(node.weir(&["policy", "list"])?.contains("shop/server"));

    let explain = |from: &str, port| {
        node.weir(&["policy", "explain", "--from", from, "--to", "shop/server", "--port", port])
    };
    for from in ["shop/client", "shop/app=client", &client.address(true).to_string()] {
        let said = explain(from, "80/TCP")?;
        assert!(said.contains("ALLOWED") && said.contains("NetworkPolicy shop/server"), "{from}: {said}");
        let said = explain(from, "81/TCP")?;
        assert!(said.contains("DENIED") && said.contains("NetworkPolicy shop/server"), "{from}: {said}");
    }
    assert!(explain("world", "80/TCP")?.contains("DENIED"));

    let file = lab.directory().join("changed.yaml");
    let path = file.to_str().context("a path of text")?;
    std::fs::write(&file, LET_CLIENT_IN)?;
    assert!(node.weir(&["policy", "diff", path])?.contains("nothing changes"));
    std::fs::write(&file, LET_CLIENT_IN.replace("port: 80", "port: 81"))?;
    let said = node.weir(&["policy", "diff", path])?;
    for becomes in ["allowed", "denied"] {
        let of_pair = said.lines().find(|line| {
            line.starts_with(becomes) && line.contains("shop/app=server") && line.contains("shop/app=client")
        });
        assert!(of_pair.is_some(), "{becomes}: {said}");
    }
    // The flow to 80 runs and would not; the one to 81 was denied.
    let is_flow = |line: &str, becomes: &str, port: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        words == [becomes, "shop/client", "shop/server", port]
    };
    for (becomes, port) in [("denied", "TCP/80"), ("allowed", "TCP/81")] {
        wait_for(&format!("the flow to {port} in the difference"), || {
            let said = node.weir(&["policy", "diff", path])?;
            Ok(said.lines().any(|line| is_flow(line, becomes, port)))
        })?;
    }
    let said = node.weir_json(&["policy", "diff", path])?;
    let of_pair = |change: &Value| change["pods"] == "shop/app=server" && change["peer"] == "shop/app=client";
    assert!(said["changes"].as_array().is_some_and(|all| all.iter().any(of_pair)), "{said}");
    for (is_allowed, port) in [(false, "TCP/80"), (true, "TCP/81")] {
        let flow = json!({
            "is_allowed": is_allowed, "from": "shop/client", "to": "shop/server", "port": port,
        });
        assert!(said["flows"].as_array().is_some_and(|all| all.contains(&flow)), "{said}");
    }

    let suggested = node.weir(&["policy", "suggest", "shop/client"])?;
    assert!(suggested.contains("kind: NetworkPolicy") && suggested.contains("port: 80"), "{suggested}");

    let validate = |text: &str| -> Result<(bool, String)> {
        std::fs::write(&file, text)?;
        let output = Command::new(env!("CARGO_BIN_EXE_weir")).args(["policy", "validate", path]).output()?;
        Ok((output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned()))
    };
    let (is_valid, said) = validate(LET_CLIENT_IN)?;
    assert!(is_valid, "{said}");
    let (is_valid, said) = validate(&LET_CLIENT_IN.replace("port: 80", "port: 0"))?;
    assert!(!is_valid && said.contains("changed.yaml:") && said.contains("ports[0]"), "{said}");
    Ok(())
}

#[test]
fn a_namespace_that_is_being_deleted_does_not_open_its_pods() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup::default())?;
    let server = lab.pod(1, "shop/server").label("app", "server").create()?;
    let other = lab.pod(1, "other/client").create()?;
    lab.manifests().apply(LET_CLIENT_IN)?;
    let target = SocketAddr::new(server.address(true), 80);
    let reaches = |expected| expect_all(&[Row::new(&other, Via::Tcp, target, expected)]);
    reaches(Expected::Denied)?;
    lab.manifests().write(&json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": {
            "name": "shop", "labels": {"kubernetes.io/metadata.name": "shop"},
            "deletionTimestamp": "2026-01-01T00:00:00Z",
        },
    }))?;
    let node = lab.node(1);
    lab.manifests().delete(LET_CLIENT_IN)?;
    wait_for("the policy to be gone", || Ok(!node.weir(&["policy", "list"])?.contains("shop/server")))?;
    for _ in 0..3 {
        reaches(Expected::Denied)?;
    }
    // The namespace stays after all, without the policy.
    lab.manifests().namespace("shop", &[])?;
    reaches(Expected::Answered)
}
