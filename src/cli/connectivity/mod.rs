//! `weir connectivity test`: is the network of this cluster what Kubernetes asks for?
//!
//! ```text
//! objects ── namespace, pods, services, policies ──> API server
//! plan ──── what should reach what, and what must not
//!   └─> stage ── `weir connectivity probe` in the pods, and in the agents' for the nodes
//!         └─> reason ── the flows of the agents concerned, for whatever went wrong
//! report <─┘
//! ```
//!
//! The pods run the agents' own image, which every node has: no registry is asked.

mod dns;
mod objects;
mod plan;
mod probe;
mod reason;
mod report;
mod serve;
mod stage;

use std::io::{self, Write};
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, anyhow};
use clap::{Args, Subcommand};
use jiff::SignedDuration;
use tokio::signal::unix::{SignalKind, signal};

use super::cluster::{self, ClusterArgs};
use super::{Failure, Format};
use report::Report;

#[derive(Subcommand)]
pub enum ConnectivityCommand {
    /// Make pods in a namespace of their own, try what should work and what must not, and clean up;
    /// exits with 1 when something failed, with 2 when it could not be tried.
    Test(TestArgs),
    /// Delete what tests left behind that were killed.
    Clean(CleanArgs),
    /// Answer over TCP and UDP: what the test's pods run.
    #[command(hide = true)]
    Serve(serve::ServeArgs),
    /// Try a list of targets: what the test runs in its pods.
    #[command(hide = true)]
    Probe(probe::ProbeArgs),
}

#[derive(Args)]
pub struct TestArgs {
    #[command(flatten)]
    cluster: ClusterArgs,
    /// Try these nodes: the first one's pods ask, the other ones' answer. By default two.
    #[arg(long = "node", value_name = "NAME")]
    nodes: Vec<String>,
    /// Try every node.
    #[arg(long, conflicts_with = "nodes")]
    all_nodes: bool,
    /// A TCP server outside of the cluster that pods should reach.
    #[arg(long, value_name = "IP:PORT")]
    external: Vec<SocketAddr>,
    /// The pods must run within this time.
    #[arg(long, value_name = "DURATION", default_value = "2m", value_parser = duration)]
    timeout: Duration,
    /// Leave namespace and pods for a look.
    #[arg(long)]
    keep: bool,
    /// Form of what is printed.
    #[arg(long, short, value_enum, default_value = "table")]
    output: Format,
}

#[derive(Args)]
pub struct CleanArgs {
    #[command(flatten)]
    cluster: ClusterArgs,
}

pub fn run(command: ConnectivityCommand) -> Result<(), Failure> {
    let runtime = cluster::runtime()?;
    let outcome = match command {
        ConnectivityCommand::Serve(args) => Ok(runtime.block_on(serve::run(args))?),
        ConnectivityCommand::Probe(args) => runtime.block_on(probe::run(args)),
        ConnectivityCommand::Clean(args) => Ok(runtime.block_on(clean(&args))?),
        ConnectivityCommand::Test(args) => {
            let report = runtime.block_on(test(&args)).map_err(Failure::NotTried)?;
            finish(&report, args.output)
        }
    };
    runtime.shutdown_background();
    outcome
}

async fn test(args: &TestArgs) -> anyhow::Result<Report> {
    let cluster = args.cluster.connect().await?;
    let stage = stage::Stage::new(&cluster, args).await?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listening for Ctrl-C")?;
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let outcome = tokio::select! {
        outcome = stage.run() => outcome,
        _ = interrupt.recv() => Err(anyhow!("interrupted")),
        _ = terminate.recv() => Err(anyhow!("terminated")),
    };
    if args.keep {
        progress(&format!("left for a look: namespace {}", stage.namespace()));
        return outcome;
    }
    // A second Ctrl-C has no patience for this.
    let cleaned = tokio::select! {
        cleaned = stage.remove() => cleaned,
        _ = interrupt.recv() => Err(anyhow!("interrupted: `weir connectivity clean` does the rest")),
    };
    if let Err(error) = cleaned {
        progress(&format!("cleaning up: {}", crate::error::chain(&error)));
    }
    outcome
}

async fn clean(args: &CleanArgs) -> anyhow::Result<()> {
    let cluster = args.cluster.connect().await?;
    let namespaces = stage::left_behind(&cluster).await?;
    if namespaces.is_empty() {
        progress("nothing was left behind");
    }
    for namespace in namespaces {
        stage::remove_namespace(&cluster, &namespace).await?;
    }
    Ok(())
}

fn finish(report: &Report, format: Format) -> Result<(), Failure> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    report.write(&mut out, format)?;
    out.flush()?;
    match report.failed() {
        0 => Ok(()),
        failed => Err(anyhow!("{failed} of {} failed", report.tried()).into()),
    }
}

/// A line for who waits.
fn progress(line: &str) {
    eprintln!("connectivity: {}", crate::flow::escape(line));
}

fn duration(text: &str) -> Result<Duration, String> {
    let duration: SignedDuration = text.parse().map_err(|_| "not a duration as 90s, 5m".to_owned())?;
    duration.try_into().map_err(|_| "a duration cannot be negative".to_owned())
}
