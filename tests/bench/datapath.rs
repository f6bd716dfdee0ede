//! The suite `datapath`: what a packet, a connection, a pod and an agent cost.

use std::fs;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};

use crate::from_pod;
use crate::lab::{Lab, Pod, Setup};
use crate::load::{self, Load, LoadServer, Path, measure, median, pin};
use crate::reference::{OtherPlugin, Reference};
use crate::row::Row;

/// Pods of the rows about a node that is not empty.
const PODS: usize = 50;

/// Between two pods that do not come at once.
const BETWEEN_PODS: std::time::Duration = std::time::Duration::from_millis(100);

/// Both ends are selected, both directions are enforced, and every packet is allowed.
const POLICY: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: bench, namespace: bench}
spec:
  podSelector: {}
  policyTypes: [Ingress, Egress]
  ingress: [{from: [{podSelector: {matchLabels: {role: bench}}}]}]
  egress: [{to: [{podSelector: {matchLabels: {role: bench}}}]}]
";

const SECTIONS: [crate::Section; 8] = [
    ("from_pod", "from_pod/established/ipv4", || Ok(from_pod::run())),
    ("same_node", "tcp_rr/same_node/vs_direct", same_node),
    ("two_nodes_vxlan", "tcp_rr/two_nodes_vxlan/vs_kernel_vxlan", || {
        two_nodes("tunnel", "two_nodes_vxlan", "kernel_vxlan")
    }),
    ("two_nodes_native", "tcp_rr/two_nodes_native/vs_routed", || {
        two_nodes("native", "two_nodes_native", "routed")
    }),
    ("collect", "collect/connection/live", crate::collect::run),
    ("agent", "agent/ready_seconds", agent),
    ("cni", "cni/add_p50/vs_ptp", cni_add),
    ("verify", "verify/from_pod/instructions", verified),
];

/// Measures every row, or those of the section that `ONLY` names; what cannot be measured is a row that says why.
pub fn rows() -> Result<Vec<Row>> {
    pin()?;
    crate::measure_sections("datapath", &SECTIONS)
}

/// A pair of pods that may talk to each other because a policy says so.
struct Pair {
    client: Pod,
    server: Pod,
    _lab: Lab,
}

impl Pair {
    fn start(nodes: usize, routing: &str, agent_arguments: &[&str]) -> Result<Self> {
        let agent_arguments = agent_arguments.iter().map(|argument| (*argument).to_owned()).collect();
        let lab =
            Lab::start(Setup { nodes, routing: routing.to_owned(), agent_arguments, ..Setup::default() })?;
        lab.manifests().apply(POLICY)?;
        let client = lab.pod(1, "bench/client").label("role", "bench").create()?;
        let server = lab.pod(nodes, "bench/server").label("role", "bench").create()?;
        Ok(Self { client, server, _lab: lab })
    }

    fn path(&self, name: &'static str) -> Path<'_> {
        Path {
            name,
            client: self.client.space(),
            server: self.server.space(),
            target: self.server.address(true),
            port: load::ECHO_PORT,
        }
    }
}

fn path<'a>(name: &'static str, reference: &'a Reference) -> Path<'a> {
    let (client, server) = (&reference.client, &reference.server);
    Path { name, client, server, target: reference.address, port: load::ECHO_PORT }
}

fn same_node() -> Result<Vec<Row>> {
    let weir = Pair::start(1, "tunnel", &[])?;
    let silent = Pair::start(1, "tunnel", &["--flow-events", "false"])?;
    let prefix = format!("weirlab-{}-ref", std::process::id());
    let directory = std::path::PathBuf::from(format!("/tmp/{prefix}"));
    let (direct, again) =
        (Reference::direct(&format!("{prefix}-d"))?, Reference::direct(&format!("{prefix}-a"))?);
    let routed = Reference::routed(&format!("{prefix}-r"))?;
    let redirect = Reference::redirecting(&format!("{prefix}-e"), &directory)?;
    let bridge = Reference::bridge(&format!("{prefix}-b"), &directory);
    let mut paths = vec![
        path("direct", &direct),
        path("again", &again),
        path("routed", &routed),
        path("empty_redirect", &redirect),
        weir.path("weir"),
        silent.path("silent"),
    ];
    if let Ok(bridge) = &bridge {
        paths.push(path("bridge", bridge));
    }
    let _servers: Vec<LoadServer> = paths.iter().map(LoadServer::start).collect::<Result<_>>()?;
    let mut rows = Vec::new();
    for load in Load::ALL {
        let samples = measure(load, &paths)?;
        let noise = (samples.ratio("again", &["direct"]) - 1.0).abs();
        let row = |path: &str, other: &str, name: String| {
            let alike = if other == "direct" { &["direct", "again"][..] } else { &[other] };
            Row::new(format!("{}/{name}", load.name()), load.unit(), samples.median(path))
                .against(samples.median(other), Some(samples.ratio(path, alike)))
                .noise(noise)
        };
        let aim = match load {
            Load::Transactions => 0.95,
            Load::Connections => 0.91,
            Load::Stream => 0.98,
        };
        rows.push(row("weir", "direct", "same_node/vs_direct".to_owned()).at_least(aim));
        rows.push(row("weir", "routed", "same_node/vs_routed".to_owned()));
        match &bridge {
            Ok(_) => rows.push(row("weir", "bridge", "same_node/vs_bridge".to_owned())),
            Err(error) => {
                let name = format!("{}/same_node/vs_bridge", load.name());
                rows.push(Row::skipped(name, load.unit(), format!("{error:#}")));
            }
        }
        rows.push(row("weir", "silent", "same_node/flows_on_vs_off".to_owned()).at_least(0.98));
        rows.push(row("weir", "empty_redirect", "same_node/vs_empty_redirect".to_owned()));
        rows.push(row("empty_redirect", "direct", "empty_redirect/vs_direct".to_owned()));
        rows.push(row("routed", "direct", "routed/vs_direct".to_owned()));
    }
    fs::remove_dir_all(&directory).or_else(|error| match error.kind() {
        std::io::ErrorKind::NotFound => Ok(()),
        _ => Err(error),
    })?;
    Ok(rows)
}

/// Two pods of one node, with flows and without.
pub fn flows_on_and_off() -> Result<Vec<Row>> {
    let on = Pair::start(1, "tunnel", &[])?;
    let (off, again) = (
        Pair::start(1, "tunnel", &["--flow-events", "false"])?,
        Pair::start(1, "tunnel", &["--flow-events", "false"])?,
    );
    let paths = [on.path("on"), off.path("off"), again.path("again")];
    let _servers: Vec<LoadServer> = paths.iter().map(LoadServer::start).collect::<Result<_>>()?;
    let mut rows = Vec::new();
    for load in [Load::Transactions, Load::Connections] {
        let samples = measure(load, &paths)?;
        rows.push(
            Row::new(format!("flow/{}/on_vs_off", load.name()), load.unit(), samples.median("on"))
                .against(samples.median("off"), Some(samples.ratio("on", &["off", "again"])))
                .noise((samples.ratio("again", &["off"]) - 1.0).abs())
                .at_least(0.98),
        );
    }
    Ok(rows)
}

fn two_nodes(routing: &str, case: &str, against: &'static str) -> Result<Vec<Row>> {
    let weir = Pair::start(2, routing, &[])?;
    let prefix = format!("weirlab-{}-ref-{against}", std::process::id());
    let kernel = Reference::two_nodes(&format!("{prefix}-k"), routing == "tunnel")?;
    let again = Reference::two_nodes(&format!("{prefix}-a"), routing == "tunnel")?;
    let paths = [path("kernel", &kernel), path("again", &again), weir.path("weir")];
    let _servers: Vec<LoadServer> = paths.iter().map(LoadServer::start).collect::<Result<_>>()?;
    let mut rows = Vec::new();
    for load in Load::ALL {
        let samples = measure(load, &paths)?;
        rows.push(
            Row::new(format!("{}/{case}/vs_{against}", load.name()), load.unit(), samples.median("weir"))
                .against(samples.median("kernel"), Some(samples.ratio("weir", &["kernel", "again"])))
                .noise((samples.ratio("again", &["kernel"]) - 1.0).abs())
                .at_least(1.0),
        );
    }
    Ok(rows)
}

fn agent() -> Result<Vec<Row>> {
    let lab = Lab::start(Setup::default())?;
    let node = lab.node(1);
    let ready = || -> Result<f64> {
        let mut seconds = Vec::new();
        for _ in 0..5 {
            node.kill_agent()?;
            let began = Instant::now();
            node.start_agent()?;
            node.wait_ready()?;
            seconds.push(began.elapsed().as_secs_f64());
        }
        Ok(median(seconds))
    };
    let empty = ready()?;
    let mut pods = Vec::new();
    for number in 0..PODS {
        pods.push(lab.pod(1, &format!("bench/pod{number}")).label("role", "bench").create()?);
    }
    lab.manifests().apply(POLICY)?;
    let full = ready()?;
    let pid = node.agent_pid().context("the agent runs")?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
    let kib: f64 = resident.trim().trim_end_matches(" kB").parse()?;
    Ok(vec![
        Row::new("agent/ready_seconds/empty", "s", empty).at_most(1.0),
        Row::new(format!("agent/ready_seconds/{PODS}_pods"), "s", full).at_most(1.0),
        Row::new("agent/rss_mib", "MiB", kib / 1024.0).at_most(30.0),
    ])
}

fn cni_add() -> Result<Vec<Row>> {
    let lab = Lab::start(Setup::default())?;
    let directory = lab.directory().join("ptp");
    let plugin = OtherPlugin::ptp(&directory);
    let node = crate::lab::Space::create(&format!("{}-ptp", lab.name()), None)?;
    let (mut ours, mut theirs, mut pods, mut others) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for number in 0..PODS {
        // One pod now and then, as most pods come: both have done what they do after a pod.
        std::thread::sleep(BETWEEN_PODS);
        let pod = lab.pod(1, &format!("bench/pod{number}"));
        pod.write_manifest()?;
        let pod = pod.create()?;
        ours.push(pod.add_took().as_secs_f64() * 1e3);
        pods.push(pod);
        std::thread::sleep(BETWEEN_PODS);
        let other = crate::lab::Space::create(&format!("{}-ptp{number}", lab.name()), None)?;
        theirs.push(plugin.add(&node, &other)?.1.as_secs_f64() * 1e3);
        others.push(other);
    }
    let (ours, theirs) = (load::median(ours), load::median(theirs));
    Ok(vec![Row::new("cni/add_p50/vs_ptp", "ms", ours).against(theirs, None).at_most(1.5)])
}

/// What the verifier needs for each program; above 200,000 a program is too large to trust to other kernels.
fn verified() -> Result<Vec<Row>> {
    let mut weir = Command::new(crate::lab::binary("weir")?);
    weir.args(["verify", "-o", "json"]);
    let written = crate::lab::output_of(&mut weir, "")?;
    let programs: Vec<serde_json::Value> = serde_json::from_str(&written)?;
    let row = |program: &serde_json::Value| {
        let name = program["program"].as_str().context("a program without name")?;
        let instructions =
            program["verified_instructions"].as_f64().context("a program without instructions")?;
        Ok(Row::new(format!("verify/{name}/instructions"), "instructions", instructions).at_most(200_000.0))
    };
    programs.iter().map(row).collect()
}
