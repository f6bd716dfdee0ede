//! The suite `service`: what a Service costs, beside kube-proxy itself.
//!
//! One API server, which an agent and two kube-proxies (nftables and iptables mode) follow at the same time, each
//! on a node of its own. The nodes are namespaces that know nothing of each other: each has a client and the same
//! four servers under the same addresses, so one set of EndpointSlices is true on all of them. kube-proxy's pods
//! are connected as by the plugin `ptp`: veth pairs and the kernel's routes.

mod forwarding;
mod kube_proxy;
mod maglev;
mod population;
mod scale;

use anyhow::Result;

pub use self::forwarding::generate;
use crate::row::Row;

const SECTIONS: [crate::Section; 3] = [
    ("scale", "connect_p50/30000_vs_10", scale::rows),
    ("node_port", "node_port/snat/vs_nftables", forwarding::rows),
    ("maglev", "maglev/imbalance", || Ok(maglev::rows())),
];

/// Measures every row, or those of the section that `ONLY` names.
pub fn rows() -> Result<Vec<Row>> {
    crate::measure_sections("service", &SECTIONS)
}
