//! The machine's cgroup hierarchies: those of v1, one a controller, and v2; a machine has either or both.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};

/// A mounted hierarchy.
#[derive(Clone, Debug)]
pub struct Hierarchy {
    /// Where it is mounted.
    pub mount: PathBuf,
    /// True for v2.
    pub is_unified: bool,
    /// v1: its controllers or its name, as mount options.
    options: String,
}

/// All of them, in the order of their mounts.
pub fn hierarchies() -> Result<Vec<Hierarchy>> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("reading the mounts")?;
    Ok(mounts.lines().filter_map(parse).collect())
}

fn parse(line: &str) -> Option<Hierarchy> {
    let (left, right) = line.split_once(" - ")?;
    let mount = PathBuf::from(left.split(' ').nth(4)?);
    let mut right = right.split(' ');
    let kind = right.next()?;
    let options = right.nth(1)?.split(',').filter(|option| !matches!(*option, "rw" | "ro" | "xattr"));
    let mut options: Vec<&str> = options.collect();
    if options.iter().any(|option| option.starts_with("name=")) {
        options.push("none");
    }
    let is_unified = kind == "cgroup2";
    (is_unified || kind == "cgroup").then(|| Hierarchy { mount, is_unified, options: options.join(",") })
}

impl Hierarchy {
    /// Makes the group `name` and moves this process to it.
    pub fn join(&self, name: &str) -> Result<()> {
        let group = self.mount.join(name);
        fs::create_dir_all(&group).with_context(|| format!("making {}", group.display()))?;
        // A new group of the cpuset controller is empty, and then takes no process.
        for file in ["cpuset.cpus", "cpuset.mems"] {
            if !self.is_unified && group.join(file).exists() {
                fs::copy(self.mount.join(file), group.join(file))
                    .with_context(|| format!("filling {file} of {}", group.display()))?;
            }
        }
        fs::write(group.join("cgroup.procs"), std::process::id().to_string())
            .with_context(|| format!("joining {}", group.display()))
    }

    /// Lets the groups below the root of this process's cgroup namespace have the controllers that it has (v2).
    pub fn delegate(&self) -> Result<()> {
        if self.is_unified {
            let controllers = fs::read_to_string(self.mount.join("cgroup.controllers"))?;
            let wanted: Vec<String> = controllers.split_whitespace().map(|name| format!("+{name}")).collect();
            if !wanted.is_empty() {
                fs::write(self.mount.join("cgroup.subtree_control"), wanted.join(" "))
                    .context("letting pods have cgroup controllers")?;
            }
        }
        Ok(())
    }

    /// Mounts it again at the same place, as this process's cgroup namespace shows it.
    pub fn mount_again(&self) -> Result<()> {
        let kind = if self.is_unified { "cgroup2" } else { "cgroup" };
        let options = (!self.is_unified).then_some(self.options.as_str());
        fs::create_dir_all(&self.mount)?;
        mount(Some(kind), &self.mount, Some(kind), MsFlags::empty(), options)
            .with_context(|| format!("mounting {}", self.mount.display()))
    }

    /// True if it is all that is mounted at `directory`.
    pub fn is_at(&self, directory: &Path) -> bool {
        self.mount == directory
    }
}
