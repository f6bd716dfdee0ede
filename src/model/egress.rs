//! Gateways by which pods' packets leave the cluster.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{ObjectKey, Selector};

/// What some pods send to some destinations leaves by a gateway.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EgressPolicy {
    /// Of the object; its namespace is empty.
    pub key: ObjectKey,
    /// The pods that any of these selects.
    pub pods: Vec<EgressPods>,
    /// Where they send to.
    pub destinations: Vec<IpNet>,
    /// Of that, what goes the ordinary way.
    pub excluded: Vec<IpNet>,
    /// Each pod leaves by one of these.
    pub gateways: Vec<EgressGateway>,
    /// Some destination could not be read: what is not named otherwise does not leave.
    pub is_partial: bool,
}

/// Pods of a policy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct EgressPods {
    /// Of namespaces with such labels.
    pub namespaces: Selector,
    /// With such labels.
    pub pods: Selector,
    /// On nodes with such labels.
    pub nodes: Selector,
}

/// A way out: the first node that is ready, by name, and what packets leave with there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EgressGateway {
    /// The nodes.
    pub nodes: Selector,
    /// The device whose address packets get, and by which they leave.
    pub interface: Option<String>,
    /// The address that packets get; without this and the device that of the device which the routes say.
    pub address: Option<IpAddr>,
}

/// What a pod's packets to each destination are, by longest prefix, for one family: everything is in it.
pub type EgressTable = BTreeMap<IpNet, EgressRoute>;

/// A row of `egress_rules`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum EgressRoute {
    /// As if no policy selected the pod.
    Ordinary,
    /// There is no gateway, and nothing leaves.
    Closed,
    /// To the node that has this address between the nodes.
    Away(IpAddr),
    /// This node is the gateway.
    Here(EgressExit),
}

/// How packets leave the gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum EgressExit {
    /// By this device, or where it is 0 as the routes say, with this address.
    With(IpAddr, u32),
    /// As the routes say, with the address of the device.
    OfDevice,
    /// The node has no such address: nothing leaves.
    Nowhere,
}

/// A pod that a policy selects, as people see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EgressRow {
    /// The policy.
    pub policy: String,
    /// The pod.
    pub pod: ObjectKey,
    /// The pod's node.
    pub node: String,
    /// The gateway's name; none: no gateway is ready, and nothing leaves.
    pub gateway: Option<String>,
    /// What packets leave with, as far as this node knows; none: nothing leaves.
    pub address: Option<String>,
    /// Where to.
    pub destinations: Vec<IpNet>,
    /// What goes the ordinary way.
    pub excluded: Vec<IpNet>,
}
