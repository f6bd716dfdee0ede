//! A network namespace, and threads that live in it.
//!
//! One thread per namespace enters it (and, for pods, the node's cgroup) and
//! starts every other one: a new thread inherits both from the one that made it,
//! and so does a child process. Nothing here forks or needs `unsafe`.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};
use nix::unistd::gettid;

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace of the lab's own, removed when dropped, unless it is kept.
#[derive(Debug)]
pub struct Space {
    name: String,
    is_kept: bool,
    spawner: mpsc::Sender<Job>,
}

/// A closure that runs in a space.
pub struct Running<T>(mpsc::Receiver<thread::Result<T>>);

impl Space {
    /// Makes the namespace, with `lo` up; its threads join `cgroup` where there is one.
    pub fn create(name: &str, cgroup: Option<&Path>) -> Result<Self> {
        ip(&["netns", "add", name])?;
        let space = Self { name: name.to_owned(), is_kept: false, spawner: start_spawner(name, cgroup)? };
        space.configure(&["link set lo up"])?;
        Ok(space)
    }

    /// Lets the namespace outlive this value.
    pub fn keep(&mut self) {
        self.is_kept = true;
    }

    /// The name by which `ip netns` knows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that holds it open.
    pub fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    /// Starts `work` on a thread of its own inside.
    pub fn start<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Running<T> {
        let (sender, receiver) = mpsc::channel();
        let job = move || {
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            // Nobody need wait for it.
            let _ = sender.send(result);
        };
        self.spawner.send(Box::new(job)).expect("the spawner lives as long as its space");
        Running(receiver)
    }

    /// Runs `work` inside and waits for it.
    pub fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        self.start(work).wait()
    }

    /// Runs a command inside and returns what it wrote; an exit code other than 0 is an error.
    pub fn command(&self, mut command: Command, input: &str) -> Result<String> {
        let input = input.to_owned();
        self.run(move || output_of(&mut command, &input))
    }

    /// Runs lines of `ip -batch` inside.
    pub fn configure(&self, lines: &[&str]) -> Result<()> {
        let mut command = Command::new("ip");
        command.args(["-netns", &self.name, "-batch", "-"]);
        output_of(&mut command, &(lines.join("\n") + "\n")).map(drop)
    }

    /// What `ip -netns ... ARGUMENTS` prints.
    pub fn ip(&self, arguments: &str) -> Result<String> {
        let mut command = Command::new("ip");
        command.args(["-netns", &self.name]).args(arguments.split(' '));
        output_of(&mut command, "")
    }

    /// Sets values below `/proc/sys/net` inside.
    pub fn set_sysctls(&self, values: &'static [(&'static str, &'static str)]) -> Result<()> {
        self.run(move || {
            for (path, value) in values {
                let path = Path::new("/proc/sys/net").join(path);
                fs::write(&path, value).with_context(|| format!("writing {value} to {}", path.display()))?;
            }
            Ok(())
        })
    }

    /// The status and body of an HTTP GET inside.
    pub fn http_get(&self, address: SocketAddr, path: &str) -> Result<(u16, String)> {
        let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        self.run(move || {
            let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(1))?;
            stream.set_read_timeout(Some(Duration::from_secs(2)))?;
            stream.write_all(request.as_bytes())?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            let (head, body) = answer.split_once("\r\n\r\n").context("an answer without a head")?;
            let status = head.split(' ').nth(1).context("an answer without a status")?.parse()?;
            Ok((status, body.to_owned()))
        })
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        if self.is_kept {
            return;
        }
        if let Err(error) = ip(&["netns", "delete", &self.name]) {
            eprintln!("{error:#}");
        }
    }
}

impl<T> Running<T> {
    /// Waits for the result; a panic inside goes on here.
    pub fn wait(self) -> T {
        match self.0.recv().expect("the job sends its result even when it panics") {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

/// Runs `command` with `input` and returns what it wrote; an exit code other than 0 is an error.
pub fn output_of(command: &mut Command, input: &str) -> Result<String> {
    let name = format!("{command:?}");
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {name}"))?;
    // A command that does not read its input closes it: that is no error.
    let _ = child.stdin.take().expect("stdin is piped").write_all(input.as_bytes());
    let output = child.wait_with_output()?;
    let written = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        bail!("{name}: {}: {}{}", output.status, written, String::from_utf8_lossy(&output.stderr));
    }
    Ok(written)
}

fn ip(arguments: &[&str]) -> Result<()> {
    output_of(Command::new("ip").args(arguments), "").map(drop)
}

fn start_spawner(name: &str, cgroup: Option<&Path>) -> Result<mpsc::Sender<Job>> {
    let (sender, receiver) = mpsc::channel::<Job>();
    let (entered_sender, entered) = mpsc::channel();
    let netns = Path::new("/run/netns").join(name);
    let cgroup = cgroup.map(Path::to_owned);
    thread::Builder::new().name(name.to_owned()).spawn(move || {
        let entered = enter(&netns, cgroup.as_deref());
        let is_inside = entered.is_ok();
        if entered_sender.send(entered).is_err() || !is_inside {
            return;
        }
        for job in receiver {
            thread::spawn(job);
        }
    })?;
    entered.recv().context("the spawner ended at once")??;
    Ok(sender)
}

fn enter(netns: &Path, cgroup: Option<&Path>) -> Result<()> {
    let file = File::open(netns).with_context(|| format!("opening {}", netns.display()))?;
    setns(file, CloneFlags::CLONE_NEWNET).with_context(|| format!("entering {}", netns.display()))?;
    if let Some(cgroup) = cgroup {
        fs::write(cgroup.join("cgroup.threads"), gettid().to_string())
            .with_context(|| format!("joining {}", cgroup.display()))?;
    }
    Ok(())
}
