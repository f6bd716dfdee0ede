//! One target that fails costs its own, never the node.

use std::fmt::Write;
use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::lab::{Lab, Node, Pod, ServicePort, Setup, Via, socket_address, wait_for};
use crate::require::require_lab;
use crate::verdicts::{Expected, Row, expect_all, expect_full_mesh};

/// A policy on the namespace's pods with so many ports that are no neighbours.
fn many_ports(namespace: &str, ports: usize) -> String {
    let mut yaml = format!(
        "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: many, namespace: {namespace}}}
spec:
  podSelector: {{}}
  ingress:
  - from: [{{podSelector: {{}}}}]
    ports:
"
    );
    for port in 0..ports {
        writeln!(yaml, "    - {{port: {}}}", 2 * port + 1).expect("a string takes everything");
    }
    yaml
}

/// The row of one part of the agent in `weir status`.
pub fn part(node: &Node, name: &str) -> Result<Value> {
    let status = node.status()?;
    let rows = status["parts"].as_array().context("no parts")?;
    rows.iter()
        .find(|row| row["part"] == name)
        .cloned()
        .with_context(|| format!("no part {name} in {status}"))
}

fn service(lab: &Lab, port: u16, backend: &Pod) -> Result<()> {
    let ports = [("web", "TCP", port, 80)].map(ServicePort::from);
    lab.service("other/web", &["10.96.0.20"], &ports, &[backend])
}

fn expect_service(pod: &Pod, port: u16) -> Result<()> {
    expect_all(&[Row::new(pod, Via::Tcp, socket_address("10.96.0.20", port), Expected::Answered)])
}

#[test]
fn a1_one_policy_that_does_not_fit_costs_its_own_pods_and_never_the_node() -> Result<()> {
    require_lab!();
    for (limit, says) in [
        (["--map-size", "policy_rules=256"], "do not fit into map policy_rules (256 rows)"),
        (["--policy-rows-max", "256"], "one policy may have 256"),
    ] {
        let agent_arguments = limit.map(str::to_owned).into();
        let lab = Lab::start(Setup { agent_arguments, ..Setup::default() })?;
        let node = lab.node(1);
        let (victim, other) = (lab.pod(1, "shop/victim").create()?, lab.pod(1, "other/a").create()?);
        service(&lab, 80, &other)?;
        expect_full_mesh(&[&victim, &other])?;
        let policy = many_ports("shop", 500);
        lab.manifests().apply(&policy)?;
        let to_victim = SocketAddr::new(victim.address(true), 80);
        expect_all(&[Row::new(&other, Via::Tcp, to_victim, Expected::Denied)])?;
        wait_for("the status to name the policy", || {
            let causes = part(node, "policies")?["causes"].to_string();
            Ok(causes.contains("NetworkPolicy shop/many, which selects shop/victim") && causes.contains(says))
        })?;
        let endpoints = node.weir_json(&["endpoint", "list"])?;
        let waiting = endpoints.as_array().context("rows")?.iter().find(|row| row["pod"]["name"] == "victim");
        let waiting = waiting.context("the victim's row")?["waiting_for"].to_string();
        ensure!(waiting.contains("closed, because its policy is not in force"), "{waiting}");
        // All the others go on: another pod's ADD, another Service, other policies.
        let late = lab.pod(1, "other/late").create()?;
        service(&lab, 81, &other)?;
        expect_service(&late, 81)?;
        expect_full_mesh(&[&late, &other])?;
        lab.manifests().apply(&many_ports("other", 20))?;
        expect_all(&[
            Row::new(&late, Via::Tcp, SocketAddr::new(other.address(true), 81), Expected::Denied),
            Row::new(&late, Via::Tcp, SocketAddr::new(other.address(true), 8080), Expected::Denied),
        ])?;
        lab.manifests().delete(&many_ports("other", 20))?;
        // The agent starts on a node like this, and all is well when the cause has gone.
        node.kill_agent()?;
        node.start_agent()?;
        node.wait_ready()?;
        expect_all(&[Row::new(&other, Via::Tcp, to_victim, Expected::Denied)])?;
        expect_full_mesh(&[&late, &other])?;
        lab.manifests().delete(&policy)?;
        expect_full_mesh(&[&victim, &late, &other])?;
        wait_for("nothing to be wrong", || Ok(part(node, "policies")?["failing_seconds"].is_null()))?;
    }
    Ok(())
}

#[test]
fn a4_one_route_that_another_program_has_costs_only_that_route() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup { nodes: 2, starts_agents: false, ..Setup::default() })?;
    lab.node(1).space().ip("route add 10.1.2.0/24 dev lo")?;
    lab.start_agents()?;
    let (near, far) = (lab.pod(1, "shop/near").create()?, lab.pod(2, "shop/far").create()?);
    // Pods are sent through the tunnel by the programs; the node's own packets miss the route.
    expect_full_mesh(&[&near, &far])?;
    let routes = part(lab.node(1), "routes")?;
    let expected =
        "no route 10.1.2.0/24 to node node2: another program's route has this prefix: remove that one";
    ensure!(routes["causes"][0] == expected && routes["stops_pods"] == false, "{routes}");
    ensure!(
        lab.node(1).space().ip("route show 10.1.2.0/24")?.contains("dev lo"),
        "the other's route is gone"
    );
    lab.node(1).space().ip("route del 10.1.2.0/24 dev lo")?;
    wait_for("our route", || Ok(lab.node(1).space().ip("route show proto 87")?.contains("10.1.2.0/24")))?;
    wait_for("nothing to be wrong", || Ok(part(lab.node(1), "routes")?["failing_seconds"].is_null()))
}

const OFF_LINK: &str = "
apiVersion: v1
kind: Node
metadata: {name: away, labels: {kubernetes.io/hostname: away}}
spec: {podCIDR: 10.1.99.0/24, podCIDRs: [10.1.99.0/24]}
status: {addresses: [{type: InternalIP, address: 203.0.113.9}]}
";

#[test]
fn a4_one_node_off_the_link_costs_only_the_route_to_it() -> Result<()> {
    require_lab!();
    let setup = Setup { nodes: 2, routing: "native".to_owned(), starts_agents: false, ..Setup::default() };
    let lab = Lab::start(setup)?;
    lab.manifests().apply(OFF_LINK)?;
    lab.start_agents()?;
    let (near, far) = (lab.pod(1, "shop/near").create()?, lab.pod(2, "shop/far").create()?);
    expect_full_mesh(&[&near, &far])?;
    let routes = part(lab.node(1), "routes")?;
    let expected = "no route 10.1.99.0/24: node away is not on this link, and native routing needs that";
    ensure!(routes["causes"][0] == expected, "{routes}");
    lab.manifests().delete(OFF_LINK)?;
    wait_for("nothing to be wrong", || Ok(part(lab.node(1), "routes")?["failing_seconds"].is_null()))
}
