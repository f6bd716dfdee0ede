//! Answers to `weir-cni` and the command line, and what the flow names and the
//! metrics ask: everything that is read from the agent.

mod encryption;
mod naming;
mod policies;
mod services;
mod status;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use arc_swap::ArcSwap;
use tokio::sync::watch;

use super::args::{Config, Routing};
use super::compute::Desired;
use super::lead::Leaders;
use super::names::{Belief, Learned};
use super::ports::Ports;
use super::proxy::Counters;
use super::rounds::Current;
use crate::api::answers::{EndpointRow, IdentityRow, NodeRow};
use crate::api::{Handler, Refusal, Reply, Request};
use crate::datapath::{Datapath, PolicyWriter, RuleOrigins, RuleSets, Usage};
use crate::encryption::Device;
use crate::endpoint::{Manager, Progress};
use crate::flow::{Names, Recorder};
use crate::kube::{Health, Tables};
use crate::model::{EgressRow, Endpoint, EndpointId, IdentityId};
use crate::tables::Table;
use crate::telemetry::{ObjectCounts, Telemetry, WatchHealth};

/// Everything that the agent knows, to be read from anywhere.
pub struct Known {
    pub(super) config: Config,
    pub(super) tables: Arc<Tables>,
    pub(super) health: Arc<Health>,
    pub(super) telemetry: Arc<Telemetry>,
    pub(super) endpoints: Arc<Table<EndpointId, Arc<Endpoint>>>,
    pub(super) current: Arc<Current>,
    pub(super) learned: Arc<Learned>,
    pub(super) proxy: Counters,
    pub(super) recorder: Arc<Recorder>,
    pub(super) leaders: Arc<ArcSwap<Leaders>>,
    progress: watch::Receiver<Progress>,
    loaded: OnceLock<Loaded>,
    started: Instant,
}

/// What there is once the programs run.
struct Loaded {
    datapath: Arc<Datapath>,
    rule_origins: RuleOrigins,
    rule_sets: RuleSets,
    ports: Ports,
    encryption: Option<Arc<Device>>,
    /// Of the way to other nodes' pods.
    mtu: u32,
}

impl Known {
    /// Knows nothing yet.
    pub fn new(
        config: Config,
        telemetry: Arc<Telemetry>,
        endpoints: Arc<Table<EndpointId, Arc<Endpoint>>>,
        progress: watch::Receiver<Progress>,
    ) -> Self {
        let recorder =
            Arc::new(Recorder::new(config.args.flows.records()).redacting(config.args.flows.redact()));
        let belief = Belief {
            guarded: config.args.network.stack_cidrs.clone(),
            believed: config.args.names.names_believe.clone(),
        };
        let bounds = config.args.names.bounds();
        let learned = Learned::new(&config.args.state_dir, bounds, belief, endpoints.clone());
        Self {
            config,
            learned: Arc::new(learned),
            proxy: Counters::default(),
            tables: Arc::default(),
            health: Arc::default(),
            telemetry,
            endpoints,
            current: Arc::new(ArcSwap::from_pointee(Desired::default())),
            leaders: Arc::default(),
            recorder,
            progress,
            loaded: OnceLock::new(),
            started: Instant::now(),
        }
    }

    /// The programs run.
    pub fn loaded(
        self: &Arc<Self>,
        datapath: Arc<Datapath>,
        policies: &PolicyWriter,
        ports: Ports,
        encryption: Option<Arc<Device>>,
        mtu: u32,
    ) {
        let (rule_origins, rule_sets) = (policies.rule_origins(), policies.rule_sets());
        let loaded = Loaded { datapath: datapath.clone(), rule_origins, rule_sets, ports, encryption, mtu };
        let encrypts = loaded.encryption.is_some();
        if self.loaded.set(loaded).is_ok() {
            self.telemetry.show_kernel(datapath);
            if encrypts {
                let known = self.clone();
                self.telemetry.show_peers(move || known.encryption_metrics());
            }
        }
    }

    /// Lets the metrics read what is counted elsewhere.
    pub fn show(self: &Arc<Self>) {
        self.telemetry.show_flows(self.recorder.clone());
        self.learned.show_to(&self.telemetry);
        self.proxy.show_to(&self.telemetry);
        let known = self.clone();
        self.telemetry.show_objects(move || known.counts());
        let known = self.clone();
        self.telemetry.show_watches(move || known.watches());
    }

    /// Answers CHECK: are an endpoint's programs attached?
    pub fn verify_programs(self: Arc<Self>) -> Box<crate::endpoint::VerifyPrograms> {
        Box::new(move |endpoint| {
            let Some(loaded) = self.loaded.get() else {
                return Err("the datapath is not loaded yet".to_owned());
            };
            loaded.datapath.verify_pod(endpoint.host_ifindex).map_err(|error| crate::error::chain(&error))
        })
    }

    fn counts(&self) -> ObjectCounts {
        let current = self.current.load();
        let count = |length: usize| length as u64;
        ObjectCounts {
            endpoints: count(self.endpoints.snapshot().len()),
            endpoints_enforced: count(self.progress.borrow().enforced.len()),
            identities: count(self.tables.identities.snapshot().len()),
            local_identities: count(current.local_identities.len()),
            nodes: count(self.tables.nodes.snapshot().len()),
            policies: count(self.tables.policy_sources().all().count()),
            compiled_policies: count(current.policies.len()),
            services: count(self.tables.services.snapshot().len()),
            addresses: count(current.addresses.len()),
            egress_pods: count(current.egress.selected.len()),
            egress_pods_closed: self.egress_pods(|row| row.node == self.name() && row.gateway.is_none()),
            egress_served: self.egress_pods(|row| row.gateway.as_deref() == Some(self.name())),
        }
    }

    fn name(&self) -> &str {
        &self.config.args.node_name
    }

    fn egress_pods(&self, is_meant: impl Fn(&EgressRow) -> bool) -> u64 {
        let current = self.current.load();
        let pods = current.egress.rows.iter().filter(|row| is_meant(row)).map(|row| &row.pod);
        pods.collect::<BTreeSet<_>>().len() as u64
    }

    fn watches(&self) -> Vec<WatchHealth> {
        let watch = |(kind, health): (crate::kube::Kind, crate::kube::KindHealth)| WatchHealth {
            kind: kind.to_string(),
            is_synced: health.is_synced,
            is_connected: health.is_connected,
            last_event: health.last_event,
            errors_total: health.errors_total,
        };
        self.health.kinds().into_iter().map(watch).collect()
    }

    fn objects_of(&self, kind: crate::kube::Kind) -> u64 {
        kind.count(&self.tables) as u64
    }

    fn endpoint_rows(&self, names: &Names) -> Vec<EndpointRow> {
        let current = self.current.load();
        let progress = self.progress.borrow().clone();
        let usage = self.usage();
        let row = |(id, endpoint): (&EndpointId, &Arc<Endpoint>)| {
            let entry = current.endpoints.get(id);
            let identity = entry.map(|entry| entry.identity);
            EndpointRow {
                id: *id,
                pod: endpoint.pod.clone(),
                ipv4: endpoint.ipv4,
                ipv6: endpoint.ipv6,
                identity,
                labels: identity.map(|identity| labels(names, identity)).unwrap_or_default(),
                policy_id: entry.map(|entry| entry.policy.0).unwrap_or_default(),
                enforces_ingress: entry.is_some_and(|entry| entry.enforces_ingress),
                enforces_egress: entry.is_some_and(|entry| entry.enforces_egress),
                policies: current.selected_by.get(id).map(|policies| policies.to_vec()).unwrap_or_default(),
                is_enforced: progress.enforced.contains(id),
                waiting_for: progress.waiting.get(id).cloned(),
                host_interface: endpoint.host_interface.clone(),
                host_ifindex: endpoint.host_ifindex,
                container_id: endpoint.container_id.clone(),
                usage: usage.get(id).copied().unwrap_or_default(),
            }
        };
        self.endpoints.snapshot().iter().map(row).collect()
    }

    fn usage(&self) -> BTreeMap<EndpointId, Usage> {
        let Some(loaded) = self.loaded.get() else { return BTreeMap::new() };
        loaded.datapath.usage().unwrap_or_else(|error| {
            tracing::warn!(error = crate::error::chain(&error), "reading what pods have");
            BTreeMap::new()
        })
    }

    fn identity_rows(&self, names: &Names) -> Vec<IdentityRow> {
        let current = self.current.load();
        let mut addresses: BTreeMap<IdentityId, Vec<IpAddr>> = BTreeMap::new();
        for (address, entry) in current.addresses.iter() {
            addresses.entry(entry.identity).or_default().push(*address);
        }
        let reserved = [IdentityId::HOST, IdentityId::WORLD, IdentityId::REMOTE_NODE];
        let cluster: Vec<IdentityId> = self.tables.identities.snapshot().keys().copied().collect();
        let ids = reserved.into_iter().chain(cluster).chain(current.local_identities.keys().copied());
        let row = |id| IdentityRow {
            id,
            labels: labels(names, id),
            addresses: addresses.get(&id).cloned().unwrap_or_default(),
        };
        ids.map(row).collect()
    }

    fn node_rows(&self) -> Vec<NodeRow> {
        let this_node = self.config.args.node_name.as_str();
        let published = self.tables.node_endpoints.snapshot();
        let row = |(name, node): (&Arc<str>, &Arc<crate::model::Node>)| {
            let is_this = **name == *this_node;
            let way = match self.config.args.network.routing {
                _ if is_this => "this node",
                Routing::Tunnel => "tunnel",
                Routing::Native => "route",
            };
            let pods = match published.get(name) {
                _ if is_this => self.endpoints.snapshot().len(),
                Some(published) => published.endpoints.len(),
                None => 0,
            };
            NodeRow {
                node: name.to_string(),
                addresses: node.addresses.clone(),
                pod_cidrs: node.pod_cidrs.clone(),
                pods,
                way: way.to_owned(),
            }
        };
        self.tables.nodes.snapshot().iter().map(row).collect()
    }
}

fn refusal(reason: impl Into<String>) -> Refusal {
    Refusal::new(crate::model::cni::ErrorCode::Failed, reason)
}

fn labels(names: &Names, identity: IdentityId) -> Vec<String> {
    names.labels_of(identity).iter().map(ToString::to_string).collect()
}

/// Answers the requests of the socket.
pub struct Answers {
    known: Arc<Known>,
    manager: Arc<Manager>,
    names: Arc<Names>,
}

impl Answers {
    /// Answers from what is known, and lets `manager` work.
    pub fn new(known: Arc<Known>, manager: Arc<Manager>, names: Arc<Names>) -> Self {
        Self { known, manager, names }
    }

    async fn cni<T: serde::Serialize>(
        &self,
        command: &'static str,
        reply: Reply,
        work: impl Future<Output = Result<T, crate::model::cni::Error>>,
    ) {
        let start = Instant::now();
        let outcome = work.await;
        let code = outcome.as_ref().err().map_or(0, |error| error.0.code);
        self.known.telemetry.cni_request(command, code, start.elapsed());
        // The runtime that has gone away asks again, or for a DEL.
        let _ = reply.finish(outcome).await;
    }
}

impl Handler for Answers {
    async fn handle(&self, request: Request, reply: Reply) {
        let known = &self.known;
        let answered = match request {
            Request::CniAdd(request) => return self.cni("ADD", reply, self.manager.add(request)).await,
            Request::CniDel(request) => return self.cni("DEL", reply, self.manager.delete(request)).await,
            Request::CniCheck(request) => return self.cni("CHECK", reply, self.manager.check(request)).await,
            Request::CniGc { valid } => return self.cni("GC", reply, self.manager.gc(valid)).await,
            Request::CniStatus => return self.cni("STATUS", reply, async { self.manager.status() }).await,
            Request::Status => reply.finish(Ok::<_, Refusal>(known.status())).await,
            Request::Endpoints => reply.finish(Ok::<_, Refusal>(known.endpoint_rows(&self.names))).await,
            Request::Identities => reply.finish(Ok::<_, Refusal>(known.identity_rows(&self.names))).await,
            Request::Policies => reply.finish(Ok::<_, Refusal>(known.policy_rows())).await,
            Request::ForeignPolicies => reply.finish(Ok::<_, Refusal>(known.foreign_policies())).await,
            Request::PolicyExplain { from, to, packet } => {
                reply.finish(known.explain(&from, &to, packet).map_err(refused)).await
            }
            Request::PolicyDiff { manifests } => {
                reply.finish(known.policy_diff(&manifests).map_err(refused)).await
            }
            Request::Services => reply.finish(Ok::<_, Refusal>(known.service_rows())).await,
            Request::ServiceTrace(question) => reply.finish(known.service_trace(&question)).await,
            Request::Encryption => {
                let known = known.clone();
                let answer = tokio::task::block_in_place(move || known.encryption());
                reply.finish(Ok::<_, Refusal>(answer)).await
            }
            Request::EncryptionRotate => reply.finish(known.rotate()).await,
            Request::Names => reply.finish(Ok::<_, Refusal>(known.name_rows())).await,
            Request::Egress => {
                let rows = known.current.load().egress.rows.clone();
                reply.finish(Ok::<_, Refusal>(rows)).await
            }
            Request::Nodes => reply.finish(Ok::<_, Refusal>(known.node_rows())).await,
        };
        if answered.is_err() {
            tracing::debug!("a client went away before its answer");
        }
    }
}

fn refused(message: String) -> Refusal {
    Refusal { code: 100, message, details: String::new() }
}
