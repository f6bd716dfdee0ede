//! cilium.io/v2: CiliumNetworkPolicy, CiliumClusterwideNetworkPolicy, CiliumCIDRGroup.

use std::borrow::Cow;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::{CustomResource, KubeSchema};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// An object of which nothing is said.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Anything(pub Value);

impl JsonSchema for Anything {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Anything".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "object"})
    }
}

/// The fields of both kinds: what applies to whom.
macro_rules! policy {
    ($spec:ident, $kind:literal, $doc:literal, $plural:literal, $short:literal $(, $namespaced:ident)?) => {
        #[doc = $doc]
        #[derive(Clone, Debug, Default, PartialEq, CustomResource, Serialize, Deserialize, KubeSchema)]
        #[kube(
            group = "cilium.io", version = "v2", kind = $kind, doc = $doc, plural = $plural, shortname = $short,
            $($namespaced,)? category = "weir", derive = "PartialEq",
            validation = Rule::new("has(self.spec) || has(self.specs)").message("there is neither spec nor specs"),
            printcolumn = r#"{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}"#
        )]
        #[x_kube(validation = Rule::new("has(self.endpointSelector) != has(self.nodeSelector)")
            .message("there must be one of endpointSelector and nodeSelector"))]
        #[serde(rename_all = "camelCase")]
        pub struct $spec {
            /// The pods that it applies to.
            pub endpoint_selector: Option<LabelSelector>,
            /// The nodes that it applies to.
            pub node_selector: Option<LabelSelector>,
            /// Who may come in.
            pub ingress: Option<Vec<IngressRule>>,
            /// Who may not come in, whatever allows it.
            pub ingress_deny: Option<Vec<IngressRule>>,
            /// Where they may go.
            pub egress: Option<Vec<EgressRule>>,
            /// Where they may not go, whatever allows it.
            pub egress_deny: Option<Vec<EgressRule>>,
            /// Whether what no rule allows is denied; where it is not said: where there are rules.
            pub enable_default_deny: Option<DefaultDeny>,
            /// For people.
            pub description: Option<String>,
            /// For people.
            pub labels: Option<Vec<Anything>>,
            /// What flows say of the policy.
            pub log: Option<Log>,
        }
    };
}

policy!(
    CiliumNetworkPolicySpec,
    "CiliumNetworkPolicy",
    "Who may speak with the pods of a namespace.",
    "ciliumnetworkpolicies",
    "cnp",
    namespaced
);
policy!(
    CiliumClusterwideNetworkPolicySpec,
    "CiliumClusterwideNetworkPolicy",
    "Who may speak with the pods, or with the nodes, of a cluster.",
    "ciliumclusterwidenetworkpolicies",
    "ccnp"
);

/// For each direction.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct DefaultDeny {
    /// What comes in.
    pub ingress: Option<bool>,
    /// What goes out.
    pub egress: Option<bool>,
}

/// A text for flows.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Log {
    /// The text.
    pub value: Option<String>,
}

/// Who comes in, and to which ports.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct IngressRule {
    /// Pods by label.
    pub from_endpoints: Option<Vec<LabelSelector>>,
    /// Names that stand for peers.
    pub from_entities: Option<Vec<String>>,
    /// Addresses outside of the cluster.
    #[serde(rename = "fromCIDR")]
    pub from_cidr: Option<Vec<String>>,
    /// The same with holes, or by group.
    #[serde(rename = "fromCIDRSet")]
    pub from_cidr_set: Option<Vec<CidrSet>>,
    /// Nodes by label.
    pub from_nodes: Option<Vec<LabelSelector>>,
    /// Groups of a provider: not enforced.
    pub from_groups: Option<Vec<Groups>>,
    /// Not read any more.
    pub from_requires: Option<Vec<LabelSelector>>,
    /// Ports.
    pub to_ports: Option<Vec<PortRule>>,
    /// Types of ICMP.
    pub icmps: Option<Vec<IcmpRule>>,
    /// Not enforced: a rule that requires it allows nothing.
    pub authentication: Option<Authentication>,
}

/// Where what goes out goes, and to which ports.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EgressRule {
    /// Pods by label.
    pub to_endpoints: Option<Vec<LabelSelector>>,
    /// Names that stand for peers.
    pub to_entities: Option<Vec<String>>,
    /// Addresses outside of the cluster.
    #[serde(rename = "toCIDR")]
    pub to_cidr: Option<Vec<String>>,
    /// The same with holes, or by group.
    #[serde(rename = "toCIDRSet")]
    pub to_cidr_set: Option<Vec<CidrSet>>,
    /// Nodes by label.
    pub to_nodes: Option<Vec<LabelSelector>>,
    /// Groups of a provider: not enforced.
    pub to_groups: Option<Vec<Groups>>,
    /// Not read any more.
    pub to_requires: Option<Vec<LabelSelector>>,
    /// Who is behind Services.
    pub to_services: Option<Vec<Services>>,
    /// Names of DNS.
    #[serde(rename = "toFQDNs")]
    pub to_fqdns: Option<Vec<DnsName>>,
    /// Ports.
    pub to_ports: Option<Vec<PortRule>>,
    /// Types of ICMP.
    pub icmps: Option<Vec<IcmpRule>>,
    /// Not enforced: a rule that requires it allows nothing.
    pub authentication: Option<Authentication>,
}

/// A prefix or groups of them, with holes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CidrSet {
    /// As 10.0.0.0/8.
    #[schemars(length(max = 49))]
    pub cidr: Option<String>,
    /// The name of a CiliumCIDRGroup.
    #[schemars(length(max = 253))]
    pub cidr_group_ref: Option<String>,
    /// CiliumCIDRGroups by label.
    pub cidr_group_selector: Option<LabelSelector>,
    /// What is not meant.
    pub except: Option<Vec<String>>,
}

/// A provider's groups.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Groups {
    /// Of AWS.
    pub aws: Option<Anything>,
}

/// Services by name or by label.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Services {
    /// One.
    pub k8s_service: Option<ServiceByName>,
    /// Those with labels.
    pub k8s_service_selector: Option<ServiceByLabel>,
}

/// A Service by name.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ServiceByName {
    /// Its name.
    pub service_name: Option<String>,
    /// Its namespace; the policy's own where it is not said.
    pub namespace: Option<String>,
}

/// Services by label.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ServiceByLabel {
    /// Their labels.
    pub selector: LabelSelector,
    /// Their namespace.
    pub namespace: Option<String>,
}

/// A name of DNS.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DnsName {
    /// The whole name.
    #[schemars(length(max = 255))]
    pub match_name: Option<String>,
    /// With * in it.
    #[schemars(length(max = 255))]
    pub match_pattern: Option<String>,
}

/// Ports, and what is asked of what is sent to them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PortRule {
    /// Which ports.
    #[schemars(length(max = 40))]
    pub ports: Option<Vec<Port>>,
    /// Which requests.
    pub rules: Option<Requests>,
    /// Whose TLS ends here.
    #[serde(rename = "terminatingTLS")]
    pub terminating_tls: Option<Anything>,
    /// With whose TLS it goes on.
    #[serde(rename = "originatingTLS")]
    pub originating_tls: Option<Anything>,
    /// Names that TLS asks for.
    pub server_names: Option<Vec<String>>,
    /// A listener of Envoy: not enforced.
    pub listener: Option<Anything>,
}

/// A port, or ports up to another.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Port {
    /// A number or a name; 0 is every port.
    pub port: Option<IntOrString>,
    /// The last of a range.
    #[schemars(range(min = 0, max = 65535))]
    pub end_port: Option<i32>,
    /// TCP, UDP, SCTP, ICMP, ICMPv6, VRRP, IGMP, GRE, IPIP, IPV6, ESP, AH or ANY.
    #[schemars(length(max = 8))]
    pub protocol: Option<String>,
}

/// Requests of layer 7.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Requests {
    /// Of HTTP.
    pub http: Option<Vec<Http>>,
    /// Questions of DNS.
    pub dns: Option<Vec<DnsName>>,
    /// Of Kafka.
    pub kafka: Option<Vec<Anything>>,
    /// Another protocol.
    pub l7proto: Option<String>,
    /// What of it.
    pub l7: Option<Vec<Anything>>,
}

/// A request of HTTP: regular expressions.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Http {
    /// Of the path.
    pub path: Option<String>,
    /// Of the method.
    pub method: Option<String>,
    /// Of the host.
    pub host: Option<String>,
    /// Headers that must be there.
    pub headers: Option<Vec<String>>,
    /// Headers with values, and what becomes of a request without.
    pub header_matches: Option<Vec<Anything>>,
}

/// Types of ICMP.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct IcmpRule {
    /// Which.
    #[schemars(length(max = 40))]
    pub fields: Option<Vec<IcmpType>>,
}

/// A type of ICMP.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct IcmpType {
    /// IPv4 or IPv6; IPv4 where it is not said.
    #[schemars(regex(pattern = "^(IPv4|IPv6)?$"))]
    pub family: Option<String>,
    /// Its number or its name.
    #[serde(rename = "type")]
    pub kind: IntOrString,
}

/// What of a peer's name is proven.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Authentication {
    /// disabled, required, test-always-fail.
    #[schemars(regex(pattern = "^(disabled|required|test-always-fail)$"))]
    pub mode: String,
}

/// Prefixes that policies name together.
#[derive(Clone, Debug, Default, PartialEq, CustomResource, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "cilium.io",
    version = "v2",
    kind = "CiliumCIDRGroup",
    doc = "Prefixes that policies name together.",
    plural = "ciliumcidrgroups",
    shortname = "ccg",
    category = "weir",
    derive = "PartialEq",
    printcolumn = r#"{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}"#
)]
pub struct CiliumCIDRGroupSpec {
    /// As 10.0.0.0/8.
    #[serde(rename = "externalCIDRs")]
    #[schemars(inner(length(max = 49)))]
    pub external_cidrs: Vec<String>,
}
