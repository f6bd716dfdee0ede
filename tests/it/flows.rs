//! What `weir observe`, the lists and the metrics say about real packets.

use std::net::SocketAddr;

use anyhow::Result;
use serde_json::Value;

use crate::lab::{Lab, METRICS, OUTSIDE, ServicePort, Setup, Via, socket_address, wait_for};
use crate::require::require_lab;
use crate::verdicts::{Expected, Row, expect_all};

const POLICIES: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: server, namespace: shop}
spec:
  podSelector: {matchLabels: {app: server}}
  ingress: [{from: [{podSelector: {matchLabels: {app: client}}}], ports: [{port: 80}]}]
";

#[test]
fn a_flow_names_pods_policy_service_and_verdict() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup::default())?;
    let node = lab.node(1);
    let server = lab.pod(1, "shop/server").label("app", "server").create()?;
    let client = lab.pod(1, "shop/client").label("app", "client").create()?;
    lab.manifests().apply(POLICIES)?;
    lab.service("shop/server", &["10.96.0.30"], &[ServicePort::from(("web", "TCP", 1080, 80))], &[&server])?;
    let service = socket_address("10.96.0.30", 1080);
    let denied = SocketAddr::new(server.address(true), 81);
    expect_all(&[
        Row::new(&client, Via::Tcp, service, Expected::Answered),
        Row::new(&client, Via::Tcp, denied, Expected::Denied),
    ])?;
    let mut allowed_flow = Value::Null;
    wait_for("the forwarded flow", || {
        let filters =
            ["--from-pod", "shop/client", "--verdict", "forwarded", "--protocol", "tcp", "--port", "80"];
        allowed_flow = node.flows(&filters)?.pop().unwrap_or_default();
        Ok(allowed_flow["destination_service"].is_object())
    })?;
    assert_eq!(allowed_flow["source"]["pod_name"], "client");
    assert_eq!(allowed_flow["source"]["namespace"], "shop");
    assert_eq!(allowed_flow["destination"]["pod_name"], "server");
    assert_eq!(allowed_flow["l4"]["TCP"]["destination_port"], 80);
    assert_eq!(allowed_flow["destination_service"]["name"], "server");
    assert_eq!(allowed_flow["weir"]["service"], "10.96.0.30:1080");
    assert_eq!(allowed_flow["ingress_allowed_by"][0]["name"], "server", "{allowed_flow}");
    assert_eq!(allowed_flow["ingress_allowed_by"][0]["kind"], "NetworkPolicy", "{allowed_flow}");
    assert_eq!(allowed_flow["policy_match_type"], 2, "by peer and port: {allowed_flow}");
    assert!(allowed_flow["source"]["labels"].to_string().contains("app=client"), "{allowed_flow}");
    let mut denied_flow = Value::Null;
    wait_for("the dropped flow", || {
        denied_flow =
            node.flows(&["--to-pod", "shop/server", "--verdict", "dropped"])?.pop().unwrap_or_default();
        Ok(!denied_flow.is_null())
    })?;
    assert_eq!(denied_flow["l4"]["TCP"]["destination_port"], 81);
    assert_eq!(denied_flow["traffic_direction"], "INGRESS");
    assert_eq!(denied_flow["drop_reason_desc"], "POLICY_DENIED");
    assert_eq!(denied_flow["l4"]["TCP"]["flags"], serde_json::json!({"SYN": true}));
    Ok(())
}

#[test]
fn icmp_udp_and_the_world_have_flows_too() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup::default())?;
    let client = lab.pod(1, "shop/client").create()?;
    let targets = [(Via::Ping, OUTSIDE[0]), (Via::Udp, OUTSIDE[1]), (Via::Tcp, OUTSIDE[2])];
    let rows: Vec<Row<'_>> = targets
        .iter()
        .map(|(via, target)| Row::new(&client, *via, socket_address(target, 80), Expected::Answered))
        .collect();
    expect_all(&rows)?;
    for (_, target) in targets {
        wait_for(&format!("a flow to {target}"), || {
            let flows = lab.node(1).flows(&["--from-pod", "shop/client", "--to-identity", "world"])?;
            Ok(flows.iter().any(|flow| flow["IP"]["destination"] == target && flow["verdict"] == "FORWARDED"))
        })?;
    }
    Ok(())
}

#[test]
fn the_lists_tell_what_is_there() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup::default())?;
    let node = lab.node(1);
    let server = lab.pod(1, "shop/server").label("app", "server").create()?;
    lab.manifests().apply(POLICIES)?;
    lab.service("shop/web", &["10.96.0.31"], &[ServicePort::from(("web", "TCP", 80, 8080))], &[&server])?;
    for (list, wanted) in [
        ("endpoint", server.address(true).to_string()),
        ("identity", "app=server".to_owned()),
        ("policy", "shop/server".to_owned()),
        ("service", "10.96.0.31".to_owned()),
    ] {
        wait_for(&format!("{wanted} in weir {list} list"), || {
            Ok(node.weir(&[list, "list"])?.contains(&wanted))
        })?;
        assert!(node.weir_json(&[list, "list"])?.is_array(), "weir {list} list -o json");
    }
    assert!(node.weir(&["status"])?.contains("node1"));
    assert_eq!(node.map("endpoints")?.len(), 1);
    Ok(())
}

#[test]
fn metrics_and_health_are_served() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup::default())?;
    let node = lab.node(1);
    let server = lab.pod(1, "shop/server").label("app", "server").create()?;
    let client = lab.pod(1, "shop/client").create()?;
    lab.manifests().apply(POLICIES)?;
    expect_all(&[Row::new(&client, Via::Tcp, SocketAddr::new(server.address(true), 80), Expected::Denied)])?;
    assert_eq!(node.space().http_get(METRICS.parse()?, "/healthz")?.0, 200);
    for (metric, labels) in [
        ("weir_dropped_packets_total", &["POLICY_DENIED", "INGRESS"][..]),
        ("weir_forwarded_packets_total", &[]),
        ("weir_policy_computations_total", &[]),
        ("weir_flow_events_seen_total", &[]),
        ("hubble_drop_total", &["POLICY_DENIED"]),
        ("weir_endpoints", &[]),
    ] {
        wait_for(&format!("{metric} above 0"), || Ok(node.metric(metric, labels)? > 0.0))?;
    }
    Ok(())
}

/// Drops go to an exporter's file, `weir top` sums them up, and the next agent has the history of this one.
#[test]
fn flows_are_exported_summed_up_and_kept_for_the_next_agent() -> Result<()> {
    require_lab!();
    let directory = tempfile::tempdir()?;
    let (settings, exported) =
        (directory.path().join("exporters.yaml"), directory.path().join("drops.jsonl"));
    let text = format!(
        "exporters: [{{name: drops, file: {{path: {}}}, allow: [{{verdict: [DROPPED]}}]}}]",
        exported.display()
    );
    std::fs::write(&settings, text)?;
    let settings = settings.display().to_string();
    let arguments = ["--hubble-exporters", &settings, "--flow-history-disk", "8MiB"];
    let agent_arguments = arguments.map(str::to_owned).to_vec();
    let lab = Lab::start(Setup { agent_arguments, ..Setup::default() })?;
    let node = lab.node(1);
    let server = lab.pod(1, "shop/server").label("app", "server").create()?;
    let client = lab.pod(1, "shop/client").create()?;
    lab.manifests().apply(POLICIES)?;
    expect_all(&[Row::new(&client, Via::Tcp, SocketAddr::new(server.address(true), 80), Expected::Denied)])?;
    wait_for("the drop in the exporter's file", || {
        let lines = std::fs::read_to_string(&exported).unwrap_or_default();
        Ok(lines.lines().all(|line| line.contains("DROPPED")) && lines.contains("shop"))
    })?;
    assert!(node.metric("weir_flow_export_flows_total", &["drops", "written"])? > 0.0);
    let top = node.weir_json(&["top", "--once", "--window", "600"])?;
    assert_eq!(top["drops"][0]["source"], "shop/client", "{top}");
    assert_eq!(top["drops"][0]["destination"], "shop/server", "{top}");
    wait_for("the flows on disk", || {
        let is_flows = |path: &std::path::PathBuf| path.extension().is_some_and(|end| end == "flows");
        let length = |path: &std::path::PathBuf| std::fs::metadata(path).map_or(0, |file| file.len());
        Ok(node.state_files().iter().filter(|path| is_flows(path)).any(|path| length(path) > 128))
    })?;
    let filters = ["--from-pod", "shop/client", "--verdict", "dropped"];
    let before = node.flows(&filters)?;
    node.kill_agent()?;
    node.start_agent()?;
    node.wait_ready()?;
    wait_for("the history of the agent before", || {
        let ends = &before.first().map_or(Value::Null, |flow| flow["IP"].clone());
        Ok(node.flows(&["--all-namespaces", "--verdict", "dropped"])?.iter().any(|flow| flow["IP"] == *ends))
    })
}
