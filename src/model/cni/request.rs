//! What the plugin asks of the agent, checked on both sides of the socket.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Error, ErrorCode, Result};
use crate::model::names::{is_dns_label, is_object_name};
use crate::model::{MacAddress, ObjectKey, PortMapping, Protocol};

/// The specification bounds no container id; runtimes have 64 characters.
const CONTAINER_ID_MAX: usize = 255;
/// IFNAMSIZ less the final zero.
const INTERFACE_MAX: usize = 15;
/// PATH_MAX less the final zero.
const NETNS_MAX: usize = 4095;
const UID_MAX: usize = 128;
/// A pod has no more: its object could not be stored.
const PORT_MAPPINGS_MAX: usize = 4096;

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
    /// K8S_POD_NAMESPACE and K8S_POD_NAME of `CNI_ARGS`; only an ADD needs them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<ObjectKey>,
    /// K8S_POD_UID of `CNI_ARGS`, where the runtime gives it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_uid: Option<String>,
    /// `portMappings` of the runtime's configuration: the pod's host ports.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub port_mappings: Vec<PortMapping>,
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

impl AddResult {
    /// Both addresses, as far as there are two.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.ipv4.map(IpAddr::V4).into_iter().chain(self.ipv6.map(IpAddr::V6))
    }
}

impl Attachment {
    /// Refuses ids and names that the specification or the kernel refuse.
    pub fn validate(&self) -> Result<()> {
        if !is_identifier(&self.container_id) || self.container_id.len() > CONTAINER_ID_MAX {
            return Err(refuse("CNI_CONTAINERID", "is no container id", &self.container_id));
        }
        let is_interface = !self.interface.is_empty()
            && self.interface.len() <= INTERFACE_MAX
            && self.interface != "."
            && self.interface != ".."
            // The kernel takes % for a pattern to be completed.
            && self.interface.bytes().all(|byte| byte.is_ascii_graphic() && !b"/:%".contains(&byte));
        if !is_interface {
            return Err(refuse("CNI_IFNAME", "is no name of an interface", &self.interface));
        }
        Ok(())
    }
}

impl Request {
    /// Refuses what no runtime would send.
    pub fn validate(&self) -> Result<()> {
        self.attachment.validate()?;
        if let Some(netns) = &self.netns {
            validate_netns(netns)?;
        }
        if let Some(pod) = &self.pod {
            if !is_dns_label(&pod.namespace) {
                return Err(refuse("K8S_POD_NAMESPACE", "is no name of a namespace", &pod.namespace));
            }
            if !is_object_name(&pod.name) {
                return Err(refuse("K8S_POD_NAME", "is no name of a pod", &pod.name));
            }
        }
        if let Some(uid) = &self.pod_uid
            && (uid.len() > UID_MAX || !is_identifier(uid))
        {
            return Err(refuse("K8S_POD_UID", "is no UID", uid));
        }
        validate_port_mappings(&self.port_mappings)
    }
}

/// The specification's form of container ids and network names.
pub fn is_identifier(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_alphanumeric())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte))
}

fn validate_port_mappings(mappings: &[PortMapping]) -> Result<()> {
    let refuse = |code, message: &str, mapping: &PortMapping| {
        Err(Error::new(code, message).with_details(mapping.to_string()))
    };
    if mappings.len() > PORT_MAPPINGS_MAX {
        return Err(Error::new(ErrorCode::InvalidConfig, "the pod has too many host ports"));
    }
    for (place, mapping) in mappings.iter().enumerate() {
        if mapping.host_port == 0 || mapping.container_port == 0 {
            return refuse(ErrorCode::InvalidConfig, "a host port or its container port is 0", mapping);
        }
        if mapping.protocol == Protocol::Sctp {
            return refuse(ErrorCode::UnsupportedField, "host ports are for TCP and UDP only", mapping);
        }
        if mappings[..place].iter().any(|before| before.conflicts_with(mapping)) {
            return refuse(ErrorCode::InvalidConfig, "the pod has the same host port twice", mapping);
        }
    }
    Ok(())
}

fn validate_netns(netns: &Path) -> Result<()> {
    let is_plain = netns.is_absolute()
        && netns.as_os_str().len() <= NETNS_MAX
        && netns.components().all(|component| matches!(component, Component::RootDir | Component::Normal(_)));
    match netns.to_str() {
        Some(text) if is_plain && !text.chars().any(char::is_control) => Ok(()),
        _ => Err(refuse("CNI_NETNS", "is no absolute path", &netns.to_string_lossy())),
    }
}

fn refuse(variable: &str, what: &str, value: &str) -> Error {
    // Quoted and cut: it goes into logs and events.
    let shown: String = value.chars().take(64).collect();
    Error::new(ErrorCode::InvalidEnvironment, format!("{variable} {what}")).with_details(format!("{shown:?}"))
}
