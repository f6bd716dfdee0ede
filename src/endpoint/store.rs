//! The endpoints on disk: `STATE-DIRECTORY/endpoints/ID.json`, each complete or absent.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tracing::warn;

use crate::files::{self, Survives};
use crate::model::{Endpoint, EndpointId};

/// The directory of endpoint files; one agent writes it.
#[derive(Clone, Debug)]
pub struct Store {
    directory: PathBuf,
}

impl Store {
    /// Opens the store below the agent's state directory, which is made if it is not there.
    pub fn open(state_directory: &Path) -> Result<Self> {
        let directory = state_directory.join("endpoints");
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory)
            .with_context(|| format!("making {}", directory.display()))?;
        Ok(Self { directory })
    }

    /// Every endpoint. A file that cannot be understood (a torn one, after the machine lost power) is
    /// set aside under another name and said so.
    pub fn load(&self) -> Result<Vec<Endpoint>> {
        let mut endpoints: Vec<Endpoint> = Vec::new();
        let context = || format!("reading {}", self.directory.display());
        for entry in fs::read_dir(&self.directory).with_context(context)? {
            let path = entry.with_context(context)?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let text = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
            match serde_json::from_slice::<Endpoint>(&text) {
                Ok(endpoint) if path == self.path_of(endpoint.id) => endpoints.push(endpoint),
                Ok(endpoint) => set_aside(&path, &format!("it is endpoint {}", endpoint.id)),
                Err(error) => set_aside(&path, &error.to_string()),
            }
        }
        endpoints.sort_by_key(|endpoint| endpoint.id);
        Ok(endpoints)
    }

    /// Writes an endpoint, by rename. A crash of the agent loses nothing; after a crash of the machine
    /// there are no pods, so that nothing waits for the disk here.
    pub fn write(&self, endpoint: &Endpoint) -> io::Result<()> {
        let text = serde_json::to_vec(endpoint)?;
        files::replace(&self.path_of(endpoint.id), &text, 0o600, Survives::Process)
    }

    /// Removes an endpoint; none such is fine.
    pub fn remove(&self, id: EndpointId) -> io::Result<()> {
        match fs::remove_file(self.path_of(id)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            outcome => outcome,
        }
    }

    fn path_of(&self, id: EndpointId) -> PathBuf {
        self.directory.join(format!("{id}.json"))
    }
}

fn set_aside(path: &Path, reason: &str) {
    let broken = path.with_extension("broken");
    let moved = fs::rename(path, &broken);
    warn!(path = %path.display(), %reason, moved = moved.is_ok(), "setting a broken endpoint file aside");
}
