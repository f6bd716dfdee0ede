//! What code wants to know of a flow: who began it, whom it reached, by which protocol.

use std::net::{IpAddr, SocketAddr};

use super::proto::flow::{Endpoint, Flow, Policy, Service, layer4};
use crate::flow::{DropReason, L4Protocol};

/// One side of a connection.
#[derive(Clone, Copy, Debug)]
pub struct Side<'a> {
    /// Its address; `None` where the flow has none.
    pub ip: Option<IpAddr>,
    /// 0 for protocols without ports.
    pub port: u16,
    /// Who it is.
    pub endpoint: Option<&'a Endpoint>,
    /// The Service by whose name it was reached.
    pub service: Option<&'a Service>,
}

impl Side<'_> {
    /// The namespace; empty where it has none.
    pub fn namespace(&self) -> &str {
        self.endpoint.map_or("", |endpoint| &endpoint.namespace)
    }

    /// The pod's name; empty where it is none.
    pub fn pod(&self) -> &str {
        self.endpoint.map_or("", |endpoint| &endpoint.pod_name)
    }

    /// The labels of its identity.
    pub fn labels(&self) -> &[String] {
        self.endpoint.map_or(&[], |endpoint| &endpoint.labels)
    }

    /// Its address and port.
    pub fn socket(&self) -> Option<SocketAddr> {
        self.ip.map(|ip| SocketAddr::new(ip, self.port))
    }
}

/// Who began the connection, and whom it reached. A flow has first who sent the packet: for a reply the other.
pub fn sides(flow: &Flow) -> [Side<'_>; 2] {
    let [from, to] = ports(flow).unwrap_or_default();
    let ip = |text: fn(&super::proto::flow::Ip) -> &str| {
        flow.ip.as_ref().and_then(|ip| text(ip).parse::<IpAddr>().ok())
    };
    let port = |number: u32| u16::try_from(number).unwrap_or(0);
    let source = Side {
        ip: ip(|ip| &ip.source),
        port: port(from),
        endpoint: flow.source.as_ref(),
        service: flow.source_service.as_ref(),
    };
    let destination = Side {
        ip: ip(|ip| &ip.destination),
        port: port(to),
        endpoint: flow.destination.as_ref(),
        service: flow.destination_service.as_ref(),
    };
    if flow.is_reply == Some(true) { [destination, source] } else { [source, destination] }
}

/// Source and destination port of the packet, where its protocol has ports.
pub fn ports(flow: &Flow) -> Option<[u32; 2]> {
    match flow.l4.as_ref()?.protocol.as_ref()? {
        layer4::Protocol::Tcp(tcp) => Some([tcp.source_port, tcp.destination_port]),
        layer4::Protocol::Udp(udp) => Some([udp.source_port, udp.destination_port]),
        layer4::Protocol::Sctp(sctp) => Some([sctp.source_port, sctp.destination_port]),
        _ => None,
    }
}

/// The L4 protocol; `None` for what is no IP packet, or of a server that does not say.
pub fn protocol(flow: &Flow) -> Option<L4Protocol> {
    let protocol = flow.l4.as_ref().and_then(|l4| l4.protocol.as_ref());
    match protocol {
        Some(layer4::Protocol::Tcp(_)) => Some(L4Protocol::Tcp),
        Some(layer4::Protocol::Udp(_)) => Some(L4Protocol::Udp),
        Some(layer4::Protocol::Sctp(_)) => Some(L4Protocol::Sctp),
        Some(layer4::Protocol::IcmPv4(_)) => Some(L4Protocol::IcmpV4),
        Some(layer4::Protocol::IcmPv6(_)) => Some(L4Protocol::IcmpV6),
        _ => {
            let number = u8::try_from(flow.weir.as_ref()?.protocol).ok().filter(|number| *number != 0);
            number.map(L4Protocol::from)
        }
    }
}

/// Why the packet was dropped, where it was.
pub fn drop_reason(flow: &Flow) -> Option<DropReason> {
    u8::try_from(flow.drop_reason_desc).ok().filter(|number| *number != 0).map(DropReason)
}

/// The policies that decided, in the direction that the flow was judged in.
pub fn deciding(flow: &Flow) -> impl Iterator<Item = &Policy> {
    let lists = match flow.traffic_direction {
        2 => [&flow.egress_allowed_by, &flow.egress_denied_by],
        _ => [&flow.ingress_allowed_by, &flow.ingress_denied_by],
    };
    lists.into_iter().flatten()
}

/// The policies whose rules denied the flow, on either side.
pub fn deciding_denied(flow: &Flow) -> impl Iterator<Item = &Policy> {
    flow.egress_denied_by.iter().chain(&flow.ingress_denied_by)
}

/// A policy as people name it: `NetworkPolicy shop/web`.
pub fn policy_name(policy: &Policy) -> String {
    match policy.namespace.as_str() {
        "" => format!("{} {}", policy.kind, policy.name),
        namespace => format!("{} {namespace}/{}", policy.kind, policy.name),
    }
}
