//! Endpoints: the pods of this node.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{ObjectKey, PortMapping};

/// The number of a pod on its node: index of the `endpoints` map, 1 to 4095. 0 is the node itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct EndpointId(pub u16);

impl EndpointId {
    /// The node itself: it has a policy and no device.
    pub const HOST: Self = Self(0);
}

impl fmt::Display for EndpointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A hardware address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// The host side's address of an endpoint's link: from_pod reads the id from it (abi.h).
    pub fn of_host_side(id: EndpointId) -> Self {
        let [high, low] = id.0.to_be_bytes();
        Self([0x02, 0x57, 0x65, 0x69, high, low])
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// A pod's attachment, made by CNI ADD; kept on disk so that a restart loses nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Endpoint {
    /// Its number on this node.
    pub id: EndpointId,
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// `CNI_IFNAME`.
    pub interface: String,
    /// `CNI_NETNS`.
    pub netns: PathBuf,
    /// K8S_POD_NAMESPACE and K8S_POD_NAME of `CNI_ARGS`.
    pub pod: ObjectKey,
    /// K8S_POD_UID of `CNI_ARGS`, where the runtime gives it.
    pub pod_uid: Option<String>,
    /// Its IPv4 address.
    pub ipv4: Option<Ipv4Addr>,
    /// Its IPv6 address.
    pub ipv6: Option<Ipv6Addr>,
    /// Name of the host side of its link.
    pub host_interface: String,
    /// Index of the host side of its link.
    pub host_ifindex: u32,
    /// Hardware address inside the pod.
    pub mac: MacAddress,
    /// Ports of the node that are the pod's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub port_mappings: Vec<PortMapping>,
}

impl Endpoint {
    /// Both addresses, as far as there are two.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.ipv4.map(IpAddr::V4).into_iter().chain(self.ipv6.map(IpAddr::V6))
    }
}
