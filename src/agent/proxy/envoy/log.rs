//! What an Envoy tells of requests, as the records that `weir proxy` makes of its own.

use std::net::SocketAddr;
use std::sync::Arc;

use jiff::Timestamp;
use tonic::{Request, Response, Status, Streaming};

use super::super::Hears;
use super::proto::accesslog::access_log_service_server::AccessLogService;
use super::proto::accesslog::http_log_entry::Version;
use super::proto::accesslog::{HttpLogEntry, LogAddress, StreamAccessLogsMessage, StreamAccessLogsResponse};
use crate::datapath::Datapath;
use crate::model::Protocol;
use crate::model::l7::{HttpMessage, L7Message, L7Verdict, Lookup, Record, RecordKind, TEXT_MAX};

/// What the RBAC filter says of a request that no rule matches.
const DENIED: &str = "rbac_access_denied";
/// What it says of an answer of the server.
const OF_SERVER: &str = "via_upstream";

/// Takes the log of an Envoy.
pub struct Log {
    /// Whose the aliases are that Envoy knows clients by.
    pub datapath: Arc<Datapath>,
    /// Who judges a flow.
    pub flows: Arc<dyn Lookup>,
    /// Who hears.
    pub hears: Arc<dyn Hears>,
}

#[tonic::async_trait]
impl AccessLogService for Log {
    async fn stream_access_logs(
        &self,
        messages: Request<Streaming<StreamAccessLogsMessage>>,
    ) -> Result<Response<StreamAccessLogsResponse>, Status> {
        let mut messages = messages.into_inner();
        while let Some(message) = messages.message().await? {
            let entries = message.http_logs.map(|logs| logs.log_entry).unwrap_or_default();
            let records = entries.iter().flat_map(|entry| self.records(entry)).collect();
            self.hears.records(records, 0);
        }
        Ok(Response::new(StreamAccessLogsResponse {}))
    }
}

impl Log {
    /// The request and, where the server has answered, the answer.
    fn records(&self, entry: &HttpLogEntry) -> Vec<Record> {
        let Some(common) = &entry.common_properties else { return Vec::new() };
        let ends = (
            address(common.downstream_direct_remote_address.as_ref()),
            address(common.downstream_local_address.as_ref()),
        );
        let (Some(client), Some(server)) = ends else { return Vec::new() };
        let client = self.datapath.client_of(client).unwrap_or(client);
        let judges = self.flows.of(client, server, Protocol::Tcp).unwrap_or_default();
        let (message, details) = message(entry);
        let (verdict, note) = match details {
            details if details.starts_with(OF_SERVER) => (L7Verdict::Forwarded, String::new()),
            details if details.starts_with(DENIED) => (L7Verdict::Denied, String::new()),
            details => (L7Verdict::Error, cut(details)),
        };
        let sets: Vec<_> = judges.rule_sets().collect();
        let time = common.start_time.as_ref().and_then(|time| Timestamp::new(time.seconds, time.nanos).ok());
        let request = Record {
            time: time.unwrap_or_else(Timestamp::now),
            protocol: Protocol::Tcp,
            client,
            server,
            source: judges.source,
            destination: judges.destination,
            source_endpoint: judges.source_endpoint,
            destination_endpoint: judges.destination_endpoint,
            egress: judges.egress,
            ingress: judges.ingress,
            denied_by: sets.first().copied().filter(|_| verdict == L7Verdict::Denied),
            kind: RecordKind::Request,
            verdict,
            note,
            latency_us: None,
            message: L7Message::Http(HttpMessage { status: None, grpc_status: None, ..message.clone() }),
        };
        if verdict != L7Verdict::Forwarded {
            return vec![request];
        }
        let latency = common.time_to_first_upstream_rx_byte.as_ref().map(|latency| {
            let micros =
                latency.seconds.saturating_mul(1_000_000).saturating_add(i64::from(latency.nanos) / 1000);
            u64::try_from(micros).unwrap_or_default()
        });
        let answer = Record {
            kind: RecordKind::Response,
            latency_us: latency,
            message: L7Message::Http(message),
            ..request.clone()
        };
        vec![request, answer]
    }
}

/// What was said, and what became of it in Envoy's words.
fn message(entry: &HttpLogEntry) -> (HttpMessage, &str) {
    let version = match entry.protocol_version() {
        Version::Http10 => "HTTP/1.0",
        Version::Http2 => "HTTP/2",
        Version::Http3 => "HTTP/3",
        Version::Http11 | Version::ProtocolUnspecified => "HTTP/1.1",
    };
    let mut message = HttpMessage { version: version.to_owned(), ..HttpMessage::default() };
    if let Some(request) = &entry.request {
        let header = |name: &str| request.request_headers.get(name).map(|value| cut(value));
        message.method = header(":method").unwrap_or_default();
        message.path = cut(&request.path);
        message.host = cut(&request.authority);
        message.trace_parent = header("traceparent");
    }
    let Some(response) = &entry.response else { return (message, "") };
    message.status = response.response_code.and_then(|code| u16::try_from(code).ok());
    let in_trailers = response.response_trailers.get("grpc-status");
    let grpc_status = in_trailers.or_else(|| response.response_headers.get("grpc-status"));
    message.grpc_status = grpc_status.and_then(|status| status.parse().ok());
    (message, &response.response_code_details)
}

fn address(address: Option<&LogAddress>) -> Option<SocketAddr> {
    let socket = address?.socket_address.as_ref()?;
    Some(SocketAddr::new(socket.address.parse().ok()?, u16::try_from(socket.port_value).ok()?))
}

/// The first part of a long text.
fn cut(text: &str) -> String {
    let end = (0..=TEXT_MAX.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
    text[..end.unwrap_or(0)].to_owned()
}
