//! `weir sysdump`: everything that a bug report needs, in one archive.
//!
//! What is in it is chosen, not what is left out: no Secret is read, other people's pods are
//! cut down to what the network of them needs, and no variable's value of any pod is kept. Time
//! and size are bounded. What cannot be had is noted in `summary.json`, and the rest goes on.

mod archive;
mod nodes;
mod objects;

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use futures::{StreamExt, stream};
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use super::cluster::status::{self, ClusterStatus};
use super::cluster::{self, Agent, Cluster, ClusterArgs};
use super::{Failure, Format};
use archive::Archive;

/// Agents asked at the same time.
const AT_ONCE: usize = 4;

#[derive(Args)]
pub struct SysdumpArgs {
    #[command(flatten)]
    cluster: ClusterArgs,
    /// The archive; by default weir-sysdump-TIME.tar.gz in this directory.
    #[arg(long, short, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Ask the agents of these nodes only.
    #[arg(long = "node", value_name = "NAME")]
    nodes: Vec<String>,
    /// Ask at most so many agents, those that are not ready first.
    #[arg(long, value_name = "N", default_value_t = 30)]
    nodes_max: usize,
    /// Flows of each node, the newest.
    #[arg(long, value_name = "N", default_value_t = 5000)]
    flows: u64,
    /// Be done by then, with what there is.
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = duration)]
    timeout: Duration,
}

/// A file of the archive, or why there is none.
struct Entry {
    path: String,
    content: Result<Vec<u8>>,
}

impl Entry {
    fn new(path: impl Into<String>, content: Result<Vec<u8>>) -> Self {
        Self { path: path.into(), content }
    }
}

/// What the archive's reader should know first.
#[derive(Serialize)]
struct Summary<'a> {
    weir: &'static str,
    time: Timestamp,
    server: &'a str,
    kubernetes: &'a str,
    agents_asked: Vec<&'a str>,
    agents_not_asked: Vec<&'a str>,
    seconds: u64,
    /// Files that are missing or cut, and why.
    missing: &'a [Missing],
}

#[derive(Serialize)]
struct Missing {
    path: String,
    reason: String,
}

pub fn run(args: &SysdumpArgs) -> Result<(), Failure> {
    let runtime = cluster::runtime()?;
    let (path, missing) = runtime.block_on(dump(args))?;
    runtime.shutdown_background();
    if missing > 0 {
        progress(&format!("{missing} things could not be had: summary.json in the archive says why"));
    }
    let mut out = io::stdout().lock();
    writeln!(out, "{}", path.display())?;
    Ok(out.flush()?)
}

async fn dump(args: &SysdumpArgs) -> Result<(PathBuf, usize)> {
    let start = Instant::now();
    let deadline = start + args.timeout;
    let cluster = args.cluster.connect().await?;
    let now = Timestamp::now();
    let name = format!("weir-sysdump-{}", now.strftime("%Y%m%d-%H%M%S"));
    let path = args.file.clone().unwrap_or_else(|| PathBuf::from(format!("{name}.tar.gz")));
    let mut archive = Archive::create(&path, &name, now)?;

    let status = within(deadline, status::ask(&args.cluster)).await;
    add(&mut archive, status_entries(status))?;
    progress("reading objects");
    let mut objects = std::pin::pin!(objects::collect(&cluster, deadline));
    while let Some(entry) = objects.next().await {
        archive.add(entry)?;
    }
    let agents = match cluster.agents().await {
        Ok(agents) => agents,
        Err(error) => {
            archive.add(Entry::new("nodes", Err(error)))?;
            Vec::new()
        }
    };
    let (asked, left): (Vec<Agent>, Vec<Agent>) = choose(args, agents);
    let mut nodes = stream::iter(asked.clone())
        .map(|agent| nodes::collect(&cluster, agent, args.flows, deadline))
        .buffer_unordered(AT_ONCE);
    while let Some((node, entries)) = nodes.next().await {
        progress(&format!("asked the agent of {node}"));
        add(&mut archive, entries)?;
    }
    let node = |agents: &'_ [Agent]| agents.iter().map(|agent| agent.node.clone()).collect::<Vec<_>>();
    let (asked, left) = (node(&asked), node(&left));
    let summary = Summary {
        weir: env!("CARGO_PKG_VERSION"),
        time: now,
        server: &cluster.server,
        kubernetes: &cluster.version,
        agents_asked: asked.iter().map(String::as_str).collect(),
        agents_not_asked: left.iter().map(String::as_str).collect(),
        seconds: start.elapsed().as_secs(),
        missing: archive.missing(),
    };
    let missing = archive.missing().len();
    let summary = serde_json::to_vec_pretty(&summary).context("writing the summary");
    archive.finish(Entry::new("summary.json", summary))?;
    Ok((path, missing))
}

fn add(archive: &mut Archive, entries: Vec<Entry>) -> Result<()> {
    entries.into_iter().try_for_each(|entry| archive.add(entry))
}

fn status_entries(status: Result<ClusterStatus>) -> Vec<Entry> {
    let status = match status {
        Ok(status) => status,
        Err(error) => return vec![Entry::new("status.txt", Err(error))],
    };
    let print = |format| {
        let mut text = Vec::new();
        status.write(&mut text, format).map(|()| text).context("printing the status")
    };
    vec![Entry::new("status.txt", print(Format::Table)), Entry::new("status.json", print(Format::Json))]
}

/// Agents to ask, and those that are too many.
fn choose(args: &SysdumpArgs, mut agents: Vec<Agent>) -> (Vec<Agent>, Vec<Agent>) {
    agents.sort_by_key(|agent| (agent.is_ready, agent.node.clone()));
    let (mut asked, mut left): (Vec<_>, Vec<_>) =
        agents.into_iter().partition(|agent| args.nodes.is_empty() || args.nodes.contains(&agent.node));
    left.extend(asked.split_off(asked.len().min(args.nodes_max)));
    (asked, left)
}

/// Work that ends with the dump's time.
async fn within<T>(deadline: Instant, work: impl Future<Output = Result<T>>) -> Result<T> {
    let outcome = tokio::time::timeout_at(deadline.into(), work).await;
    outcome.unwrap_or_else(|_| Err(anyhow::anyhow!("the time for the dump is over")))
}

fn progress(line: &str) {
    eprintln!("sysdump: {}", crate::flow::escape(line));
}

fn duration(text: &str) -> Result<Duration, String> {
    let duration: SignedDuration = text.parse().map_err(|_| "not a duration as 90s, 5m".to_owned())?;
    duration.try_into().map_err(|_| "a duration cannot be negative".to_owned())
}

/// The namespace of Weir itself.
fn is_ours(cluster: &Cluster, namespace: Option<&str>) -> bool {
    namespace == Some(cluster.namespace.as_str())
}
