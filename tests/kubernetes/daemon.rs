//! A process that outlives the one that started it. Its cgroup is how it is found and ended,
//! with all that it started.

use std::fs::{self, OpenOptions};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::lab::{Space, cgroup::unified_root};

/// A daemon, by its cgroup.
#[derive(Clone, Debug)]
pub struct Daemon(PathBuf);

impl Daemon {
    /// Starts `command` in `space`, as `<cluster>-<name>`; what it writes is in `log`.
    pub fn start(space: &Space, cluster: &str, name: &str, mut command: Command, log: &Path) -> Result<Self> {
        let group = unified_root().context("no cgroup v2 is mounted")?.join(format!("{cluster}-{name}"));
        fs::create_dir_all(&group).with_context(|| format!("making {}", group.display()))?;
        let log = OpenOptions::new().create(true).append(true).open(log)?;
        command.stdout(log.try_clone()?).stderr(log).process_group(0);
        let child = space.run(move || command.spawn()).with_context(|| format!("starting {name}"))?;
        fs::write(group.join("cgroup.procs"), child.id().to_string())
            .with_context(|| format!("moving {name} to {}", group.display()))?;
        Ok(Self(group))
    }

    /// Its processes, and those that they started.
    pub fn processes(&self) -> Vec<Pid> {
        let mut found = Vec::new();
        let mut groups = vec![self.0.clone()];
        while let Some(group) = groups.pop() {
            let processes = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
            found.extend(processes.lines().filter_map(|line| line.parse().ok()).map(Pid::from_raw));
            let below = fs::read_dir(group).into_iter().flatten().flatten();
            groups.extend(below.filter(|entry| entry.path().is_dir()).map(|entry| entry.path()));
        }
        found
    }

    /// Sends a signal to each.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.processes().into_iter().try_for_each(|process| kill(process, signal)).context("sending a signal")
    }

    /// Ends all of them as a crash does, and waits until they have.
    pub fn kill(&self) -> Result<()> {
        fs::write(self.0.join("cgroup.kill"), "1").with_context(|| format!("ending {}", self.0.display()))?;
        let deadline = Instant::now() + Duration::from_secs(30);
        while !fs::read_to_string(self.0.join("cgroup.events"))?.contains("populated 0") {
            if Instant::now() > deadline {
                bail!("{} did not end in 30 s", self.0.display());
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}
