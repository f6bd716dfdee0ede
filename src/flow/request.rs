//! Records of requests: what is left out of them, and the event that stands for one among the others.

use crate::datapath::abi::addr_of;
use crate::datapath::types::{direction, event_flags};
use crate::model::l7::{HttpMessage, L7Message, L7Verdict, Record, RecordKind};

use super::{Clock, DropReason, Event};

/// What takes the place of text that is not kept.
const REDACTED: &str = "REDACTED";

/// What is not kept of requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Redact {
    /// What follows `?` in a URL.
    pub url_query: bool,
    /// `user:password@` in a URL.
    pub user_info: bool,
    /// Headers by their names, in lower case.
    pub headers: Vec<String>,
}

impl Default for Redact {
    fn default() -> Self {
        Self { url_query: false, user_info: true, headers: Vec::new() }
    }
}

impl Redact {
    /// Takes out of `record` what must not be kept.
    pub fn apply(&self, record: &mut Record) {
        if let L7Message::Http(http) = &mut record.message {
            self.apply_http(http);
        }
    }

    fn apply_http(&self, http: &mut HttpMessage) {
        if self.user_info {
            http.host = without_user_info(&http.host);
            http.path = match http.path.split_once("://") {
                Some((scheme, rest)) => {
                    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
                    let (authority, path) = rest.split_at(end);
                    format!("{scheme}://{}{path}", without_user_info(authority))
                }
                None => std::mem::take(&mut http.path),
            };
        }
        if self.url_query
            && let Some(at) = http.path.find('?')
        {
            http.path.truncate(at);
        }
        let is_named = |name: &str| self.headers.iter().any(|header| header == name);
        if is_named("host") || is_named(":authority") {
            http.host = REDACTED.to_owned();
        }
        if is_named("traceparent") {
            http.trace_parent = None;
        }
        if is_named("grpc-status") {
            http.grpc_status = None;
        }
    }
}

fn without_user_info(authority: &str) -> String {
    authority.rsplit_once('@').map_or(authority, |(_, host)| host).to_owned()
}

/// The event that stands for `record`: what filters on raw records look at.
pub(super) fn event_of(record: &Record, clock: &Clock) -> Event {
    let is_reply = record.kind == RecordKind::Response;
    let is_at_server = match record.denied_by {
        Some(denied_by) => record.ingress == Some(denied_by),
        None => record.egress.is_none() && record.ingress.is_some(),
    };
    let way = if is_at_server { direction::DIRECTION_INGRESS } else { direction::DIRECTION_EGRESS };
    let reason = match record.verdict {
        L7Verdict::Denied => DropReason::POLICY_DENIED.0,
        L7Verdict::Forwarded | L7Verdict::Error => 0,
    };
    Event {
        timestamp_ns: clock.monotonic(record.time),
        source: addr_of(record.client.ip()),
        destination: addr_of(record.server.ip()),
        source_port: record.client.port().to_be(),
        destination_port: record.server.port().to_be(),
        source_identity: record.source.0,
        destination_identity: record.destination.0,
        source_endpoint: record.source_endpoint.map_or(0, |endpoint| endpoint.0),
        destination_endpoint: record.destination_endpoint.map_or(0, |endpoint| endpoint.0),
        protocol: record.protocol.number(),
        direction: way.0 as u8,
        flags: if is_reply { event_flags::EVENT_REPLY.0 as u8 } else { 0 },
        reason,
        ..Event::default()
    }
}

/// About how many bytes a record takes.
pub(super) fn bytes_of(record: &Record) -> usize {
    let list = |texts: &[String]| texts.iter().map(|text| text.len() + size_of::<String>()).sum::<usize>();
    let texts = match &record.message {
        L7Message::Http(http) => {
            let trace = http.trace_parent.as_ref().map_or(0, String::len);
            http.version.len() + http.method.len() + http.path.len() + http.host.len() + trace
        }
        L7Message::Dns(dns) => {
            dns.query.len() + list(&dns.types) + list(&dns.cnames) + dns.addresses.len() * 17
        }
        L7Message::Kafka(kafka) => kafka.client_id.len() + list(&kafka.topics),
        L7Message::Tls { server_name } => server_name.as_ref().map_or(0, String::len),
        L7Message::Unknown => 0,
    };
    size_of::<Record>() + record.note.len() + texts
}
