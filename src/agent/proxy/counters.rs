//! What the proxy did and has, for the metrics.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;

use crate::model::l7::{L7Message, L7Verdict, ProxyState, Record, RecordKind};
use crate::telemetry::Telemetry;

/// A kind of request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    protocol: &'static str,
    verdict: &'static str,
}

/// Counted from when the agent started.
#[derive(Debug, Default)]
pub struct Counters {
    requests: Family<Labels, Counter>,
    records_lost: Counter,
    connections: Gauge,
    resident_bytes: Gauge,
    refused: Counter,
}

impl Counters {
    /// Lets the metrics read them.
    pub fn show_to(&self, telemetry: &Telemetry) {
        telemetry.register_with(|registry| {
            registry.register(
                "proxy_requests",
                "Requests that the proxy judged, by protocol and verdict",
                self.requests.clone(),
            );
            registry.register(
                "proxy_records_lost",
                "Requests and answers of which there is no record",
                self.records_lost.clone(),
            );
            registry.register(
                "proxy_connections",
                "Connections and flows of DNS in the proxy's hands",
                self.connections.clone(),
            );
            registry.register(
                "proxy_connections_refused",
                "Connections that the proxy refused because there were too many",
                self.refused.clone(),
            );
            registry.register(
                "proxy_resident_bytes",
                "Memory of the proxy's process",
                self.resident_bytes.clone(),
            );
        });
    }

    /// Counts what was seen.
    pub fn seen(&self, records: &[Record], lost: u64) {
        self.records_lost.inc_by(lost);
        for record in records.iter().filter(|record| record.kind == RecordKind::Request) {
            let labels = Labels { protocol: protocol(&record.message), verdict: verdict(record.verdict) };
            self.requests.get_or_create(&labels).inc();
        }
    }

    /// Notes how the proxy is.
    pub fn state(&self, state: &ProxyState) {
        self.connections.set(i64::try_from(state.connections).unwrap_or(i64::MAX));
        self.resident_bytes.set(i64::try_from(state.resident_bytes).unwrap_or(i64::MAX));
        self.refused.inc_by(state.refused);
    }
}

fn protocol(message: &L7Message) -> &'static str {
    match message {
        L7Message::Http(_) => "http",
        L7Message::Dns(_) => "dns",
        L7Message::Kafka(_) => "kafka",
        L7Message::Tls { .. } => "tls",
        L7Message::Unknown => "unknown",
    }
}

fn verdict(verdict: L7Verdict) -> &'static str {
    match verdict {
        L7Verdict::Forwarded => "forwarded",
        L7Verdict::Denied => "denied",
        L7Verdict::Error => "error",
    }
}
