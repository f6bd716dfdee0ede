//! The operator against a real API server, with the rights that deploy/base gives it.

mod access;
mod balancers;
mod identities;
mod leaders;
mod nodes;
mod reports;
mod upstream;

use std::collections::BTreeSet;
use std::future::Future;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use k8s_openapi::api::coordination::v1::Lease;
use kube::api::Api;
use kube::{Client, ResourceExt};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};
use weir::kube::crd::WeirNode;

use crate::control_plane::ControlPlane;

/// Nothing that is awaited takes this long.
const PATIENCE: Duration = Duration::from_secs(40);
/// In seconds, of the operators under test.
const LEASE: u64 = 3;

/// A replica, killed with this.
struct Replica {
    name: String,
    child: Child,
    metrics: u16,
    log: std::path::PathBuf,
}

impl Drop for Replica {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("{}:\n{}", self.name, self.log());
        }
    }
}

impl Replica {
    /// Starts one with the token of its service account.
    async fn start(plane: &ControlPlane, name: &str, arguments: &[&str]) -> Result<Self> {
        let kubeconfig = plane.as_account("weir-operator", name).await?;
        let metrics = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let log = plane.path(&format!("{name}.log"));
        let child = Command::new(env!("CARGO_BIN_EXE_weir"))
            .args(["operator", "--operator-name", name, "--node-stale-seconds", "4"])
            .args(["--operator-lease-seconds", &LEASE.to_string(), "--node-forget-seconds", "1"])
            .args(["--operator-metrics-address", &format!("127.0.0.1:{metrics}"), "--kubeconfig"])
            .arg(kubeconfig)
            .args(arguments)
            .stdin(Stdio::null())
            .stderr(std::fs::OpenOptions::new().create(true).append(true).open(&log)?)
            .spawn()
            .context("starting weir operator")?;
        Ok(Self { name: name.to_owned(), child, metrics, log })
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn send(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.child.id().try_into()?), signal)?)
    }

    /// Kills it, so that it can say nothing more.
    fn kill(mut self) -> Result<()> {
        self.send(Signal::SIGKILL)?;
        self.child.wait()?;
        Ok(())
    }

    /// What it says of itself.
    async fn get(&self, path: &str) -> Result<String> {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", self.metrics)).await?;
        stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: weir\r\n\r\n").as_bytes()).await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        Ok(text)
    }

    async fn is_ready(&self) -> Result<bool> {
        Ok(self.get("/readyz").await?.starts_with("HTTP/1.0 200"))
    }

    /// The value of a metric, with its labels where it has any.
    async fn metric(&self, name: &str) -> Result<f64> {
        let text = self.get("/metrics").await?;
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.with_context(|| format!("{name} in {text}"))?.parse().context("reading a number")
    }
}

/// Runs a test on a runtime of its own, with a fresh API server.
fn with_plane<F>(test: &str, run: impl FnOnce(ControlPlane) -> F) -> Result<()>
where
    F: Future<Output = Result<()>>,
{
    let Some(plane) = crate::control_plane::start(test)? else { return Ok(()) };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(run(plane))
}

/// Asks until there is an answer.
async fn until<T, F>(what: &str, mut ask: impl FnMut() -> F) -> Result<T>
where
    F: Future<Output = Result<Option<T>>>,
{
    let deadline = Instant::now() + PATIENCE;
    let mut last = None;
    while Instant::now() < deadline {
        match ask().await {
            Ok(Some(answer)) => return Ok(answer),
            Ok(None) => {}
            Err(error) => last = Some(error),
        }
        sleep(Duration::from_millis(50)).await;
    }
    bail!("waited {PATIENCE:?} for {what}: {last:?}")
}

async fn leader(client: &Client) -> Result<Option<String>> {
    let leases: Api<Lease> = Api::namespaced(client.clone(), "weir-system");
    let lease = leases.get_opt("weir-operator").await?;
    let holder = lease.and_then(|lease| lease.spec?.holder_identity);
    Ok(holder.filter(|holder| !holder.is_empty()))
}

async fn create_node(client: &Client, name: &str, spec: Value) -> Result<()> {
    let nodes: Api<k8s_openapi::api::core::v1::Node> = Api::all(client.clone());
    let node = serde_json::from_value(json!({"metadata": {"name": name}, "spec": spec}))?;
    nodes.create(&Default::default(), &node).await.with_context(|| format!("creating {name}"))?;
    Ok(())
}

/// The pod CIDRs of every WeirNode that has any.
async fn given(client: &Client) -> Result<Vec<(String, Vec<String>)>> {
    let nodes: Api<WeirNode> = Api::all(client.clone());
    let all = nodes.list(&Default::default()).await?.items;
    let given = all.into_iter().map(|node| (node.name_any(), node.spec.pod_cidrs));
    Ok(given.filter(|(_, cidrs)| !cidrs.is_empty()).collect())
}

/// Each of them once, or an error that says which is there twice.
fn ensure_once(given: &[(String, Vec<String>)]) -> Result<()> {
    let mut seen = BTreeSet::new();
    for (name, cidrs) in given {
        for cidr in cidrs {
            anyhow::ensure!(seen.insert(cidr), "{name} has {cidr}, and so has another");
        }
    }
    Ok(())
}

/// The API server said no for want of rights.
fn is_forbidden<T>(answer: Result<T, kube::Error>) -> bool {
    matches!(answer, Err(kube::Error::Api(status)) if status.code == 403)
}

/// A client by the token in a kubeconfig.
async fn client_of(kubeconfig: &Path) -> Result<Client> {
    crate::control_plane::client(kubeconfig).await
}
