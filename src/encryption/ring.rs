//! The node's keys, by generation, as they are kept in the state directory.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::PrivateKey;
use super::rotation::Generations;
use crate::files::{self, Survives};

/// Where the kernel says which start of the machine this is.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// What the keys are for, and so what their files are called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// WireGuard makes session keys of them.
    Wireguard,
    /// The keys of packets come from them, so a machine that starts anew makes new ones.
    Ipsec,
}

impl Use {
    /// Of even generations, and of odd ones.
    fn keys(self) -> [&'static str; 2] {
        match self {
            Self::Wireguard => ["wireguard.key", "wireguard1.key"],
            Self::Ipsec => ["ipsec.key", "ipsec1.key"],
        }
    }

    fn record(self) -> &'static str {
        match self {
            Self::Wireguard => "wireguard-keys.json",
            Self::Ipsec => "ipsec-keys.json",
        }
    }
}

/// The record as it is kept.
#[derive(Default, Serialize, Deserialize)]
struct Record {
    #[serde(flatten)]
    generations: Generations,
    #[serde(default)]
    boot_id: String,
}

/// Which of two places a generation has.
pub fn slot_of(generation: u32) -> usize {
    (generation % 2) as usize
}

/// The keys; at least the active one is there.
#[derive(Debug)]
pub struct KeyRing {
    directory: PathBuf,
    of: Use,
    generations: Generations,
    keys: [Option<PrivateKey>; 2],
    /// Nobody has ever seen a key of this node.
    is_new: bool,
    /// A file may be left of a generation that there is none of any more.
    has_stray: bool,
}

impl KeyRing {
    /// Reads the keys of the state directory; makes one where there is none.
    pub fn open(directory: &Path, of: Use) -> Result<Self> {
        let path = directory.join(of.record());
        let record: Record = match fs::read(&path) {
            // A torn one: the other nodes say which generation it is.
            Ok(text) => serde_json::from_slice(&text).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Record::default(),
            Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
        };
        let generations = record.generations;
        let is_new = !path.exists() && of.keys().iter().all(|name| !directory.join(name).exists());
        let (directory, keys) = (directory.to_owned(), [None, None]);
        let mut ring = Self { directory, of, generations, keys, is_new, has_stray: true };
        let now = boot_id();
        if of == Use::Ipsec && (now.is_empty() || record.boot_id != now) {
            return ring.renew_all();
        }
        for generation in std::iter::once(generations.active).chain(generations.other) {
            let slot = slot_of(generation);
            ring.keys[slot] = Some(PrivateKey::of(&ring.path(slot))?);
        }
        ring.remove_stray()?;
        Ok(ring)
    }

    /// Another key of the active generation: no packet's key is ever used again from its first number.
    pub fn renew_all(mut self) -> Result<Self> {
        let slot = slot_of(self.generations.active);
        self.keys[slot] = Some(PrivateKey::renew(&self.path(slot))?);
        let is_new = self.is_new;
        self.forget_other()?;
        self.is_new = is_new;
        Ok(self)
    }

    /// Makes another key of a generation that the node has one of.
    pub fn renew(&mut self, generation: u32) -> Result<()> {
        let slot = slot_of(generation);
        self.keys[slot] = Some(PrivateKey::renew(&self.path(slot))?);
        Ok(())
    }

    fn path(&self, slot: usize) -> PathBuf {
        self.directory.join(self.of.keys()[slot])
    }

    /// Of which generations there are keys.
    pub fn generations(&self) -> Generations {
        self.generations
    }

    /// The key of a generation.
    pub fn key(&self, generation: u32) -> Option<&PrivateKey> {
        self.keys[slot_of(generation)].as_ref().filter(|_| self.generations.has(generation))
    }

    /// How old the active key is.
    pub fn age(&self) -> Duration {
        let made = fs::metadata(self.path(slot_of(self.generations.active)))
            .and_then(|metadata| metadata.modified());
        made.ok().and_then(|made| SystemTime::now().duration_since(made).ok()).unwrap_or_default()
    }

    /// Makes a key of a generation beside the active one.
    pub fn begin(&mut self, generation: u32) -> Result<()> {
        let slot = slot_of(generation);
        self.keys[slot] = Some(PrivateKey::renew(&self.path(slot))?);
        self.record(Generations { other: Some(generation), ..self.generations })
    }

    /// The other generation is the active one from now on, also after a restart.
    pub fn turn(&mut self) -> Result<()> {
        let Some(other) = self.generations.other else { return Ok(()) };
        self.record(Generations { active: other, other: Some(self.generations.active) })
    }

    /// Nobody has ever seen a key of this node: it may begin with any generation.
    pub fn is_new(&self) -> bool {
        self.is_new
    }

    /// The only key from now on is a new one, of this generation. Killed in the middle, the node has the
    /// generations that it had, perhaps with another key.
    pub fn jump(&mut self, generation: u32) -> Result<()> {
        let slot = slot_of(generation);
        self.keys[slot] = Some(PrivateKey::renew(&self.path(slot))?);
        self.record(Generations { active: generation, other: None })?;
        self.keys[1 - slot] = None;
        self.remove_stray()
    }

    /// Forgets the other key.
    pub fn forget_other(&mut self) -> Result<()> {
        self.record(Generations { other: None, ..self.generations })?;
        self.keys[1 - slot_of(self.generations.active)] = None;
        self.remove_stray()
    }

    /// Removes the file of the key that is not there any more, if that has not been done.
    pub fn remove_stray(&mut self) -> Result<()> {
        if !self.has_stray || self.generations.other.is_some() {
            return Ok(());
        }
        let path = self.path(1 - slot_of(self.generations.active));
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("removing the former key {}", path.display()));
            }
            _ => self.has_stray = false,
        }
        Ok(())
    }

    fn record(&mut self, generations: Generations) -> Result<()> {
        let path = self.directory.join(self.of.record());
        let writing = || format!("writing {}", path.display());
        let record = Record { generations, boot_id: boot_id() };
        let text = serde_json::to_vec(&record).with_context(writing)?;
        files::replace(&path, &text, 0o600, Survives::Machine).with_context(writing)?;
        (self.generations, self.is_new, self.has_stray) = (generations, false, true);
        Ok(())
    }
}

fn boot_id() -> String {
    fs::read_to_string(BOOT_ID).map(|text| text.trim().to_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restart_in_the_middle_finds_what_was_there() -> Result<()> {
        let directory = tempfile::tempdir()?;
        let mut ring = KeyRing::open(directory.path(), Use::Wireguard)?;
        let first = ring.key(0).cloned();
        ring.begin(1)?;
        let second = ring.key(1).cloned();
        assert!(first.is_some() && second.is_some() && first != second);
        let mut ring = KeyRing::open(directory.path(), Use::Wireguard)?;
        assert_eq!(ring.generations(), Generations { active: 0, other: Some(1) });
        assert_eq!((ring.key(0).cloned(), ring.key(1).cloned()), (first, second.clone()));
        ring.turn()?;
        let mut ring = KeyRing::open(directory.path(), Use::Wireguard)?;
        assert_eq!(ring.generations(), Generations { active: 1, other: Some(0) });
        ring.forget_other()?;
        assert!(ring.key(0).is_none() && !directory.path().join("wireguard.key").exists());
        let ring = KeyRing::open(directory.path(), Use::Wireguard)?;
        assert_eq!(ring.key(1).cloned(), second);
        assert!(ring.age() < Duration::from_secs(3600));
        Ok(())
    }

    #[test]
    fn a_jump_leaves_one_new_key_of_any_distance() -> Result<()> {
        for distance in 1..7 {
            let directory = tempfile::tempdir()?;
            let mut ring = KeyRing::open(directory.path(), Use::Wireguard)?;
            assert!(ring.is_new());
            let first = ring.key(0).cloned();
            assert!(!KeyRing::open(directory.path(), Use::Wireguard)?.is_new());
            ring.begin(1)?;
            ring.jump(1 + distance)?;
            let key = ring.key(1 + distance).cloned();
            let again = KeyRing::open(directory.path(), Use::Wireguard)?;
            assert_eq!(again.generations(), Generations { active: 1 + distance, other: None });
            assert_eq!(again.key(1 + distance).cloned(), key);
            assert!(key.is_some() && key != first);
            let names = ["wireguard.key", "wireguard1.key"];
            let files = names.map(|name| directory.path().join(name).exists());
            assert_eq!(files.iter().filter(|is_there| **is_there).count(), 1);
        }
        Ok(())
    }

    /// Killed between the record and the file, or before a jump had its record.
    #[test]
    fn a_key_of_no_generation_goes_from_the_disk() -> Result<()> {
        let directory = tempfile::tempdir()?;
        drop(KeyRing::open(directory.path(), Use::Wireguard)?);
        let stray = directory.path().join("wireguard1.key");
        PrivateKey::renew(&stray)?;
        let mut ring = KeyRing::open(directory.path(), Use::Wireguard)?;
        assert!(!stray.exists() && ring.key(0).is_some());
        // One that cannot be removed now is removed later.
        ring.begin(1)?;
        fs::remove_file(&stray)?;
        fs::create_dir(&stray)?;
        assert!(ring.forget_other().is_err());
        assert_eq!(ring.generations(), Generations { active: 0, other: None });
        fs::remove_dir(&stray)?;
        PrivateKey::renew(&stray)?;
        ring.remove_stray()?;
        assert!(!stray.exists());
        Ok(())
    }

    #[test]
    fn keys_of_ipsec_do_not_outlive_the_machine() -> Result<()> {
        let directory = tempfile::tempdir()?;
        let open = || KeyRing::open(directory.path(), Use::Ipsec);
        let mut ring = open()?;
        ring.jump(6)?;
        let key = ring.key(6).cloned();
        assert_eq!(open()?.key(6).cloned(), key);
        let record = directory.path().join("ipsec-keys.json");
        fs::write(&record, r#"{"active":6,"other":7,"boot_id":"another"}"#)?;
        let ring = open()?;
        assert_eq!(ring.generations(), Generations { active: 6, other: None });
        assert!(ring.key(6).is_some() && ring.key(6).cloned() != key);
        assert_eq!(open()?.key(6), ring.key(6));
        Ok(())
    }
}
