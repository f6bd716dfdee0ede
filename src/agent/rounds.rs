//! The rounds: look at all tables, work out what the kernel should hold, write it.
//!
//! One task. A round starts when any table changes, takes everything that has
//! changed meanwhile along, and writes nothing before every source has delivered
//! its first full list: until then the kernel goes on with what the agent before
//! left. A round that fails is tried again.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use arc_swap::ArcSwap;
use tokio::sync::{mpsc, watch};

use super::compute::{Compute, Desired, View};
use super::local::LocalAddresses;
use super::publish::{Claims, News};
use super::reconcile::{Applied, Reconciler};
use crate::endpoint::Enforced;
use crate::kube::Tables;
use crate::model::{Endpoint, EndpointId, NodeEndpoints};
use crate::tables::Table;
use crate::telemetry::{ReadyGuard, Telemetry};

/// A round that failed is tried again after this, and then ever later.
const FIRST_RETRY: Duration = Duration::from_millis(50);
const LAST_RETRY: Duration = Duration::from_secs(5);
/// The first round waits so long for identities of pods that were there before the agent.
const CLAIMED_WITHIN: Duration = Duration::from_secs(5);
/// Without any change there is a round all the same: level, not edge.
const IDLE_ROUND: Duration = Duration::from_secs(20);

/// What the last successful round made true; read by the API and the flow names.
pub type Current = ArcSwap<Desired>;

/// Everything that the rounds read and tell.
pub struct Rounds {
    /// From the sources.
    pub tables: Arc<Tables>,
    /// From CNI.
    pub endpoints: Arc<Table<EndpointId, Arc<Endpoint>>>,
    /// From the kernel.
    pub local_addresses: Arc<LocalAddresses>,
    /// Numbers and their memory.
    pub compute: Compute,
    /// The kernel.
    pub reconciler: Reconciler,
    /// Identity numbers that are wanted.
    pub claims: Claims,
    /// Where ADD waits.
    pub enforced: Enforced,
    /// This node's pods, for the others.
    pub published: watch::Sender<Option<News>>,
    /// What is in force.
    pub current: Arc<Current>,
    /// Backends whose sockets are to be ended.
    pub removed_backends: mpsc::UnboundedSender<Vec<SocketAddr>>,
    /// Counts and times.
    pub telemetry: Arc<Telemetry>,
    /// Who this node is, for the others.
    pub this_node: NodeEndpoints,
    /// No round has written anything yet.
    pub is_first: bool,
    /// When the first round could begin.
    pub started: Instant,
}

impl Rounds {
    /// Goes on until the agent ends; `ready` is let go after the first full round.
    pub async fn run(mut self, ready: ReadyGuard) {
        let mut ready = Some(ready);
        let mut endpoint_changes = self.endpoints.subscribe();
        let mut address_changes = self.local_addresses.subscribe();
        let mut pause = FIRST_RETRY;
        self.tables.wait_synced().await;
        loop {
            let changes = self.tables.changed();
            endpoint_changes.mark_unchanged();
            address_changes.mark_unchanged();
            let round = tokio::task::block_in_place(|| self.round());
            self.telemetry.main_loop_alive();
            match round {
                Ok(is_written) => {
                    pause = FIRST_RETRY;
                    if is_written && let Some(guard) = ready.take() {
                        self.reconciler.remove_other_versions();
                        drop(guard);
                    }
                }
                Err(error) => {
                    self.telemetry.round_failed();
                    tracing::error!(error = format!("{error:#}"), retry = ?pause, "programming the datapath");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LAST_RETRY);
                    continue;
                }
            }
            tokio::select! {
                () = changes => {}
                () = tokio::time::sleep(IDLE_ROUND) => {}
                changed = endpoint_changes.changed() => if changed.is_err() { return },
                changed = address_changes.changed() => if changed.is_err() { return },
            }
        }
    }

    /// True if the kernel now holds what was desired.
    fn round(&mut self) -> Result<bool> {
        let start = Instant::now();
        let view = View::of(&self.tables, &self.endpoints, &self.local_addresses);
        let desired = self.compute.desired(&view).context("compiling policies")?;
        self.tables.hold_identities(desired.held.clone());
        self.claims.start(&desired.unclaimed);
        // Pods that ran before this agent did keep their old state until all of them can get
        // the new one: a row that is left out of the first round would be taken away.
        if self.is_first && !desired.unclaimed.is_empty() && self.started.elapsed() < CLAIMED_WITHIN {
            return Ok(false);
        }
        let compiled = start.elapsed();
        let applied = self.reconciler.apply(&desired)?;
        self.telemetry.round_done(compiled, start.elapsed());
        self.tell(desired, applied);
        self.is_first = false;
        Ok(true)
    }

    fn tell(&mut self, desired: Desired, applied: Applied) {
        let Applied { enforced, removed_backends } = applied;
        if !removed_backends.is_empty() && self.removed_backends.send(removed_backends).is_err() {
            tracing::debug!("nobody ends stale sockets any more: the agent is stopping");
        }
        let endpoints = NodeEndpoints { endpoints: desired.published.clone(), ..self.this_node.clone() };
        let news = News { endpoints, coming: desired.coming };
        self.published.send_if_modified(|published| {
            let changed = published.as_ref() != Some(&news);
            if changed {
                *published = Some(news);
            }
            changed
        });
        let waiting = desired.waiting.clone();
        self.current.store(Arc::new(desired));
        self.enforced.publish(enforced, waiting);
    }
}
