//! Work in a pod's network namespace: a thread that enters it and ends there.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::{fs, io, thread};

use nix::sched::{CloneFlags, setns};
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};

use super::{Error, Result};

/// Opens `path` if it is a network namespace and not the agent's own.
pub fn open_namespace(path: &Path) -> Result<File> {
    let refuse = |reason: String, is_absent| Error::Namespace { path: path.to_owned(), reason, is_absent };
    let file = File::open(path)
        .map_err(|error| refuse(error.to_string(), error.kind() == io::ErrorKind::NotFound))?;
    let kind = fstatfs(&file).map_err(|error| refuse(error.to_string(), false))?.filesystem_type();
    if kind != NSFS_MAGIC {
        // What is left of a mounted namespace is an empty file.
        return Err(refuse("is no namespace".to_owned(), true));
    }
    let its = file.metadata().map_err(|error| refuse(error.to_string(), false))?;
    let ours = fs::metadata("/proc/thread-self/ns/net").map_err(|error| refuse(error.to_string(), false))?;
    if (its.dev(), its.ino()) == (ours.dev(), ours.ino()) {
        return Err(refuse("is the node's own".to_owned(), false));
    }
    Ok(file)
}

/// Runs `work` on a thread of its own within the network namespace.
pub fn within<T: Send>(namespace: &File, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| {
        let entered = || {
            setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET)
                .map_err(|error| Error::kernel("entering the network namespace", error))?;
            work()
        };
        thread::Builder::new()
            .name("weir-netns".to_owned())
            .spawn_scoped(scope, entered)
            .map_err(|error| Error::kernel("starting a thread", error))?
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
