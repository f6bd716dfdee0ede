//! Metrics, health and readiness: what monitoring asks of an agent.
//!
//! What the kernel and the tables know is read when somebody asks ([`collect`]); only
//! what happens inside the agent is counted as it happens. Everything is served over
//! HTTP by [`serve`]: `/metrics`, `/healthz`, `/readyz`.

mod collect;
mod http;
mod parts;
mod ready;

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

pub use collect::{KernelCounters, ObjectCounts, WatchHealth};
pub use http::{listen, readable, serve, serve_on};
pub use parts::{PartRow, Parts};
pub use ready::{Ready, ReadyGuard};

use crate::flow::Recorder;
use crate::model::PeerState;

/// The main loop is stuck when it has said nothing for so long.
const STUCK_AFTER: Duration = Duration::from_secs(60);

/// Everything that is measured, and whether the agent lives and is ready.
pub struct Telemetry {
    registry: Mutex<Registry>,
    ready: Ready,
    parts: Parts,
    alive: Mutex<Instant>,
    policy_computations: Counter,
    policy_seconds: Histogram,
    round_seconds: Histogram,
    round_errors: Counter,
    cni_requests: Family<CniLabels, Counter>,
    cni_seconds: Family<CommandLabel, Histogram, fn() -> Histogram>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CniLabels {
    command: &'static str,
    code: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CommandLabel {
    command: &'static str,
}

impl Default for Telemetry {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Telemetry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Telemetry").field("pending", &self.ready.pending()).finish_non_exhaustive()
    }
}

impl Telemetry {
    /// Counts from zero; alive, and ready as long as nobody registers a task with [`Ready`].
    pub fn new() -> Self {
        let telemetry = Self::bare();
        telemetry.register();
        telemetry
    }

    /// Without what only an agent does.
    pub fn of_operator() -> Self {
        let telemetry = Self::bare();
        telemetry.register_process();
        telemetry
    }

    fn bare() -> Self {
        Self {
            registry: Mutex::default(),
            ready: Ready::default(),
            parts: Parts::default(),
            alive: Mutex::new(Instant::now()),
            policy_computations: Counter::default(),
            policy_seconds: Histogram::new(exponential_buckets(0.0001, 4.0, 10)),
            round_seconds: Histogram::new(exponential_buckets(0.0001, 4.0, 10)),
            round_errors: Counter::default(),
            cni_requests: Family::default(),
            cni_seconds: Family::new_with_constructor(|| Histogram::new(exponential_buckets(0.001, 2.0, 15))),
        }
    }

    fn register_process(&self) {
        let build = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        let mut registry = self.registry();
        registry.register_collector(Box::new(collect::Process));
        registry.sub_registry_with_prefix("weir").register("build", "The version that runs", build);
    }

    fn register(&self) {
        self.register_process();
        let mut registry = self.registry();
        let weir = registry.sub_registry_with_prefix("weir");
        weir.register_collector(Box::new(collect::AllParts(self.parts.clone())));
        weir.register(
            "policy_computations",
            "How often policies, addresses and services were compiled",
            self.policy_computations.clone(),
        );
        weir.register(
            "policy_computation_duration_seconds",
            "How long compiling took",
            self.policy_seconds.clone(),
        );
        weir.register(
            "round_duration_seconds",
            "How long it took from a change to its being in force",
            self.round_seconds.clone(),
        );
        weir.register(
            "round_errors",
            "How often writing to the kernel did not work and was tried again",
            self.round_errors.clone(),
        );
        weir.register(
            "cni_requests",
            "Requests of the runtime, by result; code 0: done",
            self.cni_requests.clone(),
        );
        weir.register("cni_request_duration_seconds", "How long they took", self.cni_seconds.clone());
    }

    /// What is not ready yet.
    pub fn ready(&self) -> &Ready {
        &self.ready
    }

    /// Why the agent is not ready: what it waits for since its start, and the fault by which no pod can
    /// be connected. A fault that costs single objects is no reason.
    pub fn pending(&self) -> Vec<String> {
        self.ready.pending().into_iter().chain(self.parts.stops_pods()).collect()
    }

    /// How each part of the agent is.
    pub fn parts(&self) -> &Parts {
        &self.parts
    }

    /// Says that the main loop runs; `/healthz` complains when this has not been said for a minute.
    pub fn main_loop_alive(&self) {
        *self.alive.lock().expect("nobody panics while it holds the time") = Instant::now();
    }

    /// For how long the main loop has said nothing, when that is too long.
    pub fn stuck_for(&self) -> Option<Duration> {
        let silent = self.alive.lock().expect("nobody panics while it holds the time").elapsed();
        (silent > STUCK_AFTER).then_some(silent)
    }

    /// A round ended well: compiling took `compiled` of the `total`.
    pub fn round_done(&self, compiled: Duration, total: Duration) {
        self.policy_computations.inc();
        self.policy_seconds.observe(compiled.as_secs_f64());
        self.round_seconds.observe(total.as_secs_f64());
    }

    /// A round did not end well.
    pub fn round_failed(&self) {
        self.round_errors.inc();
    }

    /// The runtime's `command` (`ADD`, `DEL`...) was answered with `code`, 0 for success.
    pub fn cni_request(&self, command: &'static str, code: u32, duration: Duration) {
        self.cni_requests.get_or_create(&CniLabels { command, code }).inc();
        self.cni_seconds.get_or_create(&CommandLabel { command }).observe(duration.as_secs_f64());
    }

    /// From now on the kernel's counters and maps are read at every scrape.
    pub fn show_kernel(&self, kernel: Arc<dyn KernelCounters>) {
        self.add(collect::Kernel(kernel));
    }

    /// From now on the recorder's counters are read at every scrape.
    pub fn show_flows(&self, recorder: Arc<Recorder>) {
        self.add(collect::Flows(recorder));
    }

    /// From now on `count` is asked at every scrape how many objects there are.
    pub fn show_objects(&self, count: impl Fn() -> ObjectCounts + Send + Sync + 'static) {
        self.add(collect::Objects(Box::new(count)));
    }

    /// From now on `peers` is asked at every scrape how the nodes are that this one speaks to encrypted.
    pub fn show_peers(&self, peers: impl Fn() -> Vec<(String, PeerState)> + Send + Sync + 'static) {
        self.add(collect::Peers(Box::new(peers)));
    }

    /// From now on `health` is asked at every scrape how the sources are.
    pub fn show_watches(&self, health: impl Fn() -> Vec<WatchHealth> + Send + Sync + 'static) {
        self.add(collect::Watches(Box::new(health)));
    }

    /// Lets another module register its own metrics, under `weir_`.
    pub fn register_with(&self, register: impl FnOnce(&mut Registry)) {
        register(self.registry().sub_registry_with_prefix("weir"));
    }

    /// Lets another module register its own metrics, under `prefix_`.
    pub fn register_as(&self, prefix: &str, register: impl FnOnce(&mut Registry)) {
        register(self.registry().sub_registry_with_prefix(prefix));
    }

    /// All metrics, as OpenMetrics text.
    pub fn open_metrics(&self) -> Result<String, fmt::Error> {
        let mut text = String::with_capacity(16 * 1024);
        prometheus_client::encoding::text::encode(&mut text, &self.registry())?;
        Ok(text)
    }

    fn add(&self, collector: impl Collector) {
        self.registry().sub_registry_with_prefix("weir").register_collector(Box::new(collector));
    }

    fn registry(&self) -> std::sync::MutexGuard<'_, Registry> {
        self.registry.lock().expect("nobody panics while it holds the registry")
    }
}

#[cfg(test)]
mod tests;
