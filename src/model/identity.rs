//! Identities: sets of labels with a number.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::{NamedPort, ObjectKey, PortMapping, Workload};

/// Label keys and values.
pub type Labels = BTreeMap<String, String>;

/// The number of an identity: reserved below 256, the cluster's up to 2^24 - 1,
/// this node's own (prefixes, pods covered by prefixes) from 2^24.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct IdentityId(pub u32);

impl IdentityId {
    /// Not known.
    pub const UNKNOWN: Self = Self(0);
    /// This node.
    pub const HOST: Self = Self(1);
    /// Everything outside the cluster.
    pub const WORLD: Self = Self(2);
    /// An address of the pod network that no pod is known to have.
    pub const UNMANAGED: Self = Self(3);
    /// Another node of the cluster.
    pub const REMOTE_NODE: Self = Self(6);
    /// The first number that a cluster identity may have.
    pub const FIRST_CLUSTER: Self = Self(256);
    /// The last number that fits the tunnel header.
    pub const LAST_CLUSTER: Self = Self(0xff_ffff);
    /// The first number of this node's own.
    pub const FIRST_LOCAL: Self = Self(0x100_0000);

    /// True for numbers that mean the same on every node without an object.
    pub fn is_reserved(self) -> bool {
        self.0 < Self::FIRST_CLUSTER.0
    }

    /// True for numbers that mean something on this node only.
    pub fn is_local(self) -> bool {
        self.0 >= Self::FIRST_LOCAL.0
    }
}

impl fmt::Display for IdentityId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Everything of a pod that policy can ask for. Equal sets share one identity.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct IdentityLabels {
    /// The pod's namespace.
    pub namespace: String,
    /// The namespace's labels.
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub namespace_labels: Labels,
    /// The pod's service account.
    pub service_account: String,
    /// The pod's labels less those that differ in every pod.
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub pod_labels: Labels,
    /// Named ports: part of the identity, so that a rule on a port name is exact for every peer.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub named_ports: BTreeMap<String, Vec<NamedPort>>,
}

/// The key by which Cilium's selectors ask for the service account.
pub const SERVICE_ACCOUNT_KEY: &str = "io.cilium.k8s.policy.serviceaccount";

impl IdentityLabels {
    /// What a selector of pods sees under `key`. Keys of Cilium's own are never the pod's to set.
    pub fn pod_label(&self, key: &str) -> Option<&str> {
        match key {
            SERVICE_ACCOUNT_KEY => Some(&self.service_account),
            _ => self.pod_labels.get(key).map(String::as_str),
        }
    }
}

/// The pods of one node, packed into one object (K8).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NodeEndpoints {
    /// The node that hosts them and alone may write them.
    pub node: String,
    /// The node's own addresses in the pod network (the gateway side), at most one per family.
    pub internal_addresses: Vec<IpAddr>,
    /// Its pods.
    pub endpoints: Vec<PublishedEndpoint>,
}

/// A pod as other nodes see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PublishedEndpoint {
    /// Namespace and name.
    pub pod: ObjectKey,
    /// One address per family.
    pub addresses: Vec<IpAddr>,
    /// The identity that its node claimed for it.
    pub identity: IdentityId,
    /// What made the pod; for flows alone.
    pub workload: Option<Workload>,
    /// Ports of its node that lead to it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub host_ports: Vec<PortMapping>,
}
