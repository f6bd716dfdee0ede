//! What the proxy saw: one record for each request, and one for its answer.

use std::net::{IpAddr, SocketAddr};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::RuleSetId;
use crate::model::{EndpointId, IdentityId, Protocol};

/// One request or answer as the proxy saw it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// When.
    pub time: Timestamp,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Who began the connection.
    pub client: SocketAddr,
    /// Whom it wanted to reach.
    pub server: SocketAddr,
    /// Who the client is to policy.
    pub source: IdentityId,
    /// Who the server is to policy.
    pub destination: IdentityId,
    /// The client's endpoint, where it is of this node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_endpoint: Option<EndpointId>,
    /// The server's endpoint, where it is of this node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination_endpoint: Option<EndpointId>,
    /// The rule set that judged on the client's side.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<RuleSetId>,
    /// The rule set that judged on the server's side.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ingress: Option<RuleSetId>,
    /// The rule set that denied it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub denied_by: Option<RuleSetId>,
    /// Request or answer.
    pub kind: RecordKind,
    /// What became of it.
    pub verdict: L7Verdict,
    /// Why it was refused, or what a rule asked to be said.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub note: String,
    /// Of an answer: how long the server took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency_us: Option<u64>,
    /// What was said.
    pub message: L7Message,
}

/// Whether a record is of a question or its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RecordKind {
    /// From the client.
    Request,
    /// From the server, or from the proxy in its place.
    Response,
}

/// What became of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum L7Verdict {
    /// It was passed on.
    Forwarded,
    /// No rule allows it.
    Denied,
    /// It could not be read without doubt, or came too slowly, or the server could not be reached.
    Error,
}

/// What was said, by protocol.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum L7Message {
    /// HTTP, or gRPC on it.
    Http(HttpMessage),
    /// DNS.
    Dns(DnsMessage),
    /// Kafka.
    Kafka(KafkaMessage),
    /// The beginning of TLS.
    Tls {
        /// The name that the client asked for.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        server_name: Option<String>,
    },
    /// Bytes of no protocol that the rules are for.
    Unknown,
}

/// A request of HTTP, or its answer. Long texts are cut at [`TEXT_MAX`] bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HttpMessage {
    /// `HTTP/1.1`, `HTTP/2`.
    pub version: String,
    /// `GET`.
    pub method: String,
    /// With the query.
    pub path: String,
    /// From the Host header or `:authority`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub host: String,
    /// Of an answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// Of an answer of gRPC.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grpc_status: Option<u16>,
    /// The `traceparent` header, which joins records of one trace.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace_parent: Option<String>,
}

/// A question of DNS, or its answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DnsMessage {
    /// The name, in lower case and without the last dot.
    pub query: String,
    /// The types asked for: `A`, `AAAA`.
    pub types: Vec<String>,
    /// Of an answer: its code.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code: Option<u16>,
    /// The addresses in it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpAddr>,
    /// The other names on the way to them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub cnames: Vec<String>,
    /// The shortest TTL of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttl_s: Option<u32>,
}

/// A request of Kafka, or its answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct KafkaMessage {
    /// The API's number.
    pub api_key: i16,
    /// Its version.
    pub api_version: i16,
    /// Of this connection: which request.
    pub correlation_id: i32,
    /// Who the client says it is.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub client_id: String,
    /// The topics of the request, as many as the record has room for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub topics: Vec<String>,
    /// The error that the proxy answered with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_code: Option<i16>,
}

/// Where texts in records are cut.
pub const TEXT_MAX: usize = 1024;
