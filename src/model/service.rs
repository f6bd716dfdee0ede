//! Services and their EndpointSlices, as far as networking cares.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::Serialize;

use super::{Algorithm, Forwarding, Labels, ObjectKey, Protocol};

/// A Service with at least one cluster IP, or a headless one (no `addresses`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Service {
    /// Namespace and name.
    pub key: ObjectKey,
    /// `spec.clusterIPs` without `None`.
    pub addresses: Vec<IpAddr>,
    /// `spec.ports`.
    pub ports: Vec<ServicePort>,
    /// `status.loadBalancer.ingress`: the addresses that packets still have when they come to a node.
    pub balancer_addresses: Vec<IpAddr>,
    /// `spec.loadBalancerClass`, where somebody in particular is to give the addresses.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balancer_class: Option<Arc<str>>,
    /// `spec.externalIPs`.
    pub external_addresses: Vec<IpAddr>,
    /// `spec.internalTrafficPolicy`: whose backends the cluster IPs lead to.
    pub internal_policy: TrafficPolicy,
    /// `spec.externalTrafficPolicy`: whose backends all other addresses lead to, for packets from the network.
    pub external_policy: TrafficPolicy,
    /// `spec.sessionAffinity` ClientIP, with its timeout in seconds.
    pub affinity: Option<u32>,
    /// `spec.trafficDistribution`; the hints in the slices are what counts.
    pub distribution: Option<Distribution>,
    /// `spec.loadBalancerSourceRanges`.
    pub source_ranges: Arc<[IpNet]>,
    /// `spec.healthCheckNodePort`.
    pub health_port: Option<u16>,
    /// How a backend is chosen, where the Service says so itself.
    pub algorithm: Option<Algorithm>,
    /// How backends of other nodes are reached, where the Service says so itself.
    pub forwarding: Option<Forwarding>,
    /// `metadata.labels`, by which policies select Services.
    #[serde(skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    /// `spec.selector`: whose pods are behind it; empty: its slices say it.
    #[serde(skip_serializing_if = "Labels::is_empty")]
    pub selector: Labels,
}

impl Service {
    /// A headless Service without ports, for `..` in those that have more.
    pub fn new(key: ObjectKey) -> Self {
        Self {
            key,
            addresses: Vec::new(),
            ports: Vec::new(),
            balancer_addresses: Vec::new(),
            balancer_class: None,
            external_addresses: Vec::new(),
            internal_policy: TrafficPolicy::Cluster,
            external_policy: TrafficPolicy::Cluster,
            affinity: None,
            distribution: None,
            source_ranges: Arc::default(),
            health_port: None,
            algorithm: None,
            forwarding: None,
            labels: Labels::new(),
            selector: Labels::new(),
        }
    }
}

/// Whose backends are used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub enum TrafficPolicy {
    /// All nodes'.
    #[default]
    Cluster,
    /// This node's only.
    Local,
}

/// Which backends are nearest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum Distribution {
    /// PreferSameZone, or PreferClose by its older name.
    SameZone,
    /// PreferSameNode.
    SameNode,
}

/// One port of a Service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ServicePort {
    /// Empty for the only port of a Service.
    pub name: String,
    /// TCP when absent.
    pub protocol: Protocol,
    /// The frontend's port.
    pub port: u16,
    /// The port of every node's addresses that leads to it, too.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_port: Option<u16>,
}

/// An EndpointSlice: some of the backends of one Service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EndpointSlice {
    /// Namespace and name of the slice itself.
    pub key: ObjectKey,
    /// The Service that it belongs to (label `kubernetes.io/service-name`).
    pub service: ObjectKey,
    /// Ports, matched to the Service's by name; a slice port without number is left out.
    pub ports: Vec<SlicePort>,
    /// Backends.
    pub backends: Vec<SliceBackend>,
}

/// One port of the backends of a slice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SlicePort {
    /// The name of the Service's port.
    pub name: String,
    /// TCP when absent.
    pub protocol: Protocol,
    /// The backends' port.
    pub port: u16,
}

/// One endpoint of an EndpointSlice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SliceBackend {
    /// The first of its addresses, which is the one that counts; of the slice's family.
    pub address: IpAddr,
    /// `conditions.ready`, true when absent.
    pub ready: bool,
    /// `conditions.serving`, `ready` when absent.
    pub serving: bool,
    /// `conditions.terminating`.
    pub terminating: bool,
    /// `nodeName`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<Arc<str>>,
    /// `zone`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zone: Option<Arc<str>>,
    /// `hints`, where there are any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hints: Option<Arc<Hints>>,
    /// Its share under Maglev.
    pub weight: u16,
}

impl SliceBackend {
    /// A backend that is ready, for `..` in those that are not.
    pub fn ready(address: IpAddr) -> Self {
        Self {
            address,
            ready: true,
            serving: true,
            terminating: false,
            node: None,
            zone: None,
            hints: None,
            weight: 1,
        }
    }
}

/// For whom a backend is meant.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Hints {
    /// `forZones`.
    pub zones: Vec<Arc<str>>,
    /// `forNodes`.
    pub nodes: Vec<Arc<str>>,
}
