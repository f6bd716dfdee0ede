//! HTTP/1.0 and HTTP/1.1, filtered and not terminated: the proxy reads heads, asks the rules, and lets the bytes
//! go on as they came.
//!
//! ```text
//! client -> up: Buffer   -> head, body -> judge -> server
//! client <- down: Buffer <- answer     <------------+
//! ```

mod answer;
mod body;
mod buffer;
mod head;
mod judge;
mod relay;

pub use judge::{Denied, Grants, ask};
pub use relay::{Outcome, Relay, close};
