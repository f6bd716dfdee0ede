//! From a request that the proxy has seen to a flow of layer 7, with Hubble's numbers and words.

use super::convert::{Converter, emitter, event_types, policies};
use super::proto::{flow as pb, timestamp};
use crate::flow::{Clock, Event, Names};
use crate::model::l7::{
    DnsMessage, HttpMessage, KafkaMessage, L7Message, L7Verdict, Record, RecordKind, kafka_api_name,
};

/// The words of Hubble for DNS codes.
const RCODES: [(u16, &str); 6] = [
    (1, "Format Error"),
    (2, "Server Failure"),
    (3, "Non-Existent Domain"),
    (4, "Not Implemented"),
    (5, "Query Refused"),
    (6, "Name Exists when it should not"),
];

impl Converter {
    /// The flow of a request or an answer. `event` stands for the record among the packets.
    #[allow(deprecated)]
    pub fn request(&self, event: &Event, record: &Record, names: &Names, clock: &Clock) -> pb::Flow {
        let named = names.flow(event, clock);
        let mut flow = self.packet(&named);
        let is_reply = record.kind == RecordKind::Response;
        flow.time = Some(timestamp(record.time));
        // Where memory or the disk has the request is no part of it.
        flow.uuid = super::convert::uuid(&self.node, &Event { service: Default::default(), ..*event });
        flow.r#type = pb::FlowType::L7.into();
        flow.emitter = Some(emitter());
        flow.node_name.clone_from(&self.node);
        flow.node_labels.clone_from(&self.node_labels);
        flow.event_type = Some(pb::CiliumEventType { r#type: event_types::L7, sub_type: 0 });
        flow.traffic_direction = super::convert::direction(named.traffic_direction).into();
        flow.is_reply = Some(is_reply);
        flow.reply = is_reply;
        flow.verdict = match record.verdict {
            L7Verdict::Forwarded => pb::Verdict::Forwarded,
            L7Verdict::Denied => pb::Verdict::Dropped,
            L7Verdict::Error => pb::Verdict::Error,
        }
        .into();
        flow.l7 = layer7(record);
        flow.summary = summary(record);
        flow.trace_context = trace(record);
        if let L7Message::Tls { server_name: Some(name) } = &record.message {
            flow.destination_names.push(name.clone());
        }
        self.name_policies(&mut flow, record, names);
        flow
    }

    fn name_policies(&self, flow: &mut pb::Flow, record: &Record, names: &Names) {
        let event = match record.kind {
            RecordKind::Request => pb::WeirEvent::L7Request,
            RecordKind::Response => pb::WeirEvent::L7Response,
        };
        let weir = flow.weir.get_or_insert_default();
        weir.event = event.into();
        if record.verdict == L7Verdict::Denied {
            let reason = crate::flow::DropReason::POLICY_DENIED;
            flow.drop_reason_desc = reason.0.into();
            weir.drop_reason_text = "Denied by rules of layer 7".to_owned();
            weir.isolated_by = record.denied_by.map_or_else(Vec::new, |id| policies(&names.rule_set(id)));
        } else {
            let named = |id: Option<crate::model::l7::RuleSetId>| {
                id.map_or_else(Vec::new, |id| policies(&names.rule_set(id)))
            };
            flow.egress_allowed_by = named(record.egress);
            flow.ingress_allowed_by = named(record.ingress);
        }
    }
}

fn layer7(record: &Record) -> Option<pb::Layer7> {
    use pb::layer7::Record as Arm;
    let arm = match &record.message {
        L7Message::Http(message) => Arm::Http(http(message)),
        L7Message::Dns(message) => Arm::Dns(dns(message)),
        L7Message::Kafka(message) => Arm::Kafka(kafka(message)),
        L7Message::Tls { .. } | L7Message::Unknown => return None,
    };
    let r#type = match record.kind {
        RecordKind::Request => pb::L7FlowType::Request,
        RecordKind::Response => pb::L7FlowType::Response,
    };
    let latency_ns = record.latency_us.unwrap_or(0).saturating_mul(1000);
    Some(pb::Layer7 { r#type: r#type.into(), latency_ns, record: Some(arm) })
}

fn http(message: &HttpMessage) -> pb::Http {
    let status = message.grpc_status.map(|status| ("grpc-status", status.to_string()));
    let headers = status.into_iter().map(|(key, value)| pb::HttpHeader { key: key.to_owned(), value });
    pb::Http {
        code: message.status.unwrap_or(0).into(),
        method: message.method.clone(),
        url: url(message),
        protocol: message.version.clone(),
        headers: headers.collect(),
    }
}

fn url(message: &HttpMessage) -> String {
    match message.host.is_empty() || message.path.contains("://") {
        true => message.path.clone(),
        false => format!("http://{}{}", message.host, message.path),
    }
}

fn dns(message: &DnsMessage) -> pb::Dns {
    pb::Dns {
        query: absolute(&message.query),
        ips: message.addresses.iter().map(ToString::to_string).collect(),
        ttl: message.ttl_s.unwrap_or(0),
        cnames: message.cnames.clone(),
        observation_source: "proxy".to_owned(),
        rcode: message.code.unwrap_or(0).into(),
        qtypes: message.types.clone(),
        rrtypes: Vec::new(),
    }
}

/// A name as DNS writes it, with the last dot.
fn absolute(name: &str) -> String {
    if name.ends_with('.') { name.to_owned() } else { format!("{name}.") }
}

fn kafka(message: &KafkaMessage) -> pb::Kafka {
    pb::Kafka {
        error_code: message.error_code.unwrap_or(0).into(),
        api_version: message.api_version.into(),
        api_key: api(message),
        correlation_id: message.correlation_id,
        topic: message.topics.join(","),
    }
}

fn api(message: &KafkaMessage) -> String {
    kafka_api_name(message.api_key).map_or_else(|| message.api_key.to_string(), str::to_owned)
}

/// The id of the trace that the `traceparent` header names: `00-TRACE-SPAN-01`.
fn trace(record: &Record) -> Option<pb::TraceContext> {
    let L7Message::Http(HttpMessage { trace_parent: Some(parent), .. }) = &record.message else {
        return None;
    };
    let trace_id = parent.split('-').nth(1).filter(|id| id.len() == 32)?.to_owned();
    Some(pb::TraceContext { parent: Some(pb::TraceParent { trace_id }) })
}

/// The last part of a line for people, as the stock command line has it.
fn summary(record: &Record) -> String {
    let text = match (&record.message, record.kind) {
        (L7Message::Http(http), RecordKind::Request) => {
            format!("{} {} {}", http.version, http.method, url(http))
        }
        (L7Message::Http(http), RecordKind::Response) => {
            let milliseconds = record.latency_us.unwrap_or(0) / 1000;
            let status = http.status.unwrap_or(0);
            format!("{} {status} {milliseconds}ms ({} {})", http.version, http.method, url(http))
        }
        (L7Message::Dns(dns), RecordKind::Request) => {
            format!("DNS Query {} {}", absolute(&dns.query), dns.types.join(","))
        }
        (L7Message::Dns(dns), RecordKind::Response) => dns_answer(dns),
        (L7Message::Kafka(kafka), kind) => {
            let kind = if kind == RecordKind::Request { "request" } else { "response" };
            let error = kafka.error_code.map(|code| format!(" error {code}")).unwrap_or_default();
            let topics = kafka.topics.join(",");
            format!("Kafka {} {kind} {} topic '{topics}'{error}", api(kafka), kafka.correlation_id)
        }
        (L7Message::Tls { server_name }, _) => {
            format!("TLS for {}", server_name.as_deref().unwrap_or("no name"))
        }
        (L7Message::Unknown, _) => "of no protocol that the rules are for".to_owned(),
    };
    if record.note.is_empty() { text } else { format!("{text}: {}", record.note) }
}

fn dns_answer(dns: &DnsMessage) -> String {
    let question = format!("(Proxy {} {})", absolute(&dns.query), dns.types.join(","));
    match dns.code {
        Some(code) if code != 0 => {
            let words = RCODES.iter().find(|(number, _)| *number == code).map(|(_, words)| *words);
            format!("DNS Answer RCode: {} {question}", words.map_or_else(|| code.to_string(), str::to_owned))
        }
        _ => {
            let addresses: Vec<String> = dns.addresses.iter().map(ToString::to_string).collect();
            format!("DNS Answer \"{}\" TTL: {} {question}", addresses.join(","), dns.ttl_s.unwrap_or(0))
        }
    }
}
