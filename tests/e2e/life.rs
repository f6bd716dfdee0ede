//! What comes and goes, what is wrong, and what is told about it.

use std::collections::BTreeSet;
use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::kubernetes::Daemon;
use crate::kubernetes::prober::Via;
use crate::lab::output_of;
use crate::world::{PATIENCE, PORT, Pod, Row, World, both};

const AGENTS: &str = "app.kubernetes.io/name=weir-agent";
const OPERATORS: &str = "app.kubernetes.io/name=weir-operator";
/// Where the operator's metrics are on its node (deploy/base/settings.env).
const OPERATOR_METRICS: &str = "127.0.0.1:9963";

/// Objects that the API server takes, and that make no sense to Weir.
const MALFORMED: &str = include_str!("malformed.yaml");

const GONE: &str = include_str!("gone.yaml");

/// Every agent says what is wrong and stays ready; what was right stays as it was.
pub fn malformed_objects_change_nothing_else(world: &mut World) -> Result<()> {
    let (clients, servers) = (world.clients()?, world.servers()?);
    world.cluster.apply(MALFORMED)?;
    for agent in world.pods("weir-system", AGENTS)? {
        world.cluster.wait(&format!("a word about ghost-0 on {}", agent.node), PATIENCE, || {
            let logs = ["--namespace", "weir-system", "logs", &agent.name, "--container", "agent"];
            Ok(world.cluster.kubectl(&logs, "")?.contains("ghost-0"))
        })?;
        ensure!(
            world.weir(&agent, &["status"])?.contains("ready"),
            "the agent of {} is not ready",
            agent.node
        );
    }
    for name in ["broken-slice", "ghost-0"] {
        world.cluster.wait(&format!("an event on {name}"), PATIENCE, || {
            let events = world.cluster.get(&["events", "--all-namespaces"])?;
            let mut events = events["items"].as_array().into_iter().flatten();
            Ok(events.any(|event| {
                event["involvedObject"]["name"] == *name && event["reportingComponent"] == "weir-operator"
            }))
        })?;
    }
    let mut rows = Vec::new();
    for address in world.service("e2e", "server")? {
        let to = std::net::SocketAddr::new(address, 80);
        rows.push(Row { from: clients[0].clone(), via: Via::Http, to, is_allowed: true });
    }
    for server in &servers {
        rows.extend(both(&clients[1], Via::Http, server, PORT, true));
    }
    world.expect(&rows)?;
    world.cluster.kubectl(&["delete", "--filename", "-"], MALFORMED).map(drop)
}

/// Pods, policies and Services of a namespace: nothing of them stays in an agent or on a node.
pub fn namespaces_go_with_all_they_hold(world: &mut World) -> Result<()> {
    world.cluster.apply(GONE)?;
    world.rollout("gone", "daemonset/server")?;
    let agents = world.pods("weir-system", AGENTS)?;
    let mentions = |world: &World, agent: &Pod| -> Result<Vec<String>> {
        let mut found = Vec::new();
        for kind in ["endpoint", "policy", "service"] {
            let listed = world.weir(agent, &[kind, "list"])?;
            if listed.split_whitespace().any(|word| word.contains("gone/")) {
                found.push(kind.to_owned());
            }
        }
        Ok(found)
    };
    for agent in &agents {
        world.cluster.wait(&format!("all of gone/ on {}", agent.node), PATIENCE, || {
            Ok(mentions(world, agent)?.len() == 3)
        })?;
    }
    world.cluster.kubectl(&["delete", "namespace", "gone"], "")?;
    for agent in &agents {
        world.cluster.wait(&format!("nothing of gone/ on {}", agent.node), PATIENCE, || {
            Ok(mentions(world, agent)?.is_empty())
        })?;
    }
    no_device_is_left(world)
}

/// Every node has as many devices of pods as pods.
pub fn no_device_is_left(world: &World) -> Result<()> {
    for agent in world.pods("weir-system", AGENTS)? {
        let node = world.cluster.nodes().iter().find(|node| node.name() == agent.node).context("a node")?;
        world.cluster.wait(&format!("as many devices as pods on {}", agent.node), PATIENCE, || {
            let devices = node.space().ip("-oneline link show type veth")?;
            // `weir_...` are the node's own: the tunnel, the pair on which fragments wait.
            let is_of_pod = |line: &&str| line.contains(": weir") && !line.contains(": weir_");
            let devices = devices.lines().filter(is_of_pod).count();
            let endpoints = world.weir(&agent, &["endpoint", "list", "-o", "json"])?;
            let endpoints: Value = serde_json::from_str(&endpoints)?;
            let endpoints = endpoints.as_array().context("a list of endpoints")?.len();
            let on_node = format!("spec.nodeName={}", agent.node);
            let list = world.cluster.get(&["pods", "--all-namespaces", "--field-selector", &on_node])?;
            let own = |pod: &&Value| pod["spec"]["hostNetwork"] != true;
            let pods = list["items"].as_array().into_iter().flatten().filter(own).count();
            if devices != pods || endpoints != pods {
                bail!("{}: {devices} devices, {endpoints} endpoints, {pods} pods", agent.node);
            }
            Ok(true)
        })?;
    }
    Ok(())
}

/// The token of one node's agent, stolen: what can be done with it.
pub fn agents_write_their_own_objects_only(world: &mut World) -> Result<()> {
    let agents = world.pods("weir-system", AGENTS)?;
    let token = world.cluster.kubectl(
        &[
            "--namespace",
            "weir-system",
            "create",
            "token",
            "weir-agent",
            "--bound-object-kind=Pod",
            &format!("--bound-object-name={}", agents[0].name),
        ],
        "",
    )?;
    let config = fs::read_to_string(world.cluster.kubeconfig())?;
    let mut config: Value = weir::yaml::read(&config)?;
    config["users"][0]["user"] = serde_json::json!({"token": token.trim()});
    let path = world.cluster.directory().join("agent.kubeconfig");
    fs::write(&path, weir::yaml::write(&config)?)?;
    let thief = |arguments: &[&str], input: &str| -> Result<String> {
        let mut kubectl = world.cluster.command(world.cluster.programs().join("bin/kubectl"));
        kubectl.env("KUBECONFIG", &path).args(arguments);
        output_of(&mut kubectl, input)
    };
    let objects = world.cluster.get(&["nodeendpoints.weir.dev"])?;
    let patch = r#"{"metadata":{"labels":{"stolen":"yes"}}}"#;
    for object in objects["items"].as_array().into_iter().flatten() {
        let (name, node) = (object["metadata"]["name"].as_str().context("a name")?, &object["spec"]["node"]);
        let changed = thief(
            &["patch", "nodeendpoints.weir.dev", name, "--type=merge", "--dry-run=server", "--patch", patch],
            "",
        );
        match (*node == agents[0].node.as_str(), changed) {
            (true, Ok(_)) => {}
            (false, Err(error)) if format!("{error:#}").contains("endpoints only") => {}
            (_, changed) => bail!("{} changing {name}: {}", agents[0].node, changed.is_ok()),
        }
    }
    for forbidden in [
        &["get", "secrets", "--all-namespaces"][..],
        &["create", "--namespace", "e2e", "configmap", "stolen"],
        &["delete", "pod", "--namespace", "e2e", "--all", "--dry-run=server"],
        &["run", "--namespace", "e2e", "stolen", "--image=stolen", "--dry-run=server"],
        &["delete", "identities.weir.dev", "--all", "--dry-run=server"],
    ] {
        match thief(forbidden, "") {
            Err(error) if format!("{error:#}").to_lowercase().contains("forbidden") => {}
            Err(error) => return Err(error.context(format!("an agent's token: {forbidden:?}"))),
            Ok(answer) => bail!("an agent's token may {forbidden:?}: {answer}"),
        }
    }
    Ok(())
}

/// What a Prometheus that scrapes both has to answer.
const QUERIES: [&str; 4] = [
    "up{job=\"weir\"}==1",
    "count({__name__=~\"weir_.*\",job=\"weir\"})>10",
    "up{job=\"weir-operator\"}==1",
    "count({__name__=~\"weir_operator_.*\",job=\"weir-operator\"})>2",
];

/// A Prometheus scrapes an agent and the operator; the metrics of all of them are well formed.
pub fn numbers_in_a_real_prometheus(world: &mut World) -> Result<()> {
    let agents: BTreeSet<String> =
        world.pods("weir-system", AGENTS)?.into_iter().map(|agent| agent.node).collect();
    ensure!(agents.len() == 3, "agents on {agents:?}");
    let operator = world.pods("weir-system", OPERATORS)?.swap_remove(0);
    let node = world.cluster.nodes().iter().find(|node| node.name() == operator.node);
    let node = node.with_context(|| format!("the operator's node {}", operator.node))?;
    let agents_metrics = world.cluster.nodes().iter().map(|node| (node, crate::lab::METRICS));
    for (node, address) in agents_metrics.chain([(node, OPERATOR_METRICS)]) {
        let (status, metrics) = node.space().http_get(address.parse()?, "/metrics")?;
        ensure!(status == 200, "{address} on {} answers {status}", node.name());
        output_of(Command::new("promtool").args(["check", "metrics"]), &metrics)
            .with_context(|| format!("checking the metrics of {address} on {}", node.name()))?;
    }
    let directory = world.cluster.directory().join("prometheus");
    fs::create_dir_all(&directory)?;
    let agent = crate::lab::METRICS;
    let config = format!(
        "global: {{scrape_interval: 1s}}
scrape_configs:
- {{job_name: weir, static_configs: [{{targets: [\"{agent}\"]}}]}}
- {{job_name: weir-operator, static_configs: [{{targets: [\"{OPERATOR_METRICS}\"]}}]}}
"
    );
    fs::write(directory.join("prometheus.yml"), config)?;
    let mut prometheus = Command::new("prometheus");
    prometheus.arg("--config.file=prometheus.yml").arg("--storage.tsdb.path=data");
    prometheus.arg("--web.listen-address=127.0.0.1:9090").current_dir(&directory).stdin(Stdio::null());
    let log = directory.join("log");
    let daemon = Daemon::start(node.space(), world.cluster.name(), "prometheus", prometheus, &log)?;
    for query in QUERIES {
        let encoded: String = query.bytes().map(|byte| format!("%{byte:02x}")).collect();
        world.cluster.wait(&format!("an answer of Prometheus to {query}"), PATIENCE, || {
            let (_, answer) = node
                .space()
                .http_get("127.0.0.1:9090".parse()?, &format!("/api/v1/query?query={encoded}"))?;
            Ok(answer.contains("\"value\":"))
        })?;
    }
    daemon.kill()
}
