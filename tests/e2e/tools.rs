//! What people run against a cluster from where their kubectl is: `weir connectivity test`,
//! `weir status --cluster`, `weir sysdump`.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::lab::{binary, output_of};
use crate::world::{PATIENCE, PORT, World, outside};

/// Everything is tried, the outside host too, and nothing fails or is left behind.
pub fn connectivity_test_of_everything(world: &mut World) -> Result<()> {
    all_connections(world, true).map(drop)
}

/// The same, and how many checks passed; IPv6 only where the cluster has it.
pub fn all_connections(world: &World, has_ipv6: bool) -> Result<usize> {
    let mut test = world.cluster.command(binary("weir")?);
    test.args(["connectivity", "test", "--all-nodes", "--output", "json"]);
    for address in outside(PORT).into_iter().filter(|address| has_ipv6 || address.is_ipv4()) {
        test.args(["--external", &address.to_string()]);
    }
    let output = test.output()?;
    let report: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("no report: {}", String::from_utf8_lossy(&output.stderr)))?;
    let checks = report["checks"].as_array().context("a report without checks")?;
    let (skipped, checks): (Vec<_>, Vec<_>) = checks.iter().partition(|check| check["verdict"] == "skipped");
    let are_families = skipped.iter().all(|check| check["test"] == "all" && check["family"] == "IPv6");
    ensure!(skipped.len() == usize::from(!has_ipv6) && are_families, "skipped: {skipped:?}");
    let wrong: Vec<String> =
        checks.iter().filter(|check| check["verdict"] != "passed").map(|check| check.to_string()).collect();
    ensure!(wrong.is_empty(), "not passed:\n{}", wrong.join("\n"));
    ensure!(output.status.success(), "all passed, and the exit code is {}", output.status);
    let tried: BTreeSet<(&str, &str)> = checks
        .iter()
        .filter_map(|check| Some((check["test"].as_str()?, check["family"].as_str()?)))
        .collect();
    for test in
        ["pod to pod", "pod to service", "pod to node", "node to pod", "outside", "DNS", "policy denies"]
    {
        for (family, is_wanted) in [("IPv4", true), ("IPv6", has_ipv6)] {
            let is_tried = tried.contains(&(test, family));
            ensure!(is_tried == is_wanted, "{test} by {family}: tried is {is_tried}: {tried:?}");
        }
    }
    let namespaces = world.cluster.kubectl(&["get", "namespaces", "--output", "name"], "")?;
    ensure!(!namespaces.contains("weir-connectivity"), "left behind: {namespaces}");
    Ok(checks.len())
}

/// Every node, the operator and its replicas.
pub fn status_of_the_cluster(world: &mut World) -> Result<()> {
    status_of_the_cluster_is_ready(world)
}

/// The same, of a cluster of any size.
pub fn status_of_the_cluster_is_ready(world: &World) -> Result<()> {
    let mut status = world.cluster.command(binary("weir")?);
    let written = output_of(status.args(["status", "--cluster", "--output", "json"]), "")?;
    let status: Value = serde_json::from_str(&written)?;
    ensure!(status["is_ready"] == true, "not ready: {written}");
    let nodes = status["nodes"].as_array().context("a status without nodes")?;
    let all = world.cluster.nodes().len();
    ensure!(nodes.len() == all && nodes.iter().all(|node| node["is_ready"] == true), "nodes: {written}");
    Ok(())
}

/// The relay that is deployed has every node connected, by certificates that the operator made, and tells flows.
pub fn the_relay_has_every_node(world: &mut World) -> Result<()> {
    let all = world.cluster.nodes().len();
    let relays = world.pods("weir-system", "app.kubernetes.io/name=hubble-relay")?;
    let relay = relays.first().context("there is no pod of the relay")?;
    // Not by the Service: this process is in no cgroup of the node, whose sockets alone are translated.
    let page = relay.at(true, 4246);
    let asked = |path: &'static str| {
        let answer = world.cluster.node(1).space().http_get(page, path);
        answer.with_context(|| format!("asking the relay for {path}"))
    };
    let mut said = String::new();
    let connected = world.cluster.wait("every node connected to the relay", PATIENCE, || {
        said = asked("/api/status")?.1;
        let status: Value = serde_json::from_str(&said)?;
        let nodes = status["nodes"].as_array().into_iter().flatten();
        Ok(nodes.filter(|node| node["state"] == "NODE_CONNECTED").count() == all)
    });
    connected.with_context(|| format!("the relay said: {said}"))?;
    let (status, flows) = asked("/api/flows?last=5")?;
    ensure!(status == 200 && flows.contains("\"node_name\""), "{status}: {flows}");
    Ok(())
}

const STATUS_ONLY: &str = "
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: status-only, namespace: weir-system}
spec:
  endpointSelector: {matchLabels: {k8s-app: hubble-relay}}
  ingress:
  - fromEntities: [all]
    toPorts:
    - ports: [{port: '4246', protocol: TCP}]
      rules: {http: [{method: GET, path: /api/status}]}
";

/// Of the relay's page a policy lets `GET /api/status` through and nothing else, until the policy goes.
pub fn http_requests_that_a_policy_names(world: &mut World) -> Result<()> {
    let relays = world.pods("weir-system", "app.kubernetes.io/name=hubble-relay")?;
    let relay = relays.first().context("there is no pod of the relay")?;
    let page = relay.at(true, 4246);
    // A pod's own node may always ask the pod.
    let number = (1..=world.cluster.nodes().len()).find(|number| relay.node != format!("node{number}"));
    let space = world.cluster.node(number.context("no node but the relay's")?).space();
    let code = |path: &str| space.http_get(page, path).map(|(code, _)| code);
    world.cluster.apply(STATUS_ONLY)?;
    let expect = |what: &str, flows: u16| {
        world.cluster.wait(what, PATIENCE, || {
            Ok(code("/api/status").ok() == Some(200) && code("/api/flows?last=1").ok() == Some(flows))
        })
    };
    let is_judged = expect("only GET /api/status to be answered", 403);
    let deleted = world.cluster.kubectl(&["delete", "--filename", "-"], STATUS_ONLY);
    is_judged?;
    deleted?;
    expect("everything to be answered again", 200)
}

const SECRET: &str = "
apiVersion: v1
kind: Secret
metadata: {name: sysdump, namespace: e2e}
stringData: {password: nobody-may-read-this}
";

/// Objects, agents, flows and logs, and no Secret.
pub fn sysdump_without_secrets(world: &mut World) -> Result<()> {
    world.cluster.apply(SECRET)?;
    let archive = world.cluster.directory().join("sysdump.tar.gz");
    let mut sysdump = world.cluster.command(binary("weir")?);
    output_of(sysdump.args(["sysdump", "--file"]).arg(&archive), "")?;
    world.cluster.kubectl(&["--namespace", "e2e", "delete", "secret", "sysdump"], "")?;
    let mut tar = world.cluster.command("tar");
    let names = output_of(tar.arg("-tzf").arg(&archive), "")?;
    for wanted in ["status", "flows", "log"] {
        ensure!(names.contains(wanted), "nothing of {wanted}: {names}");
    }
    let mut tar = world.cluster.command("tar");
    let contents = tar.arg("-xzOf").arg(&archive).output()?;
    ensure!(contents.status.success(), "tar: {}", String::from_utf8_lossy(&contents.stderr));
    let text = String::from_utf8_lossy(&contents.stdout);
    ensure!(text.contains("weir-agent"), "nothing of the agents");
    // As it was written and as the API has it.
    for form in ["nobody-may-read-this", "bm9ib2R5LW1heS1yZWFkLXRoaXM="] {
        ensure!(!text.contains(form), "the archive has a Secret's {form}");
    }
    Ok(())
}
