//! Weir's own API types: what the agents and the operator tell one another through the API server.

use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, LabelSelector};
use kube::{CustomResource, CustomResourceExt, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::model::{IdentityLabels, PortMapping, PublishedEndpoint};

/// The version of the definitions below, raised by every change: an operator never replaces
/// definitions of a higher version.
pub const SCHEMA_VERSION: u32 = 8;
/// The annotation of a definition that holds its version.
pub const SCHEMA_VERSION_ANNOTATION: &str = "weir.dev/schema-version";
/// An IPv4 address, or what may be an IPv6 one: whoever reads it parses it.
const ADDRESS: &str = r"^([0-9]{1,3}(\.[0-9]{1,3}){3}|[0-9a-f:]*:[0-9a-f:.]*)$";
/// The same with the length of a prefix.
const CIDR: &str = r"^([0-9]{1,3}(\.[0-9]{1,3}){3}|[0-9a-f:]*:[0-9a-f:.]*)/[0-9]{1,3}$";

/// The annotation that marks an identity as unused; its value is since when.
pub const UNUSED_SINCE: &str = "weir.dev/unused-since";
/// The condition of a WeirNode that says whether the operator could give it pod CIDRs.
pub const POD_CIDRS_ALLOCATED: &str = "PodCIDRsAllocated";

/// The labels that an identity's number stands for. Claimed by creating the object,
/// whose name is the number, and never changed.
#[derive(Clone, Debug, PartialEq, Eq, CustomResource, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "weir.dev",
    version = "v1alpha1",
    kind = "Identity",
    doc = "The labels that an identity's number, which is its name, stands for.",
    plural = "identities",
    category = "weir",
    validation = Rule::new("self.metadata.name.matches('^[1-9][0-9]{2,7}$') && int(self.metadata.name) >= 256 && int(self.metadata.name) <= 16777215")
        .message("the name must be an identity's number, 256 to 16777215"),
    printcolumn = r#"{"name": "Namespace", "type": "string", "jsonPath": ".spec.namespace"}"#,
    printcolumn = r#"{"name": "Service Account", "type": "string", "jsonPath": ".spec.serviceAccount"}"#,
    printcolumn = r#"{"name": "Labels", "type": "string", "jsonPath": ".spec.podLabels"}"#,
    printcolumn = r#"{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}"#
)]
#[x_kube(validation = Rule::new("self == oldSelf").message("an identity never changes"))]
#[serde(rename_all = "camelCase")]
pub struct IdentitySpec {
    /// The pods' namespace.
    pub namespace: String,
    /// The namespace's labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub namespace_labels: BTreeMap<String, String>,
    /// The pods' service account.
    pub service_account: String,
    /// The pods' labels less those that differ in every pod.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub pod_labels: BTreeMap<String, String>,
    /// What the names of the pods' ports stand for.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub named_ports: BTreeMap<String, Vec<Port>>,
}

/// A port and its protocol.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Port {
    /// The container's port.
    #[schemars(range(min = 1, max = 65535))]
    pub port: u16,
    /// TCP, UDP or SCTP.
    #[schemars(regex(pattern = "^(TCP|UDP|SCTP)$"))]
    pub protocol: String,
}

/// The pods of a node: addresses and identities. A node has as many of these objects as
/// its pods need, named after it with a number, and writes no others.
#[derive(Clone, Debug, PartialEq, Eq, CustomResource, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "weir.dev",
    version = "v1alpha1",
    kind = "NodeEndpoints",
    doc = "Pods of a node: addresses and identities.",
    plural = "nodeendpoints",
    category = "weir",
    validation = Rule::new("self.metadata.name.matches('-[0-9]+$') && self.metadata.name.startsWith(self.spec.node + '-')")
        .message("the name must be the node's with a number"),
    printcolumn = r#"{"name": "Node", "type": "string", "jsonPath": ".spec.node"}"#,
    printcolumn = r#"{"name": "Internal Addresses", "type": "string", "jsonPath": ".spec.internalAddresses"}"#,
    printcolumn = r#"{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct NodeEndpointsSpec {
    /// The node that hosts the pods.
    #[schemars(length(max = 253))]
    pub node: String,
    /// The node's own addresses in the pod network.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(inner(regex(pattern = ADDRESS), length(max = 45)))]
    pub internal_addresses: Vec<String>,
    /// Its pods.
    #[serde(default)]
    pub endpoints: Vec<Endpoint>,
}

/// A pod as other nodes see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Endpoint {
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub name: String,
    /// One address per family.
    #[schemars(length(max = 2), inner(regex(pattern = ADDRESS), length(max = 45)))]
    pub addresses: Vec<String>,
    /// The name of its Identity.
    #[schemars(range(min = 256, max = 0xff_ffff))]
    pub identity: u32,
    /// What made the pod, as `Deployment/web`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 320))]
    pub workload: Option<String>,
    /// Ports of the node that lead to the pod.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 1024))]
    pub host_ports: Vec<HostPort>,
}

/// A port of a node that leads to a port of a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HostPort {
    /// The node's port.
    #[schemars(range(min = 1, max = 65535))]
    pub host_port: u16,
    /// The pod's port.
    #[schemars(range(min = 1, max = 65535))]
    pub container_port: u16,
    /// TCP, UDP or SCTP.
    #[schemars(regex(pattern = "^(TCP|UDP|SCTP)$"))]
    pub protocol: String,
    /// The address of the node that has it, the unspecified one for all of that family; none: all of them.
    #[serde(rename = "hostIP", default, skip_serializing_if = "Option::is_none")]
    #[schemars(inner(regex(pattern = ADDRESS), length(max = 45)))]
    pub host_ip: Option<String>,
}

/// A node as Weir has it, named like its Node: the operator says in `spec` what the node is to
/// have, the node's agent in `status` what it has.
#[derive(Clone, Debug, Default, PartialEq, Eq, CustomResource, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "weir.dev",
    version = "v1alpha1",
    kind = "WeirNode",
    doc = "A node as Weir has it: what the operator gave it, and how its agent is.",
    plural = "weirnodes",
    category = "weir",
    status = "WeirNodeStatus",
    derive = "PartialEq",
    printcolumn = r#"{"name": "Ready", "type": "boolean", "jsonPath": ".status.ready"}"#,
    printcolumn = r#"{"name": "Pod CIDRs", "type": "string", "jsonPath": ".status.podCIDRs"}"#,
    printcolumn = r#"{"name": "Addresses", "type": "string", "jsonPath": ".status.addresses"}"#,
    printcolumn = r#"{"name": "Tunnel", "type": "string", "jsonPath": ".status.tunnel.protocol", "priority": 1}"#,
    printcolumn = r#"{"name": "MTU", "type": "integer", "jsonPath": ".status.mtu", "priority": 1}"#,
    printcolumn = r#"{"name": "Version", "type": "string", "jsonPath": ".status.version"}"#,
    printcolumn = r#"{"name": "Message", "type": "string", "jsonPath": ".status.message"}"#,
    printcolumn = r#"{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}"#
)]
#[x_kube(validation = Rule::new("!has(self.podCIDRs) || size(self.podCIDRs) < 2 || self.podCIDRs[0].contains(':') != self.podCIDRs[1].contains(':')")
    .message("podCIDRs holds at most one of each family"))]
pub struct WeirNodeSpec {
    /// From the operator's pools; empty where the Node has its own.
    #[serde(default, rename = "podCIDRs", skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 2), inner(regex(pattern = CIDR), length(max = 43)))]
    pub pod_cidrs: Vec<String>,
}

/// What the agent of a node says of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct WeirNodeStatus {
    /// The node's addresses between the nodes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<String>,
    /// Where the addresses of its pods come from.
    #[serde(default, rename = "podCIDRs", skip_serializing_if = "Vec::is_empty")]
    pub pod_cidrs: Vec<String>,
    /// MTU of its pods' devices, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// How packets for other nodes travel; absent: by plain routes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tunnel: Option<Tunnel>,
    /// How packets for this node are encrypted; absent: they are not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encryption: Option<NodeEncryption>,
    /// The agent's version.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub version: String,
    /// Pods can be connected, and what is asked of the node is in force.
    #[serde(default)]
    pub ready: bool,
    /// What is awaited while the node is not ready.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// What the operator says of the node.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// Policies that this node cannot enforce: the pods that they select are closed here.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub closed_policies: Vec<ClosedPolicy>,
}

/// A policy that a node cannot enforce.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
pub struct ClosedPolicy {
    /// The object's kind.
    #[schemars(length(max = 64))]
    pub kind: String,
    /// Its namespace; absent: it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub namespace: Option<String>,
    /// Its name.
    #[schemars(length(max = 253))]
    pub name: String,
    /// Why not, and what to do.
    #[schemars(length(max = 1000))]
    pub reason: String,
}

/// The encryption of what goes to a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeEncryption {
    /// wireguard or ipsec.
    #[schemars(length(max = 16))]
    pub protocol: String,
    /// The public half of the node's key, in base64.
    #[schemars(regex(pattern = "^[A-Za-z0-9+/]{43}=$"))]
    pub public_key: String,
    /// Its UDP port; 0 with IPsec.
    #[schemars(range(max = 65535))]
    pub port: u16,
    /// Which of the node's keys it is: keys of one generation belong together.
    #[serde(default)]
    pub generation: u32,
    /// Stands for the other nodes' keys of this generation that the node receives by, in hexadecimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16))]
    pub receives: Option<String>,
    /// The next key or the former one, while keys change.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub other: Option<OtherKey>,
}

/// A key by which a node receives, too.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct OtherKey {
    /// The public half, in base64.
    #[schemars(regex(pattern = "^[A-Za-z0-9+/]{43}=$"))]
    pub public_key: String,
    /// Its UDP port; 0 with IPsec.
    #[schemars(range(max = 65535))]
    pub port: u16,
    /// Which of the node's keys it is.
    #[serde(default)]
    pub generation: u32,
    /// Stands for the other nodes' keys of this generation that the node receives by, in hexadecimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16))]
    pub receives: Option<String>,
}

/// A tunnel between nodes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Tunnel {
    /// vxlan.
    pub protocol: String,
    /// Its UDP port.
    #[schemars(range(min = 1, max = 65535))]
    pub port: u16,
}

/// Addresses that the operator gives to Services of type LoadBalancer. The shape is that of Cilium's
/// CiliumLoadBalancerIPPool.
#[derive(Clone, Debug, Default, PartialEq, CustomResource, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "weir.dev",
    version = "v1alpha1",
    kind = "LoadBalancerPool",
    doc = "Addresses that the operator gives to Services of type LoadBalancer.",
    plural = "loadbalancerpools",
    shortname = "lbpool",
    category = "weir",
    status = "LoadBalancerPoolStatus",
    derive = "PartialEq",
    printcolumn = r#"{"name": "Ready", "type": "string", "jsonPath": ".status.conditions[?(@.type=='Ready')].status"}"#,
    printcolumn = r#"{"name": "In Use", "type": "integer", "jsonPath": ".status.inUse"}"#,
    printcolumn = r#"{"name": "Disabled", "type": "boolean", "jsonPath": ".spec.disabled"}"#,
    printcolumn = r#"{"name": "Message", "type": "string", "jsonPath": ".status.conditions[?(@.type=='Ready')].message"}"#,
    printcolumn = r#"{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct LoadBalancerPoolSpec {
    /// Ranges of addresses.
    #[serde(default)]
    #[schemars(length(max = 64))]
    pub blocks: Vec<AddressBlock>,
    /// The Services that the pool is for; none: all. Beside their labels they have
    /// io.kubernetes.service.namespace and io.kubernetes.service.name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_selector: Option<LabelSelector>,
    /// No: the first and the last address of each CIDR stay free.
    #[serde(default, rename = "allowFirstLastIPs", skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = "^(Yes|No)$"))]
    pub allow_first_last_ips: Option<String>,
    /// Nothing new is given of it; what was given stays.
    #[serde(default)]
    pub disabled: bool,
    /// Nodes answer ARP and neighbour discovery for the addresses, one node for a Service; absent: the
    /// network routes them to nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub announce: Option<Announce>,
}

/// How nodes answer on the link for a pool's addresses.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Announce {
    /// Regular expressions of the names of devices; none: every device that leads out of the node.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(length(max = 128)))]
    pub interfaces: Vec<String>,
    /// The nodes that may answer; none: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_selector: Option<LabelSelector>,
    /// Also external IPs of these Services that are within the pool.
    #[serde(default, rename = "externalIPs")]
    pub external_ips: bool,
}

/// A CIDR, or addresses from one to another.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AddressBlock {
    /// As 192.0.2.0/24.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 43))]
    pub cidr: Option<String>,
    /// The lowest address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 45))]
    pub start: Option<String>,
    /// The highest address; without it `start` alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 45))]
    pub stop: Option<String>,
}

/// What the operator says of a pool.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LoadBalancerPoolStatus {
    /// Addresses that Services have.
    #[serde(default)]
    pub in_use: u64,
    /// Ready: whether it gives addresses, and why not.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// Cilium's pools, which are read where a cluster has them, and never written.
#[derive(Clone, Debug, Default, PartialEq, CustomResource, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "cilium.io",
    version = "v2",
    kind = "CiliumLoadBalancerIPPool",
    plural = "ciliumloadbalancerippools"
)]
#[serde(rename_all = "camelCase")]
pub struct CiliumLoadBalancerIPPoolSpec {
    /// As of a LoadBalancerPool, and so are the others.
    #[serde(default)]
    pub blocks: Vec<AddressBlock>,
    /// The Services that the pool is for.
    #[serde(default)]
    pub service_selector: Option<LabelSelector>,
    /// Yes or No.
    #[serde(default, rename = "allowFirstLastIPs")]
    pub allow_first_last_ips: Option<String>,
    /// Nothing new is given of it.
    #[serde(default)]
    pub disabled: bool,
}

impl From<CiliumLoadBalancerIPPoolSpec> for LoadBalancerPoolSpec {
    fn from(spec: CiliumLoadBalancerIPPoolSpec) -> Self {
        let CiliumLoadBalancerIPPoolSpec { blocks, service_selector, allow_first_last_ips, disabled } = spec;
        Self { blocks, service_selector, allow_first_last_ips, disabled, announce: None }
    }
}

impl From<&IdentityLabels> for IdentitySpec {
    fn from(labels: &IdentityLabels) -> Self {
        let ports = |ports: &Vec<crate::model::NamedPort>| {
            ports.iter().map(|port| Port { port: port.port, protocol: port.protocol.to_string() }).collect()
        };
        Self {
            namespace: labels.namespace.clone(),
            namespace_labels: labels.namespace_labels.clone(),
            service_account: labels.service_account.clone(),
            pod_labels: labels.pod_labels.clone(),
            named_ports: labels.named_ports.iter().map(|(name, list)| (name.clone(), ports(list))).collect(),
        }
    }
}

impl From<&PublishedEndpoint> for Endpoint {
    fn from(endpoint: &PublishedEndpoint) -> Self {
        Self {
            namespace: endpoint.pod.namespace.to_string(),
            name: endpoint.pod.name.to_string(),
            addresses: endpoint.addresses.iter().map(IpAddr::to_string).collect(),
            identity: endpoint.identity.0,
            workload: endpoint.workload.as_ref().map(ToString::to_string),
            host_ports: endpoint.host_ports.iter().map(Into::into).collect(),
        }
    }
}

impl From<&PortMapping> for HostPort {
    fn from(mapping: &PortMapping) -> Self {
        Self {
            host_port: mapping.host_port,
            container_port: mapping.container_port,
            protocol: mapping.protocol.to_string(),
            host_ip: mapping.host_ip.map(|address| address.to_string()),
        }
    }
}

/// Every definition, as `crds/` holds them.
pub fn crds() -> Vec<CustomResourceDefinition> {
    let mut all = vec![Identity::crd(), NodeEndpoints::crd(), WeirNode::crd(), LoadBalancerPool::crd()];
    for definition in &mut all {
        let annotations = definition.metadata.annotations.get_or_insert_default();
        annotations.insert(SCHEMA_VERSION_ANNOTATION.to_owned(), SCHEMA_VERSION.to_string());
    }
    all
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use sha2::{Digest, Sha256};

    use super::*;

    #[test]
    fn a_changed_definition_has_another_version() {
        let text = serde_json::to_string(&crds()).expect("definitions are plain data");
        let digest =
            Sha256::digest(text).iter().take(4).map(|byte| format!("{byte:02x}")).collect::<String>();
        assert_eq!(
            (SCHEMA_VERSION, digest.as_str()),
            (8, "525e0f57"),
            "raise SCHEMA_VERSION, then note both here"
        );
    }

    #[test]
    fn the_files_in_crds_are_these_types() {
        for crd in crds() {
            let path = Path::new("crds").join(format!("{}.yaml", crd.spec.names.plural));
            let text = crate::yaml::write(&crd).expect("definitions are plain data");
            if std::env::var_os("UPDATE").is_some() {
                fs::write(&path, &text).expect("writing a definition");
            }
            let there = fs::read_to_string(&path).unwrap_or_default();
            assert_eq!(there, text, "{} is stale: run this test with UPDATE=1", path.display());
        }
    }
}
