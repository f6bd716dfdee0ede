//! How a node encrypts, as it tells the others.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// The public half of a node's WireGuard key, written in base64 as WireGuard's tools do.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey(pub [u8; 32]);

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&STANDARD.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for PublicKey {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bytes = STANDARD.decode(text).ok().and_then(|bytes| bytes.try_into().ok());
        bytes.map(Self).ok_or_else(|| "must be a WireGuard key: 32 bytes in base64".to_owned())
    }
}

impl Serialize for PublicKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PublicKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// How what goes between nodes is encrypted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeyProtocol {
    /// WireGuard.
    #[default]
    Wireguard,
    /// ESP in tunnel mode.
    Ipsec,
}

impl KeyProtocol {
    /// As the WeirNode has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Wireguard => "wireguard",
            Self::Ipsec => "ipsec",
        }
    }
}

/// What a node has published of its encryption.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeKey {
    /// What it is a key of.
    #[serde(default)]
    pub protocol: KeyProtocol,
    /// The key by which it sends.
    #[serde(flatten)]
    pub active: KeyAt,
    /// The next key or the former one, while keys change: it is received by, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub other: Option<KeyAt>,
}

/// A key of a node, and where it listens with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyAt {
    /// The public half.
    pub public_key: PublicKey,
    /// Where it listens, by UDP.
    pub port: u16,
    /// Which of the node's keys it is: keys of one generation belong together.
    #[serde(default)]
    pub generation: u32,
    /// Stands for the other nodes' keys of this generation that the node receives by (IPsec).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub receives: Option<u64>,
}

impl NodeKey {
    /// Where the node listens.
    pub fn ports(&self) -> impl Iterator<Item = u16> + use<> {
        let ports = std::iter::once(self.active.port).chain(self.other.map(|key| key.port));
        ports.filter(|port| *port > 0)
    }

    /// The key of a generation.
    pub fn at(&self, generation: u32) -> Option<&KeyAt> {
        std::iter::once(&self.active).chain(&self.other).find(|key| key.generation == generation)
    }
}

/// Another node, with all keys that it has published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncryptingNode {
    /// Its name.
    pub name: String,
    /// Where it is reached.
    pub address: IpAddr,
    /// What it has published.
    pub key: NodeKey,
    /// What it may send from, and what is sent to it.
    pub allowed: Vec<IpNet>,
}

impl EncryptingNode {
    /// As the device knows it that has this node's key of a generation.
    pub fn peer(&self, generation: u32) -> Option<EncryptionPeer> {
        let key = self.key.at(generation)?;
        Some(EncryptionPeer {
            node: self.name.clone(),
            public_key: key.public_key,
            endpoint: SocketAddr::new(self.address, key.port),
            allowed: self.allowed.clone(),
        })
    }
}

/// Another node, as the device that encrypts knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EncryptionPeer {
    /// The node's name.
    pub node: String,
    /// Its key.
    pub public_key: PublicKey,
    /// Where it listens.
    pub endpoint: SocketAddr,
    /// What it may send from, and what is sent to it.
    pub allowed: Vec<IpNet>,
}

impl EncryptionPeer {
    /// The node's own addresses stand for its tunnels, its pod CIDRs for its pods: pods come and go without
    /// a change.
    pub fn allowed_of(addresses: &[IpAddr], pod_cidrs: &[IpNet]) -> Vec<IpNet> {
        let mut allowed: Vec<IpNet> = addresses.iter().map(|address| IpNet::from(*address)).collect();
        allowed.extend(pod_cidrs.iter().map(IpNet::trunc));
        allowed.sort_unstable();
        allowed.dedup();
        allowed
    }
}

/// How a peer is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerState {
    /// Its key.
    pub public_key: PublicKey,
    /// Where its packets go.
    pub endpoint: Option<SocketAddr>,
    /// Seconds since the last handshake; none: there was none.
    pub last_handshake_seconds: Option<u64>,
    /// Bytes of packets that came from it.
    pub received_bytes: u64,
    /// Bytes of packets that went to it.
    pub sent_bytes: u64,
    /// Packets that could not be encrypted, decrypted or sent; those with a source that is not the peer's.
    pub errors: u64,
}
