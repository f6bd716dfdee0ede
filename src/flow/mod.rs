//! Flows: who talked to whom, what became of it, and why.
//!
//! ```text
//! events (BPF ring buffer) -> reader -> Recorder (raw, 128 bytes each, bounded)
//!                                          |  on read only
//!                                        Names -> Flow, which hubble::convert writes for clients
//! ```
//!
//! Nothing is named, allocated or formatted while events arrive; that happens when
//! somebody reads, and only for what passes the filters. Every event is accounted
//! for: seen, lost in the kernel, or missed by a reader that was too slow.

mod args;
mod clock;
pub mod disk;
mod label;
mod names;
pub mod reader;
mod reason;
mod record;
mod recorder;
mod request;
mod round_trip;
mod text;

/// A record of the kernel, as it stands in abi.h.
pub use crate::datapath::abi::Event;
pub(crate) use crate::datapath::abi::ip_of;
pub use args::FlowArgs;
pub use clock::{Clock, monotonic_ns};
pub use label::LabelPattern;
pub use names::{NameSource, NameTables, Names, reserved_identity, reserved_name};
pub use reason::DropReason;
pub use record::{
    Counts, Direction, EventType, Flow, FlowService, Icmp, L4Protocol, Party, TcpFlags, Verdict,
};
pub use recorder::{Cursor, Record, Recorder, RecorderCounts, Skipped};
pub use request::Redact;
pub use round_trip::decode as round_trip;
pub use text::{Colours, escape, icmp_text};

#[cfg(test)]
pub(crate) mod tests;
