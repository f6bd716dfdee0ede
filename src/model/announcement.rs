//! Which addresses of Services are answered on the link.

use std::net::IpAddr;

use serde::Serialize;

use super::{ObjectKey, Selector};

/// A wish that nodes answer ARP and neighbour discovery for addresses of Services.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Announcement {
    /// The object that says so; its namespace is empty.
    pub key: ObjectKey,
    /// The Services, by their labels, `io.kubernetes.service.namespace` and `io.kubernetes.service.name`.
    pub services: Selector,
    /// The nodes that may answer.
    pub nodes: Selector,
    /// Regular expressions of devices' names; none: every device that leads out.
    pub interfaces: Vec<String>,
    /// Only addresses within these, each from the first to the last; `None`: any.
    pub within: Option<Vec<(IpAddr, IpAddr)>>,
    /// Load balancers' addresses.
    pub balancer: bool,
    /// External IPs.
    pub external: bool,
}

impl Announcement {
    /// The address is within those that are meant.
    pub fn has(&self, address: IpAddr) -> bool {
        let Some(within) = &self.within else { return true };
        within.iter().any(|(first, last)| {
            first.is_ipv4() == address.is_ipv4() && *first <= address && address <= *last
        })
    }
}
