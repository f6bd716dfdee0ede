//! Frontends: the addresses and ports of services, and the backends that they lead to.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::{Deserialize, Serialize, Serializer};

use super::{ObjectKey, Protocol};

/// Whose packets a frontend is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Of pods and of the node's own sockets.
    #[default]
    Internal,
    /// From the network.
    External,
}

/// The address, port and protocol of a service, and who asks. Shown as `address:port/protocol`, with
/// `/external` for packets from the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrontendKey {
    /// A cluster IP, a node's address, a load balancer's or an external one.
    pub address: IpAddr,
    /// 0 with protocol `None`: every other port of the address, refused.
    pub port: u16,
    /// `None` only for the wildcard row.
    pub protocol: Option<Protocol>,
    /// Where the address leads depends on who asks. Without an external row the network has no access.
    pub scope: Scope,
}

impl FrontendKey {
    /// A port, asked by `scope`.
    pub fn new(address: IpAddr, port: u16, protocol: Protocol, scope: Scope) -> Self {
        Self { address, port, protocol: Some(protocol), scope }
    }

    /// The wildcard row of a Service's address: it has one at each of its addresses.
    pub fn rest_of(address: IpAddr) -> Self {
        Self { address, port: 0, protocol: None, scope: Scope::Internal }
    }
}

impl fmt::Display for FrontendKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let address = SocketAddr::new(self.address, self.port);
        match self.protocol {
            Some(protocol) => write!(f, "{address}/{protocol}"),
            None => write!(f, "{address}/any"),
        }?;
        match self.scope {
            Scope::Internal => Ok(()),
            Scope::External => f.write_str("/external"),
        }
    }
}

/// As a string: a key of a JSON object.
impl Serialize for FrontendKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// What gives a service its address. Where two kinds want one address and port, the first of the list has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum FrontendKind {
    /// `spec.clusterIPs`.
    #[default]
    #[serde(rename = "ClusterIP")]
    ClusterIp,
    /// `spec.ports[].nodePort` at a node's address.
    NodePort,
    /// `status.loadBalancer.ingress`.
    LoadBalancer,
    /// `spec.externalIPs`.
    #[serde(rename = "ExternalIP")]
    ExternalIp,
    /// A container's `hostPort` at an address of this node.
    HostPort,
    /// An address that a CiliumLocalRedirectPolicy leads to pods of this node.
    LocalRedirect,
}

impl fmt::Display for FrontendKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ClusterIp => "ClusterIP",
            Self::NodePort => "NodePort",
            Self::LoadBalancer => "LoadBalancer",
            Self::ExternalIp => "ExternalIP",
            Self::LocalRedirect => "LocalRedirect",
            Self::HostPort => "HostPort",
        })
    }
}

/// How a new connection gets its backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Algorithm {
    /// Each connection gets any of them.
    #[default]
    Random,
    /// By a table that is the same on every node: one connection gets one backend wherever it arrives.
    Maglev,
}

impl FromStr for Algorithm {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "random" => Ok(Self::Random),
            "maglev" => Ok(Self::Maglev),
            other => Err(format!("{other:?} is not random or maglev")),
        }
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Random => "random",
            Self::Maglev => "maglev",
        })
    }
}

/// How a packet from the network reaches a backend of another node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Forwarding {
    /// With this node's address as its source: the answers come back here.
    #[default]
    Snat,
    /// With the client's address as its source: the backend's node answers the client itself.
    Dsr,
}

impl FromStr for Forwarding {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "snat" => Ok(Self::Snat),
            "dsr" => Ok(Self::Dsr),
            other => Err(format!("{other:?} is not snat or dsr")),
        }
    }
}

impl fmt::Display for Forwarding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Snat => "snat",
            Self::Dsr => "dsr",
        })
    }
}

/// Where a frontend leads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Frontend {
    /// The Service, or the pod whose host port it is.
    pub service: Arc<ObjectKey>,
    /// What gives it the address.
    pub kind: FrontendKind,
    /// How a new connection gets its backend.
    pub algorithm: Algorithm,
    /// One client gets one backend, until it was silent for so many seconds.
    pub affinity: Option<u32>,
    /// How packets from the network reach a backend of another node.
    pub forwarding: Forwarding,
    /// The backends are of this node and see the client's address; without one, packets that other nodes
    /// could serve are dropped.
    pub keeps_source: bool,
    /// There are backends that this frontend may not use. Where it has none, packets are dropped and not refused:
    /// another node serves them.
    pub has_others: bool,
    /// Only these clients from the network are served; empty: all.
    pub source_ranges: Arc<[IpNet]>,
    /// What new connections may choose, sorted by address (programs search them by halves), without doubles.
    /// None: refused at once.
    pub backends: Arc<[Backend]>,
    /// Backends that end and get no new connections, sorted: running ones live on.
    pub draining: Arc<[SocketAddr]>,
}

impl Frontend {
    /// A frontend that refuses everything, for `..` in those that do not.
    pub fn refusing(service: Arc<ObjectKey>, kind: FrontendKind) -> Self {
        Self {
            service,
            kind,
            algorithm: Algorithm::Random,
            affinity: None,
            forwarding: Forwarding::Snat,
            keeps_source: false,
            has_others: false,
            source_ranges: Arc::default(),
            backends: Arc::default(),
            draining: Arc::default(),
        }
    }

    /// The addresses of what new connections may choose, in order.
    pub fn addresses(&self) -> impl Iterator<Item = SocketAddr> + '_ {
        self.backends.iter().map(|backend| backend.address)
    }
}

/// A backend that new connections may choose.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Backend {
    /// Address and port.
    pub address: SocketAddr,
    /// Its share under Maglev; 1 for all alike, 0 for none.
    pub weight: u16,
    /// It ends, and is chosen because no other is left.
    pub is_terminating: bool,
    /// The zone that it is in.
    pub zone: Option<Arc<str>>,
    /// The node that it is on.
    pub node: Option<Arc<str>>,
}

impl Backend {
    /// One that is as good as every other.
    pub fn at(address: SocketAddr) -> Self {
        Self { address, weight: 1, is_terminating: false, zone: None, node: None }
    }
}
