//! A node: a network namespace on the wire with an agent of its own.

use std::fs::{self, File, OpenOptions};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::cgroup::Cgroup;
use super::space::{Space, output_of};
use super::wire::{Wire, node_addresses};
use super::{Setup, binary};

/// Where an agent serves its metrics and health, in its own namespace.
pub const METRICS: &str = "127.0.0.1:9962";

/// A node of a lab.
#[derive(Debug)]
pub struct Node {
    name: String,
    addresses: Vec<IpAddr>,
    space: Space,
    directory: PathBuf,
    arguments: Vec<String>,
    agent: Mutex<Option<Child>>,
    /// Where the agent's program and its plugin are; `None`: beside the test's own.
    programs: Mutex<Option<PathBuf>>,
    // Last, so that it goes when the space's threads are gone.
    cgroup: Cgroup,
}

impl Node {
    /// Makes node number `number` (from 1) of `lab`, without an agent yet.
    pub(super) fn create(
        lab: &str,
        wire: &Wire,
        directory: &Path,
        number: usize,
        setup: &Setup,
    ) -> Result<Self> {
        let name = format!("node{number}");
        let cgroup = Cgroup::create(&format!("{lab}-{name}"))?;
        let addresses = node_addresses(number)?;
        let space = wire.host(&name, &addresses, Some(cgroup.path()))?;
        let own = directory.join(&name);
        fs::create_dir_all(own.join("bpf"))?;
        mount(Some("bpf"), &own.join("bpf"), Some("bpf"), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("mounting a bpffs for {name}"))?;
        let path = |name: &str| own.join(name).display().to_string();
        let mut arguments: Vec<String> = ["agent", "--node-name", &name].map(str::to_owned).into();
        if setup.has_manifests {
            arguments.extend(["--manifests".to_owned(), directory.join("manifests").display().to_string()]);
        }
        for (flag, value) in [
            ("--bpffs", path("bpf")),
            ("--cgroup-root", cgroup.path().display().to_string()),
            ("--state-dir", path("state")),
            ("--socket", path("run/agent.sock")),
            ("--routing", setup.routing.clone()),
            ("--metrics-address", METRICS.to_owned()),
        ] {
            arguments.extend([flag.to_owned(), value]);
        }
        arguments.extend(setup.agent_arguments.iter().cloned());
        let (agent, programs) = (Mutex::new(None), Mutex::new(None));
        Ok(Self { name, addresses, space, directory: own, arguments, agent, programs, cgroup })
    }

    /// `node1`, `node2`, ...
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its addresses on the wire, IPv4 first.
    pub fn addresses(&self) -> &[IpAddr] {
        &self.addresses
    }

    /// Its namespace; what runs there is in the node's cgroup.
    pub fn space(&self) -> &Space {
        &self.space
    }

    /// The cgroup at which the agent attaches its socket hooks.
    pub fn cgroup(&self) -> &Path {
        self.cgroup.path()
    }

    /// The directory with its bpffs (`bpf`), state (`state`) and log (`agent.log`).
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The agent's socket.
    pub fn socket(&self) -> PathBuf {
        self.directory.join("run/agent.sock")
    }

    /// Starts the agent; see `wait_ready`.
    pub fn start_agent(&self) -> Result<()> {
        self.start_agent_with(&[])
    }

    /// From now on the agent and its plugin are the ones of this directory, or else those of this build.
    pub fn use_programs(&self, directory: Option<&Path>) {
        *self.programs.lock().expect("no test panics while it holds a path") = directory.map(Path::to_owned);
    }

    /// Where the agent's program and its plugin are, if not beside the test's own.
    pub(super) fn programs(&self) -> Option<PathBuf> {
        self.programs.lock().expect("no test panics while it holds a path").clone()
    }

    fn program(&self, name: &str) -> Result<PathBuf> {
        program_in(self.programs().as_deref(), name)
    }

    /// Starts the agent with more arguments; a flag of them replaces the lab's own.
    pub fn start_agent_with(&self, more: &[&str]) -> Result<()> {
        let mut agent = self.agent.lock().expect("no test panics while it holds the agent");
        if agent.is_some() {
            bail!("the agent of {} runs already", self.name);
        }
        let log = OpenOptions::new().create(true).append(true).open(self.log_file())?;
        let mut command = Command::new(self.program("weir")?);
        let mut own = self.arguments.iter();
        while let Some(argument) = own.next() {
            match more.contains(&argument.as_str()) {
                true => drop(own.next()),
                false => drop(command.arg(argument)),
            }
        }
        command.args(more).env("RUST_BACKTRACE", "1");
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        *agent = Some(self.space.run(move || command.spawn()).context("starting the agent")?);
        Ok(())
    }

    /// Ends the agent with SIGKILL, as a crash does.
    pub fn kill_agent(&self) -> Result<()> {
        self.end_agent(Signal::SIGKILL)
    }

    /// Asks the agent to end, and waits until it has.
    pub fn stop_agent(&self) -> Result<()> {
        self.end_agent(Signal::SIGTERM)
    }

    fn end_agent(&self, signal: Signal) -> Result<()> {
        let mut agent = self.agent.lock().expect("no test panics while it holds the agent");
        if let Some(mut child) = agent.take() {
            kill(Pid::from_raw(child.id() as i32), signal)?;
            // On a busy machine the kernel takes seconds to take a process's inotify watches down.
            let deadline = Instant::now() + Duration::from_secs(60);
            while child.try_wait()?.is_none() {
                if Instant::now() > deadline {
                    child.kill()?;
                    child.wait()?;
                    bail!("the agent of {} did not end in 60 s after {signal}", self.name);
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        Ok(())
    }

    /// The process id of the proxy that the agent has started last, while it runs.
    pub fn proxy_pid(&self) -> Option<i32> {
        self.pid_of("proxy")
    }

    /// The same of an Envoy.
    pub fn envoy_pid(&self) -> Option<i32> {
        self.pid_of("envoy")
    }

    fn pid_of(&self, name: &str) -> Option<i32> {
        let file = self.directory.join(format!("state/{name}.pid"));
        let pid: i32 = fs::read_to_string(file).ok()?.trim().parse().ok()?;
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let own = self.directory.display().to_string();
        String::from_utf8_lossy(&line).contains(&own).then_some(pid)
    }

    /// Ends the proxy with SIGKILL, as a crash does.
    pub fn kill_proxy(&self) -> Result<()> {
        match self.proxy_pid() {
            Some(pid) => Ok(kill(Pid::from_raw(pid), Signal::SIGKILL)?),
            None => Ok(()),
        }
    }

    /// Ends an Envoy with SIGKILL, and waits until it is gone: it has much memory to give back.
    pub fn kill_envoy(&self) -> Result<()> {
        let Some(pid) = self.envoy_pid() else { return Ok(()) };
        kill(Pid::from_raw(pid), Signal::SIGKILL)?;
        super::wait_for("Envoy to be gone", || Ok(self.envoy_pid() != Some(pid)))
    }

    /// The process id of the agent, while it runs.
    pub fn agent_pid(&self) -> Option<u32> {
        self.agent.lock().expect("no test panics while it holds the agent").as_ref().map(Child::id)
    }

    /// Waits until the agent says that it is ready; how long that took.
    pub fn wait_ready(&self) -> Result<Duration> {
        let (began, patience) = (Instant::now(), 3 * super::patience());
        let address: SocketAddr = METRICS.parse()?;
        loop {
            if let Ok((200, _)) = self.space.http_get(address, "/readyz") {
                return Ok(began.elapsed());
            }
            if let Some(child) = self.agent.lock().expect("no test panics while it holds the agent").as_mut()
                && let Some(status) = child.try_wait()?
            {
                bail!("the agent of {} ended: {status}\n{}", self.name, self.log_tail());
            }
            if began.elapsed() > patience {
                bail!("the agent of {} is not ready after {patience:?}\n{}", self.name, self.log_tail());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// What `weir ARGUMENTS` prints when it asks this node's agent.
    pub fn weir(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(self.program("weir")?);
        command.args(arguments).arg("--socket").arg(self.socket());
        output_of(&mut command, "")
    }

    /// What `weir ARGUMENTS` prints, as JSON.
    pub fn weir_json(&self, arguments: &[&str]) -> Result<serde_json::Value> {
        let written = self.weir(&[arguments, &["-o", "json"]].concat())?;
        serde_json::from_str(&written)
            .with_context(|| format!("parsing the output of weir {arguments:?}: {written}"))
    }

    /// What `weir status` says, also when the agent is not ready or a part of it fails.
    pub fn status(&self) -> Result<serde_json::Value> {
        let mut command = Command::new(binary("weir")?);
        command.args(["status", "-o", "json", "--socket"]).arg(self.socket());
        let output = command.output().context("starting weir status")?;
        serde_json::from_slice(&output.stdout)
            .with_context(|| format!("parsing the output of weir status: {output:?}"))
    }

    /// The rows of one of the node's BPF maps, decoded.
    pub fn map(&self, name: &str) -> Result<Vec<serde_json::Value>> {
        let mut command = Command::new(self.program("weir")?);
        command.args(["map", "dump", name, "--bpffs"]).arg(self.directory.join("bpf"));
        let written = output_of(&mut command, "")?;
        let rows = written.lines().map(serde_json::from_str).collect::<Result<_, _>>();
        rows.with_context(|| format!("parsing the dump of {name}: {written}"))
    }

    /// The value of a metric, summed over the labels that contain all of `labels`.
    pub fn metric(&self, name: &str, labels: &[&str]) -> Result<f64> {
        let (status, body) = self.space.http_get(METRICS.parse()?, "/metrics")?;
        if status != 200 {
            bail!("/metrics answered {status}");
        }
        let rows = body.lines().filter(|line| {
            let rest = line.strip_prefix(name).unwrap_or("#");
            rest.starts_with(['{', ' ']) && labels.iter().all(|label| rest.contains(label))
        });
        Ok(rows.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum())
    }

    /// The flows of `weir observe --all ARGUMENTS`, oldest first.
    pub fn flows(&self, arguments: &[&str]) -> Result<Vec<Value>> {
        let written = self.weir(&[&["observe", "--all", "-o", "json"], arguments].concat())?;
        let lines = written.lines().map(|line| {
            let answer: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
            // Lines of another kind tell what was lost.
            Ok(answer.get("flow").cloned())
        });
        lines.filter_map(Result::transpose).collect()
    }

    fn log_file(&self) -> PathBuf {
        self.directory.join("agent.log")
    }

    /// All that the agent logged.
    pub fn log(&self) -> Result<String> {
        Ok(fs::read_to_string(self.log_file())?)
    }

    /// The last lines of the agent's log.
    pub fn log_tail(&self) -> String {
        let log = self.log().unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        let tail = &lines[lines.len().saturating_sub(80)..];
        format!("--- log of the agent of {}:\n{}\n---", self.name, tail.join("\n"))
    }

    /// Every pin below the node's bpffs.
    pub fn pins(&self) -> Vec<PathBuf> {
        files_below(&self.directory.join("bpf"))
    }

    /// Every file of the agent's state.
    pub fn state_files(&self) -> Vec<PathBuf> {
        files_below(&self.directory.join("state"))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if super::has_failed() {
            eprintln!("{}", self.log_tail());
            let drops = self.weir(&["observe", "--verdict", "dropped", "--last", "30"]);
            eprintln!(
                "--- dropped on {}:\n{}---",
                self.name,
                drops.unwrap_or_else(|error| format!("{error:#}"))
            );
        }
        let ended = self.kill_agent().and(self.kill_proxy()).and(self.kill_envoy());
        // What encrypts for the node goes on without its agent.
        for socket in ["run/wireguard.sock", "run/wireguard1.sock"] {
            let socket = self.directory.join(socket);
            if let Ok(mut client) = weir::encryption::protocol::Client::connect(&socket) {
                let _ = client.call(&weir::encryption::protocol::Request::Stop, &[]);
            }
        }
        let unmounted = umount2(&self.directory.join("bpf"), MntFlags::MNT_DETACH);
        if ended.is_err() || unmounted.is_err() {
            eprintln!("removing {}: agent {ended:?}, bpffs {unmounted:?}", self.name);
        }
    }
}

fn files_below(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut directories = vec![directory.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => directories.push(entry.path()),
                _ => found.push(entry.path()),
            }
        }
    }
    found.sort();
    found
}

/// True if a bpffs can be mounted here.
pub(super) fn can_mount_bpffs(directory: &Path) -> bool {
    let mounted = mount(Some("bpf"), directory, Some("bpf"), MsFlags::empty(), None::<&str>);
    mounted.is_ok() && umount2(directory, MntFlags::MNT_DETACH).is_ok() && File::open(directory).is_ok()
}

/// The path of `weir` or `weir-cni` in a directory, or beside the test's own program.
pub(super) fn program_in(programs: Option<&Path>, name: &str) -> Result<PathBuf> {
    programs.map_or_else(|| binary(name), |directory| Ok(directory.join(name)))
}
