//! Deletions that wait on disk for the agent: `STATE-DIRECTORY/deletes`.
//!
//! Written by `weir-cni` when nobody listens, worked off by the agent. A file
//! appears complete, by rename; its name is a hash, so that a repeated DEL is
//! the same file and nothing a runtime says is part of a path.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::Request;
use crate::files::{self, Survives};

/// The directory of queued deletions.
#[derive(Clone, Debug)]
pub struct DeleteQueue {
    directory: PathBuf,
}

impl DeleteQueue {
    /// The queue below the agent's state directory; touches nothing yet.
    pub fn new(state_directory: &Path) -> Self {
        Self { directory: state_directory.join("deletes") }
    }

    /// The directory, made if it is not there.
    pub fn directory(&self) -> io::Result<&Path> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.directory)?;
        Ok(&self.directory)
    }

    /// Queues a DEL; it is on disk when this returns.
    pub fn push(&self, request: &Request) -> io::Result<()> {
        let directory = self.directory()?;
        let name = name_of(request);
        files::replace(&directory.join(name), &serde_json::to_vec(request)?, 0o600, Survives::Machine)
    }

    /// What is queued: each file, and its request where it can be read.
    pub fn list(&self) -> io::Result<Vec<(PathBuf, io::Result<Request>)>> {
        let entries = match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut queued = Vec::new();
        for entry in entries {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "json") {
                let request = fs::read(&path).and_then(|text| Ok(serde_json::from_slice(&text)?));
                queued.push((path, request));
            }
        }
        queued.sort_by(|(a, _), (b, _)| a.cmp(b));
        Ok(queued)
    }

    /// Takes a file of `list` off the queue.
    pub fn remove(&self, path: &Path) -> io::Result<()> {
        match fs::remove_file(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            outcome => outcome,
        }
    }
}

fn name_of(request: &Request) -> String {
    let mut hash = Sha256::new();
    hash.update(&request.attachment.container_id);
    hash.update([0]);
    hash.update(&request.attachment.interface);
    let digest = hash.finalize();
    let mut name: String = digest[..16].iter().map(|byte| format!("{byte:02x}")).collect();
    name.push_str(".json");
    name
}
