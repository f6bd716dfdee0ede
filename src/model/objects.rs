//! Pods, namespaces, nodes, services and their backends.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{Labels, NodeKey};

/// Namespace and name of a namespaced object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ObjectKey {
    /// `metadata.namespace`.
    pub namespace: Arc<str>,
    /// `metadata.name`.
    pub name: Arc<str>,
}

impl ObjectKey {
    /// The key `namespace/name`.
    pub fn new(namespace: impl Into<Arc<str>>, name: impl Into<Arc<str>>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// An L4 protocol by its IP protocol number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// 6
    Tcp,
    /// 17
    Udp,
    /// 132
    Sctp,
}

impl Protocol {
    /// The number in the IP header.
    pub fn number(self) -> u8 {
        match self {
            Protocol::Tcp => 6,
            Protocol::Udp => 17,
            Protocol::Sctp => 132,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
            Protocol::Sctp => "SCTP",
        })
    }
}

/// What annotations of policies, namespaces and pods ask for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub struct Marks {
    /// `weir.dev/audit: "true"`: what is denied is let through and reported.
    pub audit: bool,
    /// `weir.dev/deny-response`: a pod is told what it may not send (`reject`), or not (`drop`).
    pub reject: Option<bool>,
    /// `kubernetes.io/egress-bandwidth` of a pod, in bytes a second.
    pub egress_bandwidth: Option<u64>,
    /// `kubernetes.io/ingress-bandwidth` of a pod, in bytes a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ingress_bandwidth: Option<u64>,
    /// `bandwidth.cilium.io/priority` of a pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub priority: Option<Priority>,
    /// `weir.dev/visibility`: requests of these protocols are shown.
    #[serde(skip_serializing_if = "Visibility::is_none")]
    pub visibility: Visibility,
}

/// Which of a node's pods goes first where packets queue on their way out of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum Priority {
    /// After all others.
    BestEffort,
    /// As pods without the annotation.
    Burstable,
    /// Before all others.
    Guaranteed,
}

impl Priority {
    /// As the annotation says it; Cilium's documents and Kubernetes' names of classes differ in the first letter.
    pub fn read(text: &str) -> Option<Self> {
        match text {
            "guaranteed" | "Guaranteed" => Some(Self::Guaranteed),
            "burstable" | "Burstable" => Some(Self::Burstable),
            "bestEffort" | "BestEffort" | "best-effort" => Some(Self::BestEffort),
            _ => None,
        }
    }

    /// As `skb->priority`: the first, second and third band of the kernel's queues that have three.
    pub fn of_packets(self) -> u8 {
        match self {
            Self::Guaranteed => 6,
            Self::Burstable => 8,
            Self::BestEffort => 5,
        }
    }
}

/// Protocols whose requests are shown, and none denied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Visibility {
    /// HTTP and gRPC.
    pub http: bool,
    /// DNS.
    pub dns: bool,
    /// Kafka.
    pub kafka: bool,
}

impl Visibility {
    /// Nothing is shown.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// Names of protocols with commas between; `None`: one of them is none.
    pub fn read(text: &str) -> Option<Self> {
        let mut read = Self::default();
        for name in text.split(',').map(str::trim).filter(|name| !name.is_empty()) {
            match name {
                "http" => read.http = true,
                "dns" => read.dns = true,
                "kafka" => read.kafka = true,
                _ => return None,
            }
        }
        Some(read)
    }

    /// What either shows.
    pub fn or(self, other: Self) -> Self {
        Self { http: self.http || other.http, dns: self.dns || other.dns, kafka: self.kafka || other.kafka }
    }
}

impl Marks {
    /// Nothing is asked for.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// A namespace and the labels that selectors ask for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Namespace {
    /// `metadata.labels`.
    pub labels: Labels,
    /// The labels cannot be read.
    pub is_partial: bool,
    /// It is being deleted: its pods end after its policies are gone.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub is_leaving: bool,
    /// What its annotations ask for, for all its pods.
    #[serde(skip_serializing_if = "Marks::is_none")]
    pub marks: Marks,
}

/// A pod, as far as networking cares.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Pod {
    /// Namespace and name.
    pub key: ObjectKey,
    /// `metadata.uid`; empty in manifests that have none.
    pub uid: String,
    /// `metadata.labels`.
    pub labels: Labels,
    /// `spec.serviceAccountName`, `default` when absent.
    pub service_account: String,
    /// `spec.nodeName`.
    pub node: Option<String>,
    /// `spec.hostNetwork`.
    pub host_network: bool,
    /// Succeeded or Failed: its address may already be another's.
    pub is_terminal: bool,
    /// The condition Ready; true in manifests that have none.
    pub is_ready: bool,
    /// Named container ports. The same name may stand for one number per protocol.
    pub named_ports: BTreeMap<String, Vec<NamedPort>>,
    /// What its annotations ask for.
    #[serde(skip_serializing_if = "Marks::is_none")]
    pub marks: Marks,
    /// By `metadata.ownerReferences`; `None`: it stands for itself.
    pub workload: Option<Workload>,
}

/// What made a pod: its controller, or for a ReplicaSet of a Deployment and a Job of a CronJob the one above.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Workload {
    /// As `Deployment`.
    pub kind: Arc<str>,
    /// Its name; its namespace is the pod's.
    pub name: Arc<str>,
}

impl Workload {
    /// From `Deployment/web`.
    pub fn parse(text: &str) -> Option<Self> {
        let (kind, name) =
            text.split_once('/').filter(|(kind, name)| !kind.is_empty() && !name.is_empty())?;
        Some(Self { kind: kind.into(), name: name.into() })
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.kind, self.name)
    }
}

/// What a port name stands for in one pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct NamedPort {
    /// `protocol`, TCP when absent.
    pub protocol: Protocol,
    /// `containerPort`.
    pub port: u16,
}

/// A node of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// `metadata.name`.
    pub name: String,
    /// `metadata.labels`.
    pub labels: Labels,
    /// `status.addresses` of type InternalIP, at most one of each family is used.
    pub addresses: Vec<IpAddr>,
    /// `spec.podCIDRs`.
    pub pod_cidrs: Vec<IpNet>,
    /// It is being deleted, or an autoscaler takes it away: load balancers are to leave it.
    #[serde(default)]
    pub is_leaving: bool,
    /// Its condition Ready is there and is not True.
    #[serde(default)]
    pub is_unready: bool,
}

/// cilium.io/v2 CiliumCIDRGroup: prefixes that policies name together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CidrGroup {
    /// `metadata.labels`, by which policies select groups.
    pub labels: Labels,
    /// `spec.externalCIDRs`.
    pub cidrs: Vec<IpNet>,
    /// Some of it could not be read: whoever takes away by this group takes away everything.
    pub is_partial: bool,
}

/// What the operator gave to a node, and the key that the node has published.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Allocation {
    /// `spec.podCIDRs` of its WeirNode.
    pub pod_cidrs: Vec<IpNet>,
    /// `status.encryption` of its WeirNode.
    pub key: Option<NodeKey>,
}
