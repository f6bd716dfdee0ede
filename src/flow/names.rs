//! From addresses and numbers to names, when somebody reads.
//!
//! The index of addresses follows the tables by their differences. A name outlives its
//! pod by a while, with the time until which it was valid: a record is named after who
//! had the address when it was made, not after who has it now.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::{Arc, Mutex};

use imbl::ordmap::DiffItem;

use crate::datapath::types::{event_flags, event_type};
use crate::model::l7::RuleSetId;
use crate::model::{
    Endpoint, EndpointId, IdentityId, IdentityLabels, LocalIdentity, MatchType, NodeEndpoints, ObjectKey,
    Origins, PublishedEndpoint, Service, Workload,
};
use crate::tables::Snapshot;

use super::record::{
    Counts, Direction, EventType, Flow, FlowService, Icmp, L4Protocol, Party, TcpFlags, Verdict,
};
use super::{Clock, DropReason, Event, ip_of, monotonic_ns};

/// How long a name is kept after it is gone.
const KEPT_NS: u64 = 3_600_000_000_000;
/// How many names that are gone are kept at most.
const KEPT: usize = 65_536;
/// How long after a pod's end its address still means it, unless another pod has it.
const GRACE_NS: u64 = 30_000_000_000;
/// Identities whose labels are kept ready.
const LABELS_KEPT: usize = 65_536;

/// Tables that names come from, read at one moment.
#[derive(Clone, Default)]
pub struct NameTables {
    /// Pods of this node.
    pub endpoints: Snapshot<EndpointId, Arc<Endpoint>>,
    /// Pods of every node.
    pub node_endpoints: Snapshot<Arc<str>, Arc<NodeEndpoints>>,
    /// Services.
    pub services: Snapshot<ObjectKey, Arc<Service>>,
}

/// Where names come from: the agent's tables and compilers.
pub trait NameSource: Send + Sync + 'static {
    /// The tables now.
    fn tables(&self) -> NameTables;
    /// What a cluster identity stands for.
    fn identity(&self, id: IdentityId) -> Option<Arc<IdentityLabels>>;
    /// What an identity of this node's own stands for.
    fn local_identity(&self, id: IdentityId) -> Option<LocalIdentity>;
    /// The policies that a rule number of the maps comes from.
    fn rule_origin(&self, rule_id: u32) -> Option<Origins>;
    /// What that rule lets through its policies would deny: they only report it.
    fn is_audit(&self, _rule_id: u32) -> bool {
        false
    }
    /// What of a packet that rule looked at.
    fn match_type(&self, _rule_id: u32) -> MatchType {
        MatchType::None
    }
    /// The policies that a rule set of layer 7 comes from.
    fn rule_set_origin(&self, _id: RuleSetId) -> Option<Origins> {
        None
    }
    /// The policies that isolate a pod of this node in a direction, as they are now.
    fn isolating(&self, _endpoint: EndpointId, _direction: Direction) -> Origins {
        Origins::default()
    }
}

/// Names events.
pub struct Names {
    node: Arc<str>,
    source: Arc<dyn NameSource>,
    index: Mutex<Index>,
}

#[derive(Default)]
struct Index {
    tables: NameTables,
    pods: HashMap<IpAddr, Vec<Tenancy>>,
    /// Addresses with a tenancy that has ended, and when; the oldest first.
    ended: VecDeque<(u64, IpAddr)>,
    services: HashMap<IpAddr, ObjectKey>,
    labels: HashMap<IdentityId, Arc<[Arc<str>]>>,
}

/// An address, who has it, and what made that pod, as a table says.
type Row = (IpAddr, ObjectKey, Option<Workload>);

/// The time for which a pod had an address.
struct Tenancy {
    pod: ObjectKey,
    workload: Option<Workload>,
    from_ns: u64,
    /// `None`: it has it.
    until_ns: Option<u64>,
    /// How many rows of the tables say so: the pod's own node has two.
    claims: u32,
}

impl Names {
    /// Names for events of `node`.
    pub fn new(node: impl Into<Arc<str>>, source: Arc<dyn NameSource>) -> Self {
        Self { node: node.into(), source, index: Mutex::default() }
    }

    /// Follows the tables; costs next to nothing when they have not changed.
    pub fn refresh(&self) {
        self.refresh_at(monotonic_ns());
    }

    pub(super) fn refresh_at(&self, now_ns: u64) {
        let tables = self.source.tables();
        self.index.lock().expect("nobody panics while it holds the index").follow(tables, now_ns);
    }

    /// The flow that `event` records.
    pub fn flow(&self, event: &Event, clock: &Clock) -> Flow {
        let mut index = self.index.lock().expect("nobody panics while it holds the index");
        let protocol = L4Protocol::from(event.protocol);
        let mut party = |addr, port: u16, identity, endpoint| {
            let ip = ip_of(addr);
            let identity = IdentityId(identity);
            let tenancy = index.tenancy(ip, event.timestamp_ns);
            let pod = tenancy.map(|tenancy| tenancy.pod.clone());
            let workload = tenancy.and_then(|tenancy| tenancy.workload.clone());
            let labels = self.labels(&mut index.labels, identity);
            Party {
                ip,
                port: if protocol.has_ports() { u16::from_be(port) } else { 0 },
                identity,
                endpoint: (endpoint != 0).then_some(EndpointId(endpoint)),
                namespace: pod.as_ref().map_or_else(|| namespace_of(&labels), |pod| pod.namespace.clone()),
                pod_name: pod.map_or_else(Arc::default, |pod| pod.name),
                workload,
                labels,
            }
        };
        let source = party(event.source, event.source_port, event.source_identity, event.source_endpoint);
        let destination = party(
            event.destination,
            event.destination_port,
            event.destination_identity,
            event.destination_endpoint,
        );
        let is_forwarded = event.reason == 0;
        let only = |origins: Origins, is_so: bool| if is_so { origins } else { Origins::default() };
        let decided = self.policies(event.rule_id);
        let is_at_source = Direction::from(event.direction) == Direction::Egress;
        let out = only(decided.clone(), is_forwarded && is_at_source);
        let into = only(self.policies(event.ingress_rule_id), is_forwarded);
        let is_audit = |rule_id| is_forwarded && self.is_audit(rule_id);
        let (egress_allowed_by, egress_audited_by) = split(out, is_audit(event.rule_id));
        let (ingress_allowed_by, ingress_audited_by) = split(into, is_audit(event.ingress_rule_id));
        Flow {
            time: clock.wall(event.timestamp_ns),
            node_name: self.node.clone(),
            event_type: event_type_of(event),
            verdict: self.verdict(event),
            drop_reason_desc: (!is_forwarded).then_some(DropReason(event.reason)),
            traffic_direction: Direction::from(event.direction),
            is_reply: has_flag(event, event_flags::EVENT_REPLY),
            protocol,
            source,
            destination,
            service: has_flag(event, event_flags::EVENT_SERVICE).then(|| index.service(event)),
            tcp_flags: TcpFlags(if protocol == L4Protocol::Tcp { event.tcp_flags } else { 0 }),
            icmp: matches!(protocol, L4Protocol::IcmpV4 | L4Protocol::IcmpV6)
                .then_some(Icmp { r#type: event.icmp_type, code: event.icmp_code }),
            policies: match (decided.is_empty(), is_audit(event.ingress_rule_id)) {
                (false, _) => decided,
                (true, false) => ingress_allowed_by.clone(),
                (true, true) => ingress_audited_by.clone(),
            },
            policy_match: self.match_type(event),
            egress_allowed_by,
            ingress_allowed_by,
            egress_audited_by,
            ingress_audited_by,
            packets: Counts { source: event.packets[0], destination: event.packets[1] },
            bytes: Counts { source: event.bytes[0], destination: event.bytes[1] },
            ifindex: event.ifindex,
            round_trip: super::round_trip::decode(event.round_trip),
        }
    }

    /// The policies that isolate the pod whose policy judged `event`.
    pub fn isolating(&self, event: &Event) -> Origins {
        let direction = Direction::from(event.direction);
        let endpoint = match direction {
            Direction::Egress => event.source_endpoint,
            _ => event.destination_endpoint,
        };
        self.source.isolating(EndpointId(endpoint), direction)
    }

    /// What became of what `event` records.
    pub fn verdict(&self, event: &Event) -> Verdict {
        let is_audit = || [event.rule_id, event.ingress_rule_id].into_iter().any(|id| self.is_audit(id));
        match event.reason == 0 {
            true if is_audit() => Verdict::Audit,
            true => Verdict::Forwarded,
            false => Verdict::Dropped,
        }
    }

    fn is_audit(&self, rule_id: u32) -> bool {
        rule_id != 0 && self.source.is_audit(rule_id)
    }

    /// What the rule looked at that decided: in the direction of the event, or at its destination.
    pub fn match_type(&self, event: &Event) -> MatchType {
        match (event.rule_id, event.ingress_rule_id) {
            (0, 0) => MatchType::None,
            (0, rule_id) | (rule_id, _) => self.source.match_type(rule_id),
        }
    }

    /// The policies that a rule set of layer 7 comes from.
    pub fn rule_set(&self, id: RuleSetId) -> Origins {
        self.source.rule_set_origin(id).unwrap_or_default()
    }

    fn policies(&self, rule_id: u32) -> Origins {
        let known = (rule_id != 0).then(|| self.source.rule_origin(rule_id));
        known.flatten().unwrap_or_default()
    }

    /// Both sides of an event, as far as they are pods.
    pub fn pods_of(&self, event: &Event) -> [Option<ObjectKey>; 2] {
        let index = self.index.lock().expect("nobody panics while it holds the index");
        [event.source, event.destination]
            .map(|addr| index.tenancy(ip_of(addr), event.timestamp_ns).map(|tenancy| tenancy.pod.clone()))
    }

    /// The labels of an identity, each with its source.
    pub fn labels_of(&self, identity: IdentityId) -> Arc<[Arc<str>]> {
        let mut index = self.index.lock().expect("nobody panics while it holds the index");
        self.labels(&mut index.labels, identity)
    }

    /// An identity's labels never change, so what was once known stays right.
    fn labels(
        &self,
        known: &mut HashMap<IdentityId, Arc<[Arc<str>]>>,
        identity: IdentityId,
    ) -> Arc<[Arc<str>]> {
        if let Some(labels) = known.get(&identity) {
            return labels.clone();
        }
        let labels: Arc<[Arc<str>]> = self.make_labels(identity).into_iter().map(Arc::from).collect();
        if !labels.is_empty() {
            if known.len() >= LABELS_KEPT {
                known.clear();
            }
            known.insert(identity, labels.clone());
        }
        labels
    }

    fn make_labels(&self, identity: IdentityId) -> Vec<String> {
        if let Some(name) = reserved_name(identity) {
            return vec![format!("reserved:{name}")];
        }
        if !identity.is_local() {
            return self.source.identity(identity).map_or_else(Vec::new, |labels| cluster_labels(&labels));
        }
        let Some(LocalIdentity { base, prefixes, names }) = self.source.local_identity(identity) else {
            return Vec::new();
        };
        let mut labels: Vec<String> = prefixes.iter().map(|prefix| format!("cidr:{prefix}")).collect();
        labels.extend(names.iter().map(|rule| format!("fqdn:{}", rule.text())));
        labels.extend(match base {
            Some(base) if !base.is_local() => self.make_labels(base),
            _ => vec!["reserved:world".to_owned()],
        });
        labels
    }
}

/// Policies that let something through, and those that would have denied it.
fn split(origins: Origins, is_audit: bool) -> (Origins, Origins) {
    if is_audit { (Origins::default(), origins) } else { (origins, Origins::default()) }
}

impl Index {
    fn follow(&mut self, tables: NameTables, now_ns: u64) {
        let old = std::mem::replace(&mut self.tables, tables);
        let new = self.tables.clone();
        for change in old.endpoints.diff(&new.endpoints) {
            let (before, after) = sides(change);
            let rows = |endpoint: Option<&Arc<Endpoint>>| {
                endpoint.map_or_else(Vec::new, |endpoint| {
                    endpoint.addresses().map(|ip| (ip, endpoint.pod.clone(), None)).collect()
                })
            };
            self.change(rows(before), rows(after), now_ns);
        }
        for change in old.node_endpoints.diff(&new.node_endpoints) {
            let (before, after) = sides(change);
            let rows = |node: Option<&Arc<NodeEndpoints>>| {
                let pods = node.iter().flat_map(|node| &node.endpoints);
                let rows = |pod: &PublishedEndpoint| {
                    let (key, workload) = (pod.pod.clone(), pod.workload.clone());
                    let row = move |ip: &IpAddr| (*ip, key.clone(), workload.clone());
                    pod.addresses.iter().map(row).collect::<Vec<_>>()
                };
                pods.flat_map(rows).collect()
            };
            self.change(rows(before), rows(after), now_ns);
        }
        for change in old.services.diff(&new.services) {
            let (before, after) = sides(change);
            let addresses = |service: Option<&Arc<Service>>| {
                service.map_or_else(Vec::new, |service| service.addresses.clone())
            };
            let (old, new) = (addresses(before), addresses(after));
            self.ended.extend(old.iter().filter(|ip| !new.contains(ip)).map(|ip| (now_ns, *ip)));
            if let Some(service) = after {
                self.services.extend(new.iter().map(|ip| (*ip, service.key.clone())));
            }
        }
        self.forget(now_ns);
    }

    fn change(&mut self, before: Vec<Row>, after: Vec<Row>, now_ns: u64) {
        for (ip, pod, workload) in after.iter().filter(|row| !before.contains(row)) {
            // Nearly all addresses have one tenancy: a growing vector would make room for four.
            let tenancies = self.pods.entry(*ip).or_insert_with(|| Vec::with_capacity(1));
            match tenancies.iter_mut().find(|tenancy| tenancy.pod == *pod && tenancy.until_ns.is_none()) {
                Some(tenancy) => {
                    tenancy.claims += 1;
                    if workload.is_some() {
                        tenancy.workload.clone_from(workload);
                    }
                }
                None => {
                    let (pod, workload) = (pod.clone(), workload.clone());
                    let tenancy = Tenancy { pod, workload, from_ns: now_ns, until_ns: None, claims: 1 };
                    tenancies.push(tenancy);
                }
            }
        }
        for (ip, pod, _) in before.iter().filter(|row| !after.contains(row)) {
            let tenancies = self.pods.get_mut(ip).into_iter().flatten();
            for tenancy in tenancies.filter(|tenancy| tenancy.pod == *pod && tenancy.until_ns.is_none()) {
                tenancy.claims -= 1;
                if tenancy.claims == 0 {
                    tenancy.until_ns = Some(now_ns);
                    self.ended.push_back((now_ns, *ip));
                }
            }
        }
    }

    /// Drops what ended long ago, or too many endings ago.
    fn forget(&mut self, now_ns: u64) {
        while let Some((ended_ns, ip)) = self.ended.front().copied() {
            if self.ended.len() <= KEPT && now_ns.saturating_sub(ended_ns) <= KEPT_NS {
                return;
            }
            self.ended.pop_front();
            if let Some(tenancies) = self.pods.get_mut(&ip) {
                tenancies.retain(|tenancy| tenancy.until_ns.is_none_or(|until| until > ended_ns));
                if tenancies.is_empty() {
                    self.pods.remove(&ip);
                }
            }
            let is_gone = |key: &ObjectKey| {
                self.tables.services.get(key).is_none_or(|service| !service.addresses.contains(&ip))
            };
            if self.services.get(&ip).is_some_and(is_gone) {
                self.services.remove(&ip);
            }
        }
    }

    /// Who had the address at `time_ns`. The tables lag behind the packets: a pod's first
    /// packets come before its row, its last ones after the row is gone.
    fn tenancy(&self, ip: IpAddr, time_ns: u64) -> Option<&Tenancy> {
        let tenancies = self.pods.get(&ip)?;
        let is_valid = |tenancy: &&Tenancy| {
            tenancy.from_ns <= time_ns && tenancy.until_ns.is_none_or(|until| time_ns < until)
        };
        let valid = tenancies.iter().rev().find(is_valid);
        let early = || tenancies.iter().find(|tenancy| tenancy.from_ns > time_ns);
        let late = || {
            tenancies.iter().rev().find(|tenancy| {
                tenancy.until_ns.is_some_and(|until| time_ns >= until && time_ns - until < GRACE_NS)
            })
        };
        valid.or_else(early).or_else(late)
    }

    fn service(&self, event: &Event) -> FlowService {
        let ip = ip_of(event.service);
        let key = self.services.get(&ip);
        FlowService {
            ip,
            port: u16::from_be(event.service_port),
            namespace: key.map_or_else(Arc::default, |key| key.namespace.clone()),
            name: key.map_or_else(Arc::default, |key| key.name.clone()),
        }
    }
}

/// The name of a reserved identity, as Hubble's clients know it.
pub fn reserved_name(identity: IdentityId) -> Option<&'static str> {
    const NAMES: [&str; 9] = [
        "unknown",
        "host",
        "world",
        "unmanaged",
        "health",
        "init",
        "remote-node",
        "kube-apiserver",
        "ingress",
    ];
    NAMES.get(usize::try_from(identity.0).ok()?).copied()
}

/// The reserved identity of that name.
pub fn reserved_identity(name: &str) -> Option<IdentityId> {
    (0..IdentityId::FIRST_CLUSTER.0).map(IdentityId).find(|identity| reserved_name(*identity) == Some(name))
}

const NAMESPACE_LABEL: &str = "k8s:io.kubernetes.pod.namespace=";

/// A cluster identity's labels, under the keys that Hubble's clients know.
fn cluster_labels(labels: &IdentityLabels) -> Vec<String> {
    let mut all: Vec<String> =
        labels.pod_labels.iter().map(|(key, value)| format!("k8s:{key}={value}")).collect();
    all.extend(
        labels
            .namespace_labels
            .iter()
            .map(|(key, value)| format!("k8s:io.cilium.k8s.namespace.labels.{key}={value}")),
    );
    all.push(format!("k8s:io.cilium.k8s.policy.serviceaccount={}", labels.service_account));
    all.push(format!("{NAMESPACE_LABEL}{}", labels.namespace));
    all.sort();
    all
}

fn namespace_of(labels: &[Arc<str>]) -> Arc<str> {
    labels.iter().find_map(|label| label.strip_prefix(NAMESPACE_LABEL)).map_or_else(Arc::default, Arc::from)
}

/// A row before and after a change.
fn sides<'a, K, V>(change: DiffItem<'a, 'a, K, V>) -> (Option<&'a V>, Option<&'a V>) {
    match change {
        DiffItem::Add(_, new) => (None, Some(new)),
        DiffItem::Remove(_, old) => (Some(old), None),
        DiffItem::Update { old, new } => (Some(old.1), Some(new.1)),
    }
}

pub(super) fn has_flag(event: &Event, flag: event_flags) -> bool {
    u32::from(event.flags) & flag.0 != 0
}

pub(super) fn event_type_of(event: &Event) -> EventType {
    match event_type(u32::from(event.r#type)) {
        event_type::EVENT_FLOW_NEW => EventType::New,
        event_type::EVENT_FLOW_END => EventType::End,
        event_type::EVENT_DROP => EventType::Drop,
        _ => EventType::Update,
    }
}
