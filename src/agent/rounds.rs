//! The rounds: look at all tables, work out what the kernel should hold, write it.
//!
//! One task. A round starts when any table changes, takes everything that has
//! changed meanwhile along, and writes nothing before every source has delivered
//! its first full list: until then the kernel goes on with what the agent before
//! left. What a sink could not write it tries again by itself (`sinks`).

use std::cell::LazyCell;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use tokio::sync::{mpsc, watch};

use super::compute::{Compute, Desired, View};
use super::health_ports::HealthOf;
use super::ipsec;
use super::local::Local;
use super::names::Learned;
use super::proxy::Proxy;
use super::publish::{Claims, News};
use super::removed::{Leaving, Removed};
use super::sinks::{Applied, Retry, Sinks};
use crate::datapath::{Datapath, RuleSets};
use crate::endpoint::{Enforced, is_host_interface_name};
use crate::kube::Tables;
use crate::model::l7::RuleSetId;
use crate::model::{Endpoint, EndpointId, NodeEndpoints};
use crate::netlink::{self, ALL_NEWS, Heard};
use crate::tables::Table;
use crate::telemetry::{ReadyGuard, Telemetry};

/// The first round waits so long for identities of pods that were there before the agent, and for the proxy to have
/// their rules.
const CLAIMED_WITHIN: Duration = Duration::from_secs(5);
/// Without any change there is a round all the same: level, not edge.
const IDLE_ROUND: Duration = Duration::from_secs(20);
/// Rounds for names alone come at most so often: each makes the flows of all pods ask for their verdicts again.
const HEARD_EVERY: Duration = Duration::from_millis(20);

/// The part of the agent that works out what is desired.
const COMPILING: &str = "compiling";

/// What the last round wrote; read by the API and the flow names.
pub type Current = ArcSwap<Desired>;

/// Everything that the rounds read and tell.
pub struct Rounds {
    /// From the sources.
    pub tables: Arc<Tables>,
    /// From CNI.
    pub endpoints: Arc<Table<EndpointId, Arc<Endpoint>>>,
    /// From DNS.
    pub learned: Arc<Learned>,
    /// The rule sets of policies, and the proxy that must have them.
    pub layer7: (RuleSets, Proxy),
    /// From the kernel.
    pub local: Arc<Local>,
    /// From the kernel.
    pub ipsec: ipsec::News,
    /// Verdicts on the host's policies.
    pub host_decided: watch::Receiver<u64>,
    /// Steps in a change of keys.
    pub keys_changed: watch::Receiver<u64>,
    /// Numbers and their memory.
    pub compute: Compute,
    /// The kernel.
    pub sinks: Sinks,
    /// The programs.
    pub datapath: Arc<Datapath>,
    /// That something changed in the kernel.
    pub kernel_news: watch::Receiver<Heard>,
    /// What it has said so far.
    pub heard: Heard,
    /// When compiling is tried again.
    pub compiling: Retry,
    /// Identity numbers that are wanted.
    pub claims: Claims,
    /// Where ADD waits.
    pub enforced: Enforced,
    /// This node's pods, for the others.
    pub published: watch::Sender<Option<News>>,
    /// What is in force.
    pub current: Arc<Current>,
    /// What load balancers are told.
    pub health: watch::Sender<HealthOf>,
    /// Backends whose sockets are to be ended.
    pub removed_backends: mpsc::UnboundedSender<Removed>,
    /// Backends that may still be gone.
    pub leaving: Leaving,
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
        let mut has_other_versions = true;
        let mut endpoint_changes = self.endpoints.subscribe();
        let mut address_changes = self.local.addresses.subscribe();
        let mut device_changes = self.local.devices.subscribe();
        let mut heard_changes = self.learned.subscribe();
        let mut heard_at = tokio::time::Instant::now();
        let mut proxy_known = self.layer7.1.known();
        self.write_early_until_synced().await;
        let tables = self.tables.clone();
        let mut ipsec = self.ipsec.clone();
        let mut host_decided = self.host_decided.clone();
        let mut keys_changed = self.keys_changed.clone();
        loop {
            let mut changes = std::pin::pin!(tables.changed());
            endpoint_changes.mark_unchanged();
            address_changes.mark_unchanged();
            ipsec.mark_unchanged();
            host_decided.mark_unchanged();
            keys_changed.mark_unchanged();
            device_changes.mark_unchanged();
            heard_changes.mark_unchanged();
            proxy_known.mark_unchanged();
            let applied = tokio::task::block_in_place(|| self.round());
            self.telemetry.main_loop_alive();
            if applied.as_ref().is_some_and(|applied| applied.serves_pods) {
                drop(ready.take());
            }
            // Not before everything is attached.
            if has_other_versions && applied.as_ref().is_some_and(|applied| applied.is_complete) {
                self.remove_other_versions();
                has_other_versions = false;
            }
            loop {
                let (pause, is_first) = (self.pause(applied.is_some()), self.is_first);
                tokio::select! {
                    () = &mut changes => break,
                    () = tokio::time::sleep(pause) => break,
                    changed = endpoint_changes.changed() => if changed.is_err() { return } else { break },
                    changed = address_changes.changed() => if changed.is_err() { return } else { break },
                    changed = device_changes.changed() => if changed.is_err() { return } else { break },
                    changed = proxy_known.changed(), if is_first =>
                        if changed.is_err() { return } else { break },
                    changed = heard_changes.changed() => {
                        if changed.is_err() {
                            return;
                        }
                        tokio::time::sleep_until(heard_at + HEARD_EVERY).await;
                        heard_at = tokio::time::Instant::now();
                        break;
                    }
                    changed = ipsec.changed() => if changed.is_err() { return } else { break },
                    changed = host_decided.changed() => if changed.is_err() { return } else { break },
                    changed = keys_changed.changed() => if changed.is_err() { return } else { break },
                    // This alone is no reason for a round: the sinks say when they want one.
                    () = self.wait_for_kernel() => self.hear(),
                }
            }
        }
    }

    /// What the agent before left may be wrong by now, and IPsec policies do not wait for the sources.
    async fn write_early_until_synced(&mut self) {
        let tables = self.tables.clone();
        let synced = tables.wait_synced();
        tokio::pin!(synced);
        loop {
            self.ipsec.mark_unchanged();
            tokio::task::block_in_place(|| self.sinks.write_early());
            tokio::select! {
                () = &mut synced => return,
                _ = self.ipsec.changed() => {}
                () = tokio::time::sleep(IDLE_ROUND) => {}
            }
        }
    }

    /// Tells the sinks what the kernel said. When it can no longer be heard, it is asked again.
    fn hear(&mut self) {
        let now = *self.kernel_news.borrow_and_update();
        let before = std::mem::replace(&mut self.heard, now);
        let is_new = |kind: &netlink::News| now[*kind as usize] != before[*kind as usize];
        self.sinks.heard(&ALL_NEWS.into_iter().filter(is_new).collect::<Vec<_>>());
        if self.kernel_news.has_changed().is_err() {
            match netlink::kernel_news(is_host_interface_name) {
                Ok(again) => (self.kernel_news, self.heard) = (again, Heard::default()),
                Err(error) => tracing::warn!(%error, "following the kernel's network"),
            }
            self.sinks.heard(&ALL_NEWS);
        }
    }

    /// Returns with the next news of the kernel.
    async fn wait_for_kernel(&mut self) {
        if self.kernel_news.changed().await.is_err() {
            tokio::time::sleep(IDLE_ROUND).await;
        }
    }

    /// How long to wait for changes before the next round.
    fn pause(&self, is_written: bool) -> Duration {
        let now = Instant::now();
        let sinks = self.sinks.due().map_or(IDLE_ROUND, |due| due.saturating_duration_since(now));
        match is_written {
            true => sinks.min(IDLE_ROUND),
            // A11: the first round is written at the end of this time at the latest.
            false if self.compiling.is_failing() => {
                self.compiling.due().map_or(IDLE_ROUND, |due| due.saturating_duration_since(now))
            }
            false => IDLE_ROUND.min(CLAIMED_WITHIN.saturating_sub(self.started.elapsed())),
        }
    }

    /// What an agent of another ABI version has left goes when everything is attached.
    fn remove_other_versions(&self) {
        if let Err(error) = self.datapath.end_succession() {
            tracing::warn!(error = crate::error::chain(&error), "removing what another version has left");
        }
    }

    /// Works out what is desired and writes it; `None`: not yet, or it could not be worked out.
    fn round(&mut self) -> Option<Done> {
        let start = Instant::now();
        self.sinks.write_early();
        // Before the snapshot, which has at least this.
        let heard = self.learned.revision();
        let view = View::of(&self.tables, &self.endpoints, &self.local).heard(self.learned.heard());
        let parts = self.telemetry.parts();
        let desired = match self.compute.desired(&view) {
            Ok(desired) => desired,
            Err(error) => {
                self.telemetry.round_failed();
                self.compiling.failed(Instant::now());
                if parts.fails(COMPILING, vec![error.to_string()], true, true) {
                    tracing::error!(%error, "compiling policies");
                }
                return None;
            }
        };
        self.compiling.succeeded();
        parts.works(COMPILING);
        self.tables.hold_identities(desired.held.clone());
        self.claims.start(&desired.unclaimed);
        // Pods that ran before this agent did keep their old state until all of them can get
        // the new one: a row that is left out of the first round would be taken away.
        let can_have_it = desired.unclaimed.is_empty() && self.proxy_has_rules_of(&desired);
        if self.is_first && !can_have_it && self.started.elapsed() < CLAIMED_WITHIN {
            return None;
        }
        let compiled = start.elapsed();
        let applied = self.sinks.apply(&desired);
        self.is_first = false;
        if applied.serves_pods && applied.enforced.contains(&EndpointId::HOST) {
            self.compute.host_in_force();
        }
        if applied.serves_pods {
            self.learned.applied(heard);
        }
        let done = Done { serves_pods: applied.serves_pods, is_complete: applied.is_complete };
        if !done.is_complete {
            self.telemetry.round_failed();
        }
        self.telemetry.round_done(compiled, start.elapsed());
        self.tell_sockets(&view, &desired, &applied.removed_backends);
        self.tell(desired, applied);
        Some(done)
    }

    /// A policy counts when the proxy has its rules. With addresses that are new already and a policy that is old
    /// a pod would be denied what both allow.
    fn proxy_has_rules_of(&self, desired: &Desired) -> bool {
        let (sets, proxy) = &self.layer7;
        if !self.is_first {
            return true;
        }
        let of_policies = desired.policies.values().flat_map(|policy| policy.rule_sets());
        let wanted: BTreeSet<RuleSetId> = of_policies.map(|set| sets.id_of(set)).collect();
        proxy.want(wanted.clone());
        proxy.knows(&wanted)
    }

    fn tell_sockets(&mut self, view: &View, desired: &Desired, unlisted: &[SocketAddr]) {
        // Worked out only where an address is asked for.
        let listed = LazyCell::new(|| view.listed());
        let exists = |backend: &SocketAddr| {
            desired.addresses.contains_key(&backend.ip()) || listed.contains(&backend.ip())
        };
        let Some(removed) = self.leaving.update(unlisted.to_vec(), exists) else { return };
        if self.removed_backends.send(removed).is_err() {
            tracing::debug!("nobody ends stale sockets any more: the agent is stopping");
        }
    }

    fn tell(&mut self, desired: Desired, applied: Applied) {
        let Applied { enforced, held_back, .. } = applied;
        let endpoints = NodeEndpoints { endpoints: desired.published.clone(), ..self.this_node.clone() };
        let news = News { endpoints, coming: desired.coming };
        self.published.send_if_modified(|published| {
            let changed = published.as_ref() != Some(&news);
            if changed {
                *published = Some(news);
            }
            changed
        });
        self.health.send_if_modified(|health| {
            let is_changed = *health != desired.health;
            if is_changed {
                *health = desired.health.clone();
            }
            is_changed
        });
        let mut waiting = desired.waiting.clone();
        waiting.extend(held_back);
        self.current.store(Arc::new(desired));
        self.enforced.publish(enforced, waiting);
    }
}

/// What a round that wrote has reached.
struct Done {
    serves_pods: bool,
    is_complete: bool,
}
