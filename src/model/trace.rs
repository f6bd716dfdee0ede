//! Where a connection to a service would go, and why: what `weir service trace` shows.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::{FrontendKind, ObjectKey, Protocol, Scope};

/// Who asks for a service, and for which.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceQuestion {
    /// The client: a pod as `namespace/name`, an address, `node` or `world`.
    pub client: String,
    /// The service: `namespace/name`, or one of its addresses.
    pub service: String,
    /// The port, by number or name; none: the Service's only one.
    pub port: Option<String>,
    /// The port's protocol, where a number has several.
    pub protocol: Option<Protocol>,
}

/// Where a new connection of this client goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceTrace {
    /// Who asks.
    pub scope: Scope,
    /// `address:port/protocol`.
    pub frontend: String,
    /// What gives the service this address.
    pub kind: FrontendKind,
    /// The service.
    pub service: ObjectKey,
    /// What happens, in one sentence.
    pub verdict: String,
    /// What decided, one after the other.
    pub facts: Vec<String>,
    /// Every backend of the port.
    pub backends: Vec<TracedBackend>,
}

/// A backend, and what became of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TracedBackend {
    /// Address and port.
    pub address: SocketAddr,
    /// The node that it is on.
    pub node: Option<String>,
    /// The zone that it is in.
    pub zone: Option<String>,
    /// A new connection may go there.
    pub is_chosen: bool,
    /// Why, or why not.
    pub why: String,
}
