//! The node's WireGuard key: made here, and never told.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use anyhow::{Context, Result};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use boringtun::x25519;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::files::{self, Survives};
use crate::model::PublicKey;

/// The private half. It is never logged.
#[derive(Clone, PartialEq, Eq)]
pub struct PrivateKey([u8; 32]);

impl PrivateKey {
    /// Reads the key of a file; makes one where there is none.
    pub fn of(path: &Path) -> Result<Self> {
        let there = match fs::read_to_string(path) {
            Ok(text) => Self::parse(text.trim()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
        };
        match there {
            Some(key) => Ok(key),
            // None, or one that was cut off when the machine lost power.
            None => Self::renew(path),
        }
    }

    /// Makes another key, which replaces the one of the file.
    pub fn renew(path: &Path) -> Result<Self> {
        let making = || format!("making {}", path.display());
        let mut bytes = [0; 32];
        File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes)).with_context(making)?;
        let key = Self::clamped(bytes);
        // A key that the others know must be there after the power is back.
        files::replace(path, key.text().as_bytes(), 0o600, Survives::Machine).with_context(making)?;
        Ok(key)
    }

    /// The public half.
    pub fn public(&self) -> PublicKey {
        PublicKey(x25519::PublicKey::from(&self.secret()).to_bytes())
    }

    /// The secret that this key shares with another one; none with a key that shares the same with everybody.
    pub fn shared_with(&self, peer: &PublicKey) -> Option<[u8; 32]> {
        let shared = self.secret().diffie_hellman(&x25519::PublicKey::from(peer.0));
        shared.was_contributory().then(|| shared.to_bytes())
    }

    /// The bytes, for the kernel.
    pub fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// As the Noise library wants it.
    pub(super) fn secret(&self) -> x25519::StaticSecret {
        x25519::StaticSecret::from(self.0)
    }

    fn text(&self) -> String {
        STANDARD.encode(self.0) + "\n"
    }

    fn parse(text: &str) -> Option<Self> {
        STANDARD.decode(text).ok()?.try_into().ok().map(Self::clamped)
    }

    /// The form that X25519 computes with, and that the kernel keeps. The kernel compares a key that it is given
    /// with the one that it has: in another form the same key would be a new one, and end all sessions.
    fn clamped(mut bytes: [u8; 32]) -> Self {
        bytes[0] &= 0xf8;
        bytes[31] = bytes[31] & 0x7f | 0x40;
        Self(bytes)
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the private key of {}", self.public())
    }
}

impl Serialize for PrivateKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.text().trim())
    }
}

impl<'de> Deserialize<'de> for PrivateKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).ok_or_else(|| de::Error::custom("must be 32 bytes in base64"))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_key_stays_is_nobody_elses_and_is_not_told() -> Result<()> {
        let directory = tempfile::tempdir()?;
        let (path, other) = (directory.path().join("one"), directory.path().join("other"));
        let key = PrivateKey::of(&path)?;
        assert_eq!(PrivateKey::of(&path)?, key);
        assert_ne!(PrivateKey::of(&other)?, key);
        assert_eq!(fs::metadata(&path)?.permissions().mode() & 0o777, 0o600);
        assert!(!format!("{key:?}").contains(key.text().trim()));
        assert_eq!(key.public().to_string().parse(), Ok(key.public()));
        for _ in 0..20 {
            let bytes = *PrivateKey::renew(&path)?.bytes();
            assert_eq!((bytes[0] & 7, bytes[31] & 0xc0), (0, 0x40), "the kernel would keep another form");
        }
        let renewed = PrivateKey::renew(&path)?;
        assert_ne!(renewed, key);
        assert_eq!(PrivateKey::of(&path)?, renewed);
        // As an agent before this one wrote it: the same key, as its public half shows.
        let raw = [0xff; 32];
        fs::write(&path, STANDARD.encode(raw))?;
        let key = PrivateKey::of(&path)?;
        assert_eq!((key.bytes()[0], key.bytes()[31]), (0xf8, 0x7f));
        assert_eq!(key.public().0, x25519::PublicKey::from(&x25519::StaticSecret::from(raw)).to_bytes());
        fs::write(&path, "torn")?;
        assert_ne!(PrivateKey::of(&path)?, renewed);
        Ok(())
    }
}
