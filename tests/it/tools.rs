//! The tools for people who run a cluster, as far as a lab without an API server has what they need:
//! what the pods of `weir connectivity test` run, and what `weir sysdump` asks of a node.

use std::net::SocketAddr;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::lab::{Lab, Pod, Setup, binary, wait_for};
use crate::require::require_lab;

const DENY_SERVER: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny, namespace: shop}
spec: {podSelector: {matchLabels: {app: server}}, policyTypes: [Ingress]}
";
/// Nothing else of the lab listens there.
const PORT: u16 = 8999;

/// A server in a pod, ended when dropped.
struct Serving(std::process::Child);

impl Serving {
    fn start(pod: &Pod) -> Result<Self> {
        let mut command = Command::new(binary("weir")?);
        command.args(["connectivity", "serve", "--name", "server", "--port", &PORT.to_string()]);
        command.stdin(Stdio::null());
        Ok(Self(pod.space().run(move || command.spawn()).context("starting the server")?))
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What `weir connectivity probe` in a pod says about targets.
fn probe(from: &Pod, probes: &[Value]) -> Result<Vec<Value>> {
    let mut command = Command::new(binary("weir")?);
    command.args(["connectivity", "probe", &Value::from(probes).to_string()]);
    Ok(serde_json::from_str(&from.space().command(command, "")?)?)
}

#[test]
fn probes_tell_what_is_answered_and_what_a_policy_denies() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup { nodes: 2, ..Setup::default() })?;
    let server = lab.pod(2, "shop/server").label("app", "server").create()?;
    let client = lab.pod(1, "shop/client").create()?;
    let _serving = Serving::start(&server)?;
    let probes: Vec<Value> = ["tcp_echo", "udp_echo", "tcp_connect"]
        .into_iter()
        .flat_map(|kind| {
            [true, false].map(|is_ipv4| {
                let target = SocketAddr::new(server.address(is_ipv4), PORT);
                json!({ "kind": kind, "target": target, "seconds": 1 })
            })
        })
        .collect();
    wait_for("an answer to every probe", || {
        Ok(probe(&client, &probes)?.iter().all(|outcome| outcome["error"].is_null()))
    })?;
    for outcome in probe(&client, &probes)? {
        assert!(outcome["answer"] == "server" || outcome["answer"] == "connected", "{outcome}");
    }

    lab.manifests().apply(DENY_SERVER)?;
    wait_for("silence", || {
        Ok(probe(&client, &probes)?.iter().all(|outcome| outcome["error"] == "no answer within 1 s"))
    })
}

#[test]
fn a_node_tells_its_facts_and_metrics() -> Result<()> {
    require_lab!();
    let lab = Lab::start(Setup::default())?;
    let node = lab.node(1);
    let weir = |argument: &'static str| {
        let mut command = Command::new(binary("weir")?);
        command.arg(argument);
        node.space().command(command, "")
    };
    let facts = weir("facts")?;
    for wanted in ["weir_vxlan vxlan mtu", "net/ipv4/ip_forward = 1", "== /proc/net/softnet_stat\n"] {
        assert!(facts.contains(wanted), "no {wanted} in {facts}");
    }
    wait_for("the node among the metrics", || {
        Ok(weir("metrics")?.contains("# TYPE weir_nodes gauge\nweir_nodes 1.0\n"))
    })
}
