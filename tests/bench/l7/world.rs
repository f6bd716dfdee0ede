//! Nodes whose pods' requests are judged.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::server::{PLAIN_PORT, PORT, Server};
use crate::lab::{Lab, Node, Pod, Setup};

/// As real ones: alternatives, classes of characters, a prefix.
const RULE: &str = "{method: 'GET|POST', path: '/(public|api/v[0-9]+|bench.Echo)/[A-Za-z0-9/._-]*'}";
/// Of the requests that the rule allows.
pub const PATH: &str = "/api/v1/items";

/// A client and a server on one node.
pub struct Pair {
    pub client: Pod,
    pub server: Pod,
    _serving: Server,
}

impl Pair {
    /// Two pods of a node, of which the server's is under the policy.
    pub fn create(lab: &Lab, node: usize) -> Result<Self> {
        let client = lab.pod(node, &format!("bench/client{node}")).create()?;
        let server = lab.pod(node, &format!("bench/server{node}")).label("app", "web").create()?;
        let _serving = Server::start(server.space())?;
        Ok(Self { client, server, _serving })
    }

    /// `http://ADDRESS:PORT/PATH`, which is judged, or the port that is not.
    pub fn url(&self, is_judged: bool) -> String {
        let port = if is_judged { PORT } else { PLAIN_PORT };
        format!("http://{}:{port}{PATH}", self.address())
    }

    /// The server's address.
    pub fn address(&self) -> IpAddr {
        self.server.address(true)
    }

    /// Waits until requests are judged.
    pub fn wait(&self) -> Result<()> {
        let denied = format!("http://{}:{PORT}/denied", self.address());
        let deadline = Instant::now() + Duration::from_secs(30);
        while Instant::now() < deadline {
            if self.status(&denied)? == "403" && self.status(&self.url(true))? == "200" {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        bail!("the policy of {denied} did not come into force")
    }

    fn status(&self, url: &str) -> Result<String> {
        let mut command = std::process::Command::new("curl");
        command.args(["-s", "-o", "/dev/null", "-m", "3", "-w", "%{http_code}", url]);
        Ok(self.client.space().command(command, "").unwrap_or_default())
    }
}

/// Lets everybody send requests that the rule allows, and use the other port without any.
pub fn judge(lab: &Lab) -> Result<()> {
    lab.manifests().apply(&format!(
        "apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {{name: web, namespace: bench}}
spec:
  endpointSelector: {{matchLabels: {{app: web}}}}
  ingress:
  - fromEntities: [all]
    toPorts:
    - ports: [{{port: '{PORT}', protocol: TCP}}]
      rules: {{http: [{RULE}]}}
    - ports: [{{port: '{PLAIN_PORT}', protocol: TCP}}]
"
    ))
}

/// Where `scripts/envoy` has put the program.
pub fn envoy() -> Result<PathBuf> {
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/envoy/envoy");
    anyhow::ensure!(program.is_file(), "there is no Envoy: scripts/envoy brings one");
    Ok(program)
}

/// A lab whose second node judges with an Envoy.
pub fn beside_envoy() -> Result<Lab> {
    let program = envoy()?.display().to_string();
    let lab = Lab::start(Setup { nodes: 2, ..Setup::default() })?;
    let node = lab.node(2);
    node.stop_agent()?;
    node.start_agent_with(&["--proxy", "envoy", "--envoy", &program])?;
    node.wait_ready()?;
    Ok(lab)
}

/// The processor time that a process has used, of all its threads.
pub fn processor_time(pid: i32) -> Result<Duration> {
    let mut nanoseconds = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
        let text = fs::read_to_string(task.path().join("schedstat"))?;
        nanoseconds += text.split(' ').next().context("a time")?.parse::<u64>()?;
    }
    Ok(Duration::from_nanos(nanoseconds))
}

/// The resident memory of a process, in MiB.
pub fn resident(pid: i32) -> Result<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("its memory")?;
    Ok(line.trim().trim_end_matches(" kB").trim().parse::<f64>()? / 1024.0)
}

/// The process that judges on a node.
pub fn proxy_of(node: &Node, is_envoy: bool) -> Result<i32> {
    let pid = if is_envoy { node.envoy_pid() } else { node.proxy_pid() };
    pid.with_context(|| format!("no proxy runs on {}", node.name()))
}
