//! The directory in the BPF file system that outlives the agent: `maps/` by
//! name, `links/` by device and program. One process at a time owns it.
//!
//! Its name carries the ABI version. An agent of another version makes its own
//! beside it, replaces the programs of all links at once (`succeed`), takes the
//! links over when it attaches (two programs on a hook would be one too many),
//! and at last removes what is left of the other.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

/// A predecessor that is being killed needs a moment to let go.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// The directory of this ABI version's pins below a BPF file system.
pub fn pin_directory(bpffs: &Path) -> PathBuf {
    let version = super::types::abi_version::ABI_VERSION.0;
    bpffs.join("weir").join(format!("v{version}"))
}

/// An owned pin directory.
#[derive(Debug)]
pub(super) struct Pins {
    root: PathBuf,
    _lock: Flock<File>,
}

impl Pins {
    /// Makes the directory (and mounts the BPF file system when it is missing), and locks it.
    pub(super) fn open(root: &Path) -> Result<Self> {
        mount_if_missing(root)?;
        for directory in [root, &maps(root), &links(root)] {
            make_private(directory)?;
        }
        let lock = lock(root.parent().unwrap_or(root))?;
        Ok(Self { root: root.to_owned(), _lock: lock })
    }

    /// Where a map is pinned.
    pub(super) fn map(&self, name: &str) -> PathBuf {
        maps(&self.root).join(name)
    }

    /// The directory itself.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Where the links are pinned.
    pub(super) fn links(&self) -> PathBuf {
        links(&self.root)
    }
}

/// The pin directories of other ABI versions beside this one, the highest version first.
pub(super) fn other_versions(root: &Path) -> Result<Vec<PathBuf>> {
    let Some(parent) = root.parent() else { return Ok(Vec::new()) };
    let entries = match fs::read_dir(parent) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("listing {}", parent.display()))?,
    };
    let mut versions = Vec::new();
    for entry in entries {
        let path = entry.with_context(|| format!("listing {}", parent.display()))?.path();
        if path != root && version_of(&path).is_some() {
            versions.push(path);
        }
    }
    versions.sort_by_key(|path| std::cmp::Reverse(version_of(path)));
    Ok(versions)
}

fn version_of(path: &Path) -> Option<u32> {
    path.file_name()?.to_str()?.strip_prefix('v')?.parse().ok()
}

/// Where maps are pinned.
pub(super) fn maps(root: &Path) -> PathBuf {
    root.join("maps")
}

/// Where links are pinned.
pub(super) fn links(root: &Path) -> PathBuf {
    root.join("links")
}

fn make_private(directory: &Path) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .with_context(|| format!("making the pin directory {}", directory.display()))
}

fn lock(root: &Path) -> Result<Flock<File>> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    let mut directory = File::open(root).with_context(|| format!("opening {}", root.display()))?;
    loop {
        match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((_, Errno::EWOULDBLOCK)) if Instant::now() >= deadline => {
                bail!("another agent is running on the pins in {}: stop it first", root.display())
            }
            Err((unlocked, Errno::EWOULDBLOCK)) => {
                directory = unlocked;
                std::thread::sleep(Duration::from_millis(20));
            }
            Err((_, error)) => return Err(error).with_context(|| format!("locking {}", root.display())),
        }
    }
}

/// The BPF file system is mounted two levels above `<bpffs>/weir/v<ABI>`, unless
/// some directory on the way is in one already.
fn mount_if_missing(root: &Path) -> Result<()> {
    let existing = root.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    if is_bpffs(existing)? {
        return Ok(());
    }
    let Some(target) = root.parent().and_then(Path::parent).filter(|target| *target != Path::new("/")) else {
        bail!("{} is in no BPF file system, and none can be mounted above it", root.display());
    };
    mount_bpffs(target)
}

/// Mounts the BPF file system at a directory, unless it is there.
pub fn mount_bpffs(target: &Path) -> Result<()> {
    match fs::create_dir_all(target) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(error).with_context(|| format!("making {}", target.display()));
        }
        _ => {}
    }
    if is_bpffs(target)? {
        return Ok(());
    }
    mount(Some("bpf"), target, Some("bpf"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some("mode=0700"))
        .with_context(|| format!("mounting the BPF file system at {}", target.display()))?;
    tracing::info!(directory = %target.display(), "mounted the BPF file system");
    Ok(())
}

fn is_bpffs(path: &Path) -> Result<bool> {
    let found = statfs(path).with_context(|| format!("looking at {}", path.display()))?;
    Ok(found.filesystem_type() == BPF_FS_MAGIC)
}
