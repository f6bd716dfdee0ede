//! Pods' host ports to frontends: the node's addresses, and the loopback ones for the node's own sockets.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::model::{Backend, Endpoint, Frontend, FrontendKey, FrontendKind, Scope};

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
