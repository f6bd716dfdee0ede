//! cilium.io/v2: CiliumEgressGatewayPolicy.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What some pods send to some destinations leaves by a gateway.
#[derive(Clone, Debug, Default, PartialEq, CustomResource, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "cilium.io",
    version = "v2",
    kind = "CiliumEgressGatewayPolicy",
    doc = "What some pods send to some destinations leaves by a gateway.",
    plural = "ciliumegressgatewaypolicies",
    shortname = "cegp",
    category = "weir",
    derive = "PartialEq",
    printcolumn = r#"{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct CiliumEgressGatewayPolicySpec {
    /// The pods.
    pub selectors: Vec<Pods>,
    /// Where they send to: CIDRs outside of the cluster.
    #[serde(rename = "destinationCIDRs")]
    pub destination_cidrs: Vec<String>,
    /// Of that, what goes the ordinary way.
    #[serde(rename = "excludedCIDRs")]
    pub excluded_cidrs: Option<Vec<String>>,
    /// The gateway.
    pub egress_gateway: Option<Gateway>,
    /// Several gateways; each pod leaves by one of them.
    pub egress_gateways: Option<Vec<Gateway>>,
}

/// Pods that are selected.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Pods {
    /// Of namespaces with such labels.
    pub namespace_selector: Option<LabelSelector>,
    /// With such labels.
    pub pod_selector: Option<LabelSelector>,
    /// On nodes with such labels.
    pub node_selector: Option<LabelSelector>,
}

/// A node, and what packets leave with there.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Gateway {
    /// The nodes: the first one that is ready, by name.
    pub node_selector: LabelSelector,
    /// The device whose address packets get, and by which they leave; not with egressIP.
    #[schemars(length(max = 15))]
    pub interface: Option<String>,
    /// The address that packets get.
    #[serde(rename = "egressIP")]
    #[schemars(length(max = 45))]
    pub egress_ip: Option<String>,
}
