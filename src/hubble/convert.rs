//! From a record of the programs to the flow that clients read, with Hubble's numbers.

use std::collections::HashMap;
use std::fmt::Write;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Mutex;

use super::proto::{flow as pb, timestamp};
use crate::flow::{Clock, Direction, Event, EventType, Flow, L4Protocol, Names, Party, icmp_text, ip_of};
use crate::model::{IdentityId, Origins, PolicyRef, Workload};

/// Numbers of `event_type.type`.
pub mod event_types {
    /// A dropped packet; the sub-type is the reason.
    pub const DROP: i32 = 1;
    /// A packet at a point; the sub-type is the point.
    pub const TRACE: i32 = 4;
    /// A new connection that a policy decided.
    pub const POLICY_VERDICT: i32 = 5;
    /// A socket's address was translated.
    pub const TRACE_SOCK: i32 = 7;
    /// A request that a proxy has seen.
    pub const L7: i32 = 129;
}

/// The cluster's name unless it was given one: node names do not have it.
pub const DEFAULT_CLUSTER: &str = "default";
/// Interfaces whose names are kept.
const INTERFACES_KEPT: usize = 4096;

/// What every flow of a node has.
#[derive(Default)]
pub struct Converter {
    /// Name of the cluster.
    pub cluster: String,
    /// Name of the node, with the cluster's unless that is the default.
    pub node: String,
    /// Labels of the node, as `key=value`.
    pub node_labels: Vec<String>,
    /// Pods of other nodes are reached by the tunnel.
    pub is_tunnel: bool,
    /// Nothing that passes between a pod and another node's pod, or another node, is plain.
    pub is_encrypted: bool,
    interfaces: Mutex<HashMap<u32, String>>,
}

impl Converter {
    /// For the flows of `node`.
    pub fn new(cluster: &str, node: &str, node_labels: Vec<String>, is_tunnel: bool) -> Self {
        let name = if cluster == DEFAULT_CLUSTER { node.to_owned() } else { format!("{cluster}/{node}") };
        let cluster = cluster.to_owned();
        Self {
            cluster,
            node: name,
            node_labels,
            is_tunnel,
            is_encrypted: false,
            interfaces: Mutex::default(),
        }
    }

    /// The flow of a record.
    pub fn flow(&self, event: &Event, names: &Names, clock: &Clock) -> pb::Flow {
        let named = names.flow(event, clock);
        let mut flow = self.convert_named(&named);
        flow.uuid = uuid(&self.node, event);
        if named.drop_reason_desc == Some(crate::flow::DropReason::POLICY_DENIED) {
            let weir = flow.weir.get_or_insert_default();
            weir.isolated_by = policies(&names.isolating(event));
        }
        flow
    }

    /// All but what only the raw record tells.
    #[allow(deprecated)]
    fn convert_named(&self, named: &Flow) -> pb::Flow {
        let mut flow = self.packet(named);
        let (event_type, sub_type) = self.event_type(named);
        flow.r#type = pb::FlowType::L3L4.into();
        flow.emitter = Some(emitter());
        flow.node_name.clone_from(&self.node);
        flow.node_labels.clone_from(&self.node_labels);
        flow.event_type = Some(pb::CiliumEventType { r#type: event_type, sub_type });
        flow.traffic_direction = direction(named.traffic_direction).into();
        flow.interface = self.interface(named.ifindex);
        flow.summary = summary(named);
        self.set_verdict(&mut flow, named);
        flow.policy_match_type = named.policy_match as u32;
        if event_type == event_types::TRACE {
            let point = if sub_type == 0 { pb::TraceObservationPoint::ToEndpoint.into() } else { sub_type };
            flow.trace_observation_point = point;
            flow.trace_reason = trace_reason(named).into();
        }
        flow
    }

    /// Who sent it to whom. A record has the connection's sides; a flow has the packet's.
    pub(super) fn packet(&self, named: &Flow) -> pb::Flow {
        let sides = [&named.source, &named.destination];
        let [from, to] = if named.is_reply { [sides[1], sides[0]] } else { sides };
        let service = named.service.as_ref().filter(|service| !service.name.is_empty()).map(|service| {
            pb::Service { name: service.name.to_string(), namespace: service.namespace.to_string() }
        });
        let (source_service, destination_service) =
            if named.is_reply { (service, None) } else { (None, service) };
        pb::Flow {
            time: Some(timestamp(named.time)),
            ip: Some(pb::Ip {
                source: from.ip.to_string(),
                destination: to.ip.to_string(),
                ip_version: if from.ip.is_ipv4() { pb::IpVersion::IPv4 } else { pb::IpVersion::IPv6 }.into(),
                encrypted: self.is_encrypted && is_between_nodes(named),
                ..pb::Ip::default()
            }),
            l4: layer4(named, from.port, to.port),
            source: Some(self.endpoint(from)),
            destination: Some(self.endpoint(to)),
            source_service,
            destination_service,
            weir: Some(weir(named)),
            ..pb::Flow::default()
        }
    }

    fn endpoint(&self, party: &Party) -> pb::Endpoint {
        let is_in_cluster = !party.pod_name.is_empty()
            || [IdentityId::HOST, IdentityId::REMOTE_NODE].contains(&party.identity);
        pb::Endpoint {
            id: party.endpoint.map_or(0, |endpoint| endpoint.0.into()),
            identity: party.identity.0,
            cluster_name: if is_in_cluster { self.cluster.clone() } else { String::new() },
            namespace: party.namespace.to_string(),
            labels: party.labels.iter().map(ToString::to_string).collect(),
            pod_name: party.pod_name.to_string(),
            workloads: party.workload.iter().map(workload).collect(),
        }
    }

    #[allow(deprecated)]
    fn set_verdict(&self, flow: &mut pb::Flow, named: &Flow) {
        match named.drop_reason_desc {
            None => {
                let is_audit = named.verdict == crate::flow::Verdict::Audit;
                flow.verdict = if is_audit { pb::Verdict::Audit } else { pb::Verdict::Forwarded }.into();
                flow.is_reply = Some(named.is_reply);
                flow.reply = named.is_reply;
                flow.egress_allowed_by = policies(&named.egress_allowed_by);
                flow.ingress_allowed_by = policies(&named.ingress_allowed_by);
                flow.egress_denied_by = policies(&named.egress_audited_by);
                flow.ingress_denied_by = policies(&named.ingress_audited_by);
            }
            Some(reason) => {
                flow.verdict = pb::Verdict::Dropped.into();
                flow.drop_reason = reason.0.into();
                flow.drop_reason_desc = reason.0.into();
                if reason.is_policy() {
                    match named.traffic_direction {
                        Direction::Egress => flow.egress_denied_by = policies(&named.policies),
                        _ => flow.ingress_denied_by = policies(&named.policies),
                    }
                }
            }
        }
    }

    /// Type and sub-type. A connection's first record tells which policy decided, where one did.
    fn event_type(&self, named: &Flow) -> (i32, i32) {
        match (named.drop_reason_desc, named.event_type) {
            (Some(reason), _) => (event_types::DROP, reason.0.into()),
            (None, EventType::New) if !named.policies.is_empty() => (event_types::POLICY_VERDICT, 0),
            _ => (event_types::TRACE, self.point(named)),
        }
    }

    /// Where the packet went: the sub-type of a trace.
    fn point(&self, named: &Flow) -> i32 {
        let to = if named.is_reply { &named.source } else { &named.destination };
        let point = match to.identity {
            _ if to.endpoint.is_some() => return 0,
            IdentityId::HOST => pb::TraceObservationPoint::ToHost,
            IdentityId::WORLD | IdentityId::REMOTE_NODE => pb::TraceObservationPoint::ToNetwork,
            identity if identity.is_local() || !self.is_tunnel => pb::TraceObservationPoint::ToNetwork,
            _ => pb::TraceObservationPoint::ToOverlay,
        };
        point.into()
    }

    fn interface(&self, ifindex: u32) -> Option<pb::NetworkInterface> {
        if ifindex == 0 {
            return None;
        }
        let mut known = self.interfaces.lock().expect("nobody panics while it holds the names");
        if known.len() > INTERFACES_KEPT {
            known.clear();
        }
        // The name is the one now: the kernel gives an index to one interface only.
        let name = known.entry(ifindex).or_insert_with(|| interface_name(ifindex));
        Some(pb::NetworkInterface { index: ifindex, name: name.clone() })
    }
}

/// Who says so.
pub fn emitter() -> pb::Emitter {
    pb::Emitter { name: "Weir".to_owned(), version: env!("CARGO_PKG_VERSION").to_owned() }
}

pub(super) fn direction(direction: Direction) -> pb::TrafficDirection {
    match direction {
        Direction::Unknown => pb::TrafficDirection::Unknown,
        Direction::Ingress => pb::TrafficDirection::Ingress,
        Direction::Egress => pb::TrafficDirection::Egress,
    }
}

fn workload(workload: &Workload) -> pb::Workload {
    pb::Workload { name: workload.name.to_string(), kind: workload.kind.to_string() }
}

fn trace_reason(named: &Flow) -> pb::TraceReason {
    match named.event_type {
        EventType::New => pb::TraceReason::New,
        _ if named.is_reply => pb::TraceReason::Reply,
        _ => pb::TraceReason::Established,
    }
}

pub(super) fn policies(origins: &Origins) -> Vec<pb::Policy> {
    origins.iter().map(policy).collect()
}

fn policy(policy: &PolicyRef) -> pb::Policy {
    pb::Policy {
        name: policy.name.to_string(),
        namespace: policy.namespace.as_deref().unwrap_or_default().to_owned(),
        kind: policy.kind.name().to_owned(),
        ..pb::Policy::default()
    }
}

fn layer4(named: &Flow, source: u16, destination: u16) -> Option<pb::Layer4> {
    use pb::layer4::Protocol;
    let (source_port, destination_port) = (source.into(), destination.into());
    let (r#type, code) = named.icmp.map_or((0, 0), |icmp| (icmp.r#type.into(), icmp.code.into()));
    let protocol = match named.protocol {
        L4Protocol::Tcp => Protocol::Tcp(pb::Tcp {
            source_port,
            destination_port,
            flags: Some(tcp_flags(named.tcp_flags.0)),
        }),
        L4Protocol::Udp => Protocol::Udp(pb::Udp { source_port, destination_port }),
        L4Protocol::Sctp => Protocol::Sctp(pb::Sctp { source_port, destination_port, ..pb::Sctp::default() }),
        L4Protocol::IcmpV4 => Protocol::IcmPv4(pb::IcmPv4 { r#type, code }),
        L4Protocol::IcmpV6 => Protocol::IcmPv6(pb::IcmPv6 { r#type, code }),
        L4Protocol::Other(_) => return None,
    };
    Some(pb::Layer4 { protocol: Some(protocol) })
}

/// The flags byte of a TCP header.
pub fn tcp_flags(byte: u8) -> pb::TcpFlags {
    let bit = |number: u8| byte & (1 << number) != 0;
    pb::TcpFlags {
        fin: bit(0),
        syn: bit(1),
        rst: bit(2),
        psh: bit(3),
        ack: bit(4),
        urg: bit(5),
        ece: bit(6),
        cwr: bit(7),
        ns: false,
    }
}

fn weir(named: &Flow) -> pb::Weir {
    let event = match named.event_type {
        EventType::New => pb::WeirEvent::ConnectionNew,
        EventType::Update => pb::WeirEvent::ConnectionUpdate,
        EventType::End => pb::WeirEvent::ConnectionEnd,
        EventType::Drop => pb::WeirEvent::PacketDrop,
    };
    let service = named.service.as_ref().map(|service| std::net::SocketAddr::new(service.ip, service.port));
    pb::Weir {
        event: event.into(),
        packets_sent: named.packets.source,
        packets_received: named.packets.destination,
        bytes_sent: named.bytes.source,
        bytes_received: named.bytes.destination,
        round_trip_ns: named.round_trip.map_or(0, |time| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)),
        service: service.map(|service| service.to_string()).unwrap_or_default(),
        protocol: named.protocol.number().into(),
        drop_reason_text: named.drop_reason_desc.map(|reason| reason.text().to_owned()).unwrap_or_default(),
        isolated_by: Vec::new(),
    }
}

/// The protocol's own words.
fn summary(named: &Flow) -> String {
    match named.protocol {
        L4Protocol::Tcp => {
            let mut text = "TCP".to_owned();
            for (index, flag) in named.tcp_flags.names().enumerate() {
                let _infallible = write!(text, "{}{flag}", if index == 0 { " Flags: " } else { ", " });
            }
            text
        }
        L4Protocol::IcmpV4 | L4Protocol::IcmpV6 => match named.icmp {
            Some(icmp) => format!("{} {}", named.protocol, icmp_text(named.protocol, icmp)),
            None => named.protocol.to_string(),
        },
        L4Protocol::Other(number) => format!("IP protocol {number}"),
        protocol => protocol.to_string(),
    }
}

/// A number for a record that is the same whenever the record is read, in the form of a UUID (version 8).
pub(super) fn uuid(node: &str, event: &Event) -> String {
    let half = |seed: u8| {
        let mut hasher = DefaultHasher::new();
        (seed, node, event.timestamp_ns, event.packets, event.bytes).hash(&mut hasher);
        (event.source_port, event.destination_port, event.r#type, event.reason, event.tcp_flags)
            .hash(&mut hasher);
        (ip_of(event.source), ip_of(event.destination), event.service.w, event.flags).hash(&mut hasher);
        hasher.finish()
    };
    let (high, low) = (half(0) & !0xf000 | 0x8000, half(1) & (u64::MAX >> 2) | 1 << 63);
    format!(
        "{:08x}-{:04x}-{:04x}-{:04x}-{:012x}",
        high >> 32,
        high >> 16 & 0xffff,
        high & 0xffff,
        low >> 48,
        low & 0xffff_ffff_ffff
    )
}

/// Empty: there is none of that index any more.
fn interface_name(ifindex: u32) -> String {
    let name = nix::net::if_::if_indextoname(ifindex);
    name.map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// A flow that passed between a pod of this node and a pod of another one, or another node.
fn is_between_nodes(named: &Flow) -> bool {
    let is_elsewhere = |party: &Party| {
        let identity = party.identity;
        let is_pod = !identity.is_reserved() && !identity.is_local();
        party.endpoint.is_none() && (is_pod || identity == IdentityId::REMOTE_NODE)
    };
    let [one, other] = [&named.source, &named.destination];
    named.drop_reason_desc.is_none()
        && ((one.endpoint.is_some() && is_elsewhere(other))
            || (other.endpoint.is_some() && is_elsewhere(one)))
}
