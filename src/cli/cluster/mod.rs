//! The whole cluster from a person's own machine: the API server by their kubeconfig, and through
//! it the agents, each asked by its own `weir` in its own pod.

pub mod encryption;
pub mod observe;
mod operator;
pub mod status;

use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, AttachParams, ListParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader};
use tokio::sync::mpsc;

/// The program in the agents' container.
const WEIR: &str = "/weir";
/// Container of the agent in its pod.
pub(super) const AGENT: &str = "agent";
const AGENT_SELECTOR: &str = "app.kubernetes.io/name=weir-agent";
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
/// More than any agent has to say about itself.
const ANSWER_BYTES_MAX: usize = 64 * 1024 * 1024;
/// Buffer between the API server's connection and the reader.
const PIPE_BYTES: usize = 256 * 1024;

/// How to reach the cluster.
#[derive(Args, Clone, Debug)]
pub(super) struct ClusterArgs {
    /// The kubeconfig; by default $KUBECONFIG, ~/.kube/config, or the pod's own service account.
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<std::path::PathBuf>,
    /// Context of the kubeconfig; by default its current one.
    #[arg(long, value_name = "NAME")]
    context: Option<String>,
    /// Where the agents run.
    #[arg(long, value_name = "NAMESPACE", default_value = "weir-system")]
    weir_namespace: String,
}

/// A cluster that answers.
#[derive(Clone)]
pub(super) struct Cluster {
    pub client: Client,
    /// The server's address and version, for people.
    pub server: String,
    pub version: String,
    /// Where the agents run.
    pub namespace: String,
}

/// What a command in a pod came to.
#[derive(Debug, Default)]
pub(super) struct Ran {
    pub stdout: Vec<u8>,
    pub stderr: String,
    /// Its exit code.
    pub code: i32,
    /// There was more than was wanted.
    pub is_cut: bool,
}

/// How long a command may take, and how much it may say.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub within: Duration,
    pub bytes: usize,
}

impl Limits {
    pub fn within(seconds: u64) -> Self {
        Self { within: Duration::from_secs(seconds), bytes: ANSWER_BYTES_MAX }
    }
}

/// The agent's pod of a node.
#[derive(Clone, Debug)]
pub(super) struct Agent {
    pub node: String,
    pub pod: String,
    pub is_ready: bool,
    pub restarts: i32,
    pub image: String,
    pub pull_policy: Option<String>,
    /// Why its containers do not run, where they do not.
    pub problem: Option<String>,
}

impl ClusterArgs {
    /// Reads the kubeconfig and asks the server who it is.
    pub async fn connect(&self) -> Result<Cluster> {
        let mut config = self.config().await?;
        config.connect_timeout = Some(CONNECT_WITHIN);
        let server = config.cluster_url.to_string();
        let client = Client::try_from(config).context("preparing to speak to the API server")?;
        let version = tokio::time::timeout(CONNECT_WITHIN * 2, client.apiserver_version())
            .await
            .map_err(|_| anyhow!("no answer within {} s", CONNECT_WITHIN.as_secs() * 2))
            .and_then(|version| version.map_err(explained))
            .with_context(|| format!("asking the API server at {server}"))?;
        let namespace = self.weir_namespace.clone();
        Ok(Cluster { client, server, version: version.git_version, namespace })
    }

    async fn config(&self) -> Result<Config> {
        let options = KubeConfigOptions { context: self.context.clone(), ..Default::default() };
        if let Some(file) = &self.kubeconfig {
            let read = Kubeconfig::read_from(file)
                .with_context(|| format!("reading --kubeconfig {}", file.display()))?;
            return Config::from_custom_kubeconfig(read, &options)
                .await
                .with_context(|| format!("understanding --kubeconfig {}", file.display()));
        }
        if self.context.is_some() {
            return Config::from_kubeconfig(&options).await.context("reading the kubeconfig");
        }
        Config::infer().await.context("finding a cluster: set $KUBECONFIG or give --kubeconfig")
    }
}

impl Cluster {
    /// The agents, by node; an error where there is none at all.
    pub async fn agents(&self) -> Result<Vec<Agent>> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace);
        let list = pods.list(&ListParams::default().labels(AGENT_SELECTOR)).await;
        let list = list.map_err(explained).context("listing the agents' pods")?;
        let mut agents: Vec<Agent> = list.items.iter().filter_map(Agent::of).collect();
        if agents.is_empty() {
            bail!(
                "no agent runs in the namespace {} of {}: install Weir, or name its namespace with --weir-namespace",
                self.namespace,
                self.server
            );
        }
        // A pod on its way out and its successor: the one that serves.
        agents.sort_by(|a, b| (&a.node, !a.is_ready).cmp(&(&b.node, !b.is_ready)));
        agents.dedup_by(|later, first| later.node == first.node);
        Ok(agents)
    }

    /// Runs `weir ARGUMENTS` in an agent's pod.
    pub async fn ask(&self, agent: &Agent, arguments: &[&str], limits: Limits) -> Result<Ran> {
        let command: Vec<&str> = std::iter::once(WEIR).chain(arguments.iter().copied()).collect();
        let ran = self.exec(&self.namespace, &agent.pod, Some(AGENT), &command, limits).await;
        ran.with_context(|| format!("asking the agent of {}", agent.node))
    }

    /// Asks an agent for a value as JSON, whatever the exit code says about it.
    pub async fn ask_json<T: DeserializeOwned>(&self, agent: &Agent, arguments: &[&str]) -> Result<T> {
        let ran = self.ask(agent, arguments, Limits::within(20)).await?;
        if ran.stdout.is_empty() {
            bail!("the agent of {}: {}", agent.node, ran.complaint());
        }
        serde_json::from_slice(&ran.stdout).with_context(|| {
            format!("understanding the agent of {}: it may be of another version", agent.node)
        })
    }

    /// Runs the agent's own `weir` and hands on each line that it prints, until it ends or nobody
    /// listens any more.
    pub async fn lines(&self, agent: &Agent, arguments: &[String], to: mpsc::Sender<String>) -> Result<()> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace);
        let params = AttachParams::default().stdin(false).stderr(false).container(AGENT);
        let command = std::iter::once(WEIR).chain(arguments.iter().map(String::as_str));
        let mut process = pods
            .exec(&agent.pod, command, &params)
            .await
            .map_err(explained)
            .with_context(|| format!("asking the agent of {}", agent.node))?;
        let stdout = process.stdout().context("the API server gives no output")?;
        let mut lines = BufReader::new(stdout).lines();
        while let Some(line) =
            lines.next_line().await.with_context(|| format!("reading from {}", agent.node))?
        {
            if to.send(line).await.is_err() {
                break;
            }
        }
        process.abort();
        Ok(())
    }

    /// Runs a command in a container, as `kubectl exec` does.
    pub async fn exec(
        &self,
        namespace: &str,
        pod: &str,
        container: Option<&str>,
        command: &[&str],
        limits: Limits,
    ) -> Result<Ran> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let mut params = AttachParams::default().stdin(false).max_stdout_buf_size(PIPE_BYTES);
        params.container = container.map(str::to_owned);
        let working = async {
            let mut process = pods.exec(pod, command.iter().copied(), &params).await.map_err(explained)?;
            let status = process.take_status();
            let (stdout, stderr) = (process.stdout(), process.stderr());
            let (stdout, stderr) = futures::try_join!(read(stdout, limits.bytes), read(stderr, PIPE_BYTES))?;
            let is_cut = stdout.len() >= limits.bytes;
            let code = match status {
                Some(status) if !is_cut => exit_code(status.await)?,
                _ => 0,
            };
            process.abort();
            let stderr = String::from_utf8_lossy(&stderr).trim().to_owned();
            anyhow::Ok(Ran { stdout, stderr, code, is_cut })
        };
        tokio::time::timeout(limits.within, working)
            .await
            .map_err(|_| {
                anyhow!("pod {namespace}/{pod} did not answer within {} s", limits.within.as_secs())
            })?
            .with_context(|| format!("running {} in pod {namespace}/{pod}", command.join(" ")))
    }
}

impl Ran {
    /// What it said when it did not do as asked.
    pub fn complaint(&self) -> String {
        let said = self.stderr.lines().last().unwrap_or("it said nothing");
        said.strip_prefix("weir: ").unwrap_or(said).to_owned()
    }
}

impl Agent {
    fn of(pod: &Pod) -> Option<Self> {
        let spec = pod.spec.as_ref()?;
        let container = spec.containers.iter().find(|container| container.name == AGENT)?;
        let status = pod.status.clone().unwrap_or_default();
        let conditions = status.conditions.iter().flatten();
        let is_ready = conditions.clone().any(|ready| ready.type_ == "Ready" && ready.status == "True");
        let containers = status.container_statuses.iter().flatten();
        Some(Self {
            node: spec.node_name.clone()?,
            pod: pod.name_any(),
            is_ready,
            restarts: containers.map(|container| container.restart_count).sum(),
            image: container.image.clone().unwrap_or_default(),
            pull_policy: container.image_pull_policy.clone(),
            problem: problem_of(pod),
        })
    }
}

/// Why a pod's containers do not run, as far as its status says.
pub(super) fn problem_of(pod: &Pod) -> Option<String> {
    let status = pod.status.as_ref()?;
    if status.phase.as_deref() == Some("Failed") {
        let texts = [status.reason.clone(), status.message.clone()];
        return Some(texts.into_iter().flatten().collect::<Vec<_>>().join(": "));
    }
    let containers = status.init_container_statuses.iter().chain(&status.container_statuses).flatten();
    for container in containers {
        let Some(state) = &container.state else { continue };
        if let Some(waiting) = &state.waiting
            && waiting
                .reason
                .as_deref()
                .is_some_and(|reason| !reason.ends_with("Creating") && reason != "PodInitializing")
        {
            let reason = waiting.reason.clone().unwrap_or_default();
            let message = waiting.message.as_deref().map(|text| format!(": {text}")).unwrap_or_default();
            return Some(format!("{reason}{message}"));
        }
        if let Some(ended) = state.terminated.as_ref().filter(|ended| ended.exit_code != 0) {
            let reason = ended.reason.as_deref().unwrap_or("Error");
            return Some(format!("{}: {reason}, exit code {}", container.name, ended.exit_code));
        }
    }
    let unscheduled = status
        .conditions
        .iter()
        .flatten()
        .find(|condition| condition.type_ == "PodScheduled" && condition.status == "False");
    unscheduled.map(|condition| condition.message.clone().unwrap_or_else(|| "not scheduled".to_owned()))
}

/// The API server's own sentence, where it gave one.
pub(super) fn explained(error: kube::Error) -> anyhow::Error {
    match error {
        kube::Error::Api(status) if !status.message.is_empty() => anyhow!("{}", status.message),
        error => error.into(),
    }
}

async fn read(from: Option<impl AsyncRead + Unpin>, bytes: usize) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    if let Some(from) = from {
        from.take(bytes as u64).read_to_end(&mut text).await.context("reading what it says")?;
    }
    Ok(text)
}

fn exit_code(status: Option<k8s_openapi::apimachinery::pkg::apis::meta::v1::Status>) -> Result<i32> {
    let status = status.context("the connection broke")?;
    if status.status.as_deref() == Some("Success") {
        return Ok(0);
    }
    let causes = status.details.as_ref().and_then(|details| details.causes.as_deref()).unwrap_or_default();
    let code = causes.iter().find(|cause| cause.reason.as_deref() == Some("ExitCode"));
    match code.and_then(|cause| cause.message.as_deref()?.parse().ok()) {
        Some(code) => Ok(code),
        None => bail!("{}", status.message.unwrap_or_else(|| "it could not be started".to_owned())),
    }
}

/// A runtime for commands that mostly wait.
pub(super) fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("starting the runtime")
}
