//! An agent that starts in a cluster of many policies and identities: until all of it is in force, and what
//! the agent then takes of memory.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use weir::identity;
use weir::kube::crd::{Endpoint, Identity, IdentitySpec, NodeEndpoints, NodeEndpointsSpec};
use weir::model::{IdentityId, IdentityLabels};

use super::compile::labels;
use crate::cluster::world::{agent, memory};
use crate::lab::{Lab, Node, Setup};
use crate::load::median;
use crate::row::Row;

const POLICIES: usize = 5_000;
const IDENTITIES: usize = 10_000;
const NAMESPACES: usize = 100;
/// Other nodes, which have a pod of each identity between them.
const NODES: usize = 200;
/// Pods of this node: each is selected by policies of its own.
const PODS: usize = 20;
const STARTS: usize = 5;
/// For the first time that all of it is read.
const PATIENCE: Duration = Duration::from_secs(120);

/// Measures starts of the agent.
pub fn rows() -> Result<Vec<Row>> {
    let lab = Lab::start(Setup::default())?;
    let node = lab.node(1);
    for number in 0..NAMESPACES {
        lab.manifests().namespace(&namespace(number), &[])?;
    }
    let mut pods = Vec::new();
    for number in 0..PODS {
        let pod = lab.pod(1, &format!("{}/own-{number}", namespace(number)));
        pods.push(pod.label("app", &format!("app-{}", number / NAMESPACES)).create()?);
    }
    let identities = identities();
    write(&lab, "policies", (0..POLICIES).map(|number| Ok(policy(number))))?;
    let objects = identities.iter().enumerate().map(|(number, id)| {
        Ok(serde_json::to_value(Identity::new(&id.to_string(), IdentitySpec::from(&labels_of(number))))?)
    });
    write(&lab, "identities", objects)?;
    for number in 2..2 + NODES {
        let name = format!("other-{number}");
        let addresses: [IpAddr; 1] = [format!("10.201.{}.1", number).parse()?];
        lab.manifests().node(&name, &addresses, &[format!("10.16.{number}.0/24")])?;
    }
    let published = (2..2 + NODES).map(|number| {
        let name = format!("other-{number}-0");
        Ok(serde_json::to_value(NodeEndpoints::new(&name, node_endpoints(number, &identities)))?)
    });
    write(&lab, "endpoints", published)?;
    everything_is_programmed(node)?;
    let mut seconds = Vec::new();
    for _ in 0..STARTS {
        node.kill_agent()?;
        let began = Instant::now();
        node.start_agent()?;
        node.wait_ready()?;
        seconds.push(began.elapsed().as_secs_f64());
    }
    let (peers, rules) = (node.map("policy_peers")?.len(), node.map("policy_rules")?.len());
    ensure!(peers > 0 && rules > 0, "{peers} peers and {rules} rules are in force");
    let process = agent(node)?;
    Ok(vec![
        Row::new("policy/start/enforced_seconds", "s", median(seconds)).at_most(3.0),
        Row::new("policy/start/rss_mib", "MiB", memory(process, "VmRSS:")?),
        Row::new("policy/start/rss_peak_mib", "MiB", memory(process, "VmHWM:")?),
        Row::new("policy/start/rows", "rows", (peers + rules) as f64),
    ])
}

fn everything_is_programmed(node: &Node) -> Result<()> {
    let began = Instant::now();
    while node.map("addresses")?.len() < IDENTITIES {
        ensure!(began.elapsed() < PATIENCE, "fewer addresses than identities after {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}

/// One file of many documents.
fn write(lab: &Lab, name: &str, objects: impl Iterator<Item = Result<Value>>) -> Result<()> {
    let documents = objects.map(|object| Ok(object?.to_string())).collect::<Result<Vec<String>>>()?;
    lab.manifests().write_file(&format!("{name}.yaml"), &documents.join("\n---\n"))
}

fn namespace(number: usize) -> String {
    format!("team-{}", number % NAMESPACES)
}

fn labels_of(number: usize) -> IdentityLabels {
    let namespace = namespace(number);
    let app = number / NAMESPACES;
    IdentityLabels {
        namespace_labels: labels([("kubernetes.io/metadata.name", namespace.clone())]),
        namespace,
        service_account: "default".to_owned(),
        pod_labels: labels([("app", format!("app-{app}")), ("tier", format!("tier-{}", app % 3))]),
        named_ports: Default::default(),
    }
}

/// The number of each, as agents claim them.
fn identities() -> Vec<IdentityId> {
    let mut taken = BTreeSet::new();
    let number = |number| {
        let labels = labels_of(number);
        let free = (0..).map(|attempt| identity::number(&labels, attempt)).find(|id| taken.insert(*id));
        free.expect("there are 2^24 numbers")
    };
    (0..IDENTITIES).map(number).collect()
}

fn node_endpoints(node: usize, identities: &[IdentityId]) -> NodeEndpointsSpec {
    let each = IDENTITIES / NODES;
    let endpoint = |pod: usize| {
        let number = (node - 2) * each + pod;
        Endpoint {
            namespace: namespace(number),
            name: format!("app-{number}"),
            addresses: vec![format!("10.16.{node}.{}", pod + 2)],
            identity: identities[number].0,
            workload: None,
            host_ports: Vec::new(),
        }
    };
    NodeEndpointsSpec {
        node: format!("other-{node}"),
        internal_addresses: Vec::new(),
        endpoints: (0..each).map(endpoint).collect(),
    }
}

/// Each namespace has fifty, for its apps in turn; the first also says what its pods may send.
fn policy(number: usize) -> Value {
    let app = number / NAMESPACES;
    let mut spec = json!({
        "podSelector": {"matchLabels": {"app": format!("app-{app}")}},
        "policyTypes": ["Ingress"],
        "ingress": [
            {"from": [{"podSelector": {"matchLabels": {"tier": "tier-0"}}}],
             "ports": [{"port": 8080}, {"port": 9000, "endPort": 9100}]},
            {"from": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace(number + 1)}}}],
             "ports": [{"port": 9090}]},
        ],
    });
    if app == 0 {
        spec["policyTypes"] = json!(["Ingress", "Egress"]);
        spec["egress"] = json!([{"to": [{"podSelector": {}}]}, {"to": [{"namespaceSelector": {}}]}]);
    }
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": format!("policy-{number}"), "namespace": namespace(number)}, "spec": spec,
    })
}
