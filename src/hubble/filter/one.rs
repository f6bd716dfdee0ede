//! One `FlowFilter`: every field that is given must match, one of its values is enough.

use regex::Regex;

use super::cel::Cel;
use super::pattern::{NamePrefix, StatusCode, fqdn, network, node_name, port, regex};
use super::raw::{Protocol, Raw};
use super::{BadFilter, any};
use crate::flow::LabelPattern;
use crate::hubble::convert::DEFAULT_CLUSTER;
use crate::hubble::proto::flow::{
    EventTypeFilter, Flow, FlowFilter, Http, HttpHeader, NetworkInterface, TcpFlags, Verdict, Workload,
    layer4, layer7,
};

/// A compiled filter.
pub struct One {
    pub(super) raw: Raw,
    /// The raw record decides all of it.
    pub(super) is_raw_alone: bool,
    source: Side,
    destination: Side,
    source_ip_xlated: Vec<ipnet::IpNet>,
    uuid: Vec<String>,
    event_type: Vec<EventTypeFilter>,
    interface: Vec<NetworkInterface>,
    tcp_flags: Vec<TcpFlags>,
    node_name: Vec<Regex>,
    node_labels: Vec<LabelPattern>,
    trace_id: Vec<String>,
    ip_trace_id: Vec<u64>,
    encrypted: Vec<bool>,
    dns_query: Vec<Regex>,
    http: HttpFilter,
    /// 0: whatever it took.
    latency_ns_min: u64,
    cel: Vec<Cel>,
}

/// Conditions on one side that need names.
struct Side {
    pod: Vec<NamePrefix>,
    service: Vec<NamePrefix>,
    label: Vec<LabelPattern>,
    fqdn: Vec<Regex>,
    workload: Vec<Workload>,
    cluster: Vec<String>,
}

/// Conditions on a request.
struct HttpFilter {
    status: Vec<StatusCode>,
    method: Vec<String>,
    path: Vec<Regex>,
    url: Vec<Regex>,
    header: Vec<HttpHeader>,
}

fn each<T, U>(
    field: &'static str,
    list: &[T],
    parse: impl Fn(&'static str, &T) -> Result<U, BadFilter>,
) -> Result<Vec<U>, BadFilter> {
    list.iter().map(|value| parse(field, value)).collect()
}

fn label(field: &'static str, text: &str) -> Result<LabelPattern, BadFilter> {
    text.parse().map_err(|reason| BadFilter { field, reason })
}

impl One {
    /// Compiles `wanted`.
    pub fn new(wanted: &FlowFilter) -> Result<Self, BadFilter> {
        let expressions = wanted.experimental.as_ref().map_or(&[][..], |more| &more.cel_expression);
        let mut this = Self {
            raw: raw(wanted)?,
            is_raw_alone: false,
            source: Side {
                pod: each("source_pod", &wanted.source_pod, |field, text| NamePrefix::parse(field, text))?,
                service: each("source_service", &wanted.source_service, |field, text| {
                    NamePrefix::parse(field, text)
                })?,
                label: each("source_label", &wanted.source_label, |name, text| label(name, text))?,
                fqdn: each("source_fqdn", &wanted.source_fqdn, |field, text| fqdn(field, text))?,
                workload: wanted.source_workload.clone(),
                cluster: wanted.source_cluster_name.clone(),
            },
            destination: Side {
                pod: each("destination_pod", &wanted.destination_pod, |field, text| {
                    NamePrefix::parse(field, text)
                })?,
                service: each("destination_service", &wanted.destination_service, |field, text| {
                    NamePrefix::parse(field, text)
                })?,
                label: each("destination_label", &wanted.destination_label, |name, text| label(name, text))?,
                fqdn: each("destination_fqdn", &wanted.destination_fqdn, |field, text| fqdn(field, text))?,
                workload: wanted.destination_workload.clone(),
                cluster: wanted.destination_cluster_name.clone(),
            },
            source_ip_xlated: each("source_ip_xlated", &wanted.source_ip_xlated, |field, text| {
                network(field, text)
            })?,
            uuid: wanted.uuid.clone(),
            event_type: wanted.event_type.clone(),
            interface: wanted.interface.clone(),
            tcp_flags: wanted.tcp_flags.clone(),
            node_name: each("node_name", &wanted.node_name, |field, text| node_name(field, text))?,
            node_labels: each("node_labels", &wanted.node_labels, |name, text| label(name, text))?,
            trace_id: wanted.trace_id.clone(),
            ip_trace_id: wanted.ip_trace_id.clone(),
            encrypted: wanted.encrypted.clone(),
            dns_query: each("dns_query", &wanted.dns_query, |field, text| regex(field, text))?,
            http: HttpFilter {
                status: each("http_status_code", &wanted.http_status_code, |field, text| {
                    StatusCode::parse(field, text)
                })?,
                method: wanted.http_method.clone(),
                path: each("http_path", &wanted.http_path, |field, text| regex(field, text))?,
                url: each("http_url", &wanted.http_url, |field, text| regex(field, text))?,
                header: wanted.http_header.clone(),
            },
            latency_ns_min: wanted.weir_latency_ns_min,
            cel: expressions.iter().map(|source| Cel::new(source)).collect::<Result<_, _>>()?,
        };
        this.raw.is_never |= this.http.is_given()
            || !this.dns_query.is_empty()
            || !this.trace_id.is_empty()
            || this.latency_ns_min > 0;
        this.is_raw_alone = is_raw_alone(wanted);
        Ok(this)
    }

    /// True if the flow matches.
    pub fn matches(&self, flow: &Flow) -> bool {
        self.matches_addresses(flow)
            && self.matches_packet(flow)
            && self.matches_observer(flow)
            && self.source.matches(flow.source.as_ref(), flow.source_service.as_ref(), &flow.source_names)
            && self.destination.matches(
                flow.destination.as_ref(),
                flow.destination_service.as_ref(),
                &flow.destination_names,
            )
            && self.matches_request(flow)
            && any(&self.cel, |expression| expression.matches(flow))
    }

    fn matches_addresses(&self, flow: &Flow) -> bool {
        let ip = |wanted: &[ipnet::IpNet], text: Option<&str>| {
            any(wanted, |net| {
                text.and_then(|text| text.parse().ok()).is_some_and(|ip: std::net::IpAddr| net.contains(&ip))
            })
        };
        let packet = flow.ip.as_ref();
        let ports = ports(flow);
        let identity = |wanted: &[u32], endpoint: Option<&super::super::proto::flow::Endpoint>| {
            any(wanted, |id| endpoint.is_some_and(|endpoint| endpoint.identity == *id))
        };
        ip(&self.raw.source_ip, packet.map(|packet| packet.source.as_str()))
            && ip(&self.raw.destination_ip, packet.map(|packet| packet.destination.as_str()))
            && ip(&self.source_ip_xlated, packet.map(|packet| packet.source_xlated.as_str()))
            && any(&self.raw.source_port, |port| ports.is_some_and(|[from, _]| from == u32::from(*port)))
            && any(&self.raw.destination_port, |port| ports.is_some_and(|[_, to]| to == u32::from(*port)))
            && identity(&self.raw.source_identity, flow.source.as_ref())
            && identity(&self.raw.destination_identity, flow.destination.as_ref())
    }

    fn matches_packet(&self, flow: &Flow) -> bool {
        let version = flow.ip.as_ref().map_or(0, |ip| ip.ip_version);
        let is_dropped = flow.verdict == i32::from(Verdict::Dropped);
        let reply = flow.is_reply.or(is_dropped.then_some(false));
        let encrypted = flow.ip.as_ref().is_some_and(|ip| ip.encrypted);
        let event = flow.weir.as_ref().map_or(0, |weir| weir.event);
        any(&self.raw.verdict, |wanted| *wanted == flow.verdict)
            && any(&self.raw.weir_event, |wanted| *wanted == event)
            && any(&self.raw.drop_reason, |wanted| *wanted == flow.drop_reason_desc)
            && any(&self.raw.direction, |wanted| *wanted == flow.traffic_direction)
            && any(&self.raw.reply, |wanted| reply == Some(*wanted))
            && any(&self.raw.ip_version, |wanted| *wanted == version)
            && any(&self.raw.protocol, |wanted| is_protocol(*wanted, flow))
            && any(&self.encrypted, |wanted| *wanted == encrypted)
            && any(&self.tcp_flags, |wanted| has_flags(wanted, flow))
            && any(&self.event_type, |wanted| is_event(*wanted, flow))
            && any(&self.interface, |wanted| is_interface(wanted, flow))
    }

    fn matches_observer(&self, flow: &Flow) -> bool {
        let node = || match flow.node_name.contains('/') {
            true => flow.node_name.clone(),
            false => format!("{DEFAULT_CLUSTER}/{}", flow.node_name),
        };
        let trace = || {
            let parent = flow.trace_context.as_ref().and_then(|context| context.parent.as_ref());
            parent.map_or("", |parent| parent.trace_id.as_str())
        };
        any(&self.uuid, |wanted| *wanted == flow.uuid)
            && (self.node_name.is_empty() || {
                let node = node();
                any(&self.node_name, |wanted| wanted.is_match(&node))
            })
            && any(&self.node_labels, |wanted| wanted.matches(&flow.node_labels))
            && any(&self.trace_id, |wanted| *wanted == trace())
            && any(&self.ip_trace_id, |wanted| {
                flow.ip_trace_id.as_ref().is_some_and(|id| id.trace_id == *wanted)
            })
    }

    fn matches_request(&self, flow: &Flow) -> bool {
        let record = flow.l7.as_ref().and_then(|l7| l7.record.as_ref());
        if flow.l7.as_ref().map_or(0, |l7| l7.latency_ns) < self.latency_ns_min {
            return false;
        }
        any(&self.dns_query, |wanted| match record {
            Some(layer7::Record::Dns(dns)) => wanted.is_match(&dns.query),
            _ => false,
        }) && match record {
            Some(layer7::Record::Http(http)) => self.http.matches(http),
            _ => !self.http.is_given(),
        }
    }
}

impl Side {
    fn matches(
        &self,
        endpoint: Option<&super::super::proto::flow::Endpoint>,
        service: Option<&super::super::proto::flow::Service>,
        names: &[String],
    ) -> bool {
        any(&self.pod, |wanted| {
            endpoint.is_some_and(|endpoint| wanted.matches(&endpoint.namespace, &endpoint.pod_name))
        }) && any(&self.service, |wanted| {
            service.is_some_and(|service| wanted.matches(&service.namespace, &service.name))
        }) && any(&self.label, |wanted| endpoint.is_some_and(|endpoint| wanted.matches(&endpoint.labels)))
            && any(&self.fqdn, |wanted| names.iter().any(|name| wanted.is_match(name)))
            && any(&self.workload, |wanted| {
                endpoint.is_some_and(|endpoint| endpoint.workloads.iter().any(|it| is_workload(wanted, it)))
            })
            && any(&self.cluster, |wanted| endpoint.is_some_and(|endpoint| endpoint.cluster_name == *wanted))
    }
}

impl HttpFilter {
    fn is_given(&self) -> bool {
        !(self.status.is_empty()
            && self.method.is_empty()
            && self.path.is_empty()
            && self.url.is_empty()
            && self.header.is_empty())
    }

    fn matches(&self, http: &Http) -> bool {
        let has = |wanted: &HttpHeader| {
            http.headers
                .iter()
                .any(|header| header.key.eq_ignore_ascii_case(&wanted.key) && header.value == wanted.value)
        };
        any(&self.status, |wanted| wanted.matches(http.code))
            && any(&self.method, |wanted| wanted.eq_ignore_ascii_case(&http.method))
            && any(&self.path, |wanted| wanted.is_match(path_of(&http.url)))
            && any(&self.url, |wanted| wanted.is_match(&http.url))
            && any(&self.header, has)
    }
}

/// The path of `http://host/path?query`.
fn path_of(url: &str) -> &str {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let path = if url.contains("://") { rest.find('/').map_or("", |at| &rest[at..]) } else { rest };
    path.split(['?', '#']).next().unwrap_or_default()
}

fn raw(wanted: &FlowFilter) -> Result<Raw, BadFilter> {
    Ok(Raw {
        source_ip: each("source_ip", &wanted.source_ip, |field, text| network(field, text))?,
        destination_ip: each("destination_ip", &wanted.destination_ip, |field, text| network(field, text))?,
        source_port: each("source_port", &wanted.source_port, |field, text| port(field, text))?,
        destination_port: each("destination_port", &wanted.destination_port, |field, text| {
            port(field, text)
        })?,
        source_identity: wanted.source_identity.clone(),
        destination_identity: wanted.destination_identity.clone(),
        verdict: wanted.verdict.clone(),
        drop_reason: wanted.drop_reason_desc.clone(),
        direction: wanted.traffic_direction.clone(),
        reply: wanted.reply.clone(),
        protocol: each("protocol", &wanted.protocol, |field, text| protocol(field, text))?,
        ip_version: wanted.ip_version.clone(),
        weir_event: wanted.weir_event.clone(),
        is_never: false,
    })
}

fn protocol(field: &'static str, text: &str) -> Result<Protocol, BadFilter> {
    Ok(match text.to_ascii_lowercase().as_str() {
        "icmp" => Protocol::Icmp,
        "icmpv4" => Protocol::IcmpV4,
        "icmpv6" => Protocol::IcmpV6,
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        "sctp" => Protocol::Sctp,
        "vrrp" => Protocol::Vrrp,
        "igmp" => Protocol::Igmp,
        "dns" => Protocol::Dns,
        "http" => Protocol::Http,
        _ => return Err(BadFilter { field, reason: format!("unknown protocol {text:?}") }),
    })
}

/// True if `raw` has all of it: the same filter without what `raw` has is empty.
fn is_raw_alone(wanted: &FlowFilter) -> bool {
    let dropped = i32::from(Verdict::Dropped);
    let rest = FlowFilter {
        source_ip: Vec::new(),
        destination_ip: Vec::new(),
        source_port: Vec::new(),
        destination_port: Vec::new(),
        source_identity: Vec::new(),
        destination_identity: Vec::new(),
        // Of what is not dropped, names say whether it is audited.
        verdict: wanted.verdict.iter().filter(|verdict| **verdict != dropped).copied().collect(),
        drop_reason_desc: Vec::new(),
        traffic_direction: Vec::new(),
        reply: Vec::new(),
        protocol: Vec::new(),
        ip_version: Vec::new(),
        weir_event: Vec::new(),
        ..wanted.clone()
    };
    rest == FlowFilter::default()
}

fn ports(flow: &Flow) -> Option<[u32; 2]> {
    match flow.l4.as_ref()?.protocol.as_ref()? {
        layer4::Protocol::Tcp(tcp) => Some([tcp.source_port, tcp.destination_port]),
        layer4::Protocol::Udp(udp) => Some([udp.source_port, udp.destination_port]),
        layer4::Protocol::Sctp(sctp) => Some([sctp.source_port, sctp.destination_port]),
        _ => None,
    }
}

fn is_protocol(wanted: Protocol, flow: &Flow) -> bool {
    use layer4::Protocol as L4;
    let l4 = flow.l4.as_ref().and_then(|l4| l4.protocol.as_ref());
    let l7 = flow.l7.as_ref().and_then(|l7| l7.record.as_ref());
    match wanted {
        Protocol::Icmp => matches!(l4, Some(L4::IcmPv4(_) | L4::IcmPv6(_))),
        Protocol::IcmpV4 => matches!(l4, Some(L4::IcmPv4(_))),
        Protocol::IcmpV6 => matches!(l4, Some(L4::IcmPv6(_))),
        Protocol::Tcp => matches!(l4, Some(L4::Tcp(_))),
        Protocol::Udp => matches!(l4, Some(L4::Udp(_))),
        Protocol::Sctp => matches!(l4, Some(L4::Sctp(_))),
        Protocol::Vrrp => matches!(l4, Some(L4::Vrrp(_))),
        Protocol::Igmp => matches!(l4, Some(L4::Igmp(_))),
        Protocol::Dns => matches!(l7, Some(layer7::Record::Dns(_))),
        Protocol::Http => matches!(l7, Some(layer7::Record::Http(_))),
    }
}

/// True if the packet has every flag that is asked for; it may have more.
fn has_flags(wanted: &TcpFlags, flow: &Flow) -> bool {
    let Some(layer4::Protocol::Tcp(tcp)) = flow.l4.as_ref().and_then(|l4| l4.protocol.as_ref()) else {
        return false;
    };
    let list = |flags: &TcpFlags| {
        [flags.fin, flags.syn, flags.rst, flags.psh, flags.ack, flags.urg, flags.ece, flags.cwr, flags.ns]
    };
    tcp.flags
        .as_ref()
        .is_some_and(|flags| list(wanted).into_iter().zip(list(flags)).all(|(wanted, has)| !wanted || has))
}

fn is_event(wanted: EventTypeFilter, flow: &Flow) -> bool {
    flow.event_type.as_ref().is_some_and(|event| {
        (wanted.r#type == 0 || wanted.r#type == event.r#type)
            && (!wanted.match_sub_type || wanted.sub_type == event.sub_type)
    })
}

fn is_interface(wanted: &NetworkInterface, flow: &Flow) -> bool {
    flow.interface.as_ref().is_some_and(|interface| {
        (wanted.index == 0 || wanted.index == interface.index)
            && (wanted.name.is_empty() || wanted.name == interface.name)
    })
}

fn is_workload(wanted: &Workload, workload: &Workload) -> bool {
    (wanted.name.is_empty() || wanted.name == workload.name)
        && (wanted.kind.is_empty() || wanted.kind == workload.kind)
}
