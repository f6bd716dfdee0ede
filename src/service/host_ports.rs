//! Pods' host ports to frontends: the node's addresses, and the loopback ones for the node's own sockets.
//!
//! A port of another node is translated here already, for this node's pods and sockets. Else a pod's packet
//! would leave with this node's address, and the pod at its end would take it for the node's.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use imbl::OrdMap;

use crate::model::{
    AddressEntry, AddressKind, Backend, Endpoint, Frontend, FrontendKey, FrontendKind, Node, NodeEndpoints,
    Scope,
};

/// The frontends of these pods' host ports at the node's `addresses`, for pods and the network; at loopback
/// addresses for the node's own sockets. A pod without an address of the family has none there.
pub fn host_ports<'a>(
    addresses: &'a [IpAddr],
    endpoints: impl Iterator<Item = &'a Endpoint>,
) -> impl Iterator<Item = (FrontendKey, Frontend)> {
    endpoints.flat_map(move |endpoint| {
        let pod = Arc::new(endpoint.pod.clone());
        endpoint.port_mappings.iter().flat_map(move |mapping| {
            let pod = pod.clone();
            addresses.iter().filter(|address| mapping.is_at(**address)).flat_map(move |address| {
                let own = endpoint.addresses().find(|own| own.is_ipv4() == address.is_ipv4());
                let frontend = own.map(|own| Frontend {
                    backends: [Backend::at(SocketAddr::new(own, mapping.container_port))].into(),
                    ..Frontend::refusing(pod.clone(), FrontendKind::HostPort)
                });
                let scopes = [Some(Scope::Internal), (!address.is_loopback()).then_some(Scope::External)];
                let key = |scope| FrontendKey::new(*address, mapping.host_port, mapping.protocol, scope);
                scopes.into_iter().flatten().filter_map(move |scope| Some((key(scope), frontend.clone()?)))
            })
        })
    })
}

/// The frontends, for this node's pods and sockets, of what another node publishes. Only where the pod is
/// that node's, in `addresses`.
pub fn host_ports_of<'a>(
    node: &'a Node,
    published: &'a NodeEndpoints,
    addresses: &'a OrdMap<IpAddr, AddressEntry>,
) -> impl Iterator<Item = (FrontendKey, Frontend)> + 'a {
    let is_its_own = |pod: &IpAddr| {
        addresses.get(pod).is_some_and(|entry| {
            entry.kind == AddressKind::Pod && entry.node.is_some_and(|of| node.addresses.contains(&of))
        })
    };
    let with_ports = published.endpoints.iter().filter(|endpoint| !endpoint.host_ports.is_empty());
    with_ports.flat_map(move |endpoint| {
        let pod = Arc::new(endpoint.pod.clone());
        let pairs = endpoint.host_ports.iter().flat_map(|mapping| {
            let at = node.addresses.iter().filter(|address| mapping.is_at(**address));
            at.map(move |address| (mapping, *address))
        });
        pairs.filter_map(move |(mapping, address)| {
            let own = endpoint.addresses.iter().find(|own| own.is_ipv4() == address.is_ipv4())?;
            let frontend = Frontend {
                backends: [Backend::at(SocketAddr::new(*own, mapping.container_port))].into(),
                ..Frontend::refusing(pod.clone(), FrontendKind::HostPort)
            };
            let key = FrontendKey::new(address, mapping.host_port, mapping.protocol, Scope::Internal);
            is_its_own(own).then_some((key, frontend))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{IdentityId, Labels, ObjectKey, PortMapping, Protocol, PublishedEndpoint};

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn another_nodes_ports_lead_to_its_own_pods_alone() {
        let node = Node {
            name: "b".to_owned(),
            labels: Labels::default(),
            addresses: vec![ip("192.0.2.2"), ip("2001:db8::2")],
            pod_cidrs: Vec::new(),
            is_leaving: false,
            is_unready: false,
        };
        let mapping = |host_port, host_ip: Option<&str>| PortMapping {
            host_port,
            container_port: 80,
            protocol: Protocol::Tcp,
            host_ip: host_ip.map(ip),
        };
        let endpoint = |name: &str, address: &str, host_ports| PublishedEndpoint {
            pod: ObjectKey::new("shop", name),
            addresses: vec![ip(address)],
            identity: IdentityId(300),
            workload: None,
            host_ports,
        };
        let published = NodeEndpoints {
            node: "b".to_owned(),
            internal_addresses: Vec::new(),
            endpoints: vec![
                endpoint("own", "10.1.1.9", vec![mapping(8080, None), mapping(8081, Some("127.0.0.1"))]),
                endpoint("anothers", "10.1.2.9", vec![mapping(8082, None)]),
            ],
        };
        let entry = |node: &str| AddressEntry {
            identity: IdentityId(300),
            node: Some(ip(node)),
            endpoint: None,
            kind: AddressKind::Pod,
        };
        let addresses: OrdMap<_, _> =
            [(ip("10.1.1.9"), entry("192.0.2.2")), (ip("10.1.2.9"), entry("192.0.2.3"))]
                .into_iter()
                .collect();
        let found: Vec<_> = host_ports_of(&node, &published, &addresses).collect();
        let keys: Vec<_> = found.iter().map(|(key, _)| (key.address, key.port, key.scope)).collect();
        assert_eq!(keys, [(ip("192.0.2.2"), 8080, Scope::Internal)]);
        let backends: Vec<_> = found[0].1.addresses().collect();
        assert_eq!(backends, ["10.1.1.9:80".parse().expect("an address")]);
    }
}
