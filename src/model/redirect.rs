//! Services whose packets go to pods of the same node.

use std::net::IpAddr;

use serde::Serialize;

use super::{ObjectKey, Protocol, Selector};

/// What is for the cluster IPs of a Service, or for one address, goes to pods of the client's node, where some
/// are ready.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LocalRedirect {
    /// Of the policy.
    pub key: ObjectKey,
    /// What is redirected.
    pub from: RedirectFrom,
    /// Its ports that are redirected; none: all of a Service's.
    pub from_ports: Vec<RedirectPort>,
    /// The pods, of the same namespace.
    pub selector: Selector,
    /// Their ports: one, or by the names of those that are redirected.
    pub ports: Vec<RedirectPort>,
}

/// What a redirection is of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum RedirectFrom {
    /// A Service of the same namespace.
    Service(ObjectKey),
    /// An address, whosever it is.
    Address(IpAddr),
}

/// A port of a redirection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RedirectPort {
    /// Empty where it has none.
    pub name: String,
    /// Its number.
    pub port: u16,
    /// TCP when absent.
    pub protocol: Protocol,
}
