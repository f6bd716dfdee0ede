//! The network configuration, as the runtime writes it to standard input.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use super::{Attachment, Error, ErrorCode, Result, VERSIONS, is_identifier};
use crate::api::DEFAULT_SOCKET;
use crate::model::{PortMapping, Protocol};

/// Longer ones no runtime has; a GC that lists a full node's pods has a tenth.
pub(super) const CONFIG_BYTES_MAX: u64 = 1024 * 1024;
const DEFAULT_STATE_DIRECTORY: &str = "/var/lib/weir";
const NAME_MAX: usize = 255;

/// The keys that matter to us. Others (`capabilities`, `args`, ...) claim nothing and are ignored.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub(super) struct Config {
    #[serde(rename = "cniVersion", default)]
    pub(super) version: String,
    #[serde(default)]
    name: String,
    /// The plugin that the configuration asks for.
    #[serde(rename = "type", default)]
    pub(super) plugin: String,
    /// Where the agent listens.
    #[serde(default = "default_socket")]
    pub(super) socket: PathBuf,
    /// The agent's `--state-dir`: deletions are queued there while it is down.
    #[serde(rename = "stateDir", default = "default_state_directory")]
    pub(super) state_directory: PathBuf,
    #[serde(rename = "prevResult", default)]
    pub(super) previous_result: Option<Value>,
    #[serde(rename = "cni.dev/valid-attachments", default)]
    pub(super) valid_attachments: Option<Vec<Attachment>>,
    #[serde(rename = "runtimeConfig", default)]
    runtime: Option<RuntimeConfig>,
}

/// What the runtime adds because our configuration says that we are capable of it.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
struct RuntimeConfig {
    #[serde(rename = "portMappings", default)]
    port_mappings: Option<Vec<RuntimePortMapping>>,
}

/// A row of `portMappings` (CNI conventions, "dynamic plugin specific fields"); containerd writes the names
/// with a capital, which plugins in Go do not notice.
#[derive(Clone, Debug, PartialEq, Deserialize)]
struct RuntimePortMapping {
    #[serde(rename = "hostPort", alias = "HostPort", default)]
    host_port: u16,
    #[serde(rename = "containerPort", alias = "ContainerPort")]
    container_port: u16,
    #[serde(alias = "Protocol", default)]
    protocol: String,
    #[serde(rename = "hostIP", alias = "HostIP", default)]
    host_ip: String,
}

impl Config {
    /// Understands a configuration and refuses what cannot be right.
    pub(super) fn parse(text: &[u8]) -> Result<Self> {
        let value: Value = serde_json::from_slice(text).map_err(|error| {
            Error::new(ErrorCode::Decode, "the network configuration is no JSON")
                .with_details(error.to_string())
        })?;
        if !value.is_object() {
            return Err(invalid("the network configuration is no object"));
        }
        let config = Self::deserialize(&value).map_err(|error| {
            invalid("the network configuration has a key of the wrong kind").with_details(error.to_string())
        })?;
        if !VERSIONS.contains(&config.version.as_str()) {
            let shown: String = config.version.chars().take(32).collect();
            return Err(Error::new(
                ErrorCode::IncompatibleVersion,
                "the network configuration has a version that we do not speak",
            )
            .with_details(format!("it is {shown:?}, we speak {}", VERSIONS.join(", "))));
        }
        if !is_identifier(&config.name) || config.name.len() > NAME_MAX {
            return Err(invalid("the network's name is missing or not acceptable"));
        }
        for (key, path) in [("socket", &config.socket), ("stateDir", &config.state_directory)] {
            if !is_plain_absolute(path) {
                return Err(invalid(format!("{key} is no absolute path")));
            }
        }
        Ok(config)
    }

    /// The pod's host ports; the agent refuses those that it cannot serve.
    pub(super) fn port_mappings(&self) -> Result<Vec<PortMapping>> {
        let mappings = self.runtime.iter().flat_map(|runtime| runtime.port_mappings.iter().flatten());
        // Port 0: a port of the container that the node does not have.
        mappings.filter(|mapping| mapping.host_port != 0).map(RuntimePortMapping::understood).collect()
    }

    /// True if the configuration's version is `version` or newer.
    pub(super) fn is_at_least(&self, version: &str) -> bool {
        let place = |wanted: &str| VERSIONS.iter().position(|version| *version == wanted);
        place(&self.version) >= place(version)
    }
}

impl RuntimePortMapping {
    fn understood(&self) -> Result<PortMapping> {
        let refuse = |what: &str, value: &str| {
            let shown: String = value.chars().take(64).collect();
            Err(invalid(format!("{what} of portMappings is not acceptable"))
                .with_details(format!("{shown:?}")))
        };
        let protocol = match self.protocol.to_ascii_lowercase().as_str() {
            "" | "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            "sctp" => Protocol::Sctp,
            _ => return refuse("protocol", &self.protocol),
        };
        let host_ip = match self.host_ip.as_str() {
            "" => None,
            text => match text.parse() {
                Ok(address) => Some(address),
                Err(_) => return refuse("hostIP", text),
            },
        };
        Ok(PortMapping { host_port: self.host_port, container_port: self.container_port, protocol, host_ip })
    }
}

fn is_plain_absolute(path: &Path) -> bool {
    use std::path::Component::{Normal, RootDir};
    let is_plain = path.components().all(|component| matches!(component, RootDir | Normal(_)));
    path.is_absolute() && is_plain && !path.to_string_lossy().contains('\0')
}

fn default_socket() -> PathBuf {
    PathBuf::from(DEFAULT_SOCKET)
}

fn default_state_directory() -> PathBuf {
    PathBuf::from(DEFAULT_STATE_DIRECTORY)
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorCode::InvalidConfig, message)
}
