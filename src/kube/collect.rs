//! Collection of identities in a directory of manifests. There is no operator: the agent of every node
//! collects, by the operator's protocol (`operator/identities.rs` has the argument), on files.
//!
//! The mark is the same annotation, in a new file that is renamed over the old one; an agent takes it away
//! in the same way before a pod gets the identity. Files have no versions that a deletion could name, so
//! one is taken away first, renamed to what no source reads, and looked at. If it is not the one
//! that was due, it is linked back, which fails where somebody has made it anew, as it should. While it is away
//! it is like one that was deleted: agents make again what their pods have. What an agent left behind that
//! was killed right then, its own next pass puts back, or that of any agent that has seen it in two.
//!
//! Only files that Weir writes are marked or deleted: `identity-N.yaml` that holds the identity N and nothing
//! else. But whoever's endpoints are in the directory, and in whatever file, their identities are in use.
//!
//! Between the last look at a file and the rename over it are microseconds. Who writes in them may lose
//! a number only to other labels of the same hash, sees so in the file, and claims the next one.

use std::collections::{BTreeSet, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, ErrorKind};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kube::ResourceExt;
use tokio::time::sleep;
use tracing::{debug, info, warn};

use super::convert::Converted;
use super::crd::UNUSED_SINCE;
use super::document::Content;
use super::files::{Files, read_identity, with_mark};
use super::health::{Health, Report};
use super::kind::ObjectKind;
use super::kinds::NodeEndpoints;
use super::manifests::{documents, is_manifest};
use super::unused::Unused;
use crate::model::{self, IdentityId};

/// The topic of reports on passes that could not be made.
const COLLECTION: &str = "the collection of unused identities";

/// Deletes the files of identities that nobody uses.
pub struct Collector {
    files: Files,
    unused: Unused<Version>,
    /// Files that had endpoints in the last pass: a list may lack one that is just being replaced.
    publishing: BTreeSet<OsString>,
    /// Files that were away in the last pass.
    taken: BTreeSet<OsString>,
    health: Arc<Health>,
}

/// One state of one identity's file.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Version {
    id: IdentityId,
    text: String,
}

impl Collector {
    /// One of `node`'s agent, which knows nothing yet.
    pub fn new(directory: &Path, node: &str, grace: Duration, health: Arc<Health>) -> Result<Self> {
        let files = Files::new(directory, node)?;
        let (publishing, taken) = (BTreeSet::new(), BTreeSet::new());
        Ok(Self { files, unused: Unused::new(grace), publishing, taken, health })
    }

    /// One pass after the other. Never returns.
    pub async fn run(mut self) {
        loop {
            let passed = tokio::task::block_in_place(|| self.pass());
            let report = |error: anyhow::Error| Report {
                source: COLLECTION.to_owned(),
                document: None,
                line: None,
                object: None,
                reason: format!("{}; nothing is deleted", crate::error::chain(&error)),
            };
            self.health.replace(COLLECTION, passed.err().map(report).into_iter().collect());
            sleep(self.unused.pause()).await;
        }
    }

    fn pass(&mut self) -> Result<()> {
        let names = self.files.list()?;
        let mut taken = BTreeSet::new();
        for (name, id) in names.iter().filter_map(|name| Some((name, Files::taken_id(name)?))) {
            let path = self.files.path(name);
            // Another agent may be looking at it right now.
            if path != self.files.taken(id) && !self.taken.contains(name) {
                taken.insert(name.clone());
                continue;
            }
            self.put_back(&path, id)?;
            info!(identity = id.0, "put back an identity that was taken away and not looked at");
        }
        self.taken = taken;
        let identities = self.identities(&names)?;
        // After the identities: what these say was in use when they were read, or later.
        let used = self.used()?;
        let unused = identities.into_iter().filter(|(version, _)| !used.contains(&version.id));
        let due = self.unused.pass(unused.collect(), Instant::now());
        for version in &due.delete {
            if note("deleting an unused identity", version, self.delete(version)) {
                info!(identity = version.id.0, "deleted an identity that nobody used");
            }
        }
        for version in &due.mark {
            note("marking an unused identity", version, self.mark(version));
        }
        Ok(())
    }

    /// Every identity in a file of its own, and whether it is marked.
    fn identities(&self, names: &BTreeSet<OsString>) -> Result<Vec<(Version, bool)>> {
        let mut identities = Vec::new();
        for (name, id) in names.iter().filter_map(|name| Some((name, identity_id(name)?))) {
            let path = self.files.path(name);
            // Weir makes no links.
            if !fs::symlink_metadata(&path).is_ok_and(|there| there.is_file()) {
                continue;
            }
            let Some(text) = Files::read(&path)? else { continue };
            let identity = read_identity(id, &text).with_context(|| format!("reading {}", path.display()))?;
            if let Some(identity) = identity {
                let is_marked = identity.annotations().contains_key(UNUSED_SINCE);
                identities.push((Version { id, text }, is_marked));
            }
        }
        Ok(identities)
    }

    /// The identities of all endpoints in the directory.
    fn used(&mut self) -> Result<HashSet<IdentityId>> {
        let (mut used, mut publishing) = (HashSet::new(), BTreeSet::new());
        let names = &self.files.list()? | &self.publishing;
        for name in names.into_iter().filter(|name| is_manifest(name)) {
            let path = self.files.path(&name);
            let Some(text) = Files::read(&path)? else { continue };
            let is_nodes = name.as_encoded_bytes().starts_with(b"endpoints-");
            if !is_nodes && !text.contains(NodeEndpoints::META.name) {
                continue;
            }
            for document in documents(&text).with_context(|| format!("reading {}", path.display()))? {
                match document.content {
                    Content::Object(_, Converted { row: Some(object), .. }) => {
                        let part = object.row::<model::NodeEndpoints>();
                        used.extend(part.iter().flat_map(|part| &part.endpoints).map(|pod| pod.identity));
                    }
                    Content::BrokenObject(id, error) if id.kind == NodeEndpoints::KIND => {
                        bail!("reading {}: {id}: {error}", path.display());
                    }
                    Content::Broken(error) => bail!("reading {}: {error}", path.display()),
                    _ => {}
                }
            }
            publishing.insert(name);
        }
        self.publishing = publishing;
        Ok(used)
    }

    /// False if somebody changed it meanwhile, here and below.
    fn mark(&self, version: &Version) -> Result<bool> {
        let Some(identity) = read_identity(version.id, &version.text)? else { return Ok(false) };
        let text = with_mark(identity, Some(jiff::Timestamp::now().to_string()))?;
        if !self.is_there(version)? {
            return Ok(false);
        }
        self.files.replace(&self.files.identity(version.id), &text)?;
        Ok(true)
    }

    fn delete(&self, version: &Version) -> Result<bool> {
        Ok(self.is_there(version)? && self.take_away(version)?)
    }

    fn is_there(&self, version: &Version) -> Result<bool> {
        Ok(Files::read(&self.files.identity(version.id))?.as_ref() == Some(&version.text))
    }

    /// Deletes the file if it is `version` still when nobody can change it any more.
    fn take_away(&self, version: &Version) -> Result<bool> {
        let (path, taken) = (self.files.identity(version.id), self.files.taken(version.id));
        if !unless_gone(fs::rename(&path, &taken)).context("taking the file away")? {
            return Ok(false);
        }
        if fs::read(&taken).is_ok_and(|there| there == version.text.as_bytes()) {
            return unless_gone(fs::remove_file(&taken)).context("removing the file");
        }
        self.put_back(&taken, version.id)?;
        Ok(false)
    }

    /// Undoes a rename, unless the identity was made anew.
    fn put_back(&self, taken: &Path, id: IdentityId) -> Result<()> {
        let linked = match fs::hard_link(taken, self.files.identity(id)) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(true),
            linked => unless_gone(linked),
        };
        linked.with_context(|| format!("putting back what {} was", taken.display()))?;
        unless_gone(fs::remove_file(taken)).with_context(|| format!("removing {}", taken.display()))?;
        Ok(())
    }
}

/// The number in the name of an identity's file.
fn identity_id(name: &OsStr) -> Option<IdentityId> {
    let number = name.to_str()?.strip_prefix("identity-")?.strip_suffix(".yaml")?;
    number.parse().ok().map(IdentityId).filter(|id| id.to_string() == number)
}

/// False for what another has already moved or removed.
fn unless_gone(done: io::Result<()>) -> io::Result<bool> {
    match done {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        done => done.map(|()| true),
    }
}

/// True if it was done.
fn note(what: &str, version: &Version, outcome: Result<bool>) -> bool {
    match outcome {
        Ok(true) => return true,
        // Somebody uses it, or it is gone: so it should be.
        Ok(false) => debug!(identity = version.id.0, "{what}: it has changed"),
        Err(error) => warn!(identity = version.id.0, error = crate::error::chain(&error), "{what}"),
    }
    false
}

#[cfg(test)]
mod tests;
