//! The container network interface: what a runtime asks through `weir-cni`.
//!
//! ```text
//! runtime --stdin, CNI_* --> weir-cni --socket--> agent (endpoint::Manager)
//!    config, environment      plugin                 does the work
//!    result, error            queue, when the agent is down
//! ```
//!
//! Everything that a runtime hands over is checked here before anything is done
//! with it; nothing of it ever becomes part of a path.

mod error;
pub mod install;

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use error::{Error, ErrorCode};

use crate::model::{MacAddress, ObjectKey};

/// One interface of one container: what the specification calls an attachment.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Attachment {
    /// `CNI_CONTAINERID`.
    #[serde(alias = "containerID")]
    pub container_id: String,
    /// `CNI_IFNAME`.
    #[serde(alias = "ifname")]
    pub interface: String,
}

/// An ADD, DEL or CHECK, as `weir-cni` hands it to the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Which container, which interface.
    #[serde(flatten)]
    pub attachment: Attachment,
    /// `CNI_NETNS`; a DEL may have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub netns: Option<PathBuf>,
    /// K8S_POD_NAMESPACE and K8S_POD_NAME of `CNI_ARGS`; a DEL may have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<ObjectKey>,
    /// K8S_POD_UID of `CNI_ARGS`, where the runtime gives it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_uid: Option<String>,
}

/// A pod's connection, as the agent made it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddResult {
    /// Name of the device on the node.
    pub host_interface: String,
    /// Its hardware address.
    pub host_mac: MacAddress,
    /// Name of the device inside the pod.
    pub interface: String,
    /// Its hardware address.
    pub mac: MacAddress,
    /// Path of the pod's network namespace.
    pub netns: PathBuf,
    /// The pod's IPv4 address.
    pub ipv4: Option<Ipv4Addr>,
    /// The pod's IPv6 address.
    pub ipv6: Option<Ipv6Addr>,
    /// MTU of the link.
    pub mtu: u32,
}
