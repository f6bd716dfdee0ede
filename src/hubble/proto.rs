//! The messages and services of `proto/`.

/// Flows, filters and the agent's events.
#[allow(missing_docs, clippy::all, clippy::unwrap_used)]
pub mod flow {
    tonic::include_proto!("flow");
}

/// Asking for flows.
#[allow(missing_docs, clippy::all, clippy::unwrap_used)]
pub mod observer {
    tonic::include_proto!("observer");
}

/// Which nodes there are.
#[allow(missing_docs, clippy::all, clippy::unwrap_used)]
pub mod peer {
    tonic::include_proto!("peer");
}

/// How the nodes behind a relay are.
#[allow(missing_docs, clippy::all, clippy::unwrap_used)]
pub mod relay {
    tonic::include_proto!("relay");
}

/// What a collector of OpenTelemetry takes.
#[allow(missing_docs, clippy::all, clippy::unwrap_used)]
pub mod otlp {
    tonic::include_proto!("opentelemetry.proto.collector.logs.v1");
}

use jiff::Timestamp;

/// The descriptors of every message, for JSON and for reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/hubble.fds"));

/// A time on the wire.
pub fn timestamp(time: Timestamp) -> prost_types::Timestamp {
    prost_types::Timestamp { seconds: time.as_second(), nanos: time.subsec_nanosecond() }.normalized()
}

/// A time from the wire; `None` where no such time can be.
pub fn time(wire: &prost_types::Timestamp) -> Option<Timestamp> {
    Timestamp::new(wire.seconds, wire.nanos).ok()
}

trait Normalized {
    fn normalized(self) -> Self;
}

impl Normalized for prost_types::Timestamp {
    /// The wire wants nanoseconds that count forward, also before 1970.
    fn normalized(mut self) -> Self {
        self.normalize();
        self
    }
}
