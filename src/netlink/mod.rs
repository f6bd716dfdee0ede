//! Devices, addresses, routes and neighbours, through the kernel's rtnetlink.
//!
//! Blocking on purpose: the kernel answers at once, and the calls that work in a
//! pod's network namespace need a thread of their own, which no runtime gives.
//! Callers within tokio use `spawn_blocking`. Requests that belong together go
//! to the kernel in one datagram.
//!
//! ```text
//! announce     gratuitous ARP and unsolicited neighbour advertisements
//! address      the node's addresses, and news of them
//! connection   the socket: batches of requests, dumps
//! descriptors  open descriptors for another process
//! ethtool      what a device's driver does by itself
//! netfilter    whether the node has rules that drop what is forwarded
//! listen       messages to groups of listeners
//! namespace    a thread that enters a pod's namespace
//! ipsec        whether the node has policies of its own, and news of them
//! link         devices: find, delete, raise, VXLAN
//! news         that something changed
//! outward      devices that may lead out of the node
//! pod          the link between a pod and its node
//! privileges   giving up capabilities
//! proxy        the proxy's network namespace
//! queue        a pair of devices that delays packets
//! route        routes and neighbours that are ours
//! shape        what a pod may send
//! socket       ending sockets, through sock_diag
//! sysctl       /proc/sys/net
//! tun          a TUN device
//! wireguard    the kernel's WireGuard
//! ```

mod address;
mod announce;
mod classes;
mod connection;
mod descriptors;
mod ethtool;
mod ipsec;
mod link;
mod listen;
mod namespace;
mod netfilter;
mod news;
mod other_sockets;
mod outward;
mod pod;
mod privileges;
mod proxy;
mod queue;
mod route;
mod shape;
mod socket;
mod sysctl;
mod tun;
mod wireguard;
mod xfrm;
mod xfrm_device;

use std::io;
use std::path::PathBuf;

pub use address::{address_news, local_addresses};
pub use announce::{Listening, announce};
pub use classes::{classes, delete_class, ensure_classes, limit_class};
pub use descriptors::{DESCRIPTORS_MAX, receive_with_descriptors, send_with_descriptors};
pub use ethtool::{active_features, set_tx_checksum};
pub use ipsec::{ipsec_news, ipsec_policies};
pub use link::{
    Link, add_address, addresses_of, delete_address, delete_link, devices_with, ensure_vxlan, link,
    link_index, links, raise_link,
};
pub use namespace::{namespace_cookie, open_namespace, within};
pub use netfilter::forward_drops;
pub use news::{ALL_NEWS, Heard, News, kernel_news};
pub use other_sockets::{LoopbackPort, end_process, listening_sockets};
pub use outward::{OutwardDevice, Way, outward_devices};
pub use pod::{
    GATEWAY_IPV4, GATEWAY_IPV6, POD_ROUTE_PROTOCOL, PodLink, PodLinkSpec, create_pod_link, raise_pod_link,
    verify_pod_link,
};
pub use privileges::{keep_transparent_sockets_only, raise_descriptor_limit};
pub use proxy::{ProxyLink, create_proxy_link, find_proxy_link, new_namespace, proxy_listeners};
pub use queue::{TokenBucket, ensure_queue};
pub use route::{NODE_ROUTE_PROTOCOL, Route, neighbours, node_routes, sync_neighbours, sync_routes};
pub use shape::{is_pod_limited, limit_pod, queue_kinds};
pub use socket::{destroy_connection, destroy_socket};
pub use sysctl::{get_sysctl, set_sysctl, set_sysctl_root};
pub use tun::{TunOffload, ensure_tun, set_tun_offload, take_tun};
pub use wireguard::{ensure_wireguard, set_wireguard_peers, wireguard_peers};
pub use xfrm::{XFRM_KEY_BYTES, Xfrm, XfrmCounts, XfrmPolicy, XfrmState, XfrmWay};
pub use xfrm_device::{ensure_xfrm_device, put_xfrm_ways, remove_xfrm_ways};

/// What went wrong between us and the kernel.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused.
    #[error("{action}: {cause}")]
    Kernel {
        /// What was asked of it, in the gerund.
        action: String,
        /// Its answer; said with the action, so it is no source.
        cause: io::Error,
    },
    /// The path is no network namespace that a pod may have.
    #[error("network namespace {path}: {reason}")]
    Namespace {
        /// As it was given.
        path: PathBuf,
        /// Why not.
        reason: String,
        /// There is nothing at that path.
        is_absent: bool,
    },
    /// The pod has a device of that name already.
    #[error("the pod has a device {0} already")]
    Taken(String),
    /// A device, address or route is not what it was made to be.
    #[error("{0}")]
    Different(String),
}

/// The result of every function here.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    fn kernel(action: impl Into<String>, cause: impl Into<io::Error>) -> Self {
        Self::Kernel { action: action.into(), cause: cause.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a16_the_kernels_answer_is_said_once() {
        let error = Error::kernel("adding route 10.61.2.0/24", io::Error::from_raw_os_error(17));
        let text = format!("{:#}", anyhow::Error::new(error).context("writing routes"));
        assert_eq!(text, "writing routes: adding route 10.61.2.0/24: File exists (os error 17)");
    }
}
