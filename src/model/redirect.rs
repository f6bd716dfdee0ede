//! Services whose packets go to pods of the same node.

use serde::Serialize;

use super::{ObjectKey, Protocol, Selector};

/// What is for the cluster IPs of a Service goes to pods of the client's node, where some are ready.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LocalRedirect {
    /// Of the policy.
    pub key: ObjectKey,
    /// The Service, of the same namespace.
    pub service: ObjectKey,
    /// Its ports that are redirected; none: all.
    pub service_ports: Vec<RedirectPort>,
    /// The pods, of the same namespace.
    pub selector: Selector,
    /// Their ports: one, or by the names of the Service's.
    pub ports: Vec<RedirectPort>,
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
