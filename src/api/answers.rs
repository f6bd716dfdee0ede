//! What the agent answers to the command line's questions.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::datapath::{MapFill, Usage};
use crate::flow::RecorderCounts;
use crate::model::{
    Algorithm, EndpointId, Forwarding, FrontendKind, IdentityId, ObjectKey, PeerState, PolicyRef, PublicKey,
    Scope,
};
use crate::telemetry::{ObjectCounts, PartRow};

/// How the agent is: the answer to `Status`.
///
/// What an agent of another version does not say is as if it were empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StatusAnswer {
    /// The agent's version.
    pub version: String,
    /// The node that it serves.
    pub node: String,
    /// The kernel's release.
    pub kernel: String,
    /// For how long it has run.
    pub uptime_seconds: u64,
    /// What it waits for before it is ready; empty: it is.
    pub pending: Vec<String>,
    /// How each part of it is, of which some write to the kernel.
    pub parts: Vec<PartRow>,
    /// Where its objects come from: `kubernetes`, or the manifest directory.
    pub source: String,
    /// Every kind of object.
    pub kinds: Vec<KindRow>,
    /// Documents and objects that are not as they should be.
    pub broken: Vec<BrokenRow>,
    /// Ways that were taken, by what this kernel can.
    pub features: Vec<FeatureRow>,
    /// How many of everything.
    pub objects: ObjectCounts,
    /// Pods whose policy is not in force yet, and why.
    pub waiting: Vec<WaitingRow>,
    /// Services for whose addresses nodes answer on the link.
    #[serde(default)]
    pub announced: Vec<AnnouncedRow>,
    /// Every map.
    pub maps: Vec<MapFill>,
    /// What became of the flow records.
    pub flows: RecorderCounts,
    /// Packets dropped, for any reason, since the maps were made.
    pub dropped_packets: u64,
}

impl StatusAnswer {
    /// True when everything is in force that was there when the agent started.
    pub fn is_ready(&self) -> bool {
        self.pending.is_empty()
    }

    /// The part that has failed longest, if any fails for longer than a retry takes.
    pub fn fault(&self) -> Option<&PartRow> {
        self.parts.iter().filter(|part| part.is_fault()).max_by_key(|part| part.failing_seconds)
    }

    /// The way that was taken for a feature.
    pub fn feature(&self, name: &str) -> Option<&str> {
        self.features.iter().find(|feature| feature.name == name).map(|feature| feature.value.as_str())
    }
}

/// Encryption on this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EncryptionAnswer {
    /// What encrypts; none: encryption is off.
    pub device: Option<EncryptionDevice>,
    /// Nothing goes to nodes without a key, and nothing is taken from them in plain.
    pub is_strict: bool,
    /// The other nodes, by name.
    pub peers: Vec<EncryptionPeerRow>,
    /// Why the peers' states are not known.
    pub error: Option<String>,
}

/// The device that encrypts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EncryptionDevice {
    /// Its name.
    pub name: String,
    /// Who encrypts, and why.
    pub kind: String,
    /// Its MTU.
    pub mtu: u32,
    /// The process that encrypts, where the kernel does not.
    pub pid: Option<u32>,
    /// The public half of this node's key.
    pub public_key: PublicKey,
    /// UDP port.
    pub port: u16,
    /// Which of the node's keys it is.
    pub generation: u32,
    /// What a change of keys waits for; none: there is none.
    pub change: Option<String>,
}

/// Another node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EncryptionPeerRow {
    /// Its name.
    pub node: String,
    /// The key that it has published.
    pub public_key: Option<PublicKey>,
    /// How the device has it.
    pub state: Option<PeerState>,
}

/// The source of one kind of objects.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KindRow {
    /// Which kind.
    pub kind: String,
    /// How many there are.
    pub objects: u64,
    /// The first full list has come.
    pub is_synced: bool,
    /// The source answers; when it does not, what it last said stands.
    pub is_connected: bool,
    /// Seconds since it last said anything.
    pub silent_seconds: Option<u64>,
    /// How often it could not be read.
    pub errors_total: u64,
}

/// A document or object that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BrokenRow {
    /// The file, or `kubernetes`.
    pub source: String,
    /// The document's number in the file, from 1.
    pub document: Option<usize>,
    /// The line where it begins.
    pub line: Option<usize>,
    /// The object, where that much could be read.
    pub object: Option<String>,
    /// What is wrong, and what was done about it.
    pub reason: String,
}

/// Something that depends on the kernel or the settings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FeatureRow {
    /// What.
    pub name: String,
    /// The way that was taken.
    pub value: String,
}

/// A pod whose policy is not in force yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitingRow {
    /// Its number.
    pub endpoint: EndpointId,
    /// Why not.
    pub reason: String,
}

/// A pod of this node: a row of the answer to `Endpoints`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointRow {
    /// Its number.
    pub id: EndpointId,
    /// Namespace and name.
    pub pod: ObjectKey,
    /// Its IPv4 address.
    pub ipv4: Option<Ipv4Addr>,
    /// Its IPv6 address.
    pub ipv6: Option<Ipv6Addr>,
    /// Its identity, once claimed.
    pub identity: Option<IdentityId>,
    /// The identity's labels.
    pub labels: Vec<String>,
    /// The compiled policy; 0: none.
    pub policy_id: u32,
    /// What comes in is judged.
    pub enforces_ingress: bool,
    /// What goes out is judged.
    pub enforces_egress: bool,
    /// The policies that select it.
    pub policies: Vec<PolicyRef>,
    /// Its policy is in force and its programs are attached.
    pub is_enforced: bool,
    /// Why not.
    pub waiting_for: Option<String>,
    /// The host side of its link.
    pub host_interface: String,
    /// Its index.
    pub host_ifindex: u32,
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// What it has of what all pods share.
    #[serde(default)]
    pub usage: Usage,
}

/// An identity that this node knows: a row of the answer to `Identities`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdentityRow {
    /// Its number.
    pub id: IdentityId,
    /// Its labels, each with its source.
    pub labels: Vec<String>,
    /// Known addresses that have it.
    pub addresses: Vec<IpAddr>,
}

/// A policy: a row of the answer to `Policies`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyRow {
    /// Kind, namespace and name.
    pub policy: PolicyRef,
    /// Which policies it is weighed with.
    pub tier: String,
    /// Rules for what comes in; `None`: it does not judge that.
    pub ingress_rules: Option<usize>,
    /// Rules for what goes out; `None`: it does not judge that.
    pub egress_rules: Option<usize>,
    /// What of it goes beyond addresses and ports: protocols whose requests a proxy judges, `names` of DNS.
    #[serde(default)]
    pub layer7: Vec<String>,
    /// Pods of this node that it selects.
    pub endpoints: Vec<EndpointId>,
    /// What could not be read of it, and is closed.
    #[serde(default)]
    pub doubts: Vec<String>,
}

/// A node of the cluster: a row of the answer to `Nodes`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRow {
    /// Its name.
    pub node: String,
    /// Its InternalIPs.
    pub addresses: Vec<IpAddr>,
    /// Where its pods' addresses come from.
    pub pod_cidrs: Vec<ipnet::IpNet>,
    /// Pods that it has published; for this node its endpoints.
    pub pods: usize,
    /// `this node`, `tunnel` or `route`.
    pub way: String,
}

/// A frontend of a Service: a row of the answer to `Services`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceRow {
    /// Namespace and name; of the pod, if it is a host port.
    pub service: ObjectKey,
    /// What gives the service this address.
    #[serde(default)]
    pub kind: FrontendKind,
    /// Who asks: pods and nodes, or the network.
    #[serde(default)]
    pub scope: Scope,
    /// A cluster IP, a node's address, a load balancer's or an external one.
    pub address: IpAddr,
    /// The frontend's port.
    pub port: u16,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: String,
    /// How a backend is chosen.
    #[serde(default)]
    pub algorithm: Algorithm,
    /// How backends of other nodes are reached from the network.
    #[serde(default)]
    pub forwarding: Forwarding,
    /// A client keeps its backend until it was silent for so many seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity_seconds: Option<u32>,
    /// Clients that are let in; none: all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub source_ranges: Vec<IpNet>,
    /// Backends that new connections may choose; none: connections are refused.
    pub backends: Vec<SocketAddr>,
    /// Where they are, in the same order.
    #[serde(default)]
    pub places: Vec<BackendPlace>,
    /// Backends that keep their connections and get no new ones.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub draining: Vec<SocketAddr>,
    /// Without backends packets are dropped, because other nodes have some.
    #[serde(default)]
    pub has_others: bool,
    /// The node that answers ARP and neighbour discovery for the address, where nodes do; empty: none yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leader: Option<String>,
}

/// A Service for whose addresses one node answers on the link.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnnouncedRow {
    /// Namespace and name.
    pub service: ObjectKey,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// The node; empty: none yet.
    pub node: String,
    /// The devices by which this node answers, if it is the one.
    pub devices: Vec<String>,
}

/// Where a backend is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendPlace {
    /// Its node.
    pub node: Option<String>,
    /// Its zone.
    pub zone: Option<String>,
    /// It ends, and serves because no other is left.
    pub is_terminating: bool,
    /// Its share under Maglev.
    pub weight: u16,
}

/// What DNS told a pod of this node: the answer to `Names`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NameRow {
    /// The name that it asked for.
    pub name: String,
    /// The pod's number.
    pub endpoint: EndpointId,
    /// The pod.
    pub pod: Option<ObjectKey>,
    /// Its policies that name it; none: the addresses are open to it only as far as others allow them.
    pub policies: Vec<PolicyRef>,
    /// The addresses.
    pub addresses: Vec<NameAddress>,
}

/// An address of a name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NameAddress {
    /// The address.
    pub address: IpAddr,
    /// For how long it counts; 0: as long as a connection runs to it.
    pub seconds_left: u64,
}
