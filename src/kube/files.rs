//! Weir's own files in the directory of manifests, which the agents of all nodes share.
//!
//! A name appears together with the whole content, and changes in one step. What this
//! takes on the way are files that no source reads: their names begin with a dot.
//! Who deletes the files of identities is said in [`super::collect`].

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, ensure};
use kube::ResourceExt;
use serde::Serialize;

use super::convert::{Converted, FieldError};
use super::crd::{Identity, IdentitySpec, UNUSED_SINCE};
use super::document::Content;
use super::kinds::ClaimedIdentity;
use super::manifests;
use crate::files::{Draft, Survives};
use crate::model::{IdentityId, IdentityLabels};
use crate::yaml;

/// Longer node names make no file name.
const NODE_NAME_MAX: usize = 200;
/// What the names of files begin with that were taken away.
const TAKEN: &str = ".weir-taken-";

/// The answer to creating the object of a number.
pub(super) enum Claim {
    /// The number stands for these labels now.
    Ours,
    /// It stands for other labels.
    Taken,
    /// The object that was in the way is gone.
    Gone,
}

/// The directory, as the agent of one node writes to it.
#[derive(Clone)]
pub(super) struct Files {
    directory: PathBuf,
    node: String,
}

impl Files {
    pub fn new(directory: &Path, node: &str) -> Result<Self> {
        ensure!(node.len() <= NODE_NAME_MAX, "node name {node:?} is longer than {NODE_NAME_MAX} characters");
        Ok(Self { directory: directory.to_owned(), node: node.to_owned() })
    }

    /// The file of an identity.
    pub fn identity(&self, id: IdentityId) -> PathBuf {
        self.directory.join(format!("identity-{id}.yaml"))
    }

    /// Where the file of an identity is while this agent decides whether to delete it.
    pub fn taken(&self, id: IdentityId) -> PathBuf {
        self.directory.join(format!("{TAKEN}{id}-{}", self.node))
    }

    /// The identity whose file was taken away to `name`, by the agent of any node.
    pub fn taken_id(name: &OsStr) -> Option<IdentityId> {
        let (number, _) = name.to_str()?.strip_prefix(TAKEN)?.split_once('-')?;
        number.parse().ok().map(IdentityId)
    }

    /// A file of the directory.
    pub fn path(&self, name: &OsStr) -> PathBuf {
        self.directory.join(name)
    }

    /// The names of all files.
    pub fn list(&self) -> Result<BTreeSet<OsString>> {
        let entries = fs::read_dir(&self.directory).and_then(|entries| {
            entries.map(|entry| Ok(entry?.file_name())).collect::<io::Result<BTreeSet<_>>>()
        });
        entries.with_context(|| format!("listing {}", self.directory.display()))
    }

    /// The content of a manifest; `None` where there is none.
    pub fn read(path: &Path) -> Result<Option<String>> {
        let is_gone = |error: &io::Error| error.kind() == ErrorKind::NotFound;
        let text = match fs::metadata(path) {
            Ok(metadata) if metadata.is_file() => manifests::text_of(path, metadata.len()),
            Ok(_) => return Ok(None),
            Err(error) => Err(error.into()),
        };
        match text {
            Err(error) if error.downcast_ref().is_some_and(is_gone) => Ok(None),
            text => text.map(Some).with_context(|| format!("reading {}", path.display())),
        }
    }

    /// Makes the file of an identity, if there is none.
    pub fn claim(&self, id: IdentityId, labels: &IdentityLabels) -> Result<Claim> {
        let path = self.identity(id);
        let object = Identity::new(&id.to_string(), IdentitySpec::from(labels));
        let temporary = self.temporary(&to_yaml([&object])?)?;
        match temporary.claim(&path) {
            Ok(()) => return Ok(Claim::Ours),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error).with_context(|| format!("creating {}", path.display())),
        }
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Claim::Gone),
            Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
        };
        match read_identity(id, &text) {
            Ok(Some(there)) if there.spec == object.spec => {
                // What is marked may be deleted at any moment: it is ours only without the mark.
                if there.annotations().contains_key(UNUSED_SINCE) {
                    self.replace(&path, &with_mark(there, None)?)?;
                }
                Ok(Claim::Ours)
            }
            _ => Ok(Claim::Taken),
        }
    }

    /// Makes `text` this node's endpoints.
    pub fn publish(&self, text: &str) -> Result<()> {
        let path = self.directory.join(format!("endpoints-{}.yaml", self.node));
        if fs::read_to_string(&path).is_ok_and(|there| there == text) {
            return Ok(());
        }
        self.replace(&path, text)
    }

    /// Makes `text` what this node says of itself.
    pub fn publish_node(&self, text: &str) -> Result<()> {
        self.replace(&self.directory.join(format!("weirnode-{}.yaml", self.node)), text)
    }

    /// Makes `text` the content of a file, in one step.
    pub fn replace(&self, path: &Path, text: &str) -> Result<()> {
        let temporary = self.temporary(text)?;
        temporary.replace(path).with_context(|| format!("replacing {}", path.display()))
    }

    fn temporary(&self, text: &str) -> Result<Draft> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        // In containers, agents of several nodes have the same process id.
        let name = format!(".weir-new-{}-{}-{number}", self.node, std::process::id());
        let path = self.directory.join(name);
        let context = format!("writing {}", path.display());
        Draft::new(path, text.as_bytes(), 0o644, Survives::Process).context(context)
    }
}

/// The identity `id`, where that is all that its file holds; `None` where somebody else wrote such a
/// file, and an error where a document of it is broken.
pub(super) fn read_identity(id: IdentityId, text: &str) -> Result<Option<Identity>, FieldError> {
    let mut documents = Vec::new();
    for document in manifests::documents(text)? {
        match document.content {
            Content::Broken(error) | Content::BrokenObject(_, error) => return Err(error),
            content => documents.push(content),
        }
    }
    Ok(match &documents[..] {
        [Content::Object(_, Converted { row: Some(object), .. })]
            if object.row::<ClaimedIdentity>().is_some_and(|claimed| claimed.number == id) =>
        {
            yaml::read(text).ok()
        }
        _ => None,
    })
}

/// The text of an identity's file, marked as unused since then, or not marked.
pub(super) fn with_mark(mut identity: Identity, since: Option<String>) -> Result<String> {
    let mut annotations = identity.metadata.annotations.take().unwrap_or_default();
    annotations.remove(UNUSED_SINCE);
    annotations.extend(since.map(|since| (UNUSED_SINCE.to_owned(), since)));
    identity.metadata.annotations = Some(annotations).filter(|annotations| !annotations.is_empty());
    to_yaml([identity])
}

/// One document each.
pub(super) fn to_yaml<T: Serialize>(objects: impl IntoIterator<Item = T>) -> Result<String> {
    let mut text = String::new();
    for object in objects {
        text += "---\n";
        text += &yaml::write(&object).context("writing YAML")?;
    }
    Ok(text)
}
