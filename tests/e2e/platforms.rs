//! Nodes laid out like each platform's, and its overlay on them: deployed, tried, taken away (`make platforms`).

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::kubernetes::platform::Facts;
use crate::kubernetes::{Cluster, Node, Platform, Setup};
use crate::lab::{self, output_of};
use crate::tools;
use crate::world::{NoCluster, PATIENCE, Pod, World};

const CONFIGURATIONS: &str = "/etc/cni/net.d";
const OWN_CONFIGURATION: &str = "05-weir.conflist";
const DISABLED: &str = ".weir-disabled";
const TAINT: &str = "node.weir.dev";
const DNS: &str = "k8s-app=kube-dns";
/// What VXLAN adds between nodes that know one another by IPv4.
const TUNNEL_HEADER: u32 = 50;

/// Tries all whose names are wanted, one after the other; true if everything was right.
pub fn run(is_wanted: impl Fn(&str) -> bool) -> Result<bool> {
    lab::cgroup::of_process()?;
    let mut is_right = true;
    for (index, platform) in Platform::ALL.into_iter().enumerate() {
        if !is_wanted(platform.facts().overlay) {
            continue;
        }
        let name = format!("weirlab-{}-{}", std::process::id(), index + 1);
        // As a step of the end-to-end tests, a platform that failed is tried once more.
        if !report_on(&name, platform)? && !report_on(&name, platform)? {
            println!("FAILED twice: {platform}");
            is_right = false;
        }
    }
    Ok(is_right)
}

/// Tries one and prints what came of it; an error where there is no cluster at all.
fn report_on(name: &str, platform: Platform) -> Result<bool> {
    let began = Instant::now();
    let ended = try_on(name, platform);
    let took = began.elapsed().as_secs_f32();
    match ended {
        Err(error) if error.is::<NoCluster>() => Err(error),
        Ok(checks) => {
            println!("ok      {platform:<10} {checks:3} connections tried {took:5.0} s");
            Ok(true)
        }
        Err(error) => {
            println!("FAILED  {platform:<10} {took:5.0} s\n        {error:#}");
            Ok(false)
        }
    }
}

/// How many checks of the connectivity test passed.
fn try_on(name: &str, platform: Platform) -> Result<usize> {
    let facts = platform.facts();
    let setup = Setup { nodes: 2, platform, has_controllers: true };
    let world = World { cluster: Cluster::start(name, &setup).context(NoCluster)? };
    world.start_outside()?;
    let ended = deploy_and_undeploy(&world, facts);
    if ended.is_err() {
        world.explain();
    }
    ended
}

fn deploy_and_undeploy(world: &World, facts: &Facts) -> Result<usize> {
    others_are_in_force(world, facts)?;
    let before = files_of_nodes(world, facts)?;
    let told = world.script("scripts/deploy", &["up"])?;
    replace_strangers(world, facts, &told)?;
    world.rollout("kube-system", "deployment/coredns")?;
    ours_is_in_force(world, facts, &before)?;
    pods_have_what_they_should(world, facts)?;
    tools::status_of_the_cluster_is_ready(world)?;
    let checks = tools::all_connections(world, facts.has_ipv6)?;
    world.script("scripts/deploy", &["down"])?;
    let after = files_of_nodes(world, facts)?;
    ensure!(after == before, "undeployed, there is {:?}, not {:?}", names(&after), names(&before));
    Ok(checks)
}

/// What the platform has instead of Weir works: else nothing would show that Weir takes over.
fn others_are_in_force(world: &World, facts: &Facts) -> Result<()> {
    if facts.limits_critical_pods {
        let critical = r#"{"spec": {"priorityClassName": "system-node-critical"}}"#;
        let run = ["run", "critical", "--image=none", "--overrides", critical, "--dry-run=server"];
        let refused = world.cluster.kubectl(&run, "").err().context("a critical pod without a quota")?;
        ensure!(format!("{refused:#}").contains("insufficient quota"), "another refusal: {refused:#}");
    }
    if facts.configuration.is_some() || facts.configuration_template.is_some() {
        let wait = ["wait", "--for=condition=Ready", "nodes", "--all", "--timeout=60s"];
        world.cluster.kubectl(&wait, "").context("nodes with another network")?;
    }
    if facts.configuration_template.is_some() {
        world.rollout("kube-system", "deployment/coredns").context("pods of another network")?;
    }
    if facts.has_kube_proxy {
        for node in world.cluster.nodes() {
            world.cluster.wait(&format!("rules of kube-proxy on {}", node.name()), PATIENCE, || {
                let rules = node.space().command(Command::new("iptables-save"), "")?;
                Ok(rules.contains("-d 10.96.0.1/32") && rules.contains("KUBE-SVC"))
            })?;
        }
    }
    Ok(())
}

/// Carries out what `make deploy` says about pods that another network has connected.
fn replace_strangers(world: &World, facts: &Facts, told: &str) -> Result<()> {
    let commands: Vec<&str> =
        told.lines().filter_map(|line| line.trim().strip_prefix("kubectl delete pod ")).collect();
    ensure!(
        commands.is_empty() == facts.configuration_template.is_none(),
        "pods of another network: {commands:?}"
    );
    for command in commands {
        let arguments: Vec<&str> = ["delete", "pod"].into_iter().chain(command.split(' ')).collect();
        world.cluster.kubectl(&arguments, "")?;
    }
    Ok(())
}

/// On each node: the plugin where containerd looks and nowhere else, our configuration alone, no taint.
fn ours_is_in_force(world: &World, facts: &Facts, before: &Files) -> Result<()> {
    let during = files_of_nodes(world, facts)?;
    for node in world.cluster.nodes() {
        let at = |path: &str| format!("{} {path}", node.name());
        let mut wanted: Vec<String> = vec![at(&format!("{CONFIGURATIONS}/{OWN_CONFIGURATION}"))];
        for file in before.keys().filter(|file| file.starts_with(&at(CONFIGURATIONS))) {
            wanted.push(format!("{file}{DISABLED}"));
        }
        wanted.push(at(&format!("{}/weir-cni", facts.plugin_directory)));
        wanted.extend(facts.plugins.iter().map(|plugin| at(&format!("{}/{plugin}", facts.plugin_directory))));
        if !facts.plugins.contains(&"loopback") {
            wanted.push(at(&format!("{}/loopback", facts.plugin_directory)));
        }
        wanted.sort();
        let found: Vec<&String> = during.keys().filter(|file| file.starts_with(&at(""))).collect();
        ensure!(found == wanted.iter().collect::<Vec<_>>(), "there is {found:?}, not {wanted:?}");
        let mut object = Value::Null;
        world.cluster.wait(&format!("{} without the taint", node.name()), PATIENCE, || {
            object = world.cluster.get(&["node", node.name()])?;
            Ok(!object["spec"]["taints"].to_string().contains(TAINT))
        })?;
        let gives = object["spec"]["podCIDRs"].is_array();
        ensure!(gives == facts.gives_pod_cidrs, "{} has {}", node.name(), object["spec"]["podCIDRs"]);
    }
    Ok(())
}

/// The pods of cluster DNS: `lo` up, the MTU of the nodes less the tunnel, addresses of their node's range.
fn pods_have_what_they_should(world: &World, facts: &Facts) -> Result<()> {
    for pod in world.pods("kube-system", DNS)? {
        let devices = devices_of(&pod)?;
        let device = |name: &str| -> Result<Value> {
            let mut devices = devices.as_array().into_iter().flatten();
            devices.find(|device| device["ifname"] == name).cloned().with_context(|| format!("no {name}"))
        };
        let lo = device("lo")?;
        let is_up = lo["flags"].as_array().into_iter().flatten().any(|flag| flag == "UP");
        ensure!(is_up, "lo of {}: {lo}", pod.name);
        let mtu = device("eth0")?["mtu"].clone();
        ensure!(mtu == facts.mtu - TUNNEL_HEADER, "{} has an MTU of {mtu}", pod.name);
        ensure!(pod.addresses.len() == if facts.has_ipv6 { 2 } else { 1 }, "{:?}", pod.addresses);
        let given = world.cluster.get(&["weirnodes", &pod.node])?;
        let given = given["spec"]["podCIDRs"].as_array().map_or(0, Vec::len);
        ensure!((given > 0) != facts.gives_pod_cidrs, "the operator gave {} {given} pod CIDRs", pod.node);
    }
    Ok(())
}

fn devices_of(pod: &Pod) -> Result<Value> {
    let mut ip = Command::new("nsenter");
    ip.args(["--target", &pod.process()?.to_string(), "--net", "ip", "-json", "link", "show"]);
    Ok(serde_json::from_str(&output_of(&mut ip, "")?)?)
}

/// Files by `NODE PATH`, with what is in them.
type Files = BTreeMap<String, Vec<u8>>;

/// The plugins and the network configurations of all nodes, at the platform's and at the usual places.
fn files_of_nodes(world: &World, facts: &Facts) -> Result<Files> {
    let mut files = Files::new();
    for node in world.cluster.nodes() {
        for directory in [CONFIGURATIONS, "/opt/cni/bin", facts.plugin_directory] {
            files.extend(files_in(node, directory)?);
        }
    }
    Ok(files)
}

fn files_in(node: &Node, directory: &str) -> Result<Files> {
    // What a node writes there is in a folder of its own.
    let path = node.directory().join(&directory[1..]);
    let entries = fs::read_dir(&path).with_context(|| format!("listing {}", path.display()))?;
    entries
        .map(|entry| {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            Ok((format!("{} {directory}/{name}", node.name()), fs::read(entry.path())?))
        })
        .collect()
}

fn names(files: &Files) -> Vec<&String> {
    files.keys().collect()
}
