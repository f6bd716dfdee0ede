//! The proxy's process: a child of the agent, or of the agent before.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::sync::watch;

use crate::files::{self, Survives};
use crate::netlink;

/// How often it is asked whether a process that is no child has ended.
const ASK_EVERY: Duration = Duration::from_millis(200);

/// A running proxy.
pub struct Process {
    pid: i32,
    control: PathBuf,
    /// True when a child has ended; `None`: the agent before has started it.
    child: Option<watch::Receiver<bool>>,
}

impl Process {
    /// The proxy that the agent before has left running.
    pub fn find(state_dir: &Path, control: &Path) -> Option<Self> {
        let pid = fs::read_to_string(pid_file(state_dir)).ok()?.trim().parse().ok()?;
        let process = Self { pid, control: control.to_owned(), child: None };
        process.is_alive().then_some(process)
    }

    /// Starts a proxy within the namespace.
    pub fn start(namespace: &File, state_dir: &Path, control: &Path) -> Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        command.arg0("weir").arg("proxy").arg("--control").arg(control);
        command.env_clear().envs(std::env::vars().filter(|(name, _)| name.starts_with("RUST_")));
        // What ends the agent ends no connection of pods.
        command.stdin(Stdio::null()).process_group(0);
        let spawn = || {
            command.spawn().map_err(|error| netlink::Error::Different(format!("starting the proxy: {error}")))
        };
        let mut child = netlink::within(namespace, spawn)?;
        let pid = i32::try_from(child.id()).context("the proxy's process number")?;
        let noted =
            files::replace(&pid_file(state_dir), format!("{pid}\n").as_bytes(), 0o600, Survives::Process);
        if let Err(error) = noted {
            // Nobody would find it again.
            let _ = child.kill();
            let _ = child.wait();
            return Err(anyhow::Error::from(error).context("noting the proxy's process number"));
        }
        let (ended, ending) = watch::channel(false);
        let wait = move || {
            let status = child.wait();
            tracing::warn!(?status, "the proxy has ended");
            ended.send_replace(true);
        };
        std::thread::Builder::new()
            .name("weir-proxy-wait".to_owned())
            .spawn(wait)
            .context("starting the thread that waits for the proxy")?;
        tracing::info!(pid, "started the proxy");
        Ok(Self { pid, control: control.to_owned(), child: Some(ending) })
    }

    /// Its network namespace, while it runs and may be looked at.
    pub fn namespace(&self) -> Option<File> {
        netlink::open_namespace(Path::new(&format!("/proc/{}/ns/net", self.pid))).ok()
    }

    /// Whether it runs: nobody else has got its number.
    pub fn is_alive(&self) -> bool {
        let line = fs::read(format!("/proc/{}/cmdline", self.pid)).unwrap_or_default();
        let control = self.control.as_os_str().as_encoded_bytes();
        line.split(|byte| *byte == 0).any(|argument| argument == control)
    }

    /// Returns when it has ended.
    pub async fn ended(&mut self) {
        if let Some(ending) = &mut self.child {
            // A thread that is gone waits no more.
            let _ = ending.wait_for(|ended| *ended).await;
            return;
        }
        while self.is_alive() {
            tokio::time::sleep(ASK_EVERY).await;
        }
    }

    /// Ends it: it does not do what it is for.
    pub fn end(&self) {
        if self.is_alive()
            && let Err(error) = kill(Pid::from_raw(self.pid), Signal::SIGKILL)
        {
            tracing::warn!(%error, pid = self.pid, "ending the proxy");
        }
    }
}

fn pid_file(state_dir: &Path) -> PathBuf {
    state_dir.join("proxy.pid")
}
