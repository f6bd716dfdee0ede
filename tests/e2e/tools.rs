//! What people run against a cluster from where their kubectl is: `weir connectivity test`,
//! `weir status --cluster`, `weir sysdump`.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::lab::{binary, output_of};
use crate::world::{PORT, World, outside};

/// Everything is tried, the outside host too, and nothing fails or is left behind.
pub fn connectivity_test_of_everything(world: &mut World) -> Result<()> {
    let mut test = world.cluster.command(binary("weir")?);
    test.args(["connectivity", "test", "--all-nodes", "--json"]);
    for address in outside(PORT) {
        test.args(["--external", &address.to_string()]);
    }
    let output = test.output()?;
    let report: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("no report: {}", String::from_utf8_lossy(&output.stderr)))?;
    let checks = report["checks"].as_array().context("a report without checks")?;
    let wrong: Vec<String> =
        checks.iter().filter(|check| check["verdict"] != "passed").map(Value::to_string).collect();
    ensure!(wrong.is_empty(), "not passed:\n{}", wrong.join("\n"));
    ensure!(output.status.success(), "all passed, and the exit code is {}", output.status);
    let tried: BTreeSet<(&str, &str)> = checks
        .iter()
        .filter_map(|check| Some((check["test"].as_str()?, check["family"].as_str()?)))
        .collect();
    for test in
        ["pod to pod", "pod to service", "pod to node", "node to pod", "outside", "DNS", "policy denies"]
    {
        for family in ["IPv4", "IPv6"] {
            ensure!(tried.contains(&(test, family)), "{test} by {family} was not tried: {tried:?}");
        }
    }
    let namespaces = world.cluster.kubectl(&["get", "namespaces", "--output", "name"], "")?;
    ensure!(!namespaces.contains("weir-connectivity"), "left behind: {namespaces}");
    Ok(())
}

/// Every node, the operator and its replicas.
pub fn status_of_the_cluster(world: &mut World) -> Result<()> {
    let mut status = world.cluster.command(binary("weir")?);
    let written = output_of(status.args(["status", "--cluster", "--output", "json"]), "")?;
    let status: Value = serde_json::from_str(&written)?;
    ensure!(status["is_ready"] == true, "not ready: {written}");
    let nodes = status["nodes"].as_array().context("a status without nodes")?;
    ensure!(nodes.len() == 3 && nodes.iter().all(|node| node["is_ready"] == true), "nodes: {written}");
    Ok(())
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
