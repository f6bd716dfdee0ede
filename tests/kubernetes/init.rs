//! What makes a namespace a machine, run inside: cgroups, mounts and processes of its own, and
//! a first process that starts containerd and kubelet, and starts them again when they end.
//!
//! Its file system is the machine's, with these differences: `/proc`, `/sys`, the cgroup tree,
//! `/sys/fs/bpf` and `/run` are fresh; `/var/lib`, `/var/log` and `/opt` are folders of its own;
//! what it writes to `/etc` and `/home` stays its own.

use std::fs::{self, File, OpenOptions};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::{WaitStatus, wait};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::control_plane::balanced_api_server;
use super::hierarchy::{Hierarchy, hierarchies};
use super::platform::{Facts, Platform};
use crate::lab::output_of;

/// The file with the number of the node's first process.
pub const PID: &str = "pid";

const RUNTIME: &str = "/run/containerd/containerd.sock";
const CGROUPS: &str = "/sys/fs/cgroup";

/// Keeps pods off a new node until its agent is ready.
const TAINT: &str = "node.weir.dev/agent-not-ready:NoSchedule";

/// Starts a program of the node.
type Start = fn(&Machine) -> Result<Pid>;

/// What the first process has to know.
#[derive(Debug, Serialize, Deserialize)]
pub struct Machine {
    pub name: String,
    pub zone: String,
    pub addresses: Vec<IpAddr>,
    pub directory: PathBuf,
    pub programs: PathBuf,
    pub cgroup: String,
    pub platform: Platform,
    pub api_server: SocketAddr,
}

/// Gives this process namespaces of its own and starts the first process inside; returns when that ends.
pub fn enter(machine: &str) -> Result<()> {
    let parsed: Machine = serde_json::from_str(machine)?;
    let hierarchies = hierarchies()?;
    hierarchies.iter().try_for_each(|hierarchy| hierarchy.join(&parsed.cgroup))?;
    let namespaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWCGROUP
        | CloneFlags::CLONE_NEWPID;
    unshare(namespaces).context("making namespaces")?;
    // A group of v2 has processes or passes controllers on: the node's own are beside its pods.
    let leaf = format!("{}/init", parsed.cgroup);
    let mut unified = hierarchies.iter().filter(|hierarchy| hierarchy.is_unified);
    unified.try_for_each(|hierarchy| hierarchy.join(&leaf))?;
    let mut first = Command::new(std::env::current_exe()?).arg("init").arg(machine).spawn()?;
    fs::write(parsed.directory.join(PID), first.id().to_string())?;
    first.wait()?;
    Ok(())
}

/// Runs as the first process of the node; returns only with an error.
pub fn run(machine: &str) -> Result<()> {
    let machine: Machine = serde_json::from_str(machine)?;
    let hierarchies = hierarchies()?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
        .context("making the mounts private")?;
    detach_others()?;
    nix::unistd::sethostname(&machine.name)?;
    mount_kernel(&hierarchies)?;
    mount_files(&machine)?;
    // Volumes with Bidirectional propagation want it.
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SHARED, None::<&str>)
        .context("making the mounts shared")?;
    supervise(&machine)
}

/// Mounts of other labs would stay as long as this node.
fn detach_others() -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    for point in points.filter(|point| point.starts_with("/run/netns") || point.starts_with("/tmp/weirlab-"))
    {
        // Those below another went with it.
        let _ = umount2(point, MntFlags::MNT_DETACH);
    }
    Ok(())
}

fn mount_kernel(hierarchies: &[Hierarchy]) -> Result<()> {
    fresh("proc", "/proc", None)?;
    fresh("sysfs", "/sys", None)?;
    if !hierarchies.iter().any(|hierarchy| hierarchy.is_at(Path::new(CGROUPS))) {
        fresh("tmpfs", CGROUPS, Some("mode=755"))?;
    }
    for hierarchy in hierarchies {
        hierarchy.mount_again()?;
        hierarchy.delegate()?;
    }
    fresh("bpf", "/sys/fs/bpf", None)
}

fn mount_files(machine: &Machine) -> Result<()> {
    fresh("tmpfs", "/run", Some("mode=755"))?;
    fs::create_dir_all("/run/netns")?;
    for path in ["/var/lib", "/var/log", "/opt"] {
        let own = machine.directory.join(&path[1..]);
        fs::create_dir_all(&own)?;
        mount(Some(&own), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .with_context(|| format!("mounting {path}"))?;
    }
    for path in ["/etc", "/home"] {
        lay_over(machine, path)?;
    }
    if Path::new("/etc/cni").exists() {
        fs::remove_dir_all("/etc/cni")?;
    }
    fs::create_dir_all("/etc/cni/net.d")?;
    put_plugins(machine.platform.facts())?;
    // It may be a link to somewhere below /run.
    let _ = fs::remove_file("/etc/resolv.conf");
    fs::write("/etc/resolv.conf", "nameserver 10.200.0.100\n").context("writing resolv.conf")
}

/// What is written there stays the node's own.
fn lay_over(machine: &Machine, path: &str) -> Result<()> {
    let (upper, work) =
        (machine.directory.join(&path[1..]), machine.directory.join(format!("{}.work", &path[1..])));
    fs::create_dir_all(&upper)?;
    fs::create_dir_all(&work)?;
    let layers = format!("lowerdir={path},upperdir={},workdir={}", upper.display(), work.display());
    fresh("overlay", path, Some(&layers))
}

/// The plugins and the network configuration that a node of the platform has before Weir comes.
fn put_plugins(facts: &Facts) -> Result<()> {
    fs::create_dir_all("/opt/cni/bin")?;
    let directory = Path::new(facts.plugin_directory);
    fs::create_dir_all(directory)?;
    for plugin in facts.plugins {
        fs::copy(Path::new("/usr/lib/cni").join(plugin), directory.join(plugin))
            .with_context(|| format!("copying the plugin {plugin}"))?;
    }
    if let Some((name, text)) = facts.configuration {
        fs::write(Path::new("/etc/cni/net.d").join(name), text)?;
    }
    Ok(())
}

fn fresh(kind: &str, target: &str, options: Option<&str>) -> Result<()> {
    mount(Some(kind), target, Some(kind), MsFlags::empty(), options)
        .with_context(|| format!("mounting {target}"))
}

/// Starts what runs on a node, and starts it again whenever it ends.
fn supervise(machine: &Machine) -> Result<()> {
    let containerd = start_containerd(machine)?;
    wait_for("containerd", || UnixStream::connect(RUNTIME).is_ok())?;
    for image in fs::read_dir(machine.programs.join("images"))? {
        let mut import = Command::new("ctr");
        import.args(["--namespace", "k8s.io", "images", "import"]).arg(image?.path());
        output_of(&mut import, "")?;
    }
    let facts = machine.platform.facts();
    let mut running = vec![(containerd, start_containerd as Start)];
    if facts.balancer.is_some() {
        running.push((start_balancer(machine)?, start_balancer));
    }
    let is_there = || TcpStream::connect_timeout(&machine.api_server, Duration::from_secs(1)).is_ok();
    wait_for("the API server", is_there)?;
    running.push((start_kubelet(machine)?, start_kubelet));
    if facts.has_kube_proxy {
        running.push((start_kube_proxy(machine)?, start_kube_proxy));
    }
    loop {
        // Orphans of the whole node are this process's children too.
        let (WaitStatus::Exited(ended, _) | WaitStatus::Signaled(ended, ..)) = wait()? else { continue };
        for (pid, start) in running.iter_mut().filter(|(pid, _)| *pid == ended) {
            sleep(Duration::from_secs(1));
            *pid = start(machine)?;
        }
    }
}

fn wait_for(what: &str, mut condition: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition() {
        if Instant::now() > deadline {
            bail!("waited 60 s in vain for {what}");
        }
        sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn start_containerd(machine: &Machine) -> Result<Pid> {
    let mut containerd = Command::new("containerd");
    containerd.arg("--config").arg(machine.directory.join("containerd.toml"));
    start(machine, "containerd", containerd)
}

fn start_kubelet(machine: &Machine) -> Result<Pid> {
    let file = |name: &str| machine.directory.join(name).display().to_string();
    let addresses: Vec<String> = machine.addresses.iter().map(IpAddr::to_string).collect();
    let mut kubelet = Command::new(machine.programs.join("bin/kubelet"));
    kubelet.args([
        format!("--config={}", file("kubelet.yaml")),
        format!("--kubeconfig={}", file(&format!("{}.kubeconfig", machine.name))),
        format!("--hostname-override={}", machine.name),
        format!("--node-ip={}", addresses.join(",")),
        format!("--node-labels=topology.kubernetes.io/zone={}", machine.zone),
    ]);
    if machine.platform.facts().is_tainted {
        kubelet.arg(format!("--register-with-taints={TAINT}"));
    }
    start(machine, "kubelet", kubelet)
}

fn start_kube_proxy(machine: &Machine) -> Result<Pid> {
    let kubeconfig = machine.directory.join(format!("{}-proxy.kubeconfig", machine.name));
    let mut proxy = Command::new(machine.programs.join("bin/kube-proxy"));
    proxy.args([
        "--proxy-mode=iptables".to_owned(),
        format!("--kubeconfig={}", kubeconfig.display()),
        format!("--hostname-override={}", machine.name),
        // These are the machine's, not the namespace's.
        "--conntrack-max-per-core=0".to_owned(),
    ]);
    start(machine, "kube-proxy", proxy)
}

/// Takes connections to the API server at the node's own loopback address, as k3s does.
fn start_balancer(machine: &Machine) -> Result<Pid> {
    let listener = TcpListener::bind(machine.api_server).context("listening for the API server's clients")?;
    let mut relay = Command::new(std::env::current_exe()?);
    relay.args(["relay", &balanced_api_server().to_string()]).stdin(Stdio::from(OwnedFd::from(listener)));
    start(machine, "balancer", relay)
}

fn start(machine: &Machine, name: &str, mut command: Command) -> Result<Pid> {
    let log: File =
        OpenOptions::new().create(true).append(true).open(machine.directory.join(format!("{name}.log")))?;
    let child =
        command.stdout(log.try_clone()?).stderr(log).spawn().with_context(|| format!("starting {name}"))?;
    // Waited for in `supervise`, by its number.
    Ok(Pid::from_raw(child.id() as i32))
}
