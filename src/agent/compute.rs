//! From one look at all tables to what the kernel should hold.
//!
//! Pure but for what it remembers: the numbers that the policy compiler gave
//! out, and the last identity of each endpoint, which stays in force while a
//! new one is being claimed.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::confirm::Confirming;
use super::health_ports::HealthOf;
use super::host;
use super::local::Local;
use crate::identity::LabelFilter;
use crate::kube::Tables;
use crate::model::l7::DnsRule;
use crate::model::{
    AddressEntry, AddressPair, Allocation, CompiledPolicy, EgressPolicy, Endpoint, EndpointEntry, EndpointId,
    EndpointSlice, Frontend, FrontendKey, IdentityId, IdentityLabels, LocalIdentity, LocalRedirect, Marks,
    Namespace, NetworkDevice, Node, NodeEndpoints, NodeKey, ObjectKey, Origins, Pod, Policy, PolicyId,
    PolicyRef, PrefixEntry, Priority, PublishedEndpoint, Service, Shaping,
};
use crate::tables::{Snapshot, Table};
use crate::{egress, node, policy, service};

/// Every table at one moment.
pub struct View {
    namespaces: Snapshot<Arc<str>, Arc<Namespace>>,
    pods: Snapshot<ObjectKey, Arc<Pod>>,
    nodes: Snapshot<Arc<str>, Arc<Node>>,
    services: Snapshot<ObjectKey, Arc<Service>>,
    slices: Snapshot<ObjectKey, Arc<EndpointSlice>>,
    policies: policy::Sources,
    references: policy::References,
    identities: Snapshot<IdentityId, Arc<IdentityLabels>>,
    to_claim: Snapshot<IdentityId, ()>,
    node_endpoints: Snapshot<Arc<str>, Arc<NodeEndpoints>>,
    endpoints: Snapshot<EndpointId, Arc<Endpoint>>,
    local_addresses: Snapshot<IpAddr, ()>,
    devices: Snapshot<u32, NetworkDevice>,
    redirects: Snapshot<ObjectKey, Arc<LocalRedirect>>,
    egress: Snapshot<ObjectKey, Arc<EgressPolicy>>,
    allocations: Snapshot<Arc<str>, Arc<Allocation>>,
    heard: policy::Heard,
}

impl View {
    /// Takes the snapshots.
    pub fn of(tables: &Tables, endpoints: &Table<EndpointId, Arc<Endpoint>>, local: &Local) -> Self {
        Self {
            namespaces: tables.namespaces.snapshot(),
            pods: tables.pods.snapshot(),
            nodes: tables.nodes.snapshot(),
            services: tables.services.snapshot(),
            slices: tables.slices.snapshot(),
            policies: tables.policy_sources(),
            references: tables.policy_references(),
            identities: tables.identities.snapshot(),
            to_claim: tables.to_claim.snapshot(),
            node_endpoints: tables.node_endpoints.snapshot(),
            endpoints: endpoints.snapshot(),
            local_addresses: local.addresses.snapshot(),
            devices: local.devices.snapshot(),
            redirects: tables.redirects(),
            egress: tables.egress_policies(),
            allocations: tables.allocations.snapshot(),
            heard: policy::Heard::new(),
        }
    }

    /// With what DNS told pods.
    pub fn heard(self, heard: policy::Heard) -> Self {
        Self { heard, ..self }
    }

    /// The addresses that EndpointSlices have, ready or not.
    pub fn listed(&self) -> HashSet<IpAddr> {
        self.slices.values().flat_map(|slice| &slice.backends).map(|backend| backend.address).collect()
    }
}

impl View {
    /// What the annotations of a pod and of its namespace ask for.
    fn marks_of(&self, endpoint: &Endpoint) -> Marks {
        let namespace = self.namespaces.get(&endpoint.pod.namespace).map(|it| it.marks).unwrap_or_default();
        let pod = self.pods.get(&endpoint.pod).map(|it| it.marks).unwrap_or_default();
        Marks {
            audit: namespace.audit || pod.audit,
            reject: pod.reject.or(namespace.reject),
            egress_bandwidth: pod.egress_bandwidth,
            ingress_bandwidth: pod.ingress_bandwidth,
            priority: pod.priority,
            visibility: pod.visibility.or(namespace.visibility),
        }
    }
}

/// What the kernel should hold, what other nodes should know, and what is still missing.
#[derive(Clone, Debug, Default)]
pub struct Desired {
    /// Rows of `policy_peers` and `policy_rules`.
    pub policies: BTreeMap<PolicyId, Arc<CompiledPolicy>>,
    /// Rows of `addresses`.
    pub addresses: Snapshot<IpAddr, AddressEntry>,
    /// Rows of `prefixes`.
    pub prefixes: Arc<BTreeMap<IpNet, PrefixEntry>>,
    /// Rows of `endpoints`.
    pub endpoints: BTreeMap<EndpointId, EndpointEntry>,
    /// Rows of `egress_rules`, and what people see of them.
    pub egress: Arc<egress::Output>,
    /// Rows of `services` and `backends`.
    pub frontends: Snapshot<FrontendKey, Frontend>,
    /// What this node's local identities mean.
    pub local_identities: Arc<BTreeMap<IdentityId, LocalIdentity>>,
    /// The policies that select each endpoint.
    pub selected_by: BTreeMap<EndpointId, Arc<[PolicyRef]>>,
    /// Those that isolate it, for what comes in and for what goes out.
    pub isolated_by: BTreeMap<EndpointId, [Origins; 2]>,
    /// The names of DNS in the rules of each endpoint that has any.
    pub named_by: Arc<BTreeMap<EndpointId, Arc<[DnsRule]>>>,
    /// The other nodes, for routes.
    pub nodes: Vec<Arc<Node>>,
    /// What pods of this node may send, in bytes a second; of others there is no limit.
    pub bandwidth: BTreeMap<EndpointId, u64>,
    /// What pods of this node may receive, in bytes a second.
    pub receives: BTreeMap<EndpointId, u64>,
    /// What nodes have published of their encryption.
    pub keys: BTreeMap<Arc<str>, NodeKey>,
    /// Rows of `devices`.
    pub devices: Snapshot<u32, NetworkDevice>,
    /// The addresses by which the other nodes know this one.
    pub node_addresses: AddressPair,
    /// This node's pods, for the other nodes.
    pub published: Vec<PublishedEndpoint>,
    /// How many of its pods are not among these yet.
    pub coming: usize,
    /// Endpoints that cannot be enforced yet, and why.
    pub waiting: BTreeMap<EndpointId, String>,
    /// Identities of this node's pods, for as long as they have them.
    pub held: BTreeMap<IdentityId, Arc<IdentityLabels>>,
    /// Label sets without a number.
    pub unclaimed: Vec<Arc<IdentityLabels>>,
    /// What load balancers are told, by Service.
    pub health: HealthOf,
    /// Where Services are seen from.
    pub place: Arc<service::Place>,
    /// Objects that contradict one another, said for people.
    pub conflicts: Vec<String>,
}

impl Desired {
    /// The rules that name addresses outside of the cluster by a name of DNS.
    pub fn named_addresses(&self) -> BTreeMap<IpAddr, Arc<[DnsRule]>> {
        let named = self.prefixes.iter().filter_map(|(net, entry)| {
            let local = self.local_identities.get(&entry.identity)?;
            (!local.names.is_empty()).then(|| (net.addr(), local.names.clone()))
        });
        named.collect()
    }
}

/// The policies of every kind with those of the host, and the labels of the node.
type HostPolicies = (Snapshot<PolicyRef, Arc<Policy>>, Arc<IdentityLabels>);

/// Endpoints whose identity is known.
type Resolved = BTreeMap<EndpointId, (Arc<Endpoint>, IdentityId)>;

/// What is settled when the agent starts.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    /// Which labels make identities.
    pub labels: Arc<LabelFilter>,
    /// A namespace that is not known yet will be: a pod has no identity without its labels. In a directory of
    /// manifests a namespace needs no document.
    pub awaits_namespaces: bool,
    /// Nodes may have addresses outside of their pod CIDRs.
    pub believes_any_address: bool,
    /// Pods are told what they may not send.
    pub rejects: bool,
    /// What Services get that do not say what they want.
    pub services: service::Defaults,
}

/// Turns views into desired states.
pub struct Compute {
    rules: Rules,
    node_name: Arc<str>,
    internal_addresses: Vec<IpAddr>,
    node_addresses: AddressPair,
    owners: node::Addresses,
    prefixes: node::Prefixes,
    frontends: service::Frontends,
    resolver: policy::Resolver,
    compiler: policy::Compiler,
    numbers: HashMap<Arc<IdentityLabels>, IdentityId>,
    numbers_from: (Snapshot<IdentityId, Arc<IdentityLabels>>, Snapshot<IdentityId, ()>),
    asked_labels: BTreeSet<String>,
    asked_by: (Snapshot<PolicyRef, Arc<Policy>>, Snapshot<ObjectKey, Arc<EgressPolicy>>),
    egress: egress::Rules,
    last_identity: BTreeMap<EndpointId, (ObjectKey, IdentityId)>,
    confirming: Option<Arc<Confirming>>,
    /// The policies of the last round, with those that were kept.
    sources: policy::Sources,
}

impl Compute {
    /// Starts numbering above what the maps hold from the agent before. `guarded`: what pods reach through
    /// the node's netfilter.
    pub fn new(
        node_name: &str,
        internal_addresses: Vec<IpAddr>,
        node_addresses: AddressPair,
        guarded: Vec<IpNet>,
        first_policy: PolicyId,
        first_local: IdentityId,
        rules: Rules,
    ) -> Self {
        let Rules { labels, .. } = &rules;
        let compiler = policy::Compiler::new(first_policy, first_local, labels.clone());
        Self {
            rules,
            node_name: node_name.into(),
            internal_addresses,
            node_addresses,
            owners: node::Addresses::default(),
            prefixes: node::Prefixes::new(guarded),
            frontends: service::Frontends::default(),
            resolver: policy::Resolver::default(),
            compiler,
            numbers: HashMap::new(),
            numbers_from: Default::default(),
            asked_labels: BTreeSet::new(),
            asked_by: Default::default(),
            egress: egress::Rules::default(),
            last_identity: BTreeMap::new(),
            confirming: None,
            sources: policy::Sources::default(),
        }
    }

    /// Policies of the host are in force as this says; without it they are not.
    pub fn confirmed_by(self, confirming: Arc<Confirming>) -> Self {
        Self { confirming: Some(confirming), ..self }
    }

    /// The host's policy that was computed last is in the kernel.
    pub fn host_in_force(&self) {
        if let Some(confirming) = &self.confirming {
            confirming.in_force();
        }
    }

    /// The policies with what stays open on the host, and the node's labels, where any policy selects it.
    fn host(&self, view: &View, policies: &Snapshot<PolicyRef, Arc<Policy>>) -> Option<HostPolicies> {
        let found = view.nodes.get(&self.node_name).and_then(|node| host::find(node, &view.policies));
        let names =
            || found.iter().flat_map(|it| &it.names).map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let confirming = self.confirming.as_ref()?;
        if !confirming.ask(found.as_ref().map(|it| it.definition), names) {
            return None;
        }
        let found = found?;
        let own: Vec<IpAddr> = view.local_addresses.keys().copied().collect();
        let wireguard = view
            .allocations
            .values()
            .filter_map(|allocation| allocation.key)
            .flat_map(|key| key.ports())
            .collect();
        let open = host::always_open(&found, &host::api_servers(&view.slices), &own, &wireguard);
        let mut policies = policies.clone();
        policies.insert(open.reference.clone(), Arc::new(open));
        Some((policies, found.labels))
    }

    /// What `view` asks of the kernel.
    pub fn desired(&mut self, view: &View) -> Result<Desired, policy::Error> {
        self.learn_numbers(&view.identities, &view.to_claim);
        let has_pods = |name: &str| view.endpoints.values().any(|it| *it.pod.namespace == *name);
        let is_leaving = |name: &str| match view.namespaces.get(name) {
            Some(namespace) => namespace.is_leaving,
            // Its pods end here after it. In a directory of manifests a namespace needs no document.
            None => self.rules.awaits_namespaces && has_pods(name),
        };
        self.sources = view.policies.clone().kept_from(&self.sources, is_leaving);
        let policies = self.resolver.update(self.sources.clone(), view.references.clone());
        if !self.asked_by.0.ptr_eq(&policies) || !self.asked_by.1.ptr_eq(&view.egress) {
            self.asked_labels = policy::asked_labels(&policies, &self.rules.labels);
            let selectors = view.egress.values().flat_map(|policy| &policy.pods);
            let dropped = selectors.flat_map(|pods| self.rules.labels.dropped(&pods.pods));
            self.asked_labels.extend(dropped.map(str::to_owned));
            self.asked_by = (policies.clone(), view.egress.clone());
        }
        let host = self.host(view, &policies);
        let (policies, host_labels) = match &host {
            Some((policies, labels)) => (policies.clone(), labels.clone()),
            None => (policies, Arc::default()),
        };
        let mut desired = Desired::default();
        let endpoints = self.resolve(view, &mut desired);
        let mut place = service::Place::of(
            &self.node_name,
            view.nodes.values(),
            view.local_addresses.keys().copied(),
            &self.rules.services,
        );
        place.redirects = service::redirects(&view.redirects, &view.pods, &view.endpoints);
        let services = self.frontends.update(&view.services, &view.slices, &place);
        // A Service keeps its address, also where a device of the node has it.
        let is_own = |address: &&IpAddr| !services.frontends.contains_key(&FrontendKey::rest_of(**address));
        let own_addresses: Vec<IpAddr> = view.local_addresses.keys().filter(is_own).copied().collect();
        let is_on_device = |address: &&IpAddr| !address.is_loopback();
        let owners = self.owners.update(&node::Input {
            this_node: &self.node_name,
            internal_addresses: &self.internal_addresses,
            device_addresses: &own_addresses.iter().filter(is_on_device).copied().collect(),
            endpoints: &endpoints,
            nodes: &view.nodes,
            node_endpoints: &view.node_endpoints,
            believes_any_address: self.rules.believes_any_address,
        });
        let mut identities: BTreeMap<_, _> =
            endpoints.iter().map(|(id, (_, identity))| (*id, *identity)).collect();
        if host.is_some() {
            identities.insert(EndpointId::HOST, IdentityId::HOST);
        }
        let pod_cidrs: Vec<IpNet> = view.nodes.values().flat_map(|node| node.pod_cidrs.clone()).collect();
        let audited = endpoints.iter().filter(|(_, (endpoint, _))| view.marks_of(endpoint).audit);
        let audited: BTreeSet<EndpointId> = audited.map(|(id, _)| *id).collect();
        let shown = endpoints.iter().map(|(id, (endpoint, _))| (*id, view.marks_of(endpoint).visibility));
        let shown = shown.filter(|(_, visibility)| !visibility.is_none()).collect();
        let compiled = self.compiler.compile(&policy::Input {
            policies: &policies,
            identities: &view.identities,
            endpoints: &identities,
            audited: &audited,
            shown: &shown,
            host: &host_labels,
            addresses: &owners.addresses,
            pod_cidrs: &pod_cidrs,
            heard: &view.heard,
        })?;
        desired.conflicts = conflicts(&owners.conflicts);
        desired.health = Arc::new(services.health.clone());
        desired.place = Arc::new(place);
        desired.conflicts.extend(services.conflicts.values().flatten().map(ToString::to_string));
        desired.published = endpoints.values().map(|resolved| publish(resolved, view)).collect();
        desired.coming = coming(&self.node_name, view, &endpoints);
        let held = |identity| Some((identity, view.identities.get(&identity)?.clone()));
        desired.held = endpoints.values().filter_map(|(_, identity)| held(*identity)).collect();
        desired.endpoints = endpoint_entries(&endpoints, &compiled);
        if host.is_some() {
            desired.endpoints.extend(host_entry(&self.node_name, &compiled));
        }
        desired.egress = self.egress.update(&egress::Input {
            this_node: &self.node_name,
            policies: &view.egress,
            identities: &view.identities,
            endpoints: &endpoints,
            node_endpoints: &view.node_endpoints,
            addresses: &owners.addresses,
            nodes: &view.nodes,
            devices: &view.devices,
            own_addresses: &view.local_addresses,
            underlay_of: &|node| node::underlay_of(node, &view.nodes, &self.node_name),
        });
        for (id, entry) in &mut desired.endpoints {
            entry.has_gateway = desired.egress.selected.contains(id);
            let selecting = compiled.selected_by.get(id).into_iter().flat_map(|selecting| selecting.iter());
            let of_policies =
                selecting.filter_map(|policy| policies.get(policy)).filter_map(|policy| policy.marks.reject);
            let of_namespace = view.marks_of(&entry.endpoint).reject;
            // Of the policies one that wants it is enough.
            entry.rejects = of_policies.max().or(of_namespace).unwrap_or(self.rules.rejects);
        }
        desired.policies = compiled.policies;
        desired.addresses = compiled.addresses;
        desired.prefixes = self.prefixes.update(&self.node_name, &compiled.prefixes, &view.nodes);
        desired.local_identities = compiled.local_identities;
        desired.selected_by = compiled.selected_by;
        desired.isolated_by = compiled.isolated_by;
        desired.named_by = compiled.named_by;
        desired.frontends = services.frontends.clone();
        let (redirected, refused) =
            service::redirected_addresses(&view.redirects, &view.pods, &view.endpoints, &desired.place);
        desired.conflicts.extend(refused);
        for (key, frontend) in redirected {
            let is_free = !services.frontends.contains_key(&FrontendKey::rest_of(key.address));
            if is_free {
                desired.frontends.entry(key).or_insert(frontend);
            }
        }
        let pods = endpoints.values().map(|(endpoint, _)| endpoint.as_ref());
        for (key, frontend) in service::host_ports(&own_addresses, pods) {
            match desired.frontends.get(&key) {
                Some(there) => {
                    let text = format!(
                        "pod {} has the host port {key}, which is Service {}'s",
                        frontend.service, there.service
                    );
                    desired.conflicts.push(text);
                }
                None => drop(desired.frontends.insert(key, frontend)),
            }
        }
        let marks = |endpoint: &Endpoint| Some(view.pods.get(&endpoint.pod)?.marks);
        for (id, (endpoint, _)) in endpoints.iter() {
            let Some(marks) = marks(endpoint) else { continue };
            desired.bandwidth.extend(marks.egress_bandwidth.map(|rate| (*id, rate)));
            desired.receives.extend(marks.ingress_bandwidth.map(|rate| (*id, rate)));
            let Some(entry) = desired.endpoints.get_mut(id) else { continue };
            entry.shaping = Shaping {
                is_limited: marks.ingress_bandwidth.is_some(),
                priority: marks.priority.map_or(0, Priority::of_packets),
            };
        }
        let key = |(name, row): (&Arc<str>, &Arc<Allocation>)| Some((name.clone(), row.key?));
        desired.keys = view.allocations.iter().filter_map(key).collect();
        let others = view.nodes.values().filter(|node| *node.name != *self.node_name);
        for node in others {
            let Some(published) = view.node_endpoints.get(node.name.as_str()) else { continue };
            for (key, frontend) in service::host_ports_of(node, published, &desired.addresses) {
                desired.frontends.entry(key).or_insert(frontend);
            }
        }
        desired.devices = view.devices.clone();
        if let Some(node) = view.nodes.get(&self.node_name) {
            self.node_addresses = AddressPair::first_of(node.addresses.iter().copied());
        }
        desired.node_addresses = self.node_addresses;
        desired.nodes = view.nodes.values().filter(|node| *node.name != *self.node_name).cloned().collect();
        Ok(desired)
    }

    /// Keeps the way back from labels to numbers; the lowest number wins. One that is to be
    /// claimed first is none yet.
    fn learn_numbers(
        &mut self,
        identities: &Snapshot<IdentityId, Arc<IdentityLabels>>,
        to_claim: &Snapshot<IdentityId, ()>,
    ) {
        if self.numbers_from.0.ptr_eq(identities) && self.numbers_from.1.ptr_eq(to_claim) {
            return;
        }
        self.numbers.clear();
        for (number, labels) in identities.iter().rev().filter(|(number, _)| !to_claim.contains_key(*number))
        {
            self.numbers.insert(labels.clone(), *number);
        }
        self.numbers_from = (identities.clone(), to_claim.clone());
    }

    /// The identity of every endpoint that has one; the others are waiting.
    fn resolve(&mut self, view: &View, desired: &mut Desired) -> Resolved {
        let mut resolved = BTreeMap::new();
        self.last_identity.retain(|id, (pod, _)| view.endpoints.get(id).is_some_and(|at| at.pod == *pod));
        for (id, endpoint) in &view.endpoints {
            match self.identity_of(view, endpoint, desired) {
                Ok(identity) => {
                    self.last_identity.insert(*id, (endpoint.pod.clone(), identity));
                    resolved.insert(*id, (endpoint.clone(), identity));
                }
                Err(reason) => match self.last_identity.get(id) {
                    Some((_, identity)) => drop(resolved.insert(*id, (endpoint.clone(), *identity))),
                    None => drop(desired.waiting.insert(*id, reason)),
                },
            }
        }
        resolved
    }

    fn identity_of(
        &self,
        view: &View,
        endpoint: &Endpoint,
        desired: &mut Desired,
    ) -> Result<IdentityId, String> {
        let pod = view.pods.get(&endpoint.pod).ok_or_else(|| {
            format!("the pod {} is not known yet from the API or the manifests", endpoint.pod)
        })?;
        if let Some(uid) = &endpoint.pod_uid
            && !pod.uid.is_empty()
            && *uid != pod.uid
        {
            return Err(format!("the pod {} known has another UID: waiting for {uid}", endpoint.pod));
        }
        let namespace = view.namespaces.get(&endpoint.pod.namespace).map(Arc::as_ref);
        if namespace.is_none() && self.rules.awaits_namespaces {
            let name = &endpoint.pod.namespace;
            return Err(format!("the namespace {name} is not known yet from the API: its labels count"));
        }
        if namespace.is_some_and(|namespace| namespace.is_partial) {
            let name = &endpoint.pod.namespace;
            return Err(format!("the labels of the namespace {name} cannot be read"));
        }
        let labels = self.rules.labels.labels_of(pod, namespace, &self.asked_labels);
        match self.numbers.get(&labels) {
            Some(number) => Ok(*number),
            None => {
                let labels = Arc::new(labels);
                if !desired.unclaimed.contains(&labels) {
                    desired.unclaimed.push(labels);
                }
                Err(format!("claiming an identity number for the labels of {}", endpoint.pod))
            }
        }
    }
}

/// Counts the pods of `node` that have no endpoint yet.
fn coming(node: &str, view: &View, endpoints: &Resolved) -> usize {
    let there: BTreeSet<_> = endpoints.values().map(|(endpoint, _)| &endpoint.pod).collect();
    let is_own = |pod: &Pod| pod.node.as_deref() == Some(node) && !pod.host_network && !pod.is_terminal;
    view.pods.values().filter(|pod| is_own(pod) && !there.contains(&pod.key)).count()
}

fn publish((endpoint, identity): &(Arc<Endpoint>, IdentityId), view: &View) -> PublishedEndpoint {
    PublishedEndpoint {
        pod: endpoint.pod.clone(),
        addresses: endpoint.addresses().collect(),
        identity: *identity,
        workload: view.pods.get(&endpoint.pod).and_then(|pod| pod.workload.clone()),
        host_ports: endpoint.port_mappings.clone(),
    }
}

/// An endpoint whose policy the compiler does not know yet is left out: what may
/// reach it is not known, so nothing may.
fn endpoint_entries(endpoints: &Resolved, compiled: &policy::Output) -> BTreeMap<EndpointId, EndpointEntry> {
    let entry = |(id, (endpoint, identity)): (&EndpointId, &(Arc<Endpoint>, IdentityId))| {
        let empty = EndpointEntry { endpoint: endpoint.clone(), identity: *identity, ..host::entry("") };
        Some((*id, with_policy(*id, empty, compiled)?))
    };
    endpoints.iter().filter_map(entry).collect()
}

fn host_entry(node: &str, compiled: &policy::Output) -> Option<(EndpointId, EndpointEntry)> {
    let entry = with_policy(EndpointId::HOST, host::entry(node), compiled)?;
    Some((EndpointId::HOST, entry))
}

fn with_policy(id: EndpointId, empty: EndpointEntry, compiled: &policy::Output) -> Option<EndpointEntry> {
    let policy = *compiled.of_endpoint.get(&id)?;
    let rules = compiled.policies.get(&policy);
    Some(EndpointEntry {
        policy,
        enforces_ingress: rules.is_some_and(|rules| rules.ingress.is_some()),
        enforces_egress: rules.is_some_and(|rules| rules.egress.is_some()),
        refuses_strangers: rules
            .and_then(|rules| rules.ingress.as_ref())
            .is_some_and(|ingress| ingress.refuses_strangers),
        ..empty
    })
}

fn conflicts(addresses: &[node::Conflict]) -> Vec<String> {
    let addresses = addresses.iter().map(|conflict| {
        let why = match &conflict.reason {
            node::ConflictReason::OwnedBy(owner) => format!("{owner} has it"),
            node::ConflictReason::ForeignIdentity(identity) => {
                format!("with the identity {identity}, which no pod has")
            }
            node::ConflictReason::OutsidePodCidrs => {
                "which is in none of its pod CIDRs (WEIR_BELIEVE_ANY_ADDRESS)".to_owned()
            }
        };
        format!("node {} claims the address {}: {why}", conflict.node, conflict.address)
    });
    addresses.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::MacAddress;

    fn endpoint(pod: ObjectKey) -> Arc<Endpoint> {
        Arc::new(Endpoint {
            id: EndpointId(1),
            container_id: "c".to_owned(),
            interface: "eth0".to_owned(),
            netns: "/run/netns/x".into(),
            pod,
            pod_uid: None,
            ipv4: "10.0.0.2".parse().ok(),
            ipv6: None,
            host_interface: "weir1".to_owned(),
            host_ifindex: 7,
            mac: MacAddress::default(),
            port_mappings: Vec::new(),
        })
    }

    #[test]
    fn a8_a_pod_waits_for_the_labels_of_its_namespace() {
        let key = ObjectKey::new("shop", "web");
        let (tables, endpoints, local) = (Tables::new(), Table::new(), Local::default());
        endpoints.apply(EndpointId(1), endpoint(key.clone()));
        let pod = Pod {
            key: key.clone(),
            uid: String::new(),
            labels: BTreeMap::new(),
            service_account: "default".to_owned(),
            node: Some("a".to_owned()),
            host_network: false,
            is_terminal: false,
            is_ready: true,
            named_ports: BTreeMap::new(),
            marks: Marks::default(),
            workload: None,
        };
        tables.pods.apply(key, Arc::new(pod));
        let desired = |awaits_namespaces| {
            let rules = Rules { awaits_namespaces, ..Rules::default() };
            let mut compute = Compute::new(
                "a",
                vec![],
                AddressPair::default(),
                vec![],
                PolicyId(1),
                IdentityId::FIRST_LOCAL,
                rules,
            );
            compute.desired(&View::of(&tables, &endpoints, &local)).expect("numbers are left")
        };
        let waiting = desired(true);
        assert!(waiting.unclaimed.is_empty() && waiting.endpoints.is_empty());
        let reason = "the namespace shop is not known yet from the API: its labels count";
        assert_eq!(waiting.waiting.get(&EndpointId(1)).map(String::as_str), Some(reason));
        // In a directory of manifests a namespace needs no document.
        assert_eq!(desired(false).unclaimed.len(), 1);
        let labels = BTreeMap::from([("team".to_owned(), "red".to_owned())]);
        tables.namespaces.apply(
            "shop".into(),
            Arc::new(Namespace { labels: labels.clone(), is_partial: true, ..Namespace::default() }),
        );
        assert!(desired(false).unclaimed.is_empty(), "a namespace that cannot be read has labels that count");
        tables
            .namespaces
            .apply("shop".into(), Arc::new(Namespace { labels, is_partial: false, ..Namespace::default() }));
        let unclaimed = desired(true).unclaimed;
        assert_eq!(unclaimed.len(), 1);
        assert_eq!(unclaimed[0].namespace_labels["team"], "red");
    }
}
