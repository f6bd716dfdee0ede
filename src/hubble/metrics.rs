//! The hubble_* metrics: counted from the raw records, with a bound on how many series there can be.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex};

use clap::ValueEnum;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::registry::Unit;

use crate::datapath::types::{event_flags, event_type};
use crate::flow::{Direction, DropReason, Event, L4Protocol, Names, Record, Recorder, Verdict, ip_of};
use crate::model::l7::{self, L7Message, RecordKind};
use crate::model::{IdentityId, MatchType};

/// Series of one family; what would be more is counted under `other`.
const SERIES_MAX: usize = 2000;
/// Records that are counted at once.
const CHUNK: usize = 1024;

/// Which labels say who the two sides are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Context {
    /// None.
    #[default]
    None,
    /// Namespaces, or what else it is: world, host.
    Namespace,
    /// Namespaces and pods.
    Pod,
    /// Numbers of identities.
    Identity,
}

/// A family: its name, help, and the labels that its keys have.
struct Family {
    name: &'static str,
    help: &'static str,
    labels: fn(&Facts) -> Vec<(&'static str, String)>,
}

/// What a series is of; each family uses what it has labels for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Facts {
    family: usize,
    kind: u8,
    detail: u8,
    protocol: u8,
    port: u16,
    is_v6: bool,
    is_dropped: bool,
    is_audit: bool,
    is_other: bool,
}

/// A series: its facts and the names of the two sides.
type Key = (Facts, Arc<str>, Arc<str>);

const FLOWS: usize = 0;
const DROPS: usize = 1;
const TCP: usize = 2;
const PORTS: usize = 3;
const ICMP: usize = 4;
const POLICY: usize = 5;
const WORLD: usize = 6;
const LOST: usize = 7;
const HTTP: usize = 8;
const DNS_QUERIES: usize = 9;
const DNS_RESPONSES: usize = 10;

/// Methods of HTTP that are told apart; whatever else a client writes is `other`.
const METHODS: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"];
/// Types of DNS questions that are told apart.
const DNS_TYPES: [&str; 11] = ["A", "AAAA", "CNAME", "MX", "NS", "PTR", "SOA", "SRV", "TXT", "HTTPS", "ANY"];
/// Codes of DNS answers.
const DNS_CODES: [&str; 6] =
    ["No Error", "Format Error", "Server Failure", "Non-Existent Domain", "Not Implemented", "Query Refused"];
/// Seconds that a server takes: the upper bounds of the histogram's buckets.
const SECONDS: [f64; 12] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0];

const FAMILIES: [Family; 11] = [
    Family {
        name: "flows_processed",
        help: "Flows",
        labels: |facts| {
            let kind = ["Trace", "Drop", "PolicyVerdict", "L7"][usize::from(facts.kind).min(3)];
            let details = ["", "new", "update", "end", "HTTP", "DNS", "Kafka", "TLS", "unknown"];
            vec![
                ("type", kind.to_owned()),
                ("subtype", details[usize::from(facts.detail).min(8)].to_owned()),
                ("protocol", protocol(facts)),
                ("verdict", verdict(facts)),
            ]
        },
    },
    Family {
        name: "drop",
        help: "Dropped packets that were recorded",
        labels: |facts| vec![("reason", DropReason(facts.detail).to_string()), ("protocol", protocol(facts))],
    },
    Family {
        name: "tcp_flags",
        help: "TCP connections by what their flags tell",
        labels: |facts| {
            let flag = ["SYN", "FIN", "RST"][usize::from(facts.detail).min(2)];
            vec![("flag", flag.to_owned()), ("family", family(facts))]
        },
    },
    Family {
        name: "port_distribution",
        help: "New connections by the port that they are for",
        labels: |facts| vec![("protocol", protocol(facts)), ("port", port(facts))],
    },
    Family {
        name: "icmp",
        help: "ICMP messages",
        labels: |facts| {
            let v = if facts.is_v6 { L4Protocol::IcmpV6 } else { L4Protocol::IcmpV4 };
            let icmp = crate::flow::Icmp { r#type: facts.detail, code: 0 };
            vec![("family", family(facts)), ("type", crate::flow::icmp_text(v, icmp).into_owned())]
        },
    },
    Family {
        name: "policy_verdicts",
        help: "New connections and drops that a policy decided",
        labels: |facts| {
            let direction = ["unknown", "ingress", "egress"][usize::from(facts.detail).min(2)];
            let action = verdict(facts).to_ascii_lowercase();
            let matched = MatchType::EACH[usize::from(facts.kind).min(MatchType::EACH.len() - 1)];
            let matched = matched.word().to_ascii_lowercase();
            vec![("direction", direction.to_owned()), ("match", matched), ("action", action)]
        },
    },
    Family {
        name: "flows_to_world",
        help: "New connections and drops whose destination is outside of the cluster",
        labels: |facts| {
            vec![("protocol", protocol(facts)), ("verdict", verdict(facts)), ("port", port(facts))]
        },
    },
    Family {
        name: "lost_events",
        help: "Records that were not counted",
        labels: |facts| {
            let source = if facts.kind == 0 { "perf_event_ring_buffer" } else { "hubble_ring_buffer" };
            vec![("source", source.to_owned())]
        },
    },
    Family {
        name: "http_requests",
        help: "Answered requests of HTTP",
        labels: |facts| {
            vec![
                ("method", word(&METHODS, facts.detail)),
                ("protocol", word(&["HTTP/1.0", "HTTP/1.1", "HTTP/2"], facts.kind)),
                ("status", if facts.is_other { "other".to_owned() } else { facts.port.to_string() }),
                ("reporter", reporter(facts)),
            ]
        },
    },
    Family {
        name: "dns_queries",
        help: "Questions of DNS",
        labels: |facts| vec![("qtypes", word(&DNS_TYPES, facts.detail))],
    },
    Family {
        name: "dns_responses",
        help: "Answers of DNS",
        labels: |facts| {
            vec![
                ("rcode", word(&DNS_CODES, facts.kind)),
                ("qtypes", word(&DNS_TYPES, facts.detail)),
                ("ips_returned", if facts.is_other { "other".to_owned() } else { facts.port.to_string() }),
            ]
        },
    },
];

/// One of a fixed set of words.
fn word(words: &[&str], index: u8) -> String {
    words.get(usize::from(index)).copied().unwrap_or("other").to_owned()
}

/// The place of a word in a fixed set.
fn index(words: &[&str], wanted: &str) -> u8 {
    words.iter().position(|word| word.eq_ignore_ascii_case(wanted)).map_or(u8::MAX, |at| at as u8)
}

/// On whose side it was seen.
fn reporter(facts: &Facts) -> String {
    if facts.is_v6 { "server" } else { "client" }.to_owned()
}

/// How long servers took.
#[derive(Clone, Default)]
struct Durations {
    sum: f64,
    count: u64,
    buckets: [u64; SECONDS.len()],
}

impl Durations {
    fn add(&mut self, seconds: f64) {
        self.sum += seconds;
        self.count += 1;
        if let Some(bucket) = SECONDS.iter().position(|bound| seconds <= *bound) {
            self.buckets[bucket] += 1;
        }
    }
}

fn protocol(facts: &Facts) -> String {
    if facts.is_other {
        return "other".to_owned();
    }
    match L4Protocol::from(facts.protocol) {
        L4Protocol::Other(_) => "other".to_owned(),
        known => known.to_string(),
    }
}

fn verdict(facts: &Facts) -> String {
    match (facts.is_dropped, facts.is_audit) {
        (true, _) => "DROPPED",
        (false, true) => "AUDIT",
        (false, false) => "FORWARDED",
    }
    .to_owned()
}

fn family(facts: &Facts) -> String {
    if facts.is_v6 { "IPv6" } else { "IPv4" }.to_owned()
}

fn port(facts: &Facts) -> String {
    if facts.is_other { "other".to_owned() } else { facts.port.to_string() }
}

/// Counts records; a collector of the registry.
#[derive(Clone)]
pub struct FlowMetrics {
    context: Context,
    series: Arc<Mutex<[HashMap<Key, u64>; FAMILIES.len()]>>,
    /// By method, and whether it was seen at the server.
    durations: Arc<Mutex<HashMap<(u8, bool), Durations>>>,
}

impl FlowMetrics {
    /// Counts from zero.
    pub fn new(context: Context) -> Self {
        Self { context, series: Arc::default(), durations: Arc::default() }
    }

    /// Counts what is recorded from now on, as long as there are records.
    pub async fn follow(self, recorder: Arc<Recorder>, names: Arc<Names>) {
        let mut news = recorder.subscribe();
        let (_, mut cursor) = recorder.kept();
        let mut records = Vec::new();
        loop {
            let skipped = recorder.follow(&mut cursor, CHUNK, &mut records);
            for (kind, count) in [(1, skipped.events), (0, skipped.lost)] {
                if count > 0 {
                    self.lost(kind, count);
                }
            }
            if records.is_empty() {
                if news.changed().await.is_err() {
                    return;
                }
                continue;
            }
            for record in &records {
                match record {
                    Record::Packet(event) => self.count(event, &names),
                    Record::Request(event, request) => self.count_request(event, request, &names),
                    Record::Forgotten => self.lost(1, 1),
                    Record::Lost(lost) => self.lost(0, *lost),
                }
            }
            tokio::task::yield_now().await;
        }
    }

    fn lost(&self, kind: u8, count: u64) {
        let facts = Facts { family: LOST, kind, ..Facts::default() };
        self.add(facts, &[Arc::default(), Arc::default()], count);
    }

    /// Counts one record.
    pub fn count(&self, event: &Event, names: &Names) {
        let sides = self.sides(event, names);
        let base = Facts {
            protocol: event.protocol,
            port: u16::from_be(event.destination_port),
            is_v6: ip_of(event.source).is_ipv6(),
            is_dropped: event.reason != 0,
            is_audit: names.verdict(event) == Verdict::Audit,
            ..Facts::default()
        };
        let is_new = u32::from(event.r#type) == event_type::EVENT_FLOW_NEW.0;
        let by_rule = event.rule_id != 0 || event.ingress_rule_id != 0;
        let add = |facts: Facts| self.add(facts, &sides, 1);
        let portless = Facts { port: 0, ..base };
        let kind = if base.is_dropped { 1 } else { u8::from(is_new && by_rule) * 2 };
        let detail = if base.is_dropped { 0 } else { event.r#type };
        add(Facts { family: FLOWS, kind, detail, is_v6: false, ..portless });
        if base.is_dropped {
            let facts = Facts { port: 0, is_v6: false, ..base };
            add(Facts { family: DROPS, detail: event.reason, is_dropped: false, ..facts });
        }
        if event.protocol == 6 && !base.is_dropped {
            for detail in tcp_ends(event, is_new) {
                add(Facts { family: TCP, detail, is_v6: base.is_v6, ..Facts::default() });
            }
        }
        let has_ports = L4Protocol::from(event.protocol).has_ports();
        if is_new && has_ports && u32::from(event.flags) & event_flags::EVENT_REPLY.0 == 0 {
            add(Facts { family: PORTS, protocol: base.protocol, port: base.port, ..Facts::default() });
        }
        if matches!(event.protocol, 1 | 58) {
            add(Facts { family: ICMP, detail: event.icmp_type, is_v6: base.is_v6, ..Facts::default() });
        }
        let is_denied = DropReason(event.reason).is_policy();
        if (is_new && by_rule) || is_denied {
            let detail = match Direction::from(event.direction) {
                Direction::Unknown => 0,
                Direction::Ingress => 1,
                Direction::Egress => 2,
            };
            let kind = names.match_type(event) as u8;
            let is_audit = base.is_audit;
            add(Facts { family: POLICY, kind, detail, is_dropped: is_denied, is_audit, ..Facts::default() });
        }
        let destination = IdentityId(event.destination_identity);
        if (is_new || base.is_dropped) && (destination == IdentityId::WORLD || destination.is_local()) {
            add(Facts { family: WORLD, is_v6: false, port: if has_ports { base.port } else { 0 }, ..base });
        }
    }

    /// Counts one request or answer.
    pub fn count_request(&self, event: &Event, request: &l7::Record, names: &Names) {
        let sides = self.sides(event, names);
        let is_answer = request.kind == RecordKind::Response;
        let is_at_server = Direction::from(event.direction) == Direction::Ingress;
        let base = Facts { protocol: event.protocol, is_dropped: event.reason != 0, ..Facts::default() };
        let add = |facts: Facts| self.add(facts, &sides, 1);
        let detail = match &request.message {
            L7Message::Http(_) => 4,
            L7Message::Dns(_) => 5,
            L7Message::Kafka(_) => 6,
            L7Message::Tls { .. } => 7,
            L7Message::Unknown => 8,
        };
        add(Facts { family: FLOWS, kind: 3, detail, ..base });
        match &request.message {
            L7Message::Http(http) if is_answer => {
                let detail = index(&METHODS, &http.method);
                let kind = index(&["HTTP/1.0", "HTTP/1.1", "HTTP/2"], &http.version);
                let port = http.status.unwrap_or(0);
                add(Facts { family: HTTP, kind, detail, port, is_v6: is_at_server, ..Facts::default() });
                if let Some(latency) = request.latency_us {
                    let mut all = self.durations.lock().expect("nobody panics while it holds the counters");
                    all.entry((detail, is_at_server)).or_default().add(latency as f64 / 1e6);
                }
            }
            L7Message::Dns(dns) => {
                let detail = dns.types.first().map_or(u8::MAX, |name| index(&DNS_TYPES, name));
                let kind = dns.code.and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX);
                let facts = Facts { detail, ..Facts::default() };
                add(match is_answer {
                    false => Facts { family: DNS_QUERIES, ..facts },
                    true => Facts { family: DNS_RESPONSES, kind, port: dns.addresses.len() as u16, ..facts },
                });
            }
            _ => {}
        }
    }

    fn sides(&self, event: &Event, names: &Names) -> [Arc<str>; 2] {
        match self.context {
            Context::None => [Arc::default(), Arc::default()],
            Context::Identity => {
                [event.source_identity, event.destination_identity].map(|id| Arc::from(id.to_string()))
            }
            context => {
                let identities = [event.source_identity, event.destination_identity];
                let mut pods =
                    names.pods_of(event).into_iter().zip(identities).map(|(pod, identity)| match pod {
                        Some(pod) if context == Context::Pod => {
                            Arc::from(format!("{}/{}", pod.namespace, pod.name))
                        }
                        Some(pod) => pod.namespace,
                        None => {
                            Arc::from(crate::flow::reserved_name(IdentityId(identity)).unwrap_or("world"))
                        }
                    });
                [pods.next().unwrap_or_default(), pods.next().unwrap_or_default()]
            }
        }
    }

    fn add(&self, facts: Facts, [source, destination]: &[Arc<str>; 2], count: u64) {
        let mut series = self.series.lock().expect("nobody panics while it holds the counters");
        let family = &mut series[facts.family];
        let key = (facts, source.clone(), destination.clone());
        if let Some(value) = family.get_mut(&key) {
            *value += count;
            return;
        }
        if family.len() < SERIES_MAX {
            family.insert(key, count);
            return;
        }
        // Names and ports that clients choose must not fill the memory: what is decided here stays told.
        let other = Facts { is_other: true, port: 0, protocol: 0, ..facts };
        let names: [Arc<str>; 2] =
            [source, destination].map(|name| if name.is_empty() { name.clone() } else { "other".into() });
        let [source, destination] = names;
        *family.entry((other, source, destination)).or_default() += count;
    }
}

/// What the flags of a connection's record tell: it began, it was closed, it was reset.
fn tcp_ends(event: &Event, is_new: bool) -> impl Iterator<Item = u8> {
    let is_end = u32::from(event.r#type) == event_type::EVENT_FLOW_END.0;
    let has = |flag: u8| event.tcp_flags & flag != 0;
    let all = [(is_new && has(0x02), 0), (is_end && has(0x01), 1), (is_end && has(0x04), 2)];
    all.into_iter().filter(|(is_it, _)| *is_it).map(|(_, flag)| flag)
}

impl Collector for FlowMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let series = self.series.lock().expect("nobody panics while it holds the counters").clone();
        for (family, rows) in FAMILIES.iter().zip(series) {
            let mut metric =
                encoder.encode_descriptor(family.name, family.help, None, MetricType::Counter)?;
            for ((facts, source, destination), value) in rows {
                let mut labels = (family.labels)(&facts);
                if self.context != Context::None && facts.family != LOST {
                    labels.push(("source", source.to_string()));
                    labels.push(("destination", destination.to_string()));
                }
                ConstCounter::new(value).encode(metric.encode_family(&labels)?)?;
            }
        }
        let durations = self.durations.lock().expect("nobody panics while it holds the counters").clone();
        let help = "How long servers took to answer requests of HTTP";
        let unit = Unit::Seconds;
        let name = "http_request_duration";
        let mut metric = encoder.encode_descriptor(name, help, Some(&unit), MetricType::Histogram)?;
        for ((method, is_at_server), durations) in durations {
            let facts = Facts { is_v6: is_at_server, ..Facts::default() };
            let labels = [("method", word(&METHODS, method)), ("reporter", reporter(&facts))];
            let beyond = durations.count - durations.buckets.iter().sum::<u64>();
            let mut buckets: Vec<(f64, u64)> = SECONDS.into_iter().zip(durations.buckets).collect();
            buckets.push((f64::MAX, beyond));
            metric.encode_family(&labels)?.encode_histogram::<NoLabelSet>(
                durations.sum,
                durations.count,
                &buckets,
                None,
            )?;
        }
        Ok(())
    }
}

impl fmt::Debug for FlowMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FlowMetrics").field("context", &self.context).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text;
    use prometheus_client::registry::Registry;

    use super::*;
    use crate::flow::tests::{dropped, forwarded, names, request};

    fn written(metrics: &FlowMetrics) -> String {
        let mut registry = Registry::default();
        registry.sub_registry_with_prefix("hubble").register_collector(Box::new(metrics.clone()));
        let mut out = String::new();
        text::encode(&mut out, &registry).expect("into memory");
        out
    }

    #[test]
    fn flows_become_the_families_of_hubble() {
        let metrics = FlowMetrics::new(Context::None);
        let names = names();
        let ping = Event { protocol: 1, icmp_type: 8, rule_id: 0, ..forwarded() };
        let outward = Event { destination_identity: 2, ..dropped() };
        let audited = Event { rule_id: 8, protocol: 17, ..forwarded() };
        for event in [forwarded(), forwarded(), dropped(), ping, outward, audited] {
            metrics.count(&event, &names);
        }
        metrics.lost(1, 5);
        let text = written(&metrics);
        for line in [
            r#"hubble_flows_processed_total{type="PolicyVerdict",subtype="new",protocol="TCP",verdict="FORWARDED"} 2"#,
            r#"hubble_flows_processed_total{type="Drop",subtype="",protocol="TCP",verdict="DROPPED"} 2"#,
            r#"hubble_drop_total{reason="POLICY_DENIED",protocol="TCP"} 2"#,
            r#"hubble_tcp_flags_total{flag="SYN",family="IPv4"} 2"#,
            r#"hubble_port_distribution_total{protocol="TCP",port="8080"} 2"#,
            r#"hubble_icmp_total{family="IPv4",type="EchoRequest"} 1"#,
            r#"hubble_policy_verdicts_total{direction="egress",match="l3-l4",action="forwarded"} 2"#,
            r#"hubble_policy_verdicts_total{direction="ingress",match="none",action="dropped"} 2"#,
            r#"hubble_flows_to_world_total{protocol="TCP",verdict="DROPPED",port="8080"} 1"#,
            r#"hubble_flows_processed_total{type="PolicyVerdict",subtype="new",protocol="UDP",verdict="AUDIT"} 1"#,
            r#"hubble_policy_verdicts_total{direction="egress",match="l3-l4",action="audit"} 1"#,
            r#"hubble_lost_events_total{source="hubble_ring_buffer"} 5"#,
        ] {
            assert!(text.lines().any(|written| written == line), "{line}\nis not in\n{text}");
        }
    }

    /// Methods, codes and names are a client's to choose: they cannot make new series.
    #[test]
    fn requests_are_counted_by_words_of_a_fixed_set() {
        let metrics = FlowMetrics::new(Context::None);
        let recorder = Recorder::new(65_536);
        let answer = |method: &str, status: u16| l7::Record {
            kind: RecordKind::Response,
            latency_us: Some(3000),
            message: L7Message::Http(l7::HttpMessage {
                version: "HTTP/1.1".to_owned(),
                method: method.to_owned(),
                status: Some(status),
                ..l7::HttpMessage::default()
            }),
            ..request("/")
        };
        let dns = |kind, code: Option<u16>| l7::Record {
            kind,
            message: L7Message::Dns(l7::DnsMessage {
                query: "db.example".to_owned(),
                types: vec!["A".to_owned()],
                addresses: code.iter().map(|_| [10, 0, 0, 1].into()).collect(),
                code,
                ..l7::DnsMessage::default()
            }),
            ..request("/")
        };
        recorder.append_requests(vec![request("/"), answer("GET", 200), dns(RecordKind::Request, None)]);
        recorder.append_requests(vec![dns(RecordKind::Response, Some(0))]);
        recorder.append_requests((0..500).map(|number| answer(&format!("M{number}"), 404)).collect());
        let mut records = Vec::new();
        recorder.copy(0, 1000, &mut records);
        for record in &records {
            let Record::Request(event, request) = record else { panic!("{record:?}") };
            metrics.count_request(event, request, &names());
        }
        let text = written(&metrics);
        for line in [
            r#"hubble_flows_processed_total{type="L7",subtype="HTTP",protocol="TCP",verdict="FORWARDED"} 502"#,
            r#"hubble_http_requests_total{method="GET",protocol="HTTP/1.1",status="200",reporter="server"} 1"#,
            r#"hubble_http_requests_total{method="other",protocol="HTTP/1.1",status="404",reporter="server"} 500"#,
            r#"hubble_http_request_duration_seconds_bucket{le="0.005",method="GET",reporter="server"} 1"#,
            r#"hubble_dns_queries_total{qtypes="A"} 1"#,
            r#"hubble_dns_responses_total{rcode="No Error",qtypes="A",ips_returned="1"} 1"#,
        ] {
            assert!(text.lines().any(|written| written == line), "{line}\nis not in\n{text}");
        }
    }

    #[test]
    fn labels_say_who_the_sides_are() {
        for (context, labels) in [
            (Context::Namespace, r#"source="shop",destination="shop"} 1"#),
            (Context::Pod, r#"source="shop/frontend-1",destination="shop/backend-1"} 1"#),
            (Context::Identity, r#"source="256",destination="300"} 1"#),
        ] {
            let metrics = FlowMetrics::new(context);
            metrics.count(&forwarded(), &names());
            let text = written(&metrics);
            assert!(text.contains(labels), "{context:?}: {text}");
        }
        let metrics = FlowMetrics::new(Context::Namespace);
        metrics.count(&dropped(), &names());
        assert!(written(&metrics).contains(r#"source="world",destination="shop"} 1"#));
    }

    /// Pods, names and paths are whoever's who makes them: with the widest labels, too, the series have an end.
    #[test]
    fn names_that_somebody_chose_make_no_series_without_end() {
        let metrics = FlowMetrics::new(Context::Pod);
        let names: Vec<Arc<str>> = (0..10_000).map(|number| Arc::from(format!("evil/{number}"))).collect();
        for (number, name) in names.iter().enumerate() {
            for family in 0..FAMILIES.len() {
                let facts = Facts { family, port: number as u16, ..Facts::default() };
                metrics.add(facts, &[name.clone(), name.clone()], 1);
            }
        }
        {
            let series = metrics.series.lock().expect("the test's own");
            for (family, rows) in FAMILIES.iter().zip(&*series) {
                assert!(rows.len() <= SERIES_MAX + 1, "{}: {}", family.name, rows.len());
                assert_eq!(
                    rows.values().sum::<u64>(),
                    10_000,
                    "{}: what was left out is counted",
                    family.name
                );
            }
        }
        // A question's name, a path and a method are no labels at all.
        let text = written(&metrics);
        assert!(text.contains(r#"source="other",destination="other"} 8000"#), "the rest is told as other");
    }

    /// A port scan and chosen names fill no memory, and every flow is counted all the same.
    #[test]
    fn series_have_a_bound_and_nothing_is_lost() {
        let metrics = FlowMetrics::new(Context::None);
        for port in 0..10_000_u16 {
            metrics.count(&Event { destination_port: port.to_be(), ..forwarded() }, &names());
        }
        let series = metrics.series.lock().expect("the test's own");
        assert!(series[PORTS].len() <= SERIES_MAX + 1, "{}", series[PORTS].len());
        assert_eq!(series[PORTS].values().sum::<u64>(), 10_000);
    }
}
