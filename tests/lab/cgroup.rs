//! The cgroups of a lab: one per node, below one of this process.
//!
//! They are threaded, so that a single thread of the test can be "a process of
//! a pod of node 2": socket hooks look at the cgroup of the thread that made the socket.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::CLEAN;

/// Where cgroup v2 is mounted.
pub fn unified_root() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    mounts.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        right.starts_with("cgroup2 ").then(|| PathBuf::from(left.split(' ').nth(4).unwrap_or_default()))
    })
}

/// The cgroup that this process has moved to, with all that it starts. The first call removes what dead
/// labs left, and starts the process that cleans up after this one, however it ends.
pub fn of_process() -> Result<&'static Path> {
    static JOINED: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let joined = JOINED.get_or_init(|| join().map_err(|error| format!("{error:#}")));
    joined.as_deref().map_err(|error| anyhow::anyhow!("{error}"))
}

/// The cgroup of a node, removed when dropped.
#[derive(Debug)]
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// Makes it, for threads.
    pub fn create(name: &str) -> Result<Self> {
        let path = of_process()?.join(name);
        fs::create_dir(&path).with_context(|| format!("making {}", path.display()))?;
        fs::write(path.join("cgroup.type"), "threaded")
            .with_context(|| format!("letting {} hold threads", path.display()))?;
        Ok(Self(path))
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // The last thread leaves a moment after its space was dropped, an agent that was killed later.
        let deadline = Instant::now() + Duration::from_secs(20);
        while let Err(error) = fs::remove_dir(&self.0) {
            if Instant::now() > deadline {
                eprintln!("removing {}: {error}", self.0.display());
                return;
            }
            thread::sleep(Duration::from_millis(2));
        }
    }
}

fn join() -> Result<PathBuf> {
    let pid = std::process::id();
    let name = format!("weirlab-{pid}");
    Command::new(CLEAN).arg("--dead").status().with_context(|| format!("running {CLEAN}"))?;
    // Started before the move, so that it is not among those it ends.
    let mut cleaner = Command::new(CLEAN);
    cleaner.args(["--when-closed", &name]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    std::os::unix::process::CommandExt::process_group(&mut cleaner, 0);
    // Its standard input closes when this process ends, and not before.
    std::mem::forget(cleaner.spawn().with_context(|| format!("starting {CLEAN}"))?);
    let cgroup = unified_root().context("no cgroup v2 is mounted")?.join(&name);
    fs::create_dir_all(&cgroup).with_context(|| format!("making {}", cgroup.display()))?;
    fs::write(cgroup.join("cgroup.procs"), pid.to_string())
        .with_context(|| format!("joining {}", cgroup.display()))?;
    Ok(cgroup)
}
