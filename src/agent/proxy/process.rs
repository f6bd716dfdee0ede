//! A process in the proxy's place: a child of the agent, or of the agent before.

use std::ffi::OsString;
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
/// How long the kernel may take to end a process.
const ENDS_WITHIN: Duration = Duration::from_secs(10);

/// What is run in the proxy's namespace, and how it is found again.
pub struct Program {
    /// For people.
    pub name: &'static str,
    /// Where its process number is noted.
    pub pid_file: PathBuf,
    /// An argument that no other process has.
    pub marker: PathBuf,
    /// What the agent's own program is started with.
    pub arguments: Vec<OsString>,
}

/// A running proxy.
pub struct Process {
    pid: i32,
    marker: PathBuf,
    /// True when a child has ended; `None`: the agent before has started it.
    child: Option<watch::Receiver<bool>>,
}

impl Program {
    /// `weir proxy`.
    pub fn proxy(state_dir: &Path, control: &Path) -> Self {
        let arguments = vec!["proxy".into(), "--control".into(), control.into()];
        Self { name: "proxy", pid_file: state_dir.join("proxy.pid"), marker: control.to_owned(), arguments }
    }

    /// The one that the agent before has left running.
    pub fn find(&self) -> Option<Process> {
        let pid = fs::read_to_string(&self.pid_file).ok()?.trim().parse().ok()?;
        let process = Process { pid, marker: self.marker.clone(), child: None };
        process.is_alive().then_some(process)
    }

    /// Starts it within the namespace.
    pub fn start(&self, namespace: &File) -> Result<Process> {
        let name = self.name;
        let mut command = Command::new("/proc/self/exe");
        command.arg0("weir").args(&self.arguments);
        command.env_clear().envs(std::env::vars().filter(|(name, _)| name.starts_with("RUST_")));
        // What ends the agent ends no connection of pods.
        command.stdin(Stdio::null()).process_group(0);
        let spawn = || {
            command.spawn().map_err(|error| netlink::Error::Different(format!("starting {name}: {error}")))
        };
        let mut child = netlink::within(namespace, spawn)?;
        let pid = i32::try_from(child.id()).with_context(|| format!("the process number of {name}"))?;
        let noted = files::replace(&self.pid_file, format!("{pid}\n").as_bytes(), 0o600, Survives::Process);
        if let Err(error) = noted {
            // Nobody would find it again.
            let _ = child.kill();
            let _ = child.wait();
            return Err(anyhow::Error::from(error).context(format!("noting the process number of {name}")));
        }
        let (ended, ending) = watch::channel(false);
        let wait = move || {
            let status = child.wait();
            tracing::warn!(?status, "{name} has ended");
            ended.send_replace(true);
        };
        std::thread::Builder::new()
            .name(format!("weir-{name}-wait"))
            .spawn(wait)
            .with_context(|| format!("starting the thread that waits for {name}"))?;
        tracing::info!(pid, "started {name}");
        Ok(Process { pid, marker: self.marker.clone(), child: Some(ending) })
    }
}

impl Process {
    /// Its number.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Its network namespace, while it runs and may be looked at.
    pub fn namespace(&self) -> Option<File> {
        netlink::open_namespace(Path::new(&format!("/proc/{}/ns/net", self.pid))).ok()
    }

    /// Whether it runs: nobody else has got its number.
    pub fn is_alive(&self) -> bool {
        let line = fs::read(format!("/proc/{}/cmdline", self.pid)).unwrap_or_default();
        let marker = self.marker.as_os_str().as_encoded_bytes();
        line.split(|byte| *byte == 0).any(|argument| argument == marker)
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

    /// Ends it, and waits until its sockets are closed.
    pub fn end_wholly(&self) -> Result<()> {
        if self.is_alive() {
            netlink::end_process(self.pid, ENDS_WITHIN)?;
        }
        Ok(())
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
