//! Leases as files, in a directory below that of the manifests, which no source reads.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};

use super::{Meaning, Posted, Postings, announcer_name, meaning, name_of};
use crate::files::{Survives, replace};
use crate::model::ObjectKey;

/// Below the directory of manifests.
const DIRECTORY: &str = ".weir-leases";
/// Whoever writes has it.
const LOCK: &str = ".lock";

/// The directory, for the agent of one node.
#[derive(Clone)]
pub struct Files {
    directory: PathBuf,
    node: String,
}

impl Files {
    pub fn new(manifests: &Path, node: &str) -> Self {
        Self { directory: manifests.join(DIRECTORY), node: node.to_owned() }
    }

    pub async fn read(&self) -> Result<Postings> {
        let own = self.clone();
        tokio::task::spawn_blocking(move || own.list()).await?
    }

    pub async fn renew(&self) -> Result<()> {
        let own = self.clone();
        tokio::task::spawn_blocking(move || {
            let _lock = own.lock()?;
            let name = announcer_name(&own.node);
            let old = own.posted(&name)?;
            own.write(&name, old.as_ref(), &own.node)
        })
        .await?
    }

    /// `None` takes the Lease away.
    pub async fn post(
        &self,
        service: &ObjectKey,
        old: Option<&Posted>,
        holder: Option<&str>,
    ) -> Result<bool> {
        let (own, name, old) = (self.clone(), name_of(service), old.cloned());
        let holder = holder.map(str::to_owned);
        tokio::task::spawn_blocking(move || {
            let _lock = own.lock()?;
            if own.posted(&name)? != old {
                return Ok(false);
            }
            match holder {
                Some(holder) => own.write(&name, old.as_ref(), &holder)?,
                None => {
                    fs::remove_file(own.directory.join(&name)).with_context(|| format!("removing {name}"))?
                }
            }
            Ok(true)
        })
        .await?
    }

    fn lock(&self) -> Result<Flock<File>> {
        fs::create_dir_all(&self.directory)
            .with_context(|| format!("making {}", self.directory.display()))?;
        let path = self.directory.join(LOCK);
        let file = File::create(&path).with_context(|| format!("opening {}", path.display()))?;
        Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, error)| error)
            .with_context(|| format!("locking {}", path.display()))
    }

    fn list(&self) -> Result<Postings> {
        let mut all = Postings::default();
        let entries = match fs::read_dir(&self.directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(all),
            Err(error) => {
                return Err(error).with_context(|| format!("listing {}", self.directory.display()));
            }
        };
        for entry in entries {
            let name = entry?.file_name();
            let Some(name) = name.to_str() else { continue };
            match (meaning(name), self.posted(name)?) {
                (Some(Meaning::Service(service)), Some(posted)) => drop(all.services.insert(service, posted)),
                (Some(Meaning::Node(node)), Some(posted)) => {
                    all.nodes.insert(node.to_owned(), posted.version);
                }
                _ => {}
            }
        }
        Ok(all)
    }

    /// Version and holder, with a space between.
    fn posted(&self, name: &str) -> Result<Option<Posted>> {
        match fs::read_to_string(self.directory.join(name)) {
            Ok(text) => Ok(text
                .split_once(' ')
                .map(|(version, holder)| Posted { holder: holder.to_owned(), version: version.to_owned() })),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("reading {name}")),
        }
    }

    fn write(&self, name: &str, old: Option<&Posted>, holder: &str) -> Result<()> {
        let number: u64 = old.and_then(|old| old.version.parse().ok()).unwrap_or(0);
        let text = format!("{} {holder}", number + 1);
        replace(&self.directory.join(name), text.as_bytes(), 0o644, Survives::Process)
            .with_context(|| format!("writing {name}"))
    }
}
