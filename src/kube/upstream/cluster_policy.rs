//! policy.networking.k8s.io/v1alpha2: ClusterNetworkPolicy.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What a cluster's administrators say before and after the namespaces' policies.
#[derive(Clone, Debug, Default, PartialEq, CustomResource, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "policy.networking.k8s.io",
    version = "v1alpha2",
    kind = "ClusterNetworkPolicy",
    doc = "What a cluster's administrators say before and after the namespaces' policies.",
    plural = "clusternetworkpolicies",
    shortname = "cnp",
    category = "weir",
    derive = "PartialEq",
    printcolumn = r#"{"name": "Tier", "type": "string", "jsonPath": ".spec.tier"}"#,
    printcolumn = r#"{"name": "Priority", "type": "integer", "jsonPath": ".spec.priority"}"#,
    printcolumn = r#"{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}"#
)]
pub struct ClusterNetworkPolicySpec {
    /// Admin: before the namespaces' policies. Baseline: after them.
    #[schemars(regex(pattern = "^(Admin|Baseline)$"))]
    pub tier: String,
    /// The lower one counts first.
    #[schemars(range(min = 0, max = 1000))]
    pub priority: i32,
    /// The pods that it applies to.
    pub subject: Pods,
    /// Rules for what comes in, in their order.
    #[schemars(length(max = 25))]
    pub ingress: Option<Vec<IngressRule>>,
    /// Rules for what goes out, in their order.
    #[schemars(length(max = 25))]
    pub egress: Option<Vec<EgressRule>>,
}

/// Pods: all of some namespaces, or some.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Pods {
    /// All pods of these.
    pub namespaces: Option<LabelSelector>,
    /// These pods.
    pub pods: Option<PodSelector>,
}

/// Pods by their labels and their namespaces' labels.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PodSelector {
    /// Of the namespaces.
    pub namespace_selector: Option<LabelSelector>,
    /// Of the pods.
    pub pod_selector: Option<LabelSelector>,
}

/// A rule for what comes in.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct IngressRule {
    /// For people.
    #[schemars(length(max = 100))]
    pub name: Option<String>,
    /// Accept, Deny, or Pass to the next tier.
    #[schemars(regex(pattern = "^(Accept|Deny|Pass)$"))]
    pub action: String,
    /// Who comes in.
    #[schemars(length(min = 1, max = 25))]
    pub from: Vec<Pods>,
    /// Ports; all where it is not there.
    #[schemars(length(min = 1, max = 25))]
    pub protocols: Option<Vec<Protocol>>,
}

/// A rule for what goes out.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct EgressRule {
    /// For people.
    #[schemars(length(max = 100))]
    pub name: Option<String>,
    /// Accept, Deny, or Pass to the next tier.
    #[schemars(regex(pattern = "^(Accept|Deny|Pass)$"))]
    pub action: String,
    /// Where it goes.
    #[schemars(length(min = 1, max = 25))]
    pub to: Vec<Destination>,
    /// Ports; all where it is not there.
    #[schemars(length(min = 1, max = 25))]
    pub protocols: Option<Vec<Protocol>>,
}

/// Where what goes out goes: one of these.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Destination {
    /// All pods of these namespaces.
    pub namespaces: Option<LabelSelector>,
    /// These pods.
    pub pods: Option<PodSelector>,
    /// Nodes by label.
    pub nodes: Option<LabelSelector>,
    /// Prefixes.
    #[schemars(length(min = 1, max = 25), inner(length(max = 43)))]
    pub networks: Option<Vec<String>>,
    /// Names of DNS, for Accept alone.
    #[schemars(length(min = 1, max = 25))]
    pub domain_names: Option<Vec<String>>,
}

/// A protocol and its ports: one of these.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Protocol {
    /// TCP.
    pub tcp: Option<Ports>,
    /// UDP.
    pub udp: Option<Ports>,
    /// SCTP.
    pub sctp: Option<Ports>,
    /// A port by the name that the destination gives it.
    #[schemars(length(max = 63))]
    pub destination_named_port: Option<String>,
}

/// Ports of a protocol.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Ports {
    /// All where it is not there.
    pub destination_port: Option<Port>,
}

/// A port, or a range.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Port {
    /// One.
    #[schemars(range(min = 1, max = 65535))]
    pub number: Option<i32>,
    /// Several.
    pub range: Option<Range>,
}

/// From, to; both included.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Range {
    /// The first.
    #[schemars(range(min = 1, max = 65535))]
    pub start: i32,
    /// The last.
    #[schemars(range(min = 1, max = 65535))]
    pub end: i32,
}
