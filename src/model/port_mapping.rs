//! Host ports: ports of the node that are a pod's.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use super::Protocol;

/// A container's `hostPort`: a port of the node that leads to a port of the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortMapping {
    /// The node's port.
    pub host_port: u16,
    /// The pod's port.
    pub container_port: u16,
    /// Both ports' protocol.
    pub protocol: Protocol,
    /// The address of the node that has it, the unspecified one for all of that family; `None`: all of them.
    #[serde(rename = "hostIP", default, skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<IpAddr>,
}

impl PortMapping {
    /// True if this address of the node has the port.
    pub fn is_at(&self, address: IpAddr) -> bool {
        match self.host_ip {
            None => true,
            Some(host_ip) if host_ip.is_unspecified() => host_ip.is_ipv4() == address.is_ipv4(),
            Some(host_ip) => host_ip == address,
        }
    }

    /// True if both want the same port of the same address.
    pub fn conflicts_with(&self, other: &Self) -> bool {
        let same_address = match (self.host_ip, other.host_ip) {
            (Some(one), Some(another)) => self.is_at(another) || other.is_at(one),
            _ => true,
        };
        same_address && self.host_port == other.host_port && self.protocol == other.protocol
    }
}

/// As `address:port/protocol`; `*` for every address.
impl fmt::Display for PortMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host_ip {
            Some(host_ip) => {
                write!(f, "{}/{}", SocketAddr::new(host_ip, self.host_port), self.protocol)
            }
            None => write!(f, "*:{}/{}", self.host_port, self.protocol),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(host_ip: Option<&str>) -> PortMapping {
        let host_ip = host_ip.map(|text| text.parse().expect("an address"));
        PortMapping { host_port: 80, container_port: 8080, protocol: Protocol::Tcp, host_ip }
    }

    #[test]
    fn the_same_port_of_other_addresses_is_another() {
        let rows = [
            (None, None, true),
            (None, Some("10.0.0.1"), true),
            (Some("10.0.0.1"), Some("10.0.0.1"), true),
            (Some("10.0.0.1"), Some("127.0.0.1"), false),
            (Some("0.0.0.0"), Some("127.0.0.1"), true),
            (Some("0.0.0.0"), Some("::"), false),
            (Some("::1"), Some("::"), true),
        ];
        for (one, other, expected) in rows {
            let (one, other) = (mapping(one), mapping(other));
            assert_eq!(one.conflicts_with(&other), expected, "{one} {other}");
            assert_eq!(other.conflicts_with(&one), expected, "{other} {one}");
        }
        assert!(!mapping(None).conflicts_with(&PortMapping { protocol: Protocol::Udp, ..mapping(None) }));
        assert!(!mapping(None).conflicts_with(&PortMapping { host_port: 81, ..mapping(None) }));
    }
}
