//! The peers of the device that encrypts: every other node that has published a key.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};

use super::{Drift, Problem, Round, Sink};
use crate::agent::compute::Desired;
use crate::agent::restart::Restart;
use crate::datapath::{Datapath, Encrypted};
use crate::encryption::Device;
use crate::files::{self, Survives};
use crate::model::{EncryptingNode, EncryptionPeer, Node, NodeKey};
use crate::netlink::News;
use crate::node::underlay_address;

/// The nodes whose key was seen, with it: what a restart must not forget.
const FILE: &str = "encryption-peers.json";

/// Whom the rows of `addresses` and `prefixes` say that nothing goes to in plain.
pub type Shared = Arc<Mutex<Encrypted>>;

/// Adds peers before anything is sent to them, and never takes back that a node encrypts while it is there.
pub struct Encryption {
    device: Arc<Device>,
    datapath: Arc<Datapath>,
    is_strict: bool,
    file: PathBuf,
    restart: Restart,
    /// By the node's name.
    seen: BTreeMap<String, NodeKey>,
    shared: Shared,
    /// What the device was told last; none: it may have forgotten.
    told: Option<Vec<EncryptingNode>>,
    is_broken: bool,
    /// The file has what was seen.
    is_stored: bool,
}

impl Encryption {
    /// Remembers whose keys an agent before this one has seen.
    pub fn new(
        device: Arc<Device>,
        datapath: Arc<Datapath>,
        is_strict: bool,
        state_directory: &std::path::Path,
        restart: Restart,
        shared: Shared,
    ) -> Result<Self> {
        let file = state_directory.join(FILE);
        let seen = match std::fs::read(&file) {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_else(|error| {
                tracing::warn!(file = %file.display(), %error, "the keys that were seen are not readable");
                BTreeMap::new()
            }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(error).with_context(|| format!("reading {}", file.display())),
        };
        // Until it is known who has a key: a row that an agent before this one has flagged stays so.
        *shared.lock().unwrap_or_else(PoisonError::into_inner) = Encrypted::Everybody;
        let (told, is_broken, is_stored) = (None, false, true);
        Ok(Self { device, datapath, is_strict, file, restart, seen, shared, told, is_broken, is_stored })
    }

    /// What the rows of addresses are to say.
    pub fn shared(&self) -> Shared {
        self.shared.clone()
    }

    /// Notes new keys, and forgets nodes that are no more. Before anything else: what was seen counts also if
    /// the next step fails.
    fn remember(&mut self, desired: &Desired) -> Result<()> {
        let mut seen = self.seen.clone();
        let names: BTreeSet<&str> = desired.nodes.iter().map(|node| node.name.as_str()).collect();
        seen.retain(|name, _| names.contains(name.as_str()));
        for node in &desired.nodes {
            if let Some(key) = desired.keys.get(&Arc::from(node.name.as_str())) {
                seen.insert(node.name.clone(), *key);
            }
        }
        self.is_stored &= seen == self.seen;
        self.seen = seen;
        if !self.is_stored {
            let text = serde_json::to_vec(&self.seen).context("writing the keys that were seen")?;
            files::replace(&self.file, &text, 0o600, Survives::Machine)
                .with_context(|| format!("writing {}", self.file.display()))?;
            self.is_stored = true;
        }
        Ok(())
    }

    /// Says in the rows whom nothing goes to in plain.
    fn flag(&self, nodes: &[Arc<Node>]) {
        let encrypted = if self.is_strict {
            Encrypted::Everybody
        } else {
            let seen = nodes.iter().filter(|node| self.seen.contains_key(&node.name));
            Encrypted::Nodes(seen.flat_map(|node| node.addresses.iter().copied()).collect())
        };
        *self.shared.lock().unwrap_or_else(PoisonError::into_inner) = encrypted;
    }

    /// The peers, and what is missing.
    fn peers(&self, desired: &Desired) -> (Vec<EncryptingNode>, Vec<Problem>) {
        let (mut peers, mut problems) = (Vec::new(), Vec::new());
        let has_ipv4 = desired.node_addresses.ipv4.is_some();
        for node in &desired.nodes {
            let Some(address) = underlay_address(node, has_ipv4) else { continue };
            match self.seen.get(&node.name) {
                Some(key) if key.protocol == self.device.protocol() => peers.push(peer(node, address, key)),
                Some(key) => problems.push(Problem::new(format!(
                    "node {} encrypts by {}, and this one by {}: nothing goes to its pods",
                    node.name,
                    key.protocol.name(),
                    self.device.protocol().name()
                ))),
                None if self.is_strict => problems.push(Problem::new(format!(
                    "node {} has published no key: nothing goes to its pods (WEIR_ENCRYPTION there, or \
                     WEIR_ENCRYPTION_STRICT=false here)",
                    node.name
                ))),
                None => {}
            }
        }
        (peers, problems)
    }
}

fn peer(node: &Node, address: IpAddr, key: &NodeKey) -> EncryptingNode {
    EncryptingNode {
        name: node.name.clone(),
        address,
        key: *key,
        allowed: EncryptionPeer::allowed_of(&node.addresses, &node.pod_cidrs),
    }
}

impl Sink for Encryption {
    fn name(&self) -> &'static str {
        "encryption"
    }

    fn hears(&self) -> &'static [News] {
        &[News::Links, News::Filters]
    }

    fn compare(&mut self) -> Result<Vec<Drift>> {
        let mut drifts: Vec<Drift> = self.device.look()?.map(Drift::one).into_iter().collect();
        let is_attached = |ifindex| self.datapath.verify_encrypted(ifindex).is_ok();
        if drifts.is_empty() && !self.device.ifindices().into_iter().all(is_attached) {
            drifts.push(Drift::one("programs on the devices that encrypt"));
        }
        self.is_broken = !drifts.is_empty();
        // Whoever has the peers may have been changed by somebody else.
        self.told = None;
        Ok(drifts)
    }

    fn write(&mut self, round: &mut Round<'_>) -> Result<Vec<Problem>> {
        let desired = round.desired;
        let remembered = self.remember(desired);
        // Before anything that can fail: rows say whom nothing goes to in plain, whatever becomes of the device.
        self.flag(&desired.nodes);
        remembered?;
        if self.is_broken {
            if !self.device.mend().context("making the device that encrypts as it was")? {
                self.restart
                    .request("a device that encrypts was made anew, and the programs know the old one");
                return Ok(Vec::new());
            }
            for ifindex in self.device.ifindices() {
                self.datapath.attach_encrypted(ifindex)?;
            }
            (self.is_broken, self.told) = (false, None);
        }
        let (peers, mut problems) = self.peers(desired);
        if self.told.as_ref() != Some(&peers) {
            self.device.set_nodes(&peers)?;
            self.told = Some(peers);
        }
        problems.extend(self.device.problems().into_iter().map(Problem::new));
        Ok(problems)
    }
}
