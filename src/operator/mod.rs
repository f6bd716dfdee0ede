//! `weir operator`: what a cluster needs once, not on every node.
//!
//! ```text
//! election ── leads ──> definitions ──> nodes (watched) ──> cidrs  pod CIDRs from pools
//!                                            │        └──> life   taint, condition, deleted nodes
//!                                            ├ identities         garbage collection
//!                                            ├ reports            events on broken objects
//!                                            ├ balancers          addresses of load balancers from pools
//!                                            └ conflicts          events on Services that want one address
//! ```
//!
//! Pods need no operator: what it does is for nodes and identities that come and go. Replicas that do
//! not lead do nothing. A leader ends all of its work before it gives the Lease back, and everything
//! it writes names the version that it replaces.

mod addresses;
mod args;
mod balancers;
mod certificates;
mod cidrs;
mod closed;
mod conflicts;
mod contact;
mod definitions;
mod election;
mod events;
mod identities;
mod life;
pub(crate) mod metrics;
mod nodes;
pub mod pools;
mod reports;

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use kube::Client;
use kube::api::{Api, PatchParams};
use kube::runtime::events::{Recorder, Reporter};
use tokio::sync::{Notify, watch};
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

pub use args::{OperatorArgs, OperatorConfig};
pub use life::TAINT;

use crate::kube::bootstrap::Servers;
use crate::signals::stop_at_signal;
use crate::telemetry::{self, Telemetry};
use contact::Contact;
use election::Election;
use metrics::Metrics;

/// Between two looks at the certificates, which live for months.
const CERTIFICATES: Duration = Duration::from_secs(600);
/// Owner of the fields that we apply.
const FIELD_MANAGER: &str = "weir-operator";
/// The Lease of the leader.
const LEASE: &str = "weir-operator";
/// Changes within this time are one round.
const BATCH: Duration = Duration::from_millis(50);
/// Without any change there is a round all the same: time passes.
const IDLE_ROUND: Duration = Duration::from_secs(1);
/// After something did not work.
const RETRY: Duration = Duration::from_secs(2);
/// Another replica on the same node has the address.
const ADDRESS_RETRY: Duration = Duration::from_secs(1);
/// A round that is under way may end before the Lease is given back.
const LAST_ROUND: Duration = Duration::from_millis(800);

/// Runs the operator until SIGTERM or SIGINT.
pub async fn run(config: OperatorConfig) -> Result<()> {
    let (stop, stopping) = watch::channel(false);
    tokio::spawn(stop_at_signal(stop, "another replica takes over"));
    let telemetry = Arc::new(Telemetry::of_operator());
    let metrics = Metrics::default();
    telemetry.register_with(|registry| metrics.register(registry));
    let client = client(&config).await?;
    let stopped = stopping.clone();
    // Ends with an error only: what is served ends before the Lease is given back.
    let serving = async {
        serve(&config, telemetry.clone(), stopped).await?;
        std::future::pending::<Result<()>>().await
    };
    tokio::select! {
        served = serving => served.context("serving metrics"),
        () = take_part(&config, &client, &telemetry, &metrics, stopping) => Ok(()),
    }
}

/// Several replicas on one node share its address: whoever is first answers there.
async fn serve(
    config: &OperatorConfig,
    telemetry: Arc<Telemetry>,
    stopping: watch::Receiver<bool>,
) -> Result<()> {
    let address = config.args.operator_metrics_address;
    loop {
        match tokio::net::TcpListener::bind(address).await {
            Ok(listener) => return telemetry::serve_on(listener, telemetry, stopping).await,
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => sleep(ADDRESS_RETRY).await,
            Err(error) => return Err(error).with_context(|| format!("listening at {address}")),
        }
    }
}

/// A candidate, then the leader, then a candidate again.
async fn take_part(
    config: &OperatorConfig,
    client: &Client,
    telemetry: &Telemetry,
    metrics: &Metrics,
    mut stopping: watch::Receiver<bool>,
) {
    let duration = Duration::from_secs(config.args.operator_lease_seconds.into());
    let leases = Api::default_namespaced(client.clone());
    let mut election = Election::new(leases, LEASE, &config.args.operator_name, duration);
    let contact = Contact::new(telemetry, duration);
    loop {
        let tried = |is_answered| contact.tried(is_answered);
        let since = tokio::select! {
            since = election.win(tried) => since,
            _ = stopping.wait_for(|stop| *stop) => return,
        };
        metrics.leader.set(1);
        let (resign, resigning) = watch::channel(false);
        let mut leading = Box::pin(lead(config, client, metrics, resigning));
        let is_asked = tokio::select! {
            () = election.keep(since, tried) => false,
            () = &mut leading => false,
            _ = stopping.wait_for(|stop| *stop) => true,
        };
        if is_asked {
            resign.send_replace(true);
            let _ = timeout(LAST_ROUND, leading).await;
            election.release().await;
            return;
        }
        drop(leading);
        metrics.leader.set(0);
    }
}

/// Does the work of the leader, again from the start when something fails; returns when it is to end.
async fn lead(config: &OperatorConfig, client: &Client, metrics: &Metrics, resigning: watch::Receiver<bool>) {
    while let Err(error) = work(config, client, metrics, resigning.clone()).await {
        metrics.errors.inc();
        warn!(error = crate::error::chain(&error), "beginning the work of the leader");
        sleep(RETRY).await;
    }
}

async fn work(
    config: &OperatorConfig,
    client: &Client,
    metrics: &Metrics,
    mut resigning: watch::Receiver<bool>,
) -> Result<()> {
    definitions::install(client).await.context("installing definitions")?;
    let changed = Arc::new(Notify::new());
    let (stores, filling) = nodes::Stores::follow(client, changed.clone());
    let args = &config.args;
    let seconds = |seconds: u32| Duration::from_secs(seconds.into());
    let rounds = async {
        stores.wait().await?;
        let heard = nodes::Heartbeats::new(&stores.view(), seconds(args.timing.node_stale_seconds));
        let mut cidrs = cidrs::Cidrs::new(client, &args.operator_name, &args.pod_cidr_pools, metrics.clone());
        let mut keeper = life::Keeper::new(
            client,
            recorder(client, &args.operator_name),
            heard,
            seconds(args.node_forget_seconds),
            metrics.clone(),
        );
        let mut closed = closed::Closed::new(client, recorder(client, &args.operator_name));
        info!(nodes = stores.view().nodes.len(), "looking after nodes");
        while !*resigning.borrow() {
            let view = stores.view();
            if let Err(error) = round(&view, &mut cidrs, &mut keeper).await {
                metrics.errors.inc();
                warn!(error = crate::error::chain(&error), "looking after nodes");
                sleep(RETRY).await;
            }
            closed.round(&view).await;
            tokio::select! {
                () = changed.notified() => sleep(BATCH).await,
                () = sleep(IDLE_ROUND) => {}
                _ = resigning.changed() => {}
            }
        }
        Ok(())
    };
    let collector =
        identities::Collector::new(client, seconds(args.timing.identity_grace_seconds), metrics.clone());
    let certifying = async {
        loop {
            if let Err(error) = certificates::keep(client, &args.cluster_name).await {
                metrics.errors.inc();
                warn!(error = crate::error::chain(&error), "keeping the certificates for flows");
                sleep(RETRY).await;
                continue;
            }
            sleep(CERTIFICATES).await;
        }
    };
    let defining = async {
        while let Err(error) = definitions::install_upstream(client).await {
            metrics.errors.inc();
            warn!(
                error = crate::error::chain(&error),
                "a definition of others' kinds is missing: policies of this kind may be, too"
            );
            sleep(RETRY).await;
        }
        std::future::pending::<()>().await
    };
    tokio::select! {
        done = rounds => done,
        () = defining => Ok(()),
        () = certifying => Ok(()),
        () = filling => Ok(()),
        () = collector.run() => Ok(()),
        () = reports::run(client, &args.operator_name, metrics) => Ok(()),
        () = balancers::run(client, &args.operator_name, metrics) => Ok(()),
        () = conflicts::run(client, &args.operator_name, metrics) => Ok(()),
    }
}

async fn round(view: &nodes::View, cidrs: &mut cidrs::Cidrs, keeper: &mut life::Keeper) -> Result<()> {
    let given = cidrs.round(view).await.context("giving pod CIDRs");
    let forgotten = keeper.round(view).await?;
    forgotten.iter().for_each(|name| cidrs.forget(name));
    given
}

/// What publishes events; `name` is the replica's.
fn recorder(client: &Client, name: &str) -> Recorder {
    let reporter = Reporter { controller: FIELD_MANAGER.to_owned(), instance: Some(name.to_owned()) };
    Recorder::new(client.clone(), reporter)
}

/// The write lost against another, or its object is there already or gone: the next look decides.
fn is_conflict(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if matches!(status.code, 404 | 409))
}

/// Says who writes, for patches that replace a version.
fn merge() -> PatchParams {
    PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() }
}

async fn client(config: &OperatorConfig) -> Result<Client> {
    let Some(file) = &config.args.api.kubeconfig else {
        // Nothing is remembered: a replica may start on any node.
        let variable = |name: &str| std::env::var(name).ok();
        let servers = Servers::forgetful(&config.args.api.api_servers, variable);
        let client = servers.client().context("there is no --kubeconfig")?;
        let following = client.clone();
        tokio::spawn(async move { servers.ask(following).await });
        return Ok(client);
    };
    crate::kube::bootstrap::client_from(file).await
}
