//! Files that appear complete, or not at all: written beside their place, then renamed or linked.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// What a file must survive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Survives {
    /// The end of this process.
    Process,
    /// The end of power: the file is on the disk when the call returns.
    Machine,
}

/// A complete file that is not in its place yet; it is removed when this is dropped.
#[derive(Debug)]
pub struct Draft(PathBuf);

impl Draft {
    /// Writes a draft at `path`, where nobody else writes one. What a process that died left there is replaced.
    pub fn new(path: PathBuf, content: &[u8], mode: u32, survives: Survives) -> io::Result<Self> {
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&path)?;
        let draft = Self(path);
        // The process's umask does not count.
        file.set_permissions(Permissions::from_mode(mode))?;
        file.write_all(content)?;
        if survives == Survives::Machine {
            file.sync_all()?;
        }
        Ok(draft)
    }

    /// Where the draft is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Takes its place, instead of what is there.
    pub fn replace(self, target: &Path) -> io::Result<()> {
        fs::rename(&self.0, target)
    }

    /// Takes its place if there is nothing: `AlreadyExists` otherwise.
    pub fn claim(self, target: &Path) -> io::Result<()> {
        fs::hard_link(&self.0, target)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // Gone already where it was renamed.
        let _ = fs::remove_file(&self.0);
    }
}

/// Makes `content` the file's whole content, in one step.
pub fn replace(target: &Path, content: &[u8], mode: u32, survives: Survives) -> io::Result<()> {
    let directory = target.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = target.file_name().ok_or(ErrorKind::InvalidInput)?.to_string_lossy();
    // Hidden, and with an ending that no reader of the directory looks for.
    let draft = directory.join(format!(".{name}.new-{}", std::process::id()));
    Draft::new(draft, content, mode, survives)?.replace(target)?;
    if survives == Survives::Machine {
        File::open(directory)?.sync_all()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).expect("listing");
        entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn a_file_is_replaced_with_its_mode_and_leaves_no_draft() {
        let directory = tempfile::tempdir().expect("a directory");
        let target = directory.path().join("facts.json");
        for (content, mode, survives) in
            [("one", 0o600, Survives::Process), ("two", 0o755, Survives::Machine)]
        {
            replace(&target, content.as_bytes(), mode, survives).expect("writing");
            assert_eq!(fs::read_to_string(&target).expect("reading"), content);
            assert_eq!(fs::metadata(&target).expect("it is there").permissions().mode() & 0o777, mode);
        }
        assert_eq!(names(directory.path()), ["facts.json"]);
        assert!(replace(&directory.path().join("no/such"), b"", 0o600, Survives::Process).is_err());
    }

    #[test]
    fn a_claim_takes_nobodys_place_and_a_draft_goes() {
        let directory = tempfile::tempdir().expect("a directory");
        let (aside, target) = (directory.path().join(".aside"), directory.path().join("256.yaml"));
        fs::write(&aside, "left by one that died").expect("writing");
        let draft = |content: &str| Draft::new(aside.clone(), content.as_bytes(), 0o644, Survives::Process);
        draft("one").expect("a draft").claim(&target).expect("nobody is there");
        let refused = draft("two").expect("a draft").claim(&target).expect_err("somebody is there");
        assert_eq!(refused.kind(), ErrorKind::AlreadyExists);
        assert_eq!(fs::read_to_string(&target).expect("reading"), "one");
        assert_eq!(names(directory.path()), ["256.yaml"]);
    }
}
