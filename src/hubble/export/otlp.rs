//! Flows as logs of OpenTelemetry, sent to a collector by OTLP over gRPC.

use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use serde_json::Value;
use tokio::time::{sleep, timeout};
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::Origin;
use super::settings::OtlpSettings;
use crate::hubble::client::connect_quietly;
use crate::hubble::json;
use crate::hubble::proto::flow::{Flow, Verdict, layer7};
use crate::hubble::proto::observer::GetFlowsResponse;
use crate::hubble::proto::observer::get_flows_response::ResponseTypes;
use crate::hubble::proto::otlp::any_value::Value as Any;
use crate::hubble::proto::otlp::logs_service_client::LogsServiceClient;
use crate::hubble::proto::otlp::{
    AnyValue, ArrayValue, ExportLogsServiceRequest, InstrumentationScope, KeyValue, KeyValueList, LogRecord,
    Resource, ResourceLogs, ScopeLogs,
};
use crate::hubble::proto::time;
use crate::hubble::tls::Identity;
use crate::hubble::view::{drop_reason, ports, protocol};

/// An answer that takes longer is none.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// A batch that the collector does not take within this time is given up.
const GIVE_UP: Duration = Duration::from_secs(60);
/// The waits between attempts double from the first to the second.
const RETRY: [Duration; 2] = [Duration::from_millis(200), Duration::from_secs(5)];
/// Numbers of severities.
const INFO: i32 = 9;
const WARN: i32 = 13;
const ERROR: i32 = 17;

/// A collector, connected to when there is something to send.
pub struct Otlp {
    settings: OtlpSettings,
    identity: Option<Identity>,
    resource: Resource,
    client: Option<LogsServiceClient<Channel>>,
}

impl Otlp {
    /// Connects to nobody yet.
    pub fn new(settings: OtlpSettings, origin: &Origin) -> Self {
        let attributes = [
            ("service.name", "weir"),
            ("k8s.cluster.name", origin.cluster.as_str()),
            ("k8s.node.name", origin.node.as_str()),
        ];
        Self {
            identity: settings.tls_dir.as_deref().map(Identity::new),
            settings,
            resource: Resource {
                attributes: attributes.into_iter().map(|(key, text)| pair(key, string(text))).collect(),
            },
            client: None,
        }
    }

    /// Sends all of `flows`; says how many the collector took.
    pub async fn send(&mut self, flows: Vec<GetFlowsResponse>) -> Result<u64> {
        let records: Vec<LogRecord> = flows.iter().filter_map(record).collect();
        let count = records.len() as u64;
        if count == 0 {
            return Ok(0);
        }
        let scope = InstrumentationScope {
            name: "weir.flow".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let scope_logs = vec![ScopeLogs { scope: Some(scope), log_records: records }];
        let resource_logs = vec![ResourceLogs { resource: Some(self.resource.clone()), scope_logs }];
        let request = ExportLogsServiceRequest { resource_logs };
        let started = Instant::now();
        let mut wait = RETRY[0];
        loop {
            let error = match self.attempt(request.clone()).await {
                Ok(rejected) => return Ok(count.saturating_sub(rejected)),
                Err(Refused::Final(error)) => return Err(error),
                Err(Refused::ForNow(error)) => error,
            };
            if started.elapsed() + wait > GIVE_UP {
                return Err(error);
            }
            sleep(wait).await;
            wait = (wait * 2).min(RETRY[1]);
        }
    }

    /// How many records were rejected.
    async fn attempt(&mut self, request: ExportLogsServiceRequest) -> Result<u64, Refused> {
        let mut client = match self.client.take() {
            Some(client) => client,
            None => LogsServiceClient::new(self.connect().await.map_err(Refused::ForNow)?),
        };
        let answer = match timeout(ANSWER_WITHIN, client.export(request)).await {
            Err(_) => return Err(Refused::ForNow(anyhow!("the collector does not answer"))),
            Ok(Err(status)) => return Err(Refused::of(&status)),
            Ok(Ok(answer)) => answer.into_inner(),
        };
        self.client = Some(client);
        let partial = answer.partial_success.unwrap_or_default();
        if partial.rejected_log_records > 0 {
            tracing::debug!(reason = partial.error_message, "the collector rejected flows");
        }
        Ok(u64::try_from(partial.rejected_log_records).unwrap_or(0))
    }

    async fn connect(&self) -> Result<Channel> {
        let (settings, identity) = (&self.settings, self.identity.as_ref());
        connect_quietly(&settings.endpoint, identity, settings.server_name.as_deref()).await
    }
}

/// Why a collector took nothing.
enum Refused {
    /// It may take it later.
    ForNow(anyhow::Error),
    /// It never will.
    Final(anyhow::Error),
}

impl Refused {
    /// OTLP says which answers are worth another try.
    fn of(status: &Status) -> Self {
        let error = anyhow!("{}: {}", status.code(), status.message());
        match status.code() {
            Code::Cancelled
            | Code::DeadlineExceeded
            | Code::Aborted
            | Code::OutOfRange
            | Code::Unavailable
            | Code::DataLoss
            | Code::Unknown
            | Code::ResourceExhausted => Self::ForNow(error),
            _ => Self::Final(error),
        }
    }
}

/// A flow as a log record: the flow is its body, what tools look for are its attributes.
fn record(answer: &GetFlowsResponse) -> Option<LogRecord> {
    let Some(ResponseTypes::Flow(flow)) = &answer.response_types else { return None };
    let at = flow.time.as_ref().or(answer.time.as_ref()).and_then(time);
    let nanoseconds = |time: jiff::Timestamp| u64::try_from(time.as_nanosecond()).unwrap_or(0);
    let (severity_number, severity_text) = match flow.verdict() {
        Verdict::Dropped => (WARN, "WARN"),
        Verdict::Error => (ERROR, "ERROR"),
        _ => (INFO, "INFO"),
    };
    let trace = flow.trace_context.as_ref().and_then(|context| context.parent.as_ref());
    Some(LogRecord {
        time_unix_nano: at.map_or(0, nanoseconds),
        observed_time_unix_nano: nanoseconds(jiff::Timestamp::now()),
        severity_number,
        severity_text: severity_text.to_owned(),
        event_name: "weir.flow".to_owned(),
        attributes: attributes(flow),
        trace_id: trace.and_then(|parent| bytes(&parent.trace_id)).unwrap_or_default(),
        body: Some(any(&json::to_value(flow))),
    })
}

/// Names of OpenTelemetry's conventions, where it has them.
fn attributes(flow: &Flow) -> Vec<KeyValue> {
    let mut all = vec![pair("weir.verdict", string(flow.verdict().as_str_name()))];
    let mut add = |key: &str, text: &str| {
        if !text.is_empty() {
            all.push(pair(key, string(text)));
        }
    };
    if let Some(ip) = &flow.ip {
        add("source.address", &ip.source);
        add("destination.address", &ip.destination);
    }
    if let Some(protocol) = protocol(flow) {
        add("network.transport", &protocol.to_string().to_ascii_lowercase());
    }
    for (side, endpoint) in [("source", &flow.source), ("destination", &flow.destination)] {
        if let Some(endpoint) = endpoint {
            add(&format!("weir.{side}.namespace"), &endpoint.namespace);
            add(&format!("weir.{side}.pod"), &endpoint.pod_name);
        }
    }
    if let Some(reason) = drop_reason(flow) {
        add("weir.drop_reason", reason.name());
    }
    let mut number = None;
    match flow.l7.as_ref().and_then(|l7| l7.record.as_ref()) {
        Some(layer7::Record::Http(http)) => {
            add("http.request.method", &http.method);
            add("url.full", &http.url);
            number = Some(("http.response.status_code", http.code)).filter(|(_, code)| *code != 0);
        }
        Some(layer7::Record::Dns(dns)) => add("dns.question.name", &dns.query),
        _ => {}
    }
    let ports =
        ports(flow).into_iter().flat_map(|[from, to]| [("source.port", from), ("destination.port", to)]);
    let numbers = ports.chain(number).map(|(key, number)| pair(key, Any::IntValue(number.into())));
    all.extend(numbers);
    all
}

fn pair(key: &str, value: Any) -> KeyValue {
    KeyValue { key: key.to_owned(), value: Some(AnyValue { value: Some(value) }) }
}

fn string(text: &str) -> Any {
    Any::StringValue(text.to_owned())
}

fn any(value: &Value) -> AnyValue {
    let value = match value {
        Value::Null => None,
        Value::Bool(value) => Some(Any::BoolValue(*value)),
        Value::Number(number) => Some(match number.as_i64() {
            Some(number) => Any::IntValue(number),
            None => Any::DoubleValue(number.as_f64().unwrap_or_default()),
        }),
        Value::String(text) => Some(string(text)),
        Value::Array(values) => {
            Some(Any::ArrayValue(ArrayValue { values: values.iter().map(any).collect() }))
        }
        Value::Object(fields) => {
            let field =
                |(key, value): (&String, &Value)| KeyValue { key: key.clone(), value: Some(any(value)) };
            Some(Any::KvlistValue(KeyValueList { values: fields.iter().map(field).collect() }))
        }
    };
    AnyValue { value }
}

/// Sixteen bytes from their hexadecimal digits.
fn bytes(hexadecimal: &str) -> Option<Vec<u8>> {
    let digits = hexadecimal.as_bytes();
    if digits.len() != 32 {
        return None;
    }
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    digits.chunks_exact(2).map(byte).collect::<Option<Vec<u8>>>()
}
