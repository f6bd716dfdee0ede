//! cilium.io/v2: CiliumLocalRedirectPolicy.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What is for a Service goes to pods of the same node.
#[derive(Clone, Debug, Default, PartialEq, CustomResource, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "cilium.io",
    version = "v2",
    kind = "CiliumLocalRedirectPolicy",
    doc = "What is for a Service goes to pods of the same node.",
    plural = "ciliumlocalredirectpolicies",
    shortname = "clrp",
    namespaced,
    category = "weir",
    derive = "PartialEq",
    printcolumn = r#"{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct CiliumLocalRedirectPolicySpec {
    /// What is redirected.
    pub redirect_frontend: Frontend,
    /// Where to.
    pub redirect_backend: Backend,
    /// The backends themselves reach what is redirected.
    pub skip_redirect_from_backend: Option<bool>,
    /// For people.
    pub description: Option<String>,
}

/// What is redirected: an address or a Service.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Frontend {
    /// An address.
    pub address_matcher: Option<AddressMatcher>,
    /// A Service of the policy's namespace.
    pub service_matcher: Option<ServiceMatcher>,
}

/// An address and ports.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AddressMatcher {
    /// The address.
    #[schemars(length(max = 45))]
    pub ip: String,
    /// Its ports.
    pub to_ports: Vec<Port>,
}

/// A Service and ports of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ServiceMatcher {
    /// Its name.
    #[schemars(length(max = 253))]
    pub service_name: String,
    /// Its namespace: the policy's own.
    #[schemars(length(max = 63))]
    pub namespace: Option<String>,
    /// Its ports; all where none is named.
    pub to_ports: Option<Vec<Port>>,
}

/// Pods of the node, and their ports.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Backend {
    /// Which pods.
    pub local_endpoint_selector: LabelSelector,
    /// Which ports of them.
    pub to_ports: Vec<Port>,
}

/// A port; its number is a text.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Port {
    /// Its number.
    #[schemars(regex(pattern = "^[0-9]{1,5}$"))]
    pub port: String,
    /// Its name, where there are several.
    #[schemars(length(max = 63))]
    pub name: Option<String>,
    /// TCP or UDP.
    #[schemars(regex(pattern = "^(TCP|UDP)$"))]
    pub protocol: String,
}
