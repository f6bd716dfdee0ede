//! Pods' host ports to frontends: the node's addresses, and the loopback ones for the node's own sockets.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::model::{Endpoint, Frontend, FrontendKey};

/// The frontends of these pods' host ports at the node's `addresses`. A pod without an address of the
/// family has none there.
pub fn host_ports<'a>(
    addresses: &'a [IpAddr],
    endpoints: impl Iterator<Item = &'a Endpoint>,
) -> impl Iterator<Item = (FrontendKey, Frontend)> {
    endpoints.flat_map(move |endpoint| {
        let pod = Arc::new(endpoint.pod.clone());
        endpoint.port_mappings.iter().flat_map(move |mapping| {
            let pod = pod.clone();
            addresses.iter().filter(|address| mapping.is_at(**address)).filter_map(move |address| {
                let own = endpoint.addresses().find(|own| own.is_ipv4() == address.is_ipv4())?;
                let key = FrontendKey {
                    address: *address,
                    port: mapping.host_port,
                    protocol: Some(mapping.protocol),
                };
                let backends = vec![SocketAddr::new(own, mapping.container_port)];
                Some((key, Frontend { service: pod.clone(), is_host_port: true, backends }))
            })
        })
    })
}
