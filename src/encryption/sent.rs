//! By which pairs of keys this node has sent with IPsec: packets are numbered under a pair of keys, and a state that
//! is added a second time would use the first numbers again.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::files::{self, Survives};
use crate::model::PublicKey;

/// In the state directory.
const FILE: &str = "ipsec-sent.json";

/// The pairs, by the node's own key.
#[derive(Debug)]
pub struct Sent {
    path: PathBuf,
    pairs: BTreeMap<String, BTreeSet<u32>>,
}

impl Sent {
    /// Reads the record. False: there is none that can be read, so nobody knows what the keys have sent.
    pub fn open(directory: &Path) -> Result<(Self, bool)> {
        let path = directory.join(FILE);
        let read = match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).ok(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
        };
        let is_known = read.is_some();
        Ok((Self { path, pairs: read.unwrap_or_default() }, is_known))
    }

    /// Whether a state of this pair has been added before.
    pub fn has(&self, own: &PublicKey, pair: u32) -> bool {
        self.pairs.get(&own.to_string()).is_some_and(|pairs| pairs.contains(&pair))
    }

    /// Notes pairs before their states are added. Pairs of keys that the node has no more are forgotten.
    pub fn note(&mut self, held: &[PublicKey], pairs: impl Iterator<Item = (PublicKey, u32)>) -> Result<()> {
        let mut new = false;
        for (own, pair) in pairs {
            new |= self.pairs.entry(own.to_string()).or_default().insert(pair);
        }
        if !new && self.path.exists() {
            return Ok(());
        }
        if !held.is_empty() {
            let held: BTreeSet<String> = held.iter().map(ToString::to_string).collect();
            self.pairs.retain(|own, _| held.contains(own));
        }
        self.write()
    }

    /// Forgets a pair whose state could not be added.
    pub fn forget(&mut self, own: &PublicKey, pair: u32) -> Result<()> {
        if let Some(pairs) = self.pairs.get_mut(&own.to_string()) {
            pairs.remove(&pair);
        }
        self.write()
    }

    fn write(&self) -> Result<()> {
        let writing = || format!("writing {}", self.path.display());
        let text = serde_json::to_vec(&self.pairs).with_context(writing)?;
        files::replace(&self.path, &text, 0o600, Survives::Machine).with_context(writing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_sent_is_known_after_a_restart_and_a_torn_record_says_so() -> Result<()> {
        let directory = tempfile::tempdir()?;
        let open = || Sent::open(directory.path());
        let [one, other] = [1, 2].map(|byte| PublicKey([byte; 32]));
        let (mut sent, is_known) = open()?;
        assert!(!is_known);
        sent.note(&[one, other], [(one, 7), (other, 8)].into_iter())?;
        let (mut sent, is_known) = open()?;
        assert!(is_known && sent.has(&one, 7) && sent.has(&other, 8) && !sent.has(&one, 8));
        sent.forget(&other, 8)?;
        // The node has one key alone now.
        sent.note(&[other], [(other, 9)].into_iter())?;
        let (sent, _) = open()?;
        assert!(!sent.has(&one, 7) && !sent.has(&other, 8) && sent.has(&other, 9));
        std::fs::write(directory.path().join(FILE), "{")?;
        assert!(!open()?.1);
        Ok(())
    }
}
