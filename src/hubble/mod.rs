//! Hubble's API: flows in the form that Hubble's own clients read.
//!
//! ```text
//! flow::Recorder (raw) -> filter on the record -> flow::Names -> convert -> filter on the flow -> mask -> client
//! ```
//!
//! `proto` is the wire, made from `proto/` by `build.rs`. `weir observe`, the agent's socket, the relay, the page and
//! the exporters all speak `proto::flow::Flow`.

pub mod args;
pub mod ask;
pub mod certs;
pub mod client;
pub mod convert;
pub mod events;
pub mod export;
pub mod filter;
pub mod json;
pub mod mask;
pub mod metrics;
pub mod page;
pub mod proto;
mod request;
pub mod serve;
pub mod service;
pub mod stream;
pub mod suggest;
pub mod text;
pub mod tls;
pub mod view;

#[cfg(test)]
pub(crate) mod tests;
