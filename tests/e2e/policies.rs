//! NetworkPolicies, as a user applies them.

use anyhow::Result;

use crate::kubernetes::prober::Via;
use crate::world::{PORT, Pod, Row, UDP_PORT, World, both, outside};

const CLIENTS_ONLY: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: clients-only, namespace: e2e}
spec:
  podSelector: {matchLabels: {app: server}}
  ingress:
  - from: [{podSelector: {matchLabels: {app: client}}}]
    ports: [{protocol: TCP, port: 8080}]
";

const TRUSTED_ONLY: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: clients-only, namespace: e2e}
spec:
  podSelector: {matchLabels: {app: server}}
  ingress:
  - from: [{podSelector: {matchLabels: {trusted: \"yes\"}}}]
";

const EGRESS: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: egress, namespace: e2e}
spec:
  podSelector: {matchLabels: {app: client}}
  policyTypes: [Egress]
  egress:
  - to: [{podSelector: {matchLabels: {app: server}}}]
    ports: [{protocol: UDP, port: 8081}]
  - to: [{ipBlock: {cidr: 203.0.113.0/24}}]
";

const CLOSED: &str = include_str!("closed.yaml");

/// Attempts of every client and server at every server, TCP and UDP.
fn rows(from: &[Pod], servers: &[Pod], tcp: bool, udp: bool) -> Vec<Row> {
    let mut rows = Vec::new();
    for from in from {
        for server in servers.iter().filter(|server| server.name != from.name) {
            rows.extend(both(from, Via::Http, server, PORT, tcp));
            rows.extend(both(from, Via::Udp, server, UDP_PORT, udp));
        }
    }
    rows
}

fn delete(world: &World, policy: &str) -> Result<()> {
    world.cluster.kubectl(&["--namespace", "e2e", "delete", "networkpolicy", policy], "").map(drop)
}

/// By peer and port, across nodes, and open again when the policy goes.
pub fn policies_allow_and_deny(world: &mut World) -> Result<()> {
    let (clients, servers, hosts) = (world.clients()?, world.servers()?, world.hosts()?);
    world.cluster.apply(CLIENTS_ONLY)?;
    let mut expected = rows(&clients, &servers, true, false);
    expected.extend(rows(&servers, &servers, false, false));
    for host in &hosts {
        for server in &servers {
            // A pod's own node may always reach it; another may not.
            expected.extend(both(host, Via::Http, server, PORT, host.node == server.node));
        }
    }
    world.expect(&expected)?;
    world
        .cluster
        .apply(&CLIENTS_ONLY.replace("{protocol: TCP, port: 8080}", "{protocol: UDP, port: 8081}"))?;
    let mut expected = rows(&clients, &servers, false, true);
    expected.extend(rows(&servers, &servers, false, false));
    world.expect(&expected)?;
    delete(world, "clients-only")?;
    let mut expected = rows(&clients, &servers, true, true);
    expected.extend(rows(&servers, &servers, true, true));
    world.expect(&expected)
}

/// A label that a running pod gets, and loses.
pub fn policies_follow_labels(world: &mut World) -> Result<()> {
    let (clients, servers) = (world.clients()?, world.servers()?);
    world.cluster.apply(TRUSTED_ONLY)?;
    world.expect(&rows(&clients, &servers, false, false))?;
    let label = |label: &str| {
        world.cluster.kubectl(&["--namespace", "e2e", "label", "pod", &clients[0].name, label], "").map(drop)
    };
    label("trusted=yes")?;
    let mut expected = rows(&clients[..1], &servers, true, true);
    expected.extend(rows(&clients[1..], &servers, false, false));
    world.expect(&expected)?;
    label("trusted-")?;
    world.expect(&rows(&clients, &servers, false, false))?;
    delete(world, "clients-only")?;
    world.expect(&rows(&clients, &servers, true, true))
}

/// By peer and port, and by the addresses of the world outside.
pub fn policies_of_egress(world: &mut World) -> Result<()> {
    let (clients, servers) = (world.clients()?, world.servers()?);
    world.cluster.apply(EGRESS)?;
    let mut expected = rows(&clients, &servers, false, true);
    for client in &clients {
        for to in outside(PORT) {
            expected.push(Row { from: client.clone(), via: Via::Http, to, is_allowed: to.is_ipv4() });
        }
    }
    world.expect(&expected)?;
    delete(world, "egress")?;
    world.expect(&rows(&clients, &servers, true, true))
}

/// kubelet's probes of every kind reach pods that nobody else may reach.
pub fn kubelet_probes_under_a_default_deny(world: &mut World) -> Result<()> {
    world.cluster.apply(CLOSED)?;
    world.rollout("closed", "daemonset/probed")?;
    let (clients, probed) = (world.clients()?, world.pods("closed", "app=probed")?);
    let mut expected = rows(&clients, &probed, false, false);
    expected.extend(rows(&probed, &clients, false, false));
    world.expect(&expected)?;
    // The liveness probes have run ten times and more.
    let pods = world.cluster.get(&["pods", "--namespace", "closed"])?;
    for pod in pods["items"].as_array().into_iter().flatten() {
        anyhow::ensure!(
            pod["status"]["containerStatuses"][0]["restartCount"] == 0,
            "restarted: {}",
            pod["status"]
        );
    }
    world.cluster.kubectl(&["delete", "namespace", "closed"], "").map(drop)
}
