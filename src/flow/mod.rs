//! Flows: who talked to whom, what became of it, and why.
//!
//! ```text
//! events (BPF ring buffer) -> reader -> Recorder (raw, 128 bytes each, bounded)
//!                                          |  on read only
//!                             Query filters on the raw record -> Names -> filters on names -> Stream
//! ```
//!
//! Nothing is named, allocated or formatted while events arrive; that happens when
//! somebody reads, and only for what passes the filters. Every event is accounted
//! for: seen, lost in the kernel, or missed by a reader that was too slow.

mod args;
mod clock;
mod filter;
mod label;
mod names;
mod query;
pub mod reader;
mod reason;
mod record;
mod recorder;
mod stream;
mod text;

/// A record of the kernel, as it stands in abi.h.
pub use crate::datapath::abi::Event;
pub(crate) use crate::datapath::abi::ip_of;
pub use args::FlowArgs;
pub use clock::{Clock, monotonic_ns};
pub use label::LabelPattern;
pub use names::{NameSource, NameTables, Names, reserved_identity, reserved_name};
pub use query::{Exclusion, Filter, IdentityPattern, NamePattern, Query};
pub use reason::DropReason;
pub use record::{
    Counts, Direction, EventType, Flow, FlowService, Icmp, L4Protocol, Party, TcpFlags, Verdict,
};
pub use recorder::{Record, Recorder, RecorderCounts};
pub use stream::{Item, Lost, LostSource, Stream};
pub use text::{Colours, compact, escape, icmp_text, identity};

#[cfg(test)]
pub(crate) mod tests;
