//! Settings below /proc/sys; those of `net` are the calling thread's namespace's.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::{fs, io};

use super::{Error, Result};

static ROOT: OnceLock<PathBuf> = OnceLock::new();

/// Takes another directory for /proc/sys, which containers can only read; the first call counts.
pub fn set_sysctl_root(directory: &Path) {
    ROOT.get_or_init(|| directory.to_owned());
}

/// Writes a setting, named by its path below /proc/sys (`net/ipv4/ip_forward`).
pub fn set_sysctl(name: &str, value: &str) -> Result<()> {
    let path = path_of(name)?;
    // A write, even of the same value, may have side effects (forwarding flushes): compare first.
    if fs::read_to_string(&path).is_ok_and(|old| old.trim_end() == value) {
        return Ok(());
    }
    fs::write(path, value).map_err(|error| Error::kernel(format!("setting {name} to {value}"), error))
}

/// Reads a setting; `None` where the kernel has none of that name.
pub fn get_sysctl(name: &str) -> Result<Option<String>> {
    match fs::read_to_string(path_of(name)?) {
        Ok(value) => Ok(Some(value.trim_end().to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::kernel(format!("reading {name}"), error)),
    }
}

fn path_of(name: &str) -> Result<PathBuf> {
    if name.is_empty() || name.split('/').any(|part| part.is_empty() || part == "." || part == "..") {
        return Err(Error::Different(format!("{name:?} names no setting")));
    }
    Ok(ROOT.get().map_or(Path::new("/proc/sys"), PathBuf::as_path).join(name))
}
