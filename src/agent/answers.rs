//! Answers to `weir-cni` and the command line, and what the flow names and the
//! metrics ask: everything that is read from the agent.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, OnceLock};
use std::time::{Instant, SystemTime};

use arc_swap::ArcSwap;
use tokio::sync::watch;

use super::args::{AgentArgs, Config, Routing};
use super::compute::Desired;
use super::ends::Ends;
use super::lead::{Leader, Leaders};
use super::names::{Belief, Learned};
use super::node::OVERLAY_DEVICE;
use super::policy_diff;
use super::ports::Ports;
use super::proxy::Counters;
use super::rounds::Current;
use super::sinks::few;
use crate::api::answers::{
    AnnouncedRow, BackendPlace, BrokenRow, EncryptionAnswer, EncryptionDevice, EncryptionPeerRow,
    EndpointRow, FeatureRow, IdentityRow, KindRow, NameAddress, NameRow, NodeRow, PolicyRow, ServiceRow,
    StatusAnswer, WaitingRow,
};
use crate::api::{Handler, Refusal, Reply, Request};
use crate::datapath::{Datapath, MapFill, PolicyWriter, RuleOrigins, RuleSets, Usage, UsageKind, maglev};
use crate::encryption::{DEVICE, Device};
use crate::endpoint::{Manager, Progress};
use crate::flow::{Direction, NameSource, NameTables, Names, Recorder};
use crate::kube::foreign::ForeignPolicy;
use crate::kube::{Health, Tables};
use crate::model::l7::RuleSetId;
use crate::model::{
    EgressRow, Endpoint, EndpointId, Frontend, IdentityId, IdentityLabels, LocalIdentity, MatchType, Node,
    ObjectKey, Origins, Peer, PeerState, Policy, PolicyDirection, PolicyRef, Protocol, Scope,
    ServiceQuestion, ServiceTrace,
};
use crate::policy::diff::Change;
use crate::policy::explain::{Explanation, Packet, Question};
use crate::service::{Client, Flow};
use crate::tables::{Snapshot, Table};
use crate::telemetry::{ObjectCounts, Telemetry, WatchHealth};
use crate::{netlink, policy};

/// As `weir status` says it.
fn encryption_text(device: &Device, args: &AgentArgs) -> String {
    let mode = if args.encryption.encryption_strict { "strict" } else { "not strict" };
    format!("{DEVICE} with MTU {}, {mode}, by {}", device.mtu(), device.kind())
}

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

    fn status(&self) -> StatusAnswer {
        let progress = self.progress.borrow().clone();
        let waiting = progress.waiting.into_iter().map(|(endpoint, reason)| WaitingRow { endpoint, reason });
        let source = match &self.config.args.manifests {
            Some(directory) => directory.display().to_string(),
            None => "kubernetes".to_owned(),
        };
        StatusAnswer {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: self.config.args.node_name.clone(),
            kernel: self
                .loaded
                .get()
                .map(|loaded| loaded.datapath.features().kernel.clone())
                .unwrap_or_default(),
            uptime_seconds: self.started.elapsed().as_secs(),
            pending: self.telemetry.pending(),
            parts: self.telemetry.parts().rows(),
            source,
            kinds: self.kinds(),
            broken: self.broken(),
            features: self.features(),
            objects: self.counts(),
            waiting: waiting.collect(),
            announced: self.announced(),
            maps: self.maps(),
            flows: self.recorder.counts(),
            dropped_packets: self.dropped_packets(),
        }
    }

    fn dropped_packets(&self) -> u64 {
        let Some(loaded) = self.loaded.get() else { return 0 };
        let rows = loaded.datapath.metrics().unwrap_or_else(|error| {
            tracing::warn!(error = crate::error::chain(&error), "reading the packet counters");
            Vec::new()
        });
        rows.iter().filter(|row| row.reason != 0).map(|row| row.packets).sum()
    }

    fn maps(&self) -> Vec<MapFill> {
        let Some(loaded) = self.loaded.get() else { return Vec::new() };
        loaded.datapath.map_fill().unwrap_or_else(|error| {
            tracing::warn!(error = crate::error::chain(&error), "counting the rows of maps");
            Vec::new()
        })
    }

    fn kinds(&self) -> Vec<KindRow> {
        let row = |(kind, health): (crate::kube::Kind, crate::kube::KindHealth)| KindRow {
            kind: kind.to_string(),
            objects: self.objects_of(kind),
            is_synced: health.is_synced,
            is_connected: health.is_connected,
            silent_seconds: health
                .last_event
                .and_then(|last| SystemTime::now().duration_since(last).ok())
                .map(|silence| silence.as_secs()),
            errors_total: health.errors_total,
        };
        self.health.kinds().into_iter().map(row).collect()
    }

    fn broken(&self) -> Vec<BrokenRow> {
        let reports = self.health.reports().into_iter().map(|report| BrokenRow {
            source: report.source,
            document: report.document,
            line: report.line,
            object: report.object,
            reason: report.reason,
        });
        let current = self.current.load();
        let conflicts = current.conflicts.iter().map(|reason| BrokenRow {
            source: "objects".to_owned(),
            document: None,
            line: None,
            object: None,
            reason: reason.clone(),
        });
        reports.chain(conflicts).collect()
    }

    fn encryption(&self) -> EncryptionAnswer {
        let is_strict = self.config.args.encryption.encryption_strict;
        let Some(device) = self.loaded.get().and_then(|loaded| loaded.encryption.as_ref()) else {
            return EncryptionAnswer { device: None, is_strict, peers: Vec::new(), error: None };
        };
        let published = device.published();
        let shown = EncryptionDevice {
            name: DEVICE.to_owned(),
            kind: device.kind().to_string(),
            mtu: device.mtu(),
            pid: device.pid(),
            public_key: published.public_key,
            port: published.port,
        };
        let (states, error) = match device.peers() {
            Ok(states) => (states, None),
            Err(error) => (Vec::new(), Some(crate::error::chain(&error))),
        };
        let current = self.current.load();
        let row = |node: &Arc<Node>| {
            let public_key = current.keys.get(node.name.as_str()).map(|key| key.public_key);
            let state = states.iter().find(|state| Some(state.public_key) == public_key);
            EncryptionPeerRow { node: node.name.clone(), public_key, state: state.cloned() }
        };
        let peers = current.nodes.iter().map(row).collect();
        EncryptionAnswer { device: Some(shown), is_strict, peers, error }
    }

    fn encryption_metrics(&self) -> Vec<(String, PeerState)> {
        let peers = self.encryption().peers;
        peers.into_iter().filter_map(|peer| Some((peer.node, peer.state?))).collect()
    }

    /// The MTU of the way to other nodes' pods, and the pods that are older than it.
    fn mtu_text(&self, mtu: u32) -> String {
        let links = match netlink::links() {
            Ok(links) => links,
            Err(error) => return format!("{mtu}; those of the pods are not known: {error}"),
        };
        let mtus: BTreeMap<u32, u32> = links.iter().map(|link| (link.index, link.mtu)).collect();
        let endpoints = self.endpoints.snapshot();
        let wider = endpoints.values().filter_map(|endpoint| {
            let own = mtus.get(&endpoint.host_ifindex).filter(|own| **own > mtu)?;
            Some(format!("{} ({own})", endpoint.pod))
        });
        let wider: Vec<String> = wider.collect();
        match wider.is_empty() {
            true => mtu.to_string(),
            false => format!(
                "{mtu}, less than that of {}: their TCP is told, other packets that are too long are cut on the way",
                few(&wider)
            ),
        }
    }

    fn features(&self) -> Vec<FeatureRow> {
        let args = &self.config.args;
        let mut rows = vec![("routing", format!("{:?}", args.network.routing).to_lowercase())];
        if let Some(loaded) = self.loaded.get() {
            let features = loaded.datapath.features();
            rows.push(("attach", format!("{:?}", features.attach).to_lowercase()));
            let ended_by = if features.has_socket_destroy { "iterator" } else { "sock_diag" };
            rows.push(("limits of a pod", limits_text(&loaded.datapath)));
            rows.push(("stale sockets ended by", ended_by.to_owned()));
            rows.push(("mtu", self.mtu_text(loaded.mtu)));
            if args.network.routing == Routing::Tunnel {
                let way = match loaded.datapath.allows_past_stack() {
                    Ok(true) if args.network.tunnel_direct => "direct".to_owned(),
                    Ok(_) => format!("by {OVERLAY_DEVICE}"),
                    Err(error) => crate::error::chain(&error),
                };
                rows.push(("tunnel packets", way));
            }
            rows.extend(by_the_stack(&loaded.datapath));
            rows.extend(loaded.datapath.wires().into_iter().map(|device| ("xdp", device)));
            if args.nat.masquerade {
                rows.push(("masquerade ports", loaded.ports.to_string()));
            }
            let order = if features.fragments_wait { "wait for the first" } else { "dropped: no tbf queue" };
            rows.push(("fragments out of order", order.to_owned()));
            for (program, reason) in &features.not_loaded {
                rows.push(("left out", format!("{program}: {reason}")));
            }
        }
        let device = self.loaded.get().and_then(|loaded| loaded.encryption.as_ref());
        rows.push((
            "encryption",
            device.map_or_else(|| "off".to_owned(), |device| encryption_text(device, args)),
        ));
        rows.push(("names of DNS", self.learned.said()));
        rows.push(("socket load balancing", args.kernel.socket_lb.to_string()));
        rows.push(("masquerade", args.nat.masquerade.to_string()));
        rows.push(("flow events", args.flows.flow_events.to_string()));
        rows.into_iter().map(|(name, value)| FeatureRow { name: name.to_owned(), value }).collect()
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

    fn policy_rows(&self) -> Vec<PolicyRow> {
        let current = self.current.load();
        let selects = |policy: &PolicyRef| {
            let selected = current.selected_by.iter().filter(|(_, policies)| policies.contains(policy));
            selected.map(|(endpoint, _)| *endpoint).collect()
        };
        let rules = |direction: &Option<PolicyDirection>| direction.as_ref().map(|it| it.rules.len());
        let row = |policy: &Policy| PolicyRow {
            policy: policy.reference.clone(),
            tier: format!("{:?}", policy.tier),
            ingress_rules: rules(&policy.ingress),
            egress_rules: rules(&policy.egress),
            layer7: layer7_of(policy),
            endpoints: selects(&policy.reference),
            doubts: policy.doubts.clone(),
        };
        let sources = self.tables.policy_sources();
        sources.all().map(row).collect()
    }

    fn foreign_policies(&self) -> Vec<ForeignPolicy> {
        let found = self.tables.foreign.snapshot();
        found.values().flat_map(|policies| policies.iter().cloned()).collect()
    }

    fn explain(&self, from: &str, to: &str, packet: Packet) -> Result<Explanation, String> {
        let policies =
            policy::Resolver::default().update(self.tables.policy_sources(), self.tables.policy_references());
        let filter = &self.config.args.rules.identity_labels;
        let asked = policy::asked_labels(&policies, filter);
        let endpoints = self.endpoints.snapshot();
        let local = endpoints.values().map(|it| (it.pod.clone(), it.addresses().collect())).collect();
        let node = self.config.args.node_name.as_str();
        let named = self.current.load().named_addresses();
        let ends = Ends { tables: &self.tables, filter, asked: &asked, local, named, node };
        let (from, to) = (ends.find(from)?, ends.find(to)?);
        Ok(Question { policies: &policies, filter, from: &from, to: &to, packet }.answer())
    }

    fn policy_diff(&self, manifests: &str) -> Result<Vec<Change>, String> {
        let current = self.current.load();
        let pods = current.endpoints.iter().filter(|(id, _)| **id != EndpointId::HOST);
        let endpoints = pods.map(|(id, entry)| (*id, entry.identity)).collect();
        let identities = self.tables.identities.snapshot();
        let addresses = Snapshot::new();
        let pods =
            policy_diff::Pods { identities: &identities, endpoints: &endpoints, addresses: &addresses };
        let filter = Arc::new(self.config.args.rules.identity_labels.clone());
        policy_diff::of_endpoints(&self.tables, manifests, &pods, &filter)
    }

    /// What pods were told, by pod and name.
    fn name_rows(&self) -> Vec<NameRow> {
        let (current, endpoints) = (self.current.load(), self.endpoints.snapshot());
        let sources = self.tables.policy_sources();
        let policies: Vec<&Policy> =
            sources.all().flat_map(|policy| std::iter::once(policy).chain(&policy.others)).collect();
        let mut rows: Vec<NameRow> = Vec::new();
        for line in self.learned.lines() {
            let address = NameAddress { address: line.address, seconds_left: line.seconds_left };
            if let Some(row) = rows.last_mut()
                && row.endpoint == line.endpoint
                && *row.name == *line.name
            {
                row.addresses.push(address);
                continue;
            }
            let selecting = current.selected_by.get(&line.endpoint);
            let is_selecting = |policy: &PolicyRef| selecting.is_some_and(|all| all.contains(policy));
            let naming =
                policies.iter().filter(|it| is_selecting(&it.reference) && names_by_dns(it, &line.name));
            rows.push(NameRow {
                endpoint: line.endpoint,
                pod: endpoints.get(&line.endpoint).map(|endpoint| endpoint.pod.clone()),
                name: line.name.to_string(),
                policies: naming.map(|policy| policy.reference.clone()).collect(),
                addresses: vec![address],
            });
        }
        rows
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

    fn service_rows(&self) -> Vec<ServiceRow> {
        let current = self.current.load();
        let leaders = self.leaders.load();
        let row = |(key, frontend): (&crate::model::FrontendKey, &crate::model::Frontend)| {
            let protocol: Protocol = key.protocol?;
            Some(ServiceRow {
                service: ObjectKey::clone(&frontend.service),
                kind: frontend.kind,
                scope: key.scope,
                address: key.address,
                port: key.port,
                protocol: protocol.to_string(),
                algorithm: frontend.algorithm,
                forwarding: frontend.forwarding,
                affinity_seconds: frontend.affinity,
                source_ranges: frontend.source_ranges.to_vec(),
                backends: frontend.addresses().collect(),
                places: frontend.backends.iter().map(place).collect(),
                draining: frontend.draining.to_vec(),
                has_others: frontend.has_others,
                leader: leader_of(&leaders, &frontend.service, key.address),
            })
        };
        current.frontends.iter().filter_map(row).collect()
    }

    /// The addresses that nodes answer for, with the node.
    fn announced(&self) -> Vec<AnnouncedRow> {
        let leaders = self.leaders.load();
        let row = |(service, leader): (&ObjectKey, &Leader)| AnnouncedRow {
            service: service.clone(),
            addresses: leader.addresses.iter().copied().collect(),
            node: leader.node.clone(),
            devices: leader.devices.iter().cloned().collect(),
        };
        leaders.iter().map(row).collect()
    }

    /// Worked out anew from the tables: nothing is kept for whoever might ask.
    fn service_trace(&self, question: &ServiceQuestion) -> Result<ServiceTrace, Refusal> {
        let current = self.current.load();
        let client = self.service_client(&question.client)?;
        let mut services = crate::service::Frontends::default();
        services.update(&self.tables.services.snapshot(), &self.tables.slices.snapshot(), &current.place);
        services.trace(client, question, |of, flow| self.maglev(of, flow)).map_err(refusal)
    }

    /// The backend that the programs choose for a flow by Maglev's table.
    fn maglev(&self, frontend: &Frontend, flow: Flow) -> Option<SocketAddr> {
        let backends: Vec<_> =
            frontend.backends.iter().map(|backend| (backend.address, backend.weight)).collect();
        let table = maglev::table(&backends, self.config.args.services.maglev_table_size);
        let index = maglev::choose(&table, flow.client, flow.frontend, flow.protocol)?;
        backends.get(usize::try_from(index).ok()?).map(|(address, _)| *address)
    }

    /// Whoever is of the cluster asks from within.
    fn service_client(&self, text: &str) -> Result<Client, Refusal> {
        let of = |scope, address| Ok(Client { scope, address, port: None });
        match text {
            "node" => return of(Scope::Internal, None),
            "world" => return of(Scope::External, None),
            _ => {}
        }
        if let Ok(address) = text.parse::<IpAddr>() {
            let is_inside = self.current.load().addresses.contains_key(&address);
            return of(if is_inside { Scope::Internal } else { Scope::External }, Some(address));
        }
        if let Ok(from) = text.parse::<SocketAddr>() {
            let client = self.service_client(&from.ip().to_string())?;
            return Ok(Client { port: Some(from.port()), ..client });
        }
        let endpoints = self.endpoints.snapshot();
        let Some(endpoint) = endpoints.values().find(|endpoint| endpoint.pod.to_string() == text) else {
            let node = &self.config.args.node_name;
            return Err(refusal(format!(
                "{text} is no pod of the node {node}: the agent of its own node knows what it gets. A client is a \
                 pod as NAMESPACE/NAME, an address, node or world"
            )));
        };
        let addresses: Vec<IpAddr> = endpoint.addresses().collect();
        let address = if let [only] = *addresses { Some(only) } else { None };
        of(Scope::Internal, address)
    }
}

fn refusal(reason: impl Into<String>) -> Refusal {
    Refusal::new(crate::model::cni::ErrorCode::Failed, reason)
}

fn place(backend: &crate::model::Backend) -> BackendPlace {
    BackendPlace {
        node: backend.node.as_deref().map(str::to_owned),
        zone: backend.zone.as_deref().map(str::to_owned),
        is_terminating: backend.is_terminating,
        weight: backend.weight,
    }
}

/// What a pod may have.
fn limits_text(datapath: &Datapath) -> String {
    let limits = UsageKind::ALL.into_iter().zip(datapath.limits().of_one);
    let limits: Vec<_> =
        limits.map(|(kind, limit)| format!("{limit} {}", kind.name().replace('_', " "))).collect();
    limits.join(", ")
}

fn labels(names: &Names, identity: IdentityId) -> Vec<String> {
    names.labels_of(identity).iter().map(ToString::to_string).collect()
}

impl NameSource for Known {
    fn tables(&self) -> NameTables {
        NameTables {
            endpoints: self.endpoints.snapshot(),
            node_endpoints: self.tables.node_endpoints.snapshot(),
            services: self.tables.services.snapshot(),
        }
    }

    fn identity(&self, id: IdentityId) -> Option<Arc<IdentityLabels>> {
        self.tables.identities.get(&id)
    }

    fn local_identity(&self, id: IdentityId) -> Option<LocalIdentity> {
        self.current.load().local_identities.get(&id).cloned()
    }

    fn rule_origin(&self, rule_id: u32) -> Option<Origins> {
        self.loaded.get()?.rule_origins.get(rule_id)
    }

    fn rule_set_origin(&self, id: RuleSetId) -> Option<Origins> {
        Some(self.loaded.get()?.rule_sets.get(id)?.origins)
    }

    fn is_audit(&self, rule_id: u32) -> bool {
        rule_id != 0 && self.loaded.get().is_some_and(|loaded| loaded.rule_origins.is_audit(rule_id))
    }

    fn match_type(&self, rule_id: u32) -> MatchType {
        self.loaded.get().map_or(MatchType::None, |loaded| loaded.rule_origins.match_type(rule_id))
    }

    fn isolating(&self, endpoint: EndpointId, direction: Direction) -> Origins {
        let current = self.current.load();
        let Some([ingress, egress]) = current.isolated_by.get(&endpoint) else { return Origins::default() };
        match direction {
            Direction::Egress => egress.clone(),
            _ => ingress.clone(),
        }
    }
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

/// What of a policy goes beyond addresses and ports.
fn layer7_of(policy: &Policy) -> Vec<String> {
    let mut said = BTreeSet::new();
    for policy in std::iter::once(policy).chain(&policy.others) {
        let directions = policy.ingress.iter().chain(&policy.egress);
        for rule in directions.flat_map(|direction| &direction.rules) {
            said.extend(rule.l7.as_ref().map(|rules| rules.protocol().to_owned()));
            if rule.peers.iter().flatten().any(|peer| matches!(peer, Peer::Name(_))) {
                said.insert("names".to_owned());
            }
        }
    }
    said.into_iter().collect()
}

/// True if a rule of the policy means a name of DNS.
fn names_by_dns(policy: &Policy, name: &str) -> bool {
    let rules = policy.egress.iter().flat_map(|direction| &direction.rules);
    let mut peers = rules.flat_map(|rule| rule.peers.iter().flatten());
    peers.any(|peer| matches!(peer, Peer::Name(rule) if rule.pattern().matches_text(name)))
}

fn refused(message: String) -> Refusal {
    Refusal { code: 100, message, details: String::new() }
}

/// Rules of the node's netfilter that pods' packets do not meet: they go past the stack.
fn by_the_stack(datapath: &Datapath) -> Option<(&'static str, String)> {
    let value = match (datapath.allows_past_stack(), netlink::forward_drops()) {
        (Ok(false), _) | (_, Ok(0)) => return None,
        (_, Ok(drops)) => format!(
            "{drops} rules and policies drop what is forwarded: what pods send out of the cluster meets them \
             only where it goes to --stack-cidrs"
        ),
        (_, Err(error)) => error.to_string(),
    };
    Some(("netfilter", value))
}

fn leader_of(leaders: &Leaders, service: &ObjectKey, address: IpAddr) -> Option<String> {
    let leader = leaders.get(service).filter(|leader| leader.addresses.contains(&address))?;
    Some(leader.node.clone())
}
